"""Nasty gradients through gradclip and the clipping functions of other libraries: who is right?

Rows are inputs, columns are libraries. Each library gets the same values, in arrays of its own, by its own
official function. The yardstick is mpmath, at 60 digits, from the exact values of the input; the rule for
"ok" is printed under the table. The exit status is 1 if gradclip is not right in every row.

Needs mpmath and ml_dtypes; JAX, optax, torch, TensorFlow and MLX join in where they are installed. Run with

    python examples/compare.py
"""

import os
import sys
import warnings
from collections import Counter, namedtuple

import mpmath as mp
import numpy as np
from ml_dtypes import bfloat16, finfo

import gradclip

Case = namedtuple("Case", "name leaves max_norm p", defaults=(1.0, 2.0))
Library = namedtuple("Library", "module load any_p complex", defaults=(True, True))


def f32(*values):
    return np.array(values, np.float32)


CASES = [
    Case("float16 [300]", [np.array([300], np.float16)]),
    Case("float16 [300, 400]", [np.array([300, 400], np.float16)]),
    Case("[1e20, 1e20]", [f32(1e20, 1e20)]),
    Case("[3e38, 3e38]", [f32(3e38, 3e38)]),
    Case("[1e-30], max_norm 1e-31", [f32(1e-30)], 1e-31),
    Case("[1e-30, 1e-30], max_norm 1e-31", [f32(1e-30, 1e-30)], 1e-31),
    Case("float64 [1e200, 1e200]", [np.array([1e200, 1e200])]),
    Case("500 leaves of 1000 bfloat16 0.01", [np.full(1000, 0.01, bfloat16)] * 500),
    Case("float16 [3] beside float32 [1e6]", [np.array([3], np.float16), f32(1e6)]),
    Case("[0, 0], max_norm 0", [f32(0, 0)], 0.0),
    Case("[3, 4], max_norm 0", [f32(3, 4)], 0.0),
    Case("at the bound: [1..24]/64", [np.arange(1, 25, dtype=np.float32) / 64], 70 / 64),
    Case("below the bound: [.1, .2, .3]", [f32(0.1, 0.2, 0.3)]),
    Case("the same, max_norm 41", [f32(0.1, 0.2, 0.3)], 41.0),
    Case("[1e30, 1e30], max_norm inf", [f32(1e30, 1e30)], np.inf),
    Case("[3, 4], p=1000", [f32(3, 4)], p=1000.0),
    Case("[1, 0, 2], [3, 4], [0], p=0", [f32(1, 0, 2), f32(3, 4), f32(0)], p=0.0),
    Case("1e7 elements of 0.01", [np.full(10**7, 0.01, np.float32)]),
    Case("one NaN: [1, nan], [2, 3]", [f32(1, np.nan), f32(2, 3)]),
    Case("no leaves", []),
    Case("0-d leaf 5", [np.array(5, np.float32)]),
    Case("complex64 [3+4j]", [np.array([3 + 4j], np.complex64)]),
]

LEGEND = """
Leaves are float32, max_norm is 1 and p is 2 where the row says nothing else.
ok   The norm is within 8 eps of the dtype it came in (1e-6 above 1e5 elements), or inf where that dtype
     cannot hold it. Clipped elements are within 4 eps of their dtype, beyond what the norm may be off.
     Gradients whose norm is at most max_norm come back bit for bit. For a NaN: an error, or no finite
     element is left.
n/a  The function has no norm_type, or is not made for complex numbers. "error": it raised an exception.
Some of what differs is a choice, documented or plain in the source: torch and MLX divide by norm + 1e-6, so
that tiny gradients shrink, and those at the bound by 1e-6; TensorFlow asks for max_norm > 0, and answers an
infinite norm with NaN, as a signal. A norm in the leaf's dtype counts as right. optax's clip returns no norm:
the one judged is optax.tree.norm. The JAX columns are jitted; optax without jit also returns zeros for
float16 [300] and norm 0 for [1e-30], where XLA turns the root of one square into a magnitude.
"""


def jax_clipper(function):
    """Jitted, as in training. 64 bits are on for the row that has them; the others see JAX's defaults."""
    import jax

    jitted = jax.jit(function, static_argnums=2)

    def clip(leaves, max_norm, p):
        jax.config.update("jax_enable_x64", any(leaf.dtype == np.float64 for leaf in leaves))
        return jitted([jax.numpy.asarray(leaf) for leaf in leaves], max_norm, p)

    return clip


def optax_clipper():
    import optax

    def clip(grads, max_norm, p):
        clipped, _ = optax.clip_by_global_norm(max_norm).update(grads, optax.EmptyState())
        return clipped, optax.tree.norm(grads)

    return jax_clipper(clip)


def torch_clipper(function=None):
    import torch

    def nn_utils(grads, max_norm, p):
        params = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        norm = torch.nn.utils.clip_grad_norm_(params, max_norm, p)
        return grads, norm

    def to_torch(leaf):  # from NumPy, torch takes no bfloat16, but its bits
        narrow = leaf.dtype == bfloat16
        return torch.tensor(leaf.view(np.int16)).view(torch.bfloat16) if narrow else torch.tensor(leaf)

    def to_numpy(x):
        if not isinstance(x, torch.Tensor):
            return x
        return x.view(torch.int16).numpy().view(bfloat16) if x.dtype == torch.bfloat16 else x.numpy()

    def clip(leaves, max_norm, p):
        grads, norm = (function or nn_utils)([to_torch(leaf) for leaf in leaves], max_norm, p)
        return [to_numpy(grad) for grad in grads], to_numpy(norm)

    return clip


def tensorflow_clipper():
    import tensorflow as tf

    def clip(leaves, max_norm, p):
        grads, norm = tf.clip_by_global_norm([tf.constant(leaf) for leaf in leaves], max_norm)
        return [grad.numpy() for grad in grads], norm.numpy()

    return clip


def mlx_clipper():
    import mlx.core as mx
    from mlx.optimizers import clip_grad_norm

    mx.set_default_device(mx.cpu)  # MLX has float64 there only

    def to_numpy(x):
        return np.array(x.view(mx.int16)).view(bfloat16) if x.dtype == mx.bfloat16 else np.array(x)

    def clip(leaves, max_norm, p):
        grads = {str(i): mx.array(leaf, getattr(mx, leaf.dtype.name)) for i, leaf in enumerate(leaves)}
        grads, norm = clip_grad_norm(grads, max_norm)
        return [to_numpy(grad) for grad in grads.values()], to_numpy(norm)

    return clip


LIBRARIES = {
    "gradclip numpy": Library("numpy", lambda: gradclip.clip_grad_norm),
    "gradclip jax": Library("jax", lambda: jax_clipper(gradclip.clip_grad_norm)),
    "gradclip torch": Library("torch", lambda: torch_clipper(gradclip.clip_grad_norm)),
    "torch": Library("torch", torch_clipper),
    "optax": Library("optax", optax_clipper, any_p=False),
    "tensorflow": Library("tensorflow", tensorflow_clipper, any_p=False, complex=False),
    "mlx": Library("mlx.core", mlx_clipper, any_p=False, complex=False),
}


def parts(leaf):
    """The real and imaginary parts of all elements, in float64, which holds every dtype here exactly."""
    flat = np.array(leaf).ravel()
    return (flat.view(flat.real.dtype) if flat.dtype.kind == "c" else flat).astype(np.float64)


def exact_norm(case):
    counts = Counter()
    for leaf in case.leaves:
        for value, count in zip(*np.unique(abs(parts(leaf)), return_counts=True), strict=True):
            counts[float(value)] += int(count)
    if case.p == 0:
        return mp.mpf(sum(count for value, count in counts.items() if value))
    return mp.root(mp.fsum(n * mp.mpf(value) ** int(case.p) for value, n in counts.items()), int(case.p))


def verdict(case, norm, got, reported):
    """In a word or two, what is wrong with a library's answer; "ok" if nothing is."""
    if mp.isnan(norm):
        return "finite left" if any(np.isfinite(leaf).any() for leaf in got) else "ok"
    for leaf, new in zip(case.leaves, got, strict=True):
        if (new.dtype, new.shape) != (leaf.dtype, leaf.shape):
            return f"{new.dtype} {new.shape}"
    if any(np.isnan(new).any() for new in got):
        return "nan"
    if case.max_norm and norm and not any(new.any() for new in got):
        return "zeros"
    tolerance = 8 * float(finfo(reported.dtype).eps)
    if sum(leaf.size for leaf in case.leaves) > 1e5:
        tolerance = max(tolerance, 1e-6)
    if not (np.isinf(reported) and norm > float(finfo(reported.dtype).max)):
        off = float((mp.mpf(float(reported)) - norm) / (norm or 1))
        if not abs(off) <= tolerance:
            size = f"{float(f'{100 * abs(off):.2g}'):g}%"
            return f"norm {size} {'low' if off < 0 else 'high'}"
    if norm <= case.max_norm:
        same = all(leaf.tobytes() == new.tobytes() for leaf, new in zip(case.leaves, got, strict=True))
        return "ok" if same else "bits changed"
    for leaf, new in zip(case.leaves, got, strict=True):
        values, where = np.unique(parts(leaf), return_inverse=True)
        want = np.array([float(mp.mpf(value) * case.max_norm / norm) for value in values])[where]
        info = finfo(leaf.dtype)
        room = (4 * float(info.eps) + tolerance) * abs(want) + float(info.smallest_subnormal)
        if (abs(parts(new) - want) > room).any():
            return "wrong values"
    return "ok"


def cell(case, norm, library, clip):
    if (case.p != 2 and not library.any_p) or (
        not library.complex and any(leaf.dtype.kind == "c" for leaf in case.leaves)
    ):
        return "n/a"
    try:
        got, reported = clip(case.leaves, case.max_norm, case.p)
    except Exception:
        return "ok" if mp.isnan(norm) else "error"
    return verdict(case, norm, [np.asarray(leaf) for leaf in got], np.asarray(reported))


def main():
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.simplefilter("ignore")
    mp.mp.dps = 60
    clippers, absent = {}, []
    for name, library in LIBRARIES.items():
        try:
            clippers[name] = library.load()
        except Exception as error:  # not installed, or installed and broken
            absent.append(f"{name} ({type(error).__name__}: {error})")

    width = max(len(case.name) for case in CASES) + 2
    print(" " * width + "".join(f"{name:16}" for name in clippers).rstrip())
    right = 0
    for case in CASES:
        norm = exact_norm(case)
        cells = {name: cell(case, norm, LIBRARIES[name], clip) for name, clip in clippers.items()}
        print(f"{case.name:{width}}" + "".join(f"{text:16}" for text in cells.values()).rstrip(), flush=True)
        right += all(text == "ok" for name, text in cells.items() if name.startswith("gradclip"))

    print(LEGEND)
    modules = dict.fromkeys(["gradclip"] + [LIBRARIES[name].module for name in clippers])
    print("Compared:", ", ".join(f"{name} {sys.modules[name].__version__}" for name in modules))
    print("Not compared:", "; ".join(absent) or "none")
    print(f"gradclip: {right} of {len(CASES)} right")
    return int(right < len(CASES))


if __name__ == "__main__":
    sys.exit(main())

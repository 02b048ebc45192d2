"""Nasty gradients through gradclip and the clipping functions of other libraries: who is right?

Rows are inputs, columns are libraries. A row says what is asked: a clip by the norm of all leaves together, or, where
its name begins so, of each leaf, by the rms of each leaf, by the parameters of each unit (agc), or the sum of clipped
examples. Each library gets the same values, in arrays of its own, by its own official function for that. The yardstick
is mpmath, at 60 digits, from the exact values of the input; the rule for "ok" is printed under the table. The exit
status is 1 if gradclip is not right in every row.

Needs mpmath and ml_dtypes; JAX, optax, torch, TensorFlow, Keras and MLX join in where they are installed. Run it with

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

#: `ask`: global, leaf, rms, agc or example. For agc, `max_norm` is the ratio to the norms of `params`.
Case = namedtuple("Case", "name leaves max_norm p ask params", defaults=(1.0, 2.0, "global", None))
#: `load` returns a function for each thing that it can do: (leaves, max_norm, p, params) -> (clipped, norms or None).
Library = namedtuple("Library", "module load any_p complex", defaults=(True, True))
EPS = 1e-3  # of agc: the least norm of parameters that counts, in gradclip and in optax


def f32(*values):
    return np.array(values, np.float32)


def f16(*values):
    return np.array(values, np.float16)


def agc(name, grads, params, ratio):
    return Case(name, [grads], ratio, ask="agc", params=[params])


CASES = [
    Case("float16 [300]", [f16(300)]),
    Case("float16 [300, 400]", [f16(300, 400)]),
    Case("[1e20, 1e20]", [f32(1e20, 1e20)]),
    Case("[3e38, 3e38]", [f32(3e38, 3e38)]),
    Case("[1e-30], max_norm 1e-31", [f32(1e-30)], 1e-31),
    Case("[1e-30, 1e-30], max_norm 1e-31", [f32(1e-30, 1e-30)], 1e-31),
    Case("float64 [1e200, 1e200]", [np.array([1e200, 1e200])]),
    Case("500 leaves of 1000 bfloat16 0.01", [np.full(1000, 0.01, bfloat16)] * 500),
    Case("float16 [3] beside float32 [1e6]", [f16(3), f32(1e6)]),
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
    Case("leaf: float16 [300, 400], [.1, .2]", [f16(300, 400), f16(0.1, 0.2)], ask="leaf"),
    Case("leaf: [1e20, 1e20], [.1, .2, .3]", [f32(1e20, 1e20), f32(0.1, 0.2, 0.3)], ask="leaf"),
    Case("leaf: complex64 [3+4j], [.3+.4j]", [np.array([z], np.complex64) for z in (3 + 4j, 0.3 + 0.4j)], ask="leaf"),
    Case("leaf: one NaN: [1, nan], [2, 3]", [f32(1, np.nan), f32(2, 3)], ask="leaf"),
    Case("leaf: [0, 0], [3, 4], max_norm 0", [f32(0, 0), f32(3, 4)], 0.0, ask="leaf"),
    Case("rms: float16 [300, 400]", [f16(300, 400)], ask="rms"),
    Case("rms: [1e20, 1e20], [.1, .2, .3]", [f32(1e20, 1e20), f32(0.1, 0.2, 0.3)], ask="rms"),
    Case("rms: [0, 0], [3, 4], max_norm 0", [f32(0, 0), f32(3, 4)], 0.0, ask="rms"),
    agc("agc: float16 [300, 400] of [3, 4]", f16([300, 1], [400, 2]), f16([3, 1], [4, 1]), 0.1),
    agc("agc: [1e20, 1e20] of [2e20, 2e20]", f32([1e20, 1], [1e20, 2]), f32([2e20, 1], [2e20, 1]), 0.1),
    agc("agc: [1e-7, 2e-7] of [0, 0], 1e-5", f32([1e-7, 0], [2e-7, 0]), f32([0, 0], [0, 0]), 1e-5),
    agc("agc: one NaN: [nan, 1], [2, 3]", f32([np.nan, 2], [1, 3]), f32([1, 1], [1, 1]), 0.1),
    Case("example: float16 [300], [.1]", [f16([300], [0.1])], ask="example"),
    Case("example: [1e20, 1e20], [.1, .2]", [f32([1e20, 1e20], [0.1, 0.2])], ask="example"),
    Case("example: one NaN: [1, nan], [2, 3]", [f32([1, np.nan], [2, 3])], ask="example"),
    Case("example: one inf: [1, inf], [2, 3]", [f32([1, np.inf], [2, 3])], ask="example"),
    Case("example: one alone: [300, 400]", [f32([300, 400])], ask="example"),
]

LEGEND = """
Leaves are float32, max_norm is 1 and p is 2 where the row says nothing else.
ok   The norm is within 8 eps of the dtype it came in (1e-6 above 1e5 elements), or inf where that dtype
     cannot hold it. Clipped elements are within 4 eps of their dtype, beyond what the norm may be off.
     Gradients whose norm is at most max_norm come back bit for bit. For a NaN: an error, or no finite
     element is left of what shares a norm with it.
     example: the sum is within 5e-6 of that of the clipped examples, or 8 eps of the dtype it came in; an
     example that is not finite adds nothing, or is an error; one alone has an exact norm of at most max_norm,
     which is what differential privacy counts on.
agc  Units are columns, max_norm is the ratio, and the least norm of parameters that counts is 1e-3.
n/a  The library has no function that does this, the function has no norm_type, or it is not made for complex
     numbers. "error": it raised an exception.
Some of what differs is a choice, documented or plain in the source: torch and MLX divide by norm + 1e-6, so
that tiny gradients shrink, and those at the bound by 1e-6; TensorFlow asks for max_norm > 0, and answers an
infinite norm with NaN, as a signal; to Keras, 0 means no clipping. A norm in the leaf's dtype counts as right.
optax's clip returns no norm: the one judged is optax.tree.norm, and none where others return none. For each leaf,
torch's function is called once a leaf. The JAX columns are jitted; optax without jit also returns zeros for
float16 [300] and norm 0 for [1e-30], where XLA turns the root of one square into a magnitude.
"""


def ours():
    """Looked up at each call, for tests put others in their place."""
    return {
        "global": lambda grads, c, p, _: gradclip.clip_grad_norm(grads, c, p),
        "leaf": lambda grads, c, p, _: gradclip.clip_grad_norm(grads, c, p, per="leaf"),
        "rms": lambda grads, c, p, _: gradclip.clip_grad_norm(grads, c, "rms", per="leaf"),
        "agc": lambda grads, c, p, params: gradclip.clip_grad_agc(grads, params, c, p, eps=EPS),
        "example": lambda grads, c, p, _: gradclip.clipped_sum(grads, c, p),
    }


def converted(functions, convert, back=np.asarray):
    """Functions on a library's own arrays, as functions on NumPy's."""

    def wrapped(function):
        def clip(leaves, max_norm, p, params):
            params = params and [convert(leaf) for leaf in params]
            grads, norms = function([convert(leaf) for leaf in leaves], max_norm, p, params)
            if isinstance(norms, list):
                return [back(grad) for grad in grads], [back(norm) for norm in norms]
            return [back(grad) for grad in grads], norms if norms is None else back(norms)

        return clip

    return {ask: wrapped(function) for ask, function in functions.items()}


def with_x64(clip):
    """64 bits are on for the row that has them; the others see JAX's defaults."""
    import jax

    def switched(leaves, *args):
        jax.config.update("jax_enable_x64", any(leaf.dtype == np.float64 for leaf in leaves))
        return clip(leaves, *args)

    return switched


def jax_clippers(functions):
    """Jitted, as in training."""
    import jax

    jitted = {ask: jax.jit(function, static_argnums=2) for ask, function in functions.items()}
    return {ask: with_x64(clip) for ask, clip in converted(jitted, jax.numpy.asarray).items()}


def optax_clippers():
    import optax

    def transform(make):
        def clip(grads, max_norm, p, params):
            clipped, _ = make(max_norm).update(grads, optax.EmptyState(), params)
            return clipped, None

        return clip

    by_global_norm = transform(optax.clip_by_global_norm)
    return jax_clippers(
        {
            "global": lambda grads, c, p, params: (by_global_norm(grads, c, p, params)[0], optax.tree.norm(grads)),
            "rms": transform(optax.clip_by_block_rms),
            "agc": transform(lambda ratio: optax.adaptive_grad_clip(ratio, EPS)),
            "example": lambda grads, c, p, _: (optax.per_example_global_norm_clip(grads, c)[0], None),
        }
    )


def torch_clippers(functions=None):
    import torch

    def nn_utils(grads, max_norm, p, _):
        params = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        norm = torch.nn.utils.clip_grad_norm_(params, max_norm, p)
        return grads, norm

    def each(grads, max_norm, p, _):
        return grads, [nn_utils([grad], max_norm, p, _)[1] for grad in grads]

    def to_torch(leaf):  # from NumPy, torch takes no bfloat16, but its bits
        narrow = leaf.dtype == bfloat16
        return torch.tensor(leaf.view(np.int16)).view(torch.bfloat16) if narrow else torch.tensor(leaf)

    def to_numpy(x):
        if not isinstance(x, torch.Tensor):
            return x
        return x.view(torch.int16).numpy().view(bfloat16) if x.dtype == torch.bfloat16 else x.numpy()

    return converted(functions or {"global": nn_utils, "leaf": each}, to_torch, to_numpy)


def tensorflow_clippers():
    import tensorflow as tf

    return converted(
        {
            "global": lambda grads, c, p, _: tf.clip_by_global_norm(grads, c),
            "leaf": lambda grads, c, p, _: ([tf.clip_by_norm(grad, c) for grad in grads], None),
        },
        tf.constant,
    )


def keras_clippers():
    """Keras clips inside its optimizers: a step of 1 from weights of 0 shows what it made of the gradients."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    def step(leaves, **clip):
        weights = [keras.Variable(np.zeros(leaf.shape), dtype=leaf.dtype.name) for leaf in leaves]
        grads = [keras.ops.convert_to_tensor(leaf) for leaf in leaves]
        keras.optimizers.SGD(learning_rate=1.0, **clip).apply(grads, weights)
        return [np.zeros_like(w) - w for w in map(np.asarray, weights)], None

    return {
        "global": with_x64(lambda leaves, c, p, _: step(leaves, global_clipnorm=c)),
        "leaf": with_x64(lambda leaves, c, p, _: step(leaves, clipnorm=c)),
    }


def mlx_clippers():
    import mlx.core as mx
    from mlx.optimizers import clip_grad_norm

    mx.set_default_device(mx.cpu)  # MLX has float64 there only

    def clip(grads, max_norm, p, _):
        grads, norm = clip_grad_norm(dict(enumerate(grads)), max_norm)
        return list(grads.values()), norm

    def to_numpy(x):
        return np.array(x.view(mx.int16)).view(bfloat16) if x.dtype == mx.bfloat16 else np.array(x)

    return converted({"global": clip}, lambda leaf: mx.array(leaf, getattr(mx, leaf.dtype.name)), to_numpy)


LIBRARIES = {
    "gradclip numpy": Library("numpy", ours),
    "gradclip jax": Library("jax", lambda: jax_clippers(ours())),
    "gradclip torch": Library("torch", lambda: torch_clippers(ours())),
    "torch": Library("torch", torch_clippers),
    "optax": Library("optax", optax_clippers, any_p=False),
    "tensorflow": Library("tensorflow", tensorflow_clippers, any_p=False, complex=False),
    "keras": Library("keras", keras_clippers, any_p=False, complex=False),
    "mlx": Library("mlx.core", mlx_clippers, any_p=False, complex=False),
}


def parts(leaf):
    """The real and imaginary parts of all elements, in float64, which holds every dtype here exactly."""
    flat = np.array(leaf).ravel()
    return (flat.view(flat.real.dtype) if flat.dtype.kind == "c" else flat).astype(np.float64)


def exact_norm(leaves, p=2.0):
    counts = Counter()
    for leaf in leaves:
        for value, count in zip(*np.unique(abs(parts(leaf)), return_counts=True), strict=True):
            counts[float(value)] += int(count)
    if p == 0:
        return mp.mpf(sum(count for value, count in counts.items() if value))
    return mp.root(mp.fsum(n * mp.mpf(value) ** int(p) for value, n in counts.items()), int(p))


def groups(case):
    """What shares a norm: its leaves with an index into each, its exact norm, its bound, and the place of its norm."""
    if case.ask == "global":
        everything = [(j, ...) for j in range(len(case.leaves))]
        yield everything, exact_norm(case.leaves, case.p), case.max_norm, ()
        return
    for j, leaf in enumerate(case.leaves):
        if case.ask == "agc":
            for k in range(leaf.shape[1]):
                weights = exact_norm([case.params[j][:, k]])
                bound = mp.mpf(case.max_norm) * max(weights, mp.mpf(EPS))
                yield [(j, np.s_[:, k])], exact_norm([leaf[:, k]]), bound, (j, (0, k))
        else:
            norm = exact_norm([leaf], case.p)
            yield [(j, ...)], norm / mp.sqrt(leaf.size) if case.ask == "rms" else norm, case.max_norm, (j,)


def judge_group(leaves, norm, max_norm, got, reported):
    """In a word or two, what is wrong with the answer for one group; "ok" if nothing is."""
    if mp.isnan(norm):
        return "finite left" if any(np.isfinite(new).any() for new in got) else "ok"
    if any(np.isnan(new).any() for new in got):
        return "nan"
    if max_norm and norm and not any(new.any() for new in got):
        return "zeros"
    tolerance = 8 * float(finfo(np.float32 if reported is None else reported.dtype).eps)
    if sum(leaf.size for leaf in leaves) > 1e5:
        tolerance = max(tolerance, 1e-6)
    if reported is not None and not (np.isinf(reported) and norm > float(finfo(reported.dtype).max)):
        off = float((mp.mpf(float(reported)) - norm) / (norm or 1))
        if not abs(off) <= tolerance:
            size = f"{float(f'{100 * abs(off):.2g}'):g}%"
            return f"norm {size} {'low' if off < 0 else 'high'}"
    if norm <= max_norm:
        same = all(leaf.tobytes() == new.tobytes() for leaf, new in zip(leaves, got, strict=True))
        return "ok" if same else "bits changed"
    for leaf, new in zip(leaves, got, strict=True):
        values, where = np.unique(parts(leaf), return_inverse=True)
        want = np.array([float(mp.mpf(value) * max_norm / norm) for value in values])[where]
        info = finfo(leaf.dtype)
        room = (4 * float(info.eps) + tolerance) * abs(want) + float(info.smallest_subnormal)
        if (abs(parts(new) - want) > room).any():
            return "wrong values"
    return "ok"


def judge_sum(case, got):
    """The same for the sum of clipped examples, of which those that are not finite add nothing."""
    norms = [exact_norm([leaf[b] for leaf in case.leaves]) for b in range(len(case.leaves[0]))]
    factors = [min(mp.mpf(1), case.max_norm / norm) if mp.isfinite(norm) and norm else mp.mpf(0) for norm in norms]
    if any(np.isnan(new).any() for new in got):
        return "nan"
    if any(factors) and not any(new.any() for new in got):
        return "zeros"
    for leaf, new in zip(case.leaves, got, strict=True):
        terms = [
            [factor * mp.mpf(float(x)) if factor else 0 for x in row] for row, factor in zip(leaf, factors, strict=True)
        ]
        for value, column in zip(new, zip(*terms, strict=True), strict=True):
            room = max(5e-6, 8 * float(finfo(new.dtype).eps)) * mp.fsum(map(abs, column))
            if not abs(mp.mpf(float(value)) - mp.fsum(column)) <= room:
                return "wrong values"
    return "over the bound" if len(norms) == 1 and exact_norm(got) > case.max_norm else "ok"


def verdict(case, got, reported):
    got = [np.asarray(new) for new in got]
    if case.ask == "example":
        return judge_sum(case, got)
    for leaf, new in zip(case.leaves, got, strict=True):
        if (new.dtype, new.shape) != (leaf.dtype, leaf.shape):
            return f"{new.dtype} {new.shape}"
    for members, norm, bound, place in groups(case):
        own = reported
        try:
            for index in place if reported is not None else ():
                own = own[index]
        except (IndexError, TypeError):
            return "norms misshapen"
        if np.ndim(own):
            return "norms misshapen"
        leaves, answer = ([arrays[j][at] for j, at in members] for arrays in (case.leaves, got))
        text = judge_group(leaves, norm, bound, answer, None if own is None else np.asarray(own))
        if text != "ok":
            return text
    return "ok"


def cell(case, library, clippers):
    is_complex = any(leaf.dtype.kind == "c" for leaf in case.leaves)
    if case.ask not in clippers or (case.p != 2 and not library.any_p) or (is_complex and not library.complex):
        return "n/a"
    try:
        got, reported = clippers[case.ask](case.leaves, case.max_norm, case.p, case.params)
    except Exception:
        return "error" if all(np.isfinite(leaf).all() for leaf in case.leaves) else "ok"
    return verdict(case, got, reported)


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
        cells = {name: cell(case, LIBRARIES[name], functions) for name, functions in clippers.items()}
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

"""NumPy: the host sees every number, so nothing is computed or written that is not needed.

The work is cut into blocks (see `blocks`), which threads share; the policy runs on single numbers (see `scalars`).
For 25 million float32 elements the norm takes 5 ms on one thread against 95 ms for the generic kernel, and for 1,000
leaves of 1,024 elements a whole clip 1.8 ms against 46 ms (2 cores, NumPy 2.4).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import array_api_compat.numpy as xp
import numpy as np

from gradclip._kernels import scalars
from gradclip._kernels.blocks import CHUNK, blocks, multiplied, pairs, squares
from gradclip._kernels.dtypes import COMPONENT_BITS, dtype_name, dtype_names
from gradclip._kernels.generic import Kernels
from gradclip._kernels.threads import each, num_threads
from gradclip._law import Law, join
from gradclip._norms import TwoNorm
from gradclip._numbers import Measured
from gradclip._types import Array, Call

#: Leaves up to here are strung together, so that a norm costs one pass of 0.1 us an element and not 2 us a leaf.
_SMALL = 1 << 13

#: What one thread takes at once, in elements; and how many there must be for a second thread to pay.
_BLOCK = 1 << 20
_MANY = 1 << 20


#: So few numbers are added up in float64 before the exact sum takes over, which takes 60 ns a number.
_FEW = 8


class NumpyKernels(Kernels):
    """Kernels for `numpy.ndarray`, ml_dtypes' bfloat16 included."""

    def __init__(self, namespace: Any = xp) -> None:
        super().__init__(namespace)

    def adopt(self, leaf: Array) -> Array:
        return leaf if isinstance(leaf, np.ndarray | np.generic) else np.asarray(leaf)

    def adopted(self, leaves: Sequence[Array]) -> Sequence[Array]:
        return leaves if set(map(type, leaves)) == {np.ndarray} else super().adopted(leaves)

    def device(self, leaf: Array) -> Any:
        return "cpu"

    def devices(self, leaves: Sequence[Array]) -> list[Any]:
        return ["cpu"]

    def move(self, x: Array, device: Any) -> Array:
        return x

    def full(self, value: float, dtype: Any, device: Any) -> Array:
        return np.dtype(dtype).type(value)

    def number(self, value: Any, acc: Any, device: Any) -> Measured:
        return super().number(float(value), acc, device)

    def total(self, x: Array, axis: int | None = None) -> Array:
        if axis is not None:
            return np.sum(x, axis=axis)
        # Pairwise sums have rows of 16 in them, which for 1e5 equal elements are up to 5 units in the last place off.
        flat = x.reshape(-1)
        rows = flat[: flat.size - flat.size % _FEW].reshape(-1, _FEW)
        with np.errstate(all="ignore"):
            return np.float64(_fsum([*np.sum(rows, axis=1).tolist(), *flat[rows.size :].tolist()]))

    def report(self, norm: Array) -> Array:
        return np.asarray(norm)

    def accumulation(self, leaves: Sequence[Array]) -> Any:
        return np.float64

    def all_writable(self, leaves: Sequence[Array]) -> bool:
        return all(flags.writeable and flags.forc for flags in [x.flags for x in leaves])

    def distinct(self, leaves: Sequence[Array]) -> Sequence[Array]:
        if len(set(map(id, leaves))) == len(leaves) and all(x.base is None for x in leaves):
            return leaves  # each owns its memory
        return super().distinct(leaves)

    def shares(self, leaf: Array) -> Any:
        face = leaf.__array_interface__
        layout = (leaf.size,) if leaf.flags.c_contiguous else (leaf.shape, leaf.strides)
        return face["data"][0], face["typestr"], layout

    def staged(self, plan: Callable[..., Any], arrays: Sequence[Array], all_reduce: Call | None) -> Callable[..., Any]:
        return lambda kernels, *args, **static: plan(_ON_HOST, *args, **static)

    # -- norms ---------------------------------------------------------------------------------------------

    def partials(self, leaves: Sequence[Array], law: Law, acc: Any, seen: tuple[Array, ...]) -> list[Array]:
        if not isinstance(law, TwoNorm):
            return [self.partial(leaf, law, acc, seen) for leaf in leaves if leaf.size]
        jobs = _jobs(leaves)
        wide = self.reported(leaves) == np.float64
        sums = each(lambda job: _sum_of_squares(job, wide), jobs, _threads(leaves, "float16", "bfloat16"))
        known = [s for s in sums if s == s]
        rest = [x for job, s in zip(jobs, sums, strict=True) if s != s for x in job]
        exact = [self.partial(x, law, acc, seen) for x in rest]
        return [np.asarray([0.0, math.fsum(known), 0.0]), *exact] if known else exact

    def partial(self, leaf: Array, law: Law, acc: Any, seen: tuple[Array, ...]) -> Array:
        pieces = [super(NumpyKernels, self).partial(x, law, acc, seen) for x in blocks(np.asarray(leaf), CHUNK)]
        return join(xp, law.ops[len(seen)], pieces, self.total)

    # -- clipping ------------------------------------------------------------------------------------------

    def scale(self, leaves: Sequence[Array], factor: Array, shift: Array | None) -> list[Array]:
        if factor == 1 and (shift is None or shift == 1):
            return list(leaves)
        out = [np.empty_like(x, subok=False) for x in leaves]
        self._multiply(leaves, out, factor, shift)
        return [y if isinstance(x, np.ndarray) else y.dtype.type(y[()]) for x, y in zip(leaves, out, strict=True)]

    def scale_into(self, leaves: Sequence[Array], factor: Array, shift: Array | None) -> None:
        if factor == 1 and (shift is None or shift == 1):
            return
        if _overlap(leaves):
            super().scale_into(leaves, factor, shift)  # what two leaves share is scaled once, from what it was
        else:
            self._multiply(leaves, leaves, factor, shift)

    def _multiply(self, leaves: Sequence[Array], outs: Sequence[Array], factor: Array, shift: Array | None) -> None:
        """`out = leaf * shift * factor * shift` for every leaf."""
        if factor == 0 or factor != factor:
            for out in outs:
                out[...] = factor
            return
        if (shift is not None and shift != 1) or not 2.0**-126 <= factor <= 2.0**126:
            for leaf, out in zip(leaves, outs, strict=True):
                _multiplied_wide(leaf, out, [factor] if shift is None else [shift, factor, shift])
            return
        wide = self.reported(leaves) == np.float64
        plain = {np.dtype(kind): np.asarray(factor, kind) for kind in (np.float32, np.float64)[wide:]}
        jobs: list[tuple[Array, Array]] = []
        for leaf, out in zip(leaves, outs, strict=True):
            if leaf.size <= _BLOCK and leaf.dtype in plain:
                np.multiply(leaf, plain[leaf.dtype], out)
            elif isinstance(leaf, np.generic) or (wide and COMPONENT_BITS[dtype_name(leaf)] < 64):
                _multiplied_wide(leaf, out, [factor])
            else:
                jobs += pairs(leaf, out, _BLOCK)
        each(lambda job: multiplied(job[0], factor, job[1]), jobs, _threads(leaves, "float16"))

    def clamped(self, leaf: Array, low: Any, high: Any) -> Array:
        out = super().clamped(np.asarray(leaf), low, high).astype(leaf.dtype, copy=False)
        return leaf.dtype.type(out) if isinstance(leaf, np.generic) else out


class _OnHost(NumpyKernels):
    """The same, with a namespace for single numbers: the policy's and the last step of a norm."""

    def joined(self, leaves: Sequence[Array], law: Law, acc: Any, all_reduce: Call | None) -> tuple[Array, ...]:
        return NUMPY.joined(leaves, law, acc, all_reduce)


NUMPY, _ON_HOST = NumpyKernels(), _OnHost(scalars)


def _overlap(leaves: Sequence[Array]) -> bool:
    """Whether two elements may share memory: of two leaves, as their first and last bytes say, or of one."""
    if all(x.base is None for x in leaves):
        return False
    spans = sorted(np.lib.array_utils.byte_bounds(x) for x in leaves if x.size)
    return any(end > start for (_, end), (start, _) in pairwise(spans)) or any(map(_folded, leaves))


def _folded(x: Array) -> bool:
    """Whether elements of one array may share memory, as those of a sliding window: a stride is within shorter ones."""
    if x.flags.forc:
        return False
    reach = x.itemsize
    for stride, n in sorted((abs(stride), n) for stride, n in zip(x.strides, x.shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach += stride * (n - 1)
    return False


def _fsum(values: list[float]) -> float:
    total = sum(values)
    return math.fsum(values) if math.isfinite(total) else total


def _threads(leaves: Sequence[Array], *alone: str) -> int:
    """How many threads to use. `alone`: dtypes whose blocks take so many short steps that threads wait for each other's
    interpreter lock: the norm of 25 million float16 elements took 15 ms with one, and 25 with two.
    """
    if sum(x.size for x in leaves) < _MANY or dtype_names(leaves).intersection(alone):
        return 1
    return num_threads()


def _jobs(leaves: Sequence[Array]) -> list[list[Array]]:
    """The leaves as lists of arrays of one dtype, each list as long as one thread should take at once."""
    jobs: list[list[Array]] = []
    open_lists: defaultdict[Any, list[Array]] = defaultdict(list)
    room: defaultdict[Any, int] = defaultdict(lambda: CHUNK)
    for leaf in leaves:
        n, dtype = leaf.size, leaf.dtype
        if n > _SMALL:
            jobs += ([x] for x in blocks(np.asarray(leaf), _BLOCK))
        elif n:
            open_lists[dtype].append(leaf)
            room[dtype] -= n
            if room[dtype] < _SMALL:
                jobs.append(open_lists.pop(dtype))
                del room[dtype]
    return jobs + list(open_lists.values())


def _sum_of_squares(job: list[Array], wide: bool) -> float:
    """The sum of |x|^2 of all elements, NaN where a plain sum cannot say."""
    block = job[0].reshape(-1) if len(job) == 1 else np.concatenate(job, axis=None)
    return squares(block if block.dtype.isnative else block.astype(block.dtype.newbyteorder("=")), wide)


def _multiplied_wide(leaf: Array, out: Array, steps: list[Array]) -> None:
    """`out = leaf * steps`, the product formed in float64 or complex128 and rounded once."""
    acc = np.dtype(np.complex128 if dtype_name(leaf).startswith("complex") else np.float64)
    if len(steps) > 1 or dtype_name(leaf) == "bfloat16":  # bfloat16 has no ufunc loop in float64
        product = leaf.astype(acc)
        for step in steps:
            product *= step
        out[...] = product.astype(leaf.dtype)
    else:  # the ufunc casts in blocks of its own, so that no wide copy of the leaf is made
        np.multiply(leaf, steps[0], out=out, dtype=acc, casting="same_kind")

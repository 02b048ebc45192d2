"""NumPy: the host sees every number, so nothing is computed or written that is not needed.

The work is cut into blocks (see `loops`), which threads share; the policy of one group runs on single numbers (see
`scalars`). For 25 million float32 elements the norm takes 5 ms on one thread against 95 ms for the generic backend, and
for 1,000 leaves of 1,024 elements a whole clip 1.8 ms against 46 ms (2 cores, NumPy 2.4).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import array_api_compat.numpy as xp
import numpy as np

from gradclip._backends.generic import Backend
from gradclip._backends.numpy import scalars
from gradclip._backends.numpy.loops import CHUNK, blocks, multiplied, padded, pairs, squares, squares_of_each
from gradclip._dtypes import dtype_names
from gradclip._groups import Groups
from gradclip._norms import Norm, Seen, TwoNorm
from gradclip._scaled import Factors, Scaled
from gradclip._threads import each, num_threads
from gradclip._types import Array

T = TypeVar("T")
R = TypeVar("R")

#: Leaves up to here are strung together, so that a norm costs one pass of 0.1 us an element and not 2 us a leaf.
_SMALL = 1 << 13
_LITTLE = padded(_SMALL)

#: What one thread takes at once, in elements. A second one pays for no fewer.
_BLOCK = 1 << 20

_SINGLE, _DOUBLE, _COMPLEX = np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.complex128)

#: So few numbers are added up in float64 before the exact sum takes over, which takes 60 ns a number.
_FEW = 8


class NumpyBackend(Backend):
    """The work on `numpy.ndarray`, ml_dtypes' bfloat16 included."""

    def __init__(self) -> None:
        super().__init__(xp)
        self._xp_of_numbers = scalars

    def adopt(self, leaves: Sequence[Array]) -> Sequence[Array]:
        if set(map(type, leaves)) == {np.ndarray}:
            return leaves
        return [x if isinstance(x, np.ndarray | np.generic) else np.asarray(x) for x in leaves]

    def accumulation(self, leaves: Sequence[Array]) -> Any:
        return np.float64

    def move(self, x: Array, device: Any) -> Array:
        return x

    def number(self, value: Any, acc: Any, device: Any) -> Scaled:
        if not isinstance(value, list):
            return super().number(float(value), acc, device)
        row = np.asarray(value, np.float64)
        subnormal = (row > 0) & (row < np.finfo(np.float64).tiny)
        return super().number(row.tolist(), acc, device) if subnormal.any() else Scaled(row, None)

    def _full(self, value: float, dtype: Any, device: Any) -> Array:
        return np.dtype(dtype).type(value)

    # -- norms ---------------------------------------------------------------------------------------------

    def partial(self, leaves: Sequence[Array], norm: Norm, groups: Groups, seen: Seen) -> Array:
        if not isinstance(norm, TwoNorm):
            return super().partial(leaves, norm, groups, seen)
        jobs = _jobs(leaves, groups)
        owners: list[int] = []
        sums: list[float] = []
        columns: dict[int, list[Array]] = defaultdict(list)
        for job, found in zip(jobs, _shared(_sums, jobs, leaves, "float16", "bfloat16"), strict=True):
            for i in [i for i, s in enumerate(found) if s != s]:
                again = job.arrays if len(found) == 1 else [job.arrays[i]]
                columns[job.groups[i]] += [self._contribution(x, norm, np.float64, seen) for x in again]
                found[i] = 0.0
            owners += job.groups[: len(found)]
            sums += found
        out = np.zeros((3, groups.count))
        if len(set(owners)) == len(owners):
            out[1, owners] = sums
        else:
            known: list[list[float]] = [[] for _ in range(groups.count)]
            for group, s in zip(owners, sums, strict=True):
                known[group].append(s)
            out[1] = list(map(math.fsum, known))
        for group, column in columns.items():
            out[:, group] = self._joined([out[:, group], *column], "sum")
        return out

    def _contribution(self, leaf: Array, norm: Norm, acc: Any, seen: Seen) -> Array:
        pieces = [super(NumpyBackend, self)._contribution(x, norm, acc, seen) for x in blocks(np.asarray(leaf), CHUNK)]
        return self._joined(pieces, norm.ops[len(seen)])

    def _total(self, x: Array, axis: int | None = None) -> Array:
        if axis is not None:
            return np.sum(x, axis=axis)
        # Pairwise sums have rows of 16 in them, which for 1e5 equal elements are up to 5 units in the last place off.
        flat = x.reshape(-1)
        rows = flat[: flat.size - flat.size % _FEW].reshape(-1, _FEW)
        values = [*np.sum(rows, axis=1).tolist(), *flat[rows.size :].tolist()]
        total = sum(values)
        return np.float64(math.fsum(values) if math.isfinite(total) else total)

    # -- the policy ----------------------------------------------------------------------------------------

    def _reported(self, norm: Array, wide: Any, groups: Groups) -> list[Array]:
        if groups.count == 1:
            return [np.asarray(norm, np.float64 if wide else np.float32)]
        row = norm + np.zeros(groups.count)
        narrow, flags = row.astype(np.float32), (wide | np.zeros(groups.count, bool)).tolist()
        return [(row if wide else narrow)[i, ...] for i, wide in enumerate(flags)]

    # -- clipping ------------------------------------------------------------------------------------------

    def scale(self, leaves: Sequence[Array], factors: Factors, groups: Groups, in_place: bool) -> Sequence[Array]:
        factor = _each(factors.factor, groups.count)
        shift = _each(1.0 if factors.shift is None else factors.shift, groups.count)
        steps = list(map(_steps, factor.tolist(), shift.tolist()))
        if not any(steps):
            return leaves
        if in_place and _overlap(leaves):
            return super().scale(leaves, factors, groups, in_place)  # what two share is scaled once, from what it was
        # 0-d arrays: to multiply by one takes 0.4 us for 1,024 elements, by a number 0.6.
        narrow = factor.astype(np.float32)
        exact = [factor[i, ...] if len(x) == 1 else None for i, x in enumerate(steps)]
        single = [None if exact[i] is None or wide else narrow[i, ...] for i, wide in enumerate(groups.wide)]
        own: dict[Any, list[Any]] = {_SINGLE: single, _DOUBLE: exact, _COMPLEX: exact}  # dtypes that are multiplied in
        nothing = [None] * groups.count
        outs = list(leaves)
        jobs: list[tuple[Array, Array, Sequence[float], bool]] = []
        for i, (leaf, group) in enumerate(zip(leaves, groups.base, strict=True)):
            by = own.get(leaf.dtype, nothing)[group]
            if by is None and not steps[group]:
                continue
            outs[i] = out = leaf if in_place else np.empty_like(leaf, subok=False)
            if by is not None and leaf.size <= _BLOCK:
                np.multiply(leaf, by, out)
            else:
                wide = groups.wide[group]
                jobs += ((x, y, steps[group], wide) for x, y in pairs(np.asarray(leaf), out, _BLOCK))
        _shared(lambda job: multiplied(*job), jobs, leaves, "float16")
        return (
            outs if in_place else [y[()] if isinstance(x, np.generic) else y for x, y in zip(leaves, outs, strict=True)]
        )

    def clamp(self, leaf: Array, low: Any, high: Any) -> Array:
        out = super().clamp(np.asarray(leaf), low, high).astype(leaf.dtype, copy=False)
        return leaf.dtype.type(out) if isinstance(leaf, np.generic) else out


def _overlap(leaves: Sequence[Array]) -> bool:
    """Whether two elements may share memory: of two leaves, as their first and last bytes say, or of one."""
    if all(x.base is None for x in leaves):
        return len(set(map(id, leaves))) < len(leaves)
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


def _shared(f: Callable[[T], R], jobs: Sequence[T], leaves: Sequence[Array], *alone: str) -> list[R]:
    """`[f(job) for job in jobs]`, by threads where they pay. `alone`: dtypes whose blocks take so many short steps that
    threads wait for each other's interpreter lock: the norm of 25 million float16 elements took 15 ms with one, and 25
    with two.
    """
    few = len(jobs) < 2 or sum(x.size for x in leaves) < _BLOCK
    return each(f, jobs, 1 if few or dtype_names(leaves).intersection(alone) else num_threads())


@dataclass(slots=True)
class _Job:
    """Arrays of one dtype whose squares a thread adds up at once: one sum for each, or one for all of one group."""

    arrays: list[Array]
    groups: list[int]
    wide: bool
    room: int = CHUNK


def _jobs(leaves: Sequence[Array], groups: Groups) -> list[_Job]:
    """The leaves as jobs, each as long as one thread should take at once."""
    jobs: list[_Job] = []
    is_open: dict[Any, _Job] = {}
    apart, mixed = groups.count > 1, len(set(groups.wide)) > 1
    for leaf, group in zip(leaves, groups.base, strict=True):
        n, wide = leaf.size, groups.wide[group]
        if n > _SMALL:
            jobs += [_Job([x], [group], wide) for x in blocks(leaf, _BLOCK)]
        elif n:
            key = (leaf.dtype, wide) if mixed else leaf.dtype
            job = is_open.get(key)
            if job is None:
                job = is_open[key] = _Job([], [], wide)
            job.arrays.append(leaf)
            job.groups.append(group)
            job.room -= padded(n) if apart else n
            if job.room < _LITTLE:
                jobs.append(is_open.pop(key))
    return jobs + list(is_open.values())


def _sums(job: _Job) -> list[float]:
    """The sums of |x|^2, NaN where a plain sum cannot say."""
    if len(set(job.groups)) > 1:
        return squares_of_each(job.arrays, job.wide)
    block = job.arrays[0].reshape(-1) if len(job.arrays) == 1 else np.concatenate(job.arrays, axis=None)
    return [squares(block if block.dtype.isnative else block.astype(block.dtype.newbyteorder("=")), job.wide)]


def _each(row: Any, n: int) -> Array:
    """The numbers of n groups, from a row or from one number for all."""
    values = np.asarray(row, np.float64).reshape(-1)
    return values if len(values) == n else np.repeat(values, n)


def _steps(factor: float, shift: float) -> Sequence[float]:
    """What to multiply by, in this order: nothing, one normal float32 number, or two shifts and a factor between."""
    if shift == 1 and 2.0**-126 <= factor <= 2.0**126:
        return (factor,) if factor != 1 else ()
    return shift, factor, shift

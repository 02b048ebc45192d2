"""NumPy: the host sees every number, so nothing is computed or written that is not needed.

The work is cut into blocks (see `loops`), which threads share; the policy of one group runs on single numbers (see
`scalars`). For 25 million float32 elements the norm takes 5 ms on one thread against 95 ms for the generic backend, and
for 1,000 leaves of 1,024 elements a whole clip 1.8 ms against 46 ms (2 cores, NumPy 2.4).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import array_api_compat.numpy as xp
import numpy as np

from gradclip._backends.generic import Backend
from gradclip._backends.numpy import scalars, units
from gradclip._backends.numpy.jobs import BLOCK, jobs_of, sums_of
from gradclip._backends.numpy.loops import blocks, multiplied, pairs
from gradclip._backends.numpy.sixteen import CHUNK
from gradclip._backends.numpy.tables import SHORT, look_up, tables_for
from gradclip._dtypes import dtype_names
from gradclip._groups import Groups
from gradclip._norms import Norm, RmsNorm, Seen, TwoNorm, identity
from gradclip._scaled import Factors, Scaled
from gradclip._threads import each, num_threads
from gradclip._types import Array

T = TypeVar("T")
R = TypeVar("R")

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
        row = np.concatenate([np.asarray(x, np.float64).reshape(-1) for x in value])
        subnormal = (row > 0) & (row < np.finfo(np.float64).tiny)
        return super().number(row.tolist(), acc, device) if subnormal.any() else Scaled(row, None)

    def _full(self, value: float, dtype: Any, device: Any) -> Array:
        return np.dtype(dtype).type(value)

    # -- norms ---------------------------------------------------------------------------------------------

    def partial(self, leaves: Sequence[Array], norm: Norm, groups: Groups, seen: Seen) -> Array:
        if not isinstance(norm, TwoNorm):
            return super().partial(leaves, norm, groups, seen)
        out = np.zeros((norm.slots[0], groups.count))
        if not groups.kept:
            self._of_whole(leaves, groups.base, norm, groups, out)
        else:
            whole = [i for i, axis in enumerate(groups.keep) if axis is None]
            self._of_whole([leaves[i] for i in whole], [groups.base[i] for i in whole], norm, groups, out)
            self._of_units(leaves, norm, groups, out)
        if isinstance(norm, RmsNorm):
            out[3] = 0
            for leaf, start, block in zip(leaves, groups.base, groups.block, strict=True):
                n = 1 if leaf.size == 0 else groups.lengths[block]
                out[3, start : start + n] += leaf.size // n
        return out

    def _of_whole(self, leaves: Sequence[Array], base: Sequence[int], norm: Norm, groups: Groups, out: Array) -> None:
        """The sums of leaves of one group each."""
        jobs = jobs_of(leaves, base, groups)
        owners: list[int] = []
        sums: list[float] = []
        again: dict[int, list[Array]] = defaultdict(list)
        for job, found in zip(jobs, _shared(sums_of, jobs, leaves, "float16", "bfloat16"), strict=True):
            for i in [i for i, s in enumerate(found) if s != s]:
                arrays = job.arrays if len(found) == 1 else [job.arrays[i]]
                again[job.groups[i]] += [self._contribution(x, None, norm, np.float64, ())[:, 0] for x in arrays]
                found[i] = 0.0
            owners += job.groups[: len(found)]
            sums += found
        if len(set(owners)) == len(owners):
            out[1, owners] = sums
        else:
            known: dict[int, list[float]] = defaultdict(list)
            for group, s in zip(owners, sums, strict=True):
                known[group].append(s)
            out[1, list(known)] = list(map(math.fsum, known.values()))
        for group, column in again.items():
            out[:, group] = self._joined([out[:, group], *column], "sum")

    def _of_units(self, leaves: Sequence[Array], norm: Norm, groups: Groups, out: Array) -> None:
        """The sums of leaves of which an axis is kept."""
        views = {i: units.view(leaves[i], axis)[0] for i, axis in groups.kept.items() if leaves[i].size}
        jobs = [
            (i, part, some, groups.wide[groups.block[i]])
            for i, x in views.items()
            for part, some in units.pieces(x, 2 * BLOCK)
        ]
        sums = _shared(lambda job: units.squares(job[1], job[3]), jobs, leaves, "float16", "bfloat16")
        own = {i: np.zeros((norm.slots[0], x.shape[1])) for i, x in views.items()}
        for (i, part, some, _), found in zip(jobs, sums, strict=True):
            bad = np.flatnonzero(np.isnan(found))
            if bad.size:
                own[i][:, bad + some.start] += self._contribution(part[:, bad], 1, norm, np.float64, ())
                found[bad] = 0
            own[i][1, some] += found
        by_block: dict[int, list[Array]] = defaultdict(list)
        for i, x in own.items():
            by_block[groups.block[i]].append(x)
        for block, found in by_block.items():
            start, n = groups.starts[block], groups.lengths[block]
            out[:, start : start + n] = found[0] if len(found) == 1 else units.fold(np.stack(found))

    def _contribution(self, leaf: Array, keep: int | None, norm: Norm, acc: Any, seen: Seen) -> Array:
        op, leaf = norm.ops[len(seen)], np.asarray(leaf)
        if keep is None:
            some = [super(NumpyBackend, self)._contribution(x, None, norm, acc, seen) for x in blocks(leaf, CHUNK)]
            return self._joined(some, op)
        out = np.full((norm.slots[len(seen)], leaf.shape[keep]), identity(op))
        for part, at in units.pieces(units.view(leaf, keep)[0], CHUNK):
            more = super()._contribution(part, 1, norm, acc, tuple(x[:, at] for x in seen))
            out[:, at] = self._joined([out[:, at], more], op)
        return out

    def _total(self, x: Array) -> Array:
        if x.ndim > 2 or len(x) > 1:
            return np.sum(x, axis=-1) if x.shape[-1] <= _FEW else units.fold(np.moveaxis(x, -1, 0))
        # Pairwise sums have rows of 16 in them, which for 1e5 equal elements are up to 5 units in the last place off.
        flat = x.reshape(-1)
        rows = flat[: flat.size - flat.size % _FEW].reshape(-1, _FEW)
        values = [*np.sum(rows, axis=1).tolist(), *flat[rows.size :].tolist()]
        total = sum(values)
        return np.array([math.fsum(values) if math.isfinite(total) else total])

    # -- the policy ----------------------------------------------------------------------------------------

    def _reported(self, norm: Array, wide: Any, groups: Groups) -> list[Array]:
        if groups.shapes == ((),):
            return [np.asarray(norm, np.float64 if wide else np.float32)]
        row = norm + np.zeros(groups.count)
        # The joined width of a block is that of its groups.
        narrow, flags = row.astype(np.float32), wide | np.zeros(groups.count, bool)
        if groups.count == len(groups.shapes) and not any(groups.shapes):
            return [(row if wide else narrow)[i, ...] for i, wide in enumerate(flags.tolist())]
        of_block = zip(groups.starts, groups.lengths, groups.shapes, groups.wide, strict=True)
        return [
            (row if (flags[start] if n else is_wide) else narrow)[start : start + n].reshape(shape)
            for start, n, shape, is_wide in of_block
        ]

    # -- clipping ------------------------------------------------------------------------------------------

    def scale(self, leaves: Sequence[Array], factors: Factors, groups: Groups, in_place: bool) -> Sequence[Array]:
        factor, shift = _both(factors, groups.count)
        whole: Sequence[int] = range(len(leaves))
        base, wide, few = groups.base, groups.each_wide, (factor, shift)
        changes: Array = np.zeros(0, bool)
        if groups.kept:  # of their many groups, no Python number is made
            changes = (factor != 1) | (shift != 1)
            whole = [i for i in whole if i not in groups.kept]
            numbers = [groups.base[i] for i in whole]
            base, wide = tuple(range(len(whole))), tuple(groups.each_wide[g] for g in numbers)
            few = factor[numbers], shift[numbers]
        steps = list(map(_steps, few[0].tolist(), few[1].tolist()))
        if not any(steps) and not changes.any():
            return leaves
        if in_place and _overlap(leaves):
            return super().scale(leaves, factors, groups, in_place)  # what two share is scaled once, from what it was
        # 0-d arrays: to multiply by one takes 0.4 us for 1,024 elements, by a number 0.6.
        narrow = few[0].astype(np.float32)
        exact = [few[0][i, ...] if len(x) == 1 else None for i, x in enumerate(steps)]
        single = [None if exact[i] is None or is_wide else narrow[i, ...] for i, is_wide in enumerate(wide)]
        own: dict[Any, list[Any]] = {_SINGLE: single, _DOUBLE: exact, _COMPLEX: exact}  # dtypes that are multiplied in
        nothing = [None] * len(steps)
        tables = tables_for([leaves[i] for i in whole], base, steps, wide)
        outs = list(leaves)
        jobs: list[Callable[[], Any]] = []
        for i, group in zip(whole, base, strict=True):
            leaf = leaves[i]
            by = own.get(leaf.dtype, nothing)[group]
            if by is None and not steps[group]:
                continue
            outs[i] = out = leaf if in_place else np.empty_like(leaf, subok=False)
            if by is not None and leaf.size <= BLOCK:
                np.multiply(leaf, by, out)
            else:
                table = tables.get(group) if leaf.dtype.char == "e" else None
                cut = pairs(np.asarray(leaf), out, BLOCK)
                if table is None:
                    jobs += [partial(multiplied, x, y, steps[group], wide[group]) for x, y in cut]
                elif leaf.size <= SHORT:
                    look_up(np.asarray(leaf), out, table)
                else:
                    jobs += [partial(look_up, x, y, table) for x, y in cut]
        for i, keep in groups.kept.items():
            leaf, block = leaves[i], groups.block[i]
            at = slice(groups.base[i], groups.base[i] + groups.lengths[block])
            if not leaf.size or not changes[at].any():
                continue
            outs[i] = out = leaf if in_place else np.empty_like(leaf, subok=False)
            jobs += units.scaling(leaf, out, keep, factor[at], shift[at], groups.wide[block], self._scaled)
        _shared(lambda job: job(), jobs, leaves, *([] if tables else ["float16"]))
        return (
            outs if in_place else [y[()] if isinstance(x, np.generic) else y for x, y in zip(leaves, outs, strict=True)]
        )

    def weighted_sum(self, leaves: Sequence[Array], factors: Factors, groups: Groups) -> list[Array]:
        by = units.weights(*_both(factors, groups.count))
        matrices = [units.matrix(x) for x in leaves]
        width = max(1, 2 * BLOCK // max(1, groups.count))
        jobs = [(i, x[:, at : at + width]) for i, x in enumerate(matrices) for at in range(0, x.shape[1], width)]
        sums = _shared(lambda job: units.weighted_sum(job[1], by), jobs, leaves, "float16", "bfloat16")
        parts: list[list[Array]] = [[np.zeros(0)] for _ in leaves]
        for (i, _), total in zip(jobs, sums, strict=True):
            parts[i].append(total)
        out = []
        for leaf, own in zip(leaves, parts, strict=True):
            total = np.concatenate(own).astype(np.float64 if leaf.dtype.char in "dD" else np.float32, copy=False)
            total[np.abs(total) < np.finfo(total.dtype).smallest_normal] = 0
            dtype = np.result_type(total, np.complex64) if leaf.dtype.kind == "c" else total.dtype
            out.append(total.view(dtype).reshape(leaf.shape[1:]))
        return out

    def _clamped(self, leaf: Array, low: Any, high: Any) -> Array:
        out = super()._clamped(np.asarray(leaf), low, high).astype(leaf.dtype, copy=False)
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
    few = len(jobs) < 2 or sum(x.size for x in leaves) < BLOCK
    return each(f, jobs, 1 if few or dtype_names(leaves).intersection(alone) else num_threads())


def _both(factors: Factors, n: int) -> tuple[Array, Array]:
    """The factor and the shift of each of n groups."""
    rows = (np.asarray(1.0 if x is None else x, np.float64).reshape(-1) for x in factors)
    factor, shift = (x if len(x) == n else np.repeat(x, n) for x in rows)
    return factor, shift


def _steps(factor: float, shift: float) -> Sequence[float]:
    """What to multiply by, in this order: nothing, one normal float32 number, or two shifts and a factor between."""
    if shift == 1 and 2.0**-126 <= factor <= 2.0**126:
        return (factor,) if factor != 1 else ()
    return shift, factor, shift

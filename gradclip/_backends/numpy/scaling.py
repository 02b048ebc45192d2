"""Products of NumPy leaves and the factors of their groups: what is not clipped is not looked at."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise, repeat
from operator import attrgetter, is_
from typing import Any

import numpy as np

from gradclip._backends.numpy import units
from gradclip._backends.numpy.jobs import BLOCK, Leaves, shared
from gradclip._backends.numpy.loops import multiplied, pairs
from gradclip._backends.numpy.tables import SHORT, look_up, tables_for
from gradclip._groups import Groups
from gradclip._scaled import Factors
from gradclip._types import Array

_SINGLE, _DOUBLE, _COMPLEX = np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.complex128)
_base = attrgetter("base")

#: Leaves of these dtypes, in groups that are wide or not, are multiplied by one number of this dtype, and rounded once.
_PRODUCT = {(_SINGLE, False): _SINGLE} | {(x, wide): _DOUBLE for x in (_DOUBLE, _COMPLEX) for wide in (False, True)}


def scaled(
    leaves: Leaves,
    factors: Factors,
    groups: Groups,
    in_place: bool,
    product: Callable[[Array, Sequence[Array]], Array],
) -> Sequence[Array] | None:
    """`Backend.scale`. None, and nothing done, where leaves in place share memory.

    `product`: a leaf times any steps, given as arrays.
    """
    if groups.count == 1 and not groups.kept:
        one = steps_of(float(factors.factor), 1.0 if factors.shift is None else float(factors.shift))
        if not one:
            return leaves
        dtype = _PRODUCT.get((leaves.dtype, groups.wide[0]))
        if dtype is not None and len(one) == 1 and leaves.longest <= BLOCK and not (in_place and overlap(leaves)):
            return _multiplied(leaves, np.array(one[0], dtype), in_place)
    factor, shift = both(factors, groups.count)
    whole: Sequence[int] = range(len(leaves))
    base, wide, few, changes = groups.base, groups.each_wide, (factor, shift), None
    if groups.kept:  # of their many groups, no Python number is made
        changes = (factor != 1) | (shift != 1)
        whole = [i for i in whole if i not in groups.kept]
        numbers = [groups.base[i] for i in whole]
        base, wide = tuple(range(len(whole))), tuple(groups.each_wide[g] for g in numbers)
        few = factor[numbers], shift[numbers]
    steps = list(map(steps_of, few[0].tolist(), few[1].tolist()))
    if not any(steps) and (changes is None or not changes.any()):
        return leaves
    if in_place and overlap(leaves):
        return None
    # 0-d arrays: to multiply by one takes 0.4 us for 1,024 elements, by a number 0.6.
    rows = {_SINGLE: few[0].astype(np.float32), _DOUBLE: few[0]}
    tables = tables_for([leaves[i] for i in whole], base, steps, wide)
    outs = list(leaves)
    jobs: list[Callable[[], Any]] = []
    for i, group in zip(whole, base, strict=True):
        leaf = leaves[i]
        if not steps[group]:
            continue
        dtype = _PRODUCT.get((leaf.dtype, wide[group]))
        outs[i] = out = leaf if in_place else np.empty_like(leaf, subok=False)
        if dtype is not None and len(steps[group]) == 1 and leaf.size <= BLOCK:
            np.multiply(leaf, rows[dtype][group, ...], out)
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
        leaf, at = leaves[i], groups.of(i)
        if changes is None or not leaf.size or not changes[at].any():
            continue
        outs[i] = out = leaf if in_place else np.empty_like(leaf, subok=False)
        jobs += units.scaling(leaf, out, keep, factor[at], shift[at], groups.wide[groups.block[i]], product)
    if jobs:
        shared(lambda job: job(), jobs, leaves, *([] if tables else ["float16"]))
    return outs if in_place else _scalars_as_scalars(leaves, outs)


def _multiplied(leaves: Leaves, by: Array, in_place: bool) -> Sequence[Array]:
    """Leaves times a 0-d array. Without Python's loop 1,000 of them take 0.45 us each, not 0.9."""
    outs: list[Array] = leaves if in_place else [np.empty_like(x, subok=False) for x in leaves]
    deque(map(np.multiply, leaves, repeat(by), outs), 0)
    return outs if in_place else _scalars_as_scalars(leaves, outs)


def _scalars_as_scalars(leaves: Sequence[Array], outs: list[Array]) -> list[Array]:
    """NumPy's scalars are no arrays: they come back as scalars."""
    for i, x in enumerate(leaves):
        if isinstance(x, np.generic):
            outs[i] = outs[i][()]
    return outs


def overlap(leaves: Sequence[Array]) -> bool:
    """Whether two elements may share memory: of two leaves, as their first and last bytes say, or of one."""
    if all(map(is_, map(_base, leaves), repeat(None))):
        return len(set(map(id, leaves))) < len(leaves)
    spans = sorted(np.lib.array_utils.byte_bounds(x) for x in leaves if x.size)
    return any(end > start for (_, end), (start, _) in pairwise(spans)) or any(
        not x.flags.forc and folds(x.strides, x.shape, x.itemsize) for x in leaves
    )


def folds(strides: Sequence[int], shape: Sequence[int], unit: int) -> bool:
    """Whether elements of one array may share memory, as those of a sliding window: a stride is within shorter ones."""
    reach = unit
    for stride, n in sorted((abs(stride), n) for stride, n in zip(strides, shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach += stride * (n - 1)
    return False


def both(factors: Factors, n: int) -> tuple[Array, Array]:
    """The factor and the shift of each of n groups."""
    factor, shift = np.empty(n), np.empty(n)
    factor[...], shift[...] = factors.factor, 1.0 if factors.shift is None else factors.shift
    return factor, shift


def steps_of(factor: float, shift: float) -> Sequence[float]:
    """What to multiply by, in this order: nothing, one normal float32 number, or two shifts and a factor between."""
    if shift == 1 and 2.0**-126 <= factor <= 2.0**126:
        return (factor,) if factor != 1 else ()
    return shift, factor, shift

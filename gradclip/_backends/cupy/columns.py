"""Partials as kernels make them: columns, some for each group, that the next kernel joins. On the current device."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import cupy
import numpy as np

from gradclip._backends.cupy import compiler, programs, table, tiles
from gradclip._backends.cupy.compiler import NotCompiled
from gradclip._backends.cupy.laid import Laid
from gradclip._backends.cupy.text import THREADS
from gradclip._groups import Groups
from gradclip._norms import Norm, SumNorm
from gradclip._types import Array

NULL = np.uint64(0)
#: From so many bytes on a float32 norm may be less exact than it is below at no cost: at worst by an ulp or two, and
#: among so many elements errors cancel.
_LARGE = 2**22
#: So many groups are more than a GPU has room for blocks.
_MANY = 4096
#: There must be less groups and columns than this: so far the kernels count.
_GROUPS, _COLUMNS = 2**28, 2**31


class Columns(NamedTuple):
    """Partials that are not joined yet: `sums.JOIN` says which columns are whose."""

    values: Array
    keys: Any = NULL
    sections: int = 1

    def arguments(self) -> tuple[Any, ...]:
        return self.values, np.uint32(self.values.shape[1]), self.keys, np.uint32(self.sections)


def check(groups: int, columns: int = 0) -> None:
    """Raise NotCompiled where there are more than the kernels count."""
    if groups >= _GROUPS or columns >= _COLUMNS:
        raise NotCompiled


def threads(groups: int) -> int:
    """The threads of a block that joins the columns of one group: of many groups each has few columns."""
    return THREADS if groups < _MANY else 32


_NOTHING = Laid([], [], 0, [], False)


def split(laid: Laid, keep: Sequence[int | None]) -> tuple[Laid, Laid]:
    """Which leaves are in one group each, and of which an axis is kept."""
    if keep.count(None) == len(keep):
        return laid, _NOTHING
    found: tuple[list[int], list[int]] = [], []
    for i, (leaf, axis) in enumerate(zip(laid.leaves, keep, strict=True)):
        found[axis is not None and leaf.shape[axis] > 1].append(i)
    return laid.only(found[0]), laid.only(found[1])


def measured(laid: Laid, norm: Norm, groups: Groups, seen: Sequence[Array], single: bool) -> Columns:
    """What leaves contribute to one pass: columns for each block, and with several groups for each leaf.

    `single`: all norms are float32, on all shards. Raises NotCompiled.
    """
    quick = single and isinstance(norm, SumNorm) and int(laid.nbytes.sum()) >= _LARGE
    laid = laid.replaced({i: cupy.ascontiguousarray(laid.leaves[i]) for i in laid.loose})
    step, count, grouped = len(seen), groups.count, groups.count > 1
    whole, kept = split(laid, laid.of(groups.keep))
    launches: list[tuple[int, Any]] = []
    kinds = table.kinds(whole.distinct, real=False)
    if kinds:
        kernel = compiler.compiled(programs.measure(norm, step, kinds, quick), "gradclip_measure")
        base = np.array(whole.of(groups.base)) if grouped else None
        lines = table.entries(whole, real=False, groups=base, count=count if grouped else 0)
        launches = [(kernel.blocks(some["chunks"]), some) for some in table.tables(lines)]
    widths = [blocks + (int(some["leaves"]) if grouped else 0) for blocks, some in launches]
    *starts, total = accumulate(widths, initial=0)
    tiled: list[Any] = []
    if kept.leaves:
        tiled, total = tiles.measuring(kept.leaves, tiles.runs_of(kept, groups), len(kinds) * count, total)
    check(count, total)
    values = cupy.empty((norm.slots[step], total), cupy.float64)
    keys = cupy.empty(total, cupy.uint32) if grouped else NULL
    known = (seen[0], np.uint32(seen[0].shape[1])) if seen else (NULL, np.uint32(1))
    stride = np.uint32(total)
    for (blocks, some), at in zip(launches, starts, strict=True):
        kernel(blocks, (some, values, stride, np.uint32(at), keys, *known))
    if tiled:
        source = programs.spread(norm, step, table.kinds(kept.distinct, real=False), quick)
        kernel = compiler.compiled(source, "gradclip_spread")
    for some in tiled:
        kernel(kernel.blocks(some["tiles"]), (some, values, stride, keys, *known))
    return Columns(values, keys, len(kinds) + bool(kept.leaves) if grouped else 1)


def joined(columns: Columns, norm: Norm, step: int, count: int) -> Array:
    """Columns as a partial: one for each of `count` groups. Raises NotCompiled."""
    kernel = compiler.compiled(programs.joined(norm, step), "gradclip_join")
    out = cupy.empty((norm.slots[step], count), cupy.float64)
    if count:
        kernel(count, (out, np.uint32(count), *columns.arguments()), threads(count))
    return out

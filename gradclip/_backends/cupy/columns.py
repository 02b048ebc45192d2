"""Partials as kernels make them: columns, some for each group, that the next kernel joins. On the current device."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import cupy
import numpy as np

from gradclip._backends.cupy import compiler, programs, table
from gradclip._backends.cupy.text import THREADS
from gradclip._norms import Norm
from gradclip._types import Array

#: Blocks of one launch: as many threads as the largest GPUs run at once.
_BLOCKS = 1024
NULL = np.uint64(0)


class Columns(NamedTuple):
    """Partials that are not joined yet: `text.JOIN` says which columns are whose."""

    values: Array
    keys: Any = NULL
    sections: int = 1

    def arguments(self) -> tuple[Any, ...]:
        return self.values, np.uint32(self.values.shape[1]), self.keys, np.uint32(self.sections)


def blocks(launch: Any) -> int:
    """The blocks of a launch with this table."""
    return min(int(launch["chunks"]), _BLOCKS)


def measured(leaves: Sequence[Array], norm: Norm, base: Sequence[int], count: int, seen: Sequence[Array]) -> Columns:
    """What leaves contribute to one pass: a column for each block, and with several groups for each leaf.

    No `base`: all are in one group. Raises NotCompiled.
    """
    leaves = [leaf if table.is_dense(leaf) else cupy.ascontiguousarray(leaf) for leaf in leaves]
    kinds = table.kinds(leaves, real=False)
    kernel = compiler.compiled(programs.measure(norm, len(seen), kinds), "gradclip_measure")
    launches = list(table.tables(table.entries(leaves, real=False, groups=base, count=count)))
    widths = [blocks(launch) + (int(launch["leaves"]) if base else 0) for launch in launches]
    *starts, total = accumulate(widths, initial=0)
    values = cupy.empty((norm.slots[len(seen)], total), cupy.float64)
    keys = cupy.empty(total, cupy.uint32) if base else NULL
    known, width = (seen[0], seen[0].shape[1]) if seen else (NULL, 1)
    for launch, at in zip(launches, starts, strict=True):
        place = values, np.uint32(values.shape[1]), np.uint32(at), keys
        kernel((blocks(launch),), (THREADS,), (launch, *place, known, np.uint32(width)))
    return Columns(values, keys, len(kinds) if base else 1)


def joined(columns: Columns, norm: Norm, step: int, count: int) -> Array:
    """Columns as a partial: one for each of `count` groups. Raises NotCompiled."""
    kernel = compiler.compiled(programs.joined(norm, step), "gradclip_join")
    out = cupy.empty((norm.slots[step], count), cupy.float64)
    if count:
        kernel((count,), (THREADS,), (out, np.uint32(count), *columns.arguments()))
    return out

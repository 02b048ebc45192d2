"""Leaves of which an axis is kept, as the kernel that measures them reads them: see `sums.TILES`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from gradclip._backends.cupy.numbers import KINDS
from gradclip._backends.cupy.table import Run, until
from gradclip._backends.cupy.text import THREADS, TILED
from gradclip._dtypes import dtype_name
from gradclip._types import Array

TILES = np.dtype(
    [
        *((name, "u8", TILED) for name in ("from", "inner")),
        *((name, "u4", TILED) for name in ("to", "parts", "key", "length", "outer", "first")),
        *((name, "u2", TILED) for name in ("strips", "pieces")),
        *(("until", "u2", len(KINDS)), ("leaves", "u2"), ("tiles", "u4")),
    ],
    align=True,
)
#: A tile has so many elements, where that does not make more than so many of a leaf.
_TILE, _MOST = 2**14, 1024
#: Rows of one line.
_ROWS = 2**31

_ORDER = tuple(KINDS)


class Line(NamedTuple):
    """A leaf, or some rows of it."""

    kind: int
    group: int
    pointer: int
    length: int
    inner: int
    outer: int
    strips: int
    pieces: int
    tiles: int


def tables(leaves: Sequence[Array], runs: Sequence[Run], key: int, column: int) -> tuple[list[Any], int]:
    """One table for each launch over dense leaves, and where the columns end that begin at `column`.

    `key`: that of group 0. The columns of a group lie side by side, whichever leaves they are of.
    """
    lines = [line for leaf, run in zip(leaves, runs, strict=True) for line in _lines(leaf, run)]
    lines.sort(key=itemgetter(0, 1))  # and by nothing else: sums do not depend on where memory is
    parts: dict[int, int] = {}
    before = []  # parts of the same groups in lines before
    for line in lines:
        before.append(parts.get(line.group, 0))
        parts[line.group] = before[-1] + line.strips * line.pieces
    lengths = {line.group: line.length for line in lines}
    groups = sorted(parts)
    *starts, end = accumulate((parts[group] * lengths[group] for group in groups), initial=column)
    start = dict(zip(groups, starts, strict=True))
    to = [start[line.group] + n for line, n in zip(lines, before, strict=True)]
    return [_table(lines[i : i + TILED], to[i : i + TILED], parts, key) for i in range(0, len(lines), TILED)], end


def _lines(leaf: Array, run: Run) -> Iterator[Line]:
    group, length, inner = run
    each = max(1, THREADS // inner)
    across, width = -(-length // each), min(length, each) * inner
    pieces = 1 if inner <= THREADS else min(-(-inner // _TILE), max(1, _MOST // length))
    rows = leaf.size // (length * inner)
    for begin in range(0, rows, _ROWS):
        outer = min(rows - begin, _ROWS)
        strips = min(outer, -(-outer * width // pieces // _TILE), max(1, _MOST // across // pieces))
        pointer = leaf.data.ptr + begin * length * inner * leaf.itemsize
        kind = _ORDER.index(dtype_name(leaf))
        yield Line(kind, group, pointer, length, inner, outer, strips, pieces, across * strips * pieces)


def _table(lines: Sequence[Line], to: Sequence[int], parts: dict[int, int], key: int) -> Any:
    columns = (np.array(column, np.uint64) for column in zip(*lines, strict=True))
    kind, group, pointer, length, inner, outer, strips, pieces, tiles = columns
    table: Any = np.zeros((), TILES)
    n = len(lines)
    for name, column in (
        ("from", pointer),
        ("inner", inner),
        ("to", np.array(to, np.uint64)),
        ("parts", np.array([parts[line.group] for line in lines], np.uint64)),
        ("key", group + np.uint64(key)),
        ("length", length),
        ("outer", outer),
        ("first", np.cumsum(tiles) - tiles),
        ("strips", strips),
        ("pieces", pieces),
    ):
        table[name][:n] = column
    table["until"], table["leaves"], table["tiles"] = until(kind), n, tiles.sum()
    return table

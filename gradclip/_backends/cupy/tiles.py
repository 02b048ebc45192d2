"""Leaves of which an axis is kept, as kernels read them: a table on the host, and the same in CUDA C.

In memory such a leaf is `outer` rows of `length` runs, one a group, of `inner` elements. A tile is some rows of some
whole runs, as many as a block has threads for; or of one piece of a longer run. Neighbouring threads read neighbours,
down the rows: so a thread has one group in a tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from gradclip._backends.cupy.laid import Laid
from gradclip._backends.cupy.numbers import KINDS
from gradclip._backends.cupy.table import kind_of, until
from gradclip._backends.cupy.text import ALIGNMENT, KEPT, LEAVES, THREADS
from gradclip._dtypes import dtype_name
from gradclip._groups import Groups
from gradclip._types import Array

_LEAVES = LEAVES[KEPT]
TILES = np.dtype(
    [
        *((name, "u8", _LEAVES) for name in ("from", "inner")),
        *((name, "u4", _LEAVES) for name in ("to", "parts", "group", "length", "outer", "first")),
        *((name, "u2", _LEAVES) for name in ("strips", "pieces")),
        *(("until", "u2", len(KINDS)), ("leaves", "u2"), ("tiles", "u4")),
    ],
    align=True,
)
# A struct, and the tile number `tile` of leaf `low` as its constructor finds it. `visit` goes over a tile.
AREA = """
struct Tiles {
    u64 from[%(leaves)d], inner[%(leaves)d];
    unsigned to[%(leaves)d];          // to measure: the first column of its first group; else its output: see `Table`
    unsigned parts[%(leaves)d];       // to measure: the columns of each of its groups
    unsigned group[%(leaves)d];       // its first group; to measure: the key of that
    unsigned length[%(leaves)d], outer[%(leaves)d];
    unsigned first[%(leaves)d];       // its first tile
    unsigned short strips[%(leaves)d], pieces[%(leaves)d];
    unsigned short until[%(kinds)d];  // the end of each kind
    unsigned short leaves;
    unsigned tiles;
};
static_assert(sizeof(Tiles) == %(bytes)d, "the host lays it out otherwise");
struct Area {
    u64 skipped, stride, run;
    unsigned rows, wide, high, width;  // in threads: of a row, how many rows there are side by side, and of a group
    unsigned part, group;              // the group of this thread, after the first one
    __device__ __forceinline__ Area(const Tiles& t, unsigned low, unsigned tile) {
        const u64 inner = t.inner[low];
        const unsigned pieces = t.pieces[low], strips = t.strips[low], length = t.length[low], outer = t.outer[low];
        part = tile %% (strips * pieces);
        const unsigned piece = part %% pieces, strip = part / pieces;
        const unsigned each = inner < THREADS ? THREADS / (unsigned)inner : 1;
        const unsigned begin = tile / (strips * pieces) * each;
        const u64 left = piece * inner / pieces, top = strip * (u64)outer / strips;
        stride = length * inner;
        run = (each < length - begin ? each : length - begin) * inner;
        if (pieces > 1) run = (piece + 1) * inner / pieces - left;
        rows = (unsigned)((strip + 1) * (u64)outer / strips - top);
        wide = run < THREADS ? (unsigned)run : THREADS;
        high = THREADS / wide;
        width = inner < wide ? (unsigned)inner : wide;
        group = begin + threadIdx.x %% wide / width;
        skipped = top * stride + begin * inner + left;
    }
};
template <bool writes, int batch, class T, class F> __device__ __forceinline__ void visit(
    const T* p, T* to, const Area& area, F f
) {
    if (area.run > THREADS) {
        for (unsigned row = 0; row < area.rows; row++, p += area.stride, to += writes ? area.stride : 0)
            visit<writes, batch>(p, to, (unsigned)area.run, f);
        return;
    }
    const unsigned x = threadIdx.x %% area.wide, y = threadIdx.x / area.wide;
    if (y >= area.high || y >= area.rows) return;
    const u64 far = area.high * area.stride;
    const auto at = [=](unsigned k) { return k * far; };
    p += y * area.stride + x, to += writes ? y * area.stride + x : 0;
    singly<writes, batch ? 8 : 1>(p, to, (area.rows - y - 1) / area.high + 1, at, f);
}
"""

#: A tile has so many bytes, where that does not make more than so many of a leaf: what is measured in a column of an
#: inner axis costs 24 to 32 bytes a tile.
_TILE, _MOST = 2**17, 4096
#: Rows of one line, or some more.
_ROWS = 2**31


class Run(NamedTuple):
    """Where the groups of a leaf are: `length` of them from `group` on, in turns, of `inner` elements side by side."""

    group: int
    length: int
    inner: int


def runs_of(laid: Laid, groups: Groups) -> list[Run]:
    """Where the groups of dense leaves are."""
    return list(map(_run, laid.leaves, laid.of(groups.keep), laid.of(groups.base)))


def _run(leaf: Array, keep: int | None, group: int) -> Run:
    if keep is None or leaf.shape[keep] == 1:
        return Run(group, 1, leaf.size)
    return Run(group, leaf.shape[keep], leaf.strides[keep] // leaf.itemsize)


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
    to: int
    parts: int = 0


def measuring(leaves: Sequence[Array], runs: Sequence[Run], key: int, column: int) -> tuple[list[Any], int]:
    """One table for each launch over dense leaves, and where the columns end that begin at `column`.

    `key`: that of group 0. The columns of a group lie side by side, whichever leaves they are of.
    """
    lines = [line for leaf, run in zip(leaves, runs, strict=True) for line in _lines(leaf, run, real=False)]
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
    columns = [
        line._replace(group=line.group + key, to=start[line.group] + n, parts=parts[line.group])
        for line, n in zip(lines, before, strict=True)
    ]
    return _tables(columns), end


def scaling(leaves: Sequence[Array], runs: Sequence[Run], room: Any) -> list[Any]:
    """One table for each launch over dense leaves, complex ones as real ones. `room`: where their outputs start."""
    each = zip(leaves, runs, room, strict=True)
    return _tables(sorted((line for one in each for line in _lines(*one, real=True)), key=itemgetter(0)))


def adding(leaves: Sequence[Array], runs: Sequence[Run], room: Any) -> list[Any]:
    """The same where runs are added up: a tile is one element of the result for each thread of a block."""
    lines = []
    for leaf, run, start in zip(leaves, runs, room, strict=True):
        kind, times = kind_of(dtype_name(leaf), real=True)
        group, length, inner = run.group, run.length, run.inner * times
        size = leaf.size * times // length
        lines.append(Line(kind, group, leaf.data.ptr, length, inner, size // inner, 1, 1, -(-size // THREADS), start))
    return _tables(sorted(lines, key=itemgetter(0)))


def _lines(leaf: Array, run: Run, room: int = 0, *, real: bool) -> Iterator[Line]:
    kind, times = kind_of(dtype_name(leaf), real=real)
    group, length, inner = run.group, run.length, run.inner * times
    each, itemsize = max(1, THREADS // inner), leaf.itemsize // times
    across, width = -(-length // each), min(length, each) * inner
    pieces = 1 if inner <= THREADS else min(inner, -(-inner * itemsize // _TILE), max(1, _MOST // length))
    rows, most = leaf.size * times // (length * inner), -(-_ROWS // ALIGNMENT) * ALIGNMENT
    for begin in range(0, rows, most):
        outer, skipped = min(rows - begin, most), begin * length * inner * itemsize
        strips = min(outer, -(-outer * width * itemsize // pieces // _TILE), max(1, _MOST // across // pieces))
        sizes = length, inner, outer, strips, pieces, across * strips * pieces
        yield Line(kind, group, leaf.data.ptr + skipped, *sizes, room + skipped // ALIGNMENT)


def _tables(lines: Sequence[Line]) -> list[Any]:
    return [_table(lines[i : i + _LEAVES]) for i in range(0, len(lines), _LEAVES)]


def _table(lines: Sequence[Line]) -> Any:
    columns = dict(zip(Line._fields, (np.array(column, np.uint64) for column in zip(*lines, strict=True)), strict=True))
    kind, tiles = columns.pop("kind"), columns.pop("tiles")
    columns |= {"from": columns.pop("pointer"), "first": np.cumsum(tiles) - tiles}
    table: Any = np.zeros((), TILES)
    for name, column in columns.items():
        table[name][: len(lines)] = column
    table["until"], table["leaves"], table["tiles"] = until(kind), len(lines), tiles.sum()
    return table

"""Where the leaves of a launch are, as the kernels read it: a table of at most 4 KB, given to them by value.

So no copy to the device is needed, and nothing waits. `TABLE` is the `Table` of `text`, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from gradclip._backends.cupy.laid import Laid
from gradclip._backends.cupy.numbers import KINDS, REAL
from gradclip._backends.cupy.text import ALIGNMENT, ENTRIES, KEPT, LEAVES, ONE, TURNS
from gradclip._dtypes import dtype_name, plain_name
from gradclip._groups import Groups
from gradclip._types import Array


def _layout(grouped: int) -> Any:
    n = LEAVES[grouped]
    index = "u4" if grouped == KEPT else "u2"
    columns: list[Any] = [("from", "u8", n), *([("inner", "u8", n)] if grouped == KEPT else []), ("to", "u4", n)]
    columns += [("group", "u4", n)] if grouped else []
    columns += [("length", "u4", n)] if grouped == KEPT else []
    columns += [("first", index, n), ("last", "u2", n), ("until", "u2", len(KINDS)), ("leaves", "u2"), ("bits", "u2")]
    return np.dtype([*columns, ("chunks", index)], align=True)


#: By what it says of groups.
TABLE = {grouped: _layout(grouped) for grouped in LEAVES}

#: See `row`, and `flips`.
ROW = np.dtype([("bits", "u8", ENTRIES), ("what", "u4", ENTRIES)], align=True)
FLIPS = np.dtype([("at", "u4", TURNS), ("n", "u4")], align=True)

#: The elements of a chunk, as a power of two, where that does not make too many chunks: 4 passes of a block in float32.
_CHUNK = 12
#: No entry is longer where chunks are counted in 16 bits: with 2**16 elements a chunk, a full table has less of them.
LONGEST = 2**24

_ORDER = tuple(KINDS)


class Run(NamedTuple):
    """Where the groups of a leaf are: `length` of them from `group` on, in turns, of `inner` elements side by side.

    Or a column of each of these, for many leaves.
    """

    group: Any
    length: Any = 1
    inner: Any = 1


def run_of(leaf: Array, keep: int | None, group: int) -> Run:
    """That of a dense leaf which is not empty."""
    if keep is None or leaf.shape[keep] == 1:
        return Run(group, 1, leaf.size)
    return Run(group, leaf.shape[keep], leaf.strides[keep] // leaf.itemsize)


def runs_of(laid: Laid, groups: Groups) -> list[Run]:
    """Where the groups of dense leaves are."""
    return list(map(run_of, laid.leaves, laid.of(groups.keep), laid.of(groups.base)))


class Lines(NamedTuple):
    """The lines of tables, by columns: in each line some elements that lie side by side."""

    kind: Any
    group: Any
    pointer: Any
    length: Any
    to: Any  # the key of its group, or where its output starts, in units of ALIGNMENT
    groups: Any  # see `Run`
    inner: Any


def entries(
    laid: Laid, *, real: bool, room: Any = None, runs: Run | None = None, count: int = 0, cut: bool = True
) -> Lines:
    """The lines for dense leaves, sorted by kind and group.

    `real`: complex leaves as real ones, twice as long. `room`: where their outputs start. `runs`: the groups of each.
    `count`, of all groups: the lines have keys, see `sums.JOIN`. `cut`: into lines of at most LONGEST.
    """
    number, section, times = _numbers(laid, real)
    group, length, inner = runs or Run(0)
    to = room if room is not None else section * count + group
    n = laid.sizes * times
    columns: Any = np.empty((len(Lines._fields), n.size), np.uint64)
    for column, given in zip(columns, (number, group, laid.pointers, n, to, length, inner * times), strict=True):
        column[:] = given
    lines = Lines(*columns)
    if cut and n.max() > LONGEST:
        lines = _cut(lines, np.broadcast_to(laid.itemsizes // times, n.shape), room is not None)
    if len(laid.distinct) > 1 or runs is not None:  # and by nothing else: sums do not depend on where memory is
        first = np.lexsort((lines.group, lines.kind))
        lines = Lines(*(x[first] for x in lines))
    return lines


def _cut(lines: Lines, itemsizes: Any, moves: bool) -> Lines:
    """Lines of at most LONGEST. `moves`: `to` is a place, and goes along."""
    parts = (lines.length.astype(np.int64) - 1) // LONGEST + 1
    whose: Any = np.repeat(np.arange(len(parts)), parts)
    nth = np.arange(len(whose)) - np.repeat(np.cumsum(parts) - parts, parts)
    lines, skipped = Lines(*(x[whose] for x in lines)), (nth * LONGEST).astype(np.uint64)
    beyond = skipped * itemsizes[whose].astype(np.uint64)
    return lines._replace(
        pointer=lines.pointer + beyond,
        length=np.minimum(lines.length - skipped, np.uint64(LONGEST)),
        to=lines.to + beyond // np.uint64(ALIGNMENT) if moves else lines.to,
    )


def _numbers(laid: Laid, real: bool) -> Any:
    """Of each leaf, or of all, the number of its kind, its place among those that are there, and how many numbers an
    element is.
    """
    known = _known(laid.distinct, real)
    if len(known) == 1:
        return known[laid.dtypes[0]]
    row = {dtype: i for i, dtype in enumerate(known)}
    return np.array(list(known.values()), np.int64)[[row[dtype] for dtype in laid.dtypes]].T


@lru_cache
def _known(dtypes: frozenset[Any], real: bool) -> dict[Any, tuple[int, int, int]]:
    order, found = kinds(dtypes, real=real), {}
    for dtype in dtypes:
        name = plain_name(dtype)
        kind = KINDS[name].component if real else name
        found[dtype] = _ORDER.index(kind), order.index(kind), 1 + (kind != name)
    return found


@lru_cache
def kinds(dtypes: frozenset[Any], *, real: bool) -> tuple[str, ...]:
    """The names of the kinds of leaves of these dtypes, in the order of the table."""
    names = {KINDS[name].component if real else name for name in map(plain_name, dtypes)}
    return tuple(name for name in _ORDER if name in names)


def tables(lines: Lines, *, grouped: int = ONE, bits: int = _CHUNK) -> Iterator[Any]:
    """One table for each launch. `grouped`: what they say of groups. `bits`: see _CHUNK."""
    most = 2 ** (32 if grouped == KEPT else 16)
    for begin in range(0, len(lines.kind), LEAVES[grouped]):
        kind, group, pointer, length, to, groups, inner = (x[begin : begin + LEAVES[grouped]] for x in lines)
        wide = bits
        while (chunks := (length - 1 >> wide) + 1).sum() >= most:
            wide += 1
        table: Any = np.zeros((), TABLE[grouped])
        n = len(kind)
        table["from"][:n], table["to"][:n] = pointer, to
        if grouped:
            table["group"][:n] = group
        if grouped == KEPT:
            table["length"][:n], table["inner"][:n] = groups, inner
        table["first"][:n] = np.cumsum(chunks) - chunks
        table["last"][:n] = length - 1 & np.uint64(2**wide - 1)
        table["until"] = until(kind)
        table["leaves"], table["chunks"], table["bits"] = n, chunks.sum(), wide
        yield table


def until(kind: Any) -> Any:
    return np.searchsorted(kind, np.arange(len(KINDS)), side="right")


def flips(groups: Groups) -> list[int]:
    """Where the groups' norms turn to float32 (the first group always), float64, float32, and so on."""
    found, wide = [0], False
    for start, this in zip(groups.starts, groups.wide, strict=True):
        if this != wide:
            found.append(start)
            wide = this
    return found


def turns(some: Sequence[int]) -> Any:
    """`flips` of one launch, as the kernel that decides takes them."""
    out: Any = np.zeros((), FLIPS)
    out["at"][: len(some)], out["n"] = some, len(some)
    return out


def row(numbers: Sequence[tuple[Any, int]], begin: int) -> Any:
    """Numbers, and arrays where they are, as the kernel that makes a row of them takes them: each for so many groups,
    from group `begin` on. An array has one number for all of these, or one for each.
    """
    out: Any = np.zeros((), ROW)
    for i, (x, n) in enumerate(numbers):
        if isinstance(x, float):
            out["bits"][i], kind = np.float64(x).view(np.uint64), 0
        else:
            out["bits"][i], kind = x.data.ptr, 1 + REAL.index(dtype_name(x))
        out["what"][i] = begin << 4 | (x.size == 1) << 3 | kind if kind else begin << 4
        begin += n
    return out


def room_for(sizes: Any) -> tuple[Any, int]:
    """Where each output of so many bytes starts in one allocation, in units of ALIGNMENT, and how many there are."""
    ends = np.cumsum(-(-sizes // ALIGNMENT))
    return np.concatenate([[0], ends[:-1]]), int(ends[-1])

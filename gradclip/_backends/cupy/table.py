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
from gradclip._backends.cupy.text import ALIGNMENT, ENTRIES, LEAVES, ONE, TURNS, WHOLE
from gradclip._dtypes import dtype_name, plain_name
from gradclip._groups import Groups


def _layout(grouped: int) -> Any:
    n = LEAVES[grouped]
    columns: list[Any] = [("from", "u8", n), ("to", "u4", n), *([("group", "u4", n)] if grouped else [])]
    columns += [("first", "u2", n), ("last", "u2", n), ("until", "u2", len(KINDS))]
    return np.dtype([*columns, *((name, "u2") for name in ("leaves", "bits", "chunks"))], align=True)


#: By what it says of groups.
TABLE = {grouped: _layout(grouped) for grouped in (ONE, WHOLE)}

#: See `row`, and `flips`.
ROW = np.dtype([("bits", "u8", ENTRIES), ("what", "u4", ENTRIES)], align=True)
FLIPS = np.dtype([("at", "u4", TURNS), ("n", "u4")], align=True)

#: The bytes of a chunk, as a power of two, where that does not make too many chunks: a batch of loads for each thread.
_CHUNK = 14
#: The bytes of a line at most: so that a full table has less chunks than 16 bits count, each of 2**16 elements at most.
LONGEST = 2**25

_ORDER = tuple(KINDS)


class Lines(NamedTuple):
    """The lines of tables, by columns: in each line some elements that lie side by side."""

    kind: Any
    group: Any
    pointer: Any
    length: Any
    itemsize: Any
    to: Any  # the key of its group, or where its output starts, in units of ALIGNMENT


def entries(laid: Laid, *, real: bool, room: Any = None, groups: Any = None, count: int = 0) -> Lines:
    """The lines for dense leaves, sorted by kind and group.

    `real`: complex leaves as real ones, twice as long. `room`: where their outputs start. `groups`: that of each.
    `count`, of all groups: the lines have keys, see `sums.JOIN`.
    """
    kind, section, times = _numbers(laid, real)
    group = 0 if groups is None else groups
    to = room if room is not None else section * count + group
    n = laid.sizes * times
    columns: Any = np.empty((len(Lines._fields), n.size), np.uint64)
    given = kind, group, laid.pointers, n, laid.itemsizes // times, to
    for column, values in zip(columns, given, strict=True):
        column[:] = values
    lines = Lines(*columns)
    if laid.nbytes.max() > LONGEST:
        lines = _cut(lines, room is not None)
    if len(laid.distinct) > 1 or groups is not None:  # and by nothing else: sums do not depend on where memory is
        first = np.lexsort((lines.group, lines.kind))
        lines = Lines(*(x[first] for x in lines))
    return lines


def _cut(lines: Lines, moves: bool) -> Lines:
    """Lines of at most LONGEST. `moves`: `to` is a place, and goes along."""
    most = np.uint64(LONGEST) // lines.itemsize
    parts = ((lines.length - 1) // most + 1).astype(np.int64)
    whose: Any = np.repeat(np.arange(len(parts)), parts)
    nth = (np.arange(len(whose)) - np.repeat(np.cumsum(parts) - parts, parts)).astype(np.uint64)
    lines, most = Lines(*(x[whose] for x in lines)), most[whose]
    return lines._replace(
        pointer=lines.pointer + nth * np.uint64(LONGEST),
        length=np.minimum(lines.length - nth * most, most),
        to=lines.to + nth * np.uint64(LONGEST // ALIGNMENT) if moves else lines.to,
    )


def kind_of(name: str, *, real: bool) -> tuple[int, int]:
    """The number of a dtype's kind, and how many numbers of it an element is."""
    kind = KINDS[name].component if real else name
    return _ORDER.index(kind), 1 + (kind != name)


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
        kind, times = kind_of(plain_name(dtype), real=real)
        found[dtype] = kind, order.index(_ORDER[kind]), times
    return found


@lru_cache
def kinds(dtypes: frozenset[Any], *, real: bool) -> tuple[str, ...]:
    """The names of the kinds of leaves of these dtypes, in the order of the table."""
    names = {KINDS[name].component if real else name for name in map(plain_name, dtypes)}
    return tuple(name for name in _ORDER if name in names)


def tables(lines: Lines, *, grouped: int = ONE) -> Iterator[Any]:
    """One table for each launch. `grouped`: what they say of groups."""
    for begin in range(0, len(lines.kind), LEAVES[grouped]):
        kind, group, pointer, length, itemsize, to = (x[begin : begin + LEAVES[grouped]] for x in lines)
        bits = _CHUNK
        while (chunks := (length * itemsize - 1 >> bits) + 1).sum() >= 2**16:
            bits += 1
        table: Any = np.zeros((), TABLE[grouped])
        n = len(kind)
        table["from"][:n], table["to"][:n] = pointer, to
        if grouped:
            table["group"][:n] = group
        table["first"][:n] = np.cumsum(chunks) - chunks
        table["last"][:n] = (length - 1) % (np.uint64(2**bits) // itemsize)
        table["until"] = until(kind)
        table["leaves"], table["chunks"], table["bits"] = n, chunks.sum(), bits
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

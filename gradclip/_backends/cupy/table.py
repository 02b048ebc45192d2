"""Where the leaves of a launch are, as the kernels read it: a table of at most 4 KB, given to them by value.

So no copy to the device is needed, and nothing waits. `TABLE` is the `Table` of `text`, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from gradclip._backends.cupy.numbers import KINDS, REAL
from gradclip._backends.cupy.text import ALIGNMENT, ENTRIES, KEPT, LEAVES, ONE, TURNS
from gradclip._dtypes import dtype_name, dtype_names
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
    """Where the groups of a leaf are: `length` of them from `group` on, in turns, of `inner` elements side by side."""

    group: int
    length: int
    inner: int


def run_of(leaf: Array, keep: int | None, group: int) -> Run:
    """That of a dense leaf which is not empty."""
    if keep is None or leaf.shape[keep] == 1:
        return Run(group, 1, leaf.size)
    return Run(group, leaf.shape[keep], leaf.strides[keep] // leaf.itemsize)


class Entry(NamedTuple):
    """One line of a table: some elements that lie side by side."""

    kind: int
    group: int
    pointer: int
    length: int
    to: int  # the key of its group, or where its output starts, in units of ALIGNMENT
    groups: int = 1  # see `Run`
    inner: int = 1


def is_dense(leaf: Array) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order."""
    if leaf.flags.c_contiguous:
        return True
    order = sorted(range(leaf.ndim), key=lambda axis: leaf.strides[axis])
    return leaf.transpose(order).flags.f_contiguous


def entries(
    leaves: Sequence[Array],
    *,
    real: bool,
    room: Sequence[int] = (),
    runs: Sequence[Run] = (),
    count: int = 0,
    cut: bool = True,
) -> list[Entry]:
    """The lines for dense leaves, sorted by kind and group.

    `real`: complex leaves as real ones, twice as long. `room`: where their outputs start. `runs`: the groups of each.
    `count`, of all groups: the lines have keys, see `sums.JOIN`. `cut`: into lines of at most LONGEST.
    """
    out, order = [], kinds(leaves, real=real)
    found = {dtype: _kind(dtype_name(leaf), real, order) for dtype, leaf in {x.dtype: x for x in leaves}.items()}
    for i, leaf in enumerate(leaves):
        number, section, times = found[leaf.dtype]
        group, length, inner = runs[i] if runs else (0, 1, 1)
        n, pointer = leaf.size * times, leaf.data.ptr
        to = room[i] if room else section * count + group
        while cut and n > LONGEST:
            out.append(Entry(number, group, pointer, LONGEST, to))
            skipped = LONGEST * leaf.itemsize // times
            n, pointer, to = n - LONGEST, pointer + skipped, to + skipped // ALIGNMENT if room else to
        out.append(Entry(number, group, pointer, n, to, length, inner * times))
    return sorted(out, key=itemgetter(0, 1))  # and by nothing else: sums do not depend on where memory is


def _kind(name: str, real: bool, order: Sequence[str]) -> tuple[int, int, int]:
    """The number of a kind, its place among those that are there, and how many numbers an element is."""
    kind = KINDS[name].component if real else name
    return _ORDER.index(kind), order.index(kind), 1 + (kind != name)


def kinds(leaves: Sequence[Array], *, real: bool) -> tuple[str, ...]:
    """The names of the kinds of leaves, in the order of the table."""
    names = {KINDS[name].component if real else name for name in dtype_names(leaves)}
    return tuple(name for name in _ORDER if name in names)


def tables(lines: Sequence[Entry], *, grouped: int = ONE, bits: int = _CHUNK) -> Iterator[Any]:
    """One table for each launch. `grouped`: what they say of groups. `bits`: see _CHUNK."""
    most = 2 ** (32 if grouped == KEPT else 16)
    for begin in range(0, len(lines), LEAVES[grouped]):
        held = lines[begin : begin + LEAVES[grouped]]
        columns = (np.array(column, np.uint64) for column in zip(*held, strict=True))
        kind, group, pointer, length, to, groups, inner = columns
        wide = bits
        while (chunks := (length - 1 >> wide) + 1).sum() >= most:
            wide += 1
        table: Any = np.zeros((), TABLE[grouped])
        n = len(held)
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


def room_for(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where each output of so many bytes starts in one allocation, in units of ALIGNMENT, and how many there are."""
    *starts, end = accumulate((-(-size // ALIGNMENT) for size in sizes), initial=0)
    return starts, end


def overlap(leaves: Sequence[Array]) -> bool:
    """Whether two dense leaves share memory."""
    spans = sorted((leaf.data.ptr, leaf.nbytes) for leaf in leaves)
    return any(a + n > b for (a, n), (b, _) in pairwise(spans))

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
from gradclip._backends.cupy.text import ALIGNMENT, ENTRIES, GROUPS, LEAVES
from gradclip._dtypes import dtype_name, dtype_names
from gradclip._types import Array


def _layout(grouped: bool) -> Any:
    n = LEAVES[grouped]
    columns: list[Any] = [("from", "u8", n), ("to", "u4", n), *([("group", "u4", n)] if grouped else [])]
    columns += [(name, "u2", n) for name in ("first", "last")]
    columns += [("until", "u2", len(KINDS)), *((name, "u2") for name in ("leaves", "chunks", "bits"))]
    return np.dtype(columns, align=True)


#: Without and with a column of groups.
TABLE = {grouped: _layout(grouped) for grouped in LEAVES}

#: See `row`.
ROW = np.dtype([("bits", "u8", ENTRIES), ("kind", "u1", ENTRIES)], align=True)

#: The elements of a chunk, as a power of two, where that does not make too many chunks: 4 passes of a block in float32.
_CHUNK = 12
#: No entry is longer: with 2**16 elements a chunk, a full table has less than 2**16 chunks.
LONGEST = 2**24

_ORDER = tuple(KINDS)


class Entry(NamedTuple):
    """One line of a table: some elements that lie side by side."""

    kind: int
    group: int
    pointer: int
    length: int
    to: int  # the key of its group, or where its output starts, in units of ALIGNMENT


def is_dense(leaf: Array) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order."""
    if leaf.flags.c_contiguous:
        return True
    order = sorted(range(leaf.ndim), key=lambda axis: leaf.strides[axis])
    return leaf.transpose(order).flags.f_contiguous


def entries(
    leaves: Sequence[Array], *, real: bool, room: Sequence[int] = (), groups: Sequence[int] = (), count: int = 0
) -> list[Entry]:
    """The lines for dense leaves, sorted by kind and group.

    `real`: complex leaves as real ones, twice as long. `room`: where their outputs start. `groups`: the group of each.
    `count`, of all groups: the lines have keys, see `text.JOIN`.
    """
    out, found, order = [], {}, kinds(leaves, real=real)
    for dtype, leaf in {x.dtype: x for x in leaves}.items():
        name = dtype_name(leaf)
        kind = KINDS[name].component if real else name
        found[dtype] = _ORDER.index(kind), order.index(kind) * count, 1 + (kind != name)
    for i, leaf in enumerate(leaves):
        number, key, times = found[leaf.dtype]
        n, group, pointer = leaf.size * times, groups[i] if groups else 0, leaf.data.ptr
        to = room[i] if room else key + group
        while n > LONGEST:
            out.append(Entry(number, group, pointer, LONGEST, to))
            skipped = LONGEST * leaf.itemsize // times
            n, pointer, to = n - LONGEST, pointer + skipped, to + skipped // ALIGNMENT if room else to
        out.append(Entry(number, group, pointer, n, to))
    return sorted(out, key=itemgetter(0, 1))  # and by nothing else: sums do not depend on where memory is


def kinds(leaves: Sequence[Array], *, real: bool) -> tuple[str, ...]:
    """The names of the kinds of leaves, in the order of the table."""
    names = {KINDS[name].component if real else name for name in dtype_names(leaves)}
    return tuple(name for name in _ORDER if name in names)


def tables(lines: Sequence[Entry], *, grouped: bool = False) -> Iterator[Any]:
    """One table for each launch. `grouped`: with a column of groups."""
    for begin in range(0, len(lines), LEAVES[grouped]):
        held = lines[begin : begin + LEAVES[grouped]]
        kind, group, pointer, length, to = (np.array(column, np.uint64) for column in zip(*held, strict=True))
        bits = _CHUNK
        while (chunks := (length - 1 >> bits) + 1).sum() >= 2**16:
            bits += 1
        table: Any = np.zeros((), TABLE[grouped])
        n = len(held)
        table["from"][:n], table["to"][:n] = pointer, to
        if grouped:
            table["group"][:n] = group
        table["first"][:n] = np.cumsum(chunks) - chunks
        table["last"][:n] = length - 1 & np.uint64(2**bits - 1)
        table["until"] = np.searchsorted(kind, np.arange(len(KINDS)), side="right")
        table["leaves"], table["chunks"], table["bits"] = n, chunks.sum(), bits
        yield table


def flags(bits: Sequence[bool]) -> Any:
    """Bools as one bit each, as the kernel that decides takes them."""
    all_bits: Any = np.zeros(GROUPS, np.bool_)
    all_bits[: len(bits)] = bits
    return np.packbits(all_bits, bitorder="little").view([("bits", "u1", GROUPS // 8)])[0]


def row(numbers: Sequence[Any]) -> Any:
    """Numbers, and 0-d arrays where they are, as the kernel that makes a row of them takes them."""
    out: Any = np.zeros((), ROW)
    for i, x in enumerate(numbers):
        if isinstance(x, float):
            out["bits"][i] = np.float64(x).view(np.uint64)
        else:
            out["bits"][i], out["kind"][i] = x.data.ptr, 1 + REAL.index(dtype_name(x))
    return out


def room_for(leaves: Sequence[Array]) -> tuple[list[int], int]:
    """Where the output of each leaf starts in one allocation, in units of ALIGNMENT, and how many there are."""
    *starts, end = accumulate((-(-leaf.nbytes // ALIGNMENT) for leaf in leaves), initial=0)
    return starts, end


def overlap(leaves: Sequence[Array]) -> bool:
    """Whether two dense leaves share memory."""
    spans = sorted((leaf.data.ptr, leaf.nbytes) for leaf in leaves)
    return any(a + n > b for (a, n), (b, _) in pairwise(spans))

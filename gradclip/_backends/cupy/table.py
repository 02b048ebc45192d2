"""Where the leaves of a launch are, as the kernels read it: a table of at most 4 KB, given to them by value.

So no copy to the device is needed, and nothing waits. `TABLE` is the `Table` of `text`, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np

from gradclip._backends.cupy.numbers import KINDS, REAL
from gradclip._backends.cupy.text import ALIGNMENT, ENTRIES, GROUPS, LEAVES
from gradclip._dtypes import dtype_name
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
#: No entry is longer, and no launch takes more than twice this: 2**16 elements a chunk, and below 2**16 chunks.
LONGEST = 2**30

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
    if leaf.flags.c_contiguous or leaf.flags.f_contiguous:
        return True
    expected = leaf.itemsize
    for stride, n in sorted(zip(leaf.strides, leaf.shape, strict=True)):
        if n > 1:
            if stride != expected:
                return False
            expected *= n
    return True


def entries(
    leaves: Sequence[Array], *, real: bool, room: Sequence[int] = (), groups: Sequence[int] = (), count: int = 0
) -> list[Entry]:
    """The lines for dense leaves, sorted by kind and group.

    `real`: complex leaves as real ones, twice as long. `room`: where their outputs start. `groups`: the group of each.
    `count`, of all groups: the lines have keys, see `text.JOIN`.
    """
    found = {dtype: _kind(leaf, real) for dtype, leaf in {x.dtype: x for x in leaves}.items()}
    order = sorted({kind for kind, _ in found.values()})
    out = []
    for i, leaf in enumerate(leaves):
        kind, numbers = found[leaf.dtype]
        n, pointer = leaf.size * numbers, leaf.data.ptr
        group = groups[i] if groups else 0
        to = room[i] if room else order.index(kind) * count + group
        if n <= LONGEST:
            out.append(Entry(kind, group, pointer, n, to))
            continue
        size = leaf.nbytes // n
        for begin in range(0, n, LONGEST):
            skipped = begin * size
            at = to + skipped // ALIGNMENT if room else to
            out.append(Entry(kind, group, pointer + skipped, min(n - begin, LONGEST), at))
    return out if len(found) == 1 and not groups else sorted(out)


def _kind(leaf: Array, real: bool) -> tuple[int, int]:
    """The kind of a leaf as a number, and into how many real numbers an element is taken apart."""
    name = dtype_name(leaf)
    component = KINDS[name].component if real else name
    return _ORDER.index(component), 1 + (component != name)


def kinds(leaves: Sequence[Array], *, real: bool) -> tuple[str, ...]:
    """The names of the kinds of leaves, in the order of the table."""
    some = {leaf.dtype: leaf for leaf in leaves}.values()
    return tuple(_ORDER[i] for i in sorted({_kind(leaf, real)[0] for leaf in some}))


def tables(lines: Sequence[Entry], *, grouped: bool = False) -> Iterator[Any]:
    """One table for each launch. `grouped`: with a column of groups."""
    held: list[Entry] = []
    total = 0
    for line in lines:
        if len(held) == LEAVES[grouped] or total + line.length > 2 * LONGEST:
            yield _table(held, grouped)
            held, total = [], 0
        held.append(line)
        total += line.length
    if held:
        yield _table(held, grouped)


def _table(lines: Sequence[Entry], grouped: bool) -> Any:
    kind, group, pointer, length, to = (np.array(column, np.uint64) for column in zip(*lines, strict=True))
    bits = _CHUNK
    while (chunks := (length - 1 >> bits) + 1).sum() >= 2**16:
        bits += 1
    table: Any = np.zeros((), TABLE[grouped])
    n = len(lines)
    table["from"][:n], table["to"][:n] = pointer, to
    if grouped:
        table["group"][:n] = group
    table["first"][:n] = np.cumsum(chunks) - chunks
    table["last"][:n] = length - 1 & np.uint64(2**bits - 1)
    table["until"] = np.searchsorted(kind, np.arange(len(KINDS)), side="right")
    table["leaves"], table["chunks"], table["bits"] = n, chunks.sum(), bits
    return table


def flags(bits: Sequence[bool]) -> Any:
    """Bools as one bit each, as the kernel that decides takes them."""
    out: Any = np.zeros((), np.dtype([("bits", "u1", GROUPS // 8)]))
    packed = np.packbits(np.array(bits, np.uint8), bitorder="little")
    out["bits"][: len(packed)] = packed
    return out


def row(numbers: Sequence[Any]) -> Any:
    """Numbers, and 0-d arrays where they are, as the kernel that makes a row of them takes them."""
    out: Any = np.zeros((), ROW)
    for i, x in enumerate(numbers):
        if isinstance(x, int | float):
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

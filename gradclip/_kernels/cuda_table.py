"""Where the leaves of a launch are, as the kernels read it: a table of at most 4 KB, given to them by value.

So no copy to the device is needed, and nothing waits. `TABLE` is the `Table` of `cuda_text`, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from gradclip._kernels.cuda_text import ALIGNMENT, KINDS, LEAVES
from gradclip._kernels.dtypes import dtype_name
from gradclip._types import Array

TABLE = np.dtype(
    [
        ("from", "u8", LEAVES),
        ("out", "u4", LEAVES),
        ("first", "u2", LEAVES),
        ("last", "u2", LEAVES),
        ("until", "u2", len(KINDS)),
        ("leaves", "u2"),
        ("chunks", "u2"),
        ("bits", "u2"),
    ],
    align=True,
)

#: The elements of a chunk, as a power of two, where that does not make too many chunks: 4 passes of a block in float32.
_CHUNK = 12
#: No entry is longer, and no launch takes more than twice this: 2**16 elements a chunk, and below 2**16 chunks.
LONGEST = 2**30

_ORDER = tuple(KINDS)


class Entry(NamedTuple):
    """One line of a table: some elements that lie side by side."""

    kind: int
    pointer: int
    length: int
    out: int  # where its output starts, in units of ALIGNMENT


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


def entries(leaves: Sequence[Array], *, real: bool, room: Sequence[int] = ()) -> list[Entry]:
    """The lines for dense leaves, sorted by kind.

    `real`: complex leaves as real ones, twice as long. `room`: where their outputs start.
    """
    out = []
    found: dict[Any, tuple[int, int]] = {}
    for i, leaf in enumerate(leaves):
        dtype = leaf.dtype
        if dtype not in found:
            found[dtype] = _kind(leaf, real)
        kind, numbers = found[dtype]
        n, pointer, at = leaf.size * numbers, leaf.data.ptr, room[i] if room else 0
        if n <= LONGEST:
            out.append(Entry(kind, pointer, n, at))
            continue
        size = leaf.nbytes // n
        for begin in range(0, n, LONGEST):
            skipped = begin * size
            out.append(Entry(kind, pointer + skipped, min(n - begin, LONGEST), at + skipped // ALIGNMENT))
    return out if len(found) == 1 else sorted(out, key=_by_kind)


def _kind(leaf: Array, real: bool) -> tuple[int, int]:
    """The kind of a leaf as a number, and into how many real numbers an element is taken apart."""
    name = dtype_name(leaf)
    if real and KINDS[name].component != name:
        return _ORDER.index(KINDS[name].component), 2
    return _ORDER.index(name), 1


def _by_kind(entry: Entry) -> int:
    return entry.kind


def kinds(leaves: Sequence[Array], *, real: bool) -> tuple[str, ...]:
    """The names of the kinds of leaves, in the order of the table."""
    some = {leaf.dtype: leaf for leaf in leaves}.values()
    return tuple(_ORDER[i] for i in sorted({_kind(leaf, real)[0] for leaf in some}))


def tables(lines: Sequence[Entry]) -> Iterator[Any]:
    """One table for each launch."""
    group: list[Entry] = []
    total = 0
    for line in lines:
        if len(group) == LEAVES or total + line.length > 2 * LONGEST:
            yield _table(group)
            group, total = [], 0
        group.append(line)
        total += line.length
    if group:
        yield _table(group)


def _table(lines: Sequence[Entry]) -> Any:
    kind, pointer, length, out = (np.array(column, np.uint64) for column in zip(*lines, strict=True))
    bits = _CHUNK
    while (chunks := (length - 1 >> bits) + 1).sum() >= 2**16:
        bits += 1
    table: Any = np.zeros((), TABLE)
    n = len(lines)
    table["from"][:n], table["out"][:n] = pointer, out
    table["first"][:n] = np.cumsum(chunks) - chunks
    table["last"][:n] = length - 1 & np.uint64(2**bits - 1)
    table["until"] = np.searchsorted(kind, np.arange(len(KINDS)), side="right")
    table["leaves"], table["chunks"], table["bits"] = n, chunks.sum(), bits
    return table


def room_for(leaves: Sequence[Array]) -> tuple[list[int], int]:
    """Where the output of each leaf starts in one allocation, in units of ALIGNMENT, and how many there are."""
    starts, end = [], 0
    for leaf in leaves:
        starts.append(end)
        end += -(-leaf.nbytes // ALIGNMENT)
    return starts, end


def overlap(leaves: Sequence[Array]) -> bool:
    """Whether two dense leaves share memory."""
    spans = sorted((leaf.data.ptr, leaf.nbytes) for leaf in leaves)
    return any(a + n > b for (a, n), (b, _) in pairwise(spans))

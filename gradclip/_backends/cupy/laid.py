"""Where leaves lie: asked once a call, for CuPy's answers take as long as all else that the host does for a leaf."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from operator import attrgetter
from typing import Any, TypeVar

import numpy as np

from gradclip._backends.cupy.text import ALIGNMENT
from gradclip._types import Array

T = TypeVar("T")

#: Outputs of one call share allocations of at most so many bytes, or of one leaf. Few are made, and yet CuPy's pool can
#: use what it has free, and free some of it while the rest is kept: one piece as large as a model finds no place among
#: other arrays, though there may be room for it in all.
PIECE = 2**30
#: Copies of leaves that are not in one piece, or that share memory, take at most so many bytes at a time, or one leaf.
#: A launch more is nothing beside the time that so many bytes take.
HELD = 2**26


class Leaves(list[Array]):
    """The leaves of a call, and what was asked of them: `CupyBackend.adopt` makes it."""

    @cached_property
    def devices(self) -> list[int]:
        return [x.data.device_id for x in self]

    @cached_property
    def parts(self) -> list[Laid]:
        """Those that hold something, by device, in order of appearance."""
        devices, sizes = self.devices, [x.size for x in self]
        if len(set(devices)) == 1 and all(sizes):
            return [Laid(list(self), sizes, devices[0], range(len(self)), True)]  # itself would be a cycle
        found: dict[int, list[int]] = {}
        for i, (size, device) in enumerate(zip(sizes, devices, strict=True)):
            if size:
                found.setdefault(device, []).append(i)
        return [Laid([self[i] for i in h], [sizes[i] for i in h], device, h, False) for device, h in found.items()]


def laid_out(leaves: Sequence[Array]) -> Leaves:
    """The leaves as `adopt` has made them, or makes them now."""
    return leaves if isinstance(leaves, Leaves) else Leaves(leaves)


class Laid:
    """Some leaves of a call, on one device. `here`: which they are; `whole`: all of them, in order.

    What is said of each is a column: `sizes` in elements, `pointers`, `dtypes`.
    """

    def __init__(self, leaves: Sequence[Array], sizes: Any, device: int, here: Sequence[int], whole: bool) -> None:
        self.leaves, self.device, self.here, self._whole = leaves, device, here, whole
        self.sizes: Any = np.array(sizes, np.int64)
        self.pointers: Any = np.array([x.data.ptr for x in leaves], np.uint64)
        self.dtypes = [x.dtype for x in leaves]
        self.distinct = frozenset(self.dtypes)

    def of(self, values: Sequence[T]) -> Sequence[T]:
        """Of values of all leaves of the call, those of these."""
        return values if self._whole else [values[i] for i in self.here]

    def put(self, values: Sequence[T], out: list[T]) -> None:
        """Put values of these among those of all leaves of the call."""
        if self._whole:
            out[:] = values
        else:
            for i, value in zip(self.here, values, strict=True):
                out[i] = value

    def only(self, places: Sequence[int]) -> Laid:
        """Those at these places."""
        if len(places) == len(self.leaves) and list(places) == list(range(len(places))):
            return self
        leaves, here = [self.leaves[i] for i in places], [self.here[i] for i in places]
        return Laid(leaves, self.sizes[list(places)], self.device, here, False)

    def replaced(self, others: dict[int, Array]) -> Laid:
        """With other arrays of the same sizes at some places."""
        if not others:
            return self
        leaves = [others.get(i, x) for i, x in enumerate(self.leaves)]
        return Laid(leaves, self.sizes, self.device, self.here, self._whole)

    @cached_property
    def itemsizes(self) -> Any:
        """That of each, or of all."""
        if len(self.distinct) == 1:
            return self.dtypes[0].itemsize
        return np.array([dtype.itemsize for dtype in self.dtypes], np.int64)

    @property
    def nbytes(self) -> Any:
        return self.sizes * self.itemsizes

    @cached_property
    def ordered(self) -> list[bool]:
        """Whether the elements of each lie in C order without gaps."""
        # `flags` makes an object of them all, and takes ten times as long.
        short = all(hasattr(x, "_c_contiguous") for x in self.leaves[:1])
        return list(map(attrgetter("_c_contiguous" if short else "flags.c_contiguous"), self.leaves))

    @cached_property
    def loose(self) -> list[int]:
        """Those whose elements do not fill one stretch of memory."""
        if all(self.ordered):
            return []
        return [i for i, ok in enumerate(self.ordered) if not (ok or is_dense(self.leaves[i]))]

    def by_copies(self) -> Sequence[Laid]:
        """These, as several parts where kernels read more than HELD from copies: those of loose ones."""
        if not self.loose:
            return [self]
        sizes: Any = np.zeros(len(self.leaves), np.int64)
        sizes[self.loose] = self.nbytes[self.loose]
        return self._cut(sizes, HELD)

    def by_outputs(self, sizes: Any) -> Sequence[Laid]:
        """These, as several parts where their outputs take more than PIECE."""
        return self._cut(-(-sizes // ALIGNMENT) * ALIGNMENT, PIECE)

    def _cut(self, sizes: Any, most: int) -> Sequence[Laid]:
        if sizes.sum() <= most:
            return [self]
        return [self.only(some) for some in _pieces(sizes.tolist(), most)]

    @cached_property
    def crowds(self) -> list[list[int]]:
        """The sets of several leaves whose stretches of memory overlap one another, each set in order."""
        begin, end = self.pointers.astype(np.int64), self.pointers.astype(np.int64) + self.nbytes
        for i in self.loose:
            begin[i], end[i] = _span(self.leaves[i])
        order = np.argsort(begin, kind="stable")
        reached = np.maximum.accumulate(end[order])
        joins = begin[order][1:] < reached[:-1]
        if not joins.any():
            return []
        sets = np.split(order, np.flatnonzero(~joins) + 1)
        return sorted(sorted(same.tolist()) for same in sets if len(same) > 1)

    def merged(self) -> Laid:
        """As one factor scales them in place: dense leaves of one dtype that share memory are one stretch of it."""
        gone: set[int] = set()
        sizes, itemsizes = self.sizes.copy(), np.broadcast_to(self.itemsizes, self.sizes.shape)
        for crowd in self.crowds:
            first = min(crowd, key=self.pointers.__getitem__)
            apart = self.pointers[crowd] - self.pointers[first]
            alike = len({self.dtypes[i] for i in crowd}) == 1 and not (apart % np.uint64(itemsizes[first])).any()
            if alike and not set(self.loose).intersection(crowd):
                sizes[first] = (apart.astype(np.int64) // itemsizes[first] + self.sizes[crowd]).max()
                gone.update(i for i in crowd if i != first)
        if not gone:
            return self
        kept = [i for i in range(len(self.leaves)) if i not in gone]
        out = self.only(kept)
        out.sizes = sizes[kept]
        return out

    def in_place(self) -> list[tuple[Laid, list[int]]]:
        """Parts that are written one after the other, and which of each are copied first, for their copies are scaled.

        Those are the loose ones, and of several that share memory all but the first. The very same memory is there
        once.
        """
        crowds, loose = self.crowds, set(self.loose)
        if not crowds and not loose:
            return [(self, [])]
        shared = {i for crowd in crowds for i in crowd}
        sets = [list({_memory(self.leaves[i]): i for i in crowd}.values()) for crowd in crowds]
        sets = sorted(sets + [[i] for i in range(len(self.leaves)) if i not in shared], key=min)
        copied = loose.union(i for same in sets for i in same[1:])
        nbytes = self.nbytes.tolist()
        sizes = [sum(nbytes[i] for i in same if i in copied) for same in sets]
        parts = []
        for some in _pieces(sizes, HELD):
            places = [i for k in some for i in sets[k]]
            parts.append((self.only(places), [k for k, i in enumerate(places) if i in copied]))
        return parts


def _memory(leaf: Array) -> Any:
    """What is the same for two leaves that are the very same memory."""
    layout = (leaf.size,) if leaf.flags.c_contiguous else (leaf.shape, leaf.strides)
    return leaf.data.ptr, leaf.dtype, layout


def is_dense(leaf: Array) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order."""
    if leaf.flags.c_contiguous:
        return True
    order = sorted(range(leaf.ndim), key=lambda axis: leaf.strides[axis])
    return bool(leaf.transpose(order).flags.f_contiguous)


def _span(leaf: Array) -> tuple[int, int]:
    """The stretch of memory from the first byte of a leaf to its last."""
    ways = [(n - 1) * stride for n, stride in zip(leaf.shape, leaf.strides, strict=True)]
    begin = leaf.data.ptr + sum(way for way in ways if way < 0)
    return begin, leaf.data.ptr + sum(way for way in ways if way > 0) + leaf.itemsize


def _pieces(sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Things of these sizes, in order, in lists of at most `most` together, or of a single one that takes more."""
    held: list[int] = []
    total = 0
    for i, size in enumerate(sizes):
        if held and size and total + size > most:
            yield held
            held, total = [], 0
        held.append(i)
        total += size
    yield held

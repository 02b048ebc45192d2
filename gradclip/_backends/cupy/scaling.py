"""The launches that scale leaves, or add them up: which kernels, where outputs are, and what must be copied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import repeat
from typing import Any, NamedTuple

import cupy
import numpy as np

from gradclip._backends.cupy import compiler, programs, table
from gradclip._backends.cupy.columns import NULL, blocks, split
from gradclip._backends.cupy.laid import Laid
from gradclip._backends.cupy.text import ALIGNMENT, KEPT, ONE, THREADS, WHOLE
from gradclip._groups import Groups
from gradclip._types import Array


class Launch(NamedTuple):
    """How leaves are scaled on one device."""

    kernel: Any
    grouped: int  # what its table says of groups
    groups: Groups
    by: Sequence[Any]  # the factors, as the kernel takes them


def scaling(parts: Sequence[Laid], groups: Groups, several: bool) -> list[tuple[Any, int]]:
    """The kernel that scales, for each device, and what its table says of groups.

    All are compiled before the first leaf is written. `several`: there are several factors.
    """
    kernels = []
    for part in parts:
        with cupy.cuda.Device(part.device):
            kept = several and split(part, part.of(groups.keep))[1].leaves
            grouped = KEPT if kept else WHOLE if several else ONE
            source = programs.scale(table.kinds(part.distinct, real=True), grouped)
            kernels.append((compiler.compiled(source, "gradclip_scale"), grouped))
    return kernels


def weighting(parts: Sequence[Laid]) -> list[Any]:
    """The kernel that adds up examples, for each device."""
    kernels = []
    for part in parts:
        with cupy.cuda.Device(part.device):
            source = programs.weighted(table.kinds(part.distinct, real=True))
            kernels.append(compiler.compiled(source, "gradclip_weighted"))
    return kernels


def scale_in_place(laid: Laid, copied: Sequence[int], how: Launch) -> None:
    """Scale these leaves where they are, some of them by way of a copy."""
    copies = {i: laid.leaves[i].copy(order="C") for i in copied}
    _launch(laid.replaced(copies), how)
    for i, x in copies.items():
        laid.leaves[i][...] = x


def scale_apart(laid: Laid, how: Launch) -> list[Array]:
    """Scale these leaves; the outputs share one allocation."""
    room, starts = _room(laid.nbytes)
    loose = set(laid.loose)
    # What is not asked and not given need not be read, for 1,000 leaves: a dtype costs more than its type, and C order
    # needs no strides.
    kinds = {dtype: dtype.type if np.dtype(dtype.type) == dtype else dtype for dtype in laid.distinct}
    dtypes = repeat(*kinds.values()) if len(kinds) == 1 else [kinds[dtype] for dtype in laid.dtypes]
    given = [[x.shape for x in laid.leaves], dtypes, _pointers(room, starts)]
    if not all(laid.ordered):
        given.append([None if i in loose else x.strides for i, x in enumerate(laid.leaves)])
    out = list(map(cupy.ndarray, *given))
    for i in loose:  # copied to where it is scaled
        out[i][...] = laid.leaves[i]
    _launch(laid.replaced({i: out[i] for i in loose}), how, room, starts)
    return out


def _room(sizes: Any) -> tuple[Array, Any]:
    """One allocation for outputs of so many bytes, and where in it each starts, in units of ALIGNMENT."""
    starts, end = table.room_for(sizes)
    return cupy.empty(end * ALIGNMENT, cupy.uint8), starts


def _pointers(room: Array, starts: Any) -> list[Any]:
    """Where each output starts, as CuPy's arrays take it."""
    memory = room.data.mem
    places = (starts * ALIGNMENT + (room.data.ptr - memory.ptr)).tolist()
    return list(map(cupy.cuda.MemoryPointer, repeat(memory), places))


def _launch(laid: Laid, how: Launch, room: Any = NULL, starts: Any = None) -> None:
    """Scale dense leaves: to `room`, where each output starts at its place of `starts`, or where they are."""
    kernel, grouped, groups, by = how
    lines = table.entries(laid, real=True, room=starts, runs=_runs(laid, groups, grouped), cut=grouped != KEPT)
    for launch in table.tables(lines, grouped=grouped):
        kernel((blocks(launch["chunks"]),), (THREADS,), (launch, *by, room))


def weigh(laid: Laid, kernel: Any, groups: Groups, by: Sequence[Any]) -> list[Array]:
    """The weighted sums of these leaves; they share one allocation."""
    laid = laid.replaced({i: cupy.ascontiguousarray(laid.leaves[i]) for i in laid.loose})
    sums = [_without_first(x) for x in laid.leaves]
    room, starts = _room(np.array([math.prod(shape) * dtype.itemsize for shape, dtype, _ in sums]))
    lines = table.entries(laid, real=True, room=starts, runs=_runs(laid, groups, KEPT), cut=False)
    for launch in table.tables(lines._replace(length=lines.length // lines.groups), grouped=KEPT, bits=8):
        kernel((blocks(launch["chunks"]),), (THREADS,), (launch, *by, room))
    shapes, dtypes, strides = zip(*sums, strict=True)
    return list(map(cupy.ndarray, shapes, dtypes, _pointers(room, starts), strides))


def _runs(laid: Laid, groups: Groups, grouped: int) -> table.Run | None:
    """Where the groups of dense leaves are, by columns."""
    if grouped == KEPT:
        return table.Run(*np.array(table.runs_of(laid, groups), np.int64).T)
    return table.Run(np.array(laid.of(groups.base))) if grouped else None


def _without_first(leaf: Array) -> tuple[tuple[int, ...], Any, tuple[int, ...]]:
    """Shape, dtype and strides of what is left of a dense leaf without its axis 0: its elements move together."""
    dtype, n = dtype_of_sum(leaf), leaf.shape[0]
    ratio = dtype.itemsize / leaf.itemsize
    outside = [stride > leaf.strides[0] for stride in leaf.strides[1:]]
    sides = zip(leaf.strides[1:], outside, strict=True)
    return leaf.shape[1:], dtype, tuple(int((s // n if out else s) * ratio) for s, out in sides)


def dtype_of_sum(leaf: Array) -> Any:
    """float32 or complex64, for 64-bit components float64 or complex128."""
    return leaf.dtype if leaf.dtype.char in "dFD" else np.dtype(np.float32)

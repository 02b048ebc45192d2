"""The launches that change leaves, or add them up: which kernels, where outputs are, and what must be copied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import repeat
from typing import Any, NamedTuple

import cupy
import numpy as np

from gradclip._backends.cupy import bounds, compiler, programs, table, tiles
from gradclip._backends.cupy.columns import NULL, split
from gradclip._backends.cupy.compiler import Kernel
from gradclip._backends.cupy.laid import Laid
from gradclip._backends.cupy.text import ALIGNMENT, KEPT, ONE, WHOLE
from gradclip._groups import Groups
from gradclip._types import Array


class Launch(NamedTuple):
    """How leaves are changed on one device, element by element."""

    kernel: Kernel
    grouped: int  # what its table says of groups
    groups: Groups
    by: Sequence[Any]  # the factors of the groups, or the bounds of elements, as the kernel takes them


def scaling(parts: Sequence[Laid], groups: Groups, several: bool) -> list[tuple[Kernel, int]]:
    """The kernel that scales, for each device, and what its table says of groups.

    All are compiled before the first leaf is written. `several`: there are several factors.
    """
    kernels = []
    for part in parts:
        with cupy.cuda.Device(part.device):
            kinds = table.kinds(part.distinct, real=True)
            if several and split(part, part.of(groups.keep))[1].leaves:
                kernels.append((compiler.compiled(programs.scale_spread(kinds), "gradclip_scale_spread"), KEPT))
            else:
                grouped = WHOLE if several else ONE
                kernels.append((compiler.compiled(programs.scale(kinds, grouped), "gradclip_scale"), grouped))
    return kernels


def clamping(laid: Laid, pairs: Sequence[tuple[Any, Any]]) -> Launch:
    """How these leaves are limited by bounds which are numbers, of all leaves of the call. Raises NotCompiled."""
    device = cupy.cuda.Device()
    known: dict[int, Array] = {}

    def minus(x: Any) -> Any:
        if isinstance(x, float):
            return -x
        if id(x) not in known:  # once for all leaves
            with x.device:
                known[id(x)] = -x
        return known[id(x)]

    lower = bounds.number([minus(high) if low is None else low for low, high in pairs], device)
    upper = bounds.number([high for _, high in pairs], device)
    kernel = compiler.compiled(programs.clamp(table.kinds(laid.distinct, real=True)), "gradclip_clamp")
    return Launch(kernel, WHOLE, Groups.of_leaves(len(pairs)), [*bounds.argument(lower), *bounds.argument(upper)])


def weighting(parts: Sequence[Laid]) -> list[Kernel]:
    """The kernel that adds up examples, for each device."""
    kernels = []
    for part in parts:
        with cupy.cuda.Device(part.device):
            source = programs.weighted(table.kinds(part.distinct, real=True))
            kernels.append(compiler.compiled(source, "gradclip_weighted"))
    return kernels


def written(laid: Laid, how: Launch, in_place: bool, out: list[Array]) -> None:
    """Let a kernel change these leaves: where they are, or to new ones, which are put into `out`."""
    if in_place:
        for some, copied in (laid if how.grouped else laid.merged()).in_place():
            _in_place(some, copied, how)
        return
    for some in laid.by_outputs(laid.nbytes):
        some.put(_apart(some, how), out)


def _in_place(laid: Laid, copied: Sequence[int], how: Launch) -> None:
    """Write these leaves where they are, some of them by way of a copy."""
    copies = {i: laid.leaves[i].copy(order="C") for i in copied}
    _launch(laid.replaced(copies), how)
    for i, x in copies.items():
        laid.leaves[i][...] = x


def _apart(laid: Laid, how: Launch) -> list[Array]:
    """What becomes of these leaves; the outputs share one allocation."""
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
    for i in loose:  # copied to where it is changed
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
    """Write dense leaves: to `room`, where each output starts at its place of `starts`, or where they are."""
    kernel, grouped, groups, by = how
    starts = np.zeros(len(laid.leaves), np.int64) if starts is None else starts
    if grouped == KEPT:
        for some in tiles.scaling(laid.leaves, tiles.runs_of(laid, groups), starts.tolist()):
            kernel(kernel.blocks(some["tiles"]), (some, *by, room))
        return
    lines = table.entries(laid, real=True, room=starts, groups=np.array(laid.of(groups.base)) if grouped else None)
    for some in table.tables(lines, grouped=grouped):
        kernel(kernel.blocks(some["chunks"]), (some, *by, room))


def weigh(laid: Laid, kernel: Kernel, groups: Groups, by: Sequence[Any]) -> list[Array]:
    """The weighted sums of these leaves; they share one allocation."""
    laid = laid.replaced({i: cupy.ascontiguousarray(laid.leaves[i]) for i in laid.loose})
    sums = [_without_first(x) for x in laid.leaves]
    room, starts = _room(np.array([math.prod(shape) * dtype.itemsize for shape, dtype, _ in sums]))
    for some in tiles.adding(laid.leaves, tiles.runs_of(laid, groups), starts.tolist()):
        kernel(kernel.blocks(some["tiles"]), (some, *by, room))
    shapes, dtypes, strides = zip(*sums, strict=True)
    return list(map(cupy.ndarray, shapes, dtypes, _pointers(room, starts), strides))


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

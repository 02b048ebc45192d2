"""CUDA graphs: memory that a captured call used stays its own as long as the graph may be launched.

A graph holds addresses, not memory. CuPy's pool gives the temporaries of a call to the next one who asks, and each
launch of the graph would write to them there. So, while a stream is captured, every block that is allocated on the way
goes to a list, and the memory of every result holds that list. Of a call in place nobody may keep the result: there
the first leaf holds the list too.

One rule is left to the user, CuPy's own: keep the leaves and the results of a captured call as long as the graph.
One result holds the temporaries and the other results; in place the leaves do. But a leaf that only wraps memory of
another library (DLPack) may be gone before that memory: keep the norm then.

Not in the list: what `cupy.cuda.malloc_async` gives, for that is allocated and freed by the graph itself; and what is
allocated past CuPy's allocator. gradclip does not do that; an `all_reduce` may. Copies from the host are refused by
CuPy in a capture: so the generic form, where a kernel does not compile, raises for more than 8 leaves.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import cupy

from gradclip._kernels.generic import Kernels
from gradclip._numbers import Measured
from gradclip._types import Array, Call


class Recorded(Kernels):
    """Calls that may be captured: the work is done by the class that comes after this one."""

    def argument(self, value: Any, acc: Any, device: Any) -> Measured:
        if isinstance(value, int | float):
            return super().argument(value, acc, device)
        with _recording([device], []) as blocks:
            number = super().argument(value, acc, device)
            return number._replace(root=_held(number.root, blocks))

    def staged(self, plan: Callable[..., Any], arrays: Sequence[Array], all_reduce: Call | None) -> Callable[..., Any]:
        work = super().staged(plan, arrays, all_reduce)

        def call(kernels: Kernels, arrays: Sequence[Array], bounds: Any, **static: Any) -> Any:
            with _recording(self._places(arrays), [bounds]) as blocks:
                return tuple(_held(x, blocks) for x in work(kernels, arrays, bounds, **static))

        return call

    def scale(self, leaves: Sequence[Array], factor: Array, shift: Array | None) -> list[Array]:
        with _recording(self._places(leaves), _holding(factor, shift)) as blocks:
            out = super().scale(leaves, factor, shift)
            return out if blocks is None else [_held(x, blocks) for x in out]

    def scale_into(self, leaves: Sequence[Array], factor: Array, shift: Array | None) -> None:
        with _recording(self._places(leaves), _holding(factor, shift)) as blocks:
            super().scale_into(leaves, factor, shift)
            if blocks is not None:
                _hold(leaves, blocks)

    def clamped(self, leaf: Array, low: Any, high: Any) -> Array:
        with _recording([self.device(leaf)], []) as blocks:
            return _held(super().clamped(leaf, low, high), blocks)

    def write(self, leaf: Array, new: Array) -> None:
        with _recording([self.device(leaf)], [new]) as blocks:
            super().write(leaf, new)
            if blocks is not None:
                _hold([leaf], blocks)

    def _places(self, leaves: Sequence[Array]) -> list[Any]:
        """The devices of the leaves. Where there is only one, no leaf need be asked."""
        return self.devices(leaves) if cupy.cuda.runtime.getDeviceCount() > 1 else [None]


class _Memory(cupy.cuda.UnownedMemory):  # type: ignore[misc]
    """Memory of another, and a list of what lives as long."""

    def __init__(self, memory: Any, blocks: list[Any]) -> None:
        super().__init__(memory.ptr, memory.size, memory, memory.device_id)
        self.blocks = blocks


@contextmanager
def _recording(devices: Sequence[Any], blocks: list[Any]) -> Iterator[list[Any] | None]:
    """While open, what is allocated goes to `blocks`. Nothing happens, and it gives None, where nothing is captured."""
    if not any(map(_captures, devices)):
        yield None
        return
    allocate = cupy.cuda.get_allocator()

    def recorded(size: int) -> Any:
        block = allocate(size)
        if not isinstance(block.mem, cupy.cuda.memory.MemoryAsync):
            blocks.append(block)
        return block

    with cupy.cuda.using_allocator(recorded):
        yield blocks


def _captures(device: Any) -> bool:
    with cupy.cuda.Device(device):
        return bool(cupy.cuda.get_current_stream().is_capturing())


def _held(x: Array | None, blocks: list[Any] | None) -> Array | None:
    """The same array. It and its views hold `blocks`."""
    if x is None or blocks is None or not x.size:
        return x
    memory = x.data.mem
    pointer = cupy.cuda.MemoryPointer(_Memory(memory, blocks), x.data.ptr - memory.ptr)
    return cupy.ndarray(x.shape, x.dtype, pointer, x.strides)


def _holding(factor: Array, shift: Array | None) -> list[Any]:
    """The list that `factor` holds, so that a call has one; if it has none, a new one."""
    memory = factor.data.mem
    return memory.blocks if isinstance(memory, _Memory) else [factor, shift]


def _hold(leaves: Sequence[Array], blocks: list[Any]) -> None:
    """`blocks` live as long as the first leaf, or the array that it is a view of. All leaves must live so long."""
    for leaf in [x for x in leaves if x.size][:1]:
        owner = leaf if leaf.base is None else leaf.base
        weakref.finalize(owner, len, blocks).atexit = False  # the call does nothing; until then it holds the list

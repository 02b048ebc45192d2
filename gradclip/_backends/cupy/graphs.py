"""CUDA graphs: memory that a captured call used stays its own as long as the graph may be launched.

A graph holds addresses, not memory. CuPy's pool gives the temporaries of a call to the next one who asks, and each
launch of the graph would write to them there. So, while a stream is captured, CuPy's allocator is a `Recorder`: the
memory that it gives holds one list, and the list holds every block that was given. Whatever is made in between, and
whatever is a view of that, so holds all the rest. Of a call in place nobody may keep the result: there the first leaf
holds the list too.

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

from gradclip._backends.cupy.laid import laid_out
from gradclip._types import Array


@contextmanager
def recording(leaves: Sequence[Array], in_place: bool) -> Iterator[None]:
    """Open around a call on `leaves`, which may be captured. Else nothing happens."""
    # Where there is only one device, no leaf need be asked.
    several = cupy.cuda.runtime.getDeviceCount() > 1
    devices = set(laid_out(leaves).devices) if several and leaves else {cupy.cuda.runtime.getDevice()}
    if not any(map(_captures, devices)):
        yield
        return
    recorder = Recorder(cupy.cuda.get_allocator())
    with cupy.cuda.using_allocator(recorder):
        yield
    for leaf in [x for x in leaves if in_place and x.size][:1]:
        owner = leaf if leaf.base is None else leaf.base
        weakref.finalize(owner, len, recorder.held).atexit = False  # does nothing; until then it holds the list


def keep(x: Array) -> None:
    """A call that may be captured reads `x`, which somebody else has allocated."""
    recorder = cupy.cuda.get_allocator()
    if isinstance(recorder, Recorder):
        recorder.held.append(x)


class Recorder:
    """An allocator that keeps what it gives, as long as any of it is held."""

    def __init__(self, allocate: Callable[[int], Any]) -> None:
        self.held: list[Any] = []
        self._allocate = allocate

    def __call__(self, size: int) -> Any:
        block = self._allocate(size)
        if isinstance(block.mem, cupy.cuda.memory.MemoryAsync):
            return block
        self.held.append(block)
        memory = cupy.cuda.UnownedMemory(block.ptr, block.mem.size, self.held, block.mem.device_id)
        return cupy.cuda.MemoryPointer(memory, 0)


def _captures(device: int) -> bool:
    with cupy.cuda.Device(device):
        return bool(cupy.cuda.get_current_stream().is_capturing())

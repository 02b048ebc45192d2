"""CuPy: the generic kernels, each launched on the device where its arrays live."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import array_api_compat.cupy as xp
import cupy

from gradclip._kernels.generic import Kernels
from gradclip._types import Array


class CupyKernels(Kernels):
    """Kernels for `cupy.ndarray`. Everything is queued on the current stream; the host never waits."""

    def __init__(self) -> None:
        super().__init__(xp)

    def device(self, leaf: Array) -> Any:
        return int(leaf.device.id)

    def on(self, device: Any) -> AbstractContextManager[Any]:
        return cupy.cuda.Device(device)

    def move(self, x: Array, device: Any) -> Array:
        source = self.device(x)
        if source == device:
            return x
        # Events order the streams of the two devices; the host does not wait.
        with cupy.cuda.Device(source):
            made = cupy.cuda.get_current_stream().record()
        with cupy.cuda.Device(device):
            stream = cupy.cuda.get_current_stream()
            stream.wait_event(made)
            out = cupy.array(x)
            copied = stream.record()
        with cupy.cuda.Device(source):  # or x may be freed, and its memory used again, before it is read
            cupy.cuda.get_current_stream().wait_event(copied)
        return out

    def full(self, value: float, dtype: Any, device: Any) -> Array:
        with cupy.cuda.Device(device):
            return cupy.full((), value, dtype)

    def accumulation(self, leaves: Sequence[Array]) -> Any:
        return cupy.float64

    def shares(self, leaf: Array) -> Any:
        layout = (leaf.size,) if leaf.flags.c_contiguous else (leaf.shape, leaf.strides)
        return leaf.data.ptr, str(leaf.dtype), layout

"""CUDA tensors where CuPy is installed: its kernels on the same memory, and on torch's current streams.

Memory is torch's, too: what CuPy makes in a call, results among it, comes from torch's caching allocator, so that there
is one pool, and memory that is freed goes to nobody else before the stream is done with it. Never run on a GPU: the
whole was run on emulated devices, with torch's streams and allocator replaced (`tests/test_torch_gpu.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from typing import Any

import cupy
import numpy as np
import torch

from gradclip._backends.cupy import CupyBackend
from gradclip._backends.torch.borrowed import BorrowedBackend
from gradclip._groups import Groups
from gradclip._scaled import Factors
from gradclip._types import Array


class CudaBackend(BorrowedBackend):
    """The work on tensors that have CuPy arrays: by their addresses, for DLPack knows no bfloat16 of CuPy's."""

    def __init__(self) -> None:
        super().__init__(CupyBackend())

    def takes(self, leaves: Sequence[Array]) -> bool:
        return not any(x.dtype not in _DTYPES or x.is_conj() or x.is_neg() for x in leaves)

    def array(self, x: Array) -> Array:
        dtype = _DTYPES[x.dtype]
        if not x.numel():
            return cupy.ndarray(tuple(x.shape), dtype)
        memory = cupy.cuda.UnownedMemory(x.data_ptr(), x.untyped_storage().nbytes(), x, _device(x))
        strides = [n * dtype.itemsize for n in x.stride()]
        return cupy.ndarray(tuple(x.shape), dtype, cupy.cuda.MemoryPointer(memory, 0), strides)

    def tensor(self, x: Array) -> Array:
        with x.device:
            return _imported(x.view(np.int16)).view(torch.bfloat16) if x.dtype == _BFLOAT16 else _imported(x)

    def number(self, x: Array) -> Any:
        """One that the host has goes to the kernels by value."""
        x = x.detach()
        if _device(x) >= 0:
            return self.array(x)
        return float(x) if x.ndim == 0 else cupy.asarray(x.to(torch.float64).numpy())

    @contextmanager
    def session(self, leaves: Sequence[Array], in_place: bool) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(cupy.cuda.using_allocator(_allocator().malloc))
            for device in sorted(set(map(_device, leaves))):
                stack.enter_context(cupy.cuda.Device(device))
                stack.enter_context(_cupys(_stream(device), device))
            stack.enter_context(self.lender.session(self.arrays(leaves), in_place))
            yield

    def scale(self, leaves: Sequence[Array], factors: Factors, groups: Groups, in_place: bool) -> Sequence[Array]:
        scaled = self.lender.scale(self.arrays(leaves), factors, groups, in_place)
        return _written(leaves) if in_place else list(map(self.tensor, scaled))

    def clamp(self, leaves: Sequence[Array], pairs: Sequence[tuple[Any, Any]], in_place: bool) -> Sequence[Array]:
        clamped = self.lender.clamp(self.arrays(leaves), [(self._lent(x), self._lent(y)) for x, y in pairs], in_place)
        return _written(leaves) if in_place else list(map(self.tensor, clamped))


def _written(leaves: Sequence[Array]) -> Sequence[Array]:
    """Leaves that were written to: autograd is told."""
    for x in leaves:
        torch.autograd.graph.increment_version(x)
    return leaves


def _bfloat16() -> Any:
    """CuPy's, if it has one: ml_dtypes's."""
    with suppress(ImportError, TypeError, ValueError):
        import ml_dtypes

        cupy.ndarray((0,), ml_dtypes.bfloat16)
        return np.dtype(ml_dtypes.bfloat16)
    return None


_BFLOAT16 = _bfloat16()


_DTYPES = {getattr(torch, x): np.dtype(x) for x in ("float16", "float32", "float64", "complex64", "complex128")}
if _BFLOAT16 is not None:
    _DTYPES[torch.bfloat16] = _BFLOAT16


class _Named:
    """A stream by its address, as CuPy 14 takes those of others."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address


def _cupys(stream: int, device: int) -> Any:
    """A stream as CuPy's."""
    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(_Named(stream))
    return cupy.cuda.ExternalStream(stream, device)


# -- what is torch's own on a GPU ------------------------------------------------------------------------------


def _device(x: Array) -> int:
    """The number of its device, -1 for the host."""
    return x.device.index if x.is_cuda else -1


def _stream(device: int) -> int:
    """The address of torch's current stream."""
    return torch.cuda.current_stream(device).cuda_stream


def _imported(x: Array) -> Array:
    """A CuPy array as a tensor."""
    return torch.from_dlpack(x)


@lru_cache
def _allocator() -> Any:
    def allocate(size: int, device: int) -> Any:
        return torch.cuda.caching_allocator_alloc(size, device, torch.cuda.current_stream(device))

    def free(address: int, device: int) -> None:
        torch.cuda.caching_allocator_delete(address)

    return cupy.cuda.PythonFunctionAllocator(allocate, free)

"""NCCL, by CuPy: the ranks' partials in one allReduce on the current stream, without a wait."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from gradclip._backends.cupy.devices import move
from gradclip._types import Array, Call, ReduceOp, Tree
from gradclip.distributed._ranks import Ranks

# From nccl.h, which keeps them stable. (cupy.cuda.nccl has them where NCCL itself is installed.)
_UINT8, _FLOAT64 = 1, 8
_OPS = {"sum": 0, "max": 2, "min": 3}

_TEXT = 4096  # bytes of each rank's message


class Nccl(Ranks):
    """See `gradclip.distributed.nccl`."""

    def __init__(self, comm: Any, replicated: Tree) -> None:
        if not all(
            callable(getattr(comm, name, None)) for name in ("allReduce", "allGather", "rank_id", "size", "device_id")
        ):
            raise TypeError(f"nccl takes a cupy.cuda.nccl.NcclCommunicator, got {comm!r} of type {type(comm).__name__}")
        super().__init__(comm, replicated)

    def rank(self) -> int:
        return int(self.comm.rank_id())

    def join(self, partial: Array, op: ReduceOp, call: Call) -> Array:
        if isinstance(partial, np.ndarray | np.generic):  # a rank without leaves
            with self._device():
                return self._joined(cupy.asarray(partial), op).get()
        if not isinstance(partial, cupy.ndarray):
            raise TypeError(f"nccl joins CuPy arrays, and these gradients are of {type(partial).__module__}")
        with self._device() as device:
            return move(self._joined(move(partial, device), op), partial.device)

    def _joined(self, partial: Any, op: ReduceOp) -> Any:
        if partial.dtype != np.float64:
            raise TypeError(f"nccl joins float64 partials, got {partial.dtype}")
        partial = cupy.ascontiguousarray(partial)
        out = cupy.empty_like(partial)
        stream = cupy.cuda.get_current_stream().ptr
        self.comm.allReduce(partial.data.ptr, out.data.ptr, partial.size, _FLOAT64, _OPS[op], stream)
        return out

    def gather(self, text: str) -> list[str]:
        raw = text.encode()[:_TEXT]
        with self._device():
            sent = cupy.asarray(np.frombuffer(raw.ljust(_TEXT, b"\0"), np.uint8))
            got = cupy.empty((self.comm.size(), _TEXT), np.uint8)
            stream = cupy.cuda.get_current_stream().ptr
            self.comm.allGather(sent.data.ptr, got.data.ptr, _TEXT, _UINT8, stream)
            return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in got.get()]

    def _device(self) -> Any:
        """The communicator's device: to be open around all that is asked of it, whatever the leaves' is."""
        return cupy.cuda.Device(self.comm.device_id())

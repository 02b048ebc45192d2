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

#: What the ranks of a communicator, by its id, were found to agree on.
_agreed: dict[int, tuple[Any, set[Call]]] = {}


class Nccl(Ranks):
    """See `gradclip.distributed.nccl`."""

    def __init__(self, comm: Any, replicated: Tree) -> None:
        needed = ("allReduce", "allGather", "rank_id", "size", "device_id")
        if not all(callable(getattr(comm, name, None)) for name in needed):
            raise TypeError(f"nccl takes a cupy.cuda.nccl.NcclCommunicator, got {comm!r} of type {type(comm).__name__}")
        super().__init__(comm, replicated, comm.rank_id())

    def join(self, partial: Array, op: ReduceOp, call: Call) -> Array:
        has_leaves = isinstance(partial, cupy.ndarray)
        if not has_leaves and not isinstance(partial, np.ndarray | np.generic):
            raise TypeError(f"nccl joins CuPy arrays, and these gradients are of {type(partial).__module__}")
        if partial.dtype != np.float64:
            raise TypeError(f"nccl joins float64 partials, got {partial.dtype}")
        self._ask(call)
        with self._device() as device:
            sent = cupy.ascontiguousarray(move(partial, device) if has_leaves else cupy.asarray(partial))
            got = cupy.empty_like(sent)
            stream = cupy.cuda.get_current_stream().ptr
            self.comm.allReduce(sent.data.ptr, got.data.ptr, sent.size, _FLOAT64, _OPS[op], stream)
            return move(got, partial.device) if has_leaves else got.get()

    def _ask(self, call: Call) -> None:
        """Raise ValueError, on all ranks, unless they mean the same groups. The host waits, once for each kind of call.

        All elements are one group on any rank; and while a CUDA graph is captured, nothing may wait.
        """
        _, known = _agreed.setdefault(id(self.comm), (self.comm, set()))
        if call.groups == Call().groups or call in known or cupy.cuda.get_current_stream().is_capturing():
            return
        said = self.gather(f"norm_type {call.norm_type}, nonfinite={call.nonfinite!r}, {call.groups}")
        if len(set(said)) > 1:
            ranks = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(said[:16]))
            raise ValueError(f"the ranks do not agree, and nothing was clipped: {ranks}")
        known.add(call)

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

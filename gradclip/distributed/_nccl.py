"""NCCL, by CuPy: the ranks' partials in one allReduce on the current stream, without a wait."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import cupy
import numpy as np

from gradclip._types import Array, Call, Engine, Leaf, ReduceOp, Tree

# From nccl.h, which keeps them stable. (cupy.cuda.nccl has them where NCCL itself is installed.)
_UINT8, _FLOAT64 = 1, 8
_OPS = {"sum": 0, "max": 2, "min": 3}

_TEXT = 4096  # bytes of each rank's message


class Nccl(Engine):
    """See `gradclip.distributed.nccl`. The kind of a leaf: whether all ranks hold copies of it."""

    telling = "replicated"

    def __init__(self, comm: Any, replicated: Tree) -> None:
        if not all(callable(getattr(comm, name, None)) for name in ("allReduce", "allGather", "rank_id", "size")):
            raise TypeError(f"nccl takes a cupy.cuda.nccl.NcclCommunicator, got {comm!r} of type {type(comm).__name__}")
        self.comm = comm
        self.told = replicated

    def kind(self, leaf: Leaf, told: Any) -> Hashable:
        if not isinstance(told, bool | None):
            raise TypeError(f"replicated says {told!r} of {leaf.path}: it must be True, False or None (False)")
        return bool(told)

    def counts(self, kind: Hashable, like: Array) -> bool:
        return not kind or self.comm.rank_id() == 0

    def join(self, partial: Array, op: ReduceOp, call: Call) -> Array:
        if isinstance(partial, np.ndarray | np.generic):  # a rank without leaves
            return self._joined(cupy.asarray(partial), op).get()
        if not isinstance(partial, cupy.ndarray):
            raise TypeError(f"nccl joins CuPy arrays, and these gradients are of {type(partial).__module__}")
        return self._joined(partial, op)

    def _joined(self, partial: Any, op: ReduceOp) -> Any:
        if partial.dtype != np.float64:
            raise TypeError(f"nccl joins float64 partials, got {partial.dtype}")
        out = cupy.empty_like(partial)
        stream = cupy.cuda.get_current_stream().ptr
        self.comm.allReduce(partial.data.ptr, out.data.ptr, partial.size, _FLOAT64, _OPS[op], stream)
        return out

    def gather(self, text: str) -> list[str]:
        raw = text.encode()[:_TEXT]
        sent = cupy.asarray(np.frombuffer(raw.ljust(_TEXT, b"\0"), np.uint8))
        got = cupy.empty((self.comm.size(), _TEXT), np.uint8)
        stream = cupy.cuda.get_current_stream().ptr
        self.comm.allGather(sent.data.ptr, got.data.ptr, _TEXT, _UINT8, stream)
        return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in got.get()]

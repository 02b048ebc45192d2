"""MPI, by mpi4py: the ranks' partials in one Allreduce, in a message that also shows whether they mean the same."""

from __future__ import annotations

from functools import lru_cache
from typing import Any
from zlib import crc32

import array_api_compat
import numpy as np
from mpi4py import MPI

from gradclip._types import Array, Call, ReduceOp, Tree
from gradclip.distributed._ranks import Ranks

#: A message: what all ranks must agree on, then the partial where it is short (one group), and zeros.
_WIDTH = 16
_AGREED = ("norm_type", "nonfinite", "operation", "bits of the accumulation", "groups")
_START = len(_AGREED)

_OPS: tuple[ReduceOp, ...] = ("sum", "max", "min")
_MPI_OPS = {"sum": MPI.SUM, "max": MPI.MAX, "min": MPI.MIN}
_JOIN = (np.add, np.maximum, np.minimum)


def _merge(one: Any, two: Any, datatype: Any) -> None:
    """What MPI calls to join two messages, `two` in place. Where they disagree, NaN says so from then on."""
    x, y = np.frombuffer(one, np.float64), np.frombuffer(two, np.float64)
    agreed = x[:_START] == y[:_START]
    if agreed.all():
        with np.errstate(all="ignore"):
            y[_START:] = _JOIN[int(y[2])](x[_START:], y[_START:])
    y[:_START][~agreed] = np.nan


@lru_cache
def _message() -> tuple[Any, Any]:
    """The datatype of a message, which MPI never takes apart, and the operation that joins two."""
    return MPI.DOUBLE.Create_contiguous(_WIDTH).Commit(), MPI.Op.Create(_merge, commute=True)


class Mpi(Ranks):
    """See `gradclip.distributed.mpi`."""

    def __init__(self, comm: Any, replicated: Tree, gpu_aware: bool) -> None:
        if not isinstance(comm, MPI.Comm):
            raise TypeError(f"mpi takes a communicator of mpi4py, got {comm!r} of type {type(comm).__name__}")
        if comm == MPI.COMM_NULL:
            raise ValueError("mpi got the null communicator: this rank is not in the group; it must not call the clip")
        if comm.Is_inter():
            raise ValueError("mpi got an intercommunicator: its Allreduce gives each side the other's sum; Merge() it")
        super().__init__(comm, replicated, comm.Get_rank())
        self.gpu_aware = gpu_aware

    def join(self, partial: Array, op: ReduceOp, call: Call) -> Array:
        xp = array_api_compat.array_namespace(partial)
        if self.gpu_aware and array_api_compat.is_cupy_array(partial):
            xp.cuda.get_current_stream().synchronize()  # MPI knows nothing of streams
            out = xp.empty_like(partial)
            self.comm.Allreduce(partial, out, op=_MPI_OPS[op])
            return out
        mine = np.ascontiguousarray(_on_host(partial), np.float64)
        sent, got = np.zeros(_WIDTH), np.empty(_WIDTH)
        bits, groups = xp.finfo(partial.dtype).bits, crc32(call.groups.encode())
        sent[:_START] = call.norm_type, call.nonfinite == "error", _OPS.index(op), bits, groups
        end = _START + mine.size
        if end <= _WIDTH:
            sent[_START:end] = mine.reshape(-1)
        kind, merge = _message()
        self.comm.Allreduce([sent, 1, kind], [got, 1, kind], op=merge)
        split = [i for i in range(_START) if np.isnan(got[i])]
        if split:  # on all ranks, for they all have the same `got`
            policy = "'error'" if call.nonfinite == "error" else "another policy"
            told = f"{call.norm_type:g}", policy, op, str(bits), call.groups
            said = self.comm.allgather(", ".join(told[i] for i in split))
            names = " and ".join(_AGREED[i] for i in split)
            ranks = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(said[:16]))
            raise ValueError(f"the ranks do not agree on {names}, and nothing was clipped: {ranks}")
        if end <= _WIDTH:
            joined = got[_START:end].reshape(mine.shape)
        else:  # all ranks have as many numbers to join, now that they agree
            joined = np.empty_like(mine)
            self.comm.Allreduce(mine, joined, op=_MPI_OPS[op])
        return xp.asarray(joined, dtype=partial.dtype, device=array_api_compat.device(partial))

    def gather(self, text: str) -> list[str]:
        return list(self.comm.allgather(text))


def _on_host(partial: Array) -> Any:
    if array_api_compat.is_cupy_array(partial):
        return partial.get()
    try:
        return np.asarray(partial)
    except Exception as error:
        if "Tracer" not in type(error).__name__:
            raise
        raise TypeError(
            "mpi joins partials on the host, and JAX is tracing these: use gradclip.distributed.psum inside shard_map"
        ) from error

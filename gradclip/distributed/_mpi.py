"""MPI, by mpi4py: the ranks' partials in one Allreduce, in a message that also shows whether they mean the same."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import array_api_compat
import numpy as np
from mpi4py import MPI

from gradclip._types import Array, Call, ReduceOp, Tree
from gradclip.distributed._ranks import AGREED, Ranks, head

#: A message: what all ranks must agree on, then the partial. One of one group takes the least that is sent.
_START, _LEAST = len(AGREED), 16

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
def _operation() -> Any:
    return MPI.Op.Create(_merge, commute=True)


@lru_cache
def _message(length: int) -> Any:
    """The datatype of a message, which MPI never takes apart."""
    return MPI.DOUBLE.Create_contiguous(length).Commit()


@lru_cache
def _attribute() -> int:
    """Under this key a communicator keeps how long the last message was: the same on all its ranks.

    What a rank sends first has that length, whatever its own groups are: so ranks that differ are still able to say so.
    """
    return MPI.Comm.Create_keyval()


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
        length, end = self.comm.Get_attr(_attribute()) or _LEAST, _START + mine.size
        fits = length == max(_LEAST, end)
        sent, got = np.zeros(length), np.empty(length)
        bits = xp.finfo(partial.dtype).bits
        sent[:_START] = head(op, call, bits, mine.size)
        if fits:
            sent[_START:end] = mine.reshape(-1)
        self.comm.Allreduce([sent, 1, _message(length)], [got, 1, _message(length)], op=_operation())
        split = [i for i in range(_START) if np.isnan(got[i])]
        if split:  # on all ranks, for they all have the same `got`
            self.refuse(split, op, call, bits)
        if fits:
            joined = got[_START:end].reshape(mine.shape)
        else:  # all ranks have as many numbers to join, now that they agree
            joined = np.empty_like(mine)
            self.comm.Allreduce(mine, joined, op=_MPI_OPS[op])
            self.comm.Set_attr(_attribute(), max(_LEAST, end))
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

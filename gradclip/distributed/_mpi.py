"""MPI, by mpi4py: the ranks' partials in one Allreduce, in a message that also shows whether they mean the same."""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from typing import Any

import array_api_compat
import numpy as np
from mpi4py import MPI

from gradclip._types import Array, Call, Engine, Leaf, ReduceOp, Tree

#: A message: what all ranks must agree on, the largest float64 flag of any, then the partial, and zeros.
_WIDTH = 16
_AGREED = ("norm_type", "nonfinite", "operation", "bits of the accumulation", "length of the partial")
_WIDE, _START = len(_AGREED), len(_AGREED) + 1

_OPS: tuple[ReduceOp, ...] = ("sum", "max", "min")
_JOIN = (np.add, np.maximum, np.minimum)


def _merge(one: Any, two: Any, datatype: Any) -> None:
    """What MPI calls to join messages, `two` in place. Where they disagree, NaN says so from then on."""
    a = np.frombuffer(one, np.float64).reshape(-1, _WIDTH)
    b = np.frombuffer(two, np.float64).reshape(-1, _WIDTH)
    with np.errstate(all="ignore"):
        for x, y in zip(a, b, strict=True):
            agreed = x[:_WIDE] == y[:_WIDE]
            if agreed.all():
                y[_START:] = _JOIN[int(y[2])](x[_START:], y[_START:])
            y[:_WIDE][~agreed] = np.nan
            y[_WIDE] = max(x[_WIDE], y[_WIDE])


@lru_cache
def _message() -> tuple[Any, Any]:
    """The datatype of a message, which MPI never takes apart, and the operation that joins two."""
    return MPI.DOUBLE.Create_contiguous(_WIDTH).Commit(), MPI.Op.Create(_merge, commute=True)


class Mpi(Engine):
    """See `gradclip.distributed.mpi`. The kind of a leaf: whether all ranks hold copies of it."""

    telling = "replicated"

    def __init__(self, comm: Any, replicated: Tree, gpu_aware: bool) -> None:
        if not isinstance(comm, MPI.Comm):
            raise TypeError(f"mpi takes a communicator of mpi4py, got {comm!r} of type {type(comm).__name__}")
        if comm == MPI.COMM_NULL:
            raise ValueError("mpi got the null communicator: this rank is not in the group; it must not call the clip")
        if comm.Is_inter():
            raise ValueError(
                "mpi got an intercommunicator, whose Allreduce gives each side the other's sum: Merge() it"
            )
        self.comm = comm
        self.told = replicated
        self.gpu_aware = gpu_aware

    def kind(self, leaf: Leaf, told: Any) -> Hashable:
        if not isinstance(told, bool | None):
            raise TypeError(f"replicated says {told!r} of {leaf.path}: it must be True, False or None (False)")
        return bool(told)

    def counts(self, kind: Hashable, like: Array) -> bool:
        return not kind or self.comm.Get_rank() == 0

    def join(self, partial: Array, op: ReduceOp, call: Call) -> Array:
        xp = array_api_compat.array_namespace(partial)
        if self.gpu_aware and array_api_compat.is_cupy_array(partial):
            xp.cuda.get_current_stream().synchronize()  # MPI knows nothing of streams
            out = xp.empty_like(partial)
            self.comm.Allreduce(partial, out, op={"sum": MPI.SUM, "max": MPI.MAX, "min": MPI.MIN}[op])
            return out
        header = (call.norm_type, float(call.nonfinite == "error"), _OPS.index(op), xp.finfo(partial.dtype).bits)
        sent, got = np.zeros(_WIDTH), np.empty(_WIDTH)
        end = _START + partial.shape[0]
        sent[:_START] = (*header, partial.shape[0], call.wide)
        sent[_START:end] = _on_host(partial)
        kind, merge = _message()
        self.comm.Allreduce([sent, 1, kind], [got, 1, kind], op=merge)
        self._check(sent, got)
        call.wide = bool(got[_WIDE])
        return xp.asarray(got[_START:end], dtype=partial.dtype, device=array_api_compat.device(partial))

    def _check(self, sent: Any, got: Any) -> None:
        """Raise on all ranks, or on none: they all have the same `got`."""
        split = [i for i in range(_WIDE) if np.isnan(got[i])]
        if not split:
            return
        said = self.comm.allgather([_told(i, sent[i]) for i in split])
        names = " and ".join(_AGREED[i] for i in split)
        ranks = "; ".join(f"rank {rank}: {', '.join(texts)}" for rank, texts in enumerate(said[:16]))
        raise ValueError(f"the ranks do not agree on {names}, and nothing was clipped: {ranks}")

    def gather(self, text: str) -> list[str]:
        return list(self.comm.allgather(text))


def _told(i: int, value: float) -> str:
    if _AGREED[i] == "nonfinite":
        return "'error'" if value else "another policy"
    return _OPS[int(value)] if _AGREED[i] == "operation" else f"{value:g}"


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

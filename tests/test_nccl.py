"""NCCL by CuPy, against a communicator that records its calls and plays the other rank. NCCL itself is not run."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

import exact
import gradclip
from backends import MISSING

cupy = pytest.importorskip("cupy")

pytestmark = [
    pytest.mark.library("cupy"),
    pytest.mark.skipif("cupy" in MISSING, reason=f"backend cupy: {MISSING.get('cupy')}"),
]

INF = math.inf
NAMES = {0: "sum", 2: "max", 3: "min"}  # ncclRedOp_t
JOIN = {"sum": np.add, "max": np.maximum, "min": np.minimum}


class Communicator:
    """`cupy.cuda.nccl.NcclCommunicator`'s methods, with its argument types, for one of two ranks.

    The other rank holds `grads`. Its partials are taken from a call of gradclip, which is told to join nothing.
    """

    def __init__(self, rank: int, grads: Any, p: float, device: int = 0) -> None:
        self.rank, self.calls, self.streams, self.device = rank, [], [], device
        self.grads, self.p = grads, p
        self.sent = b""
        self.passes: list[Any] = []
        self.asked: list[bytes] = []  # whether the ranks mean the same
        self.other_says = b""  # else the other rank says what this one says
        self.verb: Any = lambda grads, p, all_reduce: gradclip.global_norm(grads, p, all_reduce=all_reduce)

    def rank_id(self) -> int:
        return self.rank

    def size(self) -> int:
        return 2

    def device_id(self) -> int:
        return self.device

    def check_device(self, *pointers: int) -> None:
        """NCCL wants its own device to be the current one, and the buffers there."""
        assert cupy.cuda.runtime.getDevice() == self.device
        assert all(cupy.cuda.runtime.pointerGetAttributes(p).device == self.device for p in pointers)

    def allReduce(self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, stream: int) -> None:
        assert all(type(x) is int for x in (sendbuf, recvbuf, count, datatype, op, stream))
        assert datatype == 8, "ncclFloat64"
        self.check_device(sendbuf, recvbuf)
        passed = len(self.calls)
        self.calls.append((NAMES[op], count))
        self.streams.append(stream)
        mine, out = view(sendbuf, count, np.float64), view(recvbuf, count, np.float64)
        asked = itertools.count()

        def other(partial: Any, name: str) -> Any:
            i = next(asked)
            if i == passed:  # the pass that this call joins
                self.passes.append(JOIN[name](mine.get().reshape(partial.shape), partial))
                out.set(self.passes[i].reshape(-1))
            return self.passes[i] if i <= passed else partial

        self.verb(self.grads, self.p, other)

    def allGather(self, sendbuf: int, recvbuf: int, count: int, datatype: int, stream: int) -> None:
        assert datatype == 1, "ncclUint8"
        self.check_device(sendbuf, recvbuf)
        self.sent = bytes(view(sendbuf, count, np.uint8).get())
        table = np.zeros((2, count), np.uint8)
        table[self.rank] = np.frombuffer(self.sent, np.uint8)
        text = b"  grads.x"
        if self.sent.startswith(b"norm_type"):
            self.asked.append(self.sent.rstrip(b"\0"))
            text = self.other_says or self.asked[-1]
        table[1 - self.rank, : len(text)] = np.frombuffer(text, np.uint8)
        view(recvbuf, 2 * count, np.uint8).set(table.reshape(-1))


def view(pointer: int, count: int, dtype: Any) -> Any:
    size = count * np.dtype(dtype).itemsize
    memory = cupy.cuda.UnownedMemory(pointer, size, None, cupy.cuda.Device().id)
    return cupy.ndarray(count, dtype, cupy.cuda.MemoryPointer(memory, 0))


MINE, OTHER = np.float32([3, -0.5, 1e25]), np.float64([4, 0.25])


@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, INF, -INF, 0.0, -2.0])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_call_joins_the_ranks(p: float, rank: int) -> None:
    comm = Communicator(rank, [OTHER], p)
    shared = np.float32([0.125, 7]) if p > 0 else np.float32([1, 2])
    grads = {"own": cupy.asarray(MINE), "shared": cupy.asarray(shared)}
    if rank == 1:  # then the other one, of rank 0, counts the copies
        comm.grads = [OTHER, shared]
    engine = gradclip.distributed.nccl(comm, {"own": False, "shared": True})
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        out = gradclip.clip_grad_norm(grads, 0.5, p, all_reduce=engine)
    stream.synchronize()
    want = exact.norm([MINE, OTHER, shared], p)
    exact.check_norm(float(out.norm), want, "float32", 8)
    factor = min(1.0, float(0.5 / want))
    np.testing.assert_allclose(out.grads["shared"].get(), shared * factor, rtol=1e-6)
    np.testing.assert_allclose(out.grads["own"].get(), MINE * factor, rtol=1e-6)
    assert len(comm.calls) == (1 if p in (2, 1, 0, INF, -INF) else 2)
    assert all(count <= 4 for _, count in comm.calls)
    assert set(comm.streams) == {stream.ptr}, "the current stream, as everything else"


FAMILY: dict[str, Any] = {
    "unit": lambda x, p, f: gradclip.clip_grad_norm(x, 0.5, p, per=gradclip.Units(0), all_reduce=f),
    "example": lambda x, p, f: gradclip.clip_grad_norm(x, 0.5, p, per="example", all_reduce=f),
    "agc": lambda x, p, f: gradclip.clip_grad_agc(x, x, 0.25, p, per=gradclip.Units(0), all_reduce=f),
    "sum": lambda x, p, f: gradclip.clipped_sum(x, 0.5, p, all_reduce=f),
}


@pytest.mark.parametrize("p", [2.0, "rms", 3.0])
@pytest.mark.parametrize("call", FAMILY)
def test_many_groups_join_in_one_call(call: str, p: Any) -> None:
    """The ranks have the same units or examples, and each some columns of them: as if one had them all."""
    mine, other = np.float32([[3, -0.5], [1e20, 2], [0.25, 4]]), np.float32([[1, 2, 3], [4, 5, 6], [7, 8, 1e-3]])
    comm = Communicator(0, [other], p)
    comm.verb = FAMILY[call]
    got, norm = FAMILY[call]([cupy.asarray(mine)], p, gradclip.distributed.nccl(comm))
    whole, want = FAMILY[call]([np.concatenate([mine, other], axis=1)], p, None)
    np.testing.assert_allclose(got[0].get(), whole[0][..., :2], rtol=1e-6)
    got_norms, want_norms = (x[0] if isinstance(x, list) else x for x in (norm, want))
    np.testing.assert_allclose(got_norms.get(), want_norms, rtol=1e-6)
    columns = 6 if call == "agc" else 3
    rows = {2.0: [4], "rms": [5], 3.0: [3, 2]}[p]
    assert [n for _, n in comm.calls] == [n * columns for n in rows]


def test_an_iterator_of_flags_is_read_once() -> None:
    """When the engine is made, so that it can be used again."""
    comm = Communicator(1, [OTHER, np.float32([12])], 2.0)
    grads = [cupy.asarray(MINE), cupy.asarray(np.float32([12]))]
    engine = gradclip.distributed.nccl(comm, (flag for flag in [False, True]))
    for _ in range(2):
        comm.calls.clear()
        comm.passes.clear()
        norm = gradclip.global_norm(grads, all_reduce=engine)
        exact.check_norm(float(norm), exact.norm([MINE, OTHER, np.float32([12])]), "float32")


def test_a_rank_without_leaves_joins_in() -> None:
    """Its norm is float64, for another rank has told that it has such leaves."""
    comm = Communicator(0, [OTHER], 2.0)
    out = gradclip.clip_grad_norm([], 0.5, all_reduce=gradclip.distributed.nccl(comm))
    exact.check_norm(out.norm, exact.norm([OTHER]), "float64")
    assert out.norm.dtype == np.float64
    assert comm.calls == [("sum", 4)]


def test_error_names_rank_and_path() -> None:
    comm = Communicator(1, [OTHER], 2.0)
    bad = {"w": cupy.asarray(np.float32([1, math.nan]))}
    with pytest.raises(
        gradclip.NonFiniteError,
        match=r"rank 0 of 2:\n +grads\.x\n +rank 1 of 2:\n +grads\['w'\] \(float32, shape \(2,\)\): 1 NaN, 0 inf",
    ):
        gradclip.clip_grad_norm(bad, 1.0, nonfinite="error", all_reduce=gradclip.distributed.nccl(comm))
    assert len(comm.sent) == 4096
    assert comm.calls == [("sum", 4)]


@pytest.mark.parametrize(("device", "leaf", "current"), [(1, 1, 0), (1, 0, 0), (0, 1, 1), (0, 1, 0)])
def test_it_joins_and_gathers_on_the_communicators_device(device: int, leaf: int, current: int) -> None:
    """Whichever is the leaves' and the current one."""
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two devices")
    for p in (2.0, 3.0):
        comm = Communicator(1, [OTHER], p, device)
        joined = gradclip.distributed.nccl(comm, [False, True])
        with cupy.cuda.Device(leaf):
            grads = [cupy.asarray(MINE), cupy.asarray(np.float32([5]))]
            bad = [cupy.asarray(np.float32([1, math.nan]))]
        with cupy.cuda.Device(current):
            out = gradclip.clip_grad_norm(grads, 0.5, p, all_reduce=joined)
            assert out.norm.device.id == out.grads[0].device.id == leaf
            assert cupy.cuda.runtime.getDevice() == current
            with out.norm.device:
                exact.check_norm(out.norm.get(), exact.norm([MINE, OTHER], p), "float32", 8)
            if p == 2:
                comm.calls.clear()
                comm.passes.clear()
                with pytest.raises(gradclip.NonFiniteError, match="rank 0 of 2"):
                    gradclip.clip_grad_norm(bad, 1.0, nonfinite="error", all_reduce=gradclip.distributed.nccl(comm))
                assert len(comm.sent) == 4096
                comm.calls.clear()
                comm.passes.clear()
                empty = gradclip.clip_grad_norm([], 0.5, all_reduce=gradclip.distributed.nccl(comm))
                exact.check_norm(empty.norm, exact.norm([OTHER]), "float32")


def test_what_is_refused() -> None:
    with pytest.raises(TypeError, match=r"nccl takes a cupy\.cuda\.nccl\.NcclCommunicator, got 3"):
        gradclip.distributed.nccl(3)
    comm = Communicator(0, [OTHER], 2.0)
    with pytest.raises(TypeError, match=r"replicated says 'yes' of grads\[0\]"):
        gradclip.global_norm([cupy.ones(2)], all_reduce=gradclip.distributed.nccl(comm, "yes"))
    assert comm.calls == []


def test_mpi_takes_cupy_by_way_of_the_host() -> None:
    """One rank, the real MPI: what must be right about devices, with and without a GPU-aware MPI's signature."""
    MPI = pytest.importorskip("mpi4py.MPI", exc_type=ImportError)
    host = [np.float32([3e30, 4e30]), np.array([1e-3])]
    for p in (2.0, 3.0, INF, 0.0):
        out = gradclip.clip_grad_norm(
            [cupy.asarray(x) for x in host], 0.5, p, all_reduce=gradclip.distributed.mpi(MPI.COMM_SELF)
        )
        exact.check_norm(float(out.norm), exact.norm(host, p), "float64", 8)
        assert isinstance(out.norm, cupy.ndarray)
        assert isinstance(out.grads[0], cupy.ndarray)


def test_gpu_aware_mpi_gets_device_arrays() -> None:
    MPI = pytest.importorskip("mpi4py.MPI", exc_type=ImportError)
    calls = []

    class Fake(MPI.Intracomm):
        def Allreduce(self, sendbuf: Any, recvbuf: Any, op: Any) -> None:
            assert isinstance(sendbuf, cupy.ndarray)
            assert isinstance(recvbuf, cupy.ndarray)
            calls.append(op)
            recvbuf[...] = 4 * sendbuf if op == MPI.SUM else sendbuf

    engine = gradclip.distributed.mpi(Fake(MPI.COMM_SELF), gpu_aware=True)
    norm = gradclip.global_norm([cupy.asarray(np.float32([3, 4]))], all_reduce=engine)
    assert float(norm) == 10.0, "four ranks with the same"
    assert float(gradclip.global_norm([cupy.asarray(np.float32([3, 4]))], -INF, all_reduce=engine)) == 3.0
    assert calls == [MPI.SUM, MPI.MIN]


def test_the_ranks_are_asked_once_for_their_groups() -> None:
    comm = Communicator(0, [OTHER], 2.0)
    comm.verb = lambda grads, p, join: gradclip.norms(grads, p, all_reduce=join)
    grads = [cupy.asarray(MINE)]
    for _ in range(3):
        comm.calls, comm.passes = [], []
        joined = gradclip.distributed.nccl(comm)
        (norm,) = gradclip.norms(grads, all_reduce=joined)
        exact.check_norm(float(norm), exact.norm([MINE, OTHER]), "float32")
    assert comm.asked == [b"norm_type 2.0, nonfinite='propagate', 1 leaves"]
    comm.calls, comm.passes, comm.verb = [], [], lambda grads, p, join: gradclip.global_norm(grads, p, all_reduce=join)
    gradclip.global_norm(grads, all_reduce=joined)
    assert len(comm.asked) == 1, "all elements are one group anywhere"


def test_ranks_that_mean_different_groups_are_told() -> None:
    comm = Communicator(0, [OTHER], 2.0)
    comm.other_says = b"norm_type 2.0, nonfinite='propagate', 3 examples"
    grads = [cupy.ones((2, 3), cupy.float32)]
    with pytest.raises(
        ValueError,
        match=r"^the ranks do not agree, and nothing was clipped: rank 0: .*, 2 examples; rank 1: .*, 3 examples$",
    ):
        gradclip.clip_grad_norm_(grads, 1.0, per="example", all_reduce=gradclip.distributed.nccl(comm))
    assert comm.calls == []
    assert (grads[0].get() == 1).all()

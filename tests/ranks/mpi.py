"""What MPI ranks do together: `mpiexec -n 4 python -m mpi4py tests/ranks/mpi.py CASE...`.

tests/test_mpi.py runs it. A case raises where it is not so; else every rank prints "rank R: CASE is so".
"""

from __future__ import annotations

import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import exact
import gradclip
from gradclip.distributed import mpi

INF = math.inf
ORDERS = (2.0, 1.0, 3.0, 0.5, INF, -INF, 0.0, -2.0)


class Counting(MPI.Intracomm):
    """A communicator that remembers its collectives, and how many numbers each of them took."""

    calls: list[tuple[str, int]]

    def __new__(cls, comm: Any) -> Counting:
        self = super().__new__(cls, comm)
        self.calls = []
        return self

    def Allreduce(self, sendbuf: Any, recvbuf: Any, op: Any) -> None:
        if isinstance(sendbuf, list):
            assert sendbuf[1] == 1, "one message"
        self.calls.append(("Allreduce", (sendbuf[0] if isinstance(sendbuf, list) else sendbuf).size))
        super().Allreduce(sendbuf, recvbuf, op)

    def allgather(self, sendobj: Any) -> Any:
        self.calls.append(("allgather", len(str(sendobj))))
        return super().allgather(sendobj)


world = Counting(MPI.COMM_WORLD)
rank, size = world.Get_rank(), world.Get_size()


def everyones(x: Any) -> list[Any]:
    """What each rank holds, by a way that gradclip does not take."""
    return MPI.COMM_WORLD.allgather(x)


def message_of(error: type[Exception], call: Any, *args: Any, **kw: Any) -> str:
    try:
        call(*args, **kw)
    except error as raised:
        return str(raised)
    raise AssertionError(f"rank {rank}: no {error.__name__}")


def shards(seed: int = 0) -> tuple[dict[str, Any], list[np.ndarray]]:
    """This rank's tree, and every leaf of the whole model once. Ranks hold different trees; rank 3 of 4 none."""
    rng = np.random.default_rng(seed)
    parts = [rng.standard_normal(n).astype(np.float32) for n in (7, 1, 300, 0)[:size]]
    shared = rng.standard_normal(11).astype(np.float32)
    tree: dict[str, Any] = {"shared": shared.copy()}
    if rank != 3:
        tree[f"part{rank}"] = [parts[rank].copy(), None] if rank else parts[rank].copy()
    return tree, [*parts, shared]


def replicated(tree: dict[str, Any]) -> dict[str, bool]:
    return {key: key == "shared" for key in tree}


# -- the cases -------------------------------------------------------------------------------------------------


def norms() -> None:
    """Different trees per rank, replicated leaves beside a rank's own: the norm of the whole, for every p."""
    for p in ORDERS:
        tree, whole = shards(3)
        want = exact.norm(whole, p)
        world.calls.clear()
        out = gradclip.clip_grad_norm(tree, 0.25, p, all_reduce=mpi(world, replicated(tree)))
        exact.check_norm(out.norm, want, "float32", 8)
        passes = 1 if p in (2, 1, 0, INF, -INF) else 2
        assert world.calls == [("Allreduce", 16)] * passes, world.calls
        factor = min(1.0, float(0.25 / want))
        for got, leaf in zip(leaves(out.grads), leaves(tree), strict=True):
            np.testing.assert_allclose(got, leaf.astype(np.float64) * factor, rtol=2**-23)
        assert len({float(x).hex() for x in everyones(out.norm)}) == 1
        mine = {key: leaf.copy() for key, leaf in flat(tree).items()}
        norm = gradclip.clip_grad_norm_(tree, 0.25, p, all_reduce=mpi(world, replicated(tree)))
        assert float(norm) == float(out.norm)
        for key, leaf in flat(tree).items():
            np.testing.assert_array_equal(leaf, flat(out.grads)[key])
            assert mine[key].shape == leaf.shape


def groups() -> None:
    """Every rank holds its part of each leaf: one norm for each leaf, or label, over all ranks."""
    rng = np.random.default_rng(7)
    whole = {"w": rng.standard_normal((size, 5)), "v": 1e30 * rng.standard_normal((size, 3)), "b": np.float64([[3, 4]])}
    whole = {name: x.astype(np.float32) for name, x in whole.items()}
    copies = {"w": False, "v": False, "b": True}
    for per, members in (("leaf", {"w": "w", "v": "v", "b": "b"}), ({"w": 0, "v": 1, "b": 0}, {0: "wb", 1: "v"})):
        for p in (2.0, 3.0, INF, -INF):
            mine = {name: x[0] if copies[name] else x[rank] for name, x in whole.items()}
            gradclip.norms(mine, p, per=per, all_reduce=mpi(world, copies))
            world.calls.clear()
            grads, norm = gradclip.clip_grad_norm(mine, 0.5, p, per=per, all_reduce=mpi(world, copies))
            assert all(name == "Allreduce" for name, _ in world.calls)
            if p != 3:
                assert world.calls == [("Allreduce", max(16, 5 + 4 * len(members)))], world.calls
            for key, names in members.items():
                want = exact.norm([whole[name] for name in names], p)
                exact.check_norm(norm[key], want, "float32", 8)
                for name in names:
                    scaled = mine[name].astype(np.float64) * min(1.0, float(0.5 / want))
                    np.testing.assert_allclose(grads[name], scaled, rtol=2**-22)
    said = message_of(
        ValueError,
        gradclip.norms,
        {"w": np.ones(2), "v": np.ones(1)},
        per={"w": "a", "v": "b"} if rank else {"w": "b", "v": "a"},
        all_reduce=mpi(world),
    )
    assert "the ranks do not agree on groups, and nothing was clipped: rank 0: labels 'b', 'a'; rank 1: " in said, said
    said = message_of(ValueError, gradclip.norms, [np.ones(2)] * (1 + (rank == 1)), all_reduce=mpi(world))
    assert "rank 0: 1 leaves; rank 1: 2 leaves" in said, said


def family() -> None:
    """Units and examples of which every rank holds a part: one collective; AGC and the sum of examples likewise."""
    rng = np.random.default_rng(11)
    whole = rng.standard_normal((3, 4 * size, 2)).astype(np.float32)
    params = rng.standard_normal(whole.shape).astype(np.float32) / 4
    own = slice(4 * rank, 4 * rank + 4)
    mine, weights, joined = [whole[:, own]], [params[:, own]], mpi(world)

    def calls(f: Any, slots: int, count: int) -> Any:
        f()
        world.calls.clear()
        out = f()
        assert world.calls == [("Allreduce", max(16, 5 + slots * count))], world.calls
        return out

    each = calls(lambda: gradclip.norms(mine, per="example", all_reduce=joined), 4, 3)
    for norm, example in zip(each, whole, strict=True):
        exact.check_norm(norm, exact.norm([example]), "float32")
    (units,) = calls(lambda: gradclip.norms(mine, "rms", per=gradclip.Units(0), all_reduce=joined), 5, 3)
    assert units.shape == (3, 1, 1)
    for norm, unit in zip(units.ravel(), whole, strict=True):
        exact.check_norm(norm, exact.norm([unit], "rms"), "float32")
    (total,), _ = calls(lambda: gradclip.clipped_sum(mine, 2.0, all_reduce=joined), 4, 3)
    factors = [min(1.0, float(2 / exact.norm([example]))) for example in whole]
    want = sum(f * example[own].astype(np.float64) for f, example in zip(factors, whole, strict=True))
    np.testing.assert_allclose(total, want, atol=1e-5)
    clipped, _ = calls(lambda: gradclip.clip_grad_agc(mine, weights, 0.5, per="unit", all_reduce=joined), 4, 4)
    for k in range(2):
        bound = 0.5 * exact.norm([params[..., k]])
        factor = min(1.0, float(bound / exact.norm([whole[..., k]])))
        np.testing.assert_allclose(clipped[0][..., k], mine[0][..., k] * np.float64(factor), rtol=1e-6)
    differing = [np.ones((2 + (rank == 1), 5 - (rank == 1)))]
    said = message_of(ValueError, gradclip.norms, differing, per=gradclip.Units(0), all_reduce=joined)
    assert "rank 0: 1 leaves of 2 units; rank 1: 1 leaves of 3 units" in said, said
    said = message_of(ValueError, gradclip.clipped_sum, differing, 1.0, all_reduce=joined)
    assert "rank 0: 2 examples; rank 1: 3 examples" in said, said
    assert float(gradclip.global_norm(differing, all_reduce=joined)) > 0, "the next call is fine again"


def flat(tree: Any) -> dict[str, Any]:
    return {key: value[0] if isinstance(value, list) else value for key, value in tree.items()}


def leaves(tree: Any) -> list[Any]:
    return list(flat(tree).values())


def extremes() -> None:
    """Magnitudes that no float holds squared, on some ranks only; all ranks empty; one NaN in a copy that counts."""
    for own in ([1e200, 3e-200], [3e-320], [1.7e308, 1.7e308], [0.0]):
        for p in (2.0, 1.0, 3.0, INF):
            mine = [np.array(own)] if rank == size - 1 else [np.float32([3e-30, -4e30])]
            whole = [np.array(own)] + [np.float32([3e-30, -4e30])] * (size - 1)
            out = gradclip.clip_grad_norm(mine, 1.0, p, all_reduce=mpi(world))
            exact.check_norm(out.norm, exact.norm(whole, p), "float64", 8)
            assert out.norm.dtype == np.float64, "one rank's float64 leaf makes the norm float64 on all"
            assert len({float(x).hex() for x in everyones(out.norm)}) == 1
    out = gradclip.clip_grad_norm([], 1.0, all_reduce=mpi(world))
    assert (out.grads, float(out.norm)) == ([], 0.0)
    copies = [np.float32([math.nan if rank else 3.0])]  # no one's business but that of the rank that counts
    assert float(gradclip.global_norm(copies, all_reduce=mpi(world, replicated=True))) == 3.0


def boundary() -> None:
    """A norm between two float32 numbers, float64 leaves on one rank only: all ranks clip, or none."""
    mine = [np.array([1.0 + 1e-9])] if rank == 0 else [np.float32([0.0, 0.0])]
    out = gradclip.clip_grad_norm(mine, 1.0, all_reduce=mpi(world))
    kept = everyones(bool(out.grads[0] is mine[0]))
    assert kept == [False] * size, kept
    assert float(out.norm) == 1.0 + 1e-9


def policies() -> None:
    """A NaN on rank 1, an inf on rank 2: every policy does the same everywhere, "error" raises on all."""
    for p in (2.0, 3.0, INF, -INF, 0.0, 1.0):
        bad = {"w": np.float32([1, math.nan if rank == 1 else 2]), "v": [np.array([INF if rank == 2 else 1.0])]}
        before = [bad["w"].tobytes(), bad["v"][0].tobytes()]
        engine = mpi(world)
        zero = gradclip.clip_grad_norm(bad, 1.0, p, nonfinite="zero", all_reduce=engine).grads
        assert not zero["w"].any()
        assert not zero["v"][0].any()
        nan = gradclip.clip_grad_norm(bad, 1.0, p, all_reduce=engine).grads
        assert np.isnan(nan["w"]).all()
        assert np.isnan(nan["v"][0]).all()
        for verb in (gradclip.clip_grad_norm, gradclip.clip_grad_norm_):
            world.calls.clear()
            text = message_of(gradclip.NonFiniteError, verb, bad, 1.0, p, nonfinite="error", all_reduce=engine)
            assert re.search(
                rf"rank 1 of {size}:\n +grads\['w'\] \(float32, shape \(2,\)\): 1 NaN, 0 inf\n"
                rf" +rank 2 of {size}:\n +grads\['v'\]\[0\] \(float64, shape \(1,\)\): 0 NaN, 1 inf\n",
                text,
            ), text
            assert len(set(everyones(text))) == 1, "all ranks say the same"
            assert [name for name, _ in world.calls].count("allgather") == 1
        assert before == [bad["w"].tobytes(), bad["v"][0].tobytes()], "nothing was changed"
    good = [np.float32([3.0])]
    world.calls.clear()
    gradclip.clip_grad_norm(good, 1.0, nonfinite="error", all_reduce=mpi(world))
    assert world.calls == [("Allreduce", 16)], "no word is gathered where all is finite"


def disagreement() -> None:
    """Ranks that mean different things: an error on all of them, nothing written, and the next call is right."""
    for mine, others in ((2.0, 1.0), (2.0, INF), (3.0, INF), (-INF, INF), (3.0, 2.5), (0.0, -1.0)):
        grads = [np.array([3.0, 4.0])]
        p = mine if rank == 1 else others
        text = message_of(ValueError, gradclip.clip_grad_norm_, grads, 1.0, p, all_reduce=mpi(world))
        assert "do not agree on norm_type" in text, text
        assert re.search(rf"rank 0: {others:g}\b.*rank 1: {mine:g}\b", text), text
        assert grads[0].tolist() == [3.0, 4.0]
    policy = "error" if rank == 0 else "zero"
    ones = [np.ones(1)]
    text = message_of(ValueError, gradclip.clip_grad_norm, ones, 1.0, nonfinite=policy, all_reduce=mpi(world))
    assert "agree on nonfinite" in text, text
    assert "rank 0: 'error'; rank 1: another policy" in text, text
    np.testing.assert_allclose(gradclip.global_norm(ones, all_reduce=mpi(world)), math.sqrt(size))


def communicators() -> None:
    """The norm is that of the communicator's ranks; what is no intracommunicator is refused at once."""
    half = MPI.COMM_WORLD.Split(rank % 2)
    norm = gradclip.global_norm([np.array([float(rank + 1)])], all_reduce=mpi(half))
    want = math.sqrt(sum((r + 1) ** 2 for r in range(size) if r % 2 == rank % 2))
    np.testing.assert_allclose(norm, want, rtol=1e-15)
    alone = gradclip.global_norm([np.array([3.0, 4.0])], all_reduce=mpi(MPI.COMM_SELF, replicated=True))
    assert float(alone) == 5.0
    inter = half.Create_intercomm(0, MPI.COMM_WORLD, 1 - rank % 2)
    assert "intercommunicator" in message_of(ValueError, mpi, inter)
    assert "null communicator" in message_of(ValueError, mpi, MPI.COMM_NULL)
    assert "communicator of mpi4py" in message_of(TypeError, mpi, "world")
    bad = {"w": np.ones(1)}
    text = message_of(TypeError, gradclip.global_norm, bad, all_reduce=mpi(world, {"w": "yes"}))
    assert "replicated says 'yes' of grads['w']" in text, text
    text = message_of(ValueError, gradclip.global_norm, bad, all_reduce=mpi(world, {"v": True}))
    assert "replicated does not match the gradients there" in text, text


def one_shot() -> None:
    """An iterator of flags is read when the engine is made: every use knows them."""
    mine, copy = [np.array([3.0 * (rank + 1)])], [np.array([4.0])]
    engine = mpi(world, replicated=(flag for flag in [False, True]))
    whole = [np.array([3.0 * (r + 1)]) for r in range(size)] + copy
    for _ in range(2):
        exact.check_norm(gradclip.global_norm([mine, copy], all_reduce=engine), exact.norm(whole), "float64")


def drift() -> None:
    """100 steps of clipped descent on copies and parts: the copies stay equal, bit for bit."""
    rng = np.random.default_rng(rank)
    shared, own = np.zeros(33, np.float32), np.zeros(5 + rank, np.float32)
    for step in range(100):
        common = np.random.default_rng(step).standard_normal(33).astype(np.float32)
        grads = {
            "shared": common,
            "own": rng.standard_normal(own.shape).astype(np.float32) * 10.0 ** rng.integers(-3, 4),
        }
        out = gradclip.clip_grad_norm(grads, 0.5, all_reduce=mpi(world, {"shared": True, "own": False}))
        shared -= np.float32(0.1) * out.grads["shared"]
        own -= np.float32(0.1) * out.grads["own"]
        assert len(set(everyones((shared.tobytes(), float(out.norm).hex())))) == 1, f"drift in step {step}"


def two_communicators() -> None:
    """Experts held by groups of ranks: joined over the group, then over groups, by one all_reduce of both."""
    expert = MPI.COMM_WORLD.Split(rank // 2)  # the ranks that hold parts of one expert
    across = MPI.COMM_WORLD.Split(rank % 2)  # one rank of each expert
    inner, outer = mpi(expert), mpi(across)

    def both(partial: Any, op: Any) -> Any:
        return outer(inner(partial, op), op)

    for p in ORDERS:
        mine = [np.float32([rank + 1.5, -rank])]
        whole = [np.float32([r + 1.5, -r]) for r in range(size)]
        out = gradclip.clip_grad_norm(mine, 0.5, p, all_reduce=both)
        exact.check_norm(out.norm, exact.norm(whole, p), "float32", 8)
        assert len({float(x).hex() for x in everyones(out.norm)}) == 1


def expert_groups() -> None:
    """Two groups, each with all experts; the rest is on all ranks. One group holds every leaf once."""
    if size != 4:
        return
    group = MPI.COMM_WORLD.Split(rank // 2)
    experts = [np.random.default_rng(i).standard_normal(6) * 10 for i in range(2)]
    rest = np.random.default_rng(9).standard_normal(5)
    grads = {"experts": experts[rank % 2].copy(), "rest": rest.copy()}
    for p in ORDERS:
        out = gradclip.clip_grad_norm(grads, 0.5, p, all_reduce=mpi(group, {"experts": False, "rest": True}))
        exact.check_norm(out.norm, exact.norm([*experts, rest], p), "float64", 8)
        assert len({float(x).hex() for x in everyones(out.norm)}) == 1, "the groups agree, too"
        assert len(set(everyones(out.grads["rest"].tobytes()))) == 1


def disjoint_parts() -> None:
    """A pipeline stage that clips its parts one after the other, by a norm joined once."""
    first, second = [np.array([3.0 + rank])], {"w": np.array([4.0 - rank, 1.0])}
    norm = gradclip.global_norm([first, second], all_reduce=mpi(world))
    world.calls.clear()
    clipped = [gradclip.clip_grad_norm(part, 1.0, norm=norm).grads for part in (first, second)]
    assert world.calls == []
    whole = [np.array([3.0 + r, 4.0 - r, 1.0]) for r in range(size)]
    want = float(exact.norm(whole))
    exact.check_norm(norm, exact.norm(whole), "float64")
    np.testing.assert_allclose(clipped[0][0], (3.0 + rank) / want, rtol=1e-15)
    np.testing.assert_allclose(clipped[1]["w"], np.array([4.0 - rank, 1.0]) / want, rtol=1e-15)


def jax_arrays() -> None:
    """JAX arrays outside jit, one process for each rank; inside jit an error says what to do."""
    import jax
    import jax.numpy as jnp

    engine = mpi(world)
    last = rank == size - 1
    for p in (2.0, 3.0):
        mine = [jnp.zeros(0, jnp.float32)] if last else [jnp.full(4, rank + 1.5e19, jnp.float32)]
        out = gradclip.clip_grad_norm(mine, 0.5, p, all_reduce=engine)
        whole = [np.full(4, r + 1.5e19, np.float32) for r in range(size - 1)]
        exact.check_norm(out.norm, exact.norm(whole, p), "float32", 8)
        np.testing.assert_allclose(out.grads[0], mine[0] * float(0.5 / exact.norm(whole, p)), rtol=1e-6)
    text = message_of(TypeError, lambda: jax.jit(lambda g: gradclip.global_norm(g, all_reduce=engine))(mine))
    assert "psum inside shard_map" in text, text
    text = message_of(ValueError, gradclip.global_norm, [] if last else mine, all_reduce=engine)
    assert "do not agree on bits of the accumulation" in text, text


def dies() -> None:
    """Rank 2 dies before the collective: no rank gets past it, so nothing is clipped half-way."""
    grads = [np.array([3.0])]
    if rank == 2:
        time.sleep(0.3)
        os._exit(17)
    gradclip.clip_grad_norm_(grads, 1.0, all_reduce=mpi(world))
    sys.stdout.write(f"rank {rank}: clipped to {grads[0]}\n")
    sys.stdout.flush()


def raises() -> None:
    """Rank 2 raises before the collective, under `python -m mpi4py`: all ranks are ended."""
    grads: list[Any] = [np.array([3.0])] if rank != 2 else [np.array([3])]
    gradclip.clip_grad_norm_(grads, 1.0, all_reduce=mpi(world))
    sys.stdout.write(f"rank {rank}: clipped to {grads[0]}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    for case in sys.argv[1:]:
        globals()[case]()
        sys.stdout.write(f"rank {rank}: {case} is so\n")  # in one piece, or ranks write into each other's lines
        sys.stdout.flush()

"""What gradclip asks of any engine: here one of threads, on every library. Real engines have files of their own."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mpmath
import numpy as np
import pytest

import exact
import gradclip
from gradclip._backends.generic import Backend as Generic
from gradclip.distributed import Engine

INF = math.inf
RANKS = 3
JOIN = {"sum": np.sum, "max": np.max, "min": np.min}


class Threads:
    """What the threads share."""

    def __init__(self, xp: Any) -> None:
        self.xp = xp
        self.barrier = threading.Barrier(RANKS, timeout=20)
        self.slots: list[Any] = [None] * RANKS

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.slots[rank] = value
        self.barrier.wait()
        everyones = list(self.slots)
        self.barrier.wait()
        return everyones


class Engineered(Engine):
    """An engine for one of the threads; `told` are flags, as `mpi` takes them."""

    telling = "copies"

    def __init__(self, threads: Threads, rank: int, copies: Any) -> None:
        self.threads, self.rank, self.told = threads, rank, copies
        self.calls: list[tuple[str, int]] = []
        self.heard: set[tuple[float, str]] = set()

    def kind(self, leaf: Any, told: Any) -> Any:
        assert leaf.path.startswith("grads")
        return bool(told)

    def counts(self, kind: Any, like: Any) -> bool:
        return not kind or self.rank == 1

    def join(self, partial: Any, op: Any, call: Any) -> Any:
        self.calls.append((op, partial.shape[0]))
        self.heard.add((call.norm_type, call.nonfinite))
        table = np.stack(self.threads.exchange(self.rank, self.threads.xp.numpy(partial)))
        return self.threads.xp.array(JOIN[op](table, axis=0))

    def gather(self, text: str) -> list[str]:
        return self.threads.exchange(self.rank, text)


def together(xp: Any, copies: Any, call: Callable[[int, Engineered], Any]) -> tuple[list[Any], list[Engineered]]:
    if not xp.eager:
        pytest.skip("threads cannot join what is traced")
    threads = Threads(xp)
    engines = [Engineered(threads, rank, copies) for rank in range(RANKS)]
    with ThreadPoolExecutor(RANKS) as pool:
        jobs = [pool.submit(call, rank, engine) for rank, engine in enumerate(engines)]
        return [job.result(timeout=120) for job in jobs], engines


def tree(xp: Any, rank: int) -> tuple[Any, list[np.ndarray]]:
    """A rank's gradients, and the leaves of the whole."""
    parts = [np.float32([r + 1, -0.25]) for r in range(RANKS)]
    copies = [np.float32([2, -3, 0.5]), np.float32([0.125])]
    return xp.tree({"own": parts[rank], "copies": {"a": copies[0], "b": [copies[1], None]}}), [*parts, *copies]


@pytest.mark.parametrize("p", [2.0, 3.0, -INF])
def test_copies_count_once(xp: Any, p: float) -> None:
    def clip(rank: int, engine: Engineered) -> Any:
        return gradclip.clip_grad_norm(tree(xp, rank)[0], 0.5, p, nonfinite="zero", all_reduce=engine)

    results, engines = together(xp, {"own": None, "copies": True}, clip)
    whole = tree(xp, 0)[1]
    want = exact.norm(whole, p)
    for rank, out in enumerate(results):
        exact.check_norm(xp.numpy(out.norm), want, "float32", 8)
        factor = min(1.0, float(0.5 / want))
        np.testing.assert_allclose(xp.numpy(out.grads["own"]), whole[rank] * factor, rtol=1e-6)
        np.testing.assert_allclose(xp.numpy(out.grads["copies"]["a"]), whole[3] * factor, rtol=1e-6)
        assert out.grads["copies"]["b"][1] is None
    assert len({float(xp.numpy(out.norm)) for out in results}) == 1
    for engine in engines:
        assert engine.calls == engines[0].calls
        assert len(engine.calls) == (1 if p in (2, 1, 0, INF, -INF) else 2)
        assert engine.heard == {(p, "zero")}


@pytest.mark.parametrize("p", [2.0, 3.0, -INF])
def test_copies_count_once_in_each_group(xp: Any, p: float) -> None:
    copies, labels = {"own": None, "copies": True}, {"own": "x", "copies": {"a": "y", "b": ["x", "x"]}}

    def clip(rank: int, engine: Engineered) -> Any:
        grads = tree(xp, rank)[0]
        by_label = gradclip.clip_grad_norm(grads, {"x": 0.5, "y": 0.25}, p, per=labels, all_reduce=engine)
        return by_label, gradclip.norms(grads, p, all_reduce=engine)

    results, _ = together(xp, copies, clip)
    *parts, a, b = tree(xp, 0)[1]
    x, y, own = exact.norm([*parts, b], p), exact.norm([a], p), exact.norm(parts, p)
    for rank, (out, norms) in enumerate(results):
        factors = {"x": min(1.0, float(0.5 / x)), "y": min(1.0, float(0.25 / y))}
        for got, want in [(out.norm["x"], x), (out.norm["y"], y), (norms["own"], own), (norms["copies"]["a"], y)]:
            exact.check_norm(xp.numpy(got), want, "float32", 8)
        exact.check_norm(xp.numpy(norms["copies"]["b"][0]), exact.norm([b], p), "float32", 8)
        np.testing.assert_allclose(xp.numpy(out.grads["own"]), parts[rank] * factors["x"], rtol=1e-6)
        np.testing.assert_allclose(xp.numpy(out.grads["copies"]["a"]), a * factors["y"], rtol=1e-6)
        np.testing.assert_allclose(xp.numpy(out.grads["copies"]["b"][0]), b * factors["x"], rtol=1e-6)


@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, INF, -INF, -2.0])
def test_ranks_decide_alike_though_one_alone_has_float64(xp: Any, p: float) -> None:
    """The norm is above the bound by less than float32 shows: all clip, also the ranks that have only float32."""
    if not xp.has("float64"):
        pytest.skip(f"{xp.name} has no float64")
    bound, unit = (2.5, 2.0**-22) if p > 0 else (1.25, 2.0**-23)
    norm = mpmath.mpf(bound) + 0.45 * unit
    assert np.float32(float(norm)) == bound
    other = norm if math.isinf(p) else (norm**p - mpmath.mpf(1.5) ** p) ** (1 / mpmath.mpf(p))

    def clip(rank: int, engine: Engineered) -> Any:
        leaf = [xp.array([1.5], "float32"), xp.array([float(other)], "float64"), xp.array(np.zeros(0), "float32")][rank]
        return gradclip.clip_grad_norm([leaf], bound, p, all_reduce=engine)

    results, _ = together(xp, None, clip)
    assert xp.numpy(results[0].grads[0])[0] == np.nextafter(np.float32(1.5), np.float32(0))
    assert abs(float(xp.numpy(results[1].grads[0])[0]) / float(other * bound / norm) - 1) < 1e-15
    assert xp.dtype_of(results[1].norm) == "float64"


@pytest.mark.parametrize("p", [2.0, 3.0, INF, -INF])
def test_width_travels_for_each_group_by_itself(xp: Any, p: float) -> None:
    """Two groups, both above the bound by less than float32 shows; a rank has float64 in the first: that one clips."""
    if not xp.has("float64"):
        pytest.skip(f"{xp.name} has no float64")
    bound, unit = (2.5, 2.0**-22) if p > 0 else (1.25, 2.0**-23)
    norm = mpmath.mpf(bound) + 0.45 * unit
    other = norm if math.isinf(p) else (norm**p - mpmath.mpf(1.5) ** p) ** (1 / mpmath.mpf(p))
    narrow = np.float32([1.5, float(other)])  # its norm, rounded to float32, is the bound or just above
    edge = float(np.float32(float(exact.norm([narrow] * RANKS, p))))

    def clip(rank: int, engine: Engineered) -> Any:
        first = [xp.array([1.5], "float32"), xp.array([float(other)], "float64"), xp.array(np.zeros(0), "float32")][
            rank
        ]
        tree = {"first": first, "second": xp.array(narrow, "float32")}
        return gradclip.clip_grad_norm(tree, {"first": bound, "second": edge}, p, per="leaf", all_reduce=engine)

    results, engines = together(xp, None, clip)
    assert xp.numpy(results[0].grads["first"])[0] == np.nextafter(np.float32(1.5), np.float32(0))
    assert abs(float(xp.numpy(results[1].grads["first"])[0]) / float(other * bound / norm) - 1) < 1e-15
    for out in results:
        assert xp.numpy(out.grads["second"]).tobytes() == narrow.tobytes()
        assert (xp.dtype_of(out.norm["second"]), float(out.norm["second"])) == ("float32", edge)
    assert all(engine.calls == engines[0].calls for engine in engines)


@pytest.mark.parametrize("per", [None, "leaf"])
def test_squares_beyond_float32_in_shards(xp: Any, per: Any) -> None:
    """Also where a shard holds nothing large, or nothing."""
    parts = [np.float32([1e30, 1e30]), np.float32([1e-30, 1.0]), np.zeros(0, np.float32)]

    def norm_of(rank: int, engine: Engineered) -> Any:
        found = gradclip.norms([xp.array(parts[rank])], per=per, all_reduce=engine)
        return xp.numpy(found[0] if per else found)

    for norm in together(xp, None, norm_of)[0]:
        exact.check_norm(norm, exact.norm(parts), "float32")


def test_error_is_raised_on_all_and_names_all(xp: Any) -> None:
    def clip(rank: int, engine: Engineered) -> str:
        grads = tree(xp, rank)[0]
        if rank:
            grads["own"] = xp.array(np.float32([math.nan, INF if rank == 2 else 0]))
        with pytest.raises(gradclip.NonFiniteError, match="global norm is nan") as caught:
            gradclip.clip_grad_norm(grads, 0.5, nonfinite="error", all_reduce=engine)
        assert [c.path for c in caught.value.culprits] == (["grads['own']"] if rank else [])
        return str(caught.value)

    texts, _ = together(xp, None, clip)
    assert len(set(texts)) == 1
    lines = texts[0].splitlines()
    assert [line.strip() for line in lines[1:5]] == [
        "rank 1 of 3:",
        "grads['own'] (float32, shape (2,)): 1 NaN, 0 inf",
        "rank 2 of 3:",
        "grads['own'] (float32, shape (2,)): 1 NaN, 1 inf",
    ]


def test_a_shard_that_fails_while_it_counts_leaves_nobody_waiting(xp: Any, monkeypatch: Any) -> None:
    """Its own error is told to all, and stands behind its NonFiniteError."""
    if xp.name.startswith(("jax", "cupy")):
        pytest.skip(f"{xp.name} counts in its own way")

    def failing(backend: Any, leaf: Any) -> Any:
        if math.prod(leaf.shape) == 7:  # rank 1's
            raise MemoryError("out of memory")
        return census(backend, leaf)

    census = Generic._census
    monkeypatch.setattr(Generic, "_census", failing)

    def clip(rank: int, engine: Engineered) -> BaseException:
        grads = {"own": xp.array(np.full(7 if rank == 1 else 3, math.nan), "float32"), "copies": None}
        with pytest.raises(gradclip.NonFiniteError, match="global norm is nan") as caught:
            gradclip.clip_grad_norm(grads, 0.5, nonfinite="error", all_reduce=engine)
        assert len(caught.value.culprits) == (0 if rank == 1 else 1)
        return caught.value

    errors, _ = together(xp, None, clip)
    assert len(set(map(str, errors))) == 1
    assert "could not count: MemoryError('out of memory')" in str(errors[0])
    assert [type(error.__cause__) for error in errors] == [type(None), MemoryError, type(None)]


@pytest.mark.library("numpy")
def test_bad_bounds_of_one_shard_wait_for_no_one() -> None:
    """`divide_by` and `norm` are this shard's: no text is gathered for them, or it would wait for the others."""

    class Alone(Engineered):
        def join(self, partial: Any, op: Any, call: Any) -> Any:
            return partial

        def gather(self, text: str) -> list[str]:
            raise AssertionError("nobody answers")

    array = np.array([3.0])
    engine = Alone(Threads(None), 0, None)
    with pytest.raises(gradclip.NonFiniteError, match=r"Every leaf here is finite: look at norm="):
        gradclip.clip_grad_norm([array], 1.0, norm=math.inf, nonfinite="error", all_reduce=engine)
    assert float(gradclip.global_norm([array], all_reduce=engine)) == 3.0


NOT_JOINED = {
    "none": (lambda x: None, TypeError, "None"),
    "float": (lambda x: 5.0, TypeError, "an object of type float"),
    "list": (lambda x: [1.0, 2.0, 3.0], TypeError, "an object of type list"),
    "pair": (lambda x: (x, None), TypeError, "an object of type tuple"),
    "row": (lambda x: x[0, :], ValueError, r"an array of shape \(1,\)"),
    "shorter": (lambda x: x[:1, :], ValueError, r"an array of shape \(1, 1\)"),
    "deeper": (lambda x: x[None, :, :], ValueError, r"an array of shape \(1, 4, 1\)"),
}


@pytest.mark.parametrize(("spoil", "error", "got"), NOT_JOINED.values(), ids=NOT_JOINED.keys())
def test_what_comes_back_must_be_the_joined_partial(xp: Any, spoil: Any, error: Any, got: str) -> None:
    """Also where it is traced. A collective that works in place and returns None is the usual slip."""

    def all_reduce(partial: Any, op: Any) -> Any:
        assert partial.shape == (4, 1)
        return spoil(partial)

    x = xp.array([3.0, 4.0], "float32")
    repair = "return the joined array, of the partial's shape"
    match = rf"^all_reduce gave {got} for a partial of shape \(4, 1\): {repair}(\n|$)"
    with pytest.raises(error, match=match):
        xp.clip_grad_norm([x], 1.0, all_reduce=all_reduce)
    with pytest.raises(error, match=match):
        xp.global_norm([x], all_reduce=all_reduce)
    assert xp.numpy(x).tolist() == [3.0, 4.0]


@pytest.mark.parametrize("p", [2.0, 3.0, INF])
def test_the_partial_itself_will_do(xp: Any, p: float) -> None:
    """A shard that is alone."""
    out = xp.clip_grad_norm([xp.array([3.0, 4.0], "float32")], 1.0, p, all_reduce=lambda partial, op: partial)
    exact.check_norm(xp.numpy(out.norm), exact.norm([np.float32([3, 4])], p), "float32", 8)


@pytest.mark.library("numpy")
def test_what_is_told_must_fit_the_gradients() -> None:
    engine = Engineered(Threads(None), 0, {"v": True})
    with pytest.raises(
        ValueError, match=r"copies does not match the gradients there: it has \['v'\], they have \['w'\]"
    ):
        gradclip.global_norm({"w": np.ones(2)}, all_reduce=engine)
    for wrong in ("data", 3, [max]):
        with pytest.raises(TypeError, match=r"all_reduce must be a callable \(partial, op\) -> joined, got"):
            gradclip.clip_grad_norm_([np.ones(2)], 1.0, all_reduce=wrong)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match=r"^$"):
        Engine()(np.ones(3), "sum")


@pytest.mark.library("numpy")
def test_one_shot_gradients_under_an_engine() -> None:
    """A generator is read once, also where `told` has to be matched to it."""

    class Alone(Engineered):
        def join(self, partial: Any, op: Any, call: Any) -> Any:
            return partial

    engine = Alone(Threads(None), 0, [True, False])
    out = gradclip.clip_grad_norm((np.array([x]) for x in (100.0, 4.0)), 2.0, all_reduce=engine)
    assert float(out.norm) == 4.0, "rank 0 does not count the copy"
    assert [x.tolist() for x in out.grads] == [[50.0], [2.0]]

"""Groups in CuPy: each is clipped as if it were alone, and all of them in a few launches."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import numpy as np
import pytest
from test_cupy import counter, host, on, two_devices  # noqa: F401
from test_cupy_kernels import (
    DTYPES,
    INF,
    NORMS,
    as_oracle,
    backend,
    check_near,
    check_right,
    compiler,
    cupy,
    drawn,
    laid_out,
    marks,
)

import exact
import gradclip

pytestmark = marks


def random_groups(seed: int, n: int, names: list[str], devices: int = 1) -> tuple[list[Any], list[np.ndarray], Any]:
    """Leaves of magnitudes that differ from group to group, and a label for each, None among them; or "leaf"."""
    rng = np.random.default_rng(seed)
    per = "leaf" if seed % 2 else [["a", "b", "c", 7, None][int(rng.integers(5))] for _ in range(n)]
    lows = {label: int(rng.integers(-20, 10)) for label in ("a", "b", "c", 7, None)}
    values = []
    for i in range(n):
        name = str(rng.choice(names))
        low = int(rng.integers(-20, 10)) if per == "leaf" else lows[per[i]]
        low = max(min(low, 8), -10) if name == "float16" else low
        values.append(drawn(rng, (int(rng.integers(0, 12)),), name, low, low + 6))
    return [laid_out(rng, x, int(rng.integers(devices))) for x in values], values, per


def members(per: Any, n: int) -> dict[Any, list[int]]:
    """Which leaves are in each group."""
    found: dict[Any, list[int]] = {}
    for i in range(n):
        label = i if per == "leaf" else per[i]
        if label is not None:
            found.setdefault(label, []).append(i)
    return found


def check_groups(leaves: list[Any], values: list[np.ndarray], per: Any, p: float) -> None:
    """Every group has the norm and the factor that it has by itself, in all verbs."""
    groups = members(per, len(leaves))
    want = {label: exact.norm([values[i] for i in at], p) for label, at in groups.items()}
    bounds: Any = {label: 1.0 if w == 0 else float(w / 3) for label, w in want.items()}
    bounds = [bounds[i] for i in range(len(leaves))] if per == "leaf" else bounds
    out = gradclip.clip_grad_norm(leaves, bounds, p, per=per)
    mine = [x.copy() for x in leaves]
    in_place = gradclip.clip_grad_norm_(mine, bounds, p, per=per)
    same = gradclip.clip_grad_norm(leaves, INF, p, per=per).grads
    for norms in (out.norm, in_place, gradclip.norms(leaves, p, per=per)):
        for label, at in groups.items():
            dtype = exact.norm_dtype([values[i] for i in at])
            assert (norms[label].dtype, norms[label].shape) == (dtype, ())
            empty = not any(values[i].size for i in at)
            exact.check_norm(host(norms[label]), mpmath.mpf(0) if empty else want[label], dtype, 8)
    where = {i: label for label, at in groups.items() for i in at}
    for i, (got, again, kept, leaf, x) in enumerate(zip(out.grads, mine, same, leaves, values, strict=True)):
        w = want[where[i]] if i in where else 0
        assert got.device == leaf.device
        check_right(host(got), x, mpmath.mpf(1) if w == 0 else mpmath.mpf(bounds[where[i]]) / w)
        assert host(again).tobytes() == host(got).tobytes()
        assert host(kept).tobytes() == x.tobytes() == host(leaf).tobytes()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("seed", range(4))
def test_random_groups(seed: int, p: float) -> None:
    names = DTYPES if seed < 2 else ["float32", "float16"]
    leaves, values, per = random_groups(seed, 12, names)
    check_groups(leaves, values, per, p)


@pytest.mark.parametrize("p", [2.0, 3.0, -INF])
@pytest.mark.parametrize("seed", [4, 5])
def test_random_groups_on_two_devices(two_devices: None, seed: int, p: float) -> None:  # noqa: F811
    leaves, values, per = random_groups(seed, 12, DTYPES, devices=2)
    check_groups(leaves, values, per, p)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("p", [2.0, 3.0, INF])
@pytest.mark.parametrize("seed", [6, 7])
def test_groups_that_take_several_launches(seed: int, p: float) -> None:
    leaves, values, per = random_groups(seed, 600, DTYPES)
    check_groups(leaves, values, per, p)


@pytest.mark.parametrize("p", [2.0, 1.0])
@pytest.mark.parametrize("seed", [8, 9])
def test_groups_as_the_generic_backend_has_them(seed: int, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, _, per = random_groups(seed, 40, DTYPES)
    out = gradclip.clip_grad_norm(leaves, 0.5, p, per=per, divide_by=3.0)
    with monkeypatch.context() as patch:
        as_oracle(patch)
        oracle = gradclip.clip_grad_norm(leaves, 0.5, p, per=per, divide_by=3.0)
    for got, want in zip(out.grads, oracle.grads, strict=True):
        check_near(host(got), host(want))
    for label in members(per, len(leaves)):
        check_near(host(out.norm[label]), host(oracle.norm[label]))


@pytest.mark.parametrize("sizes", [[9000], [1, 9000, 1], [5000, 3, 8192, 4096, 1, 1], [4096 * 5, 4096 * 3 + 1, 77]])
def test_groups_of_leaves_of_many_chunks(monkeypatch: pytest.MonkeyPatch, sizes: list[int]) -> None:
    """Few blocks for many chunks: one block has leaves of several groups, and one group is in several blocks."""
    values = [np.full(n, i + 1.0, np.float32) for i, n in enumerate(sizes * 2)]
    leaves = [cupy.array(x) for x in values]
    for blocks in (1, 2, 3, 1024):
        monkeypatch.setattr(compiler.Kernel, "blocks", lambda self, pieces, most=blocks: min(int(pieces), most))
        for per in ("leaf", [i % 2 for i in range(len(values))], [0] * len(values), [int(x > 1) for x in sizes] * 2):
            norms = gradclip.norms(leaves, per=per)
            for label, at in members(per, len(values)).items():
                want = mpmath.sqrt(sum(values[i].size * mpmath.mpf(i + 1) ** 2 for i in at))
                exact.check_norm(host(norms[label]), want, "float32")


@pytest.mark.parametrize("which", ["settle", "measure", "row", "scale", "joined", "all"])
@pytest.mark.parametrize("seed", [10, 11])
def test_groups_where_kernels_do_not_compile(monkeypatch: pytest.MonkeyPatch, seed: int, which: str) -> None:
    monkeypatch.setattr(compiler, "_failures", ["warned already"])
    real = compiler.compiled

    def compiled(source: str, name: str, *options: str) -> Any:
        if which == "all" or name == {"joined": "gradclip_join"}.get(which, f"gradclip_{which}"):
            raise compiler.NotCompiled
        return real(source, name, *options)

    monkeypatch.setattr(compiler, "compiled", compiled)
    leaves, values, per = random_groups(seed, 8, DTYPES)
    for p in (2.0, 3.0):
        check_groups(leaves, values, per, p)


# -- a group alone decides -----------------------------------------------------------------------------------------


SPOILS = {"NaN": math.nan, "inf": INF, "-inf": -INF, "big": 1e30, "small": 1e-30}


@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("per", ["leaf", "labels"])
@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, INF])
def test_what_is_in_one_group_changes_no_other(per: str, spoil: str, nonfinite: Any, p: float) -> None:
    rng = np.random.default_rng(0)
    values = [rng.normal(size=50).astype(name) for name in ("float32", "float32", "float16", "float32", "float32")]
    labels: Any = "leaf" if per == "leaf" else ["a", "b", "c", "b", "a"]
    spoiled = [x.copy() for x in values]
    spoiled[1][:] = SPOILS[spoil] if spoil == "small" else spoiled[1]
    spoiled[1][7] = SPOILS[spoil]

    def clip(values: list[np.ndarray]) -> tuple[list[np.ndarray], Any]:
        out = gradclip.clip_grad_norm([cupy.array(x) for x in values], 0.75, p, per=labels, nonfinite=nonfinite)
        return [x.get() for x in out.grads], out.norm

    (clean, norms), (got, bad_norms) = clip(values), clip(spoiled)
    groups = members(labels, len(values))
    for label, at in groups.items():
        if 1 not in at:
            assert host(norms[label]).tobytes() == host(bad_norms[label]).tobytes()
            for i in at:
                assert got[i].tobytes() == clean[i].tobytes()
            continue
        if not math.isfinite(SPOILS[spoil]):
            for i in at:
                assert np.isnan(got[i]).all() if nonfinite == "propagate" else (got[i] == 0).all()
            assert not math.isfinite(float(bad_norms[label]))
            continue
        want = exact.norm([spoiled[i] for i in at], p)
        exact.check_norm(host(bad_norms[label]), want, "float32", 8)
        for i in at:
            check_right(got[i], spoiled[i], min(mpmath.mpf(1), mpmath.mpf(0.75) / want))


def test_the_error_names_the_leaves_of_the_bad_groups() -> None:
    leaves = {
        name: cupy.array(np.float32(x)) for name, x in {"a": [1, 2], "b": [math.nan, INF, 1], "c": [-INF]}.items()
    }
    before = {name: x.get() for name, x in leaves.items()}
    with pytest.raises(gradclip.NonFiniteError, match=r"grads\['b'\].*1 NaN, 1 inf(.|\n)*grads\['c'\].*0 NaN, 1 inf"):
        gradclip.clip_grad_norm_(leaves, 1.0, per="leaf", nonfinite="error")
    assert all(x.get().tobytes() == before[name].tobytes() for name, x in leaves.items())


@pytest.mark.parametrize("name", ["float16", "float32", "complex64", "complex128"])
def test_culprits_are_counted_without_memory_of_their_size(name: str) -> None:
    x = np.ones(400_000, name)
    x[::1000], x[1::2000] = math.nan, INF
    if name.startswith("complex"):
        x[2], x[3] = complex(0, math.nan), complex(INF, math.nan)
    nans = int(np.isnan(x).sum())
    infs = int((np.isinf(x) & ~np.isnan(x)).sum())
    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc):
        leaf = cupy.array(x)
        pool.set_limit(size=pool.total_bytes() + 100_000)
        with pytest.raises(gradclip.NonFiniteError, match=f"{nans} NaN, {infs} inf"):
            gradclip.clip_grad_norm_([leaf], 1.0, nonfinite="error")


# -- bounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "int32"])
def test_bounds_of_each_group_on_the_host_and_on_the_device(counter: Any, kind: str) -> None:  # noqa: F811
    values = [np.float32([3.0, 4.0]), np.float32([6.0, 8.0]), np.float16([0.0, 5.0]), np.array([5.0, 12.0])]
    norms = [5.0, 10.0, 5.0, 13.0]
    labels = ["a", "b", "a", "c"]
    mixed = [2.0, cupy.array(4, kind), cupy.array(INF), cupy.array(3.0, cupy.float32)]
    for per, bounds, want in (
        ("leaf", mixed, [2.0, 4.0, INF, 3.0]),
        ("leaf", cupy.array(2, kind), [2.0] * 4),
        (labels, {"a": cupy.array(2, kind), "b": 3.0, "c": cupy.array(0.0)}, [2.0, 3.0, 2.0, 0.0]),
        (labels, 2.0, [2.0] * 4),
    ):
        group = [math.hypot(5.0, 5.0) if per != "leaf" and i in (0, 2) else norms[i] for i in range(4)]
        for _ in range(2):
            leaves = [cupy.array(x) for x in values]
            if counter is not None:
                with counter.record() as r:
                    out = gradclip.clip_grad_norm(leaves, bounds, per=per)
                assert (r.synced, r["d2h"], r["h2d"]) == (0, 0, 0), r.events
            out = gradclip.clip_grad_norm(leaves, bounds, per=per)
        for got, x, c, norm in zip(out.grads, values, want, group, strict=True):
            np.testing.assert_allclose(got.get(), x * min(1.0, c / norm), rtol=2e-3 if x.dtype == np.float16 else 1e-6)


def test_bounds_on_another_device(two_devices: None) -> None:  # noqa: F811
    leaves = [on(0, np.float32([3.0, 4.0])), on(1, np.float32([6.0, 8.0]))]
    out = gradclip.clip_grad_norm(leaves, [on(1, np.float32(1.0)), on(0, np.array(2.0))], per="leaf")
    np.testing.assert_allclose(host(out.grads[0]), [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(host(out.grads[1]), [1.2, 1.6], rtol=1e-6)
    assert [x.device.id for x in (*out.grads, *out.norm)] == [0, 1, 0, 0]


def test_norms_that_are_given_by_group() -> None:
    leaves = [cupy.array(np.float32([3.0, 4.0])), cupy.array(np.float64([6.0, 8.0]))]
    out = gradclip.clip_grad_norm(leaves, 1.0, per="leaf")
    again = gradclip.clip_grad_norm(leaves, 1.0, per="leaf", norm=out.norm)
    for a, b in zip([*out.grads, *out.norm], [*again.grads, *again.norm], strict=True):
        assert (a.dtype, host(a).tolist()) == (b.dtype, pytest.approx(host(b).tolist(), rel=1e-7))
    unclipped = gradclip.clip_grad_norm(leaves, out.norm, per="leaf").grads
    assert all(a.get().tobytes() == b.get().tobytes() for a, b in zip(unclipped, leaves, strict=True))


def test_more_groups_than_one_launch_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "TURNS", 64)
    names = ["float32", "float64", "float16"]
    leaves = [cupy.full(3, i + 1.0, names[i % 3 if i % 7 else 0]) for i in range(150)]
    out = gradclip.clip_grad_norm(leaves, 1.5, per="leaf")
    for i, (norm, got) in enumerate(zip(out.norm, out.grads, strict=True)):
        want = math.sqrt(3) * (i + 1)
        exact.check_norm(host(norm), mpmath.sqrt(3) * (i + 1), exact.norm_dtype([host(leaves[i])]))
        np.testing.assert_allclose(got.get().astype(float), (i + 1.0) * min(1.0, 1.5 / want), rtol=1e-3)


# -- launches --------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("bounds", ["number", "tree", "on the device"])
@pytest.mark.parametrize("per", ["leaf", "labels"])
@pytest.mark.parametrize("in_place", [False, True])
def test_launches_for_a_group_of_each_of_a_thousand_leaves(
    counter: Any,  # noqa: F811
    in_place: bool,
    per: str,
    bounds: str,
) -> None:
    if counter is None:
        pytest.skip("a GPU does not count launches")
    names = ["float32", "float16", "complex64", "float64"]
    leaves = [cupy.ones(64, names[i % 4]) for i in range(1000)]
    labels: Any = "leaf" if per == "leaf" else [i % 500 for i in range(1000)]
    groups = members(labels, 1000)
    one = cupy.array(1.0, cupy.float32)
    each = {label: 1.0 + label if bounds == "tree" else one.copy() for label in groups}
    bound: Any = 1.0 if bounds == "number" else each
    bound = list(bound.values()) if per == "leaf" and isinstance(bound, dict) else bound
    verb = gradclip.clip_grad_norm_ if in_place else gradclip.clip_grad_norm
    for _ in range(2):
        verb(leaves, bound, per=labels)
    with counter.record() as r:
        verb(leaves, bound, per=labels)
    row = 0 if bounds == "number" else math.ceil(len(groups) / 338)
    assert r["kernel"] == 4 + 1 + 5 + row <= 16, r
    assert r.synced == 0, r.events
    for kind in ("d2h", "h2d", "d2d", "memset", "compile", "module_load", "malloc"):
        assert r[kind] == 0, (kind, r)


def test_launches_for_two_passes(counter: Any) -> None:  # noqa: F811
    if counter is None:
        pytest.skip("a GPU does not count launches")
    leaves = [cupy.ones(3, cupy.float32) for _ in range(1000)]
    gradclip.norms(leaves, 3.0)
    with counter.record() as r:
        gradclip.norms(leaves, 3.0)
    assert r["kernel"] == 4 + 1 + 4 + 1, r
    assert r.synced == r["d2h"] == 0, r.events


# -- other shards ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [2.0, 3.0])
@pytest.mark.parametrize("per", [None, "leaf", ["a", "b", "a"]])
@pytest.mark.parametrize("in_place", [False, True])
def test_nothing_is_compiled_after_a_collective(
    monkeypatch: pytest.MonkeyPatch, in_place: bool, per: Any, p: float
) -> None:
    """A rank that fails to compile, or runs out of memory while it does, would leave the others waiting."""
    asked: list[Any] = []
    real = compiler.compiled

    def logged(source: str, name: str, *options: str) -> Any:
        asked.append((source, name, options))
        return real(source, name, *options)

    def all_reduce(partial: Any, op: str) -> Any:
        asked.append(op)
        return partial

    monkeypatch.setattr(compiler, "compiled", logged)
    leaves = [cupy.array(np.float32([3.0, 4.0])), cupy.array(np.float16([1.0])), cupy.array(np.complex128([2j]))]
    verb = gradclip.clip_grad_norm_ if in_place else gradclip.clip_grad_norm
    verb(leaves, 1.0, p, per=per, all_reduce=all_reduce)
    ops = [i for i, x in enumerate(asked) if isinstance(x, str)]
    assert len(ops) == (1 if p == 2 else 2)
    assert any(name == "gradclip_scale" for _, name, _ in asked[: ops[0]])
    assert {x for x in asked[ops[0] :] if not isinstance(x, str)} <= set(asked[: ops[0]])


@pytest.mark.parametrize("per", ["leaf", ["a", "b", "a"]])
def test_groups_join_with_those_of_other_shards(per: Any) -> None:
    values = [np.float32([3.0, 4.0]), np.float32([1.0]), np.array([2.0, 5.0])]
    shapes = []

    def twice(partial: Any, op: str) -> Any:
        shapes.append(partial.shape)
        return partial * 2 if op == "sum" else partial

    for p in (2.0, 3.0, INF):
        shapes.clear()
        leaves = [cupy.array(x) for x in values]
        out = gradclip.clip_grad_norm(leaves, 0.5, p, per=per, all_reduce=twice)
        groups = members(per, 3)
        for label, at in groups.items():
            want = exact.norm([values[i] for i in at], p) * (1 if p == INF else mpmath.mpf(2) ** (1 / mpmath.mpf(p)))
            exact.check_norm(host(out.norm[label]), want, exact.norm_dtype([values[i] for i in at]), 8)
            for i in at:
                check_right(host(out.grads[i]), values[i], mpmath.mpf(0.5) / want)
        assert all(shape[1] == len(groups) for shape in shapes)


def test_shards_decide_alike_whatever_their_own_dtypes_are() -> None:
    """1 + 2**-27 is 1.0 in float32: a shard where that is the norm must still clip if another reports it in float64."""
    leaf = cupy.array(np.float32([1.0, 2.0**-13]))
    factors = []

    def other(flag: float) -> Any:
        def all_reduce(partial: Any, op: str) -> Any:
            partial[-1] += flag
            return partial

        return all_reduce

    real = backend.CupyBackend.scale

    def scale(self: Any, leaves: Any, given: Any, *rest: Any, **more: Any) -> Any:
        factors.append(float(given.factor[0]))
        return real(self, leaves, given, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend.CupyBackend, "scale", scale)
        for flag in (0.0, 1.0):
            gradclip.clip_grad_norm([leaf], 1.0, all_reduce=other(flag))
    assert factors[0] == 1.0
    assert factors[1] == pytest.approx(1 - 2.0**-27, abs=1e-12)
    assert factors[1] < 1.0


# -- graphs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["leaf", "labels"])
@pytest.mark.parametrize("kept", ["grads", "one norm", "in place"])
def test_a_graph_of_groups(kept: str, per: str) -> None:
    """Bounds of every group go in by value and by address; what the graph uses stays its own by any one result."""
    stream = cupy.cuda.Stream(non_blocking=True)
    rng = np.random.default_rng(0)
    pool = cupy.cuda.MemoryPool()
    labels: Any = "leaf" if per == "leaf" else ["a", "b", "a"]
    with cupy.cuda.using_allocator(pool.malloc), stream:
        leaves = [cupy.ones(n, cupy.float32) for n in (5, 300, 4)]
        bound = cupy.array(1.0, cupy.float32)
        bounds: Any = [0.5, bound, bound] if per == "leaf" else {"a": 0.5, "b": bound}

        def clip() -> Any:
            if kept == "in place":
                return leaves, gradclip.clip_grad_norm_(leaves, bounds, per=labels)
            return gradclip.clip_grad_norm(leaves, bounds, per=labels)

        for _ in range(2):
            clip()
        stream.synchronize()
        stream.begin_capture()
        out, norms = clip()
        graph = stream.end_capture()
        norm = norms[0 if per == "leaf" else "a"] if kept == "one norm" else None
        out = [] if kept == "one norm" else out
        del norms
        others = [cupy.full(n, 7.0, cupy.float64) for n in (1, 2, 3, 4, 64, 65, 128, 512) for _ in range(20)]
        for factor in (1.0, 100.0):
            values = [(rng.normal(size=x.size) * factor).astype(np.float32) for x in leaves]
            for leaf, x in zip(leaves, values, strict=True):
                leaf.set(x, stream=stream)
            bound.set(np.array(0.25 * factor, np.float32), stream=stream)
            graph.launch(stream)
            for label, at in members(labels, 3).items():
                want = exact.norm([values[i] for i in at])
                c = 0.5 if label in (0, "a") else 0.25 * factor
                if norm is not None and label in (0, "a"):
                    exact.check_norm(norm.get(stream=stream), want, "float32")
                for i in at if out else []:
                    check_right(out[i].get(stream=stream), values[i], min(mpmath.mpf(1), mpmath.mpf(c) / want))
        assert all((x.get(stream=stream) == 7.0).all() for x in others)
        stream.synchronize()


@pytest.mark.parametrize("kind", ["float32", "float64", "int32"])
@pytest.mark.parametrize("per", [None, "leaf"])
def test_a_graph_holds_the_bounds_that_it_reads(per: Any, kind: str) -> None:
    """The caller lets them go after the capture, and their memory may not be given to others."""
    stream, pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc), stream:
        leaves = [cupy.full(2, 8.0, cupy.float32) for _ in range(2)]

        def bounds() -> Any:
            made = [cupy.array(2.0, kind), cupy.array(3.0, kind)]
            return made[0] if per is None else made

        gradclip.clip_grad_norm(leaves, bounds(), per=per)
        made = bounds()
        stream.synchronize()
        stream.begin_capture()
        out = gradclip.clip_grad_norm(leaves, made, per=per)
        graph = stream.end_capture()
        del made
        others = [cupy.full(n, 7, cupy.float64) for n in (1, 2, 3, 4, 64, 65) for _ in range(30)]
        graph.launch(stream)
        norm = 16.0 if per is None else math.sqrt(128)
        for got, c in zip(out.grads, (2.0, 2.0 if per is None else 3.0), strict=True):
            np.testing.assert_allclose(got.get(stream=stream), 8 * c / norm, rtol=1e-6)
        assert all((x.get(stream=stream) == 7).all() for x in others)
        stream.synchronize()

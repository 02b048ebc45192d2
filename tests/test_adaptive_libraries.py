"""The rules on every library, and what JAX does to them: jit, scan, vmap, donation, derivatives, checkpoints."""

from __future__ import annotations

import copy
import functools
import importlib.util
import math
import pickle
from dataclasses import dataclass
from typing import Any, NamedTuple

import mpmath
import numpy as np
import pytest
from hypothesis import given
from test_adaptive import RULES, WAYS, check_rows, clipped_rows, fields, rows_of, sequences, shared

import gradclip
from backends import MISSING, Backend
from gradclip.adaptive import AutoClip, NormGrowth, Number, QuantileBound, Rule, ZClip, where
from gradclip.distributed import psum
from meshes import mesh_of, strict_jax  # noqa: F401

INF, NAN = math.inf, math.nan
needs_jax = [
    pytest.mark.library("jax"),
    pytest.mark.skipif("jax" in MISSING, reason=f"jax: {MISSING.get('jax')}"),
    pytest.mark.usefixtures("strict_jax"),
]
needs_torch = [
    pytest.mark.library("torch"),
    pytest.mark.skipif("torch" in MISSING, reason=f"torch: {MISSING.get('torch')}"),
]


def arrays(state: Any) -> list[Any]:
    """The arrays of a state, of any library."""
    out = [x for field in state for x in (field if isinstance(field, tuple) else (field,))]
    return [x for x in out if x is not None]


# -- every library -----------------------------------------------------------------------------------------------------


def stepped(xp: Backend, rule: Rule, per: Any) -> Any:
    """`rule.clip`, under `jax.jit` where the backend is that."""
    clip = functools.partial(rule.clip, per=per)
    return clip if xp.eager else xp._jitted(("rule", rule, str(per)), clip)  # type: ignore[attr-defined]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_same_as_numpy(xp: Backend, name: str, dtype: str) -> None:
    """Values, dtypes, shapes, library and device of what comes out; and a state keeps its form from step to step."""
    if not xp.has(dtype):
        pytest.skip(f"{xp.name} has no {dtype}")
    rule, way = RULES[name], WAYS["leaf"]
    rows = rows_of(np.float32, -3, 3, "spike", 5, steps=5).astype(np.float16).astype(np.float64)
    if dtype == "bfloat16":
        rows = rows.astype(np.float32).view(np.uint32).astype(np.uint32) & 0xFFFF0000
        rows = rows.view(np.float32).astype(np.float64)
    want, bounds, last = clipped_rows(rule, way, rows)

    def grads_of(row: Any) -> Any:
        return way.grads(row, lambda x: xp.array(np.full(4, x), dtype))

    clip = stepped(xp, rule, "leaf")
    first = state = rule.init(grads_of(rows[0]), "leaf")
    norm_dtype = "float64" if dtype == "float64" else "float32"
    rtol = {"float64": 1e-14, "float32": 1e-6, "bfloat16": 2**-7, "float16": 2**-10}[dtype]
    for row, left, bound in zip(rows, want, bounds, strict=True):
        grads = grads_of(row)
        out = clip(grads, state)
        state = out.state
        for i, leaf in enumerate(out.grads.values()) if xp.eager else ():
            assert (xp.dtype_of(leaf), xp.owns(leaf), leaf.shape) == (dtype, True, (4,))
            assert xp.device_of(leaf) == xp.device_of(list(grads.values())[i])
        got = [xp.numpy(out.grads[key]).astype(np.float64)[0] for key in ("c", "a", "b")]
        np.testing.assert_allclose(got, left, rtol=rtol)
        shown = [out.max_norm[key] for key in ("c", "a", "b")] if isinstance(bound, dict) else [out.max_norm]
        for x, y in zip(shown, bound.values() if isinstance(bound, dict) else [bound], strict=True):
            assert (xp.dtype_of(x), xp.owns(x), x.shape) == (norm_dtype, True, ())
            np.testing.assert_allclose(xp.numpy(x), y, rtol=1e-14 if dtype == "float64" else 1e-6)
    for x, y in zip(arrays(first), arrays(state), strict=True):
        assert (x.dtype, x.shape, xp.owns(x), xp.owns(y)) == (y.dtype, y.shape, True, True)
        assert xp.device_of(y) == xp.device_of(grads["c"])
    assert xp.numpy(state.count).tolist() == last.count.tolist()
    update_norms = gradclip.norms(grads_of(rows[0]))
    max_norm, after = rule.update(state, update_norms)
    assert all(xp.owns(x) for x in arrays(after))
    assert all(xp.dtype_of(x) == norm_dtype for x in (max_norm.values() if isinstance(max_norm, dict) else [max_norm]))


class LargestState(NamedTuple):
    count: Any
    largest: Any


@dataclass(frozen=True)
class ShareOfTheLargest(Rule):
    """A rule of one's own: at most `share` of the largest norm so far, from the second on."""

    share: float = 0.5

    def start(self, count: Any, zero: Number) -> LargestState:
        return LargestState(count, zero)

    def step(self, state: LargestState, norm: Number) -> tuple[Number, LargestState]:
        bound = where(state.count > 0, self.share * state.largest, INF)
        return bound, state._replace(largest=where(norm > state.largest, norm, state.largest))


def test_a_rule_of_ones_own(xp: Backend) -> None:
    rule = ShareOfTheLargest()
    state = rule.init([xp.array(np.zeros(2), "float32")], "leaf")
    clip = stepped(xp, rule, "leaf")
    for scale, left in ((1.0, 1.0), (2.0, 0.5), (4.0, 1.0), (0.25, 0.25)):
        out = clip([xp.array(scale * np.float32([3, 4]), "float32")], state)
        np.testing.assert_allclose(xp.numpy(out.grads[0]), left * np.float32([3, 4]), rtol=1e-6)
        state = out.state


def test_a_divisor_and_what_is_not_finite(xp: Backend) -> None:
    rule = NormGrowth(2.0)
    state = rule.init([xp.array(np.zeros(2), "float32")])

    def clip(x: Any, **kw: Any) -> Any:
        return rule.clip([xp.array(np.asarray(x), "float32")], state, **kw)

    state = clip([30.0, 40.0], divide_by=10.0).state
    for divisor in (0.5, xp.array(np.float32(0.5))):
        out = clip([3.0, 4.0], divide_by=divisor)
        assert (float(out.norm), float(out.max_norm)) == (10.0, 10.0)
        np.testing.assert_allclose(xp.numpy(out.grads[0]), [6.0, 8.0], rtol=1e-6)
    beyond = clip([3e37, 4e37], divide_by=1e40).state  # beyond float32, in which jax.jit hands on a float
    np.testing.assert_allclose(float(rule.clip([xp.array(np.ones(2), "float32")], beyond).max_norm), 0.01, rtol=1e-6)
    bad = clip([NAN, 1.0], nonfinite="zero")
    assert xp.numpy(bad.grads[0]).tolist() == [0.0, 0.0]
    assert [xp.numpy(x).tobytes() for x in arrays(bad.state)] == [xp.numpy(x).tobytes() for x in arrays(state)]
    if xp.eager:
        with pytest.raises(gradclip.NonFiniteError, match=r"grads\[0\].*1 NaN"):
            clip([NAN, 1.0], nonfinite="error")


def test_in_place(xp: Backend) -> None:
    rule = ZClip(warmup=2, threshold=1.0)
    leaf = xp.array(np.float32([3.0, 4.0]), "float32")
    state = rule.init([leaf])
    if not xp.in_place and xp.name != "array-api-strict":
        with pytest.raises(gradclip.LeafError, match=r"grads\[0\]"):
            rule.clip_([leaf], state)
        return
    for scale in (1.0, 2.0, 100.0):
        leaf = xp.array(scale * np.float32([3.0, 4.0]), "float32")
        want, norm, bound, after = rule.clip([leaf], state)
        norm_, bound_, state = rule.clip_([leaf], state)
        assert xp.numpy(leaf).tobytes() == xp.numpy(want[0]).tobytes()
        assert (float(norm), float(bound)) == (float(norm_), float(bound_))
        assert [xp.numpy(x).tobytes() for x in arrays(after)] == [xp.numpy(x).tobytes() for x in arrays(state)]
    np.testing.assert_allclose(xp.numpy(leaf), (7.5 + 6.25 / 492.5) / 5 * np.float32([3.0, 4.0]), rtol=1e-6)


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("dask") is None, reason="needs dask")
@pytest.mark.parametrize("name", RULES)
def test_dask(name: str) -> None:
    """A lazy library computes where no one keeps warnings away: there are none, after a step of zeros too."""
    import dask
    import dask.array as da

    rule, way = RULES[name], WAYS["leaf"]
    rows = rows_of(np.float64, -3, 3, "any, and zeros", 3, steps=3)
    rows[0, 0] = 0
    want, _, _ = clipped_rows(rule, way, rows)

    def lazy(x: Any) -> Any:
        return da.from_array(np.full(4, x))

    state = rule.init(way.grads(rows[0], lazy), "leaf")
    for row, left in zip(rows, want, strict=True):
        clipped, _, _, state = rule.clip(way.grads(row, lazy), state, per="leaf")
        assert all(type(x) is da.Array for x in arrays(state))
        computed, state = dask.compute(clipped, state, scheduler="synchronous")
        state = state._make(
            type(x)(*[None if y is None else da.from_array(y) for y in x]) if isinstance(x, tuple) else da.from_array(x)
            for x in state
        )
        np.testing.assert_allclose(way.numbers(computed), left, rtol=1e-14)


def test_libraries_that_do_not_match(xp: Backend) -> None:
    rule = NormGrowth()
    mine = [xp.array(np.ones(2), "float32")]
    if xp.module == "numpy":
        pytest.skip("NumPy is the other library here")
    theirs = rule.init([np.ones(2, np.float32)])
    name = xp.module if xp.module != "array_api_strict" else "array_api_strict"
    with pytest.raises(
        TypeError, match=rf"the gradients are {name} arrays, and the state is made of numpy ones: make it"
    ):
        rule.clip(mine, theirs)
    with pytest.raises(
        TypeError, match=rf"norm is a {name} array, and the state is made of numpy arrays: pass the norm"
    ):
        rule.update(theirs, gradclip.global_norm(mine))
    with pytest.raises(
        TypeError, match=rf"norm is a numpy array, and the state is made of {name} arrays: pass the norm"
    ):
        rule.update(rule.init(mine), np.float32(3))


# -- JAX ---------------------------------------------------------------------------------------------------------------

if "jax" not in MISSING:
    import jax
    import jax.numpy as jnp


class AsJax:
    """Marks of a test of JAX alone."""

    pytestmark = needs_jax


def four(x: Any) -> Any:
    return jnp.stack([x] * 4)


@functools.cache
def scanned(rule: Rule, per: str) -> Any:
    """A compiled run over rows of numbers: what is left of them, the bounds, and the last state."""
    way = WAYS[per]

    def run(rows: Any) -> Any:
        def step(state: Any, row: Any) -> Any:
            out = rule.clip(way.grads(row, four), state, per=way.per)
            return out.state, (out.grads, out.max_norm)

        return jax.lax.scan(step, rule.init(way.grads(rows[0], four), way.per), rows)

    return jax.jit(run)


class TestJax(AsJax):
    @pytest.mark.sampled(7)
    @pytest.mark.parametrize("per", ["leaf", "global", "example", "labels"])
    @pytest.mark.parametrize("name", RULES)
    @shared
    @given(rows=sequences(np.float32, -125, 128))
    def test_float32_over_its_whole_range(self, name: str, per: str, rows: np.ndarray) -> None:
        """Norms up to 1e39 and below 1e-37 in float32 arithmetic, within units in the last place of the papers."""
        if name == "quantile" and per == "global":
            rows = rows * np.float32(0.5)
        _, (grads, _) = scanned(RULES[name], per)(rows)
        got = jax.tree.map(np.asarray, grads)
        numbers = WAYS[per].numbers(got) if isinstance(got, dict) else got[0][..., 0]
        check_rows(RULES[name], WAYS[per], rows, numbers, lambda i: 4 + i, mpmath.mpf(2) ** -126)

    @pytest.mark.sampled(6)
    @pytest.mark.parametrize("name", RULES)
    def test_scan_is_a_loop(self, name: str) -> None:
        """Fifty steps, bit for bit, states too."""
        rule, way = RULES[name], WAYS["leaf"]
        rows = rows_of(np.float32, -3, 3, "spike", 2, steps=50)
        last, (grads, bounds) = scanned(rule, "leaf")(rows)
        state = rule.init(way.grads(jnp.asarray(rows[0]), four), "leaf")
        clip = jax.jit(functools.partial(rule.clip, per="leaf"))
        for i, row in enumerate(rows):
            out = clip(way.grads(jnp.asarray(row), four), state)
            state = out.state
            for x, y in zip(*map(jax.tree.leaves, ((out.grads, out.max_norm), (grads, bounds))), strict=True):
                assert np.asarray(x).tobytes() == np.asarray(y[i]).tobytes(), i
        assert [x.tobytes() for x in fields(state)] == [x.tobytes() for x in fields(last)]

    @pytest.mark.sampled(6)
    @pytest.mark.parametrize("name", sorted(RULES, reverse=True))
    def test_vmap_and_donation(self, name: str) -> None:
        """Several runs side by side, each with a state of its own, which is donated."""
        rule, way = RULES[name], WAYS["leaf"]
        rows = np.stack([rows_of(np.float32, -3, 3, "spike", seed, steps=6) for seed in (1, 2)], axis=1)
        grads = [jax.vmap(functools.partial(way.grads, four=four))(jnp.asarray(row)) for row in rows]
        state = jax.vmap(functools.partial(rule.init, per="leaf"))(grads[0])
        step = jax.jit(jax.vmap(functools.partial(rule.clip, per="leaf")), donate_argnums=1)
        for g in grads:
            before = arrays(state)
            out = step(g, state)
            state = out.state
            assert all(x.is_deleted() for x in before)
        for k in range(2):
            single, _ = scanned(rule, "leaf")(rows[:, k])
            for x, y in zip(fields(state), fields(single), strict=True):
                np.testing.assert_allclose(x[k], y, rtol=1e-6)
        first = rule.init(jax.tree.map(lambda x: x[0], grads[0]), "leaf")  # not compiled: no array comes twice
        assert len({x.unsafe_buffer_pointer() for x in arrays(first)}) == len(arrays(first))

    def test_the_bound_is_a_constant_to_derivatives(self) -> None:
        rule = NormGrowth(1.5)
        grads = {"a": jnp.float32([3.0, -4.0]), "b": jnp.float32([1.0])}
        state = jax.jit(rule.clip)(jax.tree.map(lambda x: x / 10, grads), rule.init(grads)).state

        def by_rule(g: Any) -> Any:
            return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(rule.clip(g, state).grads))

        def by_bound(g: Any) -> Any:
            bound = jnp.float32(1.5 * math.sqrt(0.26))
            return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(gradclip.clip_grad_norm(g, bound).grads))

        got, want = jax.jit(lambda g: (jax.grad(by_rule)(g), jax.grad(by_bound)(g)))(grads)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)
            assert abs(np.asarray(y)).max() > 1e-3

        def learned(g: Any) -> Any:
            return rule.clip(g, state).state.last.mantissa + rule.clip(g, state).max_norm

        assert not any(np.asarray(x).any() for x in jax.tree.leaves(jax.jit(jax.grad(learned))(grads)))

    def test_keys_that_jit_sorts(self) -> None:
        """A state that was made of unsorted keys is that of the same leaves under `jax.jit`, labels too."""
        rule = NormGrowth(2.0)
        grads = {"w1": jnp.float32([1.0]), "w01": jnp.float32([10.0]), "b": {"z": jnp.float32([3.0])}}
        for per in ("leaf", {"w1": "second", "w01": "first", "b": {"z": "first"}}):
            state = rule.clip(grads, rule.init(grads, per), per=per).state
            eager = rule.clip(grads, state, per=per)
            jitted = jax.jit(functools.partial(rule.clip, per=per))(grads, state)
            for x, y in zip(*map(jax.tree.leaves, (tuple(eager), tuple(jitted))), strict=True):
                assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
            if per == "leaf":
                assert jax.tree.map(float, eager.max_norm) == {"w1": 2.0, "w01": 20.0, "b": {"z": 6.0}}

    @pytest.mark.parametrize("rule", [AutoClip(0.5, 3), ZClip(warmup=2, threshold=1.0)], ids=["autoclip", "zclip"])
    def test_all_devices_have_the_same_bits(self, rule: Rule) -> None:
        """The norm of the whole by `psum`: each device chooses the bound itself, and comes to the same."""
        mesh, spec = mesh_of(("data", 4)), jax.sharding.PartitionSpec
        row, everywhere = spec("data"), spec()

        def step(g: Any, s: Any) -> Any:
            out = rule.clip({"w": g}, s, all_reduce=psum("data"))
            own = out.max_norm + 0 * g[:1]  # each device's, as a row
            return out.grads["w"], out.norm, own, out.state

        sharded = jax.jit(
            jax.shard_map(step, mesh=mesh, in_specs=(row, everywhere), out_specs=(row, everywhere, row, everywhere))
        )
        rng = np.random.default_rng(0)
        placed = jax.device_put(jnp.ones(8), jax.sharding.NamedSharding(mesh, row))
        state = rule.init({"w": placed})
        one = rule.init({"w": np.ones(8, np.float32)})
        assert state.count.sharding.is_fully_replicated
        for scale in (1.0, 1.1, 30.0, 3e37, 1.0):
            g = np.float32(scale * rng.uniform(1, 2, 8))
            clipped, norm, bounds, state = sharded(jnp.asarray(g), state)
            want = rule.clip({"w": g}, one)
            one = want.state
            assert len({np.asarray(x).tobytes() for x in bounds}) == 1
            held = [{np.asarray(s.data).tobytes() for s in x.addressable_shards} for x in arrays(state)]
            assert all(len(bits) == 1 for bits in held)
            np.testing.assert_allclose(norm, want.norm, rtol=1e-6)
            np.testing.assert_allclose(clipped, want.grads["w"], rtol=1e-6)

    def test_shape_checks_errors_and_debuggers(self) -> None:
        from jax.experimental import checkify

        rule = AutoClip(0.5, 3)
        grads = {"w": jnp.ones(3)}
        shapes = jax.eval_shape(functools.partial(rule.init, per="leaf"), grads)
        assert [(x.dtype, x.shape) for x in jax.tree.leaves(shapes)] == [
            (x.dtype, x.shape) for x in arrays(rule.init(grads, "leaf"))
        ]
        clip = jax.jit(checkify.checkify(functools.partial(rule.clip, nonfinite="error")))
        error, out = clip(grads, rule.init(grads))
        assert error.get() is None
        error, _ = clip({"w": jnp.float32([1.0, NAN, 1.0])}, out.state)
        assert "grads['w']" in error.get()

    @pytest.mark.full
    @pytest.mark.parametrize("name", RULES)
    def test_debug_nans_finds_none(self, name: str) -> None:
        rule, grads = RULES[name], {"w": jnp.ones(3)}
        with jax.debug_nans(True):
            for clip in (rule.clip, jax.jit(rule.clip)):
                state = rule.init(grads)
                for scale in (0.0, 1.0, 2.0):
                    state = clip({"w": scale * grads["w"]}, state).state
                assert int(state.count) == 3

    @pytest.mark.full
    def test_numbers_of_64_bits_beside_others(self) -> None:
        """Where they are enabled: a state is as wide as the leaves in its groups; those left out do not count."""
        with jax.enable_x64(True):
            rule = AutoClip(0.5, 4)
            grads = {"a": jnp.full(4, 1e300, jnp.float64), "b": jnp.full(4, 1e38, jnp.float32)}
            for per, wide in (({"a": None, "b": "b"}, False), ({"a": "a", "b": "b"}, True)):
                state = rule.init(grads, per)
                clip = jax.jit(functools.partial(rule.clip, per=per))
                for scale in (1.0, 2.0, 3.0):
                    clipped, _, bound, state = clip({k: v * scale for k, v in grads.items()}, state)
                assert state.recent.mantissa.dtype == (jnp.float64 if wide else jnp.float32)
                np.testing.assert_allclose(clipped["b"], np.float32(2e38), rtol=1e-6)
                assert bound["b"].dtype == jnp.float32

    def test_checkpoints(self, tmp_path: Any) -> None:
        """By pickle, and by orbax where it is installed: the next step has the same bits."""
        rule = AutoClip(0.5, 4)
        grads = {"a": jnp.float32([3.0, 4.0]), "b": jnp.float32([3e38, 3e38])}
        state = rule.clip(grads, rule.init(grads, "leaf"), per="leaf").state
        found = [pickle.loads(pickle.dumps(state)), copy.deepcopy(state)]
        if importlib.util.find_spec("orbax") is not None:
            import orbax.checkpoint as ocp

            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(tmp_path / "state", state)
                checkpointer.wait_until_finished()
                like = jax.eval_shape(functools.partial(rule.init, per="leaf"), grads)
                found.append(checkpointer.restore(tmp_path / "state", like))
        want = rule.clip(grads, state, per="leaf")
        for again in found:
            assert type(again) is type(state)
            got = rule.clip(grads, again, per="leaf")
            for x, y in zip(*map(jax.tree.leaves, (tuple(want), tuple(got))), strict=True):
                assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


# -- torch -------------------------------------------------------------------------------------------------------------


class TestTorch:
    pytestmark = needs_torch

    def test_gradients_of_a_model_in_place(self) -> None:
        import torch

        model = torch.nn.Linear(3, 2)
        rule = NormGrowth(1.5)
        state, lasts = None, []
        for scale in (1.0, 10.0, 10.0):
            model.zero_grad()
            (scale * model(torch.ones(4, 3)).sum()).backward()
            grads = [p.grad for p in model.parameters()]
            state = rule.init(grads) if state is None else state
            norm, bound, state = rule.clip_(grads, state)
            assert (type(norm), norm.dtype, bound.dtype) == (torch.Tensor, torch.float32, torch.float32)
            assert not any(x.requires_grad for x in arrays(state))
            lasts.append(float(gradclip.global_norm(grads)))
        np.testing.assert_allclose(lasts, [lasts[0], 1.5 * lasts[0], 2.25 * lasts[0]], rtol=1e-6)

    def test_the_bound_is_a_constant_to_derivatives(self) -> None:
        import torch

        rule = NormGrowth(1.5)
        x = torch.tensor([3.0, -4.0], requires_grad=True)
        state = rule.clip([x.detach() / 10], rule.init([x])).state
        clipped, norm, bound, after = rule.clip([x], state)
        assert not bound.requires_grad
        assert not any(y.requires_grad for y in arrays(after))
        clipped[0].sin().sum().backward()
        y = x.detach().clone().requires_grad_(True)
        gradclip.clip_grad_norm([y], bound).grads[0].sin().sum().backward()
        assert x.grad.tolist() == y.grad.tolist()
        assert max(map(abs, x.grad.tolist())) > 0.01
        assert norm.requires_grad

    def test_private_steps(self) -> None:
        """The bound of a step is known before its norms; noise comes from torch."""
        import torch

        rule = QuantileBound(quantile=0.5, rate=0.2, max_norm=1.0)
        grads = [torch.tensor([[0.5], [2.0], [3.0], [4.0]])]
        state = rule.init(grads, per="example")
        bound, state = rule.update(state, gradclip.norms(grads, per="example"), noise=torch.tensor(1.0))
        assert float(gradclip.clipped_sum(grads, bound).sum[0]) == pytest.approx(3.5, rel=1e-5)
        assert float(rule.update(state, grads[0][:, 0])[0]) == 1.0  # (1 + 1) of 4: no move

"""`gradclip.optax`: optax's names, in optax's wrappers and JAX's transformations, and what their state holds."""

from __future__ import annotations

import importlib
import inspect
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest

import exact
import gradclip
from gradclip import LeafError, NonFiniteError
from gradclip.adaptive import AutoClip, Number, Rule, ZClip
from gradclip.distributed import psum
from meshes import mesh_of, strict_jax  # noqa: F401

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

ours = importlib.import_module("gradclip.optax")
tree_get = optax.tree_utils.tree_get

pytestmark = [pytest.mark.library("jax"), pytest.mark.usefixtures("strict_jax")]

INF, NAN = math.inf, math.nan

#: Gradients of norm 13: 5 and 12 by leaf.
GRADS = {"b": [12.0], "w": [3.0, 4.0]}


def arrays(tree: Any, dtype: str = "float32") -> Any:
    """Lists of numbers as arrays."""
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree, is_leaf=lambda x: isinstance(x, list))


@pytest.fixture
def grads() -> Any:
    return arrays(GRADS)


def plain(tree: Any) -> Any:
    """Arrays as numbers and lists."""
    return jax.tree.map(lambda x: np.asarray(x).tolist(), tree)


def forms(tree: Any) -> Any:
    """What a loop of JAX must find unchanged."""
    return jax.tree.structure(tree), [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]


def assert_close(got: Any, expected: Any, rtol: float = 4e-7) -> None:
    """The same tree of numbers, each within 3 units in the last place of float32, unless said otherwise."""
    assert jax.tree.structure(plain(got)) == jax.tree.structure(plain(expected))
    np.testing.assert_allclose(jax.tree.leaves(plain(got)), jax.tree.leaves(plain(expected)), rtol=rtol)


@pytest.fixture
def usual_promotion() -> Any:
    """For what optax does in its own transformations."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def scaled(factor: float, tree: Any = GRADS) -> Any:
    return {name: [x * factor for x in leaf] for name, leaf in tree.items()}


# -- names and signatures ----------------------------------------------------------------------------------------------

NAMES = sorted(set(ours.__all__) - {"ClipState"})


@pytest.mark.parametrize("name", NAMES)
def test_positions_names_and_defaults_are_optaxs(name):
    theirs = list(inspect.signature(getattr(optax, name)).parameters.values())
    mine = list(inspect.signature(getattr(ours, name)).parameters.values())
    assert [(p.name, p.default, p.kind) for p in mine[: len(theirs)]] == [(p.name, p.default, p.kind) for p in theirs]
    more = {p.name for p in mine[len(theirs) :] if p.kind is not p.KEYWORD_ONLY}
    assert more == ({"norm_type"} if name == "clip_by_global_norm" else {"axis"} - {p.name for p in theirs} & more)


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_are_whole(name):
    doc = inspect.getdoc(getattr(ours, name))
    for section in ("Parameters", "Returns", "Raises", "Examples"):
        assert f"\n{section}\n{'-' * len(section)}\n" in doc
    described = doc.split("Parameters\n----------\n")[1].split("\n\n")[0]
    assert all(f"{parameter} : " in described for parameter in inspect.signature(getattr(ours, name)).parameters)


# -- what optax's own tests hold ---------------------------------------------------------------------------------------

UPDATES = {"a": [500.0, 5.0], "b": [300.0, 3.0]}


@pytest.mark.parametrize(("name", "p", "per_leaf"), [("global_norm", 2.0, False), ("block_rms", "rms", True)])
def test_norms_are_at_the_bound_and_clipping_again_changes_little(name, p, per_leaf):
    updates = arrays(UPDATES)
    for i in (1, 2, 7, 50):
        clipper = getattr(ours, f"clip_by_{name}")(1 / i)
        updates, _ = clipper.update(updates, None)
        leaves = [np.asarray(x) for x in updates.values()]
        for group in [[x] for x in leaves] if per_leaf else [leaves]:
            assert float(exact.norm(group, p)) == pytest.approx(1 / i, rel=5e-7)
        at_once, _ = clipper.update(arrays(UPDATES), None)
        assert_close(updates, plain(at_once), rtol=2e-6)


def test_clip():
    updates = arrays(UPDATES)
    assert plain(ours.clip(1e6).update(updates, None)[0]) == UPDATES
    assert plain(ours.clip(1.0).update(updates, None)[0]) == {"a": [1.0, 1.0], "b": [1.0, 1.0]}
    state = ours.clip(1.0).init(updates)
    assert state == optax.EmptyState()
    got, after = ours.clip((-1.0, 2.0)).update(jnp.array([-3.0, NAN, 3.0]), state)
    assert repr(plain(got)) == "[-1.0, nan, 2.0]"
    assert after is state
    with pytest.raises(LeafError, match="complex"):
        ours.clip(1.0).update(jnp.ones(2, "complex64"), state)


def test_per_example_global_norm_clip():
    """Norms sqrt(0.25), sqrt(50), sqrt(70) and 0; the sums are lower by the margin of `clipped_sum`."""
    grads = [jnp.array([[0, -0.5], [3, 4], [5, 6], [0, 0]]), jnp.array([[0], [5], [-3], [0]])]
    total, clipped = ours.per_example_global_norm_clip(grads, 1.0)
    a, b = 50**-0.5, 70**-0.5
    assert_close(total, [[3 * a + 5 * b, -0.5 + 4 * a + 6 * b], [5 * a - 3 * b]], rtol=5e-6)
    assert clipped.dtype == jnp.int32
    assert int(clipped) == 2
    assert total[1].dtype == jnp.float32


@pytest.mark.parametrize(("bound", "total", "clipped"), [(INF, 7.0, 0), (0.0, 0.0, 3), (1.25, 1.75, 3)])
def test_per_example_global_norm_clip_of_integers(bound, total, clipped):
    """The example of optax's documentation: three examples of norm 5, and one of 0."""
    jax.config.update("jax_enable_x64", True)
    grads = [jnp.array([[0, 0, 0], [0, 3, 4], [4, 0, 3], [3, 4, 0]])]
    got, n = ours.per_example_global_norm_clip(grads, bound)
    assert_close(got, [[total] * 3], rtol=3e-6)
    assert (int(n), n.dtype, got[0].dtype) == (clipped, jnp.int32, jnp.float32)


def test_per_example_global_norm_clip_where_an_example_is_not_finite():
    grads = jnp.array([[3.0, 4.0], [NAN, 1.0], [INF, 0.0]])
    total, clipped = ours.per_example_global_norm_clip(grads, 2.5)
    assert_close(total, [1.5, 2.0], rtol=3e-6)
    assert int(clipped) == 2, "NaN is above no bound"
    assert np.isnan(ours.per_example_global_norm_clip(grads, 2.5, nonfinite="propagate")[0]).all()
    with pytest.raises(ValueError, match=r"grads\[1\] is 0-d: with per='example'"):
        ours.per_example_global_norm_clip([jnp.ones(3), jnp.float32(1)], 1.0)


@pytest.mark.parametrize(("uniform", "square", "second", "clipped"), [(True, 2, 18**-0.5, 4), (False, 19, 1.0, 0)])
def test_per_example_layer_norm_clip(uniform, square, second, clipped):
    """A leaf of one number an example, and one of 18: bounds 1 and 1, or 1 and sqrt(18)."""
    grads = {"a": jnp.array([[0.5], [1.5], [-2.0], [3.0]]), "b": jnp.ones((4, 3, 3, 2)), "c": None}
    bound = math.sqrt(square) * (1 + 1e-6)  # b's norms are just below
    total, n = jax.jit(partial(ours.per_example_layer_norm_clip, uniform=uniform))(grads, bound)
    assert_close(total, {"a": [1.5], "b": np.full((3, 3, 2), 4 * second), "c": None}, rtol=4e-6)
    assert plain(n) == {"a": 3, "b": clipped, "c": None}


# -- adaptive clipping -------------------------------------------------------------------------------------------------


def unit_norms(x: np.ndarray, summed: tuple[int, ...]) -> np.ndarray:
    """Exact, as optax has them: the norms over some axes, which stay with length 1."""
    out = np.empty([1 if i in summed else n for i, n in enumerate(x.shape)])
    for at in np.ndindex(*out.shape):
        part = x[tuple(slice(None) if i in summed else at[i] for i in range(x.ndim))]
        out[at] = float(exact.norm([part.astype(np.float64)]))
    return out


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("shape", "axis", "summed"),
    [
        ((), None, ()),
        ((6,), None, (0,)),
        ((1, 6), None, (0, 1)),  # one axis is longer than 1: a vector to optax
        ((6, 1), None, (0, 1)),
        ((4, 3), None, (0,)),
        ((4, 2, 3), None, (0,)),
        ((2, 2, 3, 4), None, (0, 1, 2)),
        ((2, 1, 2, 3, 4), None, (0, 1, 2, 3)),
        ((2, 1, 2, 3, 4), (0, 1, 2), (0, 1, 2)),
        ((2, 3, 4), 1, (1,)),
        ((2, 3, 4), (-1, 0), (0, 2)),
        ((4, 3), -1, (1,)),
    ],
)
def test_adaptive_clipping_has_optaxs_units(shape, axis, summed):
    rng = np.random.default_rng(len(shape))
    g, w = (rng.integers(-8, 9, shape).astype(np.float32) for _ in range(2))
    w *= 0.25
    norm, bound = unit_norms(g, summed), 0.5 * np.maximum(unit_norms(w, summed), 1e-3)
    expected = g * np.minimum(1, bound / np.where(norm > 0, norm, 1))
    clipper = ours.adaptive_grad_clip(0.5, axis=axis)
    params = {"x": jnp.asarray(w)}
    state = clipper.init(params)
    updates, after = jax.jit(clipper.update)({"x": jnp.asarray(g)}, state, params)
    assert updates["x"].shape == shape
    np.testing.assert_allclose(updates["x"], expected, rtol=1e-6)
    np.testing.assert_allclose(np.broadcast_to(after.norm["x"], norm.shape), norm, rtol=4e-7)
    np.testing.assert_allclose(np.broadcast_to(after.bound["x"], norm.shape), bound, rtol=4e-7)
    assert (np.broadcast_to(after.clipped["x"], norm.shape) == (norm > bound)).all()
    np.broadcast_shapes(after.norm["x"].shape, shape)
    assert forms(after) == forms(state)


def test_adaptive_clipping_is_optaxs():
    """The same numbers, on leaves of all the ranks that optax knows."""
    rng = np.random.default_rng(0)
    shapes = [(5,), (4, 3), (1, 7), (3, 2, 4), (2, 2, 3, 4)]
    g, w = ([jnp.asarray(rng.standard_normal(shape), "float32") for shape in shapes] for _ in range(2))
    got, _ = jax.jit(ours.adaptive_grad_clip(0.3).update)(g, None, w)
    expected, _ = jax.jit(optax.adaptive_grad_clip(0.3).update)(g, optax.EmptyState(), w)
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


def test_adaptive_clipping_by_gradclips_groups():
    params, grads = jnp.array([[3.0, 0.0], [4.0, 0.0]]), jnp.array([[0.0, 1.0], [2.0, 0.0]])
    clipper = ours.adaptive_grad_clip(0.5, per=gradclip.Units(0))
    updates, state = clipper.update(grads, clipper.init(params), params)
    assert_close(updates, [[0.0, 1.0], [2.0, 0.0]])
    assert_close(state.bound, [[1.5], [2.0]])
    updates, state = ours.adaptive_grad_clip(0.1, per=None).update([grads, None], None, [params, None])
    assert_close(updates, [[[0.0, 0.0001], [0.5, 0.0]], None])
    assert plain(state.clipped) == [[[1, 1]], None]


def test_adaptive_clipping_where_a_unit_is_not_finite():
    params, grads = jnp.full((2, 2), 2.0), jnp.array([[NAN, 3.0], [1.0, 4.0]])
    updates, state = ours.adaptive_grad_clip(2.0**-1.5, nonfinite="zero").update(grads, None, params)
    assert_close(updates, [[0.0, 0.6], [0.0, 0.8]])
    assert plain(state.clipped) == [[0, 1]]


def test_adaptive_clipping_says_what_is_wrong(grads):
    with pytest.raises(ValueError, match=r"got none: call update\(updates, state, params\)"):
        ours.adaptive_grad_clip(0.1).update(grads, None)
    with pytest.raises(ValueError, match=r"axis=0 and per='unit' both say"):
        ours.adaptive_grad_clip(0.1, axis=0, per="unit")
    with pytest.raises(ValueError, match="nonfinite must be one of"):
        ours.adaptive_grad_clip(0.1, nonfinite="zeros")
    with pytest.raises(ValueError, match="clipping must be a number >= 0"):
        ours.adaptive_grad_clip(-0.1).update(grads, None, grads)
    with pytest.raises(ValueError, match="eps must be a positive number"):
        ours.adaptive_grad_clip(0.1, eps=0.0)
    with pytest.raises(ValueError, match=r"params\['w'\] is an array of shape \(3,\), and its gradient has the shape"):
        ours.adaptive_grad_clip(0.1).update(grads, None, {**grads, "w": jnp.ones(3)})
    with pytest.raises(LeafError, match=r"grads\['w'\]"):
        ours.adaptive_grad_clip(0.1).update({**grads, "w": 1.0}, None, grads)
    with pytest.raises(ValueError, match="axis 3 is out of bounds"):
        ours.adaptive_grad_clip(0.1, axis=3).init(grads)


# -- the state ---------------------------------------------------------------------------------------------------------


def test_the_state_of_the_global_norm(grads):
    clipper = ours.clip_by_global_norm(6.5)
    state = clipper.init(grads)
    assert plain(state) == ours.ClipState(0, 0.0, 0.0, 0, ())
    assert [x.dtype.name for x in state[:4]] == ["int32", "float32", "float32", "int32"]
    updates, state = clipper.update(grads, state)
    assert_close(updates, scaled(0.5))
    assert plain(state) == ours.ClipState(1, 13.0, 6.5, 1, ())
    small = jax.tree.map(lambda x: x / 4, grads)
    updates, state = clipper.update(small, state)
    assert plain(updates) == scaled(0.25), "bit for bit"
    assert plain(state) == ours.ClipState(2, 3.25, 6.5, 1, ())


@pytest.mark.parametrize(
    ("per", "bound", "norm", "bounds", "clipped"),
    [
        ("leaf", 6.0, {"b": 12.0, "w": 5.0}, {"b": 6.0, "w": 6.0}, {"b": 1, "w": 0}),
        ("leaf", {"b": 12.0, "w": 1.0}, {"b": 12.0, "w": 5.0}, {"b": 12.0, "w": 1.0}, {"b": 0, "w": 1}),
        ({"b": "x", "w": "y"}, {"x": 1.0, "y": 7.0}, {"x": 12.0, "y": 5.0}, {"x": 1.0, "y": 7.0}, {"x": 1, "y": 0}),
        ({"b": "x", "w": None}, 1.0, {"x": 12.0}, {"x": 1.0}, {"x": 1}),
        (lambda path, leaf: "all", 1.0, {"all": 13.0}, {"all": 1.0}, {"all": 1}),
    ],
)
def test_norm_bound_and_counts_have_one_form(grads, per, bound, norm, bounds, clipped):
    clipper = ours.clip_by_global_norm(bound, per=per)
    state = clipper.init(grads)
    updates, after = jax.jit(clipper.update)(grads, state)
    expected = gradclip.clip_grad_norm(grads, bound, per=per)
    assert plain(updates) == plain(expected.grads)
    assert (plain(after.norm), plain(after.bound), plain(after.clipped)) == (norm, bounds, clipped)
    assert forms(after) == forms(state)


def test_units_and_examples():
    g = jnp.array([[3.0, 0.0], [4.0, 2.0]])
    _, state = ours.clip_by_global_norm(3.0, per="unit").update([g], None)
    assert (plain(state.norm), plain(state.bound), plain(state.clipped)) == ([[[5.0, 2.0]]], [[[3.0, 3.0]]], [[[1, 0]]])
    _, state = ours.clip_by_global_norm(jnp.array([3.0, 4.0]), per="example").update([g], None)
    assert plain(state.bound) == [3.0, 4.0]
    assert plain(state.clipped) == [0, 1]  # sqrt(20) > 4


@pytest.mark.parametrize(
    ("grad", "norm", "clipped"),
    [([3e38, 3e38], INF, 1), ([INF, 1.0], INF, 1), ([NAN, 1.0], NAN, 0), ([3.0, 4.0], 5.0, 0)],
)
def test_what_counts_as_clipped(grad, norm, clipped):
    _, state = ours.clip_by_global_norm(5.0).update(jnp.array(grad), None)
    np.testing.assert_equal(float(state.norm), norm)
    assert int(state.clipped) == clipped


def test_numbers_beyond_float32_are_clipped_right():
    updates, _ = ours.clip_by_global_norm(5.0).update(jnp.array([3e38, 2.25e38, 0.0]), None)
    assert_close(updates, [4.0, 3.0, 0.0])
    updates, state = ours.clip_by_global_norm(1.5).update(jnp.array([300.0, 400.0], "float16"), None)
    assert updates.dtype == jnp.float16
    assert float(state.norm) == 500.0
    assert_close(updates, [0.9, 1.2], rtol=1e-3)


def test_bounds_of_zero_and_below(grads):
    assert plain(ours.clip_by_global_norm(0.0).update(grads, None)[0]) == scaled(0.0)
    assert plain(ours.clip_by_block_rms(0.0).update(grads, None)[0]) == scaled(0.0)
    zeros = jax.tree.map(jnp.zeros_like, grads)
    _, state = ours.clip_by_global_norm(jnp.float32(-1.0)).update(zeros, None)  # a traced one acts as 0
    assert (float(state.bound), int(state.clipped)) == (-1.0, 0)
    with pytest.raises(ValueError, match=r"max_norm must be a number >= 0, got -1\.0"):
        ours.clip_by_global_norm(-1.0).update(grads, None)


def test_what_is_not_finite(grads):
    bad = {**grads, "b": jnp.array([NAN])}
    assert plain(ours.clip_by_global_norm(1.0, nonfinite="zero").update(bad, None)[0]) == scaled(0.0)
    with pytest.raises(NonFiniteError, match=r"grads\['b'\]"):
        ours.clip_by_global_norm(1.0, nonfinite="error").update(bad, None)
    with pytest.raises(ValueError, match="nonfinite must be one of"):
        ours.clip_by_global_norm(1.0, nonfinite="zeros")


@pytest.mark.parametrize("state", [None, optax.EmptyState(), ()])
def test_a_call_outside_a_loop_begins_anew(grads, state):
    _, after = ours.clip_by_global_norm(1.0).update(grads, state)
    assert plain(after) == ours.ClipState(1, 13.0, 1.0, 1, ())


def test_a_checkpoint_of_optaxs_chain_goes_on(grads, usual_promotion):
    old = optax.chain(optax.clip_by_global_norm(6.5), optax.adam(1e-3))
    _, state = old.update(grads, old.init(grads))
    new = optax.chain(ours.clip_by_global_norm(6.5), optax.adam(1e-3))
    _, state = jax.jit(new.update)(grads, state)
    assert plain(state[0]) == ours.ClipState(1, 13.0, 6.5, 1, ())
    assert int(state[1][0].count) == 2


def test_counts_stay_at_the_largest_int32(grads):
    clipper = ours.clip_by_global_norm(1.0)
    top = jnp.int32(2**31 - 1)
    _, state = clipper.update(grads, clipper.init(grads)._replace(count=top, clipped=top))
    assert plain(state)[0] == plain(state)[3] == 2**31 - 1


def test_init_takes_shapes_and_parameters_without_gradients(grads):
    """JAX's tangent of an integer is float0; Equinox has None there."""
    clipper = ours.clip_by_global_norm(6.5, per="leaf")
    params = {**grads, "n": jnp.arange(3), "key": jax.random.key(0), "none": None}
    state = clipper.init(params)
    assert plain(state.norm) == {"b": 0.0, "key": None, "n": None, "none": None, "w": 0.0}
    shapes = jax.eval_shape(clipper.init, params)
    assert forms(shapes) == forms(state)
    nothing = {"n": np.zeros(3, jax.dtypes.float0), "key": None, "none": None}
    updates, after = clipper.update({**grads, **nothing}, state)
    assert forms(after) == forms(state)
    assert_close(updates["b"], [6.5])
    rates = ours.adaptive_grad_clip(0.5)
    updates, after = rates.update({**grads, **nothing}, rates.init(params), params)
    assert forms(after) == forms(rates.init(params))
    assert_close(updates["w"], [1.5, 2.0])


@pytest.mark.sampled(4)
@pytest.mark.parametrize("x64", [True, False])
@pytest.mark.parametrize("gradient", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("per", [None, "leaf"])
def test_the_state_keeps_its_dtypes(x64, gradient, per):
    """Parameters and gradients may differ, for mixed precision: the norm's dtype is that of the parameters."""
    jax.config.update("jax_enable_x64", x64)
    grads = arrays(GRADS, gradient if x64 or gradient != "float64" else "float32")
    for parameter in ("float32", "float64") if x64 else ("float32",):
        clipper = ours.clip_by_global_norm(lambda count: 26.0 / (2 + count.astype(jnp.float32)), per=per)
        state = clipper.init(arrays(GRADS, parameter))
        assert {x.dtype.name for x in jax.tree.leaves(state.norm)} == {parameter}
        _, after = jax.lax.scan(lambda s, _, tx=clipper: tx.update(grads, s)[::-1], state, length=2)[::-1]
        assert forms(after) == forms(state)


# -- schedules and rules -----------------------------------------------------------------------------------------------


def test_a_schedule_is_asked_with_the_updates_before(grads, usual_promotion):
    clipper = ours.clip_by_global_norm(optax.piecewise_constant_schedule(26.0, {2: 0.25}))
    state = clipper.init(grads)
    seen = []
    for _ in range(4):
        updates, state = jax.jit(clipper.update)(grads, state)
        seen.append((float(state.bound), int(state.clipped)))
    assert seen == [(26.0, 0), (26.0, 0), (6.5, 1), (6.5, 2)]
    assert_close(updates, scaled(0.5))


class HalfState(NamedTuple):
    count: Any
    last: Any


@dataclass(frozen=True)
class Half(Rule):
    """The bound is half of the last norm."""

    def start(self, count: Any, zero: Number) -> HalfState:
        return HalfState(count, zero + INF)

    def step(self, state: HalfState, norm: Number) -> tuple[Number, HalfState]:
        return state.last / 2, HalfState(state.count, norm)


@pytest.mark.parametrize(("per", "norm", "bound"), [(None, 13.0, 6.5), ("leaf", *[{"b": 12.0, "w": 5.0}] * 2)])
def test_a_rule_chooses_the_bound(grads, per, norm, bound):
    clipper = ours.clip_by_global_norm(Half(), per=per)
    params = arrays(GRADS)
    grads = arrays(GRADS, "bfloat16")
    state = clipper.init(params)
    updates, first = clipper.update(grads, state)
    assert plain(updates) == GRADS
    updates, second = jax.jit(clipper.update)(grads, first)
    assert_close(updates, scaled(0.5), rtol=1e-2)
    assert plain(second.norm) == norm
    assert second.rule.count.tolist() in (2, [2, 2])
    assert plain(second.bound) == jax.tree.map(lambda x: x / 2, norm)
    assert set(jax.tree.leaves(plain(second.clipped))) == {1}
    assert forms(first) == forms(second) == forms(state)


def test_the_state_of_a_rule_keeps_its_dtypes():
    jax.config.update("jax_enable_x64", True)
    tx = ours.clip_by_global_norm(Half())
    state = tx.init(arrays(GRADS))
    for _ in range(2):
        updates, after = tx.update(arrays(GRADS, "float64"), state)
        assert forms(after) == forms(state)
        state = after
    assert_close(updates, scaled(0.5))


def test_one_of_gradclips_rules_in_a_chain(grads, usual_promotion):
    """The bound of each step is the rule's own, called by hand; scanned, and under `inject_hyperparams`."""
    for rule in (AutoClip(0.5, history=3), ZClip(warmup=2)):
        state, bounds = rule.init(grads), []
        scales = [1.0, 2.0, 3.0, 10.0]
        for scale in scales:
            _, _, bound, state = rule.clip(jax.tree.map(lambda x, c=scale: c * x, grads), state)
            bounds.append(float(bound))
        chains = [optax.chain(ours.clip_by_global_norm(rule), optax.scale(-1.0))]
        chains.append(optax.inject_hyperparams(ours.clip_by_global_norm, static_args=("max_norm",))(rule))
        for chain in chains:

            def step(state: Any, scale: Any, chain: Any = chain) -> Any:
                _, state = chain.update(jax.tree.map(lambda x: scale * x, grads), state)
                return state, tree_get(state, "bound")

            _, found = jax.lax.scan(step, chain.init(grads), jnp.asarray(scales))
            assert found.tolist() == bounds


# -- optax's wrappers --------------------------------------------------------------------------------------------------


def run(tx: Any, grads: Any, steps: int = 3) -> tuple[Any, Any]:
    """The updates and the state after some steps in a jitted scan, whose carry must not change its type."""
    params = jax.tree.map(jnp.ones_like, grads)

    @jax.jit
    def loop(state: Any) -> Any:
        return jax.lax.scan(lambda s, _: tx.update(grads, s, params)[::-1], state, length=steps)

    state, updates = loop(tx.init(params))
    return jax.tree.map(lambda x: x[-1], updates), state


WRAPPERS = {
    "chain": lambda tx: optax.chain(tx, optax.scale(1.0)),
    "named_chain": lambda tx: optax.named_chain(("clip", tx), ("scale", optax.scale(1.0))),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(ours.clip_by_global_norm)(6.5),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 3),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 5),
    "flatten": optax.flatten,
    "masked": lambda tx: optax.masked(tx, {"b": True, "w": True}),
    "partition": lambda tx: optax.partition({"x": tx}, {"b": "x", "w": "x"}),
    "multi_transform": lambda tx: optax.multi_transform({"x": tx}, {"b": "x", "w": "x"}),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda step: step > 0),
    "with_extra_args_support": optax.with_extra_args_support,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers(grads, name, usual_promotion):
    tx = WRAPPERS[name](ours.clip_by_global_norm(6.5))
    updates, state = run(tx, grads)
    assert_close(updates, scaled(0.5))
    assert float(tree_get(state, "norm")) == 13.0
    assert float(tree_get(state, "bound")) == 6.5
    assert int(tree_get(state, "clipped")) == {"MultiSteps": 1, "conditionally_transform": 2}.get(name, 3)


def test_apply_if_finite_skips_what_the_clip_makes_nan(grads):
    tx = optax.apply_if_finite(ours.clip_by_global_norm(6.5), 5)
    bad = {**grads, "b": jnp.array([NAN])}
    updates, state = run(tx, bad)
    assert plain(updates) == scaled(0.0)
    assert int(state.total_notfinite) == 3
    assert int(tree_get(state.inner_state, "norm")) == 0, "the state of the last finite step"


def test_a_part_of_the_tree(grads):
    """What is masked counts for nothing, and groups are those of what is left."""
    updates, state = run(optax.masked(ours.clip_by_global_norm(2.5, per="leaf"), {"b": False, "w": True}), grads)
    assert_close(updates, {"b": [12.0], "w": [1.5, 2.0]})
    assert plain(tree_get(state, "norm")) == {"b": optax.MaskedNode(), "w": 5.0}
    rate = ours.adaptive_grad_clip(0.5)
    updates, state = run(optax.partition({"x": rate, "y": optax.set_to_zero()}, {"b": "x", "w": "y"}), grads)
    assert_close(updates, {"b": [0.5], "w": [0.0, 0.0]})
    assert plain(tree_get(state, "norm")) == {"b": 12.0, "w": optax.MaskedNode()}


def test_two_clips_are_told_apart(grads):
    tx = optax.partition({n: ours.clip_by_global_norm(6.0) for n in ("b", "w")}, {"b": "b", "w": "w"})
    updates, state = run(tx, grads)
    assert_close(updates, {"b": [6.0], "w": [3.0, 4.0]})
    with pytest.raises(KeyError, match="Found multiple values"):
        tree_get(state, "norm")
    found = optax.tree_utils.tree_get_all_with_path(state, "norm")
    assert sorted(float(norm) for _, norm in found) == [5.0, 12.0]


def test_the_state_is_found_beside_parameters_called_norm(usual_promotion):
    grads = arrays({"norm": [3.0, 4.0], "count": [12.0]})
    tx = optax.chain(ours.clip_by_global_norm(1.0, per="leaf"), optax.scale_by_adam())
    _, state = run(tx, grads, 2)

    def is_ours(path: Any, value: Any) -> bool:
        return getattr(path[-1], "tuple_name", None) == "ClipState"

    assert plain(tree_get(state, "norm", filtering=is_ours)) == {"norm": 5.0, "count": 12.0}
    assert int(tree_get(state, "count", filtering=is_ours)) == 2


def test_inject_hyperparams(grads, usual_promotion):
    tx = optax.inject_hyperparams(ours.clip_by_global_norm)(0.1)
    state = jax.jit(tx.init)(grads)
    update = jax.jit(tx.update)
    for bound in (0, 13, 6.5):
        state.hyperparams["max_norm"] = bound
        updates, state = update(grads, state)
        assert_close(updates, scaled(bound / 13))
        assert float(tree_get(state, "bound")) == bound
    schedule = optax.inject_hyperparams(ours.clip_by_global_norm)(optax.linear_schedule(26.0, 6.5, 2), per="leaf")
    updates, state = run(schedule, grads, 3)
    assert_close(updates, {"b": [6.5], "w": [3.0, 4.0]})
    assert float(state.hyperparams["max_norm"]) == 6.5
    for factory, name in [(ours.clip_by_block_rms, "threshold"), (ours.clip, "max_delta")]:
        tx = optax.inject_hyperparams(factory)(**{name: 2.0})
        assert float(run(tx, grads)[0]["b"][0]) == 2.0
    tx = optax.inject_hyperparams(ours.adaptive_grad_clip)(0.5)
    assert_close(run(tx, grads)[0]["b"], [0.5])


def test_inject_hyperparams_and_what_must_be_static(grads):
    with pytest.raises(TypeError, match=r"norm_type must be .* static_args=\('norm_type',\)"):
        optax.inject_hyperparams(ours.clip_by_global_norm)(3.0, 1.0).init(grads)
    static = partial(optax.inject_hyperparams, static_args=("norm_type", "per"))
    updates, state = run(static(ours.clip_by_global_norm)(9.5, 1.0), grads)
    assert_close(updates, scaled(0.5))  # the 1-norm is 19
    updates, state = run(static(ours.clip_by_global_norm)(6.0, per=lambda path, leaf: path), grads)
    assert plain(tree_get(state, "norm")) == {"grads['b']": 12.0, "grads['w']": 5.0}


# -- JAX's transformations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    """Two leaves over four devices, one of them the same on all. The state is, too."""
    mesh = mesh_of(("d", 4))
    grads = {"b": jnp.array([12.0]), "w": jnp.array([3.0, 0.0, 0.0, 4.0])}
    specs = {"b": P(), "w": P("d")}
    tx = optax.chain(ours.clip_by_global_norm(6.5, all_reduce=psum("d", None if check_vma else specs)), optax.sgd(1.0))

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(specs, P()), out_specs=(specs, P()), check_vma=check_vma)
    def steps(grads: Any, state: Any) -> Any:
        state, updates = jax.lax.scan(lambda s, _: tx.update(grads, s)[::-1], state, length=2)
        return jax.tree.map(lambda x: x[-1], updates), state

    updates, state = steps(grads, tx.init(grads))
    assert_close(updates, {"b": [-6.0], "w": [-1.5, 0.0, 0.0, -2.0]})
    assert plain(state[0]) == ours.ClipState(2, 13.0, 6.5, 2, ())


def test_adaptive_clipping_in_shard_map():
    """The axis that norms sum over is spread: both norms are joined."""
    mesh = mesh_of(("d", 4))
    params, grads = jnp.full((16, 2), 0.5), jnp.array([[1.0, 0.25]] * 16)  # units of norm 2, and 4 and 1
    specs = P("d"), P(), P("d")
    for how in ({}, {"axis": 0}, {"per": "unit"}):
        tx = ours.adaptive_grad_clip(1.0, **how, all_reduce=psum("d"))
        update = jax.jit(jax.shard_map(tx.update, mesh=mesh, in_specs=specs, out_specs=specs[:2]))
        updates, state = update(grads, tx.init(params), params)
        assert_close(updates, [[0.5, 0.25]] * 16)
        assert plain(state) == ours.ClipState(1, [[4.0, 1.0]], [[2.0, 2.0]], [[1, 0]], ())


def test_sharded_gradients_under_jit():
    mesh = mesh_of(("d", 4))
    sharding = jax.sharding.NamedSharding(mesh, P("d"))
    params = {"w": jax.device_put(jnp.ones((8, 2)), sharding)}
    grads = {"w": jax.device_put(jnp.full((8, 2), 3.0), sharding)}
    tx = ours.clip_by_global_norm(6.0, per="leaf")
    update = jax.jit(tx.update)
    updates, state = update(grads, jax.jit(tx.init)(params))
    assert_close(updates, {"w": [[1.5, 1.5]] * 8})
    assert float(state.norm["w"]) == 12.0
    assert updates["w"].sharding.is_equivalent_to(sharding, 2)
    assert "all-gather" not in update.lower(grads, state).compile().as_text()


def test_vmap_over_states():
    """Several models at once: each has its norm, its bound and its count."""
    grads = {"w": jnp.array([[3.0, 4.0], [0.3, 0.4]])}
    tx = ours.clip_by_global_norm(1.0)
    state = jax.jit(jax.vmap(tx.init))(grads)
    updates, state = jax.jit(jax.vmap(tx.update))(grads, state)
    assert_close(updates, {"w": [[0.6, 0.8], [0.3, 0.4]]})
    assert plain(state.clipped) == [1, 0]


@pytest.mark.parametrize("init", [lambda tx, p: tx.init(p), lambda tx, p: jax.jit(tx.init)(p)], ids=["eager", "jit"])
def test_a_state_that_is_given_away(grads, init, usual_promotion):
    tx = optax.chain(ours.clip_by_global_norm(6.5, per="leaf"), optax.adam(1e-3))
    update = jax.jit(tx.update, donate_argnums=1)
    state = init(tx, grads)
    for _ in range(2):
        _, state = update(grads, state)
    assert plain(state[0].clipped) == {"b": 2, "w": 0}


def test_the_bound_may_change_without_a_new_compilation(grads):
    @jax.jit
    def update(grads: Any, state: Any, max_norm: Any) -> Any:
        return ours.clip_by_global_norm(max_norm).update(grads, state)

    state = ours.clip_by_global_norm(0.0).init(grads)
    for bound in (1.0, 2.0):
        _, state = update(grads, state, bound)
        assert float(state.bound) == bound
    assert update._cache_size() == 1


def test_a_derivative_goes_through(grads):
    """Meta-gradients: of sum(clip(s * g)) by s, at s = 1, where the direction is all that is left."""

    @jax.jit
    @jax.grad
    def slope(s: Any) -> Any:
        updates, _ = ours.clip_by_global_norm(6.5).update(jax.tree.map(lambda x: s * x, grads), None)
        return sum(jnp.sum(x) for x in jax.tree.leaves(updates))

    assert abs(float(slope(jnp.float32(1.0)))) < 1e-5
    assert float(slope(jnp.float32(0.25))) == 19.0


@pytest.mark.full
def test_a_checkpoint_of_orbax(grads, tmp_path, usual_promotion):
    ocp = pytest.importorskip("orbax.checkpoint", reason="orbax is not installed")
    tx = optax.chain(ours.clip_by_global_norm(6.5, per="leaf"), optax.adam(1e-3))
    _, state = run(tx, grads)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, grads))
    assert plain(restored) == plain(state)
    assert int(tx.update(grads, restored)[1][0].count) == 4

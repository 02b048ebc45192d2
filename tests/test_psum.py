"""JAX: one norm over named axes. Sharded and replicated leaves, in shard_map, vmap and pmap, and what XLA is told."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import numpy as np
import pytest

import exact
import gradclip
from gradclip.distributed import psum
from meshes import mesh_of, strict_jax  # noqa: F401

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
from jax.experimental import checkify  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

pytestmark = [pytest.mark.library("jax"), pytest.mark.usefixtures("strict_jax")]

INF = math.inf
ORDERS = (2.0, 1.0, 3.0, 0.5, INF, -INF, 0.0, -2.0)
AXES = ("data", "model")

#: One leaf for each way to lie on a mesh of two axes: over both, over one, over the other, over none.
SPECS = {"both": P("data", "model"), "model": P(None, "model"), "data": [P("data")], "none": P()}


@pytest.fixture(scope="module")
def mesh() -> Any:
    return mesh_of(("data", 2), ("model", 2))


def gradients(seed: int = 0, scale: float = 1.0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def leaf(*shape: int) -> Any:
        return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)

    return {"both": leaf(4, 6), "model": leaf(3, 2), "data": [leaf(8)], "none": leaf(5)}


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


EVERYWHERE = P()


def over(mesh: Any, f: Any, out: Any = EVERYWHERE, specs: Any = SPECS, vma: bool = True) -> Any:
    """`f` of the local shards, compiled: step by step, each of its operations would be compiled alone."""
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(specs,), out_specs=out, check_vma=vma))


def sharded_clip(mesh: Any, p: float = 2.0, bound: float = 0.25, vma: bool = True, **kw: Any) -> Any:
    """Its norm is typed as the same on all devices, or `out_specs=P()` would not pass with `vma`."""
    engine = psum(AXES, None if vma else SPECS)
    return over(
        mesh, lambda g: tuple(gradclip.clip_grad_norm(g, bound, p, all_reduce=engine, **kw)), (SPECS, P()), vma=vma
    )


def check_clipped(clipped: Any, grads: Any, factor: float) -> None:
    for got, leaf in zip(leaves(clipped), leaves(grads), strict=True):
        np.testing.assert_allclose(got, leaf.astype(np.float64) * factor, rtol=1e-6)
        assert got.dtype == leaf.dtype


# -- the norm of the whole ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "vma"), [(p, True) for p in ORDERS] + [(p, False) for p in (2.0, 3.0, -INF)])
def test_replicated_leaves_count_once(mesh: Any, p: float, vma: bool) -> None:
    grads = gradients()
    clipped, norm = sharded_clip(mesh, p, vma=vma)(grads)
    want = exact.norm(leaves(grads), p)
    exact.check_norm(norm, want, "float32", 8)
    assert norm.sharding.is_fully_replicated
    check_clipped(clipped, grads, min(1.0, float(0.25 / want)))


@pytest.mark.parametrize(("p", "vma"), [(2.0, True), (2.0, False), (3.0, True), (INF, False), (-INF, True)])
def test_derivatives_are_those_of_one_device(mesh: Any, p: float, vma: bool) -> None:
    """Through the factor and the norm, for leaves of every kind; `P()` leaves get the gradient of one copy."""
    grads = gradients(1)

    def slope_of(clip: Any) -> Any:
        def loss(g: Any) -> Any:
            clipped, norm = clip(g)
            return sum(jnp.sum(jnp.sin(3 * x)) for x in jax.tree.leaves(clipped)) + 2 * norm

        return jax.jit(jax.grad(loss))(grads)

    got = slope_of(sharded_clip(mesh, p, vma=vma))
    want = slope_of(lambda g: gradclip.clip_grad_norm(g, 0.25, p))
    for a, b in zip(leaves(got), leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
    assert max(abs(x).max() for x in leaves(want)) > 0.1


def test_gradient_taken_inside(mesh: Any) -> None:
    """`jax.grad` in the body: of one norm that all devices share, so each shard gets its part of g / ||g||."""
    grads = gradients(2)
    norm = functools.partial(gradclip.global_norm, all_reduce=psum(AXES))
    got = (over(mesh, jax.grad(norm), SPECS))(grads)
    want = float(exact.norm(leaves(grads)))
    for a, g in zip(leaves(got), leaves(grads), strict=True):
        np.testing.assert_allclose(a, g / want, rtol=1e-6)


@pytest.mark.parametrize("value", [1e30, 1e-30, 3e38])
def test_magnitudes_beyond_their_squares(mesh: Any, value: float) -> None:
    grads = {**gradients(), "none": jnp.float32([value] * 5), "both": jnp.full((4, 6), value / 8, jnp.float32)}
    for vma in (True, False):
        clipped, norm = (sharded_clip(mesh, bound=1e-3, vma=vma))(grads)
        want = exact.norm(leaves(grads))
        exact.check_norm(norm, want, "float32")
        np.testing.assert_allclose(clipped["none"], float(1e-3 / want * float(grads["none"][0])), rtol=1e-6)


def test_one_axis_of_two(mesh: Any) -> None:
    """Joined over "model" only: each half of "data" has its own norm, and the types say so."""
    grads = gradients(3)
    halves = (over(mesh, lambda g: gradclip.global_norm(g, all_reduce=psum("model"))[None], P("data")))(grads)
    assert halves.shape == (2,)
    for i, half in enumerate(halves):
        mine = [grads["both"][2 * i : 2 * i + 2], grads["model"], grads["data"][0][4 * i : 4 * i + 4], grads["none"]]
        exact.check_norm(half, exact.norm(leaves(mine)), "float32")
    with pytest.raises(ValueError, match="out_specs"):
        over(mesh, lambda g: gradclip.global_norm(g, all_reduce=psum("model")))(grads)


def test_inside_other_transforms(mesh: Any) -> None:
    """A vmap for examples inside, and an axis outside that the compiler keeps to itself."""
    rows, shared = jnp.arange(24.0).reshape(3, 8), jnp.ones((3, 2))

    def each(g: Any, b: Any) -> Any:
        return jax.vmap(lambda g, b: gradclip.global_norm([g, b], all_reduce=psum(AXES)))(g, b)

    specs = (P(None, "model"), P())
    norms = jax.jit(jax.shard_map(each, mesh=mesh, in_specs=specs, out_specs=P()))(rows, shared)
    for norm, row, b in zip(norms, rows, shared, strict=True):
        exact.check_norm(norm, exact.norm(leaves([row, b])), "float32")

    def manual_over_model(g: Any, b: Any) -> Any:
        return gradclip.global_norm([g, b], all_reduce=psum("model"))

    some = jax.shard_map(manual_over_model, mesh=mesh, in_specs=specs, out_specs=P(), axis_names={"model"})
    placed = jax.device_put(rows[:2], NamedSharding(mesh, P(*AXES)))
    exact.check_norm(jax.jit(some)(placed, shared), exact.norm(leaves([rows[:2], shared])), "float32")


def test_no_leaves_and_numpy_leaves(mesh: Any) -> None:
    """NumPy's arrays are constants of the program, the same on all devices: they count once, alone and beside JAX's."""
    grads = gradients()
    three = np.float32([1, -2, 2])
    empty, alone, mixed = jax.jit(
        over(
            mesh,
            lambda g: (
                jnp.asarray(gradclip.global_norm([None, []], all_reduce=psum(AXES)), jnp.float32),
                jnp.asarray(gradclip.global_norm([three], all_reduce=psum(AXES)), jnp.float32),
                gradclip.global_norm([three, g], all_reduce=psum(AXES)),
            ),
        )
    )(grads)
    assert (float(empty), float(alone)) == (0.0, 3.0)
    exact.check_norm(mixed, exact.norm([three, *leaves(grads)]), "float32")
    traced = over(mesh, lambda b: gradclip.clip_grad_norm([], b, all_reduce=psum(AXES)).norm, specs=P())
    assert float(traced(jnp.float32(1))) == 0.0


# -- what cannot be known is asked for ---------------------------------------------------------------------------

UNTOLD = r"psum\('(data|batch)'\) cannot know whether grads.* varies over .*varying=.*check_vma=True"


def test_untracked_axes_must_be_told(mesh: Any) -> None:
    rows = jnp.arange(8.0).reshape(4, 2)
    with pytest.raises(ValueError, match=UNTOLD):
        over(mesh, lambda g: gradclip.global_norm(g, all_reduce=psum(AXES)), vma=False)(gradients())
    with pytest.raises(ValueError, match=UNTOLD):
        jax.vmap(lambda g: gradclip.global_norm(g, all_reduce=psum("batch")), axis_name="batch")(rows)
    if hasattr(jax, "pmap"):
        with pytest.raises(ValueError, match=UNTOLD):
            jax.pmap(lambda g: gradclip.global_norm([g], all_reduce=psum("batch")), axis_name="batch")(rows)
    engine = psum("batch", {"a": "batch", "b": None})  # told of one leaf only
    with pytest.raises(ValueError, match=UNTOLD):
        jax.vmap(lambda a: gradclip.global_norm({"a": a, "b": a}, all_reduce=engine), axis_name="batch")(rows)


@pytest.mark.parametrize(("transform", "p"), [("vmap", 2.0), ("vmap", INF), ("pmap", 2.0), ("pmap", 3.0)])
def test_vmap_and_pmap_that_are_told(transform: str, p: float) -> None:
    if not hasattr(jax, transform):
        pytest.skip(f"this JAX has no {transform}")
    host = np.random.default_rng(4).standard_normal((4, 3)).astype(np.float32)
    shared = np.float32([2.0, -0.5])

    def clip(row: Any) -> Any:
        engine = psum("batch", {"row": "batch", "shared": P()})
        return tuple(gradclip.clip_grad_norm({"row": row, "shared": jnp.asarray(shared)}, 0.5, p, all_reduce=engine))

    mapped = getattr(jax, transform)(clip, axis_name="batch")
    clipped, norms = (jax.jit(mapped) if transform == "vmap" else mapped)(host)
    want = exact.norm([host, shared], p)
    for norm in np.asarray(norms):
        exact.check_norm(norm, want, "float32", 8)
    factor = min(1.0, float(0.5 / want))
    np.testing.assert_allclose(clipped["row"], host * factor, rtol=1e-6)
    np.testing.assert_allclose(clipped["shared"], np.tile(shared * factor, (4, 1)), rtol=1e-6)


@pytest.mark.parametrize("told", [P("data", ("model",)), frozenset(AXES), {"data", "model"}, P(("data", "model"))])
def test_ways_to_name_axes(mesh: Any, told: Any) -> None:
    grads = gradients()["both"]
    norm = over(mesh, lambda g: gradclip.global_norm(g, all_reduce=psum(AXES, told)), specs=P(*AXES), vma=False)(grads)
    exact.check_norm(norm, exact.norm(leaves(grads)), "float32")


def test_what_is_told_goes_before_what_jax_tracks(mesh: Any) -> None:
    """Shards that happen to be equal constants, and copies that JAX takes for different values."""

    def norms(g: Any) -> Any:
        ones = jnp.ones(3, jnp.float32)  # to JAX the same on all devices
        copy = jax.lax.all_gather(g, "model")  # to JAX different on all
        return (
            gradclip.global_norm([ones], all_reduce=psum(AXES)),
            gradclip.global_norm([ones], all_reduce=psum(AXES, [frozenset(AXES)])),
            gradclip.global_norm([copy], all_reduce=psum(AXES, P())),
            gradclip.global_norm([g], all_reduce=psum(AXES, frozenset(AXES))),  # to JAX the same along "data"
        )

    as_tracked, as_shards, as_copies, as_others = over(mesh, norms, specs=P("model"))(jnp.float32([3, 4]))
    assert float(as_tracked) == float(np.sqrt(np.float32(3)))
    assert float(as_shards) == float(np.sqrt(np.float32(12)))
    assert float(as_copies) == 5.0
    assert float(as_others) == float(np.sqrt(np.float32(50)))


def test_mistakes(mesh: Any) -> None:
    grads = gradients()
    with pytest.raises(NameError, match=r"psum\('model'\): there is no axis 'model' here.*pass no all_reduce"):
        jax.jit(lambda g: gradclip.global_norm(g, all_reduce=psum("model")))(grads)
    with pytest.raises(NameError, match="there is no axis 'modle' here"):
        over(mesh, lambda g: gradclip.global_norm(g, all_reduce=psum(AXES, "modle")))(grads)
    with pytest.raises(TypeError, match=r"varying says 3 of grads\['none'\]: it must be an axis name"):
        over(mesh, lambda g: gradclip.global_norm(g, all_reduce=psum(AXES, {**SPECS, "none": 3})))(grads)
    nested = {**SPECS, "none": {("data", ("model",))}}
    with pytest.raises(TypeError, match=r"varying says .* of grads\['none'\]: it must be an axis name"):
        over(mesh, lambda g: gradclip.global_norm(g, all_reduce=psum(AXES, nested)))(grads)
    with pytest.raises(ValueError, match="varying does not match the gradients there"):
        over(mesh, lambda g: gradclip.global_norm(g, all_reduce=psum(AXES, {"w": P()})))(grads)
    for axes in ((), ("a", "a"), 3.0, ("a", 1)):
        with pytest.raises((ValueError, TypeError), match=r"psum takes an axis name|not iterable"):
            psum(axes)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"all_reduce must be a callable .* got 'data': .*psum\('data'\)"):
        gradclip.global_norm(grads, all_reduce="data")  # type: ignore[arg-type]


# -- policies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "bad"), [("both", math.nan), ("model", INF), ("none", math.nan)])
def test_policies_are_the_same_on_all_devices(mesh: Any, place: str, bad: float) -> None:
    """One bad element on one device, or in a copy on all, of which only one device's counts."""
    grads = gradients()
    grads[place] = grads[place].at[(-1,) * grads[place].ndim].set(bad)
    for p in (2.0,) if math.isnan(bad) else (INF,):
        zero, _ = (sharded_clip(mesh, p, nonfinite="zero"))(grads)
        assert not any(x.any() for x in leaves(zero))
        nan, norm = (sharded_clip(mesh, p))(grads)
        assert all(np.isnan(x).all() for x in leaves(nan))
        assert not math.isfinite(norm)


def test_a_masked_nan_does_not_leak(mesh: Any) -> None:
    """A copy that differs is no one's business but that of the device that counts it."""

    def norm(g: Any) -> Any:
        first = jax.lax.axis_index("data") == 0
        return gradclip.global_norm([jnp.where(first, g, jnp.full_like(g, math.nan))], all_reduce=psum("data", P()))

    assert float(over(mesh, norm, specs=P())(jnp.float32([3, 4]))) == 5.0


def test_error_policy_under_checkify(mesh: Any) -> None:
    bad = gradients()
    bad["model"] = bad["model"].at[0, 1].set(jnp.nan)
    clip = jax.jit(checkify.checkify(sharded_clip(mesh, nonfinite="error")))
    error, _ = clip(gradients())
    assert error.get() is None
    error, _ = clip(bad)
    assert re.search(r"grads\['model'\] .*holds 1 NaN, 0 inf", error.get()), error.get()


# -- what the compiler is told ---------------------------------------------------------------------------------------


def collectives(f: Any, *args: Any) -> list[int]:
    """How many numbers each collective of the lowered program takes."""
    text = f.lower(*args).as_text()
    found = re.findall(r'"stablehlo\.(all_reduce|all_gather|reduce_scatter|all_to_all|collective_\w+)"', text)
    assert set(found) <= {"all_reduce"}
    shapes = re.findall(r"\}\) : \(tensor<((?:\d+x)*)f32>\) -> tensor<(?:\d+x)*f32>", text)
    assert len(shapes) == len(found), "every collective is of one small array"
    return [math.prod(int(n) for n in shape.split("x") if n) for shape in shapes]


@pytest.mark.parametrize(("p", "vma"), [(p, True) for p in ORDERS] + [(p, False) for p in (2.0, 3.0, INF)])
def test_one_collective_whatever_the_number_of_leaves(mesh: Any, p: float, vma: bool) -> None:
    """1 for p = 2 (and 1, 0, inf, -inf), 2 for other p, of at most 3 numbers."""
    few = collectives(sharded_clip(mesh, p, vma=vma), gradients())
    assert len(few) == (1 if p in (2.0, 1.0, 0.0, INF, -INF) else 2), few
    assert max(few) <= 3

    many = {key: [gradients(i)[key] for i in range(10)] for key in ("both", "model", "none")}
    specs = {key: SPECS[key] for key in many}
    engine = psum(AXES, None if vma else specs)
    clip = over(mesh, lambda g: tuple(gradclip.clip_grad_norm(g, 1.0, p, all_reduce=engine)), (specs, P()), specs, vma)
    assert collectives(clip, many) == few


@pytest.mark.parametrize("one_shot", [iter, lambda names: (name for name in names)], ids=["iterator", "generator"])
def test_what_varies_is_read_once(one_shot: Any) -> None:
    """When the engine is made, so that it can be used again."""
    engine = psum("batch", varying=one_shot(["batch", P()]))
    grads = [jnp.float32([[3.0], [4.0]]), jnp.float32([12.0])]
    norm = jax.vmap(
        lambda row, copy: gradclip.global_norm([row, copy], all_reduce=engine), axis_name="batch", in_axes=(0, None)
    )
    for _ in range(2):
        assert norm(*grads).tolist() == [13.0, 13.0]
    assert psum(iter(["a", "b"]), varying={"w": iter(["a"])}).told == {"w": ["a"]}


# -- 100 steps ---------------------------------------------------------------------------------------------------------


def test_replicas_never_drift(mesh: Any) -> None:
    """Each device's own copy of the parameters, of the norm and of the factor's effect: equal bit for bit."""
    spec = {"w": P("model"), "b": P()}

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(spec, P()), out_specs=(spec, P(), P(AXES), P(AXES)))
    def step(params: Any, key: Any) -> Any:
        w = jax.random.normal(jax.random.fold_in(key, jax.lax.axis_index("model")), (7,)) * 30
        grads, norm = gradclip.clip_grad_norm({"w": w, "b": jax.random.normal(key, (5,))}, 0.5, all_reduce=psum(AXES))
        new = jax.tree.map(lambda x, g: x - 0.1 * g, params, grads)
        zero = 0 * jax.lax.axis_index(AXES).astype(jnp.float32)  # so that each device hands out what it has itself
        return new, norm, (zero + norm)[None], (zero + new["b"])[None]

    params = {"w": jnp.zeros(14), "b": jnp.zeros(5)}
    for i in range(100):
        params, norm, norms, copies = step(params, jax.random.key(i))
        assert norm.sharding.is_fully_replicated
        assert len({np.asarray(x).tobytes() for x in norms}) == 1, f"step {i}"
        assert len({np.asarray(x).tobytes() for x in copies}) == 1, f"step {i}"
        held = {np.asarray(s.data).tobytes() for s in params["b"].addressable_shards}
        assert len(held) == 1, f"drift in step {i}"


# -- jit over sharded arrays: pass nothing -----------------------------------------------------------------------------


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, INF, 0.0])
def test_jit_over_sharded_arrays(mesh: Any, p: float, eager: bool) -> None:
    grads = gradients(5)
    placed = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), grads, SPECS)
    clip = functools.partial(gradclip.clip_grad_norm, max_norm=0.25, norm_type=p)
    clipped, norm = (clip if eager else jax.jit(clip))(placed)
    want = exact.norm(leaves(grads), p)
    exact.check_norm(norm, want, "float32", 8)
    assert norm.sharding.is_fully_replicated
    assert len(norm.sharding.device_set) == 4
    check_clipped(clipped, grads, min(1.0, float(0.25 / want)))
    for got, leaf in zip(jax.tree.leaves(clipped), jax.tree.leaves(placed), strict=True):
        assert got.sharding.is_equivalent_to(leaf.sharding, got.ndim), (got.sharding, leaf.sharding)


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_error_policy_over_sharded_arrays(mesh: Any, bad: float) -> None:
    grads = gradients(6)
    grads["both"] = grads["both"].at[3, 5].set(bad)
    placed = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), grads, SPECS)
    with pytest.raises(
        gradclip.NonFiniteError, match=r"grads\['both'\] \(float32, shape \(4, 6\)\): [01] NaN, [01] inf"
    ):
        gradclip.clip_grad_norm(placed, 1.0, nonfinite="error")

"""JAX: units, examples, rms, adaptive clipping and the clipped sum. Traced, differentiated, sharded, compiled."""

from __future__ import annotations

import math
import re
from collections import Counter
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest

import exact
import gradclip
from gradclip.distributed import psum
from meshes import mesh_of, strict_jax  # noqa: F401

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from gradclip._backends.jax.sums import PLAIN_IS_EXACT  # noqa: E402

pytestmark = [pytest.mark.library("jax"), pytest.mark.usefixtures("strict_jax")]

INF = math.inf


@pytest.fixture(scope="module")
def mesh() -> Any:
    return mesh_of(("d", 4))


def normal(*shape: int, seed: int = 0, dtype: str = "float32") -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def compiled(f: Any, *args: Any) -> Any:
    return jax.jit(f).lower(*args).compile()


def crossings(program: Any) -> Counter[str]:
    """The collectives of a compiled program."""
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    return Counter(re.findall(rf" ({names})(?:-start)?\(", program.as_text()))


# -- exact -------------------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize("fill", ["equal", "random"])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((1000, 3), -1),
        ((3, 3, 40, 5), -1),
        ((2, 9000), 0),
        ((20, 3, 30), 1),
        pytest.param((100_000, 2), -1, marks=pytest.mark.full),
    ],
)
def test_norms_of_units(shape: tuple[int, ...], axis: int, fill: str) -> None:
    x = np.full(shape, 0.1, np.float32) if fill == "equal" else np.array(normal(*shape))
    (norm,) = jax.jit(lambda g: gradclip.norms(g, per=gradclip.Units(axis)))([jnp.asarray(x)])
    units = np.moveaxis(x, axis, 0)
    for got, unit in zip(np.ravel(norm), units, strict=True):
        exact.check_norm(got, exact.norm([unit]), "float32")
    assert norm.shape == tuple(n if i == axis % len(shape) else 1 for i, n in enumerate(shape))


def test_norms_of_examples_over_many_leaves() -> None:
    leaves = [normal(5, *shape, seed=i) for i, shape in enumerate([(), (3,), (40, 9), (3,), (9000,)])]
    for f in (gradclip.norms, jax.jit(gradclip.norms, static_argnames="per")):
        norm = f(leaves, per="example")
        for i in range(5):
            exact.check_norm(norm[i], exact.norm([np.asarray(x[i]) for x in leaves]), "float32")


def test_two_dtypes_of_two_labels_are_not_mixed_up() -> None:
    tree = [jnp.float32([3]), jnp.float32([5]), jnp.bfloat16([12]), jnp.bfloat16([4])]
    assert {k: float(x) for k, x in gradclip.norms(tree, per=["a", "b", "b", "a"]).items()} == {"a": 5.0, "b": 13.0}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_rms_is_the_norm_by_the_root_of_the_count(scale: float) -> None:
    tree = {"w": normal(3, 4) * scale, "b": normal(7, seed=1) * scale}
    for per in ("leaf", "unit"):
        norm = gradclip.norms(tree, "rms", per=per)
        exact.check_norm(norm["b"], exact.norm([np.asarray(tree["b"])]) / exact.mpmath.sqrt(7), "float32")
        for i in range(4 if per == "unit" else 1):
            w = np.asarray(tree["w"][:, i] if per == "unit" else tree["w"])
            want = exact.norm([w]) / exact.mpmath.sqrt(w.size)
            exact.check_norm(np.ravel(norm["w"])[i], want, "float32")


def test_the_count_of_rms_may_be_a_symbol() -> None:
    (n,) = jax.export.symbolic_shape("n")
    rms = jax.jit(lambda g: gradclip.norms(g, "rms", per=None))
    exported = jax.export.export(rms)([jax.ShapeDtypeStruct((n, 2), jnp.float32)])
    assert float(exported.call([jnp.full((8, 2), 3.0)])) == 3.0


@pytest.mark.sampled(2)
@pytest.mark.parametrize("p", [2.0, 1.0, "rms"])
@pytest.mark.parametrize("bad", [math.nan, INF])
def test_a_bad_float16_is_seen(bad: float, p: Any) -> None:
    """Its sums need no bins; they were taken to be in bins all the same, and the norm was 0."""
    x = jnp.float16([[3.0, bad], [4.0, 1.0]])
    for per, want in ((None, [False]), ("unit", [True, False]), ("example", [False, True])):
        assert np.isfinite(np.ravel(gradclip.norms(x, p, per=per))).tolist() == want


# -- clips -------------------------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("per", ["unit", "example"])
def test_what_is_in_one_group_is_not_in_others(per: str, dtype: str) -> None:
    x = np.array([[3.0, 0.5, 1.0], [4.0, -0.0, 2.0]])  # as units: norms 5, 0.5, sqrt 5
    x = x.T if per == "example" else x
    x[(2, 0) if per == "example" else (0, 2)] = np.nan
    x = jnp.asarray(x, dtype)
    for f in (lambda g: g, jax.jit):
        grads, norm = f(lambda g: tuple(gradclip.clip_grad_norm(g, 1.0, per=per, nonfinite="zero")))([x])
        got, came = (np.asarray(y).T if per == "example" else np.asarray(y) for y in (grads[0], x))
        norm = np.ravel(norm if per == "example" else norm[0])
        assert norm[:2].tolist() == [5.0, 0.5]
        assert np.isnan(norm[2])
        np.testing.assert_allclose(
            got[:, 0].astype(np.float64), [0.6, 0.8], rtol=2.0 ** (-8 if dtype != "float32" else -23)
        )
        assert got[:, 1].tobytes() == came[:, 1].tobytes()
        assert not got[:, 2].any()


def test_units_of_many_leaves_get_their_own_factors() -> None:
    """So many that XLA's CPU compiler is given offsets that it does not know."""
    tree = [normal(2 + i % 3, 1 + i % 4, seed=i) if i % 3 else normal(5, seed=i) for i in range(40)]
    grads, norm = jax.jit(lambda g: tuple(gradclip.clip_grad_norm(g, 0.75, per="unit")))(tree)
    for x, got, its in zip(tree, grads, norm, strict=True):
        wide = np.asarray(x, np.float64)
        want = np.sqrt((wide**2).sum(axis=0, keepdims=True)) if x.ndim == 2 else np.sqrt((wide**2).sum())
        np.testing.assert_allclose(its, want, rtol=1e-6)
        np.testing.assert_allclose(got, wide * np.minimum(1, 0.75 / want), rtol=1e-6)


@pytest.mark.full
def test_vmap_of_units_and_of_the_clipped_sum() -> None:
    tree = {"w": normal(3, 4, 5), "b": normal(3, 4, seed=1)}
    for f in (
        lambda g: tuple(gradclip.clip_grad_norm(g, 0.5, per="unit")),
        lambda g: tuple(gradclip.clipped_sum(g, 0.5)),
        lambda g: tuple(gradclip.clip_grad_agc(g, g, 0.5, "rms")),
    ):
        rows = jax.vmap(f)(tree)
        for i in range(3):
            one = f({k: x[i] for k, x in tree.items()})
            for a, b in zip(jax.tree.leaves(rows), jax.tree.leaves(one), strict=True):
                np.testing.assert_allclose(a[i], b, rtol=2e-6, atol=1e-7)


def test_adaptive_clipping_by_the_formula_of_the_paper() -> None:
    """Brock, De, Smith, Simonyan (2021), equation 3."""
    g, w = normal(6, 4), normal(6, 4, seed=1).at[:, 2].set(0)
    clipped, norm = jax.jit(gradclip.clip_grad_agc, static_argnames=())({"w": g}, {"w": w}, 0.1)
    wide, by = np.asarray(g, np.float64), np.asarray(w, np.float64)
    norms, bounds = (np.sqrt((x**2).sum(axis=0, keepdims=True)) for x in (wide, by))
    np.testing.assert_allclose(norm["w"], norms, rtol=1e-6)
    np.testing.assert_allclose(clipped["w"], wide * np.minimum(1, 0.1 * np.maximum(bounds, 1e-3) / norms), rtol=1e-6)


# -- the clipped sum ---------------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
@pytest.mark.parametrize("n", [2, 7, 8])
def test_the_clipped_sum(n: int, dtype: str) -> None:
    leaves = [normal(n, 3, 2).astype(dtype), normal(n, seed=1).astype(dtype)]
    leaves[0] = leaves[0].at[1, 0, 0].set(jnp.nan)
    for f in (lambda g: g, jax.jit):
        total, norm = f(lambda g: tuple(gradclip.clipped_sum(g, 0.5)))(leaves)
        assert [x.dtype.name for x in total] == ["complex64" if dtype == "complex64" else "float32"] * 2
        assert np.isnan(norm).tolist() == [i == 1 for i in range(n)]
        wide = [np.asarray(x).astype(np.complex128) for x in leaves]
        norms = np.sqrt(sum((abs(x.reshape(n, -1)) ** 2).sum(axis=1) for x in wide))
        factors = np.where(np.arange(n) == 1, 0, np.minimum(1, 0.5 / norms))
        for got, x in zip(total, wide, strict=True):
            x[1] = 0
            np.testing.assert_allclose(got, np.einsum("b,b...->...", factors, x), rtol=1e-5, atol=1e-5)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("bound", [1e-3, 1e-25, 1e25])
def test_one_example_adds_at_most_the_bound(bound: float, scale: float) -> None:
    """In exact arithmetic."""
    for seed in range(5):
        x = normal(1, 50, seed=seed) * scale
        (total,), _ = gradclip.clipped_sum([x], bound)
        assert sum(Fraction(float(y)) ** 2 for y in np.asarray(total)) <= Fraction(bound) ** 2


def test_shifted_factors_in_a_clipped_sum() -> None:
    """The factor of 3e38 to 1e-3 is no normal float32, and the sum is right all the same."""
    x = jnp.float32([[3e38, 0], [0, 2e-3], [5e-4, 5e-4]])
    for f in (lambda g: g, jax.jit):
        (total,), _ = f(lambda g: tuple(gradclip.clipped_sum(g, 1e-3)))([x])
        np.testing.assert_allclose(total, [1.5e-3, 1.5e-3], rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)])
def test_a_clipped_sum_of_nothing(shape: tuple[int, ...]) -> None:
    (total,), norm = jax.jit(lambda g: tuple(gradclip.clipped_sum(g, 1.0)))([jnp.zeros(shape)])
    assert total.tolist() == [0.0] * shape[1]
    assert norm.tolist() == [0.0] * shape[0]


#: What XLA writes out is its own affair: that of jaxlib 0.8 writes out products, that of 0.10.2 does not.
reads_only = pytest.mark.skipif(not PLAIN_IS_EXACT, reason="an XLA before 0.10.2 stores what it could fuse")


@reads_only
@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_product_is_stored(dtype: str) -> None:
    """What a program keeps beside its arguments and results is far less than the gradients."""
    leaves = [jax.ShapeDtypeStruct((64, 50, 100), dtype)] * 3
    program = compiled(lambda g: tuple(gradclip.clipped_sum(g, 1.0)), leaves)
    size = sum(x.size * x.dtype.itemsize for x in leaves)
    assert program.memory_analysis().temp_size_in_bytes < size / 8


@reads_only
def test_a_clip_of_bfloat16_examples_stores_nothing_wide() -> None:
    leaf = jax.ShapeDtypeStruct((64, 500, 100), jnp.bfloat16)
    program = compiled(lambda g: tuple(gradclip.clip_grad_norm(g, 1.0, per="example")), [leaf])
    assert program.memory_analysis().temp_size_in_bytes < leaf.size / 8


def test_another_bound_compiles_nothing_anew() -> None:
    traces = []

    @jax.jit
    def run(g: Any, c: Any) -> Any:
        traces.append(c)
        return gradclip.clipped_sum(g, c)[0], gradclip.clip_grad_norm(g, c, per="unit")[0]

    for c in (0.5, 1.0, 2.0):
        jax.block_until_ready(run([normal(4, 3)], c))
    assert len(traces) == 1


# -- derivatives -------------------------------------------------------------------------------------------

TREE = {"w": (4, 3), "b": (4,)}


def naive(how: str, grads: Any, params: Any) -> Any:
    """The same by the formulas, for `jax` to differentiate in float64."""

    def norm(x: Any, y: Any = None) -> Any:
        if how == "sum":
            return jnp.sqrt(sum(jnp.sum(v.reshape(4, -1) ** 2, axis=1) for v in grads.values()))
        axes = 0 if x.ndim > 1 else None
        n = jnp.sqrt(jnp.sum(x**2, axis=axes, keepdims=True))
        return n / math.sqrt(4) if how == "rms" else n

    out = {}
    for k, x in grads.items():
        bound = 0.3 * jnp.maximum(norm(params[k]), 1e-3) if how == "agc" else 0.75
        factor = jnp.minimum(1.0, bound / norm(x))
        out[k] = jnp.tensordot(factor, x, 1) if how == "sum" else x * factor
    return out


def clipped(how: str, grads: Any, params: Any) -> Any:
    if how == "agc":
        return gradclip.clip_grad_agc(grads, params, 0.3)[0]
    if how == "sum":
        return gradclip.clipped_sum(grads, 0.75)[0]
    return gradclip.clip_grad_norm(grads, 0.75, "rms" if how == "rms" else 2.0, per="unit")[0]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("how", ["unit", "rms", "agc", "sum"])
def test_derivatives_are_those_of_the_formula(how: str) -> None:
    jax.config.update("jax_enable_x64", True)

    def tree(seed: int) -> Any:
        return {k: normal(*s, seed=seed + i, dtype="float64") for i, (k, s) in enumerate(TREE.items())}

    at, to = (tree(0), tree(2)), (tree(4), tree(6))
    results = []
    for f in (naive, clipped):
        out, along = jax.jit(lambda at, to, f=f: jax.jvp(partial(f, how), at, to))(at, to)
        _, back = jax.vjp(partial(f, how), *at)
        results.append((out, along, back({k: jnp.cos(x) for k, x in out.items()})))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)  # of a clipped sum, the bound is a little lower


@pytest.mark.sampled(2)
@pytest.mark.parametrize("how", ["unit", "rms", "agc", "sum"])
def test_derivatives_at_zeros_and_beside_nan_are_numbers(how: str) -> None:
    """Groups of zeros have the identity's derivative; and those of other examples are not those of a bad one."""
    grads = {"w": normal(4, 3).at[:, 1].set(0).at[2].set(0), "b": jnp.zeros(4)}
    slopes = jax.grad(lambda g: sum(jnp.sum(x) for x in clipped(how, g, jax.tree.map(jnp.zeros_like, g)).values()))(
        grads
    )
    assert all(np.isfinite(x).all() for x in slopes.values())
    if how == "sum":
        bad = {**grads, "w": grads["w"].at[0, 0].set(jnp.nan)}
        slopes = jax.grad(lambda g: sum(jnp.sum(x) for x in gradclip.clipped_sum(g, 0.75).sum.values()))(bad)
        assert np.isfinite(slopes["w"][1:]).all()
        assert np.isfinite(slopes["b"][1:]).all()


# -- shards ------------------------------------------------------------------------------------------------


def families(all_reduce: Any) -> dict[str, Any]:
    reduce = {} if all_reduce is None else {"all_reduce": all_reduce}
    return {
        "unit": lambda g: gradclip.clip_grad_norm(g, 0.5, per="unit", **reduce)[0],
        "rms": lambda g: gradclip.clip_grad_norm(g, 0.5, "rms", per="leaf", **reduce)[0],
        "labels": lambda g: gradclip.clip_grad_norm(g, 0.5, per={"w": 1, "b": 2}, **reduce)[0],
        "agc": lambda g: gradclip.clip_grad_agc(g, {k: 2 * x for k, x in g.items()}, **reduce)[0],
        "agc of constants": lambda g: gradclip.clip_grad_agc(g, {k: jnp.ones_like(x) for k, x in g.items()}, **reduce)[
            0
        ],
    }


@pytest.mark.sampled(2)
@pytest.mark.parametrize("how", families(None))
def test_one_collective_in_shard_map(mesh: Any, how: str) -> None:
    specs = {"w": P("d"), "b": P()}
    tree = {"w": normal(8, 3), "b": normal(5, seed=1)}
    f = jax.shard_map(
        families(psum("d", varying=specs) if "constants" in how else psum("d"))[how],
        mesh=mesh,
        in_specs=(specs,),
        out_specs=specs,
    )
    assert crossings(compiled(f, tree)) == {"all-reduce": 1}
    for got, want in zip(*map(jax.tree.leaves, (jax.jit(f)(tree), families(None)[how](tree))), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-6)


def test_examples_whose_gradients_are_spread(mesh: Any) -> None:
    """Tensor parallel: each shard holds a part of every example's gradient, and of one leaf a copy."""
    specs, tree = {"w": P(None, "d"), "b": P()}, {"w": normal(6, 8), "b": normal(6, 2, seed=1)}
    run = lambda g, **reduce: tuple(gradclip.clipped_sum(g, 0.5, **reduce))  # noqa: E731
    f = jax.shard_map(
        lambda g: run(g, all_reduce=psum("d")), mesh=mesh, in_specs=(specs,), out_specs=({"w": P("d"), "b": P()}, P())
    )
    assert crossings(compiled(f, tree)) == {"all-reduce": 1}
    for got, want in zip(*map(jax.tree.leaves, (jax.jit(f)(tree), run(tree))), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-7)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_under_jit_only_reductions_cross_devices(mesh: Any, kind: str) -> None:
    """Norms of units that are spread themselves are gathered, once: numbers of groups, never of elements."""
    named = jax.sharding.Mesh(mesh.devices, ("d",), axis_types=(getattr(jax.sharding.AxisType, kind),))

    def shapes(*leaves: tuple[tuple[int, ...], Any]) -> Any:
        return [jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(named, spec)) for s, spec in leaves]

    examples = shapes(((64, 8), P("d")), ((64, 16, 8), P("d")), ((64,), P("d")))
    for f in (
        lambda g: gradclip.clipped_sum(g, 1.0).sum,
        lambda g: gradclip.clip_grad_norm(g, 1.0, per="example").grads,
    ):
        assert set(crossings(compiled(f, examples))) <= {"all-reduce"}
    units = shapes(((64, 8), P("d")), ((64, 128), P(None, "d")), ((3, 3, 16, 8), P(None, None, "d")), ((16,), P("d")))
    program = compiled(lambda g: gradclip.clip_grad_norm(g, 1.0, per="unit").grads, units)
    assert crossings(program) == {"all-reduce": 1, "all-gather": 1}
    assert re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", program.as_text()) == ["128"]

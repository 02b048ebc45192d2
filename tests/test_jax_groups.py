"""JAX: norms and clips of groups, per leaf and by labels. Under transforms, differentiated, sharded."""

from __future__ import annotations

import math
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
from jax.sharding import PartitionSpec as P  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

pytestmark = [pytest.mark.library("jax"), pytest.mark.usefixtures("strict_jax")]

INF = math.inf
ORDERS = (2.0, 1.0, 3.0, 0.5, INF, -INF, 0.0, -2.0)
LABELS = {"w": "a", "b": "b", "deep": ["a", None], "h": "b"}


@pytest.fixture(scope="module")
def mesh() -> Any:
    return mesh_of(("data", 4))


def gradients(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def leaf(*shape: int, dtype: str = "float32") -> Any:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    return {"w": leaf(3, 4), "b": leaf(4), "deep": [leaf(12), leaf(100, 100)], "h": leaf(4, dtype="bfloat16")}


def label(path: str, leaf: Any) -> str | None:
    return None if "[1]" in path else "b" if path in ("grads['b']", "grads['h']") else "a"


def by_label(tree: Any) -> dict[str, list[np.ndarray]]:
    return {"a": [np.asarray(tree["w"]), np.asarray(tree["deep"][0])], "b": [np.asarray(tree[k]) for k in "bh"]}


def transformed(f: Any, how: str) -> Any:
    return {"eager": f, "jit": jax.jit(f)}[how]


@pytest.mark.parametrize("how", ["eager", "jit"])
@pytest.mark.parametrize("p", ORDERS)
def test_every_leaf_by_itself(p: float, how: str) -> None:
    tree = gradients()
    bounds = {"w": 0.5, "b": 1e9, "deep": 0.25, "h": 0.0}  # a prefix
    grads, norm = transformed(lambda g: gradclip.clip_grad_norm(g, bounds, p, per="leaf"), how)(tree)
    assert jax.tree.structure(norm) == jax.tree.structure(tree)
    each = {"w": 0.5, "b": 1e9, "deep": [0.25, 0.25], "h": 0.0}
    for got, n, x, bound in zip(*map(jax.tree.leaves, (grads, norm, tree, each)), strict=True):
        want = exact.norm([np.asarray(x)], p)
        exact.check_norm(n, want, "float32", 8)
        assert n.shape == ()
        assert got.dtype == x.dtype
        factor = min(1.0, float(bound / want)) if want else 1.0
        wide = np.asarray(x, np.float64)
        np.testing.assert_allclose(
            np.asarray(got, np.float64), wide * factor, rtol=2.0**-8 if x.dtype == jnp.bfloat16 else 1e-6
        )
    if p == 2:
        assert np.asarray(grads["b"]).tobytes() == np.asarray(tree["b"]).tobytes()


@pytest.mark.parametrize("per", [LABELS, label], ids=["tree", "function"])
@pytest.mark.parametrize("how", ["eager", "jit"])
@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, -INF])
def test_labels(p: float, how: str, per: Any) -> None:
    tree = gradients(1)
    clip = transformed(lambda g: gradclip.clip_grad_norm(g, {"a": 0.125, "b": 1e9}, p, per=per), how)
    grads, norm = clip(tree)
    for name, leaves in by_label(tree).items():
        exact.check_norm(norm[name], exact.norm(leaves, p), "float32", 8)
    factor = float(0.125 / exact.norm(by_label(tree)["a"], p))
    np.testing.assert_allclose(grads["w"], np.asarray(tree["w"], np.float64) * min(1, factor), rtol=1e-6)
    np.testing.assert_allclose(grads["deep"][0], np.asarray(tree["deep"][0], np.float64) * min(1, factor), rtol=1e-6)
    for got, x in ((grads["b"], tree["b"]), (grads["h"], tree["h"]), (grads["deep"][1], tree["deep"][1])):
        assert np.asarray(got).tobytes() == np.asarray(x).tobytes()


@pytest.mark.parametrize("n", [3, 40, 300])
def test_many_leaves_in_another_order_than_they_are_merged(n: int) -> None:
    rng = np.random.default_rng(n)
    host = [rng.standard_normal(int(rng.choice([1, 5, 64]))).astype(np.float32) for _ in range(n)]
    tree = [jnp.asarray(x) for x in host]
    for norm, x in zip(jax.jit(gradclip.norms)(tree), host, strict=True):
        exact.check_norm(norm, exact.norm([x]), "float32")
    labels = rng.integers(0, 7, n).tolist()
    for k, norm in gradclip.norms(tree, per=labels).items():
        exact.check_norm(norm, exact.norm([x for x, i in zip(host, labels, strict=True) if i == k]), "float32")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("how", ["eager", "jit"])
@pytest.mark.parametrize("bad", [math.nan, INF, 1e30, 1e-30, 3e38])
@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, INF])
def test_what_is_in_one_group_is_not_in_others(p: float, bad: float, how: str) -> None:
    tree = gradients(2)
    spoilt = {**tree, "w": tree["w"].at[1, 2].set(bad)}
    for per in ("leaf", LABELS):
        clip = transformed(lambda g, per=per: tuple(gradclip.clip_grad_norm(g, 0.5, p, per=per, nonfinite="zero")), how)
        (clean, clean_norm), (grads, norm) = clip(tree), clip(spoilt)
        others = ("b", "h") if per == LABELS else ("b", "h", "deep")
        for key in others:
            for a, b in zip(jax.tree.leaves(grads[key]), jax.tree.leaves(clean[key]), strict=True):
                np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=5e-7)
        np.testing.assert_allclose(*(float(x["b"]) for x in (norm, clean_norm)), rtol=5e-7)
        if math.isfinite(bad):
            mine = spoilt if per == "leaf" else {"w": spoilt["w"], "deep": spoilt["deep"][0]}
            want = exact.norm([np.asarray(x) for x in ([mine["w"]] if per == "leaf" else mine.values())], p)
            exact.check_norm(norm["w" if per == "leaf" else "a"], want, "float32", 8)
            np.testing.assert_allclose(grads["w"][1, 2], float(0.5 / want * np.float32(bad)), rtol=1e-6)
        else:
            assert not np.asarray(grads["w"]).any()


def test_mixed_dtypes_have_norms_of_their_own() -> None:
    jax.config.update("jax_enable_x64", True)
    tree = {
        "d": jnp.array([3e200, 4e200]),
        "s": jnp.float32([3, 4]),
        "c": jnp.complex64([3 + 4j]),
        "h": jnp.float16([300]),
    }
    for f in (gradclip.norms, jax.jit(gradclip.norms)):
        norm = f(tree)
        assert {k: x.dtype.name for k, x in norm.items()} == {
            "d": "float64",
            "s": "float32",
            "c": "float32",
            "h": "float32",
        }
        assert {k: float(x) / 1e200 if k == "d" else float(x) for k, x in norm.items()} == {
            "d": pytest.approx(5, rel=1e-15),
            "s": 5.0,
            "c": 5.0,
            "h": 300.0,
        }


def test_vmap_of_leaves() -> None:
    tree = gradients(3)
    rows = jax.tree.map(lambda x: jnp.stack([x, 100 * x, 0 * x]), tree)
    grads, norm = jax.vmap(lambda g: tuple(gradclip.clip_grad_norm(g, 0.5, per="leaf")))(rows)
    for i in range(3):
        one, its = gradclip.clip_grad_norm(jax.tree.map(lambda x, i=i: x[i], rows), 0.5, per="leaf")
        for a, b in zip(jax.tree.leaves((grads, norm)), jax.tree.leaves((one, its)), strict=True):
            np.testing.assert_allclose(np.asarray(a[i], np.float64), np.asarray(b, np.float64), rtol=1e-6)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, INF])
def test_derivatives_are_those_of_each_group_alone(p: float, transform: Any) -> None:
    tree = {k: v for k, v in gradients(4).items() if k != "h"}
    per = {"w": "a", "b": "b", "deep": "a"}

    def loss_of(clip: Any) -> Any:
        def loss(g: Any) -> Any:
            grads, norms = clip(g)
            return sum(jnp.sum(jnp.sin(3 * x)) for x in jax.tree.leaves(grads)) + 2 * norms["a"] + 3 * norms["b"]

        return transform(jax.grad(loss))(tree)

    def apart(g: Any) -> Any:
        (w, deep), a = gradclip.clip_grad_norm([g["w"], g["deep"]], 0.25, p)
        b, n = gradclip.clip_grad_norm(g["b"], 0.25, p)
        return {"w": w, "b": b, "deep": deep}, {"a": a, "b": n}

    got = loss_of(lambda g: gradclip.clip_grad_norm(g, 0.25, p, per=per))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(loss_of(apart)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.full
def test_derivatives_numerically() -> None:
    jax.config.update("jax_enable_x64", True)
    tree = {"a": jnp.array([3.0, -4.0]), "b": jnp.array([[0.7]]), "c": jnp.array([1.0, 2.0])}
    clip = jax.jit(lambda g, c: gradclip.clip_grad_norm(g, c, per={"a": 0, "b": 1, "c": 0})[0])
    check_grads(clip, (tree, {0: 0.25, 1: 100.0}), order=2, modes=("fwd", "rev"))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("p", ORDERS)
def test_groups_of_shards(mesh: Any, p: float) -> None:
    """Sharded leaves are summed over all devices, replicated ones count once, in each group of theirs."""
    rng = np.random.default_rng(5)
    tree = {
        "w": jnp.asarray(rng.standard_normal((8, 3)), jnp.float32),
        "b": jnp.asarray(rng.standard_normal(5), jnp.float32),
    }
    tree["v"] = jnp.asarray(rng.standard_normal(12), jnp.float32)
    specs = {"w": P("data"), "b": P(), "v": P("data")}
    for per, names in (("leaf", {"w": "w", "b": "b", "v": "v"}), ({"w": 0, "b": 0, "v": 1}, {0: "wb", 1: "v"})):

        def clip(g: Any, per: Any = per) -> Any:
            return tuple(gradclip.clip_grad_norm(g, 0.25, p, per=per, all_reduce=psum("data")))

        out = (specs, {k: P() for k in names})
        grads, norm = jax.jit(jax.shard_map(clip, mesh=mesh, in_specs=(specs,), out_specs=out))(tree)
        for key, members in names.items():
            want = exact.norm([np.asarray(tree[k]) for k in members], p)
            exact.check_norm(norm[key], want, "float32", 8)
            for k in members:
                np.testing.assert_allclose(
                    grads[k], np.asarray(tree[k], np.float64) * min(1, float(0.25 / want)), rtol=1e-6
                )

        def slope(f: Any) -> Any:
            return jax.jit(jax.grad(lambda g: sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(f(g)))))(tree)

        if p in (2.0, 3.0, INF):
            mine = slope(jax.shard_map(clip, mesh=mesh, in_specs=(specs,), out_specs=out))
            whole = slope(lambda g, per=per: tuple(gradclip.clip_grad_norm(g, 0.25, p, per=per)))
            for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(whole), strict=True):
                np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_leaves_on_several_devices() -> None:
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices")
    tree = [jax.device_put(jnp.float32(x), jax.devices()[i]) for x, i in (([3, 4], 1), ([5, 12], 2), ([8, 15], 1))]
    grads, norm = gradclip.clip_grad_norm(tree, [1.0, 13.0, 1.7], per="leaf")
    assert [float(x) for x in norm] == [5.0, 13.0, 17.0]
    for got, x, want in zip(grads, tree, ([0.6, 0.8], [5, 12], [0.8, 1.5]), strict=True):
        assert got.sharding == x.sharding
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_the_error_policy_names_the_leaves() -> None:
    tree = {"w": jnp.array([3.0, jnp.nan]), "b": jnp.ones(3)}
    with pytest.raises(gradclip.NonFiniteError, match=r"grads\['w'\] \(float32.*1 NaN, 0 inf") as caught:
        gradclip.clip_grad_norm(tree, 1.0, per="leaf", nonfinite="error")
    assert [c.path for c in caught.value.culprits] == ["grads['w']"]
    clip = checkify.checkify(jax.jit(lambda g: gradclip.clip_grad_norm(g, 1.0, per="leaf", nonfinite="error")))
    assert "grads['w']" in clip(tree)[0].get()
    assert clip({"w": jnp.ones(2), "b": jnp.ones(3)})[0].get() is None

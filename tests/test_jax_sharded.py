"""JAX: what crosses devices under `jax.jit` with sharded leaves: a few all-reduces of a few numbers, never a leaf."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest

import exact
import gradclip
from meshes import mesh_of

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

pytestmark = pytest.mark.library("jax")

SHARDED, OTHERWISE, WHOLE = P("d"), P(None, "d"), P()

TREES: dict[str, list[tuple[tuple[int, ...], Any]]] = {
    "one": [((1024, 64), SHARDED)],
    "one small": [((16,), SHARDED)],
    "12 weights and 12 biases": [((768, 768), SHARDED), ((768,), SHARDED)] * 6
    + [((768, 3072), OTHERWISE), ((3072,), SHARDED)] * 6,
    "all sorts": [
        *(((64, 64), spec) for spec in (SHARDED, OTHERWISE, WHOLE)),
        *(((512, 512), spec) for spec in (SHARDED, WHOLE)),
        *(((128,), spec) for spec in (SHARDED, WHOLE)),
        ((), WHOLE),
        ((3,), WHOLE),
    ],
    "1,000 of them": [((1024,), SHARDED)] * 1000,
    "1,000, some of them whole": [((64,), SHARDED if i % 3 else WHOLE) for i in range(1000)],
}


@pytest.fixture(scope="module")
def mesh() -> Any:
    return mesh_of(("d", 4))


def crossings(text: str) -> Counter[str]:
    """The collectives of a compiled program."""
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    return Counter(re.findall(rf" ({names})(?:-start)?\(", text))


@pytest.mark.sampled(7)
@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("p", [2.0, 1.0, float("inf"), 3.0])
def test_only_reductions_cross_devices(mesh: Any, name: str, p: float) -> None:
    if p != 2 and len(TREES[name]) > 100:
        pytest.skip("takes long to compile")
    tree = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for shape, spec in TREES[name]]
    clip = jax.jit(lambda g: gradclip.clip_grad_norm(g, 1.0, p))
    found = crossings(clip.lower(tree).compile().as_text())
    assert set(found) == {"all-reduce"}, found
    assert found["all-reduce"] <= (2 if p != 3 else 4), found


@pytest.mark.parametrize("name", ["12 weights and 12 biases", "all sorts"])
def test_only_reductions_cross_devices_for_norms_of_groups(mesh: Any, name: str) -> None:
    tree = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for shape, spec in TREES[name]]
    for per in ("leaf", [len(shape) for shape, _ in TREES[name]]):
        clip = jax.jit(lambda g, per=per: gradclip.clip_grad_norm(g, 1.0, per=per))
        found = crossings(clip.lower(tree).compile().as_text())
        assert set(found) == {"all-reduce"}, found
        assert found["all-reduce"] <= 2, found


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_sharded_norms_are_exact(mesh: Any, dtype: str) -> None:
    rng = np.random.default_rng(0)
    host = [rng.standard_normal(shape) * 10.0 ** rng.integers(-20, 20) for shape, _ in TREES["all sorts"]]
    host = [np.asarray(jnp.asarray(x, jnp.float32).astype(dtype)) for x in host]
    tree = [jax.device_put(x, NamedSharding(mesh, spec)) for x, (_, spec) in zip(host, TREES["all sorts"], strict=True)]
    exact.check_norm(jax.jit(gradclip.global_norm)(tree), exact.norm(host), "float32")
    for norm, x in zip(gradclip.norms(tree), host, strict=True):
        exact.check_norm(norm, exact.norm([x]), "float32")


@pytest.mark.parametrize("vma", [True, False])
def test_large_shards_are_clipped_exactly(vma: bool) -> None:
    """Under `shard_map`, more elements on each device than are added up in float64 at once."""
    mesh, rng, bound = mesh_of(("d", 4)), np.random.default_rng(1), 0.5
    host = [np.asarray(rng.standard_normal(shape), np.float32) for shape in ((512, 320), (1024, 128), (64,))]
    assert sum(x.size for x in host) // 4 > 1 << 16
    out_specs = ([SHARDED] * len(host), WHOLE)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=SHARDED, out_specs=out_specs, check_vma=vma)
    def clip(*tree: Any) -> Any:
        found = gradclip.clip_grad_norm(list(tree), bound, all_reduce=lambda x, op: jax.lax.psum(x, "d"))
        return found.grads, found.norm

    grads, norm = clip(*host)
    want = math.sqrt(math.fsum(float((x.astype(np.float64) ** 2).sum()) for x in host))
    exact.check_norm(norm, want, "float32")
    for got, x in zip(grads, host, strict=True):
        np.testing.assert_allclose(got, x.astype(np.float64) * (bound / want), rtol=2**-21, atol=0)

"""JAX without `jit`: what a call starts and compiles, where its results are, and leaves that share a program."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import exact
import gradclip
from meshes import strict_jax  # noqa: F401

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

pytestmark = [pytest.mark.library("jax"), pytest.mark.usefixtures("strict_jax")]

#: More than two shares of one shape, some of another, and one that is alone.
MANY = [(7,)] * 230 + [(2, 3)] * 40 + [()] + [(7,)] * 20


def leaves(shapes: list[tuple[int, ...]], seed: int = 0, dtype: str = "float32") -> list[Any]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is compiled from now on."""
    found: list[str] = []

    def listen(event: str, seconds: float, **details: Any) -> None:
        if event.endswith("backend_compile_duration"):
            found.append(event)

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    return found


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, math.inf, -math.inf, 0.0, "rms"])
def test_many_leaves_are_clipped_as_one_vector(p: Any, dtype: str) -> None:
    many = leaves(MANY, dtype=dtype)
    norm = gradclip.global_norm(many, p)
    wanted = exact.norm([np.asarray(x) for x in many], 2.0 if p == "rms" else p)
    if p == "rms":
        wanted = wanted / math.sqrt(sum(x.size for x in many))
    exact.check_norm(norm, wanted, "float32", 8)
    out = gradclip.clip_grad_norm(many, float(norm) / 4, p)
    exact.check_norm(out.norm, wanted, "float32", 8)
    tolerance = 2.0**-8 if dtype == "bfloat16" else 1e-6
    for got, x in zip(out.grads, many, strict=True):
        assert (got.shape, got.dtype) == (x.shape, x.dtype)
        want = np.asarray(x).astype(np.complex128) / 4
        np.testing.assert_allclose(np.asarray(got).astype(np.complex128), want, rtol=tolerance)


def test_many_leaves_that_are_not_clipped_keep_every_bit() -> None:
    many = leaves(MANY)
    kept = gradclip.clip_grad_norm(many, 1e6)
    for got, x in zip(kept.grads, many, strict=True):
        assert np.asarray(got).tobytes() == np.asarray(x).tobytes()


@pytest.mark.parametrize("where", [0, 150, 229, 269, 270, 290])
def test_a_bad_element_in_any_share_is_met_in_all(where: int) -> None:
    many = leaves(MANY)
    many[where] = jnp.full_like(many[where], math.inf)
    assert all(np.isnan(x).all() for x in gradclip.clip_grad_norm(many, 1.0).grads)
    assert not any(np.asarray(x).any() for x in gradclip.clip_grad_norm(many, 1.0, nonfinite="zero").grads)
    with pytest.raises(gradclip.NonFiniteError, match=rf"grads\[{where}\]"):
        gradclip.clip_grad_norm(many, 1.0, nonfinite="error")


def test_magnitudes_of_all_shares_join() -> None:
    many = [jnp.full(7, 1e-30 if i < 100 else 1e30 if i < 200 else 1.0, jnp.float32) for i in range(290)]
    out = gradclip.clip_grad_norm(many, 1.0)
    wanted = exact.norm([np.asarray(x) for x in many])
    exact.check_norm(out.norm, wanted, "float32")
    np.testing.assert_allclose(out.grads[100], 1e30 / float(wanted), rtol=1e-6)


def test_leaves_of_one_shape_share_programs(compiled: list[str]) -> None:
    """Twice as many leaves compile nothing new, but the program that joins the shares."""
    jax.block_until_ready(gradclip.clip_grad_norm(leaves([(31,)] * 200), 1.0))
    first = len(compiled)
    assert first
    more = leaves([(31,)] * 400)
    compiled.clear()
    jax.block_until_ready(gradclip.clip_grad_norm(more, 0.5))
    assert len(compiled) == 1


def test_a_small_tree_is_clipped_by_one_program(compiled: list[str]) -> None:
    few = leaves([(5, 3), (3,), ()])
    compiled.clear()
    jax.block_until_ready(gradclip.clip_grad_norm(few, 1.0, divide_by=2.0, nonfinite="zero"))
    assert len(compiled) == 1
    jax.block_until_ready(gradclip.clip_grad_norm(few, 0.25, divide_by=4.0, nonfinite="zero"))
    assert len(compiled) == 1
    jax.block_until_ready(gradclip.norms(few))
    assert len(compiled) == 2


@pytest.mark.parametrize("shapes", [[(4,), (2, 2)], MANY], ids=["few", "many"])
@pytest.mark.parametrize("options", [{}, {"norm": 3.0}, {"divide_by": 2.0}, {"nonfinite": "error"}], ids=str)
def test_results_are_where_the_leaves_are(shapes: list[tuple[int, ...]], options: dict[str, Any]) -> None:
    """Also of arrays that were made on a device and not put there, while another one is JAX's default."""
    if len(jax.devices()) < 2:
        pytest.skip("needs 2 devices")
    here, there = jax.devices()[:2]
    with jax.default_device(there):
        made = leaves(shapes)
    assert not made[0].committed
    for default in (None, here, there):
        with jax.default_device(default):
            out = gradclip.clip_grad_norm(made, 1.0, **options)
            norm = gradclip.global_norm(made)
        assert {d for x in [*out.grads, norm] for d in x.devices()} == {there}
        assert out.norm.devices() == {there}


def test_a_bound_that_is_differentiated_while_the_leaves_are_not() -> None:
    """d/dc of sum(c g / ||g||) = sum(g) / ||g||."""
    g = jnp.array([3.0, 4.0])
    slope = jax.grad(lambda c: jnp.sum(gradclip.clip_grad_norm([g], c).grads[0]))(1.0)
    np.testing.assert_allclose(slope, 1.4, rtol=1e-6)


def test_leaves_that_a_traced_function_holds() -> None:
    g = [jnp.array([3.0, 4.0])]
    out = jax.jit(lambda: gradclip.clip_grad_norm(g, 1.0))()
    np.testing.assert_allclose(out.grads[0], [0.6, 0.8], rtol=1e-6)
    rows = jax.vmap(lambda c: gradclip.clip_grad_norm(g, c).grads[0])(jnp.array([1.0, 10.0]))
    np.testing.assert_allclose(rows, [[0.6, 0.8], [3.0, 4.0]], rtol=1e-6)


@pytest.mark.parametrize("bound", [0.0, 1e-44, 1e-300, 5e-324, 1e300, math.inf, 3])
def test_numbers_of_the_host_beyond_float32(bound: float) -> None:
    g = jnp.array([3.0, 4.0])
    out = gradclip.clip_grad_norm([g], bound)
    want = np.array([3.0, 4.0]) * min(1.0, bound / 5)
    normal = np.where(want < np.finfo(np.float32).smallest_normal, 0, want)  # XLA may flush what is below
    np.testing.assert_allclose(out.grads[0], normal, rtol=1e-6, atol=float(np.finfo(np.float32).smallest_normal))


def test_deleted_leaves_are_refused() -> None:
    g = jnp.array([3.0, 4.0])
    g.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        gradclip.clip_grad_norm([g], 1.0)

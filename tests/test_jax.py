"""What is particular to JAX: transforms, tracing, derivatives, shardings, dtypes, and what XLA does to arithmetic."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import mpmath
import numpy as np
import pytest

import exact
import gradclip
from backends import np_dtype
from meshes import mesh_of, strict_jax  # noqa: F401

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
from jax import export  # noqa: E402
from jax.experimental import checkify  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

from gradclip._backends.jax.sums import PLAIN_IS_EXACT  # noqa: E402

pytestmark = [pytest.mark.library("jax"), pytest.mark.usefixtures("strict_jax")]

INF = math.inf
ORDERS = (2.0, 1.0, 3.0, 0.5, INF, -INF, -2.0, 0.0)
COLLECTIVES = {"sum": jax.lax.psum, "max": jax.lax.pmax, "min": jax.lax.pmin}


@pytest.fixture
def x64(strict_jax: None) -> None:  # noqa: F811
    jax.config.update("jax_enable_x64", True)


def joined_over(axis: str) -> Any:
    return lambda partial, op: COLLECTIVES[op](partial, axis)


def same_bits(a: Any, b: Any) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def check_like(got: Any, leaf: Any) -> None:
    """Library, dtype, shape and place of a result are those of the leaf it came from."""
    assert isinstance(got, jax.Array)
    assert got.dtype == leaf.dtype
    assert got.shape == leaf.shape
    if isinstance(leaf, jax.Array):
        assert got.sharding.is_equivalent_to(leaf.sharding, got.ndim), (got.sharding, leaf.sharding)


def check_scalar(norm: Any, dtype: str = "float32") -> None:
    assert isinstance(norm, jax.Array)
    assert norm.shape == ()
    assert norm.dtype == dtype


# -- vmap, scan, jit ---------------------------------------------------------------------------------------


def test_vmap_clips_each_example_as_a_loop_does() -> None:
    rows = np.array(
        [[3, 4, 0, 0], [0.1, 0, 0, 0.2], [1e20, -2e20, 1e10, 0], [1e-30, 0, 0, 1e-30], [0, 0, 0, 0]], np.float32
    )
    bounds = np.array([1, 1, 5, 1e-31, 0], np.float32)
    batch = {"w": jnp.asarray(rows), "b": jnp.asarray(rows[:, :1] / 2)}

    got = jax.jit(jax.vmap(gradclip.clip_grad_norm))(batch, jnp.asarray(bounds))

    assert got.norm.shape == (5,)
    for i, bound in enumerate(bounds):
        row = {k: v[i] for k, v in batch.items()}
        one = gradclip.clip_grad_norm(row, bound)
        want = exact.norm([np.asarray(v) for v in row.values()])
        exact.check_norm(got.norm[i], want, "float32")
        for k in row:
            np.testing.assert_allclose(got.grads[k][i], one.grads[k], rtol=5e-7)
            assert got.grads[k].dtype == row[k].dtype
            factor = float(bound / want) if want > bound else 1.0
            np.testing.assert_allclose(got.grads[k][i], np.asarray(row[k], np.float64) * factor, rtol=1e-6)


def test_vmap_keeps_a_bad_example_to_itself() -> None:
    batch = jnp.array([[3.0, 4.0], [jnp.nan, 1.0], [jnp.inf, 1.0], [0.3, 0.4]])

    def clip(policy: str) -> Any:
        return jax.jit(jax.vmap(lambda g: gradclip.clip_grad_norm(g, 1.0, nonfinite=policy)))(batch).grads

    np.testing.assert_allclose(clip("zero"), [[0.6, 0.8], [0, 0], [0, 0], [0.3, 0.4]], rtol=1e-6)
    propagated = np.asarray(clip("propagate"))
    assert np.isnan(propagated[1:3]).all()
    np.testing.assert_allclose(propagated[::3], [[0.6, 0.8], [0.3, 0.4]], rtol=1e-6)


@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, INF, -INF, 0.0])
def test_vmap_with_a_named_axis_joins_the_examples(p: float) -> None:
    rows = np.array([[3, -4], [1, 0.5], [1e20, 2], [0.25, 7]], np.float32)

    @jax.jit
    @functools.partial(jax.vmap, axis_name="batch")
    def clip(g: Any) -> Any:
        return gradclip.clip_grad_norm([g], 0.125, p, all_reduce=joined_over("batch"))

    got = clip(jnp.asarray(rows))
    want = exact.norm([rows], p)
    for norm in got.norm:
        exact.check_norm(norm, want, "float32", 8)
    np.testing.assert_allclose(got.grads[0], rows.astype(np.float64) * float(0.125 / want), rtol=1e-6)
    assert got.grads[0].dtype == jnp.float32


@pytest.mark.sampled(5)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("bound", [1.0, 100.0])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "complex64"])
def test_both_modes_of_differentiation_on_every_dtype(dtype: str, bound: float, transform: Any) -> None:
    """Of sum(w * clip(g)): w (c / n) - g (c / n) <w, g> / n^2 where it clips, else w; n = 5."""
    g, w = jnp.asarray([3, 4], dtype), jnp.asarray([1, 2], dtype)

    def f(g: Any) -> Any:
        return jnp.real(jnp.sum(w * gradclip.clip_grad_norm([g], bound)[0][0])).astype(jnp.float32)

    want = np.array([1.0, 2.0]) if bound == 100 else (np.array([1.0, 2.0]) - np.array([3.0, 4.0]) * 11 / 25) / 5
    tolerance = {"bfloat16": 2.0**-7, "float16": 2.0**-10}.get(dtype, 1e-6)
    reverse = transform(jax.grad(f))(g)
    assert reverse.dtype == g.dtype
    np.testing.assert_allclose(np.asarray(reverse).real.astype(float), want, atol=tolerance)
    for i, basis in enumerate(jnp.eye(2, dtype=dtype)):
        forward = transform(lambda g, dg: jax.jvp(f, (g,), (dg,))[1])(g, basis)
        np.testing.assert_allclose(float(forward), want[i], atol=tolerance)


def test_scan_carries_clipped_gradients_of_the_same_type() -> None:
    def step(carry: Any, g: Any) -> Any:
        grads, norm = gradclip.clip_grad_norm({"m": carry["m"] + g}, 1.0)
        return grads, norm  # a plain pair: JAX 0.12 takes no named tuple from the body of a scan

    start = {"m": jnp.zeros(2, jnp.bfloat16)}
    end, norms = jax.lax.scan(step, start, jnp.full((4, 2), 3.0, jnp.bfloat16))
    assert end["m"].dtype == jnp.bfloat16
    assert norms.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(end["m"], np.float32), math.sqrt(0.5), rtol=2**-8)
    np.testing.assert_allclose(norms[0], math.sqrt(18), rtol=1e-6)


def test_a_weakly_typed_leaf_can_be_carried() -> None:
    weak = jnp.asarray(3.0)
    assert weak.weak_type
    end, _ = jax.lax.scan(lambda c, _: (gradclip.clip_grad_norm([c], 1.0).grads[0], None), weak, None, length=3)
    assert end.dtype == jnp.float32
    assert float(end) == 1.0
    assert gradclip.clip_grad_norm([weak], 5.0).grads[0] == 3.0


def test_shapes_are_known_without_values() -> None:
    tree = {"a": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16), "z": jax.ShapeDtypeStruct((0,), jnp.complex64)}
    out = jax.eval_shape(lambda g, c: gradclip.clip_grad_norm(g, c), tree, jax.ShapeDtypeStruct((), jnp.float32))
    assert {k: (v.shape, v.dtype) for k, v in out.grads.items()} == {k: (v.shape, v.dtype) for k, v in tree.items()}
    assert (out.norm.shape, out.norm.dtype) == ((), jnp.float32)

    jaxpr = jax.make_jaxpr(lambda g: gradclip.clip_grad_norm(g, 1.0))({"a": jnp.ones((2, 3), jnp.float16)})
    assert [(v.shape, v.dtype) for v in jaxpr.out_avals] == [((2, 3), jnp.float16), ((), jnp.float32)]


def test_donated_gradients() -> None:
    g = jnp.array([3.0, 4.0])
    out = jax.jit(lambda t: gradclip.clip_grad_norm(t, 1.0), donate_argnums=0)({"w": g})
    assert g.is_deleted()
    np.testing.assert_allclose(out.grads["w"], [0.6, 0.8], rtol=1e-6)
    assert float(out.norm) == 5.0


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int32", "weak"])
def test_traced_bounds(kind: str) -> None:
    clip = jax.jit(lambda g, c: gradclip.clip_grad_norm([g], c).grads[0])
    g = jnp.array([3.0, 4.0])

    def bound(x: float) -> Any:
        return x if kind == "weak" else jnp.asarray(x, kind)

    np.testing.assert_allclose(clip(g, bound(1)), [0.6, 0.8], rtol=1e-6)
    assert same_bits(clip(g, bound(5)), g)
    assert same_bits(clip(g, bound(0)), jnp.zeros(2))
    assert same_bits(clip(g, bound(-1)), jnp.zeros(2))
    if kind != "int32":
        assert same_bits(clip(g, bound(INF)), g)
        assert np.isnan(clip(g, bound(math.nan))).all()


def test_eager_bounds_on_the_device_act_as_traced_ones() -> None:
    g = jnp.array([3.0, 4.0])

    def clip(c: float) -> Any:
        return gradclip.clip_grad_norm([g], jnp.float32(c)).grads[0]

    np.testing.assert_allclose(clip(1), [0.6, 0.8], rtol=1e-6)
    assert same_bits(clip(INF), g)
    assert same_bits(clip(-1), jnp.zeros(2))
    assert np.isnan(clip(math.nan)).all()


def test_everything_traced_at_once() -> None:
    clip = jax.jit(lambda g, c, d: gradclip.clip_grad_norm([g], c, divide_by=d))
    g = jnp.array([30.0, 40.0])
    out = clip(g, 1.0, 10.0)
    np.testing.assert_allclose(out.grads[0], [0.6, 0.8], rtol=1e-6)
    assert float(out.norm) == 5.0
    np.testing.assert_allclose(clip(g, 7.0, 10.0).grads[0], [3, 4], rtol=1e-6)

    given = jax.jit(lambda g, n: gradclip.clip_grad_norm([g], 1.0, norm=n))(g, 100.0)
    np.testing.assert_allclose(given.grads[0], [0.3, 0.4], rtol=1e-6)
    assert float(given.norm) == 100.0


# -- tracing and compiling ---------------------------------------------------------------------------------

_COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **kw: _COMPILED.append(event) if event.endswith("backend_compile_duration") else None
)


def compiled() -> int:
    """How many programs XLA has compiled in this process."""
    return len(_COMPILED)


def test_jit_traces_once_for_all_values_and_bounds() -> None:
    traces = 0

    @jax.jit
    def clip(g: Any, c: Any) -> Any:
        nonlocal traces
        traces += 1
        return gradclip.clip_grad_norm(g, c)

    for value, bound in ((1.0, 1.0), (3e38, 2.0), (1e-30, INF), (0.0, 0.0), (math.nan, 1.0)):
        clip({"w": jnp.full(3, value), "b": [jnp.zeros(())]}, bound)
    assert traces == 1
    clip({"w": jnp.ones(4), "b": [jnp.zeros(())]}, 1.0)
    assert traces == 2


@pytest.mark.parametrize("policy", ["propagate", "zero", "error"])
def test_eager_calls_compile_once_for_all_values_and_bounds(policy: str) -> None:
    def clip(value: float, bound: Any, **kw: Any) -> Any:
        leaf = jnp.full(37 + len(policy), value)  # of another size for each policy: else much is compiled already
        return gradclip.clip_grad_norm({"w": leaf}, bound, nonfinite=policy, **kw).norm

    start = compiled()
    clip(1.0, 1.0)
    clip(1.0, jnp.float32(1.0), divide_by=2.0)
    first = compiled()
    assert first > start  # else the counter counts nothing
    for value, bound in ((2.0, 0.5), (3e38, INF), (0.0, 0.0)):
        clip(value, bound)
        clip(value, jnp.float32(bound), divide_by=bound + 1.0 if bound < INF else 3.0)
    assert compiled() == first


def test_eager_global_norm_and_value_compile_once() -> None:
    for value, bound in ((1.0, 1.0), (2.0, 0.5), (3e37, INF)):
        g = [jnp.full(41, value)]
        norm, clipped = gradclip.global_norm(g), gradclip.clip_grad_value(g, bound)
        if value == 1.0:
            first = compiled()
        np.testing.assert_allclose(norm, value * math.sqrt(41), rtol=1e-6)
        assert np.asarray(clipped[0]).tolist() == [np.float32(min(value, bound))] * 41
    assert compiled() == first


class Spy:
    """Counts how often the host reads the value of a JAX array."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        kind = type(jnp.ones(1))
        for name in (
            "__bool__", "__float__", "__int__", "__index__", "__complex__", "__array__", "__dlpack__", "__iter__",
            "item", "tolist",
        ):  # fmt: skip
            monkeypatch.setattr(kind, name, self.counting(getattr(kind, name)))

    def counting(self, method: Any) -> Any:
        def counted(array: Any, *args: Any, **kw: Any) -> Any:
            self.sizes.append(array.size)
            return method(array, *args, **kw)

        return counted


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the arrays that the host has read as Python numbers.

    On a CPU JAX's own transfer guard lets every read pass. NumPy reads through a buffer, unseen: but code
    that did so could not run under `jax.jit`, as the same code does in the tests above.
    """
    return Spy(monkeypatch).sizes


def test_the_spy_sees(reads: list[int]) -> None:
    assert float(jnp.float32(2)) == 2
    assert bool(jnp.ones(1) > 0)
    assert jnp.ones(3).tolist() == [1, 1, 1]
    assert reads == [1, 1, 3]


@pytest.mark.parametrize("p", [2.0, 1.0, 3.0])
def test_the_default_path_never_reads_a_value(reads: list[int], p: float) -> None:
    g = {"w": jnp.array([3.0, 4.0]), "h": jnp.ones(3, jnp.bfloat16), "e": jnp.zeros((0, 2))}
    bound = jnp.float32(1.0)
    results = [
        gradclip.global_norm(g, p),
        gradclip.clip_grad_norm(g, 1.0, p),
        gradclip.clip_grad_norm(g, bound, p, divide_by=jnp.float32(2.0)),
        gradclip.clip_grad_norm(g, bound, p, norm=gradclip.global_norm(g, p)),
        gradclip.clip_grad_norm(g, 1.0, p, nonfinite="zero"),
        gradclip.clip_grad_norm([jnp.array([jnp.nan, 1.0])], 1.0, p),
        gradclip.clip_grad_value(g, 1.0),
        gradclip.clip_grad_value(g, (-bound, bound)),
    ]
    assert reads == []
    np.testing.assert_allclose(results[1].norm, results[0], rtol=1e-6)
    np.testing.assert_allclose(results[6]["w"], [1, 1])
    np.testing.assert_allclose(results[7]["w"], [1, 1])


def test_the_error_policy_reads_one_number_when_all_is_finite(reads: list[int]) -> None:
    g = {"w": jnp.array([3.0, 4.0]), "b": jnp.ones(3)}
    out = gradclip.clip_grad_norm(g, 1.0, nonfinite="error")
    assert reads == [1]
    np.testing.assert_allclose(out.norm, math.sqrt(28), rtol=1e-6)


def test_the_error_policy_names_the_leaf() -> None:
    g = {"w": jnp.array([3.0, jnp.nan, jnp.inf, -jnp.inf]), "b": jnp.ones(3)}
    with pytest.raises(gradclip.NonFiniteError, match=r"grads\['w'\] \(float32.*1 NaN, 2 inf") as caught:
        gradclip.clip_grad_norm(g, 1.0, nonfinite="error")
    assert [c.path for c in caught.value.culprits] == ["grads['w']"]


# -- checkify ----------------------------------------------------------------------------------------------


@functools.cache
def _checked() -> Any:
    return checkify.checkify(jax.jit(lambda g: gradclip.clip_grad_norm(g, 1.0, nonfinite="error")))


def test_checkify_is_silent_on_finite_gradients() -> None:
    error, out = _checked()({"w": jnp.array([3.0, 4.0]), "b": [jnp.zeros(2)]})
    assert error.get() is None
    np.testing.assert_allclose(out.grads["w"], [0.6, 0.8], rtol=1e-6)


def test_checkify_is_silent_when_only_the_norm_overflows() -> None:
    error, out = _checked()({"w": jnp.array([3e38, 3e38]), "b": [jnp.zeros(2)]})
    assert error.get() is None
    assert float(out.norm) == INF
    np.testing.assert_allclose(out.grads["w"], math.sqrt(0.5), rtol=1e-6)


def test_checkify_names_the_leaf_and_counts() -> None:
    error, _ = _checked()({"w": jnp.ones(2), "b": [jnp.array([jnp.nan, jnp.inf])]})
    assert re.search(r"grads\['b'\]\[0\].*1 NaN, 1 inf", error.get())
    with pytest.raises(checkify.JaxRuntimeError, match=r"grads\['b'\]\[0\]"):
        error.throw()


@pytest.mark.parametrize("key", ["{", "}", "{}", "a{b}", "{0}", "{nan}"])
def test_checkify_with_braces_in_a_key(key: str) -> None:
    error, _ = _checked()({key: jnp.array([jnp.nan, 1.0, jnp.nan])})
    assert f"grads[{key!r}]" in error.get()
    assert "2 NaN, 0 inf" in error.get()


def test_checkify_reports_a_bad_norm() -> None:
    clip = checkify.checkify(jax.jit(lambda g, n: gradclip.clip_grad_norm(g, 1.0, nonfinite="error", norm=n)))
    assert clip([jnp.ones(2)], 2.0)[0].get() is None
    assert "norm" in clip([jnp.ones(2)], math.nan)[0].get()


def test_without_checkify_tracing_says_what_to_do() -> None:
    with pytest.raises(Exception, match=r"checkify\.checkify"):
        jax.jit(lambda g: gradclip.clip_grad_norm(g, 1.0, nonfinite="error"))([jnp.ones(2)])


def _bad() -> dict[str, Any]:
    return {"w": jnp.array([3.0, jnp.nan]), "b": jnp.ones(3)}


def _clipped_or_error(g: Any) -> Any:
    return gradclip.clip_grad_norm(g, 1.0, nonfinite="error").grads["w"].sum()


@pytest.mark.parametrize("transform", [jax.grad, lambda f: lambda g: jax.jvp(f, (g,), (g,))], ids=["grad", "jvp"])
def test_the_error_policy_in_derivatives_without_jit(transform: Any) -> None:
    """What `except NonFiniteError` catches, and not checkify's advice."""
    good = {"w": jnp.array([3.0, 4.0]), "b": jnp.ones(3)}
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(transform(_clipped_or_error)(good)))
    with pytest.raises(gradclip.NonFiniteError, match=r"grads\['w'\] \(float32, shape \(2,\)\): 1 NaN, 0 inf"):
        transform(_clipped_or_error)(_bad())


def test_the_error_policy_in_vmap_without_jit() -> None:
    """Of all examples together."""
    rows = jax.tree.map(lambda x: jnp.stack([jnp.ones_like(x), x, x]), _bad())
    with pytest.raises(gradclip.NonFiniteError, match=r"grads\['w'\] .*2 NaN, 0 inf"):
        jax.vmap(_clipped_or_error)(rows)
    with pytest.raises(gradclip.NonFiniteError, match=r"grads\['w'\] .*2 NaN, 0 inf"):
        jax.vmap(jax.grad(_clipped_or_error))(rows)
    assert jax.vmap(_clipped_or_error)(jax.tree.map(jnp.ones_like, rows)).shape == (3,)


@pytest.mark.parametrize("per", [None, "leaf"])
def test_export_with_symbolic_sizes(per: Any) -> None:
    n, m = export.symbolic_shape("n, m")
    shapes = {"w": jax.ShapeDtypeStruct((n, m), jnp.float32), "b": jax.ShapeDtypeStruct((m,), jnp.bfloat16)}
    clip = jax.jit(lambda g: tuple(gradclip.clip_grad_norm(g, 1.0, per=per)))
    exported = export.export(clip, platforms=["cpu", "cuda"])(shapes)
    tree = {"w": jnp.full((2, 4), 3.0), "b": jnp.ones(4, jnp.bfloat16)}
    for got, want in zip(jax.tree.leaves(exported.call(tree)), jax.tree.leaves(clip(tree)), strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=1e-6)


@pytest.mark.parametrize("per", [None, "leaf", {"w": 1, "b": 2}])
def test_eager_calls_copy_nothing_from_the_host_unasked(per: Any) -> None:
    g = {"w": jnp.array([3.0, 4.0]), "b": jnp.ones(3, jnp.bfloat16)}
    bound = jnp.float32(1.0)
    gradclip.global_norm(g)  # a program's constants are copied when it is compiled
    with jax.transfer_guard("disallow"):
        gradclip.norms(g, per=per)
        for c in (1.0, bound):
            gradclip.clip_grad_norm(g, c, per=per, nonfinite="zero", divide_by=2.0)
            gradclip.clip_grad_norm(g, 1.0, norm=c, per=per)
            gradclip.clip_grad_value(g, c)
        gradclip.clip_grad_value(g, (-1.0, bound))
        out = gradclip.clip_grad_norm(g, {"w": 1.0, "b": 2.0} if per == "leaf" else 1.0, 3.0, per=per)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(tuple(out)))


# -- in place, other leaves --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "functional"),
    [(gradclip.clip_grad_norm_, "clip_grad_norm"), (gradclip.clip_grad_value_, "clip_grad_value")],
)
def test_in_place_is_refused_with_the_functional_form(verb: Any, functional: str) -> None:
    with pytest.raises(TypeError, match=rf"grads\['w'\].*JAX.*gradclip\.{functional}\b(?!_)"):
        verb({"w": jnp.ones(2)}, 1.0)
    with pytest.raises(TypeError, match=rf"gradclip\.{functional}\b(?!_)"):
        jax.jit(lambda g: verb([g], 1.0))(jnp.ones(2))


@pytest.mark.parametrize("verb", [gradclip.clip_grad_norm_, gradclip.clip_grad_value_])
def test_in_place_names_the_leaf_that_is_to_blame(verb: Any) -> None:
    host = np.array([3.0, 4.0])
    with pytest.raises(TypeError, match=r"grads\[1\] is a JAX array"):
        verb([host, jnp.ones(2)], 1.0)
    assert host.tolist() == [3, 4]


def test_numpy_leaves_beside_jax_leaves_come_back_as_jax() -> None:
    big_endian = np.array([3.0, 0.0], ">f4")
    double = np.array([[4.0]])
    scalar = np.float32(0.0)
    grads, norm = gradclip.clip_grad_norm([big_endian, double, jnp.zeros(2), scalar], 1.0)
    assert [g.dtype for g in grads] == [jnp.float32] * 4  # no float64 here, as jnp.asarray has it
    assert [g.shape for g in grads] == [(2,), (1, 1), (2,), ()]
    assert all(isinstance(g, jax.Array) for g in grads)
    np.testing.assert_allclose(grads[0], [0.6, 0], rtol=1e-6)
    np.testing.assert_allclose(grads[1], [[0.8]], rtol=1e-6)
    check_scalar(norm)
    assert float(norm) == 5.0
    assert big_endian.tolist() == [3, 0]
    values = gradclip.clip_grad_value([big_endian, jnp.zeros(2)], 1.0)
    assert isinstance(values[0], jax.Array)
    assert values[0].tolist() == [1, 0]


def test_numpy_leaves_beside_jax_leaves_with_64_bits(x64: None) -> None:
    tree = [np.array([3.0], ">f8"), np.array([1e200]), jnp.zeros(2, jnp.float32)]
    grads, norm = gradclip.clip_grad_norm(tree, 1.0)
    assert [g.dtype for g in grads] == [jnp.float64, jnp.float64, jnp.float32]
    assert all(isinstance(g, jax.Array) for g in grads)
    check_scalar(norm, "float64")
    assert float(norm) == 1e200
    assert float(grads[1][0]) == 1.0


def test_a_numpy_tree_under_jit() -> None:
    out = jax.jit(lambda g: gradclip.clip_grad_norm(g, 1.0))({"w": np.array([3.0, 4.0], np.float32)})
    np.testing.assert_allclose(out.grads["w"], [0.6, 0.8], rtol=1e-6)
    assert isinstance(out.grads["w"], jax.Array)


def test_a_traced_bound_for_leaves_of_numpy() -> None:
    """The host cannot read it: the leaves are JAX's then."""
    leaf = np.float32([3, 4])
    out = jax.jit(lambda c: gradclip.clip_grad_norm([leaf], c))(2.5)
    np.testing.assert_allclose(out.grads[0], [1.5, 2.0], rtol=1e-6)
    assert float(out.norm) == 5.0
    assert leaf.tolist() == [3, 4]


def test_a_bound_of_jax_for_leaves_of_numpy() -> None:
    grads, norm = gradclip.clip_grad_norm([np.float32([3.0, 4.0])], jnp.float32(1.0))
    np.testing.assert_allclose(np.asarray(grads[0]), [0.6, 0.8], rtol=1e-6)
    assert grads[0].dtype == np.float32
    assert float(norm) == 5.0


def test_float0_leaves_stay() -> None:
    def loss(params: Any) -> Any:
        return 3.0 * params["w"][0] + 4.0 * params["w"][1] + 0.0 * params["steps"].astype(jnp.float32)

    grads = jax.grad(loss, allow_int=True)({"w": jnp.ones(2), "steps": jnp.int32(3)})
    assert grads["steps"].dtype == jax.dtypes.float0
    out = gradclip.clip_grad_norm(grads, 1.0)
    assert out.grads["steps"] is grads["steps"]
    np.testing.assert_allclose(out.grads["w"], [0.6, 0.8], rtol=1e-6)
    assert float(gradclip.global_norm(grads)) == 5.0
    assert gradclip.clip_grad_value(grads, 3.5)["w"].tolist() == [3.0, 3.5]


@pytest.mark.parametrize("wide", [False, True])
def test_dtypes(wide: bool) -> None:
    jax.config.update("jax_enable_x64", wide)
    names = ["float16", "bfloat16", "float32", "complex64"] + (["float64", "complex128"] if wide else [])
    tree = {name: jnp.full((2, 3), 2.0, name) for name in names}
    host = [np.asarray(x) for x in tree.values()]
    for clip in (gradclip.clip_grad_norm, jax.jit(gradclip.clip_grad_norm)):
        out = clip(tree, 1.0)
        check_scalar(out.norm, "float64" if wide else "float32")
        exact.check_norm(out.norm, exact.norm(host), "float64" if wide else "float32")
        for name, leaf in tree.items():
            check_like(out.grads[name], leaf)
            want = 2.0 / math.sqrt(4 * 6 * len(names))
            np.testing.assert_allclose(
                np.asarray(out.grads[name], np.complex128), want, rtol=2.0 ** (1 - exact.FORMATS[name][0])
            )
    del tree["float32"]
    narrow = {"h": tree["float16"], "b": tree["bfloat16"]}
    check_scalar(gradclip.global_norm(narrow), "float32")


def test_64_bit_accuracy(x64: None) -> None:
    rng = np.random.default_rng(0)
    host = rng.normal(size=30_000)
    for f in (gradclip.global_norm, jax.jit(gradclip.global_norm)):
        exact.check_norm(f([jnp.asarray(host)]), exact.norm([host]), "float64")


# -- devices and shards ------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [2.0, 3.0])
def test_leaves_on_several_devices_stay_there(p: float) -> None:
    mesh_of(("all", 4))
    devices = jax.devices()
    host = [np.float32([3, 0, 1]), np.float32([4]), np.float32([[-2.0]])]
    tree = [jax.device_put(x, devices[i]) for x, i in zip(host, (1, 2, 1), strict=True)]
    want = exact.norm(host, p)

    out = gradclip.clip_grad_norm(tree, 1.0, p)
    exact.check_norm(out.norm, want, "float32", 8)
    exact.check_norm(gradclip.global_norm(tree, p), want, "float32", 8)
    for got, leaf, x in zip(out.grads, tree, host, strict=True):
        check_like(got, leaf)
        np.testing.assert_allclose(got, x / float(want), rtol=1e-6)
    for got, leaf in zip(gradclip.clip_grad_norm(tree, 100.0, p).grads, tree, strict=True):
        check_like(got, leaf)
        assert same_bits(got, leaf)


def test_values_on_several_devices_stay_there() -> None:
    mesh_of(("all", 4))
    tree = [jax.device_put(jnp.array([3.0, -3.0]), d) for d in jax.devices()[1:3]]
    for got, leaf in zip(gradclip.clip_grad_value(tree, 1.0), tree, strict=True):
        check_like(got, leaf)
        assert got.tolist() == [1, -1]


@pytest.mark.parametrize("name", ["max_norm", "divide_by", "norm"])
def test_a_bound_on_another_device_travels(name: str) -> None:
    mesh_of(("all", 4))
    leaf = jax.device_put(jnp.array([3.0, 4.0]), jax.devices()[1])
    value = {"max_norm": 1.0, "divide_by": 10.0, "norm": 10.0}[name]
    bounds = {"max_norm": 0.25, name: jax.device_put(jnp.float32(value), jax.devices()[2])}
    out = gradclip.clip_grad_norm([leaf], **bounds)
    check_like(out.grads[0], leaf)
    factor = {"max_norm": 1 / 5, "divide_by": 0.25 / 5, "norm": 0.25 / 10}[name]
    np.testing.assert_allclose(out.grads[0], np.array([3, 4]) * factor, rtol=1e-6)


def test_a_value_bound_on_another_device_travels() -> None:
    mesh_of(("all", 4))
    leaf = jax.device_put(jnp.array([3.0, -4.0]), jax.devices()[1])
    got = gradclip.clip_grad_value([leaf], jax.device_put(jnp.float32(1.0), jax.devices()[2]))[0]
    check_like(got, leaf)
    assert got.tolist() == [1, -1]


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("bound", [1.0, 1e6])
def test_shardings_are_kept(jit: bool, bound: float) -> None:
    mesh = mesh_of(("data", 2), ("model", 2))
    host = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    specs = [("data", "model"), (None, "model"), (), (("data", "model"),)]
    tree = [jax.device_put(host, NamedSharding(mesh, PartitionSpec(*spec))) for spec in specs]

    clip = jax.jit(gradclip.clip_grad_norm) if jit else gradclip.clip_grad_norm
    out = clip(tree, bound)

    want = exact.norm([host] * 4)
    exact.check_norm(out.norm, want, "float32")
    for got, leaf in zip(out.grads, tree, strict=True):
        check_like(got, leaf)
        if bound > want:
            assert same_bits(got, leaf)
        np.testing.assert_allclose(got, host * min(1.0, bound / float(want)), rtol=1e-6)
    for got, leaf in zip(gradclip.clip_grad_value(tree, 0.5), tree, strict=True):
        check_like(got, leaf)
        assert same_bits(got, host.clip(-0.5, 0.5))


def test_sharded_and_single_device_leaves_together() -> None:
    mesh = mesh_of(("data", 4))
    tree = [
        jax.device_put(jnp.full(8, 3.0), NamedSharding(mesh, PartitionSpec("data"))),
        jax.device_put(jnp.full(8, 4.0), jax.devices()[3]),
    ]
    out = gradclip.clip_grad_norm(tree, 1.0)
    exact.check_norm(out.norm, mpmath.sqrt(200), "float32")
    for got, leaf, x in zip(out.grads, tree, (3, 4), strict=True):
        check_like(got, leaf)
        np.testing.assert_allclose(got, x / math.sqrt(200), rtol=1e-6)


@pytest.mark.parametrize(
    ("p", "vma"), [(p, True) for p in (2.0, 1.0, 3.0, INF, -INF, 0.0)] + [(p, False) for p in (2.0, 3.0)]
)
def test_shard_map_equals_the_unsharded_result(p: float, vma: bool) -> None:
    mesh = mesh_of(("data", 4))
    spec, host = PartitionSpec("data"), np.float32([1, -2, 3, 4, -5, 6, 0.5, 8, 0, 7, -8, 0.25])
    if p == -INF:
        host[8] = 1  # else the norm is 0
    weights = np.arange(12, dtype=np.float32)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=(spec, PartitionSpec()), check_vma=vma)
    def sharded(g: Any) -> Any:
        out = gradclip.clip_grad_norm([g], 0.125, p, all_reduce=joined_over("data"))
        return out.grads[0], out.norm

    def whole(g: Any) -> Any:
        out = gradclip.clip_grad_norm([g], 0.125, p)
        return out.grads[0], out.norm

    def both(f: Any) -> Any:
        def loss(g: Any) -> Any:
            clipped, norm = f(g)
            return (weights * clipped).sum() + norm, (clipped, norm)

        return jax.jit(jax.grad(loss, has_aux=True))(jnp.asarray(host))

    slope, (clipped, norm) = both(sharded)
    want_slope, (want_clipped, want_norm) = both(whole)
    exact.check_norm(norm, exact.norm([host], p), "float32", 8)
    np.testing.assert_allclose(norm, want_norm, rtol=1e-6)
    np.testing.assert_allclose(clipped, want_clipped, rtol=1e-6)
    np.testing.assert_allclose(slope, want_slope, rtol=1e-5, atol=1e-6)
    assert slope.shape == clipped.shape == host.shape


@pytest.mark.skipif(not hasattr(jax, "pmap"), reason="this JAX has no pmap")
def test_pmap_with_a_collective() -> None:
    mesh_of(("data", 4))
    host = np.arange(8, dtype=np.float32).reshape(4, 2)
    clip = jax.pmap(lambda g: gradclip.clip_grad_norm([g], 1.0, all_reduce=joined_over("data")), axis_name="data")
    out = clip(host)
    want = exact.norm([host])
    for norm in np.asarray(out.norm):
        exact.check_norm(norm, want, "float32")
    np.testing.assert_allclose(np.asarray(out.grads[0]), host / float(want), rtol=1e-6)


# -- derivatives, against the published formulas -----------------------------------------------------------


def p_norm(x: np.ndarray, p: float) -> float:
    """In float64, which is exact enough beside float32 and holds all powers that are needed here."""
    return float(exact.norm([x], p))


def direction(x: np.ndarray, p: float) -> np.ndarray:
    """u with d||x|| = <u, dx>: sign(x) (|x| / ||x||)^(p-1); elements that tie for an extreme share it; 0 at 0."""
    size, n = np.abs(x), p_norm(x, p)
    if n == 0 or p == 0:
        return np.zeros_like(x)
    if math.isinf(p):
        hit = size == n
        return np.where(hit, np.sign(x), 0) / hit.sum()
    return np.sign(x) * (size / n) ** (p - 1)


def curvature(x: np.ndarray, p: float) -> np.ndarray:
    """(p - 1) / ||x|| (diag((|x| / ||x||)^(p-2)) - u u^T); 0 for 0, 1, inf and -inf."""
    if p in (0, 1) or math.isinf(p):
        return np.zeros((x.size, x.size))
    n, u = p_norm(x, p), direction(x, p)
    return (p - 1) / n * (np.diag((np.abs(x) / n) ** (p - 2)) - np.outer(u, u))


@functools.cache
def _norm_derivatives(p: float) -> Any:
    def norm(x: Any) -> Any:
        return gradclip.global_norm({"a": x[:1], "b": [x[1:]]}, p)

    def all_of_them(x: Any, dx: Any) -> Any:
        return jax.value_and_grad(norm)(x), jax.jvp(norm, (x,), (dx,)), jax.vjp(norm, x)[1](jnp.float32(2.0))

    return jax.jit(all_of_them), jax.jit(jax.hessian(norm))


ORDINARY = [3.0, -4.0, 0.5, 2.0]
TIES = [2.0, -2.0, -1.0, 1.0]
ONE_ZERO = [0.0, 3.0, -4.0, 1.0]


@pytest.mark.parametrize("p", ORDERS)
def test_derivatives_of_the_norm(p: float) -> None:
    first, second = _norm_derivatives(p)
    dx = np.array([1.0, 0.5, -2.0, 3.0], np.float32)
    for point in (ORDINARY, TIES) + ((ONE_ZERO,) if p >= 1 else ()):
        x = np.array(point)
        (value, grad), (value_again, slope), (cotangent,) = first(jnp.asarray(x, jnp.float32), dx)
        u = direction(x, p)
        exact.check_norm(value, exact.norm([x], p), "float32", 8)
        assert value == value_again
        np.testing.assert_allclose(grad, u, rtol=5e-6, atol=1e-7)
        np.testing.assert_allclose(slope, u @ dx, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(cotangent, 2 * u, rtol=5e-6, atol=1e-7)
        np.testing.assert_allclose(
            second(jnp.asarray(x, jnp.float32)), curvature(x, p), rtol=3e-5, atol=3e-6, err_msg=f"{p} {point}"
        )
        assert grad.dtype == jnp.float32
        assert grad.shape == x.shape


@pytest.mark.parametrize("p", ORDERS)
def test_the_norm_is_flat_at_zero(p: float) -> None:
    (value, grad), (_, slope), (cotangent,) = _norm_derivatives(p)[0](jnp.zeros(4), jnp.ones(4))
    assert value == 0
    assert slope == 0
    assert grad.tolist() == [0, 0, 0, 0]
    assert cotangent.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("scale", [1e20, 5e37, 1e-30, 1e-36])
@pytest.mark.parametrize("p", ORDERS)
def test_derivatives_of_the_norm_at_extremes(p: float, scale: float) -> None:
    """u does not change with the scale of x."""
    x = np.float32(ORDINARY) * np.float32(scale)
    (value, grad), (_, slope), _ = _norm_derivatives(p)[0](jnp.asarray(x), jnp.ones(4))
    u = direction(x.astype(np.float64), p)
    exact.check_norm(value, exact.norm([x], p), "float32", 8)
    if value == INF:
        assert exact.norm([x], p) > 3.4e38
        return  # beyond float32, and so may its slope be
    np.testing.assert_allclose(grad, u, rtol=5e-6, atol=1e-7)
    np.testing.assert_allclose(slope, u.sum(), rtol=1e-5, atol=1e-6)


@functools.cache
def _clip_jacobians(p: float) -> Any:
    def clip(x: Any, c: Any) -> Any:
        grads = gradclip.clip_grad_norm([x[:1], (x[1:],)], c, p).grads
        return jnp.concatenate([grads[0], grads[1][0]])

    return jax.jit(lambda x, c: (jax.jacrev(clip)(x, c), jax.jacfwd(clip)(x, c)))


def clip_jacobian(x: np.ndarray, c: float, p: float) -> np.ndarray:
    """c / N (I - x u^T / N) where N > c, else I."""
    n = p_norm(x, p)
    return np.eye(x.size) if n <= c else c / n * (np.eye(x.size) - np.outer(x / n, direction(x, p)))


@pytest.mark.parametrize("p", ORDERS)
def test_derivatives_of_the_clip(p: float) -> None:
    jacobians = _clip_jacobians(p)
    x = np.array(ORDINARY)
    for c in (0.25, 0.0):
        for got in jacobians(jnp.asarray(x, jnp.float32), c):
            np.testing.assert_allclose(got, clip_jacobian(x, c, p), rtol=2e-5, atol=1e-7, err_msg=f"{c}")
    for c in (100.0, 3e38, INF):  # nothing is clipped: the identity, exactly
        for got in jacobians(jnp.asarray(x, jnp.float32), c):
            assert same_bits(np.abs(got), np.eye(4, dtype=np.float32)), (c, got)


@pytest.mark.parametrize("p", ORDERS)
def test_the_clip_is_the_identity_at_zero(p: float) -> None:
    for c in (1.0, 0.0, INF):
        for got in _clip_jacobians(p)(jnp.zeros(4), c):
            assert same_bits(np.abs(got), np.eye(4, dtype=np.float32)), (c, got)


def test_the_clip_is_the_identity_where_the_norm_equals_the_bound() -> None:
    for got in _clip_jacobians(2.0)(jnp.array([3.0, 4.0, 0.0, 0.0]), 5.0):
        assert same_bits(np.abs(got), np.eye(4, dtype=np.float32))


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize(("scale", "c"), [(1e20, 1.0), (1e33, 1e10), (1e-30, 1e-33), (1e-34, 1e-36)])
def test_derivatives_of_the_clip_at_extremes(p: float, scale: float, c: float) -> None:
    """Up to norms of 1e34: far beyond, g / ||g||**2 is a subnormal float32, and XLA's CPU compiler flushes those."""
    x = np.float32(ORDINARY) * np.float32(scale)
    want = clip_jacobian(x.astype(np.float64), c, p)
    for got in _clip_jacobians(p)(jnp.asarray(x), c):
        np.testing.assert_allclose(got, want, rtol=3e-5, atol=1e-5 * np.abs(want).max())
    for bound in (0.0, INF, 3e38):
        for got in _clip_jacobians(p)(jnp.asarray(x), bound):
            assert np.isfinite(got).all()


@functools.cache
def _scalar_derivatives() -> Any:
    def clip(x: Any, c: Any, d: Any) -> Any:
        out = gradclip.clip_grad_norm([x], c, divide_by=d)
        return out.grads[0], out.norm

    return jax.jit(lambda *a: (jax.jacrev(clip, (0, 1, 2))(*a), jax.jacfwd(clip, (0, 1, 2))(*a)))


@pytest.mark.parametrize("d", [1.0, 2.0])
@pytest.mark.parametrize("scale", [1.0, 1e20, 1e37, 1e-25])
def test_derivatives_by_max_norm_and_divide_by(scale: float, d: float) -> None:
    x = np.float32([3.0, 4.0]) * np.float32(scale)
    wide, n = x.astype(np.float64), p_norm(x, 2)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    for (dx, dc, dd), (nx, nc, nd) in _scalar_derivatives()(jnp.asarray(x), n / 4, d):  # clipped, as n / d > n / 4
        close(dx, 0.25 * (np.eye(2) - np.outer(wide, wide) / n**2), atol=1e-6)
        close(dc, wide / n)
        close(dd, 0 * wide, atol=1e-6 * scale)
        close(nx, wide / n / d)
        assert float(nc) == 0
        close(nd, -n / d**2)
    for (dx, dc, dd), (nx, nc, nd) in _scalar_derivatives()(jnp.asarray(x), n * 1.5, d):  # not clipped
        close(dx, np.eye(2) / d)
        assert dc.tolist() == [0, 0]
        close(dd, -wide / d**2)
        close(nx, wide / n / d)
        assert float(nc) == 0
        close(nd, -n / d**2)


def test_derivatives_with_a_norm_that_was_given() -> None:
    def clip(x: Any, n: Any) -> Any:
        return gradclip.clip_grad_norm([x], 2.0, norm=n).grads[0]

    x = jnp.array([3.0, 4.0])
    dx, dn = jax.jit(jax.jacrev(clip, (0, 1)))(x, 10.0)
    np.testing.assert_allclose(dx, np.eye(2) * 0.2, rtol=1e-6)
    np.testing.assert_allclose(dn, -2.0 / 100 * np.array([3, 4]), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(clip))(x, 1.0), np.eye(2))


@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, INF, -INF, -1.0])
def test_derivatives_of_complex_leaves(p: float) -> None:
    """jax.grad of a real function of z is its conjugate gradient; the slope is Re<u, dz>."""
    z = np.array([3 + 4j, 1 - 1j, 0.5j], np.complex64)
    dz = np.array([1j, 2 - 1j, 0.25], np.complex64)
    size = np.abs(z.astype(np.complex128))
    u = z / size * np.abs(direction(size, p))
    n, slope = p_norm(z, p), float((u.conj() * dz).real.sum())

    @jax.jit
    def both(z: Any, dz: Any) -> Any:
        def norm(z: Any) -> Any:
            return gradclip.global_norm([z], p)

        def clip(z: Any) -> Any:
            return gradclip.clip_grad_norm([z], 0.125, p).grads[0]

        return jax.grad(norm)(z), jax.jvp(norm, (z,), (dz,))[1], jax.jvp(clip, (z,), (dz,))[1]

    got_grad, got_slope, got_clip = both(z, dz)
    np.testing.assert_allclose(got_grad, u.conj(), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(got_slope, slope, rtol=1e-5)
    np.testing.assert_allclose(got_clip, 0.125 / n * (dz - z * slope / n), rtol=1e-5, atol=1e-6)
    at_zero = both(np.zeros(3, np.complex64), dz)
    assert at_zero[0].tolist() == [0, 0, 0]
    assert float(at_zero[1]) == 0
    np.testing.assert_array_equal(at_zero[2], dz)


@pytest.mark.full
@pytest.mark.parametrize("p", [2.0, 3.0])
def test_derivatives_numerically(x64: None, p: float) -> None:
    tree = {"a": jnp.array([3.0, -4.0]), "b": jnp.array([[0.7]])}
    norm = jax.jit(lambda g: gradclip.global_norm(g, p))
    check_grads(norm, (tree,), order=1, modes=("fwd", "rev"))
    clip = jax.jit(lambda g, c: gradclip.clip_grad_norm(g, c, p).grads)
    check_grads(clip, (tree, 0.25), order=1, modes=("fwd", "rev"))


def test_second_derivatives_numerically(x64: None) -> None:
    clip = jax.jit(lambda g, c: gradclip.clip_grad_norm(g, c).grads)
    check_grads(clip, ([jnp.array([3.0, -4.0, 0.7])], 1.0), order=2, modes=("rev",))


def test_the_derivative_of_the_value_clip() -> None:
    slope = jax.vmap(jax.grad(lambda x: gradclip.clip_grad_value([x], (-1.0, 2.0))[0]))(
        jnp.array([-3.0, 0.5, 1.5, 7.0])
    )
    assert slope.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("p", ORDERS)
def test_debug_nans_does_not_fire_on_finite_gradients(p: float) -> None:
    both = jax.jit(
        lambda x, c: (gradclip.clip_grad_norm([x], c, p), jax.grad(lambda x: gradclip.global_norm([x], p))(x))
    )
    with jax.debug_nans(True):
        for x in ([0.0, 0.0], [3.0, 4.0], [3e38, 3e38], [1e-30, 0.0]):
            for c in (1.0, 0.0, INF):
                clipped, slope = both(jnp.array(x), c)
                eager = gradclip.clip_grad_norm([jnp.array(x)], c, p)
                np.testing.assert_allclose(eager.grads[0], clipped.grads[0], rtol=1e-6)
                assert np.isfinite(slope).all()


def test_debug_nans_does_not_fire_in_eager_derivatives() -> None:
    with jax.debug_nans(True):
        slope = jax.grad(lambda x: gradclip.clip_grad_norm([x], 1.0).grads[0].sum())(jnp.array([3.0, 4.0]))
    np.testing.assert_allclose(slope, [0.2 - 0.6 * 1.4 / 5, 0.2 - 0.8 * 1.4 / 5], rtol=1e-5)


# -- what XLA does to arithmetic ---------------------------------------------------------------------------

_WIDE = {"float64": (1e200, 1.7e308, 1e-200, 3e-308), "complex128": (1e200, 1.2e308, 1e-200, 3e-308)}
_VALUES = {
    "float16": (6e4, 300.0, 1e-3, 6.2e-5),
    "bfloat16": (1e20, 3e38, 1e-30, 2e-38),
    "float32": (1e20, 3e38, 1e-30, 2e-38),
    "complex64": (1e20, 3e38, 1e-30, 2e-38),
    **_WIDE,
}
_SIZES = dict.fromkeys(_VALUES, (7, 20000)) | {"float32": (1, 7, 100, 5000, 20000), "float64": (7, 5000, 20000)}


def _filled(n: int, value: float, dtype: str) -> np.ndarray:
    """n elements of magnitude `value` (re and im, where there are two) with alternating signs."""
    one = value * (1 - 1j) if dtype.startswith("complex") else value
    return np.where(np.arange(n) % 3 == 1, -one, one).astype(np_dtype(dtype))


def _check_constant(dtype: str, p: float) -> None:
    """Norm and clip of constant leaves under jit, against n**(1/p) * |x|, in 60 digits."""

    @jax.jit
    def clip(leaves: Any, bounds: Any) -> Any:
        return [gradclip.clip_grad_norm([x], c, p) for x, c in zip(leaves, bounds, strict=True)]

    acc = "float64" if dtype in _WIDE else "float32"
    lowest, highest, eps = exact.smallest_normal(acc), exact.largest(acc), mpmath.mpf(2) ** (1 - exact.FORMATS[acc][0])
    ulps = 4 if p in (1, 2) or math.isinf(p) else 8
    for value in _VALUES[dtype]:
        host = [_filled(n, value, dtype) for n in _SIZES[dtype]]
        size = exact.magnitudes(host[0][:1])[0]
        norms = [size if math.isinf(p) else mpmath.mpf(x.size) ** (1 / mpmath.mpf(p)) * size for x in host]
        bounds = [np.dtype(acc).type(min(max(n / 3, 2 * lowest), highest / 2)) for n in norms]
        out = clip([jnp.asarray(x) for x in host], bounds)
        for x, (grads, norm), want, bound in zip(host, out, norms, bounds, strict=True):
            about = f"{dtype} p={p} n={x.size} value={value}"
            check_scalar(norm, acc)
            if not (want < lowest and float(norm) == 0):  # XLA on the CPU may flush what is subnormal
                exact.check_norm(norm, want, acc, ulps)
            got = np.asarray(grads[0])
            assert (got.dtype, got.shape) == (x.dtype, x.shape), about
            if want <= bound:
                assert same_bits(got, x), about
                continue
            first = got[0]
            assert np.array_equal(got, np.where(x == x[0], first, -first)), about
            wide = mpmath.mpf(float(first.real))
            right = mpmath.mpf(float(x[0].real)) * mpmath.mpf(float(bound)) / want
            off = (2 * ulps + 6) * eps * abs(right) / 2 + exact.ulp(right, dtype) * 0.501
            if abs(right) < exact.smallest_normal(dtype):
                off = exact.smallest_normal(dtype)
            assert abs(wide - right) <= off, f"{about}: {wide} instead of {right}"


@pytest.mark.slow
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 0.5, INF, -INF, -1.0])
@pytest.mark.parametrize("dtype", list(_VALUES))
def test_extremes_under_jit(dtype: str, p: float) -> None:
    jax.config.update("jax_enable_x64", dtype in _WIDE)
    _check_constant(dtype, p)


@pytest.fixture(scope="class", params=["cuda", "tpu"])
def chosen(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """The names of what is chosen for a platform, which is made to choose as on another one."""
    chosen: list[str] = []

    def choose(*args: Any, default: Any, **platforms: Any) -> Any:
        assert set(platforms) <= {"cpu", "cuda", "rocm"}
        run = platforms.get(request.param, default)
        chosen.append(getattr(run, "func", run).__name__)
        return run(*args)

    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "platform_dependent", choose)
        for room in ("sums", "decisions", "derivatives", "products"):
            patch.setattr(f"gradclip._backends.jax.{room}.by_platform", choose)
        if not PLAIN_IS_EXACT:  # XLA's own sum, which another platform would make otherwise
            patch.setattr("gradclip._backends.jax.plain_sums.SHORT", 1 << 17)
            patch.setattr("gradclip._backends.jax.sums.SHORT", 1 << 17)
        yield chosen
    jax.clear_caches()


@pytest.mark.full
class TestOtherPlatforms:
    """The code that a GPU gets, and a TPU, on the CPU."""

    @pytest.mark.parametrize("p", [1.0, 2.0, INF])
    @pytest.mark.parametrize("dtype", list(_VALUES))
    def test_extremes_under_jit(self, chosen: list[str], dtype: str, p: float) -> None:
        chosen.clear()
        jax.config.update("jax_enable_x64", dtype in _WIDE)
        _check_constant(dtype, p)
        assert {"summed", "slot_by_slot", "by_largest"} & set(chosen)

    @pytest.mark.parametrize("p", [1.0, 2.0, INF])
    def test_leaves_of_all_magnitudes_decide_alone(self, chosen: list[str], p: float) -> None:
        chosen.clear()
        values = [1e20, 1e-30, 1.0, 0.0, 3e38, 1e12, math.nan, math.inf]
        hosts = [np.full((3, 5), value, np.float32) for value in values]
        clip = jax.jit(lambda g: gradclip.clip_grad_norm(g, 1e-3, p, per="leaf", nonfinite="zero"))
        grads, norms = clip(list(map(jnp.asarray, hosts)))
        assert chosen[0] == ("by_largest" if p == INF else "summed")
        for host, got, norm in zip(hosts, grads, norms, strict=True):
            if not np.isfinite(host).all():
                assert same_bits(np.asarray(got), np.zeros_like(host))
                np.testing.assert_array_equal(norm, host[0, 0])
                continue
            want = exact.norm([host], p)
            exact.check_norm(norm, want, "float32")
            right = host if want <= 1e-3 else np.full_like(host, float(1e-3 / want * float(host[0, 0])))
            np.testing.assert_allclose(got, right, rtol=1e-6)

    def test_eager(self, chosen: list[str]) -> None:
        chosen.clear()
        jax.clear_caches()  # the policy of one group has been compiled
        for value in (1e20, 3e38, 1e-30, 1.0, 0.0):
            host = np.full(6, value, np.float32)
            out = gradclip.clip_grad_norm([jnp.asarray(host)], value / 2)
            exact.check_norm(out.norm, exact.norm([host]), "float32")
            np.testing.assert_allclose(out.grads[0], value / 2 / math.sqrt(6), rtol=1e-6)
        assert chosen[0] == "summed"
        assert set(chosen) in ({"summed", "in_float64"}, {"summed", "at_length"})

    def test_accuracy(self, chosen: list[str]) -> None:
        host = np.random.default_rng(0).normal(size=9000).astype(np.float32)
        host[::3] *= np.float32(1e-25)
        exact.check_norm(jax.jit(gradclip.global_norm)([jnp.asarray(host)]), exact.norm([host]), "float32")
        equal = np.full(1000, 0.1, np.float32)
        exact.check_norm(jax.jit(gradclip.global_norm)([jnp.asarray(equal)] * 3), exact.norm([equal] * 3), "float32")

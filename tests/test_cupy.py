"""What is particular to CuPy: nothing waits, streams, devices, memory.

Runs on a GPU, or on emulated devices whose runtime counts waits and copies. The counts are checked only there:
on a GPU no public counter tells whether the host has waited, so there the same calls are checked for their values.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import math
from collections.abc import Iterator
from typing import Any

import mpmath
import numpy as np
import pytest

import exact
import gradclip
from backends import MISSING, map_tree
from devices import host, on

pytestmark = [
    pytest.mark.library("cupy"),
    pytest.mark.skipif("cupy" in MISSING, reason=f"cupy: {MISSING.get('cupy')}"),
]
cupy: Any = None if "cupy" in MISSING else importlib.import_module("cupy")

INF = math.inf


def _counter() -> Any:
    """The emulation's counters, None on a GPU."""
    try:
        cupycpu = importlib.import_module("cupycpu")
    except ImportError:
        return None
    return cupycpu if cupycpu.available() else None


@pytest.fixture(scope="module")
def counter() -> Any:
    gc.collect()  # else memory pools of tests before may be freed while something is counted, and that waits
    return _counter()


@contextlib.contextmanager
def counted(counter: Any, numbers_read: int = 0) -> Iterator[None]:
    """Assert that the host does not wait; or, for `numbers_read` = 1, that it reads one number and nothing else."""
    if counter is None:
        yield
        return
    with counter.record() as r:
        yield
    assert r["kernel"] > 0, r  # else nothing was counted
    assert r["d2h"] == numbers_read, (r, r.events)
    if numbers_read:
        assert r["d2h_bytes"] <= 8 * numbers_read, (r, r.events)
        assert r.synced <= 2 * numbers_read, (r, r.events)  # the copy, and the wait for it
    else:
        assert r.synced == 0, (r, r.events)


@pytest.fixture
def two_devices() -> None:
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two devices")


def check_like(got: Any, leaf: Any) -> None:
    assert type(got) is cupy.ndarray
    assert (got.dtype, got.shape, got.device.id) == (leaf.dtype, leaf.shape, leaf.device.id)


def check_clipped(got: Any, leaf: Any, values: np.ndarray, factor: Any) -> None:
    """`got` is `values * factor`, and like `leaf` in all else. Fresh memory is NaN: nothing is left unwritten."""
    check_like(got, leaf)
    np.testing.assert_allclose(
        host(got).astype(np.complex128),
        values.astype(np.complex128) * complex(factor),
        rtol=2 ** (1.0 - {"float16": 11, "float64": 50, "complex128": 50}.get(leaf.dtype.name, 23)),
        atol=6e-8 if leaf.dtype == np.float16 else 0,
    )


HOST = {"w": np.float32([[3.0, -4.0, 0.5], [0.0, 1e-3, 2.0]]), "b": [np.float32([5.0]), np.float32(-1.0)]}
HOST_LEAVES = [HOST["w"], *HOST["b"]]


def tree() -> Any:
    return map_tree(cupy.array, HOST)


# -- nothing waits -----------------------------------------------------------------------------------------


def _norm_calls(p: float) -> dict[str, Any]:
    """Every way to call the verbs, as functions of a tree and of a bound on the device."""
    return {
        "global_norm": lambda g, c: gradclip.global_norm(g, p),
        "functional": lambda g, c: gradclip.clip_grad_norm(g, 1.0, p),
        "in place": lambda g, c: gradclip.clip_grad_norm_(g, 1.0, p),
        "unclipped": lambda g, c: gradclip.clip_grad_norm(g, INF, p),
        "zero": lambda g, c: gradclip.clip_grad_norm(g, 1.0, p, nonfinite="zero"),
        "device bound": lambda g, c: gradclip.clip_grad_norm(g, c, p),
        "device bound in place": lambda g, c: gradclip.clip_grad_norm_(g, c, p),
        "divide_by": lambda g, c: gradclip.clip_grad_norm(g, c, p, divide_by=8.0),
        "divide_by in place": lambda g, c: gradclip.clip_grad_norm_(g, 1.0, p, divide_by=c),
        "norm given": lambda g, c: gradclip.clip_grad_norm(g, 1.0, p, norm=c * 4),
        "norm given in place": lambda g, c: gradclip.clip_grad_norm_(g, 1.0, p, norm=c * 4, divide_by=2.0),
    }


@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, INF])
@pytest.mark.parametrize("call", list(_norm_calls(2.0)))
def test_the_host_never_waits_for_a_norm(counter: Any, call: str, p: float) -> None:
    verb, bound = _norm_calls(p)[call], cupy.full((), 1.0, cupy.float32)
    verb(tree(), bound)  # compiles the kernels
    grads = tree()
    with counted(counter):
        out = verb(grads, bound)

    given = "given" in call
    divisor = 8.0 if call == "divide_by" else 2.0 if call == "norm given in place" else 1.0
    want = mpmath.mpf(4) if given else exact.norm(HOST_LEAVES, p) / divisor
    norm = out.norm if isinstance(out, gradclip.Clipped) else out
    assert type(norm) is cupy.ndarray
    assert (norm.shape, norm.dtype, norm.device.id) == ((), np.float32, 0)
    exact.check_norm(norm.get(), want, "float32", 8)
    clipped = out.grads if isinstance(out, gradclip.Clipped) else grads
    factor = 1.0 if call in ("unclipped", "global_norm") else min(1.0, float(1 / want)) / divisor
    for got, leaf, values in zip([clipped["w"], *clipped["b"]], [grads["w"], *grads["b"]], HOST_LEAVES, strict=True):
        check_clipped(got, leaf, values, factor)
    if "in place" not in call:  # the inputs are as they were
        for leaf, values in zip([grads["w"], *grads["b"]], HOST_LEAVES, strict=True):
            assert leaf.get().tobytes() == values.tobytes()


VALUE_CALLS: dict[str, Any] = {
    "number": lambda verb, g, c: verb(g, 1.0),
    "pair": lambda verb, g, c: verb(g, (-1.0, 1.0)),
    "device bound": lambda verb, g, c: verb(g, c),
    "device pair": lambda verb, g, c: verb(g, (-c, c)),
    "tree": lambda verb, g, c: verb(g, {"w": cupy.ones(3, cupy.float32), "b": [c, (-1.0, 1.0)]}),
}


@pytest.mark.parametrize("verb", [gradclip.clip_grad_value, gradclip.clip_grad_value_])
@pytest.mark.parametrize("call", list(VALUE_CALLS))
def test_the_host_never_waits_for_values(counter: Any, call: str, verb: Any) -> None:
    bound = cupy.full((), 1.0, cupy.float32)
    VALUE_CALLS[call](verb, tree(), bound)
    grads = tree()
    with counted(counter):
        out = VALUE_CALLS[call](verb, grads, bound)
    out = grads if out is None else out
    for got, leaf, values in zip([out["w"], *out["b"]], [grads["w"], *grads["b"]], HOST_LEAVES, strict=True):
        check_like(got, leaf)
        np.testing.assert_array_equal(got.get(), values.clip(-1, 1))


@pytest.mark.parametrize(
    "call",
    [
        lambda g: gradclip.clip_grad_norm(g, 1.0, nonfinite="error"),
        lambda g: gradclip.clip_grad_norm_(g, 1.0, nonfinite="error"),
        lambda g: gradclip.clip_grad_norm_(g, 1.0, 2.0, True),
    ],
    ids=["functional", "in place", "error_if_nonfinite"],
)
def test_the_error_policy_reads_one_number(counter: Any, call: Any) -> None:
    call(tree())
    grads = tree()
    with counted(counter, numbers_read=1):
        out = call(grads)
    clipped = out.grads if isinstance(out, gradclip.Clipped) else grads
    check_clipped(clipped["w"], grads["w"], HOST["w"], 1 / exact.norm(HOST_LEAVES))


def test_the_error_policy_names_the_leaf_and_writes_nothing() -> None:
    bad = np.float32([1.0, np.nan, np.inf, -np.inf])
    grads = {"a": cupy.array(HOST["w"]), "b": cupy.array(bad)}
    for verb in (gradclip.clip_grad_norm, gradclip.clip_grad_norm_):
        with pytest.raises(gradclip.NonFiniteError, match=r"grads\['b'\] \(float32, shape \(4,\)\): 1 NaN, 2 inf"):
            verb(grads, 1.0, nonfinite="error")
        assert grads["a"].get().tobytes() == HOST["w"].tobytes()
        assert grads["b"].get().tobytes() == bad.tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("in_place", [False, True])
def test_the_other_policies_do_not_wait_for_bad_gradients(counter: Any, bad: float, in_place: bool) -> None:
    for policy in ("zero", "propagate"):
        for warm in (True, False):
            grads = [cupy.array(np.float32([1.0, bad])), cupy.ones(3, cupy.float16)]
            with contextlib.nullcontext() if warm else counted(counter):
                if in_place:
                    gradclip.clip_grad_norm_(grads, 1.0, nonfinite=policy)
                    out = grads
                else:
                    out = gradclip.clip_grad_norm(grads, 1.0, nonfinite=policy).grads
        for got, leaf in zip(out, grads, strict=True):
            check_like(got, leaf)
            assert (np.isnan(got.get()) if policy == "propagate" else got.get() == 0).all()


# -- streams -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [2.0, 3.0])
@pytest.mark.parametrize("in_place", [False, True])
def test_the_current_stream_is_used(in_place: bool, p: float) -> None:
    """Gradients are made on a stream of their own, and clipped behind that work on the same stream.

    Where work is put off until something waits for it, another stream would see memory full of NaN.
    """
    values = np.random.default_rng(0).normal(size=300).astype(np.float32)
    want = exact.norm([values], p)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        raw = cupy.empty(300, cupy.float32)
        raw.set(values, stream=stream)
        grads = raw * cupy.float32(0.5) + raw * cupy.float32(0.5)
        bound = cupy.full((), 0.25, cupy.float32) * cupy.float32(2.0)
        if in_place:
            norm = gradclip.clip_grad_norm_([grads], bound, p)
            out = grads
        else:
            (out,), norm = gradclip.clip_grad_norm([grads], bound, p)
        later = out * cupy.float32(2.0)
        norm_host, later_host = norm.get(stream=stream), later.get(stream=stream)
    stream.synchronize()
    exact.check_norm(norm_host, want, "float32", 8)
    np.testing.assert_allclose(later_host, values.astype(np.float64) * float(1 / want), rtol=5e-7)


def test_two_streams_do_not_disturb_each_other() -> None:
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    results = []
    for i, stream in enumerate(streams):
        with stream:
            grads = [cupy.full(100, float(i + 1), cupy.float32)]
            results.append((stream, gradclip.clip_grad_norm(grads, 1.0)))
    for i, (stream, out) in enumerate(results):
        with stream:
            np.testing.assert_allclose(out.norm.get(stream=stream), 10.0 * (i + 1), rtol=1e-6)
            np.testing.assert_allclose(out.grads[0].get(stream=stream), 0.1, rtol=1e-6)


# -- devices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, INF, -INF, 0.0])
@pytest.mark.parametrize("first", [0, 1])
def test_leaves_on_two_devices(two_devices: None, counter: Any, first: int, p: float) -> None:
    values = [np.float32([3.0, -4.0]), np.float32([[1.0], [0.5]]), np.float32([]), np.float32([2.0])]
    places = [first, 1 - first, 1 - first, first]
    want = exact.norm(values, p)

    def leaves() -> list[Any]:
        return [on(d, x) for x, d in zip(values, places, strict=True)]

    grads, mine = leaves(), leaves()
    gradclip.clip_grad_norm(leaves(), 0.25, p)
    gradclip.clip_grad_norm_(leaves(), 0.25, p)
    current = cupy.cuda.runtime.getDevice()
    with counted(counter):
        out = gradclip.clip_grad_norm(grads, 0.25, p)
        norm = gradclip.clip_grad_norm_(mine, 0.25, p)
    assert cupy.cuda.runtime.getDevice() == current
    assert out.norm.device.id == norm.device.id == first
    for x in (out.norm, norm):
        exact.check_norm(host(x), want, "float32", 8)
    for got, again, leaf, x in zip(out.grads, mine, grads, values, strict=True):
        check_clipped(got, leaf, x, float(0.25 / want))
        check_clipped(again, leaf, x, float(0.25 / want))
        assert host(leaf).tobytes() == x.tobytes()


@pytest.mark.parametrize("p", [2.0, 3.0])
@pytest.mark.parametrize("in_place", [False, True])
def test_two_devices_each_with_a_stream_of_its_own(two_devices: None, in_place: bool, p: float) -> None:
    """Scalars that travel wait for the stream they come from: it is not the one they go to."""
    values = [np.float32([3.0, -4.0] * 40), np.float32([1.0, 0.5] * 30)]
    want = exact.norm(values, p)
    streams, before = [], []
    for d in (0, 1):
        with cupy.cuda.Device(d):
            before.append(cupy.cuda.get_current_stream())
            streams.append(cupy.cuda.Stream(non_blocking=True))
            streams[d].use()
    try:
        grads = []
        for d in (0, 1):
            with cupy.cuda.Device(d):
                raw = cupy.empty(values[d].shape, cupy.float32)
                raw.set(values[d], stream=streams[d])
                grads.append(raw * cupy.float32(0.5) + raw * cupy.float32(0.5))
        if in_place:
            norm, out = gradclip.clip_grad_norm_(grads, 1.0, p), grads
        else:
            out, norm = gradclip.clip_grad_norm(grads, 1.0, p)
        with cupy.cuda.Device(0):
            got_norm = norm.get(stream=streams[0])
        got = []
        for d in (0, 1):
            with cupy.cuda.Device(d):
                got.append(out[d].get(stream=streams[d]))
    finally:
        for d in (0, 1):
            with cupy.cuda.Device(d):
                streams[d].synchronize()
                before[d].use()
    exact.check_norm(got_norm, want, "float32", 8)
    for x, y in zip(got, values, strict=True):
        np.testing.assert_allclose(x, y.astype(np.float64) * float(1 / want), rtol=5e-7)


@pytest.mark.parametrize("current", [0, 1])
def test_a_leaf_on_a_device_that_is_not_current(two_devices: None, counter: Any, current: int) -> None:
    values = np.float32([3.0, -4.0])
    for warm in (True, False):
        leaf, mine = on(1 - current, values), on(1 - current, values)
        bound = on(current, np.float32(1.0))
        with cupy.cuda.Device(current), contextlib.nullcontext() if warm else counted(counter):
            plain = gradclip.clip_grad_norm([leaf], 1.0)
            moved = gradclip.clip_grad_norm([leaf], bound, divide_by=bound)
            given = gradclip.clip_grad_norm([leaf], bound, norm=bound * 10)
            norm = gradclip.clip_grad_norm_([mine], 1.0)
            value = gradclip.clip_grad_value([leaf], 1.0)[0]
            value_moved = gradclip.clip_grad_value([leaf], bound)[0]
            assert cupy.cuda.runtime.getDevice() == current
    for out, factor in ((plain, 0.2), (moved, 0.2), (given, 0.1)):
        check_clipped(out.grads[0], leaf, values, factor)
        assert out.norm.device.id == 1 - current
    check_clipped(mine, leaf, values, 0.2)
    assert float(host(norm)) == 5.0
    for got in (value, value_moved):
        check_like(got, leaf)
        assert host(got).tolist() == [1, -1]


def test_the_current_device_is_restored_after_an_error(two_devices: None) -> None:
    current = cupy.cuda.runtime.getDevice()
    with pytest.raises(gradclip.NonFiniteError, match=r"grads\[0\].*1 NaN"):
        gradclip.clip_grad_norm([on(1 - current, np.float32([np.nan]))], 1.0, nonfinite="error")
    assert cupy.cuda.runtime.getDevice() == current


# -- leaves ------------------------------------------------------------------------------------------------


def _layouts(values: np.ndarray) -> dict[str, Any]:
    strided = cupy.full((values.shape[0], 2 * values.shape[1]), np.nan, values.dtype)[:, ::2]
    strided[...] = cupy.array(values)
    turned = cupy.array(values[::-1, ::-1].copy())[::-1, ::-1]
    return {
        "C": cupy.array(values),
        "Fortran": cupy.array(values, order="F"),
        "transposed": cupy.array(values.T.copy()).T,
        "strided": strided,
        "negative": turned,
        "3-d": cupy.array(np.moveaxis(values[:, None], 0, 2).copy()).transpose(2, 0, 1),
    }


@pytest.mark.parametrize("p", [2.0, 3.0])
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_layouts(dtype: str, p: float) -> None:
    values = np.random.default_rng(0).normal(size=(40, 30)).astype(dtype)
    if dtype == "complex64":
        values = values * np.complex64(1 + 0.5j)
    want = exact.norm([values], p)
    for name, leaf in _layouts(values).items():
        shaped = values.reshape(leaf.shape)
        assert np.array_equal(leaf.get(), shaped), name
        out = gradclip.clip_grad_norm([leaf], 0.5, p)
        exact.check_norm(out.norm.get(), want, "float32", 8)
        check_clipped(out.grads[0], leaf, shaped, float(0.5 / want))
        same = gradclip.clip_grad_norm([leaf], 1e6, p).grads[0]
        check_like(same, leaf)
        assert same.get().tobytes() == shaped.tobytes()
        gradclip.clip_grad_norm_([leaf], 0.5, p)
        check_clipped(leaf, leaf, shaped, float(0.5 / want))


def test_a_broadcast_view() -> None:
    leaf = cupy.broadcast_to(cupy.array(np.float32([3.0, 4.0])), (4, 2))
    out = gradclip.clip_grad_norm([leaf], 1.0)
    assert float(out.norm) == 10.0
    check_clipped(out.grads[0], leaf, np.full((4, 2), [3, 4]), 0.1)


def test_a_broadcast_view_in_place_is_refused_or_right() -> None:
    """Elements that share memory are scaled once, or the tree stays as it was."""
    first, row = cupy.array(np.float32([3.0, 4.0])), cupy.array(np.float32([3.0, 4.0]))
    shared = cupy.lib.stride_tricks.as_strided(row, (3, 2), (0, 4))
    try:
        gradclip.clip_grad_norm_([first, shared], 1.0)
    except gradclip.LeafError:
        factor = 1.0
    else:
        factor = 0.1
    for x in (first, row):
        np.testing.assert_allclose(x.get(), np.array([3, 4]) * factor, rtol=1e-6)


def test_every_dtype_at_once() -> None:
    names = ["float16", "float32", "float64", "complex64", "complex128"]
    values = [np.array([[3.0, -4.0]]).astype(name) for name in names]
    values[3] = values[3] * np.complex64(1j)
    values += [np.zeros((0, 3), np.float32), np.array(2.0, np.float16), np.array(0.0)]
    leaves = [cupy.array(x) for x in values]
    want = exact.norm(values)
    out = gradclip.clip_grad_norm(leaves, 1.0)
    assert (out.norm.dtype, out.norm.shape) == (np.float64, ())
    exact.check_norm(out.norm.get(), want, "float64")
    for got, leaf, x in zip(out.grads, leaves, values, strict=True):
        check_clipped(got, leaf, x, float(1 / want))
    for got, x in zip(gradclip.clip_grad_norm(leaves, 1e3).grads, values, strict=True):
        assert got.get().tobytes() == x.tobytes()
    gradclip.clip_grad_norm_(leaves, 1.0)
    for got, x in zip(leaves, values, strict=True):
        check_clipped(got, got, x, float(1 / want))


def test_empty_leaves_only() -> None:
    leaf = cupy.zeros((0, 3), cupy.float16)
    out = gradclip.clip_grad_norm({"w": leaf, "n": None}, 1.0)
    check_like(out.grads["w"], leaf)
    assert type(out.norm) is cupy.ndarray
    assert (out.norm.dtype, float(out.norm)) == (np.float32, 0.0)
    assert float(gradclip.clip_grad_norm_([leaf], 0.0, 3.0)) == 0.0


@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, 0.5, INF, -INF, -1.0])
def test_extremes(p: float) -> None:
    cases = [
        np.float32([3e38, -3e38]),
        np.float32([1e-30, 2e-38]),
        np.float32([1e20, 1e-20, 1.0]),
        np.array([1e200, 1.7e308]),
        np.array([1e-200, 3e-308]),
        np.float16([6e4, 300.0]),
        np.complex64([3e38 + 3e38j, 1.0]),
    ]
    for values in cases:
        want = exact.norm([values], p)
        bound = float(min(want / 3, mpmath.mpf(1e38)))
        out = gradclip.clip_grad_norm([cupy.array(values)], bound, p)
        exact.check_norm(out.norm.get(), want, exact.norm_dtype([values]), 8)
        got = out.grads[0].get()
        assert got.dtype == values.dtype
        for a, x in zip(exact.components(got), exact.components(values), strict=True):
            right = mpmath.mpf(x) * mpmath.mpf(bound) / want
            assert abs(mpmath.mpf(a) - right) <= 2 * exact.ulp(right, values.dtype.name) + abs(right) * 2.0**-20, (
                values,
                a,
                right,
            )


@pytest.mark.parametrize("order", [["n", "c"], ["c", "n"]])
def test_numpy_beside_cupy_is_refused(order: list[str]) -> None:
    leaves = {"n": np.ones(2), "c": cupy.ones(2)}
    for verb in (
        gradclip.global_norm,
        lambda g: gradclip.clip_grad_norm(g, 1.0),
        lambda g: gradclip.clip_grad_norm_(g, 1.0),
        lambda g: gradclip.clip_grad_value(g, 1.0),
        lambda g: gradclip.clip_grad_value_(g, 0.5),
    ):
        with pytest.raises(gradclip.LeafError, match=r"grads\['n'\] (is )?a numpy array") as caught:
            verb({k: leaves[k] for k in order})
        assert "grads['c']" in str(caught.value)
        assert "cupy array" in str(caught.value)
    assert leaves["n"].tolist() == leaves["c"].get().tolist() == [1, 1]


@pytest.mark.parametrize("view", [lambda a: a, lambda a: a[:], lambda a: a.view()], ids=["same", "slice", "view"])
def test_aliases_are_scaled_once(view: Any) -> None:
    a = cupy.array(np.float32([3.0, 4.0]))
    norm = gradclip.clip_grad_norm_({"x": a, "y": [view(a)]}, 1.0)
    np.testing.assert_allclose(float(norm), math.sqrt(50), rtol=1e-6)
    np.testing.assert_allclose(a.get(), np.array([3, 4]) / math.sqrt(50), rtol=1e-6)


def test_two_halves_of_one_buffer_are_two_leaves() -> None:
    a = cupy.array(np.float32([3.0, 4.0]))
    gradclip.clip_grad_norm_([a[:1], a[1:]], 1.0)
    np.testing.assert_allclose(a.get(), [0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize("kind", ["float32", "float64", "float16", "int32"])
def test_bounds_on_the_device(kind: str) -> None:
    leaf = cupy.array(np.float32([3.0, 4.0]))

    def clip(c: float) -> np.ndarray:
        out = gradclip.clip_grad_norm([leaf], cupy.array(c, kind)).grads[0]
        mine = leaf.copy()
        gradclip.clip_grad_norm_([mine], cupy.array(c, kind))
        check_like(out, leaf)
        assert out.get().tobytes() == mine.get().tobytes()
        return out.get()

    np.testing.assert_allclose(clip(1), [0.6, 0.8], rtol=1e-6)
    assert clip(5).tobytes() == leaf.get().tobytes()
    assert clip(0).tobytes() == np.zeros(2, np.float32).tobytes()
    assert clip(-1).tolist() == [0, 0]
    if kind != "int32":
        assert clip(INF).tobytes() == leaf.get().tobytes()
        assert np.isnan(clip(math.nan)).all()


def test_a_bound_on_the_device_that_is_not_a_scalar_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_norm.*0-d.*shape \(1,\)"):
        gradclip.clip_grad_norm([cupy.ones(2)], cupy.ones(1))


def test_the_reported_norm_as_a_bound_clips_nothing() -> None:
    leaf = cupy.array(np.random.default_rng(1).normal(size=1000).astype(np.float32))
    for p in (2.0, 1.0, 3.0, INF):
        norm = gradclip.global_norm([leaf], p)
        assert gradclip.clip_grad_norm([leaf], norm, p).grads[0].get().tobytes() == leaf.get().tobytes()
        assert gradclip.clip_grad_norm([leaf], float(norm), p).grads[0].get().tobytes() == leaf.get().tobytes()

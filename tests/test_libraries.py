"""What is particular to single libraries: NumPy's layouts, torch, dask, devices of array-api-strict, the oracle."""

from __future__ import annotations

import math
import random
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest

import exact
import gradclip
from backends import BACKENDS, MISSING, Backend, leaves, np_dtype

INF = math.inf
CHUNK = 65536


def wide(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)


def two_norm(*leaves: Any) -> float:
    """The 2-norm of ordinary leaves of at most 32 bits, whose squares float64 holds exactly."""
    return math.sqrt(math.fsum(float(s) for x in leaves for s in (np.abs(wide(x)) ** 2).ravel()))


# -- NumPy -------------------------------------------------------------------------------------------------


def _values(*shape: int) -> np.ndarray:
    return np.random.default_rng(math.prod(shape)).normal(size=shape).astype(np.float32)


def _strided(x: np.ndarray) -> np.ndarray:
    out = np.full((*x.shape[:-1], 2 * x.shape[-1]), 1e30, x.dtype)[..., ::2]
    out[...] = x
    return out


def _fortran(x: np.ndarray) -> np.ndarray:
    return np.array(x, order="F")


def _swapped(x: np.ndarray) -> np.ndarray:
    return x.astype(x.dtype.newbyteorder())


def _reversed(x: np.ndarray) -> np.ndarray:
    out = x.copy()[tuple(slice(None, None, -1) for _ in x.shape)]
    out[...] = x
    return out


def _middle_axis_out(x: np.ndarray) -> np.ndarray:
    """Neither C nor Fortran order."""
    out = np.moveaxis(np.empty((*x.shape[1:], x.shape[0]), x.dtype), -1, 0)
    out[...] = x
    return out


def _unaligned(x: np.ndarray) -> np.ndarray:
    raw = np.zeros(x.nbytes + 1, np.uint8)[1:]
    out = raw.view(x.dtype).reshape(x.shape)
    out[...] = x
    assert not out.flags.aligned
    return out


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "C": np.copy,
    "Fortran": _fortran,
    "strided": _strided,
    "negative": _reversed,
    "byte-swapped": _swapped,
    "swapped and strided": lambda x: _strided(_swapped(x)),
    "moved axis": _middle_axis_out,
    "unaligned": _unaligned,
}
SHAPES = [(5,), (3, 4), (2, 3, 4), (CHUNK + 7,), (3, CHUNK // 2 + 5), (2, 3, 17_000), (40_000, 2), (2, CHUNK + 1)]


def _check_numpy(got: Any, leaf: np.ndarray, want: np.ndarray, rtol: float = 2**-22) -> None:
    assert type(got) is np.ndarray
    assert got.dtype == leaf.dtype
    assert got.shape == leaf.shape
    np.testing.assert_allclose(wide(got), want, rtol=rtol)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_numpy_layouts(layout: str, shape: tuple[int, ...]) -> None:
    values = _values(*shape)
    leaf, other = LAYOUTS[layout](values), np.float32([3.0, -4.0])
    want = two_norm(values, other)
    before = leaf.tobytes()

    grads, norm = gradclip.clip_grad_norm({"a": leaf, "b": other}, 1.0)
    exact.check_norm(norm, mpmath.mpf(want), "float32")
    assert (type(norm), norm.shape, norm.dtype) == (np.ndarray, (), np.float32)
    _check_numpy(grads["a"], leaf, values / want)
    _check_numpy(grads["b"], other, wide(other) / want)
    assert leaf.tobytes() == before
    assert not np.shares_memory(grads["a"], leaf)

    same = gradclip.clip_grad_norm({"a": leaf, "b": other}, 1e6).grads
    assert same["a"] is leaf
    assert same["b"] is other
    assert leaf.tobytes() == before

    values_clipped = gradclip.clip_grad_value([leaf], 0.5)[0]
    _check_numpy(values_clipped, leaf, wide(values).clip(-0.5, 0.5), 0)

    gradclip.clip_grad_norm_([leaf, other], 1.0)
    _check_numpy(leaf, leaf, values / want)
    leaf[...] = values
    gradclip.clip_grad_value_([leaf], 0.5)
    _check_numpy(leaf, leaf, wide(values).clip(-0.5, 0.5), 0)


@pytest.mark.parametrize("p", [1.0, 3.0, INF, -INF, 0.0, -1.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_numpy_layouts_other_norms(layout: str, p: float) -> None:
    values = _values(2, 3, 17_000)
    ordinary = np.abs(wide(values)).ravel()
    want = {0: ordinary.size, INF: ordinary.max(), -INF: ordinary.min()}.get(p) or mpmath.mpf(
        math.fsum(ordinary**p)
    ) ** (1 / mpmath.mpf(p))
    leaf = LAYOUTS[layout](values)
    exact.check_norm(gradclip.global_norm([leaf], p), mpmath.mpf(want), "float32", 8)
    _check_numpy(gradclip.clip_grad_norm([leaf], 1e-9, p).grads[0], leaf, values * float(1e-9 / want))


@pytest.mark.parametrize("shape", [(4, 3), (3, CHUNK), (CHUNK + 1, 2)], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_numpy_broadcast_views(shape: tuple[int, int], axis: int) -> None:
    row = _values(shape[1 - axis])
    leaf = np.broadcast_to(np.expand_dims(row, axis), shape)
    values = np.array(leaf)
    want = two_norm(values)
    grads, norm = gradclip.clip_grad_norm([leaf], 1.0)
    exact.check_norm(norm, mpmath.mpf(want), "float32")
    _check_numpy(grads[0], leaf, values / want)
    assert gradclip.clip_grad_norm([leaf], 1e6).grads[0] is leaf
    shared = np.lib.stride_tricks.as_strided(row.copy(), (2, row.size), (0, row.itemsize), writeable=True)
    kept = shared.copy()
    with pytest.raises(gradclip.LeafError, match=r"grads\[0\].*stride.*gradclip\.clip_grad_norm,"):
        gradclip.clip_grad_norm_([shared], 1e-3)
    assert np.array_equal(shared, kept)


@pytest.mark.parametrize("clipped", [True, False])
def test_numpy_zero_dimensional_and_empty(clipped: bool) -> None:
    tree = [np.array(3.0, np.float32), np.zeros((0, 4), np.float64), np.array(4.0, np.float16), np.zeros(0, "f4").T]
    out = gradclip.clip_grad_norm(tree, 1.0 if clipped else 9.0)
    assert (out.norm.dtype, float(out.norm)) == (np.float64, 5.0)  # an empty float64 leaf is a float64 leaf
    for got, leaf in zip(out.grads, tree, strict=True):
        assert type(got) is np.ndarray
        assert (got.dtype, got.shape) == (leaf.dtype, leaf.shape)
        assert clipped or got is leaf
        if leaf.size:
            np.testing.assert_allclose(float(got), float(leaf) / (5.0 if clipped else 1.0), rtol=1e-3)
    gradclip.clip_grad_norm_(tree, 1.0)
    np.testing.assert_allclose([float(tree[0]), float(tree[2])], [0.6, 0.8], rtol=1e-3)


def test_numpy_scalars() -> None:
    tree = [np.float32(3.0), np.float64(4.0), np.array([0.0])]
    grads, norm = gradclip.clip_grad_norm(tree, 1.0)
    assert [type(g) for g in grads] == [np.float32, np.float64, np.ndarray]
    np.testing.assert_allclose([grads[0], grads[1]], [0.6, 0.8], rtol=1e-7)
    assert (norm.dtype, float(norm)) == (np.float64, 5.0)
    assert all(a is b for a, b in zip(gradclip.clip_grad_norm(tree, 5.0).grads, tree, strict=True))
    values = gradclip.clip_grad_value(tree, 3.5)
    assert [type(v) for v in values] == [np.float32, np.float64, np.ndarray]
    assert (values[0], values[1]) == (3.0, 3.5)
    assert gradclip.clip_grad_norm([np.float32(3e38)], 1.0).grads[0] == 1.0
    array = np.array([5.0])
    for verb in (gradclip.clip_grad_norm_, gradclip.clip_grad_value_):
        with pytest.raises(gradclip.LeafError, match=r"grads\[1\].*cannot be clipped in place"):
            verb([array, np.float32(3.0)], 1.0)
    assert array == 5.0


def test_numpy_memory_mapped(tmp_path: Path) -> None:
    values = _values(3, 30_000)
    path = tmp_path / "grads.bin"
    values.tofile(path)
    mapped = np.memmap(path, np.float32, "r", shape=values.shape)
    want = two_norm(values)

    grads, norm = gradclip.clip_grad_norm([mapped], 1.0)
    exact.check_norm(norm, mpmath.mpf(want), "float32")
    _check_numpy(grads[0], mapped, values / want)
    assert gradclip.clip_grad_norm([mapped], 1e6).grads[0] is mapped
    with pytest.raises(gradclip.LeafError, match=r"grads\[0\] is .*read-only"):
        gradclip.clip_grad_norm_([mapped], 1.0)

    writeable = np.memmap(path, np.float32, "r+", shape=values.shape)
    gradclip.clip_grad_norm_([writeable], 1.0)
    writeable.flush()
    np.testing.assert_allclose(np.fromfile(path, np.float32).reshape(values.shape), values / want, rtol=2**-22)


@pytest.mark.parametrize("verb", [gradclip.clip_grad_norm_, gradclip.clip_grad_value_])
def test_numpy_read_only_is_refused_before_anything_is_written(verb: Any) -> None:
    first, last = np.float32([3.0, 4.0]), np.float32([5.0])
    locked = np.float32([6.0])
    locked.flags.writeable = False
    name = verb.__name__.removesuffix("_")
    with pytest.raises(gradclip.LeafError, match=rf"grads\['b'\]\[0\] is .*read-only.*gradclip\.{name},"):
        verb({"a": first, "b": [locked], "c": last}, 1.0)
    assert (first.tolist(), locked.tolist(), last.tolist()) == ([3, 4], [6], [5])


def test_numpy_error_policy_writes_nothing() -> None:
    first, bad = np.float32([3.0, 4.0]), np.float32([1.0, np.nan, -np.inf])
    with pytest.raises(RuntimeError, match=r"grads\[1\] \(float32, shape \(3,\)\): 1 NaN, 1 inf"):
        gradclip.clip_grad_norm_([first, bad], 1.0, 2.0, True)
    assert first.tolist() == [3, 4]
    assert np.array_equal(bad, np.float32([1.0, np.nan, -np.inf]), equal_nan=True)


@pytest.mark.parametrize("n", [2, CHUNK + 3])
def test_numpy_aliases_are_scaled_once(n: int) -> None:
    a = np.full(n, 3.0, np.float32)
    view = a[:]
    want = math.sqrt(3 * 9 * n)
    norm = gradclip.clip_grad_norm_({"x": a, "y": [a, view]}, 1.0)
    np.testing.assert_allclose(norm, want, rtol=1e-6)
    np.testing.assert_allclose(a, 3 / want, rtol=1e-6)
    b = np.full(n, 3.0, np.float32)
    np.testing.assert_allclose(gradclip.clip_grad_norm([b, b[:]], 1.0).grads[1], 3 / math.sqrt(18 * n), rtol=1e-6)
    assert (b == 3).all()


def test_numpy_overlap_that_is_not_the_same_view_is_scaled_apart() -> None:
    """Two halves of one buffer are two leaves: each element is scaled once."""
    a = np.float32([3.0, 4.0])
    gradclip.clip_grad_norm_([a[:1], a[1:]], 1.0)
    np.testing.assert_allclose(a, [0.6, 0.8], rtol=1e-6)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, 0.5, 1000.0, INF, -INF, -1.0, 0.0])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"])
def test_numpy_under_seterr_raise(dtype: str, p: float) -> None:
    """The caller's floating-point traps do not fire on what is answered by the policy."""
    pytest.importorskip("ml_dtypes")
    kind = np_dtype(dtype)
    top = float(exact.largest(dtype))
    low = float(exact.smallest_normal(dtype))
    cases = [[top, top], [low, low / 4], [0.0, 0.0], [top, low], [math.nan, 1.0], [INF, 1.0], []]
    for case in cases:
        with np.errstate(all="ignore"):
            host = np.array(case).astype(kind)
        for bound in (1.0, 0.0, INF, low):
            for policy in ("propagate", "zero"):
                mine = host.copy()
                with np.errstate(all="raise"):
                    out = gradclip.clip_grad_norm([host], bound, p, nonfinite=policy)
                    norm = gradclip.clip_grad_norm_([mine], bound, p, nonfinite=policy)
                    other = gradclip.clip_grad_norm([host], bound, p, nonfinite=policy, divide_by=4.0)
                assert out.grads[0].dtype == mine.dtype == other.grads[0].dtype == kind
                assert out.grads[0].tobytes() == mine.tobytes()
                assert np.array_equal(norm, out.norm, equal_nan=True)
                if not np.isfinite(wide(host)).all():
                    shown = wide(out.grads[0])
                    assert (np.isnan(shown) if policy == "propagate" else shown == 0).all()
                else:
                    assert np.isfinite(wide(out.grads[0])).all()
        if not dtype.startswith("complex"):
            with np.errstate(all="raise"):
                limited = gradclip.clip_grad_value([host], 1.0)[0]
            assert np.array_equal(wide(limited), wide(host).clip(-1, 1), equal_nan=True)


@pytest.mark.parametrize("n", [3, CHUNK + 5])
def test_numpy_bfloat16(n: int) -> None:
    kind = pytest.importorskip("ml_dtypes").bfloat16
    host = _values(n).astype(kind)
    want = two_norm(host)
    mine = host.copy()
    grads, norm = gradclip.clip_grad_norm([host], 1.0)
    gradclip.clip_grad_norm_([mine], 1.0)
    exact.check_norm(norm, mpmath.mpf(want), "float32")
    assert norm.dtype == np.float32
    assert grads[0].dtype == mine.dtype == kind
    assert np.array_equal(grads[0], mine)
    near = np.abs(wide(grads[0]) - wide(host) / want)
    units = np.exp2(np.floor(np.log2(np.abs(wide(host) / want))) - 7)
    assert (near <= units * 0.5001).all()  # rounded once


@pytest.mark.library("numpy")
@pytest.mark.parametrize("shape", [(5_000_000,), (1, 5_000_000), (2, 1, 2_500_000), (50, 50_000, 2)], ids=str)
def test_counting_what_is_not_finite_takes_no_masks_as_large_as_the_leaf(shape: tuple[int, ...]) -> None:
    x = np.ones(shape, np.float32)
    x.flat[123_456], x.flat[-1] = math.nan, -INF
    gradclip.global_norm(x)  # what is imported and kept the first time is not counted
    tracemalloc.start()
    try:
        with pytest.raises(gradclip.NonFiniteError, match=r"grads \(float32, shape \(.*\)\): 1 NaN, 1 inf"):
            gradclip.clip_grad_norm(x, 1.0, nonfinite="error")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3e6, "beside 20 MB of gradients"


def test_numpy_threads() -> None:
    trees = [[_values(CHUNK + i), _values(3, i + 1), np.full(i + 1, 1e30, np.float32)] for i in range(8)]
    alone = [gradclip.clip_grad_norm(t, 1.0 + i) for i, t in enumerate(trees)]
    mine = [[x.copy() for x in t] for t in trees]

    def work(i: int) -> Any:
        return gradclip.clip_grad_norm(trees[i], 1.0 + i), gradclip.clip_grad_norm_(mine[i], 1.0 + i)

    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            results = list(pool.map(work, range(8)))
            for i, (out, norm) in enumerate(results):
                assert out.norm == alone[i].norm
                for a, b in zip(out.grads, alone[i].grads, strict=True):
                    assert np.array_equal(a, b)
                assert norm <= alone[i].norm
    for out, clipped in zip(alone, mine, strict=True):
        for a, b in zip(out.grads, clipped, strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-6)


def test_numpy_large_leaf_stays_exact_in_pieces() -> None:
    """One element that is tiny, huge, or NaN in the last chunk is not lost."""
    x = np.ones(2 * CHUNK + 3, np.float64)
    x[-1] = 1e200
    exact.check_norm(gradclip.global_norm([x]), mpmath.mpf(1e200), "float64")
    x[:] = 1e-200
    exact.check_norm(gradclip.global_norm([x]), mpmath.sqrt(x.size) * mpmath.mpf(1e-200), "float64")
    x[-1] = np.nan
    assert np.isnan(gradclip.global_norm([x]))
    assert np.isnan(gradclip.clip_grad_norm([x], 1.0).grads[0]).all()


# -- dask --------------------------------------------------------------------------------------------------


@pytest.fixture
def da() -> Any:
    return pytest.importorskip("dask.array")


@contextmanager
def nothing_computed() -> Iterator[None]:
    import dask

    def refuse(*args: Any, **kw: Any) -> Any:
        raise AssertionError("dask was asked to compute")

    with dask.config.set(scheduler=refuse):
        yield


dask_only = pytest.mark.library("dask")


def computed(*arrays: Any) -> Any:
    import dask

    return dask.compute(*arrays, scheduler="synchronous")


@dask_only
def test_dask_the_scheduler_would_tell(da: Any) -> None:
    with nothing_computed(), pytest.raises(AssertionError, match="asked to compute"):
        da.ones(3, chunks=2).sum().compute()


@dask_only
@pytest.mark.sampled(2)
@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, INF, -INF, 0.0])
def test_dask_stays_lazy(da: Any, p: float) -> None:
    host = [_values(7, 3), np.float32([3e30, -4e30]), _values(5).astype(np.float16)]
    tree = [da.from_array(x, chunks=2) for x in host]
    with nothing_computed():
        out = gradclip.clip_grad_norm(tree, 1.0, p)
        scaled = gradclip.clip_grad_norm(tree, 1.0, p, divide_by=8.0, nonfinite="zero")
        norm = gradclip.global_norm(tree, p)
    assert all(isinstance(x, da.Array) for x in [*out.grads, *scaled.grads, out.norm, norm])
    assert [(x.dtype, x.shape, x.chunks) for x in out.grads] == [(x.dtype, x.shape, x.chunks) for x in tree]
    assert norm.shape == out.norm.shape == ()
    want = exact.norm(host, p)
    factor = float(1 / want) if want > 1 else 1.0
    *grads, a, b, c = computed(*out.grads, out.norm, norm, scaled.norm)
    for x in (a, b):
        assert x.dtype == np.float32
        exact.check_norm(x, want, "float32", 8)
    exact.check_norm(c, want if p == 0 else want / 8, "float32", 8) if p else None
    for got, x in zip(grads, host, strict=True):
        assert got.dtype == x.dtype
        np.testing.assert_allclose(
            wide(got), wide(x) * factor, rtol=2**-10 if x.dtype == np.float16 else 2**-22, atol=6e-8
        )


@dask_only
def test_dask_values_and_bounds_stay_lazy(da: Any) -> None:
    leaf, bound = da.from_array(np.float32([3.0, -4.0]), chunks=1), da.from_array(np.float32(1.0))
    with nothing_computed():
        values = gradclip.clip_grad_value([leaf], 3.5)[0]
        out = gradclip.clip_grad_norm([leaf], bound, divide_by=bound)
    values, grads, norm = computed(values, out.grads[0], out.norm)
    assert values.tolist() == [3.0, -3.5]
    np.testing.assert_allclose(grads, [0.6, -0.8], rtol=1e-6)
    assert float(norm) == 5.0


@dask_only
@pytest.mark.sampled(2)
@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, INF])
def test_dask_extremes_without_a_warning(da: Any, p: float) -> None:
    """Warnings are errors here, also when dask computes, long after gradclip has returned."""
    for case in ([1e200, 1e200], [1.7e308, 1.7e308], [1e-200, 1e-310], [0.0, 0.0]):
        host = np.array(case)
        out = gradclip.clip_grad_norm([da.from_array(host, chunks=1)], 1.0, p)
        grads, norm = computed(out.grads[0], out.norm)
        want = exact.norm([host], p)
        exact.check_norm(norm, want, "float64", 8)
        np.testing.assert_allclose(grads, [float(x / max(want, 1)) for x in case], rtol=1e-14)
    single = np.float32([3e38, 3e38])
    out = gradclip.clip_grad_norm([da.from_array(single, chunks=1)], 1.0, p)
    grads, norm = computed(out.grads[0], out.norm)
    exact.check_norm(norm, exact.norm([single], p), "float32", 8)
    np.testing.assert_allclose(grads, wide(single) / float(exact.norm([single], p)), rtol=1e-6)


@dask_only
@pytest.mark.parametrize("bad", [math.nan, INF])
def test_dask_policies(da: Any, bad: float) -> None:
    leaf = da.from_array(np.array([1.0, bad]), chunks=1)
    with nothing_computed():
        zero = gradclip.clip_grad_norm([leaf], 1.0, nonfinite="zero").grads[0]
        nan = gradclip.clip_grad_norm([leaf], 1.0).grads[0]
    zero, nan = computed(zero, nan)
    assert zero.tolist() == [0, 0]
    assert np.isnan(nan).all()


# -- array-api-strict --------------------------------------------------------------------------------------


@pytest.fixture(params=["2023.12", "2024.12"])
def strict(request: pytest.FixtureRequest) -> Iterator[Any]:
    strict = pytest.importorskip("array_api_strict")
    with strict.ArrayAPIStrictFlags(
        api_version=request.param, boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=()
    ):
        yield strict


strict_only = pytest.mark.library("array-api-strict")


def _host(strict: Any, x: Any) -> np.ndarray:
    return np.array(np.from_dlpack(x.to_device(strict.Device("CPU_DEVICE"))))


@strict_only
@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, 0.5, INF, -INF, 0.0, -1.0])
@pytest.mark.parametrize("bound", [0.125, 1e6])
def test_strict_devices_are_kept(strict: Any, p: float, bound: float) -> None:
    host = [np.float32([3.0, -1.0]), np.array([[4.0]]), np.float32([]), np.complex64([1 + 2j]), np.float32(2.0)]
    places = ["device1", "CPU_DEVICE", "device2", "device1", "CPU_DEVICE"]
    tree = [strict.asarray(x, device=strict.Device(d)) for x, d in zip(host, places, strict=True)]
    want = exact.norm(host, p)
    out = gradclip.clip_grad_norm(tree, bound, p)
    exact.check_norm(_host(strict, out.norm), want, "float64", 8)
    assert out.norm.dtype == strict.float64
    assert out.norm.shape == ()
    assert out.norm.device == strict.Device("device1")  # the first leaf's
    factor = float(bound / want) if want > bound else 1.0
    for got, leaf, x in zip(out.grads, tree, host, strict=True):
        assert type(got) is type(leaf)
        assert (got.dtype, got.shape, got.device) == (leaf.dtype, leaf.shape, leaf.device)
        if factor == 1:
            assert _host(strict, got).tobytes() == x.tobytes()
        np.testing.assert_allclose(_host(strict, got), x * factor, rtol=2**-22)

    mine = [strict.asarray(x, device=leaf.device, copy=True) for x, leaf in zip(tree, tree, strict=True)]
    gradclip.clip_grad_norm_(mine, bound, p)
    for got, leaf in zip(out.grads, mine, strict=True):
        assert leaf.device == got.device
        np.testing.assert_array_equal(_host(strict, leaf), _host(strict, got))


@strict_only
def test_strict_bounds_on_another_device_travel(strict: Any) -> None:
    leaf = strict.asarray([3.0, 4.0], dtype=strict.float64, device=strict.Device("device1"))
    one = strict.asarray(1.0, device=strict.Device("device2"))
    out = gradclip.clip_grad_norm([leaf], one, divide_by=one)
    assert out.grads[0].device == leaf.device
    np.testing.assert_allclose(_host(strict, out.grads[0]), [0.6, 0.8], rtol=1e-15)
    out = gradclip.clip_grad_norm([leaf], one, norm=strict.asarray(10.0, device=strict.Device("device2")))
    np.testing.assert_allclose(_host(strict, out.grads[0]), [0.3, 0.4], rtol=1e-15)


@strict_only
def test_strict_values_stay_on_their_devices(strict: Any) -> None:
    tree = [strict.asarray([3.0, -4.0], device=strict.Device(d)) for d in ("device1", "CPU_DEVICE")]
    for bounds in (1.0, (-1.0, 1.0), [1.0, (-1.0, 1.0)]):
        for got, leaf in zip(gradclip.clip_grad_value(tree, bounds), tree, strict=True):
            assert (got.device, got.dtype, got.shape) == (leaf.device, leaf.dtype, leaf.shape)
            assert _host(strict, got).tolist() == [1, -1]


@strict_only
def test_strict_error_policy(strict: Any) -> None:
    good = strict.asarray([3.0, 4.0], dtype=strict.float64, device=strict.Device("device1"))
    bad = strict.asarray([math.nan, INF, INF], dtype=strict.float64, device=strict.Device("device2"))
    out = gradclip.clip_grad_norm([good], 1.0, nonfinite="error")
    np.testing.assert_allclose(_host(strict, out.grads[0]), [0.6, 0.8], rtol=1e-15)
    with pytest.raises(gradclip.NonFiniteError, match=r"grads\[1\] \(float64, shape \(3,\)\): 1 NaN, 2 inf"):
        gradclip.clip_grad_norm([good, bad], 1.0, nonfinite="error")


# -- the oracle --------------------------------------------------------------------------------------------


@contextmanager
def generic() -> Iterator[None]:
    """Let NumPy arrays be clipped by the generic kernels."""
    import array_api_compat.numpy

    import gradclip._call
    from gradclip._backends.generic import Backend as Generic

    backend = Generic(array_api_compat.numpy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradclip._call, "backend_for", lambda *args: backend)
        yield


def _random_tree(rng: random.Random, backend: Backend) -> list[np.ndarray]:
    """Leaves of several dtypes and shapes, with magnitudes from a random part of the exponent range."""
    numbers = np.random.default_rng(rng.randrange(2**32))
    out = []
    for _ in range(rng.randint(1, 4)):
        name = rng.choice(backend.dtypes)
        shape = rng.choice([(), (1,), (7,), (3, 4), (0, 2), (33, 9)])
        low = math.log2(exact.smallest_normal(name)) + 2
        high = math.log2(exact.largest(name)) - 1
        middle = rng.choice([low, 0.0, high, rng.uniform(low, high)])
        exponents = np.clip(middle + numbers.uniform(-30, 30, shape), low, high)
        x = np.exp2(exponents) * numbers.choice([-1.0, 1.0], shape)
        if name.startswith("complex"):
            x = x + 1j * np.exp2(np.clip(exponents + numbers.uniform(-3, 3, shape), low, high))
        out.append(np.asarray(x).astype(np_dtype(name)))
    return out


def _ulps(a: Any, b: Any, dtype: str) -> float:
    """How far two arrays are apart, component by component, in units of the last place of `dtype`."""
    a, b = np.atleast_1d(wide(a)), np.atleast_1d(wide(b))
    if a.dtype.kind == "c":
        a, b = (np.stack([x.real, x.imag]) for x in (a, b))
    if a.size == 0:
        return 0.0
    bits, lowest = exact.FORMATS[dtype]
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    scale = np.maximum(np.abs(np.where(np.isfinite(b), b, 1)), 2.0**lowest)
    unit = np.exp2(np.floor(np.log2(scale)) - bits + 1)
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.max(np.where(same, 0, np.abs(a - b) / unit)))


SPECIAL = [backend for backend in BACKENDS if backend.name in ("numpy", "jax", "jax-x64", "cupy", "torch")]


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(
            backend,
            id=backend.name,
            marks=[
                pytest.mark.library(backend.name),
                pytest.mark.skipif(backend.name in MISSING, reason=str(MISSING.get(backend.name))),
            ],
        )
        for backend in SPECIAL
    ],
)
@pytest.mark.sampled(2)
@pytest.mark.parametrize("seed", range(6))
def test_backends_equal_the_generic_one(backend: Backend, seed: int) -> None:
    """Within 2 units in the last place (4 where libraries have powers of their own), 4 (8) where sums are float32."""
    rng = random.Random(seed)
    with backend.active():
        for p in (2.0, 1.0, 3.0, 0.5, INF, -INF, -1.0, 0.0):
            if backend.compiles and (seed + int(p if math.isfinite(p) else 5)) % 3:
                continue  # each is compiled, which takes its time
            host = _random_tree(rng, backend)
            per = rng.choice([None, "leaf", [rng.choice(["one", "two", None]) for _ in host]])
            with generic():
                known = gradclip.norms(host, p, per=per)
                bound = min((float(n) / 3 for n in leaves(known) if np.isfinite(n)), default=1.0)
                want = gradclip.clip_grad_norm(host, bound, p, divide_by=2.0, per=per)
            got = backend.clip_grad_norm(backend.tree(host), bound, p, divide_by=2.0, per=per)
            norms = backend.norms(backend.tree(host), p, per=per)
            simple = p in (0, 1, 2) or math.isinf(p)
            allowed = (2.0 if simple else 4.0) if backend.accumulates_wide else (4.5 if simple else 8.5)
            tiny = False
            for ours, theirs in zip(leaves([norms, got.norm]), leaves([known, want.norm]), strict=True):
                assert ours.shape == theirs.shape == ()
                assert backend.dtype_of(ours) == theirs.dtype.name
                if backend.flushes and float(theirs) < 4 * exact.smallest_normal(theirs.dtype.name):
                    tiny = True
                else:
                    assert _ulps(backend.numpy(ours), theirs, theirs.dtype.name) <= allowed, (p, per, host)
            for a, b, x in zip(got.grads, want.grads, host, strict=True):
                assert backend.owns(a)
                assert backend.dtype_of(a) == b.dtype.name == x.dtype.name
                assert tuple(a.shape) == b.shape == x.shape
                if not tiny:
                    ours, theirs = backend.numpy(a), b
                    if backend.flushes:
                        small = np.abs(wide(theirs)) < 4 * float(exact.smallest_normal(x.dtype.name))
                        ours, theirs = np.where(small, 0, wide(ours)), np.where(small, 0, wide(theirs))
                    assert _ulps(ours, theirs, x.dtype.name) <= allowed, (p, per, x, a, b)


def test_numpy_views_of_one_array_in_another_shape_are_scaled_once() -> None:
    x = np.array([3.0, 4.0, 0.0, 0.0])
    norm = gradclip.clip_grad_norm_([x, x.reshape(2, 2)], 1.0)
    exact.check_norm(norm, exact.norm([x_before := np.array([3.0, 4.0]), x_before]), "float64")
    np.testing.assert_allclose(x, np.array([3.0, 4.0, 0.0, 0.0]) / math.sqrt(50), rtol=1e-15)

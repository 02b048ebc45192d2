"""Large leaves on CuPy: norms of sums of a few numbers in float32, and loads of 16 bytes wherever a leaf begins."""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import pytest
from test_cupy_kernels import INF, check_right, columns, compiler, cupy, drawn, marks, programs, text

import exact
import gradclip
from backends import np_dtype
from devices import host
from gradclip import Units

pytestmark = marks

NARROW = ["float16", "bfloat16", "float32", "complex64"]


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves of any size count as large ones."""
    monkeypatch.setattr(columns, "_LARGE", 0)


def leaf_of(x: np.ndarray) -> Any:
    try:
        return cupy.array(x)
    except (TypeError, ValueError):
        pytest.skip(f"this CuPy has no {x.dtype.name}")


def sized(rng: np.random.Generator, shape: Any, name: str, low: int, high: int) -> np.ndarray:
    if name == "bfloat16":
        return drawn(rng, shape, "float32", low, high).astype(np_dtype(name))
    return drawn(rng, shape, name, low, high)


#: Magnitudes: ordinary ones; such whose squares underflow, or vanish; such whose squares overflow; all of these.
MAGNITUDES = {"ordinary": (-6, 6), "small": (-80, -60), "tiny": (-148, -126), "big": (60, 126), "all": (-148, 126)}


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("p", [2.0, "rms", 1.0])
@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("name", NARROW)
def test_norms_of_large_leaves_are_exact(name: str, magnitude: str, p: Any) -> None:
    low, high = (max(-23, x // 8) for x in MAGNITUDES[magnitude]) if name == "float16" else MAGNITUDES[magnitude]
    rng = np.random.default_rng(3)
    values = [sized(rng, shape, name, low, high) for shape in (1, 7, 300, (40, 51), 5000)]
    leaves = [leaf_of(x) for x in values]
    exact.check_norm(gradclip.global_norm(leaves, p), exact.norm(values, p), "float32")
    for got, x in zip(gradclip.norms(leaves, p, per="leaf"), values, strict=True):
        exact.check_norm(got, exact.norm([x], p), "float32")
    for axis in (0, 1):
        (got,) = gradclip.norms([leaves[3]], p, per=Units(axis))
        for i, norm in enumerate(host(got).reshape(-1)):
            exact.check_norm(norm, exact.norm([values[3].take(i, axis)], p), "float32")


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "complex64"])
def test_one_element_is_its_own_norm(name: str) -> None:
    """Beside zeros: be it a first subnormal or a last finite number, whose square is neither."""
    format_ = exact.FORMATS[name]
    sizes = [2.0 ** (format_[1] - format_[0] + 1), 2.0 ** format_[1], 3.0, float(exact.largest(name))]
    for size in sizes:
        for p in (2.0, 1.0, INF):
            x = np.zeros(9, np_dtype(name))
            x[5] = -size
            exact.check_norm(gradclip.global_norm([leaf_of(x)], p), exact.norm([x], p), "float32", 1)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("p", [2.0, "rms", 1.0])
def test_what_is_not_finite_shows(p: Any) -> None:
    for name in NARROW:
        for bad in (INF, -INF, np.nan):
            x = np.ones(1000, np_dtype(name))
            x[[0, 77, 999]] = 0, bad, 2
            norm = float(gradclip.global_norm([leaf_of(x)], p))
            assert np.isnan(norm) if np.isnan(bad) else norm == INF, (name, bad)


def test_only_large_leaves_of_float32_norm_are_summed_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not small ones, not where some leaf makes the norm float64, not where other shards may have such a leaf."""
    asked: list[bool] = []
    measure = programs.measure

    def watched(norm: Any, step: int, kinds: Any, quick: bool = False) -> str:
        asked.append(quick)
        return measure(norm, step, kinds, quick)

    monkeypatch.setattr(programs, "measure", watched)
    few, many, wide = cupy.ones(1000, "f4"), cupy.ones(columns._LARGE // 4, "f4"), cupy.ones(3)
    gradclip.global_norm([few])
    gradclip.global_norm([many])
    gradclip.global_norm([many, wide])
    gradclip.global_norm([many], all_reduce=lambda x, op: x)
    gradclip.global_norm([many], 3.0)
    # For shards all is compiled before, and p = 3 takes two passes.
    assert asked == [False, True, False, *[False] * 2, *[False] * 2]


@pytest.mark.parametrize("name", ["float16", "float32", "float64", "complex64", "complex128"])
def test_leaves_that_begin_anywhere(name: str) -> None:
    """Every element is read and written once: before the first edge of 16 bytes, between edges, and after the last."""
    edge = 16 // np.dtype(name).itemsize or 1
    sizes = [1, edge, 3 * edge + 1, 256 * edge - 1, 1024 * edge, 1024 * edge + edge + 1, 2**14 // 16 * edge * 2 + 3]
    for size in sizes:
        x = (np.arange(size) % 97 + 1).astype(name)
        want = exact.norm([x], 1.0)
        for skipped in range(edge + 1):
            room = cupy.full(size + edge + 2, np.nan, x.dtype)
            leaf = room[skipped : skipped + size]
            leaf[...] = cupy.array(x)
            exact.check_norm(gradclip.global_norm([leaf], 1.0), want, exact.norm_dtype([x]))
            out = gradclip.clip_grad_norm([leaf], float(want / 2), 1.0).grads[0]
            np.testing.assert_array_equal(host(out), x / 2)
            gradclip.clip_grad_norm_([leaf], float(want / 2), 1.0)
            np.testing.assert_array_equal(host(leaf), x / 2)
            spoiled = np.isnan(host(room))
            assert spoiled.sum() == edge + 2
            assert not spoiled[skipped : skipped + size].any()


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_products_that_are_subnormal_are_rounded_once(name: str) -> None:
    """A clip of numbers about the smallest normal one, and of subnormal ones."""
    first = float(exact.smallest_normal(name))
    x = (np.arange(1, 600) * (first / 128)).astype(name)
    want = exact.norm([x])
    for c in (0.3, 0.77, 2.0**-10):
        out = gradclip.clip_grad_norm([cupy.array(x)], float(want * c)).grads[0]
        check_right(host(out), x, mpmath.mpf(float(want * c)) / want)


def test_a_device_is_asked_once_how_many_blocks_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def each(kernel: int, threads: int, shared: int) -> int:
        asked.append(threads)
        return 5

    monkeypatch.setattr(cupy.cuda.driver, "occupancyMaxActiveBlocksPerMultiprocessor", each)
    source = 'extern "C" __global__ void asked_once(double* x) { x[blockIdx.x] = blockDim.x; }'
    kernel = compiler.compiled(source, "asked_once")
    most = 5 * cupy.cuda.Device().attributes["MultiProcessorCount"]
    assert [kernel.blocks(n) for n in (1, most - 1, most, 10**9)] == [1, most - 1, most, most]
    assert asked == [text.THREADS]
    assert compiler.compiled(source, "asked_once") is kernel
    out = cupy.zeros(3)
    kernel(2, (out,), 32)
    np.testing.assert_array_equal(host(out), [32, 32, 0])


@pytest.mark.parametrize("p", [2.0, "rms", INF, -INF, 3.0])
def test_many_groups_are_joined_by_few_threads(monkeypatch: pytest.MonkeyPatch, p: Any) -> None:
    rng = np.random.default_rng(4)
    values = [drawn(rng, shape, "float64", -5, 5) for shape in ((40, 90), (700,), (3, 500))]
    leaves = [cupy.array(x) for x in values]
    want = gradclip.clip_grad_norm(leaves, 0.5, p, per="unit"), gradclip.clip_grad_norm(leaves, 0.5, p)
    monkeypatch.setattr(columns, "_MANY", 0)
    got = gradclip.clip_grad_norm(leaves, 0.5, p, per="unit"), gradclip.clip_grad_norm(leaves, 0.5, p)
    for mine, other in zip(got, want, strict=True):
        for x, y in zip(mine.grads, other.grads, strict=True):
            np.testing.assert_allclose(host(x), host(y), rtol=1e-14)

"""README's "What is promised about exactness": hard inputs, worst cases, and sizes up to 1e8, by exact arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest

import exact
from backends import Backend, np_dtype
from gradclip._scaled import RANGES

F32, F64 = np.float32, np.float64


def need(xp: Backend, *dtypes: str) -> None:
    missing = [d for d in dtypes if not xp.has(d)]
    if missing:
        pytest.skip(f"{xp.name} has no {', '.join(missing)}")


def close(xp: Backend, got, want, ulps: float) -> None:
    got = xp.numpy(got)
    for a, b in zip(exact.components(got), want, strict=True):
        assert abs(a - b) <= ulps * exact.ulp(b, got.dtype.name), (got, want)


ROOT_HALF = exact.mpmath.sqrt(0.5)

NAMED = [
    pytest.param("float16", [[300.0]], 1.0, [[1.0]], id="float16 300"),
    pytest.param("float16", [[65504.0, 65504.0]], 1.0, [[ROOT_HALF, ROOT_HALF]], id="float16 largest"),
    pytest.param("float32", [[1e20, 1e20]], 1.0, [[ROOT_HALF, ROOT_HALF]], id="float32 1e20"),
    pytest.param("float32", [[3e38, 3e38]], 1.0, [[ROOT_HALF, ROOT_HALF]], id="float32 3e38"),
    pytest.param("float32", [[1e-30]], 1e-31, [[1e-31]], id="float32 1e-30"),
    pytest.param("bfloat16", [[3e38, 3e38]], 1.0, [[ROOT_HALF, ROOT_HALF]], id="bfloat16 3e38"),
    pytest.param("float64", [[1e200, 1e200]], 1.0, [[ROOT_HALF, ROOT_HALF]], id="float64 1e200"),
    pytest.param("float64", [[1e-200, 1e-200]], 1e-201, [[1e-201 * ROOT_HALF] * 2], id="float64 1e-200"),
    pytest.param("float64", [[1.7e308], [1.7e308]], 1e-200, [[1e-200 * ROOT_HALF]] * 2, id="float64 largest"),
    pytest.param("float32", [[3.4e38] * 3], 4.4e-38, [[4.4e-38 / 3**0.5] * 3], id="float32 largest to smallest"),
    pytest.param("float64", [[1.7e308] * 3], 7.7e-308, [[7.7e-308 / 3**0.5] * 3], id="float64 largest to smallest"),
    pytest.param("float32", [[0.0, 0.0]], 0.0, [[0.0, 0.0]], id="zeros at 0"),
    pytest.param("float32", [[1e30], [1e-30]], 1.0, [[1.0], [0.0]], id="far apart"),
]


@pytest.mark.parametrize(("dtype", "tree", "max_norm", "want"), NAMED)
def test_named_inputs(xp, dtype, tree, max_norm, want):
    need(xp, dtype)
    out, norm = xp.clip_grad_norm([xp.array(x, dtype) for x in tree], max_norm)
    for got, values in zip(out, want, strict=True):
        close(xp, got, values, 4)
    given = [np.array(x).astype(np_dtype(dtype)) for x in tree]
    exact.check_norm(xp.numpy(norm), exact.norm(given), exact.norm_dtype(given))


def test_float16_beside_float32(xp):
    """3e-6 in float16, not 0: its rounding of 3 / 1e6."""
    need(xp, "float16", "float32")
    out, _ = xp.clip_grad_norm([xp.array([3.0], "float16"), xp.array([1e6], "float32")], 1.0)
    assert xp.numpy(out[0])[0] == np.float16(3e-6) != 0
    close(xp, out[1], [1.0], 4)


def test_thousand_bfloat16_leaves(xp):
    need(xp, "bfloat16")
    value = float(np.float32(0.01).astype(np_dtype("bfloat16")))
    leaf = xp.array(np.full(1000, value), "bfloat16")
    norm = float(xp.numpy(xp.global_norm([leaf] * 1000)))
    want = exact.mpmath.mpf(value) * 1000
    assert abs(want - 10.0098) < 1e-4
    exact.check_norm(norm, want, "float32")


def test_large_p(xp):
    out, norm = xp.clip_grad_norm([xp.array([3.0, 4.0], "float32")], 1.0, 1000)
    assert float(xp.numpy(norm)) == 4.0
    close(xp, out[0], [0.75, 1.0], 4)


def test_p_0_over_several_leaves(xp):
    tree = [xp.array([3.0, 0.0, 1e-37], "float32"), xp.array([[0.0, -1.0]], "float32")]
    assert float(xp.numpy(xp.global_norm(tree, 0))) == 3.0


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "bfloat16"])
@pytest.mark.parametrize("size", [1, 7, 1000, 4097, pytest.param(100_000, marks=pytest.mark.full)])
def test_equal_elements(xp, dtype, size):
    """All elements equal is the worst case of a sum in one row: every rounding goes the same way."""
    need(xp, dtype)
    rng = np.random.default_rng(size)
    for value in np.exp2(rng.random(6)):
        leaf = np.full(size, value).astype(np_dtype(dtype))
        count = 2 * size if dtype == "complex64" else size
        if dtype == "complex64":
            leaf = leaf * np.complex64(1 + 1j)
        for p in (2.0, 1.0, 3.0):
            if p != 2 and dtype == "complex64":
                continue
            want = abs(exact.mpmath.mpf(exact.components(leaf)[0])) * exact.mpmath.mpf(count) ** (
                1 / exact.mpmath.mpf(p)
            )
            got = xp.numpy(xp.global_norm([xp.array(leaf, dtype)], p))
            exact.check_norm(got, want, exact.norm_dtype([leaf]), 4 if p != 3 else 8)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_many_small_leaves_of_equal_elements(xp, dtype):
    need(xp, dtype)
    leaf = np.array([1.1, 1.7]).astype(np_dtype(dtype))
    x = xp.array(leaf, dtype)
    got = xp.numpy(xp.global_norm([x] * 600))
    exact.check_norm(got, exact.norm([leaf] * 600), exact.norm_dtype([leaf]))


@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, 0.5])
def test_random_elements_1e5(xp, p):
    rng = np.random.default_rng(5)
    leaf = (rng.standard_normal(100_000) * np.exp(rng.standard_normal(100_000) * 3)).astype(F32)
    got = xp.numpy(xp.global_norm([xp.array(leaf[:70_000]), xp.array(leaf[70_000:].reshape(100, -1))], p))
    # float64 holds every |x|**p to 1e-16, and fsum adds exactly
    want = math.fsum((np.abs(leaf.astype(F64)) ** p).tolist()) ** (1 / p)
    exact.check_norm(got, exact.mpmath.mpf(want), "float32", 4 if p in (1.0, 2.0) else 8)


#: 1e8 elements: what the sum of one row, or of a tree with a short accumulator, gets wrong.
BIG = 100_000_000


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_1e8_elements(xp, dtype):
    need(xp, dtype)
    if xp.name in ("numpy-readonly", "jax-jit"):
        pytest.skip("the same code as numpy and jax")
    size = 1_000_000 if xp.name in ("cupy", "array-api-strict") else BIG  # emulated device; many copies
    value = np.array(0.01, dtype)
    leaf = xp.array(np.full(size, value), dtype)
    got = float(xp.numpy(xp.global_norm([leaf])))
    want = float(exact.mpmath.mpf(float(value)) * exact.mpmath.sqrt(size))
    assert abs(got / want - 1) < (1e-7 if dtype == "float32" else 1e-13)


@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, math.inf])
def test_how_elements_are_split_does_not_matter(xp, p):
    rng = np.random.default_rng(9)
    whole = (rng.standard_normal(6000) * 10.0 ** rng.integers(-30, 30, 6000)).astype(F32)
    splits = [[whole], np.split(whole, 6), np.split(whole, [1, 5, 5000]), [whole.reshape(20, 300).T]]
    want = exact.norm([whole], p)
    for split in splits:
        got = xp.numpy(xp.global_norm([xp.array(x) for x in split], p))
        exact.check_norm(got, want, "float32", 4 if p != 3 else 8)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_clipped_norm_is_at_most_the_bound(xp, dtype):
    need(xp, dtype)
    rng = np.random.default_rng(3)
    eps = float(exact.mpmath.mpf(2) ** (1 - exact.FORMATS[dtype][0]))
    for scale in (1.0, 1e3, 1e-2):
        tree = [(rng.standard_normal(n) * scale).astype(np_dtype(dtype)) for n in (50, 1, 3)]
        bound = float(exact.norm(tree)) / 3.7
        out, _ = xp.clip_grad_norm([xp.array(x, dtype) for x in tree], bound)
        after = float(exact.norm([xp.numpy(x) for x in out]))
        assert after <= bound * (1 + 2 * eps) * (1 + 5e-7)
        assert after >= bound * (1 - 2 * eps) * (1 - 5e-7)


@pytest.mark.parametrize("p", [0.02, 0.5, -0.5])
def test_a_narrow_leaf_beside_a_wide_one(xp, p):
    """The second pass of a narrow leaf divides by what the first pass found in the wide one.

    The sum of powers, off by a few units in the last place, is raised to 1/p: so much the error grows.
    """
    if not xp.has("float64"):
        pytest.skip("needs float64")
    host = [np.full(1000, 1e38, np.float32), np.array([1e300 if p > 0 else 1e-300])]
    exact.check_norm(
        xp.numpy(xp.global_norm([xp.array(x) for x in host], p)), exact.norm(host, p), "float64", max(8, abs(4 / p))
    )


@pytest.mark.sampled(3)
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_elements_on_both_sides_of_a_bin(xp, dtype, p):
    """Neighbours of every power of two at which a number may change its bin: each counts beside the other."""
    need(xp, dtype)
    r = RANGES[dtype]
    for edge in (r.tiny, r.huge, r.thin, r.huge_sum, r.step, 1 / r.step, r.step**0.5):
        for host in ([edge / 2, edge * 2], [edge * 2, edge / 2, edge], [edge / 4, edge, edge * 3]):
            x = np.array(host, dtype)
            exact.check_norm(xp.numpy(xp.global_norm([xp.array(x)], p)), exact.norm([x], p), dtype)


FAR_APART = {
    "float32": [[1e20, 1e-12], [1e-20, 1e20], [3e38, 1.0, 2e-38]],
    "float64": [[1e300, 1e-300], [3e-308, 1e308], [1.7e308, 1.0, 3e-308]],
}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("p", [0.02, 0.1, 0.5, -0.02, -0.1, -0.5])
@pytest.mark.parametrize("dtype", list(FAR_APART))
def test_for_small_p_every_magnitude_counts(xp, dtype, p):
    """0.02: (1e-300 / 1e300)**p is 1e-12, though the quotient is beyond float64."""
    need(xp, dtype)
    rng = np.random.default_rng(6)
    reach = 110 if dtype == "float32" else 1000
    host = [np.array(x, dtype) for x in FAR_APART[dtype]]
    host += [np.exp2(rng.uniform(-reach, reach, 12)).astype(dtype) for _ in range(4)]
    for x in host:
        want = exact.norm([x], p)
        if not xp.flushes or want > exact.smallest_normal(dtype):
            exact.check_norm(xp.numpy(xp.global_norm([xp.array(x)], p)), want, dtype, max(8, abs(4 / p)))


@pytest.mark.parametrize("p", [0.001, 0.003])
def test_a_norm_beyond_all_range_clips_to_zeros(xp, p):
    """100**(1/p) is 1e667 and more: the norm is inf, the gradients were finite."""
    for dtype, value in (("float32", 1e30), ("float64", 1e300)):
        if not xp.has(dtype):
            continue
        out, norm = xp.clip_grad_norm([xp.array(np.full(100, value), dtype)], value, p)
        assert float(xp.numpy(norm)) == math.inf
        assert (xp.numpy(out[0]) == 0).all()


@pytest.mark.parametrize("p", [-0.5, -1.0, -2.0, -8.0])
def test_for_negative_p_a_zero_makes_the_norm_zero(xp, p):
    """Whatever the powers of the others add up to."""
    for dtype, value in (("float32", 2e-5), ("float32", 1e-37), ("float64", 1e-154), ("float64", 1e-307)):
        if not xp.has(dtype):
            continue
        host = np.concatenate([np.zeros(1), np.full(30, value)]).astype(dtype)
        out, norm = xp.clip_grad_norm([xp.array(host)], 1.0, p)
        assert float(xp.numpy(norm)) == 0
        assert xp.numpy(out[0]).tobytes() == host.tobytes()


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0, 1.5, 2.0, 3.0, -1.0])
def test_subnormal_complex_numbers(xp, p):
    """The magnitude of re + i im is no multiple of the smallest number."""
    need(xp, "complex128")
    if xp.flushes:
        pytest.skip(f"{xp.name} takes subnormals for 0")
    for n, ratio in ((600, 1.0), (600, 0.3), (1, 1.0)):
        host = np.full(n, 2.0**-1070 * (1 + 1j * ratio))
        norm = xp.global_norm([xp.array(host)], p)
        exact.check_norm(xp.numpy(norm), exact.norm([host], p), "float64", max(8, abs(4 / p)))

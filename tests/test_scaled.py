"""Numbers beyond their dtype: the constants keep what is said of them, and arithmetic is right over the whole range.

On NumPy's arrays of both accumulation dtypes: no library of the backends but JAX sums in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import array_api_compat.numpy as xp
import numpy as np
import pytest

import exact
from exact import mpmath
from gradclip import _parts, _scaled
from gradclip._scaled import RANGES, Scaled


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """As backends call it: the policy answers inf and NaN."""
    with np.errstate(all="ignore"):
        yield


each_dtype = pytest.mark.parametrize("dtype", list(RANGES))
MANY = mpmath.mpf(2) ** 48  # elements that sums have room for
TWO = mpmath.mpf(2)


@each_dtype
def test_the_constants_keep_what_is_said_of_them(dtype):
    r = RANGES[dtype]
    largest, normal = exact.largest(dtype), exact.smallest_normal(dtype)
    subnormal = exact.ulp(0, dtype)
    step, tiny, huge, thin, huge_sum, lift, shift, top = map(mpmath.mpf, r[:-1])
    assert all(math.frexp(x)[0] == 0.5 for x in r[:-1]), "powers of two: scaling is exact"
    assert largest < step ** mpmath.mpf(2.5), "|j| <= 2"
    assert subnormal >= step ** mpmath.mpf(-2.5)
    assert MANY * (largest / step) ** 2 <= largest, "the sum of big squares"
    assert (huge / step) ** 2 >= normal, "no big square loses bits"
    assert MANY * huge**2 <= 2 * top, "the sum of middle squares"
    assert MANY * huge_sum <= largest
    assert tiny**2 == normal, "below it a square loses bits, and nowhere else"
    assert (subnormal * step) ** 2 >= normal, "no small square loses bits"
    assert MANY * (tiny * step) ** 2 <= largest, "the sum of small squares"
    assert thin >= MANY * tiny**2, "the small bin"
    assert thin * step**2 <= largest
    assert normal <= 1 / lift <= 4 * normal
    assert subnormal / largest * shift**2 >= subnormal
    assert 1 / shift >= normal
    assert top <= largest < 2 * top
    assert r.largest == largest


def test_the_range_is_that_of_the_dtype():
    assert _scaled.range_of(np.zeros(2, np.float32)) is RANGES["float32"]
    assert _scaled.range_of(np.zeros(2)) is RANGES["float64"]


def drawn(dtype: str, seed: int, n: int = 400, zeros: bool = True) -> tuple[Scaled, list]:
    """Numbers >= 0 of all magnitudes, many beyond the dtype, and what they are exactly."""
    rng = np.random.default_rng(seed)
    r = RANGES[dtype]
    half = math.log2(r.step) / 2
    mantissa = np.exp2(rng.uniform(-half, half, n)).astype(dtype)
    if zeros:
        mantissa[rng.random(n) < 0.1] = 0
    exponent = rng.integers(-3, 4, n).astype(dtype)
    return Scaled(mantissa, exponent), exactly(Scaled(mantissa, exponent), dtype)


def exactly(x: Scaled, dtype: str) -> list:
    exponents = np.zeros_like(x.mantissa) if x.exponent is None else x.exponent
    step = mpmath.mpf(RANGES[dtype].step)
    return [mpmath.mpf(float(m)) * step ** int(e) for m, e in zip(x.mantissa, exponents, strict=True)]


def check(got: Scaled, want: list, dtype: str, ulps: float = 1) -> None:
    assert got.mantissa.dtype == dtype
    for a, b in zip(exactly(got, dtype), want, strict=True):
        assert abs(a - b) <= ulps * abs(b) * exact.ulp(1, dtype), (a, b)


@each_dtype
def test_products_and_quotients(dtype):
    (x, xs), (y, ys) = drawn(dtype, 1), drawn(dtype, 2, zeros=False)
    check(x.multiplied(xp, y), [a * b for a, b in zip(xs, ys, strict=True)], dtype)
    check(x.divided(xp, y), [a / b for a, b in zip(xs, ys, strict=True)], dtype)
    plain = Scaled(np.exp2(np.linspace(-9, 9, 400)).astype(dtype), None)
    plains = exactly(plain, dtype)
    check(plain.divided(xp, plain), [mpmath.mpf(1)] * 400, dtype, 0)
    assert plain.divided(xp, plain).exponent is None
    check(plain.multiplied(xp, y), [a * b for a, b in zip(plains, ys, strict=True)], dtype)
    check(plain.divided(xp, y), [a / b for a, b in zip(plains, ys, strict=True)], dtype)
    check(y.divided(xp, plain), [b / a for a, b in zip(plains, ys, strict=True)], dtype)
    # A mantissa that is not moderate: the least and the largest numbers of the dtype.
    ends = Scaled(np.array([float(exact.ulp(0, dtype)), float(exact.largest(dtype))], dtype), None)
    two = Scaled(np.array([2.0, 2.0], dtype), np.array([1.0, -1.0], dtype))
    wants = [a * b for a, b in zip(exactly(ends, dtype), exactly(two, dtype), strict=True)]
    check(ends.multiplied(xp, two), wants, dtype, 0)


@each_dtype
def test_comparisons(dtype):
    (x, xs), (y, ys) = drawn(dtype, 3), drawn(dtype, 4)
    assert x.exceeds(xp, y).tolist() == [a > b for a, b in zip(xs, ys, strict=True)]
    assert not x.exceeds(xp, x).any()
    plain = Scaled(np.exp2(np.linspace(-30, 30, 400)).astype(dtype), None)
    plains = exactly(plain, dtype)
    assert plain.exceeds(xp, y).tolist() == [a > b for a, b in zip(plains, ys, strict=True)]
    assert y.exceeds(xp, plain).tolist() == [b > a for a, b in zip(plains, ys, strict=True)]
    other = Scaled(plain.mantissa[::-1], None)
    assert plain.exceeds(xp, other).tolist() == [a > b for a, b in zip(plains, plains[::-1], strict=True)]
    # Beside each other, one step and two steps apart, and zeros.
    m = np.array([1, 1, 0, 0, 1], dtype)
    a, b = Scaled(m, np.array([1, 0, 1, 0, 2], dtype)), Scaled(np.array([1, 1, 1, 0, 0], dtype), np.zeros(5, dtype))
    assert a.exceeds(xp, b).tolist() == [True, False, False, False, True]
    assert b.exceeds(xp, a).tolist() == [False, False, True, False, False]


@each_dtype
def test_choices(dtype):
    (x, xs), (y, ys) = drawn(dtype, 5), drawn(dtype, 6)
    mask = np.arange(400) % 3 == 0
    check(x.where(xp, mask, y), [a if m else b for m, a, b in zip(mask, xs, ys, strict=True)], dtype, 0)
    plain = Scaled(np.exp2(np.linspace(-30, 30, 400)).astype(dtype), None)
    plains = exactly(plain, dtype)
    check(plain.where(xp, mask, y), [a if m else b for m, a, b in zip(mask, plains, ys, strict=True)], dtype, 0)
    check(y.where(xp, mask, plain), [b if m else a for m, a, b in zip(mask, plains, ys, strict=True)], dtype, 0)
    assert plain.where(xp, mask, plain).exponent is None


@each_dtype
def test_values_are_inf_beyond_the_dtype_and_zero_below(dtype):
    x, xs = drawn(dtype, 7)
    with np.errstate(over="raise", invalid="raise"):
        values = x.value(xp)
    assert values.dtype == dtype
    for got, want in zip(values.tolist(), xs, strict=True):
        if want > exact.largest(dtype):
            assert got == math.inf
        else:
            assert abs(got - want) <= exact.ulp(want, dtype) / 2
    assert {0.0, math.inf} < set(values.tolist())
    plain = Scaled(np.array([3.0], dtype), None)
    assert plain.value(xp) is plain.mantissa
    # Just within the range, and just beyond it.
    r = RANGES[dtype]
    edge = Scaled(np.array([r.top / r.step, 2 * r.top / r.step], dtype), np.ones(2, dtype))
    assert edge.value(xp).tolist() == [r.top, math.inf]
    small = np.array([3.0, 5.0], dtype)
    assert edge.over(xp, small).tolist() == [3 / r.step, 5 / r.step]
    assert plain.over(xp, small) is small


@each_dtype
def test_factors_are_right_for_every_element_that_they_are_meant_for(dtype):
    """bound / norm as factors: x * factor, in steps, for every x up to the norm."""
    (bound, bounds), (norm, norms) = drawn(dtype, 8, 600), drawn(dtype, 9, 600, zeros=False)
    factors = _scaled.quotient(xp, bound, norm)
    largest, normal = exact.largest(dtype), exact.smallest_normal(dtype)
    shares = np.exp2(-np.random.default_rng(10).uniform(0, 40, 600))
    seen = set()
    for i, (c, n, share) in enumerate(zip(bounds, norms, shares.tolist(), strict=True)):
        if not normal <= min(n, largest) * share:
            continue
        x = np.array(float(min(n, largest) * share), dtype)
        want = mpmath.mpf(float(x)) * c / n
        got = x
        with np.errstate(all="ignore"):
            for step in factors.steps:
                got = got * step[i]
        if want > largest:
            continue  # such a bound is beyond the dtype, and nothing is clipped
        assert got.dtype == dtype
        assert abs(float(got) - want) <= 2 * exact.ulp(want, dtype), (float(x), c, n)
        seen.add((want < normal, float(factors.shift[i]).hex()))
    assert len({shift for _, shift in seen}) == 3, "factors below, within and beyond the range"


def test_factors_of_plain_numbers_need_no_shift():
    factors = _scaled.quotient(
        xp, Scaled(np.array([1.0, 0.0, 1e300]), None), Scaled(np.array([4.0, 1.0, 1e-300]), None)
    )
    assert factors.shift is None
    assert factors.factor.tolist() == [0.25, 0.0, RANGES["float64"].largest]
    assert [step.tolist() for step in factors.steps] == [factors.factor.tolist()]
    shifted = _scaled.Factors(np.array([3.0]), np.array([2.0]))
    assert [step.tolist() for step in shifted.steps] == [[2.0], [3.0], [2.0]]


@each_dtype
def test_moderate(dtype):
    r = RANGES[dtype]
    ends = [float(exact.ulp(0, dtype)), float(exact.smallest_normal(dtype)), 1.0, r.top, r.largest]
    half = math.sqrt(r.step)
    x = np.array([*ends, half, half * 0.99, 1 / half, 0.99 / half], dtype)
    m, e = _scaled.moderate(xp, x)
    assert (m >= 1 / half).all()
    assert (m < half).all()
    check(Scaled(m, e), [mpmath.mpf(float(v)) for v in x], dtype, 0)
    odd = np.array([0.0, math.inf, math.nan], dtype)
    m, e = _scaled.moderate(xp, odd)
    np.testing.assert_array_equal(m, odd)
    assert e[::2].tolist() == [0, 0]
    for value in x.tolist():
        m, e = _scaled.host_split(value, r.step)
        assert 1 / half <= m < half
        assert mpmath.mpf(m) * mpmath.mpf(r.step) ** int(e) == mpmath.mpf(value)
    for value in odd.tolist():
        m, e = _scaled.host_split(value, r.step)
        np.testing.assert_equal(m, value)
        assert e == 0
    # A number of float64, as one with float32's exponents.
    m, e = _scaled.moderate(xp, np.array([1e300, 1e-300]), RANGES["float32"].step)
    assert (np.abs(np.log2(m)) <= 45).all()
    assert [mpmath.mpf(a) * TWO ** int(90 * b) for a, b in zip(m.tolist(), e.tolist(), strict=True)] == [1e300, 1e-300]


@each_dtype
def test_magnitudes_of_complex_numbers(dtype):
    """Without overflow and underflow on the way, and where re or im are subnormal."""
    rng = np.random.default_rng(11)
    bits, lowest = exact.FORMATS[dtype]
    scale = rng.integers(lowest - bits + 3, 1 - lowest, 300)
    re, im = (np.ldexp(rng.uniform(-1, 1, 300), scale + rng.integers(-9, 1, 300)).astype(dtype) for _ in "ri")
    re[:5], im[5:9] = 0, 0
    want = [mpmath.hypot(float(a), float(b)) for a, b in zip(re, im, strict=True)]
    with np.errstate(over="ignore"):
        got = _parts.hypot(xp, (re, im))
        m, e = _scaled.magnitudes(xp, (re, im))
    for a, b in zip(got.tolist(), want, strict=True):
        assert (a == math.inf and b > exact.largest(dtype)) or abs(a - b) <= 2 * exact.ulp(b, dtype)
    check(Scaled(m, e), want, dtype, 2)
    assert (_parts.hypot(xp, (re,)) == np.abs(re)).all()
    check(Scaled(*_scaled.magnitudes(xp, (re,))), [abs(mpmath.mpf(float(a))) for a in re], dtype, 0)
    assert (_parts.longest_of(xp, (re, im)) == np.maximum(np.abs(re), np.abs(im))).all()
    inf, nan, one = (np.array([x], dtype) for x in (math.inf, math.nan, 1.0))
    assert _parts.hypot(xp, (inf, one)).tolist() == [math.inf]
    assert np.isnan(_parts.hypot(xp, (nan, one))).all()
    assert np.isnan(_parts.longest_of(xp, (one, nan))).all()
    assert _parts.hypot(xp, (0 * one, 0 * one)).tolist() == [0]


@each_dtype
def test_units_of_complex_numbers(dtype):
    top = RANGES[dtype].top
    re, im = np.array([3, 0, 0, -4, top, 1e-30], dtype), np.array([4, 0, -2, 0, -top, 1e-30], dtype)
    u, v = _parts.unit(xp, (re, im))
    root = math.sqrt(0.5)
    np.testing.assert_allclose(u, [0.6, 0, 0, -1, root, root], rtol=3e-7)
    np.testing.assert_allclose(v, [0.8, 0, -1, 0, -root, root], rtol=3e-7)
    assert u.dtype == v.dtype == dtype
    assert _parts.unit(xp, (re,))[0].tolist() == [1, 0, 0, -1, 1, 1]
    masked = _parts.pick(xp, re > 0, (re, im))
    assert [x.tolist() for x in masked] == [np.where(re > 0, x, 0).tolist() for x in (re, im)]


def test_norms_in_float32():
    """Rounded to nearest, inf from where float32 rounds to it, without a warning."""
    largest = RANGES["float32"].largest
    edge = largest + 2.0**103
    norms = np.array([0.0, 1 / 3, largest, edge, np.nextafter(edge, 0), 1e300, math.inf, math.nan, 1e-50])
    with np.errstate(over="raise", invalid="raise"):
        got = _scaled.to_float32(xp, norms)
    assert got.dtype == np.float32
    want = [0.0, float(np.float32(1 / 3)), largest, math.inf, largest, math.inf, math.inf, math.nan, 0.0]
    np.testing.assert_array_equal(got, want)
    narrow = np.float32([1.5])
    assert _scaled.to_float32(xp, narrow) is narrow


def test_constants_as_a_dtype_holds_them():
    assert _scaled.rounded(1 / 3, np.zeros(1)) == 1 / 3
    assert _scaled.rounded(1 / 3, np.zeros(1, np.float32)) == float(np.float32(1 / 3))

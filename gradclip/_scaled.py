"""Numbers beyond the range of their dtype: `mantissa * step**exponent`, and how to divide by them.

All scaling is by powers of two, so it is exact. Every function works on arrays of any array API library, takes
no branch, and reads nothing on the host.
"""

from __future__ import annotations

import math
import struct
import sys
from functools import lru_cache
from typing import Any, NamedTuple

from gradclip._parts import Parts, hypot, longest_of
from gradclip._types import Array, Namespace


class Range(NamedTuple):
    """The constants of one accumulation dtype."""

    step: float  # the unit of scaling, a power of two: every finite x is m * step**j with |j| <= 2
    tiny: float  # below: the square loses bits
    huge: float  # above: 2**48 squares might overflow
    thin: float  # a middle bin below this may be smaller than the small bin
    huge_sum: float  # above: 2**48 magnitudes might overflow
    lift: float  # 1 / smallest normal number, nearly
    shift: float  # twice multiplied with, it takes the least quotient that matters into the range
    top: float  # the largest power of two
    largest: float  # the largest number


_LARGEST = sys.float_info.max

RANGES = {
    "float32": Range(2.0**90, 2.0**-63, 2.0**40, 2.0**-60, 2.0**60, 2.0**126, 2.0**64, 2.0**127, 2.0**128 - 2.0**104),
    "float64": Range(2.0**600, 2.0**-511, 2.0**480, 2.0**-900, 2.0**900, 2.0**1020, 2.0**512, 2.0**1023, _LARGEST),
}


def range_of(x: Array) -> Range:
    """The constants for the dtype of `x`."""
    return _range(x.dtype)


@lru_cache(64, typed=True)
def _range(dtype: Any) -> Range:
    return RANGES["float64" if "float64" in str(dtype) else "float32"]


class Scaled(NamedTuple):
    """Numbers `mantissa * step**exponent`: two rows in the accumulation dtype, the exponents whole.

    The mantissa of a norm is inf or NaN exactly when some element of the gradients is. `exponent` None stands for 0.
    """

    mantissa: Array
    exponent: Array | None

    def split(self, xp: Namespace) -> tuple[Array, Array]:
        """The same as `(m, e)`, step**-0.5 <= m < step**0.5 unless it is 0 or not finite."""
        m, e = moderate(xp, self.mantissa)
        return m, e if self.exponent is None else e + self.exponent

    def multiplied(self, xp: Namespace, other: Scaled) -> Scaled:
        (m, i), (n, j) = self.split(xp), other.split(xp)
        return Scaled(m * n, i + j)

    def divided(self, xp: Namespace, other: Scaled) -> Scaled:
        if self.exponent is None and other.exponent is None:
            return Scaled(self.mantissa / other.mantissa, None)
        (m, i), (n, j) = self.split(xp), other.split(xp)
        return Scaled(m / n, i - j)

    def exceeds(self, xp: Namespace, other: Scaled) -> Array:
        """Whether it is the larger of two numbers >= 0."""
        if self.exponent is None and other.exponent is None:
            return self.mantissa > other.mantissa
        (m, i), (n, j) = self.split(xp), other.split(xp)
        # One step decides: m and n are less than one apart.
        more, less = xp.logical_and(i > j, n > 0), xp.logical_and(i < j, n > 0)
        step, one = range_of(m).step, xp.ones_like(m)
        return m * xp.where(more, step * one, xp.where(less, one / step, one)) > n

    def where(self, xp: Namespace, mask: Array, other: Scaled) -> Scaled:
        """This number where `mask`, else `other`."""
        mantissa = xp.where(mask, self.mantissa, other.mantissa)
        if self.exponent is None and other.exponent is None:
            return Scaled(mantissa, None)
        zero = xp.zeros_like(mantissa)
        mine, its = (zero if x.exponent is None else x.exponent for x in (self, other))
        return Scaled(mantissa, xp.where(mask, mine, its))

    def value(self, xp: Namespace) -> Array:
        """The number in its own dtype, inf beyond its range."""
        if self.exponent is None:
            return self.mantissa
        x, limit = self.mantissa, range_of(self.mantissa).top / range_of(self.mantissa).step * 2
        for k in range(3):  # inf where a step would overflow, without the warning
            over = xp.logical_and(self.exponent > k, x >= limit)
            x = xp.where(over, xp.full_like(x, math.inf), x) * _step(xp, x, self.exponent, k)
        return x

    def over(self, xp: Namespace, x: Array) -> Array:
        """`x / step**exponent`."""
        return x if self.exponent is None else rescale(xp, x, -self.exponent)


def rescale(xp: Namespace, x: Array, exponent: Array) -> Array:
    """`x * step**exponent` for whole exponents, at most three steps. Linear in x."""
    for k in range(3):
        x = x * _step(xp, x, exponent, k)
    return x


def _step(xp: Namespace, x: Array, exponent: Array, k: int) -> Array:
    """The k-th multiplier of `rescale`. It is selected: XLA would join two constant ones into one that overflows."""
    step, one = range_of(x).step, xp.ones_like(exponent)
    return xp.where(exponent > k, step * one, xp.where(exponent < -k, one / step, one))


def rounded(value: float, like: Array) -> float:
    """`value` as the dtype of `like` holds it."""
    if range_of(like) is RANGES["float64"]:
        return value
    return float(struct.unpack("f", struct.pack("f", value))[0])


def to_float32(xp: Namespace, norm: Array) -> Array:
    """A norm rounded to float32, inf beyond its range, without an overflow on the way: a lazy library would warn."""
    if range_of(norm) is RANGES["float32"]:
        return norm
    largest = RANGES["float32"].largest
    held = xp.minimum(norm, xp.full_like(norm, largest))
    return xp.astype(xp.where(norm >= largest + 2.0**103, xp.full_like(norm, math.inf), held), xp.float32)


class Product(NamedTuple):
    """Numbers as products of two, each in the range of its dtype; `unit` None stands for 1."""

    number: Array
    unit: Array | None


class Factors(NamedTuple):
    """Rows of factors: `x * shift * factor * shift` neither overflows nor loses bits unless its result does.

    `shift` is a power of two, and 1 unless the factor is not a normal number; None where it would be 1 throughout.
    """

    factor: Array
    shift: Array | None

    @property
    def steps(self) -> tuple[Array, ...]:
        """What an element is multiplied by, in this order."""
        return (self.factor,) if self.shift is None else (self.shift, self.factor, self.shift)


def quotient(xp: Namespace, bound: Scaled, norm: Scaled) -> Factors:
    """`bound / norm` as factors, at most the largest number."""
    q, e = bound.divided(xp, norm)
    largest = xp.full_like(q, range_of(q).largest)  # not inf: 0 * inf is NaN
    if e is None:
        return Factors(xp.minimum(q, largest), None)
    s, k, t = range_of(q).step, range_of(q).lift, range_of(q).shift
    plain = rescale(xp, q, e)
    one, zero = xp.ones_like(q), xp.zeros_like(e)
    small, large = plain < 1 / k, plain > k
    # q is within 1/s .. s: the first step of the way to `plain * t**2` or `plain / t**2` is taken with t**2, not s.
    towards = xp.where(large, (s / t / t) * one, xp.where(e >= -1, (t / s * t) * one, (t / s * t / s) * one))
    steps = xp.where(large, e - 1, xp.where(e >= -1, zero, e + 2))
    shifted = rescale(xp, q * towards, steps)
    shift = xp.where(large, t * one, xp.where(small, one / t, one))
    return Factors(xp.minimum(xp.where(xp.logical_or(small, large), shifted, plain), largest), shift)


def host_split(value: float, step: float) -> tuple[float, float]:
    """`moderate` for a Python number."""
    bits = round(math.log2(step))
    e = (math.frexp(value)[1] - 1 + bits // 2) // bits  # 0, inf and NaN have none
    return math.ldexp(value, -e * bits), float(e)


def moderate(xp: Namespace, x: Array, step: float = 0.0) -> tuple[Array, Array]:
    """`(m, e)` with x = m * step**e and step**-0.5 <= m < step**0.5, for finite x > 0; m = x for 0, inf and NaN.

    `step` is that of x's own dtype, or a smaller one that x is to be moved to.
    """
    step = step or range_of(x).step
    half, one, e = math.sqrt(step), xp.ones_like(x), xp.zeros_like(x)
    for _ in range(math.ceil(math.log(range_of(x).top, step))):
        up, down = x >= half, xp.logical_and(x < 1 / half, x > 0)
        x = x * xp.where(up, one / step, xp.where(down, step * one, one))
        e = e + xp.where(up, one, xp.where(down, -one, 0 * one))
    return x, e


def magnitudes(xp: Namespace, parts: Parts) -> tuple[Array, Array]:
    """|x| of every element, as `moderate` gives it: right also where |x| itself is subnormal, or beyond the range."""
    if len(parts) == 1:
        return moderate(xp, xp.abs(parts[0]))
    _, e = moderate(xp, longest_of(xp, parts))
    m, more = moderate(xp, hypot(xp, tuple(rescale(xp, part, -e) for part in parts)))
    return m, e + more

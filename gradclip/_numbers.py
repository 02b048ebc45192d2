"""Numbers beyond the range of their dtype: `root * step**exponent`, and how to divide by them.

All scaling is by powers of two, so it is exact. Every function works on arrays of any array API library, takes
no branch, and reads nothing on the host.
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple, TypeAlias

from gradclip._types import Array, Namespace

Parts: TypeAlias = tuple[Array, ...]
"""An array as its real components: `(x,)`, or `(re, im)`."""


class Range(NamedTuple):
    """The constants of one accumulation dtype."""

    step: float  # the unit of scaling, a power of two: every finite x is m * step**j with |j| <= 2
    tiny: float  # below: the square loses bits
    huge: float  # above: 2**48 squares might overflow
    thin: float  # a middle bin below this may be smaller than the small bin
    huge_sum: float  # above: 2**48 magnitudes might overflow
    lift: float  # 1 / smallest normal number, nearly
    top: float  # the largest power of two


RANGES = {
    "float32": Range(2.0**90, 2.0**-63, 2.0**40, 2.0**-60, 2.0**60, 2.0**126, 2.0**127),
    "float64": Range(2.0**600, 2.0**-511, 2.0**480, 2.0**-900, 2.0**900, 2.0**1020, 2.0**1023),
}


def range_of(x: Array) -> Range:
    """The constants for the dtype of `x`."""
    return RANGES["float64" if "float64" in str(x.dtype) else "float32"]


class Measured(NamedTuple):
    """A norm: `root * step**exponent`, both 0-d in the accumulation dtype, exponent a small whole number.

    `root` is inf or NaN exactly when some element of the gradients is. `exponent` None stands for 0.
    """

    root: Array
    exponent: Array | None

    def times(self, xp: Namespace, x: Array) -> Array:
        """`x * step**exponent`."""
        if self.exponent is None:
            return x
        limit = range_of(x).top / range_of(x).step * 2
        for k in range(3):  # inf where a step would overflow, without the warning
            over = xp.logical_and(self.exponent > k, x >= limit)
            x = xp.where(over, xp.full_like(x, math.inf), x) * _step(xp, x, self.exponent, k)
        return x

    def over(self, xp: Namespace, x: Array) -> Array:
        """`x / step**exponent`."""
        return x if self.exponent is None else rescale(xp, x, -self.exponent)


def rescale(xp: Namespace, x: Array, exponent: Array) -> Array:
    """`x * step**exponent` for whole exponents from -3 to 3, one step at a time. Linear in x."""
    for k in range(3):
        x = x * _step(xp, x, exponent, k)
    return x


def _step(xp: Namespace, x: Array, exponent: Array, k: int) -> Array:
    """The k-th multiplier of `rescale`. It is selected: XLA would join two constant ones into one that overflows."""
    step, one = range_of(x).step, xp.ones_like(exponent)
    return xp.where(exponent > k, step * one, xp.where(exponent < -k, one / step, one))


def hypot(xp: Namespace, parts: Parts) -> Array:
    """|x| of real parts without overflow or underflow on the way."""
    if len(parts) == 1:
        return xp.abs(parts[0])
    a, b = xp.abs(parts[0]), xp.abs(parts[1])
    long, short = xp.maximum(a, b), xp.minimum(a, b)
    ratio = short / xp.where(long > 0, long, xp.ones_like(long))
    return xp.where(long >= math.inf, long, long * xp.sqrt(1 + ratio * ratio))


def longest_of(xp: Namespace, parts: Parts) -> Array:
    """The largest magnitude among the parts of each element; NaN if one of them is."""
    out = xp.abs(parts[0])
    for part in parts[1:]:
        out = xp.maximum(out, xp.abs(part))
    return out


def pick(xp: Namespace, mask: Array, parts: Parts) -> Parts:
    return tuple(xp.where(mask, part, xp.zeros_like(part)) for part in parts)


def unit(xp: Namespace, parts: Parts) -> Parts:
    """x / |x| of every element, 0 at 0."""
    if len(parts) == 1:
        return (xp.sign(parts[0]),)
    longest = longest_of(xp, parts)
    safe = xp.where(longest > 0, longest, xp.ones_like(longest))
    scaled = tuple(part / safe for part in parts)
    size = hypot(xp, scaled)
    size = xp.where(size > 0, size, xp.ones_like(size))
    return tuple(part / size for part in scaled)


def rounded(value: float, like: Array) -> float:
    """`value` as the dtype of `like` holds it."""
    if range_of(like) is RANGES["float64"]:
        return value
    return float(struct.unpack("f", struct.pack("f", value))[0])


def to_float32(xp: Namespace, norm: Array) -> Array:
    """A norm rounded to float32, inf beyond its range, without an overflow on the way."""
    if range_of(norm) is RANGES["float32"]:
        return norm
    largest = 2.0**128 - 2.0**104
    inf = xp.full_like(norm, math.inf)
    held = xp.minimum(norm, xp.full_like(norm, largest))
    return xp.astype(xp.where(norm >= largest + 2.0**103, inf, held), xp.float32)


def quotient(xp: Namespace, bound: Array, norm: Measured) -> tuple[Array, Array | None]:
    """`bound / norm` for 0 <= bound < norm, as `(factor, shift)`: the product of two normal numbers <= 1.

    `x * shift * factor` then neither overflows nor loses bits on the way. `shift` is a power of two, and 1
    unless the quotient would be subnormal; it is None where the norm says that this cannot matter.
    """
    if norm.exponent is None:
        return bound / norm.root, None
    s, k = range_of(norm.root).step, range_of(norm.root).lift
    c, c_exp = moderate(xp, bound)
    n, n_exp = moderate(xp, norm.root)
    q, e = c / n, c_exp - n_exp - norm.exponent
    plain = rescale(xp, q, e)
    lifted = rescale(xp, xp.where(e >= -1, q * (k / s), q * (k / s / s)), xp.where(e >= -1, 0 * e, e + 2))
    extreme = plain < 1 / k
    one = xp.ones_like(q)
    return xp.where(extreme, lifted, plain), xp.where(extreme, one / k, one)


def moderate(xp: Namespace, x: Array) -> tuple[Array, Array]:
    """`(m, e)` with x = m * step**e and m within step**-0.5 .. step**0.5, for x >= 0."""
    step = range_of(x).step
    half, one, e = math.sqrt(step), xp.ones_like(x), xp.zeros_like(x)
    for _ in range(2):
        up, down = x > half, xp.logical_and(x < 1 / half, x > 0)
        x = x * xp.where(up, one / step, xp.where(down, step * one, one))
        e = e + xp.where(up, one, xp.where(down, -one, 0 * one))
    return x, e

"""The norms: what an element contributes, how contributions join, how joined ones end. Mathematics only.

A norm takes one or two passes. In a pass each element contributes to a few slots (`terms`); those of a group's elements
join by the pass's operation, in any order, on any number of shards; `finish` turns them into the group's norm, a
`Scaled` number, for it may lie outside the range of its dtype.

Three conventions make every norm safe from the first subnormal to the last finite number:

- Powers of two do the scaling, so it is exact. Sums are kept in bins for big, middle and small magnitudes
  (Blue, ACM TOMS 4, 1978; Anderson, ACM TOMS 44, 2017, Algorithm 978), with room for 2**48 elements in each.
- The mantissa is inf or NaN exactly when some element is: finite gradients always have a finite one.
- A leaf arrives as its real parts: `(x,)`, or `(re, im)` for a complex one, in the accumulation dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, TypeAlias

from gradclip._parts import Parts, hypot, longest_of, pick, unit
from gradclip._scaled import RANGES, Scaled, magnitudes, range_of, rounded
from gradclip._types import Array, Namespace, ReduceOp

Seen: TypeAlias = tuple[Array, ...]  # the joined partials of the passes before, each indexed by its slots
Terms: TypeAlias = tuple[Array | float, ...]  # an array a slot, of the elements' shape; or what each element adds alike


@dataclass(frozen=True)
class Norm:
    """A norm. `binned`: whether sums need bins, since a square may leave the range of the accumulation dtype.

    That is settled once, when the norm of a call is made. Leaves whose squares stay in it may contribute without bins
    to a norm that has them, never the other way round.
    """

    binned: bool = True
    ops: tuple[ReduceOp, ...] = ("sum",)
    slots: ClassVar[tuple[int, ...]] = (3,)

    def terms(self, xp: Namespace, parts: Parts, seen: Seen) -> Terms:
        """What each element contributes to the pass after those that were `seen`, whose slots broadcast against it."""
        raise NotImplementedError

    def finish(self, xp: Namespace, joined: Seen) -> Scaled:
        """The norms that joined partials stand for, element by element of their slots."""
        raise NotImplementedError

    def direction(self, xp: Namespace, parts: Parts, norm: Scaled) -> tuple[Parts, Array | None]:
        """u with d||g|| = <u, dg>, and a weight: where given, <u, dg> is to be divided by its sum."""
        raise NotImplementedError


def identity(op: ReduceOp) -> float:
    """What joins without effect: the slots of no elements."""
    return math.inf if op == "min" else 0.0


class SumNorm(Norm):
    """A root of the sum of |x|^power. Slots: the sums of small (scaled up), middle and big (scaled down) elements."""

    power = 1

    def apart(self, parts: Parts) -> tuple[Parts, ...]:
        """The parts that make a term together, and are small or big together."""
        return (parts,)

    def term(self, xp: Namespace, parts: Parts) -> Array:
        """What is added up: |x|^power of such parts."""
        raise NotImplementedError

    def terms(self, xp: Namespace, parts: Parts, seen: Seen) -> Terms:
        each = [self._bins(xp, these) if self.binned else (self.term(xp, these),) for these in self.apart(parts)]
        sums = each[0] if len(each) == 1 else tuple(a + b for a, b in zip(*each, strict=True))
        return sums if self.binned else (0.0, sums[0], 0.0)

    def _bins(self, xp: Namespace, parts: Parts) -> tuple[Array, ...]:
        r, longest = range_of(parts[0]), longest_of(xp, parts)
        zero, one = xp.zeros_like(longest), xp.ones_like(longest)
        big = xp.logical_not(longest <= (r.huge if self.power == 2 else r.huge_sum))  # NaN too
        small = longest < r.tiny
        # One multiplier per element, selected: XLA would make x*x*(s*s) of (x*s)*(x*s), and that overflows.
        multiplier = xp.where(big, one / r.step, xp.where(small, one * r.step, one))
        term = self.term(xp, tuple(part * multiplier for part in parts))
        middle = xp.where(xp.logical_or(big, small), zero, term)
        return xp.where(small, term, zero), middle, xp.where(big, term, zero)

    def in_bins(self, xp: Namespace, total: Array) -> Array:
        """The float64 sum of the terms of float32 elements, as a partial in float32: in the bin that holds it."""
        r, zero = RANGES["float32"], xp.zeros_like(total)
        scale = r.step**self.power
        big = xp.logical_not(total <= r.huge**2)  # NaN too
        small = total < r.thin * 2.0**-48  # as many shards have room in the bin
        middle = xp.where(xp.logical_or(big, small), zero, total)
        bins = [xp.where(small, total * scale, zero), middle, xp.where(big, total / scale, zero)]
        return xp.astype(xp.stack(bins), xp.float32)


class TwoNorm(SumNorm):
    """sqrt(sum |x|^2)."""

    power = 2

    def apart(self, parts: Parts) -> tuple[Parts, ...]:
        return tuple((x,) for x in parts)

    def term(self, xp: Namespace, parts: Parts) -> Array:
        return parts[0] * parts[0]

    def finish(self, xp: Namespace, joined: Seen) -> Scaled:
        low, mid, high = joined[0][0], joined[0][1], joined[0][2]
        if not self.binned:
            return Scaled(_root(xp, mid), None)
        r, one, zero = range_of(mid), xp.ones_like(mid), xp.zeros_like(mid)
        is_big = xp.logical_not(high == 0)
        is_small = xp.logical_and(xp.logical_and(high == 0, mid < r.thin), low > 0)
        squares = xp.where(
            is_big,
            high + xp.where(is_big, mid / r.step, zero) / r.step,  # XLA would join two plain steps
            xp.where(is_small, low + xp.where(is_small, mid * r.step, zero) * r.step, mid),
        )
        return Scaled(_root(xp, squares), xp.where(is_big, one, xp.where(is_small, -one, zero)))

    def direction(self, xp: Namespace, parts: Parts, norm: Scaled) -> tuple[Parts, Array | None]:
        safe = xp.where(norm.mantissa > 0, norm.mantissa, xp.ones_like(norm.mantissa))
        return tuple(norm.over(xp, x) / safe for x in parts), None


class RmsNorm(TwoNorm):
    """sqrt(mean |x|^2). Slots: those of the 2-norm, and the number of elements."""

    slots = (4,)

    def terms(self, xp: Namespace, parts: Parts, seen: Seen) -> Terms:
        return (*super().terms(xp, parts, seen), 1.0)

    def finish(self, xp: Namespace, joined: Seen) -> Scaled:
        root, exponent = super().finish(xp, joined)
        return Scaled(root / xp.sqrt(xp.maximum(joined[0][3], xp.ones_like(root))), exponent)

    def direction(self, xp: Namespace, parts: Parts, norm: Scaled) -> tuple[Parts, Array | None]:
        return super().direction(xp, parts, norm)[0], xp.ones_like(parts[0])


def _root(xp: Namespace, squares: Array) -> Array:
    """sqrt, whose derivative at 0 is 0 to a library that differentiates what it is given."""
    none = squares == 0
    return xp.where(none, squares, xp.sqrt(xp.where(none, xp.ones_like(squares), squares)))


class OneNorm(SumNorm):
    """sum |x|. The small ones have a bin for XLA's sake: it may flush the rounding errors of a compensated sum."""

    def term(self, xp: Namespace, parts: Parts) -> Array:
        return hypot(xp, parts)

    def finish(self, xp: Namespace, joined: Seen) -> Scaled:
        low, mid, high = joined[0][0], joined[0][1], joined[0][2]
        if not self.binned:
            return Scaled(mid, None)
        step, one, zero = range_of(mid).step, xp.ones_like(mid), xp.zeros_like(mid)
        is_big, is_small = xp.logical_not(high == 0), xp.logical_and(xp.logical_and(high == 0, mid == 0), low > 0)
        mantissa = xp.where(is_big, high + mid / step, xp.where(is_small, low, mid + low / step))
        return Scaled(mantissa, xp.where(is_big, one, xp.where(is_small, -one, zero)))

    def direction(self, xp: Namespace, parts: Parts, norm: Scaled) -> tuple[Parts, Array | None]:
        return unit(xp, parts), None


class CountNorm(Norm):
    """The number of elements that are not 0. Slots: that number, and inf or NaN from non-finite elements."""

    slots = (2,)

    def terms(self, xp: Namespace, parts: Parts, seen: Seen) -> Terms:
        size = longest_of(xp, parts)
        zero = xp.zeros_like(size)
        return xp.where(size == 0, zero, xp.ones_like(size)), xp.where(xp.isfinite(size), zero, size)

    def finish(self, xp: Namespace, joined: Seen) -> Scaled:
        return Scaled(joined[0][0] + joined[0][1], None)

    def direction(self, xp: Namespace, parts: Parts, norm: Scaled) -> tuple[Parts, Array | None]:
        return tuple(xp.zeros_like(x) for x in parts), None


class ExtremeNorm(Norm):
    """The largest (its operation is "max") or smallest ("min") magnitude.

    Slots: the extreme magnitude of the middle elements; of the big ones (scaled down: |re + i im| may overflow where re
    and im do not); how bad the worst element is (2 NaN, 1 inf, 0 finite), so that no NaN has to survive a foreign max.
    """

    def terms(self, xp: Namespace, parts: Parts, seen: Seen) -> Terms:
        r = range_of(parts[0])
        longest = longest_of(xp, parts)
        big = xp.logical_and(xp.isfinite(longest), longest > r.huge_sum)
        high = hypot(xp, pick(xp, big, tuple(part / r.step for part in parts)))
        middle = longest <= r.huge_sum
        mid = hypot(xp, pick(xp, middle, parts))
        one, zero = xp.ones_like(mid), xp.zeros_like(mid)
        bad = xp.where(xp.isnan(longest), 2 * one, xp.where(xp.isinf(longest), one, zero))
        if self.ops == ("max",):
            return mid, high, bad
        inf = xp.full_like(mid, math.inf)
        return xp.where(middle, mid, inf), xp.where(big, high, inf), -bad

    def finish(self, xp: Namespace, joined: Seen) -> Scaled:
        mid, high, bad = joined[0][0], joined[0][1], joined[0][2]
        zero, one = xp.zeros_like(mid), xp.ones_like(mid)
        if self.ops == ("max",):
            is_big = high > 0
        else:
            bad, is_big = -bad, xp.logical_and(xp.isinf(mid), xp.isfinite(high))
            mid = xp.where(xp.isinf(mid), zero, mid)  # no element at all
        spoiled = xp.where(bad > 1, xp.full_like(mid, math.nan), xp.full_like(mid, math.inf))
        mantissa = xp.where(bad > 0, spoiled, xp.where(is_big, high, mid))
        return Scaled(mantissa, xp.where(is_big, one, zero) if self.binned else None)

    def direction(self, xp: Namespace, parts: Parts, norm: Scaled) -> tuple[Parts, Array | None]:
        hit = hypot(xp, tuple(norm.over(xp, x) for x in parts)) == norm.mantissa
        weight = xp.where(hit, xp.ones_like(parts[0]), xp.zeros_like(parts[0]))
        return tuple(weight * u for u in unit(xp, parts)), weight


@dataclass(frozen=True)
class PowerNorm(Norm):
    """(sum |x|^p)^(1/p) for any other p.

    First pass: the largest magnitude m, the smallest if p < 0. Second pass: the sum of (|x|/m)^p.
    """

    slots = (3, 1)
    p: float = 3.0

    @property
    def _extreme(self) -> ExtremeNorm:
        return ExtremeNorm(self.binned, self.ops[:1])

    def terms(self, xp: Namespace, parts: Parts, seen: Seen) -> Terms:
        if not seen:
            return self._extreme.terms(xp, parts, seen)
        pivot = self._extreme.finish(xp, seen)
        usable = xp.logical_and(pivot.mantissa > 0, xp.isfinite(pivot.mantissa))
        (size, i), (root, j) = magnitudes(xp, parts), pivot.split(xp)
        counts = xp.logical_and(size > 0, usable)
        one, zero = xp.ones_like(size), xp.zeros_like(size)
        # Arrays, so that every element is divided: XLA would take the powers of x and of 1/m apart.
        size, root = xp.where(counts, size, one), xp.where(counts, root, one)
        ratio, k = (size / root, i - j) if self.p > 0 else (root / size, j - i)
        # The quotient is ratio * step**k, and at most 1. It is brought to a ratio of at most 1 with k = 0 .. -4.
        step, power = range_of(size).step, abs(self.p)
        up, down = k > 0, xp.logical_and(k < 0, ratio > 1)
        term = (ratio * xp.where(up, one * step, xp.where(down, one / step, one))) ** power
        k = xp.where(down, k + 1, k)
        for n in range(1, 5):
            term = term * xp.where(k <= -n, one * step**-power, one)
        return (xp.where(counts, term, zero),)

    def finish(self, xp: Namespace, joined: Seen) -> Scaled:
        from fractions import Fraction  # it and decimal take a twentieth of `import gradclip`

        pivot = self._extreme.finish(xp, joined[:1])
        terms = joined[1][0]
        safe = xp.where(terms > 0, terms, xp.ones_like(terms))
        inverse = rounded(0.5 / self.p, terms)
        # 1/p is rounded; the rest of it is put back: s**(1/p) = (s**inverse)**2 * (1 + rest * log s)
        rest = float(1 / Fraction(self.p) - 2 * Fraction(inverse))
        root, half, top = pivot.mantissa * (1 + rest * xp.log(safe)), safe**inverse, range_of(safe).top
        if pivot.exponent is None and 50 / abs(self.p) < 0.8 * math.log2(top):
            root, exponent = root * half * half, None
        else:
            # For p near 0 what 2**48 elements can add is beyond counting: so far that what is clipped is 0.
            far, one = half >= top, xp.ones_like(half)
            factor = Scaled(xp.where(far, one, half), xp.where(far, 25 * one, 0 * one))
            root, exponent = Scaled(root, pivot.exponent).multiplied(xp, factor).multiplied(xp, factor)
        return Scaled(xp.where(xp.isfinite(pivot.mantissa), root, pivot.mantissa), exponent)

    def direction(self, xp: Namespace, parts: Parts, norm: Scaled) -> tuple[Parts, Array | None]:
        size = hypot(xp, tuple(norm.over(xp, x) for x in parts))
        ok, one = xp.logical_and(size > 0, norm.mantissa > 0), xp.ones_like(size)
        ratio = xp.where(ok, size / xp.where(ok, norm.mantissa, one), one)
        slope = xp.where(ok, ratio ** (self.p - 1), xp.zeros_like(ratio))
        return tuple(slope * u for u in unit(xp, parts)), None


@lru_cache(256)
def norm_for(norm_type: float | str, binned: bool) -> Norm:
    """The p-norm, p = `norm_type` (a float that is not NaN), or the norm of that name."""
    simple: dict[float | str, type[Norm]] = {2.0: TwoNorm, 1.0: OneNorm, 0.0: CountNorm, "rms": RmsNorm}
    if norm_type in simple:
        return simple[norm_type](binned)
    assert isinstance(norm_type, float)
    op: ReduceOp = "max" if norm_type > 0 else "min"
    if math.isinf(norm_type):
        return ExtremeNorm(binned, (op,))
    return PowerNorm(binned, (op, "sum"), p=norm_type)

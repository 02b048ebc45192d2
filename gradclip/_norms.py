"""The norms: sums of powers in bins, counts, extremes, and any other p. What their methods mean, `_law` says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from gradclip._law import Law, Total
from gradclip._numbers import (
    RANGES,
    Measured,
    Parts,
    hypot,
    longest_of,
    magnitudes,
    moderate,
    pick,
    range_of,
    rounded,
    unit,
)
from gradclip._types import Array, Namespace, ReduceOp


@dataclass(frozen=True)
class SumNorm(Law):
    """A root of the sum of |x|^power. Partial: the sums of small (scaled up), middle and big (scaled down) elements."""

    power: int = 1

    def apart(self, parts: Parts) -> tuple[Parts, ...]:
        """The parts that make a term together, and are small or big together."""
        raise NotImplementedError

    def term(self, xp: Namespace, parts: Parts) -> Array:
        """What is added up: |x|^power of such parts."""
        raise NotImplementedError

    def contribute(self, xp: Namespace, parts: Parts, total: Total, narrow: bool, seen: tuple[Array, ...]) -> Array:
        bins = [self._bins(xp, these, total, narrow) for these in self.apart(parts)]
        return bins[0] if len(bins) == 1 else bins[0] + bins[1]

    def _bins(self, xp: Namespace, parts: Parts, total: Total, narrow: bool) -> Array:
        if narrow:
            middle = total(self.term(xp, parts))
            return xp.stack([xp.zeros_like(middle), middle, xp.zeros_like(middle)])
        r, longest = range_of(parts[0]), longest_of(xp, parts)
        zero, one = xp.zeros_like(longest), xp.ones_like(longest)
        big = xp.logical_not(longest <= (r.huge if self.power == 2 else r.huge_sum))  # NaN too
        small = longest < r.tiny
        # One multiplier per element, selected: XLA would make x*x*(s*s) of (x*s)*(x*s), and that overflows.
        multiplier = xp.where(big, one / r.step, xp.where(small, one * r.step, one))
        term = self.term(xp, tuple(part * multiplier for part in parts))
        middle = xp.where(xp.logical_or(big, small), zero, term)
        return xp.stack([total(xp.where(small, term, zero)), total(middle), total(xp.where(big, term, zero))])

    def binned(self, xp: Namespace, total: Array) -> Array:
        """The float64 sum of the terms of float32 elements, as a partial in float32: in the bin that holds it."""
        r, zero = RANGES["float32"], xp.zeros_like(total)
        scale = r.step**self.power
        big = xp.logical_not(total <= r.huge**2)  # NaN too
        small = total < r.thin * 2.0**-48  # as many shards have room in the bin
        middle = xp.where(xp.logical_or(big, small), zero, total)
        bins = [xp.where(small, total * scale, zero), middle, xp.where(big, total / scale, zero)]
        return xp.astype(xp.stack(bins), xp.float32)


@dataclass(frozen=True)
class TwoNorm(SumNorm):
    """sqrt(sum |x|^2)."""

    power: int = 2

    def apart(self, parts: Parts) -> tuple[Parts, ...]:
        return tuple((x,) for x in parts)

    def term(self, xp: Namespace, parts: Parts) -> Array:
        return parts[0] * parts[0]

    def finish(self, xp: Namespace, joined: tuple[Array, ...], narrow: bool) -> Measured:
        low, mid, high = joined[0][0], joined[0][1], joined[0][2]
        if narrow:
            return Measured(xp.sqrt(mid), None)
        r, zero = range_of(mid), xp.zeros_like(mid)
        is_big = xp.logical_not(high == 0)
        is_small = xp.logical_and(xp.logical_and(high == 0, mid < r.thin), low > 0)
        squares = xp.where(
            is_big,
            high + xp.where(is_big, mid / r.step, zero) / r.step,  # the select: see rescale
            xp.where(is_small, low + xp.where(is_small, mid * r.step, zero) * r.step, mid),
        )
        one = xp.ones_like(mid)
        return Measured(xp.sqrt(squares), xp.where(is_big, one, xp.where(is_small, -one, zero)))

    def direction(self, xp: Namespace, parts: Parts, norm: Measured) -> tuple[Parts, Array | None]:
        safe = xp.where(norm.root > 0, norm.root, xp.ones_like(norm.root))
        return tuple(norm.over(xp, x) / safe for x in parts), None


@dataclass(frozen=True)
class OneNorm(SumNorm):
    """sum |x|. The small ones have a bin for XLA's sake: it may flush the rounding errors of a compensated sum."""

    def apart(self, parts: Parts) -> tuple[Parts, ...]:
        return (parts,)

    def term(self, xp: Namespace, parts: Parts) -> Array:
        return hypot(xp, parts)

    def finish(self, xp: Namespace, joined: tuple[Array, ...], narrow: bool) -> Measured:
        low, mid, high = joined[0][0], joined[0][1], joined[0][2]
        if narrow:
            return Measured(mid, None)
        step, one, zero = range_of(mid).step, xp.ones_like(mid), xp.zeros_like(mid)
        is_big = xp.logical_not(high == 0)
        is_small = xp.logical_and(xp.logical_and(high == 0, mid == 0), low > 0)
        root = xp.where(is_big, high + mid / step, xp.where(is_small, low, mid + low / step))
        return Measured(root, xp.where(is_big, one, xp.where(is_small, -one, zero)))

    def direction(self, xp: Namespace, parts: Parts, norm: Measured) -> tuple[Parts, Array | None]:
        return unit(xp, parts), None


def _badness(xp: Namespace, parts: Parts) -> Array:
    """For each element: 2 if it is NaN, else 1 if it is infinite, else 0."""
    out = xp.zeros_like(parts[0])
    for part in parts:
        bad = xp.where(xp.isnan(part), xp.full_like(part, 2.0), xp.where(xp.isinf(part), xp.ones_like(part), out))
        out = xp.maximum(out, bad)
    return out


def _poisoned(xp: Namespace, root: Array, badness: Array) -> Array:
    """`root`, or inf or NaN where `badness` says so."""
    inf = xp.full_like(root, math.inf)
    return xp.where(badness > 1, xp.full_like(root, math.nan), xp.where(badness > 0, inf, root))


@dataclass(frozen=True)
class CountNorm(Law):
    """The number of elements that are not 0. Partial: that number, and inf or NaN from non-finite elements."""

    sizes: tuple[int, ...] = (2,)

    def contribute(self, xp: Namespace, parts: Parts, total: Total, narrow: bool, seen: tuple[Array, ...]) -> Array:
        size = longest_of(xp, parts)
        one, zero = xp.ones_like(size), xp.zeros_like(size)
        finite = xp.isfinite(size)
        return xp.stack([total(xp.where(size == 0, zero, one)), total(xp.where(finite, zero, size))])

    def finish(self, xp: Namespace, joined: tuple[Array, ...], narrow: bool) -> Measured:
        return Measured(joined[0][0] + joined[0][1], None)

    def direction(self, xp: Namespace, parts: Parts, norm: Measured) -> tuple[Parts, Array | None]:
        return tuple(xp.zeros_like(x) for x in parts), None


@dataclass(frozen=True)
class ExtremeNorm(Law):
    """The largest (sign 1) or smallest (sign -1) magnitude.

    Partial: the extreme magnitude of the middle elements, of the big ones (scaled down: |re + i im| may
    overflow where re and im do not), and of `badness`, so that no NaN has to survive a foreign max.
    """

    ops: tuple[ReduceOp, ...] = ("max",)
    sign: int = 1

    def contribute(self, xp: Namespace, parts: Parts, total: Total, narrow: bool, seen: tuple[Array, ...]) -> Array:
        r = range_of(parts[0])
        longest = longest_of(xp, parts)
        finite = xp.isfinite(longest)
        big = xp.logical_and(finite, longest > r.huge_sum)
        high = hypot(xp, pick(xp, big, tuple(part / r.step for part in parts)))
        middle = xp.logical_and(finite, longest <= r.huge_sum)
        mid = hypot(xp, pick(xp, middle, parts))
        bad = _badness(xp, parts)
        if self.sign > 0:
            return xp.stack([xp.max(mid), xp.max(high), xp.max(bad)])
        inf = xp.full_like(mid, math.inf)
        return xp.stack([xp.min(xp.where(middle, mid, inf)), xp.min(xp.where(big, high, inf)), xp.min(-bad)])

    def finish(self, xp: Namespace, joined: tuple[Array, ...], narrow: bool) -> Measured:
        mid, high, bad = joined[0][0], joined[0][1], self.sign * joined[0][2]
        zero, one = xp.zeros_like(mid), xp.ones_like(mid)
        if self.sign > 0:
            is_big = high > 0
        else:
            is_big = xp.logical_and(xp.isinf(mid), xp.isfinite(high))
            mid = xp.where(xp.isinf(mid), zero, mid)  # no element at all
        root = _poisoned(xp, xp.where(is_big, high, mid), bad)
        return Measured(root, None if narrow else xp.where(is_big, one, zero))

    def direction(self, xp: Namespace, parts: Parts, norm: Measured) -> tuple[Parts, Array | None]:
        hit = hypot(xp, tuple(norm.over(xp, x) for x in parts)) == norm.root
        weight = xp.where(hit, xp.ones_like(parts[0]), xp.zeros_like(parts[0]))
        return tuple(weight * u for u in unit(xp, parts)), weight


@dataclass(frozen=True)
class PowerNorm(Law):
    """(sum |x|^p)^(1/p) for any other p.

    First pass: the largest magnitude m, the smallest if p < 0. Second pass: the sum of (|x|/m)^p.
    """

    p: float = 3.0

    @property
    def _extreme(self) -> ExtremeNorm:
        return ExtremeNorm(ops=("max",), sign=1) if self.p > 0 else ExtremeNorm(ops=("min",), sign=-1)

    def contribute(self, xp: Namespace, parts: Parts, total: Total, narrow: bool, seen: tuple[Array, ...]) -> Array:
        if not seen:
            return self._extreme.contribute(xp, parts, total, narrow, seen)
        pivot = self._extreme.finish(xp, seen, narrow)
        usable = xp.logical_and(pivot.root > 0, xp.isfinite(pivot.root))
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
        return xp.stack([total(xp.where(counts, term, zero))])

    def finish(self, xp: Namespace, joined: tuple[Array, ...], narrow: bool) -> Measured:
        pivot = self._extreme.finish(xp, joined[:1], narrow)
        terms = joined[1][0]
        safe = xp.where(terms > 0, terms, xp.ones_like(terms))
        inverse = rounded(0.5 / self.p, terms)
        # 1/p is rounded; the rest of it is put back: s**(1/p) = (s**inverse)**2 * (1 + rest * log s)
        rest = float(1 / Fraction(self.p) - 2 * Fraction(inverse))
        root, half, top = pivot.root * (1 + rest * xp.log(safe)), safe**inverse, range_of(safe).top
        if pivot.exponent is None and 50 / abs(self.p) < 0.8 * math.log2(top):
            root, exponent = root * half * half, None
        else:
            # For p near 0 what 2**48 elements can add is beyond counting: so far that what is clipped is 0.
            far = half >= top
            exponent = xp.where(far, 50 * xp.ones_like(half), xp.zeros_like(half))
            exponent = exponent if pivot.exponent is None else exponent + pivot.exponent
            half = xp.where(far, xp.ones_like(half), half)
            for factor in (half, half):
                (m, i), (n, j) = moderate(xp, root), moderate(xp, factor)
                root, exponent = m * n, exponent + i + j
        return Measured(xp.where(xp.isfinite(pivot.root), root, pivot.root), exponent)

    def direction(self, xp: Namespace, parts: Parts, norm: Measured) -> tuple[Parts, Array | None]:
        size = hypot(xp, tuple(norm.over(xp, x) for x in parts))
        ok = xp.logical_and(size > 0, norm.root > 0)
        ratio = size / xp.where(ok, norm.root, xp.ones_like(size))
        slope = xp.where(ok, xp.where(ok, ratio, xp.ones_like(ratio)) ** (self.p - 1), xp.zeros_like(ratio))
        return tuple(slope * u for u in unit(xp, parts)), None


def law(norm_type: float) -> Law:
    """The law of the p-norm, p = `norm_type` (a float that is not NaN)."""
    if norm_type == 2:
        return TwoNorm()
    if norm_type == 1:
        return OneNorm()
    if norm_type == 0:
        return CountNorm()
    if math.isinf(norm_type):
        return ExtremeNorm(ops=("max",) if norm_type > 0 else ("min",), sign=1 if norm_type > 0 else -1)
    op: ReduceOp = "max" if norm_type > 0 else "min"
    return PowerNorm(ops=(op, "sum"), sizes=(3, 1), p=norm_type)

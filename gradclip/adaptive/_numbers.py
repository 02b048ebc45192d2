"""Numbers of any size, with the operators of arithmetic: what rules calculate with.

A norm of float32 gradients may be beyond float32, and its square is beyond it from 2e19 on. So where a library has
nothing wider, a number is a mantissa and an exponent; where it is wide enough, one array, and nothing is added to what
the arithmetic takes.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

from gradclip._scaled import Product, Scaled, host_split, moderate, range_of
from gradclip._types import Array, Namespace

#: The exponents of 0 and of inf: below and above those of all other numbers.
_OF_ZERO, _OF_INF = -64.0, 64.0

Real: TypeAlias = "Number | float | Array"
"""A number, a Python number, or a real array of moderate numbers: counts, weights."""


class Number:
    """An array of real numbers, ``mantissa * step**exponent``, for ``+ - * / < <= > >=``, `sqrt`, `where`, `minimum`.

    `step` is 2**90 for a float32 mantissa and 2**600 for float64. Where `exponent` is None the number is the mantissa.
    Comparisons give arrays of bools. Python numbers may stand on either side, arrays on the right: some libraries do
    not ask the right side what to do. Nothing waits for a device.

    >>> import array_api_compat.numpy as xp
    >>> x = Number.of(xp, xp.asarray(3e38, dtype=xp.float32), wide=False)  # not float64: with an exponent
    >>> y = (x * x + 1.0).sqrt()
    >>> bool(y > 2.9e38), bool(y < 3.1e38)
    (True, True)
    """

    __array_ufunc__ = None  # a NumPy array on the left hands on to the methods below
    __array_priority__ = 1000.0

    def __init__(self, xp: Namespace, mantissa: Array, exponent: Array | None = None) -> None:
        self.xp, self.mantissa, self.exponent = xp, mantissa, exponent

    # -- in and out ------------------------------------------------------------------------------------------

    @classmethod
    def of(cls, xp: Namespace, x: Array, wide: bool, like: Array | None = None) -> Number:
        """An array as numbers; `wide`: as it is, with no exponents. `like`: an array of the dtype to have."""
        like = x if like is None else like
        if wide:
            return cls(xp, xp.astype(x, like.dtype, copy=False))
        if range_of(x).top <= range_of(like).top:
            x = xp.astype(x, like.dtype, copy=False)
        m, e = moderate(xp, xp.abs(x), range_of(like).step)
        m, e = (xp.astype(y, like.dtype, copy=False) for y in (xp.where(x < 0, -m, m), e))
        return cls(xp, m, e)._marked()

    def value(self) -> Array:
        """The numbers in their dtype: inf beyond its range, 0 below."""
        return Scaled(self.mantissa, self.exponent).value(self.xp)

    def product(self) -> Product:
        """The same as a product of two."""
        if self.exponent is None:
            return Product(self.mantissa, None)
        xp, step = self.xp, range_of(self.mantissa).step
        one = xp.ones_like(self.mantissa)
        up, down = self.exponent >= 1, self.exponent <= -1
        unit = xp.where(up, step * one, xp.where(down, one / step, one))
        rest = self.exponent - xp.where(up, one, xp.where(down, -one, 0 * one))
        return Product(Scaled(self.mantissa, rest).value(xp), unit)

    def _as(self, other: Real) -> Number:
        """What stands on the other side of an operator."""
        if isinstance(other, Number):
            return other
        xp = self.xp
        if not isinstance(other, int | float):
            return Number.of(xp, other, self.exponent is None, self.mantissa)
        like = self.mantissa
        if self.exponent is None:
            return Number(xp, xp.full_like(like, float(other)))
        m, e = host_split(abs(float(other)), range_of(like).step)
        e = _OF_ZERO if m == 0 else _OF_INF if math.isinf(m) else e
        return Number(xp, xp.full_like(like, math.copysign(m, other)), xp.full_like(like, e))

    def _ended(self) -> Number:
        """The mantissa near 1 again, after one operation on such ones."""
        if self.exponent is None:
            return self
        xp, m, e = self.xp, self.mantissa, self.exponent
        step, size, one = range_of(m).step, self.xp.abs(m), self.xp.ones_like(m)
        up, down = size >= math.sqrt(step), size < 1 / math.sqrt(step)
        m = m * xp.where(up, one / step, xp.where(down, step * one, one))
        return Number(xp, m, e + xp.where(up, one, xp.where(down, -one, 0 * one)))._marked()

    def _marked(self) -> Number:
        """With the exponents of 0 and inf in their places."""
        xp, m, e = self.xp, self.mantissa, self.exponent
        of_zero, of_inf = xp.full_like(m, _OF_ZERO), xp.full_like(m, _OF_INF)
        return Number(xp, m, xp.where(m == 0, of_zero, xp.where(xp.isinf(m), of_inf, e)))

    # -- arithmetic ------------------------------------------------------------------------------------------

    def __add__(self, other: Real) -> Number:
        one, that, top = self._beside(other)
        return Number(self.xp, one + that, top)._ended()

    def __mul__(self, other: Real) -> Number:
        that = self._as(other)
        if self.exponent is None or that.exponent is None:
            return Number(self.xp, self.value() * that.value())
        return Number(self.xp, self.mantissa * that.mantissa, self.exponent + that.exponent)._ended()

    def __truediv__(self, other: Real) -> Number:
        that = self._as(other)
        if self.exponent is None or that.exponent is None:
            return Number(self.xp, self.value() / that.value())
        return Number(self.xp, self.mantissa / that.mantissa, self.exponent - that.exponent)._ended()

    def __neg__(self) -> Number:
        return Number(self.xp, -self.mantissa, self.exponent)

    def __sub__(self, other: Real) -> Number:
        return self + -self._as(other)

    def __rsub__(self, other: Real) -> Number:
        return self._as(other) - self

    def __rtruediv__(self, other: Real) -> Number:
        return self._as(other) / self

    __radd__, __rmul__ = __add__, __mul__

    def sqrt(self) -> Number:
        """The square root."""
        xp, root = self.xp, self.xp.sqrt(self.mantissa)
        if self.exponent is None:
            return Number(xp, root)
        half = xp.floor(self.exponent / 2)
        one = xp.ones_like(root)
        odd = xp.where(self.exponent - 2 * half == 1, math.sqrt(range_of(root).step) * one, one)
        return Number(xp, root * odd, half)._ended()

    def sum(self) -> Number:
        """The sum along the last axis, which becomes 1 long; of a single number, itself."""
        xp = self.xp
        if self.mantissa.ndim == 0:
            return self
        if self.exponent is None:
            return Number(xp, xp.sum(self.mantissa, axis=-1, keepdims=True))
        if self.mantissa.shape[-1] == 0:
            zeros = xp.sum(self.mantissa, axis=-1, keepdims=True)
            return Number(xp, zeros, zeros)._ended()
        top = xp.max(self.exponent, axis=-1, keepdims=True)
        return Number(xp, xp.sum(self._below(top), axis=-1, keepdims=True), top)._ended()

    def _beside(self, other: Real) -> tuple[Array, Array, Array | None]:
        """The mantissas of both beside one exponent, and that."""
        that = self._as(other)
        if self.exponent is None or that.exponent is None:
            return self.value(), that.value(), None
        top = self.xp.maximum(self.exponent, that.exponent)
        return self._below(top), that._below(top), top

    def _below(self, top: Array) -> Array:
        """The mantissa beside the exponent `top`, which is no less than its own: two steps down nothing is left."""
        xp, one = self.xp, self.xp.ones_like(self.mantissa)
        assert self.exponent is not None
        near = xp.where(self.exponent == top - 1, one / range_of(one).step, 0 * one)
        return self.mantissa * xp.where(self.exponent == top, one, near)

    # -- comparison ------------------------------------------------------------------------------------------

    def __gt__(self, other: Real) -> Array:
        one, that, _ = self._beside(other)
        return one > that

    def __lt__(self, other: Real) -> Array:
        one, that, _ = self._beside(other)
        return one < that

    def __ge__(self, other: Real) -> Array:
        one, that, _ = self._beside(other)
        return one >= that

    def __le__(self, other: Real) -> Array:
        one, that, _ = self._beside(other)
        return one <= that

    def isfinite(self) -> Array:
        return self.xp.isfinite(self.mantissa)

    # -- arrays of numbers -----------------------------------------------------------------------------------

    def repeated(self, n: int) -> Number:
        """As many times, along a new first axis."""
        return self._each(lambda x: self.xp.broadcast_to(x, (n, *x.shape)))

    def chosen(self, mask: Array) -> Number:
        """Along the first axis, the one where `mask` is true."""
        xp = self.xp
        return self._each(lambda x: xp.sum(xp.where(mask, x, xp.zeros_like(x)), axis=0, dtype=x.dtype))

    def shifted(self, by: int) -> Number:
        """Along the first axis, by one place up or down; the number at the end stays where it is, too."""
        return self._each(lambda x: self.xp.concat([x[:1, ...], x[:-1, ...]] if by > 0 else [x[1:, ...], x[-1:, ...]]))

    def _each(self, change: Any) -> Number:
        return Number(self.xp, change(self.mantissa), None if self.exponent is None else change(self.exponent))


def where(mask: Array, x: Number, y: Real) -> Number:
    """`x` where `mask` is true, else `y`."""
    y, xp = x._as(y), x.xp
    if x.exponent is None or y.exponent is None:
        return Number(xp, xp.where(mask, x.value(), y.value()))
    return Number(xp, xp.where(mask, x.mantissa, y.mantissa), xp.where(mask, x.exponent, y.exponent))


def minimum(x: Number, y: Real) -> Number:
    """The smaller of two numbers."""
    return where(x < y, x, y)

"""Sums of squares and products of NumPy blocks, at the speed of memory.

A block is a 1-d array of one of the supported dtypes. Measured on 2 cores (AMD EPYC, AVX-512), one thread, 25 million
elements, in ns an element: `np.dot` 0.17 (but off by 1e-4 at 1e8 elements), rows of 512 added up in float64 0.21 (of
256: 6 % more), a cast to float64 and `np.dot` 0.9; float16: NumPy's casts 2.1 there and 4.3 back, the bit operations
below 0.4 and 1.1.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from gradclip._dtypes import dtype_name
from gradclip._types import Array

#: Elements of a narrow dtype that are widened at once: the wide copy stays in cache.
CHUNK = 1 << 17

#: Up to so many float16 elements NumPy's own product is faster than a dozen bit operations, of 2 us each.
_SHORT = 1 << 14

#: Rows are this long, or a power of two less.
_LONGEST_ROW = 512

#: A sum of n squares has lost nothing that matters if it is at least the first and n times the last, and at most the
#: second. float64: no element overflowed, and what underflowed (below 2**-511 each) adds less than 2**-60 of it, for up
#: to 2**48 elements. Others: underflow takes at most 2**-126 from a float32 square (where the processor flushes),
#: 2**-125 from a complex one, which is less than 2**-26 of such a sum.
_SAFE_DOUBLE = (2.0**-900, 2.0**1000, 0.0)
_SAFE = (0.0, sys.float_info.max, 2.0**-99)


class _Scratch(threading.local):
    """Each thread's own memory for one chunk; what is not written to takes none."""

    def __init__(self) -> None:
        self.wide: Array = np.empty(2 * CHUNK, np.float32)
        self.other: Array = self.wide[CHUNK:]
        self.bits: Array = np.empty(2 * CHUNK, np.uint16)


_scratch = _Scratch()
STEP = 2 * CHUNK


def room(shape: tuple[int, ...], dtype: Any) -> Array:
    """An array to write to: for up to a chunk of float32 numbers the thread's own, and no memory that must be found."""
    n = math.prod(shape)
    return _scratch.other[:n].reshape(shape) if dtype == np.float32 and n <= CHUNK else np.empty(shape, dtype)


def squares(block: Array, wide: bool) -> float:
    """The sum of |x|^2; NaN where a plain sum cannot say: an element is not finite, or squares leave the range.

    `wide`: as exact as float64 can be, whatever the dtype of the block.
    """
    numbers = real(block)
    kind = numbers.dtype.type
    if kind is np.float64 or (kind is np.float32 and not wide):
        total = _dot_rows(numbers)
    else:
        step = CHUNK if wide else STEP
        starts = range(0, numbers.size, step)
        total = sum(_dot_rows(widened(numbers[start : start + step], wide)) for start in starts)
    return _trusted(total, block)


def padded(n: int) -> int:
    """How many elements `squares_of_each` makes of n."""
    return -(-n // _LONGEST_ROW) * _LONGEST_ROW


def squares_of_each(arrays: list[Array], wide: bool) -> list[float]:
    """`squares` of small arrays of one dtype.

    They are strung together, each with zeros up to a whole number of rows, so that no row belongs to two: one by one,
    1,000 arrays of 1,024 float32 elements take six times as long.
    """
    dtype = arrays[0].dtype.newbyteorder("=")
    sizes = np.array([x.size for x in arrays])
    rest = -sizes % _LONGEST_ROW
    pieces = arrays
    if rest.any():
        zeros = np.zeros(_LONGEST_ROW, dtype)
        pieces = [piece for x, n in zip(arrays, rest.tolist(), strict=True) for piece in (x, zeros[:n])]
    block = widened(real(np.concatenate(pieces, axis=None, dtype=dtype)), wide)
    sums = _of_rows(block)
    whole = sizes + rest
    ends = np.cumsum(whole)
    each = np.add.reduceat(sums, (ends - whole) * sums.size // ends[-1])
    for i in np.flatnonzero(~is_safe(each, sizes, dtype)):
        each[i] = _trusted(float(each[i]), arrays[i])
    return list(each.tolist())


def real(block: Array) -> Array:
    """The same numbers, complex ones as two real ones."""
    return np.ascontiguousarray(block).view(block.real.dtype) if block.dtype.kind == "c" else block


def widened(numbers: Array, wide: bool) -> Array:
    """Real numbers in a dtype that can be added up in rows: at most a chunk of those that must be cast."""
    if wide:
        return numbers.astype(np.float64, copy=False)
    widen = _WIDEN.get(dtype_name(numbers))
    return numbers if widen is None else widen(numbers.reshape(-1), _scratch.wide).reshape(numbers.shape)


def _trusted(total: float, x: Array) -> float:
    """The sum, NaN in place of one outside the range in which a plain sum has lost nothing."""
    return total if is_safe(total, x.size, x.dtype) or (total == 0 and not x.any()) else math.nan


def is_safe(totals: Any, sizes: Any, dtype: Any) -> Any:
    """Whether a sum of so many squares, of elements of that dtype, has lost nothing that matters."""
    low, high, each = _SAFE_DOUBLE if dtype.char in "dD" else _SAFE
    return (low <= totals) & (totals <= high) & (totals >= each * sizes)


def _dot_rows(x: Array) -> float:
    """The sum of squares of a 1-d float32 or float64 array: short rows in its dtype, their sums in float64.

    Within 1e-7 (float32) of the exact norm for any number of elements.
    """
    whole = x.size - x.size % (row(x.dtype.type) or 1)
    rest = x[whole:]
    total = float(np.dot(rest, rest)) if rest.size else 0.0
    return total + float(np.add.reduce(_of_rows(x[:whole]))) if whole else total


def _of_rows(x: Array) -> Array:
    """The sums of squares of whole rows, each made in the dtype of `x`; the squares where no row is good enough."""
    length = row(x.dtype.type)
    if length == 0:
        return np.square(x, dtype=np.float64)
    rows = x.reshape(-1, length)
    return np.vecdot(rows, rows).astype(np.float64, copy=False)


@lru_cache
def row(kind: type) -> int:
    """The longest row whose dot product BLAS makes exact enough: it adds in some lanes, how many is its own affair.

    Equal elements are the worst case: their errors do not cancel. 0: no row is good enough.
    """
    values = np.exp2(np.linspace(0, 1, 999)).astype(kind)[:, None]  # squares of fewer bits would add up exactly
    unit = float(np.finfo(kind).eps)
    for length in (_LONGEST_ROW, 256, 128, 64):
        x = np.repeat(values, length, axis=1)
        error = np.vecdot(x, x).astype(np.float64) / (np.square(values[:, 0].astype(np.longdouble)) * length) - 1
        if np.max(np.abs(error)) / 2 < 0.75 * unit:  # 0.9e-7 for float32: others are up to a tenth worse
            return length
    return 0


def multiplied(block: Array, out: Array, steps: Sequence[float], wide: bool) -> None:
    """`out = block * steps`, rounded once, for blocks of any shape and layout; a factor of 0 or NaN is what comes out.

    `steps`: a factor that is a normal float32 number, or any between two shifts. By one step the product is formed in
    float32 up to 32 bits, else, and where `wide`, in float64, with the factor rounded to that.
    """
    factor = steps[len(steps) // 2]
    if factor == 0 or factor != factor:
        out[...] = factor
        return
    if not (block.flags.forc and out.strides == block.strides and block.dtype.isnative):
        flat = np.array(block, block.dtype.newbyteorder("="), order="C")
        multiplied(flat, flat, steps, wide)
        out[...] = flat
        return
    block, out = block.reshape(-1, order="A"), out.reshape(-1, order="A")
    if block.dtype.kind == "c":
        block, out = block.view(block.real.dtype), out.view(out.real.dtype)
    kind = dtype_name(block)
    if len(steps) > 1 or (wide and kind == "bfloat16"):  # bfloat16 has no ufunc loop in float64
        product = block.astype(np.float64)
        for step in steps:
            product *= step
        out[...] = product
    elif wide or kind == "float64" or (kind == "float16" and factor > 1):  # it may overflow: bit operations see nothing
        np.multiply(block, factor, out=out, dtype=np.float64, casting="same_kind")
    elif kind != "float16" or block.size <= _SHORT:  # by way of NumPy's buffers, in one step
        np.multiply(block, np.float32(factor), out=out, dtype=np.float32, casting="same_kind")
    else:
        for piece, target in pairs(block, out, CHUNK):
            through_single(piece, target, lambda x: np.multiply(x, np.float32(factor), out=x))


def through_single(block: Array, out: Array, change: Callable[[Array], Any]) -> None:
    """`out = block` with what `change` makes of it in float32, for a chunk of 16-bit numbers in one piece.

    Of finite float16 numbers it sees magnitudes: signs are kept.
    """
    kind, flat = dtype_name(block), block.reshape(-1)
    if kind == "float16" and flat.size and _magnitudes(flat).max() >= _INF:
        x = block.astype(np.float32)
        change(x)
        np.copyto(out, x, casting="same_kind")
        return
    x = _WIDEN[kind](flat, _scratch.wide)
    change(x.reshape(block.shape))
    _NARROW[kind](x, flat, out.reshape(-1))


# --- 16-bit numbers as float32 and back ---------------------------------------------------------------------------


def _from_bfloat16(block: Array, wide: Array) -> Array:
    x = wide[: block.size]
    np.copyto(x, block)
    return x


def _to_bfloat16(x: Array, like: Array, out: Array) -> None:
    np.copyto(out, x, casting="unsafe")


#: The smallest normal float16, 2**-14; and the bits of inf.
_FIRST, _INF = np.float32(2.0**-14), 0x7C00


@lru_cache
def _constant(value: np.float32) -> Array:
    """A chunk of one number: the maximum of two arrays takes a third of the time of that of an array and a number."""
    return np.full(CHUNK, value)


def _from_float16(block: Array, wide: Array) -> Array:
    """|x| as float32; inf where x is inf or NaN.

    The bits of a float16 at their places in a float32 are 2**-112 times the number, a subnormal's as well.
    """
    x = wide[: block.size]
    if _flushes():
        return np.abs(block, out=x, dtype=np.float32)
    bits, u = _magnitudes(block), x.view(np.uint32)
    np.copyto(u, bits)
    np.left_shift(u, 13, out=u)
    np.multiply(x, np.float32(2.0**112), out=x)
    if bits.size and bits.max() >= _INF:
        x[bits >= _INF] = math.inf
    return x


def _magnitudes(block: Array) -> Array:
    """The bits of |x|."""
    return np.bitwise_and(block.view(np.uint16), np.uint16(0x7FFF), out=_scratch.bits[: block.size])


def _flushes() -> bool:
    """Whether this thread's processor takes subnormals for 0, as some libraries make it do."""
    return bool(np.float32(2.0**-130) * np.float32(2.0**112) == 0)


def _to_float16(x: Array, like: Array, out: Array) -> None:
    """Round x >= 0 to float16, to nearest, ties to even; with the signs of `like`.

    Adding 2**(e + 13) to a number of exponent e makes float32 round it where float16 does; the bits of the sum, less
    those of 2**(e + 13), count units in the last place of float16.
    """
    magic = _scratch.other[: x.size]
    m, u = magic.view(np.uint32), x.view(np.uint32)
    np.maximum(x, _constant(_FIRST)[: x.size], out=magic)
    np.bitwise_and(m, np.uint32(0x7F800000), out=m)
    np.add(m, np.uint32(13 << 23), out=m)
    np.add(x, magic, out=x)
    np.subtract(u, m, out=u)
    np.right_shift(m, 13, out=m)
    np.add(u, m, out=u)
    np.subtract(u, np.uint32((113 + 13) << 10), out=u)
    sign = _scratch.bits[: x.size]
    np.bitwise_and(like.view(np.uint16), np.uint16(0x8000), out=sign)
    np.bitwise_or(u, sign, out=u)
    np.copyto(out.view(np.uint16), u, casting="unsafe")


_WIDEN: dict[str, Callable[[Array, Array], Array]] = {"float16": _from_float16, "bfloat16": _from_bfloat16}
_NARROW: dict[str, Callable[[Array, Array, Array], None]] = {"float16": _to_float16, "bfloat16": _to_bfloat16}


def blocks(leaf: Array, size: int) -> Iterator[Array]:
    """The elements of a leaf in arrays of about `size`, 1-d where its memory allows. Views, all of them."""
    return (x for x, _ in pairs(leaf, leaf, size))


def pairs(leaf: Array, out: Array, size: int) -> Iterator[tuple[Array, Array]]:
    """The same elements of two arrays of one shape, in `blocks`."""
    if leaf.size <= size:
        yield leaf, out
    elif leaf.flags.forc and leaf.strides == out.strides:
        x, y = leaf.reshape(-1, order="A"), out.reshape(-1, order="A")
        for start in range(0, x.size, size):
            yield x[start : start + size], y[start : start + size]
    elif leaf[0].size >= size:
        for x, y in zip(leaf, out, strict=True):
            yield from pairs(x, y, size)
    else:
        rows = size // leaf[0].size
        for start in range(0, len(leaf), rows):
            yield leaf[start : start + rows], out[start : start + rows]

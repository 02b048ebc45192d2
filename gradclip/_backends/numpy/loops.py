"""Sums of squares and products of NumPy blocks, at the speed of memory.

A block is a 1-d array of one of the supported dtypes. Measured on 2 cores (AMD EPYC, AVX-512), one thread, 25 million
elements, in ns an element: `np.dot` 0.17 (but off by 1e-4 at 1e8 elements), rows of 512 added up in float64 0.21 (of
256: 6 % more), a cast to float64 and `np.dot` 0.9.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from operator import attrgetter
from typing import Any

import numpy as np

from gradclip._backends.numpy.sixteen import (
    CHUNK,
    as_single,
    bfloat16_as_single,
    is_bfloat16,
    plain,
    scratch,
    through_single,
)
from gradclip._dtypes import dtype_name
from gradclip._types import Array

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


def strung(arrays: Sequence[Array]) -> Array:
    """Arrays of one dtype, strung together. In the thread's own memory, up to a chunk: to find new memory for 1,024,000
    float32 elements takes as long as all the rest of their norm.
    """
    n, dtype = sum(map(_size, arrays)), arrays[0].dtype.newbyteorder("=")
    out = scratch.strung.view(dtype)[:n] if n <= CHUNK else np.empty(n, dtype)
    return np.concatenate(arrays, axis=None, out=out)


_size = attrgetter("size")


def squares(block: Array, wide: bool) -> float:
    """The sum of |x|^2; NaN where a plain sum cannot say: an element is not finite, or squares leave the range.

    `wide`: as exact as float64 can be, whatever the dtype of the block.
    """
    numbers = real(block)
    kind = numbers.dtype.type
    if kind is np.float64 or (kind is np.float32 and not wide):
        total = _dot_rows(numbers)
    else:
        single = bfloat16_as_single if is_bfloat16(numbers) and not wide else partial(widened, wide=wide)
        starts = range(0, numbers.size, CHUNK)
        total = sum(_dot_rows(single(numbers[start : start + CHUNK])) for start in starts)
    return _trusted(total, block)


def padded(n: int) -> int:
    """How many elements `squares_of_each` makes of n."""
    return -(-n // _LONGEST_ROW) * _LONGEST_ROW


def squares_of_each(arrays: Sequence[Array], wide: bool) -> list[float]:
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
    block = widened(real(strung(pieces)), wide)
    sums = _of_rows(block)
    whole = sizes + rest
    ends = np.cumsum(whole)
    each = np.add.reduceat(sums, (ends - whole) * sums.size // ends[-1])
    for i in np.flatnonzero(~is_safe(each, sizes, dtype)).tolist():
        each[i] = _trusted(float(each[i]), arrays[i])
    return list(each.tolist())


def real(block: Array) -> Array:
    """The same numbers, complex ones as two real ones."""
    return np.ascontiguousarray(block).view(block.real.dtype) if block.dtype.kind == "c" else block


def widened(numbers: Array, wide: bool) -> Array:
    """Real numbers in a dtype that can be added up in rows: at most a chunk of those that must be cast."""
    if wide:
        return plain(numbers).astype(np.float64, copy=False)
    return numbers if numbers.dtype.itemsize > 2 else as_single(numbers)


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
    n, total = x.size, 0.0
    odd = n % (row(x.dtype.type) or 1)
    if odd:
        rest, x = x[n - odd :], x[: n - odd]
        total = float(np.dot(rest, rest))
    return total + float(np.add.reduce(_of_rows(x))) if x.size else total


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

"""NumPy leaves of which one axis is kept: sums of squares, products, and sums over examples.

A leaf is seen as (outer, n, inner), n the kept axis, in the order of its memory. Measured on 2 cores, in ns a float32
element, where to read takes 0.13, and a product with one factor, in place, 0.21: dot products of rows of 128 or more
0.14, of 32 0.37, of 9 1.8; sums over `outer`, by `einsum` in 8 rows of 1,024 or 2,048, 0.17, by squares and sums 0.5;
products with a tile of 2,048 factors 0.17, but 0.34 with NumPy's buffers of 8,192; weighted sums over 256 examples by
matrix products 0.15, by `einsum` 0.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from gradclip._backends.numpy import loops, sixteen
from gradclip._backends.numpy.jobs import BLOCK
from gradclip._backends.numpy.sixteen import CHUNK
from gradclip._types import Array

#: Rows of at least so many elements are added up by dot products.
_ROWS = 64
#: So many rows are added up element by element in the leaf's own dtype, before sums go on in float64.
_FEW = 8
#: So many columns, and so many factors, stand side by side.
_COLUMNS = 1 << 11
#: NumPy's buffer for a product, in elements.
_BUFFER = 1 << 9
#: So many examples are added up in float32.
_EXAMPLES = 64


def view(leaf: Array, keep: int, *others: Array) -> tuple[Array, ...]:
    """A leaf as (outer, n, inner), and others of its shape: their own memory if each is in one piece, else copies."""
    arrays, axis = (leaf, *others), keep
    if not all(map(_in_one_piece, arrays)):
        order = sorted(range(leaf.ndim), key=lambda axis: -abs(leaf.strides[axis]))
        arrays, axis = tuple(x.transpose(order) for x in arrays), order.index(keep)
        if not all(map(_in_one_piece, arrays)):
            arrays, axis = tuple(np.array(x, x.dtype.newbyteorder("="), order="C") for x in (leaf, *others)), keep
    shape = arrays[0].shape
    outer, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    return tuple([x.reshape(outer, shape[axis], inner) for x in arrays])


def _in_one_piece(x: Array) -> bool:
    return x.flags.c_contiguous and x.dtype.isnative


def pieces(x: Array, size: int) -> Iterator[tuple[Array, slice]]:
    """Parts of an (outer, n, inner) array of about `size` elements, and which of the n indices they hold."""
    outer, n, inner = x.shape
    if outer * n * inner == 0:
        return
    rows, units = max(1, size // (n * inner)), max(1, size // inner)
    rows -= rows % _FEW if rows > _FEW else 0
    units = -(-n // -(-n // units))  # as many pieces, of one length
    for row in range(0, outer, rows):
        for unit in range(0, n, n if rows > 1 else units):
            some = slice(unit, min(n, unit + (n if rows > 1 else units)))
            part = x[row : row + rows, some]
            for at in range(0, inner, max(size, 1)):
                yield part[:, :, at : at + size], some


def squares(x: Array, wide: bool) -> Array:
    """The n sums of |x|^2 in float64; NaN where a plain sum cannot say (see `loops`)."""
    numbers = loops.real(x)
    outer, n, inner = numbers.shape
    if inner >= _ROWS:
        sums = fold(_of_rows(numbers.reshape(-1, inner), wide).reshape(outer, n))
    elif outer >= _FEW:
        columns = _of_columns(numbers.reshape(outer, n * inner), wide)
        sums = fold(columns.reshape(n, inner).T)
    else:
        sums = fold(np.square(sixteen.plain(numbers), dtype=np.float64).swapaxes(1, 2).reshape(-1, n))
    doubtful = np.flatnonzero(~loops.is_safe(sums, outer * x.shape[2], x.dtype))
    if doubtful.size:
        nothing = (sums[doubtful] == 0) & ~x[:, doubtful].any(axis=(0, 2))
        sums[doubtful[~nothing]] = math.nan
    return sums


def fold(x: Array) -> Array:
    """The sum over the first axis, by which `x` is used up: halves are added to each other, so that errors stay few."""
    n = len(x)
    while n > 1:
        half, odd = divmod(n, 2)
        if odd:
            x[0] += x[n - 1]
        np.add(x[:half], x[half : 2 * half], out=x[:half])
        n = half
    return x[0]


def _of_rows(x: Array, wide: bool) -> Array:
    """The sum of squares of each row: by dot products of stretches that are short enough to be exact."""
    length, size = x.shape[1], _at_once(x, wide)
    if length > size:
        return fold(np.stack([_of_rows(x[:, i : i + size], wide) for i in range(0, length, size)]))
    out = np.empty(len(x))
    for i in range(0, len(x), rows := size // length):
        some = loops.widened(x[i : i + rows], wide)
        longest = loops.row(some.dtype.type) or 1
        whole = length if length % -(-length // longest) == 0 else length - length % longest
        rest = some[:, whole:]
        sums = np.vecdot(rest, rest).astype(np.float64, copy=False) if whole < length else 0.0
        if whole:
            stretch = whole // -(-whole // longest)
            parts = (
                some[:, :whole].reshape(-1, stretch)
                if whole == length
                else some[:, :whole].reshape(len(some), -1, stretch)
            )
            sums += fold(np.vecdot(parts, parts).reshape(len(some), -1).T.astype(np.float64))
        out[i : i + rows] = sums
    return out


def _of_columns(x: Array, wide: bool) -> Array:
    """The sum of squares of each column. A few rows are added up in the dtype itself, and again by halves."""
    outer, width = x.shape
    if outer < _FEW:
        return fold(np.square(sixteen.plain(x), dtype=np.float64)) if outer else np.zeros(width)
    beside = min(max(1, _COLUMNS // width), outer // _FEW)
    stripe, whole = beside * width, outer - outer % (beside * _FEW)
    total = np.zeros(stripe)
    stripes = x[:whole].reshape(-1, stripe)
    across = min(stripe, 4 * _COLUMNS)
    rows = _at_once(x, wide) // across // _FEW * _FEW
    for i in range(0, len(stripes), rows):
        for j in range(0, stripe, across):
            some = stripes[i : i + rows, j : j + across]
            some = loops.widened(some, wide).reshape(-1, _FEW, some.shape[1])
            sums = sixteen.room(some[:, 0].shape, some.dtype)
            total[j : j + across] += fold(np.einsum("rkw,rkw->rw", some, some, out=sums))
    return fold(total.reshape(beside, width)) + _of_columns(x[whole:], wide)


def _at_once(x: Array, wide: bool) -> int:
    """So many elements are looked at in one step: those that must be widened for that, a chunk at most."""
    return BLOCK if x.dtype.itemsize > 2 and not wide else CHUNK


def are_usual(factor: Array, shift: Array) -> Array:
    """Which factors are one step each: normal numbers in float32, too."""
    usual: Array = (shift == 1) & (factor >= 2.0**-126) & (factor <= 2.0**126)
    return usual


def scaling(
    leaf: Array,
    out: Array,
    keep: int,
    factor: Array,
    shift: Array,
    wide: bool,
    product: Callable[[Array, Sequence[Array]], Array],
) -> list[Callable[[], Any]]:
    """What is to be run so that `out` is the leaf times n numbers, `shift * factor * shift`.

    Normal ones are multiplied in at once, in float32 up to 32 bits unless `wide`; of others `product` knows how.
    """
    x, y = view(leaf, keep, out)
    row = factor if wide or leaf.dtype.char in "dD" else factor.astype(np.float32)
    plain = are_usual(factor, shift).all()
    if leaf.dtype.itemsize == 2:  # bit operations see no overflow
        plain = plain and not wide and row.max() <= 1
    cut = zip(pieces(x, BLOCK if plain else CHUNK), pieces(y, BLOCK if plain else CHUNK), strict=True)
    jobs: list[Callable[[], Any]]
    if plain:
        jobs = [partial(_multiplied, source, to, row[some]) for (source, some), (to, _) in cut]
    else:
        steps = [step[None, :, None] for step in (shift, factor, shift)]
        jobs = [
            partial(_exactly, source, to, [step[:, some] for step in steps], product) for (source, some), (to, _) in cut
        ]
    if y.base is out or np.may_share_memory(y, out):
        return jobs

    def all_of_them() -> None:
        for job in jobs:
            job()
        out[...] = y.reshape(out.shape)

    return [all_of_them]


def _exactly(x: Array, out: Array, steps: Sequence[Array], product: Callable[[Array, Sequence[Array]], Array]) -> None:
    out[...] = product(x, steps)


def _multiplied(x: Array, out: Array, by: Array) -> None:
    """`out = x * by`, n numbers for arrays (outer, n, inner) in one piece. 16-bit ones: by at most 1, in float32."""
    numbers, target = loops.real(x), loops.real(out)
    if numbers.dtype.itemsize > 2:
        _product(numbers, target, by)
        return
    for (part, some), (to, _) in zip(pieces(numbers, CHUNK), pieces(target, CHUNK), strict=True):
        sixteen.through_single(part, to, partial(_in_place, by[some]))


def _in_place(by: Array, x: Array) -> None:
    _product(x, x, by)


def _product(x: Array, out: Array, by: Array) -> None:
    outer, n, inner = x.shape
    width = n * inner
    if outer == 1 or width > 8 * _COLUMNS:
        _rows_times(x.reshape(-1, inner), out.reshape(-1, inner), np.tile(by, outer)[:, None])
        return
    beside = min(max(1, _COLUMNS // width), outer)
    whole, tile = outer - outer % beside, np.tile(np.repeat(by, inner), beside)
    for part, factors in ((slice(0, whole), tile), (slice(whole, outer), tile[:width])):
        _rows_times(x[part].reshape(-1, factors.size), out[part].reshape(-1, factors.size), factors)


def _rows_times(x: Array, out: Array, by: Array) -> None:
    """Products of rows and a row, or a column. NumPy goes by way of a buffer where rows are shorter than one."""
    size = np.setbufsize(_BUFFER if x.shape[1] >= _BUFFER else 4 * _BUFFER)
    try:
        np.multiply(x, by, out=out, casting="same_kind")
    finally:
        np.setbufsize(size)


def matrix(leaf: Array) -> Array:
    """Per-example gradients as real numbers, a row for each example."""
    x = np.ascontiguousarray(leaf, leaf.dtype.newbyteorder("="))
    return loops.real(x.reshape(len(leaf), math.prod(leaf.shape[1:])))


class Weights(NamedTuple):
    """The factors of examples: which runs of them are normal float32 numbers, and which others are not 0."""

    factor: Array
    shift: Array
    runs: list[list[int]]
    others: list[int]


def weights(factor: Array, shift: Array) -> Weights:
    usual = are_usual(factor, shift)
    runs = (
        [[0, len(usual)]]
        if usual.all()
        else np.flatnonzero(np.diff(usual, prepend=False, append=False)).reshape(-1, 2).tolist()
    )
    return Weights(factor, shift, runs, np.flatnonzero(~usual & (factor != 0)).tolist())


def weighted_sum(x: Array, by: Weights) -> Array:
    """The sum over the rows of a matrix of real numbers times `shift * factor * shift`, in float64.

    Products are formed in float32 up to 32 bits. What has a factor of 0 is not looked at.
    """
    total = np.zeros(x.shape[1])
    for i in by.others:
        total += sixteen.plain(x[i]).astype(np.float64) * by.shift[i] * by.factor[i] * by.shift[i]
    factors = by.factor.astype(x.dtype if x.dtype == np.float64 else np.float32, copy=False)
    rows = _EXAMPLES * max(1, _at_once(x, False) // (_EXAMPLES * max(1, x.shape[1])))
    for begin, end in by.runs:
        for i in range(begin, end, rows):
            some, f = x[i : min(i + rows, end)], factors[i : min(i + rows, end)]
            some = some if x.dtype.itemsize > 2 else sixteen.plain(some).astype(np.float32, copy=False)
            whole = len(f) - len(f) % _EXAMPLES
            if whole:
                many = np.matmul(f[:whole].reshape(-1, 1, _EXAMPLES), some[:whole].reshape(-1, _EXAMPLES, x.shape[1]))
                total += fold(many[:, 0])
            if whole < len(f):
                total += f[whole:] @ some[whole:]
    return total

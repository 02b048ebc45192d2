"""NumPy leaves of which one axis is kept: sums of squares, products, and sums over examples.

A leaf is seen as (outer, n, inner), n the kept axis, in the order of its memory. Measured on 2 cores, in ns a float32
element, where to read takes 0.13, and a product with one factor, in place, 0.21: dot products of rows of 128 or more
0.14, of 32 0.37, of 9 1.8; sums over `outer`, by `einsum` in 8 rows of 1,024 or 2,048, 0.17, by squares and sums 0.5;
products with a tile of 8,192 factors 0.26, with one of 512, or a factor for each row of 512, 0.33; weighted sums over
256 examples by matrix products 0.15, by `einsum` 0.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from gradclip._backends.numpy import loops
from gradclip._backends.numpy.jobs import BLOCK
from gradclip._backends.numpy.loops import CHUNK
from gradclip._types import Array

#: Rows of at least so many elements are added up by dot products.
_ROWS = 64
#: So many rows are added up element by element in the leaf's own dtype, before sums go on in float64.
_FEW = 8
#: So many columns, and so many factors, stand side by side.
_COLUMNS, _TILE = 1 << 11, 1 << 13
#: So many examples are added up in float32.
_EXAMPLES = 64


def view(leaf: Array, keep: int, *others: Array) -> tuple[Array, ...]:
    """A leaf as (outer, n, inner), and others of its shape: their own memory where each is in one piece, else copies."""
    order = sorted(range(leaf.ndim), key=lambda axis: -abs(leaf.strides[axis]))
    arrays, axis = [x.transpose(order) for x in (leaf, *others)], order.index(keep)
    if not all(x.flags.c_contiguous and x.dtype.isnative for x in arrays):
        arrays, axis = [np.array(x, x.dtype.newbyteorder("="), order="C") for x in (leaf, *others)], keep
    shape = arrays[0].shape
    return tuple(x.reshape(math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])) for x in arrays)


def pieces(x: Array, size: int) -> Iterator[tuple[Array, slice]]:
    """Parts of an (outer, n, inner) array of about `size` elements, and which of the n indices they hold."""
    outer, n, inner = x.shape
    if outer * n * inner == 0:
        return
    rows, units = max(1, size // (n * inner)), max(1, size // inner)
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
        sums = fold(np.square(numbers, dtype=np.float64).swapaxes(1, 2).reshape(-1, n))
    doubtful = np.flatnonzero(~loops.is_safe(sums, outer * x.shape[2], x.dtype))
    if doubtful.size:
        nothing = (sums[doubtful] == 0) & ~x[:, doubtful].any(axis=(0, 2))
        sums[doubtful[~nothing]] = math.nan
    return sums


def fold(x: Array) -> Array:
    """The sum over the first axis: halves are added to each other, so that few roundings meet in one element."""
    while len(x) > 1:
        half, odd = divmod(len(x), 2)
        rest = x[-1:]
        x = x[:half] + x[half : 2 * half]
        if odd:
            x = np.concatenate([x, rest])
    return x[0]


def _of_rows(x: Array, wide: bool) -> Array:
    """The sum of squares of each row: by dot products of stretches that are short enough to be exact."""
    length = x.shape[1]
    if length > CHUNK:
        return fold(np.stack([_of_rows(x[:, i : i + CHUNK], wide) for i in range(0, length, CHUNK)]))
    out = np.empty(len(x))
    for i in range(0, len(x), rows := max(1, CHUNK // length)):
        some = loops.widened(x[i : i + rows].reshape(-1), wide).reshape(-1, length)
        longest = loops.row(some.dtype.type) or 1
        whole = length if length % -(-length // longest) == 0 else length - length % longest
        out[i : i + rows] = np.vecdot(some[:, whole:], some[:, whole:])
        if whole:
            stretch = whole // -(-whole // longest)
            parts = some[:, :whole].reshape(len(some), -1, stretch)
            out[i : i + rows] += fold(np.vecdot(parts, parts).T.astype(np.float64, copy=False))
    return out


def _of_columns(x: Array, wide: bool) -> Array:
    """The sum of squares of each column."""
    outer, width = x.shape
    beside = min(max(1, _COLUMNS // width), outer // _FEW)
    stripe, whole = beside * width, outer - outer % (beside * _FEW)
    total = np.zeros(width)
    stripes = x[:whole].reshape(-1, stripe)
    at_once = max(1, CHUNK // (_FEW * stripe)) * _FEW
    for i in range(0, len(stripes), at_once):
        for j in range(0, stripe, CHUNK // _FEW):
            some = stripes[i : i + at_once, j : j + CHUNK // _FEW]
            some = loops.widened(some.reshape(-1), wide).reshape(-1, _FEW, some.shape[1])
            sums = fold(np.einsum("rkw,rkw->rw", some, some).astype(np.float64, copy=False))
            if stripe <= CHUNK // _FEW:
                total += fold(sums.reshape(beside, width))
            else:
                total[j : j + sums.size] += sums
    return total + fold(np.square(x[whole:], dtype=np.float64)) if whole < outer else total


def scaling(
    leaf: Array,
    out: Array,
    keep: int,
    factor: Array,
    shift: Array,
    wide: bool,
    exact: Callable[[Array, Sequence[Array]], Array],
) -> list[Callable[[], None]]:
    """What is to be run so that `out = leaf * shift * factor * shift`, n numbers each. `exact`: how, whatever they are."""
    x, y = view(leaf, keep, out)
    simple = bool(np.all((shift == 1) & (factor >= 2.0**-126) & (factor <= 2.0**126)))
    if x.dtype.itemsize == 2:  # bit operations see no overflow
        simple = simple and not wide and factor.max() <= 1

    def part(source: Array, to: Array, some: slice) -> None:
        if simple:
            _multiplied(source, to, factor[some], wide)
        else:
            to[...] = exact(source, [step[None, some, None] for step in (shift, factor, shift)])

    size = BLOCK if simple else CHUNK
    cut = zip(pieces(x, size), pieces(y, size), strict=True)
    jobs: list[Callable[[], None]] = [partial(part, source, to, some) for (source, some), (to, _) in cut]
    if np.may_share_memory(y, out):
        return jobs

    def all_of_them() -> None:
        for job in jobs:
            job()
        out[...] = y.reshape(out.shape)

    return [all_of_them]


def _multiplied(x: Array, out: Array, by: Array, wide: bool) -> None:
    """`out = x * by`, n normal float32 numbers for arrays (outer, n, inner) in one piece, rounded once.

    The product is formed in float32 up to 32 bits, else, and where `wide`, in float64.
    """
    numbers, target = loops.real(x), loops.real(out)
    if numbers.dtype.itemsize > 2:
        _product(numbers, target, by if wide or numbers.dtype == np.float64 else by.astype(np.float32))
        return
    for (part, some), (to, _) in zip(pieces(numbers, CHUNK), pieces(target, CHUNK), strict=True):
        loops.through_single(part, to, partial(_in_place, by[some].astype(np.float32)))


def _in_place(by: Array, x: Array) -> None:
    _product(x, x, by)


def _product(x: Array, out: Array, by: Array) -> None:
    outer, n, inner = x.shape
    width = n * inner
    if outer == 1 or width > 8 * _TILE:
        np.multiply(x, by[:, None], out=out, casting="same_kind")
        return
    beside = min(max(1, _TILE // width), outer)
    whole, tile = outer - outer % beside, np.tile(np.repeat(by, inner), beside)
    for part, factors in ((slice(0, whole), tile), (slice(whole, outer), tile[:width])):
        rows = x[part].reshape(-1, factors.size)
        np.multiply(rows, factors, out=out[part].reshape(rows.shape), casting="same_kind")


def matrix(leaf: Array) -> Array:
    """Per-example gradients as real numbers, a row for each example."""
    x = np.ascontiguousarray(leaf, leaf.dtype.newbyteorder("="))
    return loops.real(x.reshape(len(leaf), math.prod(leaf.shape[1:])))


def weighted_sum(x: Array, total: Array, by: Array, shift: Array) -> None:
    """Add to `total`, which is float64, the rows of a matrix times `shift * by * shift`.

    Products are formed in float32 up to 32 bits. What has a factor of 0 is not looked at.
    """
    usual = (shift == 1) & (by >= 2.0**-126) & (by <= 2.0**126)
    for i in np.flatnonzero(~usual & (by != 0)).tolist():
        total += x[i].astype(np.float64) * shift[i] * by[i] * shift[i]
    factors = by if x.dtype == np.float64 else by.astype(np.float32)
    runs = np.flatnonzero(np.diff(usual, prepend=False, append=False)).reshape(-1, 2)
    rows = _EXAMPLES * max(1, CHUNK // (_EXAMPLES * max(1, x.shape[1])))
    for begin, end in runs.tolist():
        for i in range(begin, end, rows):
            some, f = x[i : min(i + rows, end)], factors[i : min(i + rows, end)]
            some = some if x.dtype.itemsize > 2 else some.astype(np.float32)
            whole = len(f) - len(f) % _EXAMPLES
            if whole:
                many = np.matmul(f[:whole].reshape(-1, 1, _EXAMPLES), some[:whole].reshape(-1, _EXAMPLES, x.shape[1]))
                total += fold(many[:, 0].astype(np.float64, copy=False))
            if whole < len(f):
                total += f[whole:] @ some[whole:]

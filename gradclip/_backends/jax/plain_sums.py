"""One plain sum of the terms of float32 elements, in place of one for each of three bins."""

from __future__ import annotations

import math
from collections import defaultdict
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradclip._backends.jax.reductions import joined, parts, reduced
from gradclip._backends.jax.rows import SHORT, Rows, entries, is_short
from gradclip._norms import SumNorm
from gradclip._scaled import RANGES
from gradclip._types import Array

_R = RANGES["float32"]

#: From here on XLA's CPU compiler adds up by calls to a library. Below, a sum has two or three kernels of its own, of
#: 10 to 20 ms each to compile.
_LONG = 4096

#: Up to here all is added up in float64 at once, which compiles faster. The MLP of the benchmarks, of 235,000 elements,
#: took 1.2 times as long to run so.
_SMALL = 1 << 16

#: So many leaves of one shape are added up at once where a sum is rarely taken.
_AT_ONCE = 12


def in_float64(norm: SumNorm, rows: list[Rows], count: int, quick: bool) -> Array:
    """Rows of up to 32 bits, added up in float64, which JAX has also where it is not enabled.

    That needs no bins. 25 million elements on 2 cores: 5 to 8 ms, the plain sum in float32 3 ms, in bins 102 ms. So
    with `quick`, long leaves are tried with a plain sum, and take more only where one left the safe range. To look
    takes 0.1 ms. GPUs wait for the host at a condition, and are fast enough without.
    """
    arrays = {i: _long(row) if quick else row.array for i, row in enumerate(rows)}

    def sums(arrays: dict[int, Array], acc: Any = jnp.float64) -> dict[int, Array]:
        return {i: _sum(norm, acc, 0, rows[i].axis, [x]) for i, x in arrays.items()}

    one_each = {i for i, row in enumerate(rows) if len(row.owners) == 1 or isinstance(row.owners, range)}
    try_plain = quick and not _is_small(rows)
    tried = {i: x for i, x in arrays.items() if try_plain and i in one_each and not is_short(x)}
    with jax.enable_x64(True):
        plain = sums(tried, jnp.float32)
        found = {i: x.astype(jnp.float64) for i, x in plain.items()}
        if tried and norm.binned:
            # Zeros come from where nothing was lost: numbers would be made by kernels of their own.
            safe = _safe(jnp.concatenate(list(plain.values())))
            exact = lax.cond(
                safe,
                lambda tried, found: jax.tree.map(jnp.zeros_like, found),
                lambda tried, found: sums(tried),
                tried,
                found,
            )
            found = {i: jnp.where(exact[i] > 0, exact[i], x) for i, x in found.items()}
        found |= sums({i: x for i, x in arrays.items() if i not in tried})
        return _joined(found, rows, count, limit=0)


def in_bins(norm: SumNorm, total: Array, number: Array | None) -> Array:
    """The partial that such sums stand for. `number`: of the elements, for a mean."""
    with jax.enable_x64(True):
        if norm.binned:
            bins = norm.in_bins(jnp, total)
        else:
            nothing = jnp.zeros_like(total)  # a norm without bins looks into the middle one only, for NaN too
            bins = jnp.stack([nothing, total, nothing]).astype(jnp.float32)
    return bins if number is None else jnp.concatenate([bins, number[None]])


def _is_small(rows: list[Rows]) -> bool:
    shapes = [row.array.shape for row in rows]
    return all(isinstance(n, int) for shape in shapes for n in shape) and sum(map(math.prod, shapes)) <= _SMALL


def _long(row: Rows) -> Array:
    """The elements of one group, and zeros beside where XLA would add up so few in kernels of their own."""
    x = row.array
    if row.axis is not None or not is_short(x) or x.size >= _LONG:
        return x
    return lax.pad(x.reshape(-1), np.zeros((), x.dtype), [(0, _LONG - x.size, 0)])


def in_float32(norm: SumNorm, rows: list[Rows], count: int) -> Array:
    """The same without float64, which TPUs lack: a second sum is of elements that are scaled up or down by group."""

    def joined_sums(arrays: list[Array], by: Array | None = None) -> Array:
        batches = [[i] for i in range(len(rows))] if by is None else _alike(rows)
        firsts = [rows[some[0]] for some in batches]
        each = [None if by is None else entries(by[None], row)[0] for row in firsts]
        sums = [
            _sum(norm, jnp.float32, SHORT, row.axis, [arrays[i] for i in some], y)
            for some, row, y in zip(batches, firsts, each, strict=True)
        ]
        return _joined(dict(enumerate(sums)), firsts, count, len(rows))

    def scaled(arrays: list[Array], plain: Array) -> Array:
        zero, one = jnp.zeros_like(plain), jnp.ones_like(plain)
        small, big = plain < _R.thin, jnp.logical_not(plain <= _R.lift)  # NaN too
        total = joined_sums(arrays, jnp.where(big, one / _R.step, jnp.where(small, one * _R.step, one)))
        large = jnp.logical_and(jnp.logical_not(jnp.logical_or(small, big)), plain > _R.huge**2)
        high = total
        for _ in range(norm.power):  # XLA would join two plain steps
            high = jnp.where(large, high / _R.step, high)
        middle = jnp.where(jnp.logical_or(jnp.logical_or(small, big), large), zero, total)
        return jnp.stack([jnp.where(small, total, zero), middle, jnp.where(jnp.logical_or(big, large), high, zero)])

    def kept(arrays: list[Array], plain: Array) -> Array:
        return jnp.stack([jnp.zeros_like(plain), plain, jnp.zeros_like(plain)])

    arrays = [row.array for row in rows]
    plain = joined_sums(arrays)
    return lax.cond(_safe(plain), kept, scaled, arrays, plain) if norm.binned else kept(arrays, plain)


def _safe(plain: Array) -> Array:
    """Whether plain sums of float32 terms lost nothing, and have room in the middle bin."""
    return jnp.all(jnp.logical_and(plain >= _R.thin, plain <= _R.huge**2))


def _alike(rows: list[Rows]) -> list[list[int]]:
    """Long leaves of one type and one group together, by their numbers: a sum of their sums is one kernel to compile.

    Of a GPT-2 on a TPU, a kernel for each leaf took longer to compile than the rest of the norm. None is copied.
    """
    found: dict[Any, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        alone = row.axis is not None or len(row.owners) > 1 or is_short(row.array)
        found[i if alone else (row.owners[0], jax.typeof(row.array))].append(i)
    return [some[i : i + _AT_ONCE] for some in found.values() for i in range(0, len(some), _AT_ONCE)]


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _sum(norm: SumNorm, acc: Any, limit: int, axis: int | None, arrays: list[Array], by: Array | None = None) -> Array:
    """The sums of the terms of arrays of one shape, as `reduced` gives them. Under a `jit` of its own it is traced once
    for equal leaves.
    """

    def terms(x: Array) -> list[Array]:
        these = parts(x, acc)
        if by is not None:
            # An array, so that every element is scaled: of (x * s) * (x * s) XLA would make x * x * (s * s).
            one = jnp.ones_like(these[0])
            these = tuple(part * jnp.where(jnp.abs(part) >= 0, by, one) for part in these)
        return [norm.term(jnp, some) for some in norm.apart(these)]

    together = [reduce(jnp.add, same) for same in zip(*map(terms, arrays), strict=True)]
    each = [reduced(x, "sum", limit, axis) for x in together]
    return sum(each[1:], each[0])


def _joined(sums: dict[int, Array], rows: list[Rows], count: int, limit: int) -> Array:
    ids = np.concatenate([row.owners for row in rows])
    return joined([sums[i] for i in range(len(rows))], ids, count, "sum", limit)

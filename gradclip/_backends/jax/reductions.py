"""Reductions that are exact whatever XLA makes of a plain sum."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradclip._backends.jax.arrays import whole
from gradclip._backends.jax.rows import Rows
from gradclip._dtypes import dtype_name
from gradclip._norms import identity
from gradclip._parts import Parts
from gradclip._types import Array, ReduceOp


def parts(x: Array, acc: Any) -> Parts:
    """The real components of an array in the accumulation dtype."""
    if dtype_name(x).startswith("complex"):
        return jnp.real(x).astype(acc), jnp.imag(x).astype(acc)
    return (x.astype(acc),)


def reduced(x: Array, op: ReduceOp, limit: int, axis: int | None = 0) -> Array:
    """One number for each index along an axis; without one, one for all.

    In sums of up to `limit` elements, the rounding errors are added up beside.
    """
    axes, n = tuple(i for i in range(x.ndim) if i != axis), 1 if axis is None else x.shape[axis]
    if op == "sum" and all(isinstance(n, int) for n in x.shape) and 1 < x.size // n <= limit:
        zero = np.zeros((), x.dtype)
        s, rest = lax.reduce((x, jnp.zeros_like(x)), (zero, zero), _two_sum, axes)
        found = jnp.where(jnp.isfinite(rest), s + rest, s)
    else:
        found = (jnp.sum if op == "sum" else jnp.max if op == "max" else jnp.min)(x, axis=axes)
    return found.reshape(1) if axis is None else found


def joined(columns: list[Array], ids: Array, count: int, op: ReduceOp, limit: int) -> Array:
    """The columns of each group as one: looked up in a table, never scattered. `limit` is that of `reduced`."""
    if len({jax.typeof(x) for x in columns}) == 1 and np.array_equal(ids, np.tile(np.arange(count), len(columns))):
        if len(columns) == 1:
            return columns[0]
        x = lax.concatenate(columns, 0)[:, None] if count == 1 else jnp.stack(columns)
        return reduced(x, op, limit, axis=1)
    x = jnp.concatenate(list(map(whole, columns)))
    sizes, order = np.bincount(ids, minlength=count), np.argsort(ids, kind="stable")
    table = np.full((count, sizes.max()), len(ids), np.int32)
    table[ids[order], np.arange(len(ids)) - np.repeat(np.cumsum(sizes) - sizes, sizes)] = order
    if not np.array_equal(table.ravel(), np.arange(len(ids))):
        x = jnp.append(x, jnp.full((1,), identity(op), x.dtype))[table.ravel()]
    return reduced(x.reshape(table.shape), op, limit)


def largest(rows: list[Rows], count: int, acc: Any) -> Array:
    """The largest magnitude of each group, of rows of real numbers; NaN where there is one, 0 where there is none.

    By their bits, which are ordered as magnitudes are, NaN last: no NaN must survive a maximum of floats, and one
    reduction does.
    """
    kind = jnp.int64 if acc == jnp.float64 else jnp.int32
    mask = np.array(np.iinfo(kind).max, kind)
    bits = [lax.bitwise_and(lax.bitcast_convert_type(row.array.astype(acc), kind), mask) for row in rows]
    columns = [reduced(x, "max", 0, row.axis) for x, row in zip(bits, rows, strict=True)]
    ids = np.concatenate([row.owners for row in rows])
    return lax.bitcast_convert_type(joined(columns, ids, count, "max", 0), acc)


def _two_sum(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """Adds numbers that carry their rounding error along (Knuth, TAOCP 2, 4.2.2)."""
    (x, x_rest), (y, y_rest) = a, b
    s = lax.add(x, y)
    t = lax.sub(s, x)
    rest = lax.add(lax.sub(x, lax.sub(s, t)), lax.sub(y, t))
    return s, lax.add(rest, lax.add(x_rest, y_rest))

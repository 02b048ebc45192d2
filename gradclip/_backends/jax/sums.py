"""One pass over the leaves: sums that are exact whatever XLA makes of a plain one, in programs that compile fast.

Leaves are merged into rows before they are reduced, and the result is a column for each row. For 1,000 leaves of 1,024
elements, the norm of each takes 0.9 s to compile so, and 1.9 s with a reduction for each.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax import lax

from gradclip._backends.jax.arrays import may_be_sharded, varying
from gradclip._dtypes import dtype_name
from gradclip._groups import Groups
from gradclip._norms import Norm, Seen, SumNorm, TwoNorm, identity
from gradclip._parts import Parts
from gradclip._scaled import range_of
from gradclip._types import Array, ReduceOp

#: XLA's CPU compiler adds up arrays below about 4096 elements one by one, which is off by up to 7 units of
#: rounding for 1000 equal elements; with a compensated sum it is 0.8. Longer arrays it adds in a tree.
SHORT = 8192

#: So many arrays are stacked at most: what XLA takes to stack them grows with the square of their number.
_STACK = 100

#: So many leaves on a mesh are reduced one by one: XLA combines that many small all-reduces into one.
_ALONE = 256

#: Whether XLA's sum over thousands of elements on the CPU is exact enough: jaxlib 0.8 to 0.10.1 are off by 7 units in
#: the last place of float32 for 1e5 equal elements, 0.7 and 0.10.2 to 0.12 by less than 1.5.
PLAIN_IS_EXACT = tuple(int(n) for n in re.findall(r"\d+", jaxlib.__version__)[:3]) >= (0, 10, 2)

#: Up to here a sum is promised to be exact to a few units in the last place.
_PROMISED = 1 << 17


class _Rows(NamedTuple):
    """Elements of one dtype, those of `groups[i]` at index i of the first axis."""

    array: Array
    groups: tuple[int, ...]
    long: bool  # one leaf that is not short


def partial(leaves: Sequence[Array], norm: Norm, groups: Groups, acc: Any, seen: Seen) -> Array:
    """What the leaves contribute to the pass after those that were `seen`: an array (slots, groups)."""
    op, on_mesh = norm.ops[len(seen)], any(map(may_be_sharded, leaves))
    rows = _rows(leaves, groups, on_mesh)
    nothing = jnp.full((norm.slots[len(seen)], groups.count), identity(op), acc)
    if not rows:
        return nothing
    ids = [group for row in rows for group in row.groups]

    # The cast to `acc` stands in the function that adds up. Outside, the wide array would be made: for 24 million
    # bfloat16 elements the norm took 47 ms with it, and takes 1 ms.
    def found(arrays: list[Array], limit: int = SHORT) -> Array:
        limit = 0 if on_mesh else limit  # a compensated sum would gather
        each: list[list[Array]] = [[] for _ in nothing]
        for x, row in zip(arrays, rows, strict=True):
            known = tuple(_entries(s, row.groups, x.ndim) for s in seen)
            for slot, term in zip(each, norm.terms(jnp, parts(x, acc), known), strict=True):
                slot += [] if term is None else [_reduced(term, op, limit)]
        return jnp.stack(
            [_joined(x, ids, groups.count, op) if x else none for x, none in zip(each, nothing, strict=True)]
        )

    def on_cpu(arrays: list[Array]) -> Array:
        if isinstance(norm, SumNorm) and acc == jnp.float32:
            return _in_float64(norm, arrays, [row.long and not on_mesh for row in rows], ids, groups.count)
        return found(arrays, SHORT if PLAIN_IS_EXACT else _PROMISED)

    arrays = [row.array for row in rows]
    return lax.platform_dependent(arrays, cpu=on_cpu, default=found) if op == "sum" else found(arrays)


def parts(x: Array, acc: Any) -> Parts:
    """The real components of an array in the accumulation dtype."""
    if dtype_name(x).startswith("complex"):
        return jnp.real(x).astype(acc), jnp.imag(x).astype(acc)
    return (x.astype(acc),)


def _rows(leaves: Sequence[Array], groups: Groups, on_mesh: bool) -> list[_Rows]:
    """The leaves; short ones of one group strung together, and short rows of one length stacked.

    On a mesh, leaves that are spread in different ways would be gathered so: there they stay apart, unless they are too
    many. Leaves are kept apart that JAX's types keep apart (varying axes, explicit shardings).
    """
    alone = on_mesh and len(leaves) <= _ALONE
    strings: dict[Any, list[Array]] = defaultdict(list)
    for i, (leaf, group) in enumerate(zip(leaves, groups.base, strict=True)):
        if 0 not in leaf.shape:
            together = is_short(leaf) and not on_mesh
            key = (group, leaf.dtype, varying(leaf)) if together else (group, i)
            strings[key].append(leaf.reshape(-1) if together else leaf)
    pieces = [string[0] if len(string) == 1 else jnp.concatenate(string) for string in strings.values()]
    owners = [group for group, *_ in strings]
    rows = []
    for some in [[i] for i in range(len(pieces))] if alone else stacks(pieces):
        array = pieces[some[0]][None] if len(some) == 1 else jnp.stack([pieces[i] for i in some])
        rows.append(_Rows(array, tuple(owners[i] for i in some), not is_short(pieces[some[0]])))
    return rows


def is_short(x: Array) -> bool:
    return all(isinstance(n, int) for n in x.shape) and x.size <= SHORT  # in `jax.export`, n may be a symbol


def stacks(arrays: Sequence[Array]) -> list[list[int]]:
    """Short arrays of one type together, by their numbers; any other alone."""
    found: dict[Any, list[int]] = defaultdict(list)
    for i, x in enumerate(arrays):
        key = (x.shape, x.dtype, varying(x), jax.typeof(x).sharding) if is_short(x) else i
        found[key].append(i)
    return [some[i : i + _STACK] for some in found.values() for i in range(0, len(some), _STACK)]


def _entries(seen: Array, groups: tuple[int, ...], ndim: int) -> Array:
    """The slots of these groups, to broadcast against rows."""
    index = [group % seen.shape[1] for group in groups]
    found = seen[:, index[0] : index[0] + 1] if len(index) == 1 else seen[:, np.asarray(index)]
    return found.reshape(*found.shape, *(1,) * (ndim - 1))


def _reduced(x: Array, op: ReduceOp, limit: int) -> Array:
    """One number for each row. Sums of up to `limit` are compensated."""
    axes = tuple(range(1, x.ndim))
    if op != "sum":
        return (jnp.max if op == "max" else jnp.min)(x, axis=axes)
    short = all(isinstance(n, int) for n in x.shape) and 1 < x.size // x.shape[0] <= limit
    return _compensated(x, axes) if short else jnp.sum(x, axis=axes)


def _joined(columns: list[Array], ids: list[int], count: int, op: ReduceOp) -> Array:
    """The columns of each group as one: looked up in a table, never scattered."""
    x = jnp.concatenate(columns)
    if count > 1:
        members: list[list[int]] = [[] for _ in range(count)]
        for i, group in enumerate(ids):
            members[group].append(i)
        longest = max(map(len, members))
        if longest == 1 and ids == list(range(count)):
            return x
        table = np.array([[*some, *[len(ids)] * (longest - len(some))] for some in members], np.int32)
        x = jnp.append(x, jnp.full((1,), identity(op), x.dtype))[table.reshape(-1)].reshape(table.shape)
    else:
        x = x[None]
    return x[:, 0] if x.shape[1] == 1 else _reduced(x, op, len(ids))


def _compensated(x: Array, axes: tuple[int, ...]) -> Array:
    """The sum along some axes, with the rounding errors added up beside it."""
    zero = np.zeros((), x.dtype)
    s, rest = lax.reduce((x, jnp.zeros_like(x)), (zero, zero), _two_sum, axes)
    return jnp.where(jnp.isfinite(rest), s + rest, s)


def _two_sum(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """Adds numbers that carry their rounding error along (Knuth, TAOCP 2, 4.2.2)."""
    (x, x_rest), (y, y_rest) = a, b
    s = lax.add(x, y)
    t = lax.sub(s, x)
    rest = lax.add(lax.sub(x, lax.sub(s, t)), lax.sub(y, t))
    return s, lax.add(rest, lax.add(x_rest, y_rest))


def _in_float64(norm: SumNorm, arrays: list[Array], long: list[bool], ids: list[int], count: int) -> Array:
    """The partial of rows of up to 32 bits, added up in float64, which JAX has also where it is not enabled.

    That needs no bins. 25 million elements on 2 cores: 5 to 8 ms, the plain sum in float32 3 ms, in bins 102 ms. So
    long leaves are tried with a plain sum, and take more only where one left the safe range. To look takes 0.1 ms.
    """

    def sums(arrays: list[Array], acc: Any = jnp.float64) -> list[Array]:
        terms = [[norm.term(jnp, these) for these in norm.apart(parts(x, acc))] for x in arrays]
        each = [[jnp.sum(x, axis=tuple(range(1, x.ndim))) for x in some] for some in terms]
        return [sum(x[1:], x[0]).astype(jnp.float64) for x in each]

    with jax.enable_x64(True):
        quick = [PLAIN_IS_EXACT and isinstance(norm, TwoNorm) and x for x in long]
        tried = [x for x, plain in zip(arrays, quick, strict=True) if plain]
        if tried:
            found = sums(tried, jnp.float32)
            if norm.binned:
                plain, r = jnp.concatenate(found), range_of(jnp.float32(0))
                safe = jnp.all(jnp.logical_and(plain >= r.thin, plain <= r.huge**2))
                found = lax.cond(safe, lambda tried, found: found, lambda tried, found: sums(tried), tried, found)
        others = iter(sums([x for x, plain in zip(arrays, quick, strict=True) if not plain]))
        firsts = iter(found if tried else [])
        columns = [next(firsts if plain else others) for plain in quick]
        return norm.in_bins(jnp, _joined(columns, ids, count, "sum"))

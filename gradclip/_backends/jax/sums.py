"""One pass over the leaves: sums that are exact whatever XLA makes of a plain one, in programs that compile fast.

Leaves are merged into rows before they are reduced, and the result is a column for each row. For 1,000 leaves of 1,024
elements, the norm of each takes 0.9 s to compile so, and 1.9 s with a reduction for each.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from functools import partial as with_
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax import lax

from gradclip._backends.jax.arrays import may_be_sharded, varying, whole
from gradclip._dtypes import COMPONENT_BITS, dtype_name, dtype_names
from gradclip._groups import Groups
from gradclip._norms import Norm, RmsNorm, Seen, SumNorm, TwoNorm, identity
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


def accumulation(leaves: Sequence[Array]) -> Any:
    """As wide as the leaves: float64 costs where it is not needed."""
    wide = any(COMPONENT_BITS[name] == 64 for name in dtype_names(leaves))
    return jnp.float64 if wide else jnp.float32


class Rows(NamedTuple):
    """An array, and which group the elements at each index along one of its axes belong to."""

    array: Array
    axis: int
    owners: Sequence[int]

    @property
    def length(self) -> Any:
        """How many elements each index has: an int, but in `jax.export` it may be a symbol."""
        return math.prod(n for axis, n in enumerate(self.array.shape) if axis != self.axis)


def partial(leaves: Sequence[Array], norm: Norm, groups: Groups, seen: Seen) -> Array:
    """What the leaves contribute to the pass after those that were `seen`: an array (slots, groups)."""
    acc, op, on_mesh = accumulation(leaves), norm.ops[len(seen)], any(map(may_be_sharded, leaves))
    if all(0 in leaf.shape for leaf in leaves):
        return jnp.full((norm.slots[len(seen)], groups.count), identity(op), acc)

    # The cast to `acc` stands in the function that adds up. Outside, the wide array would be made: for 24 million
    # bfloat16 elements the norm took 47 ms with it, and takes 1 ms.
    def found(arrays: list[Array], limit: int = SHORT) -> Array:
        rows = _rows(arrays, groups, on_mesh)
        ids = np.concatenate([row.owners for row in rows])
        limit = 0 if on_mesh else limit  # a compensated sum would gather
        terms = [norm.terms(jnp, parts(row.array, acc), tuple(_entries(s, row) for s in seen)) for row in rows]
        each = [
            _alike(slot[0], rows, groups.count, acc)
            if isinstance(slot[0], float)
            else joined(
                [reduced(x, op, limit, row.axis) for x, row in zip(slot, rows, strict=True)],
                ids,
                groups.count,
                op,
                len(ids),
            )
            for slot in zip(*terms, strict=True)
        ]
        return jnp.stack(each)

    def in_float64(arrays: list[Array], quick: bool = False, alone: bool = False) -> Array:
        assert isinstance(norm, SumNorm)
        rows = _rows(arrays, groups, on_mesh, alone)
        bins = _in_float64(norm, rows, quick, groups.count)
        more = [_alike(1.0, rows, groups.count, acc)[None]] if isinstance(norm, RmsNorm) else []
        return jnp.concatenate([bins, *more])

    arrays = list(leaves)
    if op != "sum":
        return found(arrays)
    if not isinstance(norm, SumNorm) or acc != jnp.float32:
        longest = SHORT if PLAIN_IS_EXACT else _PROMISED
        return lax.platform_dependent(arrays, cpu=with_(found, limit=longest), default=found)
    on_cpu = with_(in_float64, quick=PLAIN_IS_EXACT and isinstance(norm, TwoNorm) and not on_mesh)
    on_gpu = with_(in_float64, alone=True)
    return lax.platform_dependent(arrays, cpu=on_cpu, cuda=on_gpu, rocm=on_gpu, default=found)


def parts(x: Array, acc: Any) -> Parts:
    """The real components of an array in the accumulation dtype."""
    if dtype_name(x).startswith("complex"):
        return jnp.real(x).astype(acc), jnp.imag(x).astype(acc)
    return (x.astype(acc),)


def _rows(leaves: Sequence[Array], groups: Groups, on_mesh: bool, alone: bool = False) -> list[Rows]:
    """All elements, in arrays of one dtype each.

    Short leaves of one group are strung together, and short rows of one length stacked. One of which an axis is kept
    stays as it is: to bring that axis to the front would copy it.
    On a mesh, leaves that are spread in different ways would be gathered so: there they stay apart, unless they are too
    many. Leaves are kept apart that JAX's types keep apart (varying axes, explicit shardings).
    """
    alone = alone or (on_mesh and len(leaves) <= _ALONE)
    strings: dict[Any, list[Array]] = defaultdict(list)
    kept = []
    for i, (leaf, keep, group) in enumerate(zip(leaves, groups.keep, groups.base, strict=True)):
        if 0 in leaf.shape:
            continue
        if keep is not None:
            kept.append(Rows(leaf, keep, range(group, group + leaf.shape[keep])))
        else:
            strung = is_short(leaf) and not on_mesh and not alone
            key = (group, leaf.dtype, varying(leaf)) if strung else (group, i)
            strings[key].append(leaf.reshape(-1) if strung else leaf)
    pieces = [string[0] if len(string) == 1 else jnp.concatenate(string) for string in strings.values()]
    owners = [group for group, *_ in strings]
    together = [[i] for i in range(len(pieces))] if alone else stacks(pieces)
    return [Rows(jnp.stack([pieces[i] for i in some]), 0, [owners[i] for i in some]) for some in together] + kept


def is_short(x: Array) -> bool:
    return all(isinstance(n, int) for n in x.shape) and x.size <= SHORT  # in `jax.export`, n may be a symbol


def stacks(arrays: Sequence[Array]) -> list[list[int]]:
    """Short arrays of one type together, by their numbers; any other alone."""
    found: dict[Any, list[int]] = defaultdict(list)
    for i, x in enumerate(arrays):
        key = (x.shape, x.dtype, varying(x), jax.typeof(x).sharding) if is_short(x) else i
        found[key].append(i)
    return [some[i : i + _STACK] for some in found.values() for i in range(0, len(some), _STACK)]


def _entries(seen: Array, row: Rows) -> Array:
    """The slots of these groups, to broadcast against the array."""
    first, n = row.owners[0] % seen.shape[1], len(row.owners)
    is_range = isinstance(row.owners, range)
    found = seen[:, first : first + n] if is_range else seen[:, np.asarray(row.owners) % seen.shape[1]]
    shape = [1] * row.array.ndim
    shape[row.axis] = n
    return found.reshape(-1, *shape)


def _alike(value: float, rows: list[Rows], count: int, acc: Any) -> Array:
    """What each group gets of elements that add `value` each: counted on the host, in integers."""
    sizes: Array = np.zeros(count, object)
    for row in rows if value else ():
        np.add.at(sizes, np.asarray(row.owners), row.length)
    if all(isinstance(n, int) for n in sizes):
        return jnp.asarray(np.asarray(value * sizes, acc))
    return value * jnp.stack([jnp.asarray(n).astype(acc) for n in sizes])


def reduced(x: Array, op: ReduceOp, limit: int, axis: int = 0) -> Array:
    """One number for each index along an axis. In sums of up to `limit`, the rounding errors are added up beside."""
    axes = tuple(i for i in range(x.ndim) if i != axis)
    if op == "sum" and all(isinstance(n, int) for n in x.shape) and 1 < x.size // x.shape[axis] <= limit:
        zero = np.zeros((), x.dtype)
        s, rest = lax.reduce((x, jnp.zeros_like(x)), (zero, zero), _two_sum, axes)
        return jnp.where(jnp.isfinite(rest), s + rest, s)
    reduce = jnp.sum if op == "sum" else jnp.max if op == "max" else jnp.min
    return reduce(x, axis=axes)


def joined(columns: list[Array], ids: Array, count: int, op: ReduceOp, limit: int) -> Array:
    """The columns of each group as one: looked up in a table, never scattered. `limit` is that of `reduced`."""
    if len({jax.typeof(x) for x in columns}) == 1 and np.array_equal(ids, np.tile(np.arange(count), len(columns))):
        return reduced(jnp.stack(columns), op, limit, axis=1)
    x = jnp.concatenate(list(map(whole, columns)))
    sizes, order = np.bincount(ids, minlength=count), np.argsort(ids, kind="stable")
    table = np.full((count, sizes.max()), len(ids), np.int32)
    table[ids[order], np.arange(len(ids)) - np.repeat(np.cumsum(sizes) - sizes, sizes)] = order
    if not np.array_equal(table.ravel(), np.arange(len(ids))):
        x = jnp.append(x, jnp.full((1,), identity(op), x.dtype))[table.ravel()]
    return reduced(x.reshape(table.shape), op, limit)


def _two_sum(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """Adds numbers that carry their rounding error along (Knuth, TAOCP 2, 4.2.2)."""
    (x, x_rest), (y, y_rest) = a, b
    s = lax.add(x, y)
    t = lax.sub(s, x)
    rest = lax.add(lax.sub(x, lax.sub(s, t)), lax.sub(y, t))
    return s, lax.add(rest, lax.add(x_rest, y_rest))


def _in_float64(norm: SumNorm, rows: list[Rows], quick: bool, count: int) -> Array:
    """The bins of rows of up to 32 bits, added up in float64, which JAX has also where it is not enabled.

    That needs no bins. 25 million elements on 2 cores: 5 to 8 ms, the plain sum in float32 3 ms, in bins 102 ms. So
    long leaves are tried with a plain sum, and take more only where one left the safe range. To look takes 0.1 ms.
    """

    def sums(arrays: dict[int, Array], acc: Any = jnp.float64) -> dict[int, Array]:
        found = {}
        for i, x in arrays.items():
            each = [norm.term(jnp, these) for these in norm.apart(parts(x, acc))]
            total = [reduced(term, "sum", 0, rows[i].axis) for term in each]
            found[i] = sum(total[1:], total[0]).astype(jnp.float64)
        return found

    arrays = {i: row.array for i, row in enumerate(rows)}
    one_each = {i for i, row in enumerate(rows) if len(row.owners) == 1 or isinstance(row.owners, range)}
    tried = {i: x for i, x in arrays.items() if quick and i in one_each and not is_short(x)}
    with jax.enable_x64(True):
        found = sums(tried, jnp.float32)
        if tried and norm.binned:
            plain, r = jnp.concatenate(list(found.values())), range_of(jnp.float32(0))
            safe = jnp.all(jnp.logical_and(plain >= r.thin, plain <= r.huge**2))
            found = lax.cond(safe, lambda tried, found: found, lambda tried, found: sums(tried), tried, found)
        found |= sums({i: x for i, x in arrays.items() if i not in tried})
        ids = np.concatenate([row.owners for row in rows])
        total = joined([found[i] for i in arrays], ids, count, "sum", limit=0)
        if norm.binned:
            return norm.in_bins(jnp, total)
        nothing = jnp.zeros_like(total)  # a norm without bins looks into the middle one only, for NaN too
        return jnp.stack([nothing, total, nothing]).astype(jnp.float32)

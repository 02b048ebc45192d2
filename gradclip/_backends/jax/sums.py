"""One pass over the leaves: sums that are exact whatever XLA makes of a plain one, in programs that compile fast.

Leaves are merged into rows before they are reduced, and the result is a column for each row. For 1,000 leaves of 1,024
elements, the norm of each takes 0.9 s to compile so, and 1.9 s with a reduction for each.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax import lax

from gradclip._backends.jax.arrays import may_be_sharded, varying
from gradclip._dtypes import COMPONENT_BITS, dtype_name, dtype_names
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


def accumulation(leaves: Sequence[Array]) -> Any:
    """As wide as the leaves: float64 costs where it is not needed."""
    wide = any(COMPONENT_BITS[name] == 64 for name in dtype_names(leaves))
    return jnp.float64 if wide else jnp.float32


def partial(leaves: Sequence[Array], norm: Norm, groups: Groups, seen: Seen) -> Array:
    """What the leaves contribute to the pass after those that were `seen`: an array (slots, groups)."""
    acc, op, on_mesh = accumulation(leaves), norm.ops[len(seen)], any(map(may_be_sharded, leaves))
    rows = _rows(leaves, groups, on_mesh)
    nothing = jnp.full((norm.slots[len(seen)], groups.count), identity(op), acc)
    if not rows:
        return nothing
    arrays = [x for x, _ in rows]
    ids = [group for _, owners in rows for group in owners]

    # The cast to `acc` stands in the function that adds up. Outside, the wide array would be made: for 24 million
    # bfloat16 elements the norm took 47 ms with it, and takes 1 ms.
    def found(arrays: list[Array], limit: int = SHORT) -> Array:
        limit = 0 if on_mesh else limit  # a compensated sum would gather
        terms = []
        for x, (_, owners) in zip(arrays, rows, strict=True):
            known = tuple(_entries(s, owners, x.ndim) for s in seen)
            terms.append(norm.terms(jnp, parts(x, acc), known))
        each = [[_reduced(term, op, limit) for term in slot if term is not None] for slot in zip(*terms, strict=True)]
        slots = zip(each, nothing, strict=True)
        return jnp.stack([joined(slot, ids, groups.count, op, len(ids)) if slot else none for slot, none in slots])

    def on_cpu(arrays: list[Array]) -> Array:
        if isinstance(norm, SumNorm) and acc == jnp.float32:
            return _in_float64(norm, arrays, on_mesh, ids, groups.count)
        return found(arrays, SHORT if PLAIN_IS_EXACT else _PROMISED)

    return lax.platform_dependent(arrays, cpu=on_cpu, default=found) if op == "sum" else found(arrays)


def parts(x: Array, acc: Any) -> Parts:
    """The real components of an array in the accumulation dtype."""
    if dtype_name(x).startswith("complex"):
        return jnp.real(x).astype(acc), jnp.imag(x).astype(acc)
    return (x.astype(acc),)


def _rows(leaves: Sequence[Array], groups: Groups, on_mesh: bool) -> list[tuple[Array, list[int]]]:
    """Arrays of one dtype each, and which group the elements at each index of the first axis belong to.

    Short leaves of one group are strung together, and short rows of one length stacked.
    On a mesh, leaves that are spread in different ways would be gathered so: there they stay apart, unless they are too
    many. Leaves are kept apart that JAX's types keep apart (varying axes, explicit shardings).
    """
    alone = on_mesh and len(leaves) <= _ALONE
    strings: dict[Any, list[Array]] = defaultdict(list)
    for i, (leaf, group) in enumerate(zip(leaves, groups.base, strict=True)):
        if 0 not in leaf.shape:
            strung = is_short(leaf) and not on_mesh
            key = (group, leaf.dtype, varying(leaf)) if strung else (group, i)
            strings[key].append(leaf.reshape(-1) if strung else leaf)
    pieces = [string[0] if len(string) == 1 else jnp.concatenate(string) for string in strings.values()]
    owners = [group for group, *_ in strings]
    together = [[i] for i in range(len(pieces))] if alone else stacks(pieces)
    return [(jnp.stack([pieces[i] for i in some]), [owners[i] for i in some]) for some in together]


def is_short(x: Array) -> bool:
    return all(isinstance(n, int) for n in x.shape) and x.size <= SHORT  # in `jax.export`, n may be a symbol


def stacks(arrays: Sequence[Array]) -> list[list[int]]:
    """Short arrays of one type together, by their numbers; any other alone."""
    found: dict[Any, list[int]] = defaultdict(list)
    for i, x in enumerate(arrays):
        key = (x.shape, x.dtype, varying(x), jax.typeof(x).sharding) if is_short(x) else i
        found[key].append(i)
    return [some[i : i + _STACK] for some in found.values() for i in range(0, len(some), _STACK)]


def _entries(seen: Array, groups: list[int], ndim: int) -> Array:
    """The slots of these groups, to broadcast against rows."""
    found = seen[:, np.asarray(groups) % seen.shape[1]]
    return found.reshape(*found.shape, *(1,) * (ndim - 1))


def _reduced(x: Array, op: ReduceOp, limit: int) -> Array:
    """One number for each row. In sums of up to `limit`, the rounding errors are added up beside."""
    axes = tuple(range(1, x.ndim))
    if op == "sum" and all(isinstance(n, int) for n in x.shape) and 1 < x.size // x.shape[0] <= limit:
        zero = np.zeros((), x.dtype)
        s, rest = lax.reduce((x, jnp.zeros_like(x)), (zero, zero), _two_sum, axes)
        return jnp.where(jnp.isfinite(rest), s + rest, s)
    reduce = jnp.sum if op == "sum" else jnp.max if op == "max" else jnp.min
    return reduce(x, axis=axes)


def joined(columns: list[Array], ids: list[int], count: int, op: ReduceOp, limit: int) -> Array:
    """The columns of each group as one: looked up in a table, never scattered. `limit` is that of `_reduced`."""
    x = jnp.concatenate(columns)
    members: list[list[int]] = [[] for _ in range(count)]
    for i, group in enumerate(ids):
        members[group].append(i)
    table = np.array([*zip_longest(*members, fillvalue=len(ids))], np.int32).T
    if not np.array_equal(table.ravel(), np.arange(len(ids))):
        x = jnp.append(x, jnp.full((1,), identity(op), x.dtype))[table.ravel()]
    return _reduced(x.reshape(table.shape), op, limit)


def _two_sum(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """Adds numbers that carry their rounding error along (Knuth, TAOCP 2, 4.2.2)."""
    (x, x_rest), (y, y_rest) = a, b
    s = lax.add(x, y)
    t = lax.sub(s, x)
    rest = lax.add(lax.sub(x, lax.sub(s, t)), lax.sub(y, t))
    return s, lax.add(rest, lax.add(x_rest, y_rest))


def _in_float64(norm: SumNorm, arrays: list[Array], on_mesh: bool, ids: list[int], count: int) -> Array:
    """The partial of rows of up to 32 bits, added up in float64, which JAX has also where it is not enabled.

    That needs no bins. 25 million elements on 2 cores: 5 to 8 ms, the plain sum in float32 3 ms, in bins 102 ms. So
    long leaves are tried with a plain sum, and take more only where one left the safe range. To look takes 0.1 ms.
    """

    def sums(arrays: dict[int, Array], acc: Any = jnp.float64) -> dict[int, Array]:
        terms = {i: [norm.term(jnp, these) for these in norm.apart(parts(x, acc))] for i, x in arrays.items()}
        each = {i: [jnp.sum(x, axis=tuple(range(1, x.ndim))) for x in some] for i, some in terms.items()}
        return {i: sum(x[1:], x[0]).astype(jnp.float64) for i, x in each.items()}

    quick = PLAIN_IS_EXACT and isinstance(norm, TwoNorm) and not on_mesh
    tried = {i: x for i, x in enumerate(arrays) if quick and len(x) == 1 and not is_short(x)}
    with jax.enable_x64(True):
        found = sums(tried, jnp.float32)
        if tried and norm.binned:
            plain, r = jnp.concatenate(list(found.values())), range_of(jnp.float32(0))
            safe = jnp.all(jnp.logical_and(plain >= r.thin, plain <= r.huge**2))
            found = lax.cond(safe, lambda tried, found: found, lambda tried, found: sums(tried), tried, found)
        found |= sums({i: x for i, x in enumerate(arrays) if i not in tried})
        return norm.in_bins(jnp, joined([found[i] for i in range(len(arrays))], ids, count, "sum", len(ids)))

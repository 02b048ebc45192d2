"""One pass over the leaves, in the way that suits a platform. What suits it was measured on the CPU, and elsewhere read
from what XLA makes of it: `python -m benchmarks --only devices`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial as with_
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from gradclip._backends.generic import Backend
from gradclip._backends.jax import plain_sums
from gradclip._backends.jax.arrays import is_traced, may_be_sharded
from gradclip._backends.jax.platforms import by_platform
from gradclip._backends.jax.reductions import joined, largest, parts, reduced
from gradclip._backends.jax.rows import SHORT, Rows, alike, entries, rows_of
from gradclip._dtypes import COMPONENT_BITS, dtype_name, dtype_names
from gradclip._groups import Groups
from gradclip._norms import Norm, RmsNorm, Seen, SumNorm, TwoNorm, identity
from gradclip._types import Array, ReduceOp

#: Whether XLA's sum over thousands of elements on the CPU is exact enough: jaxlib 0.8 to 0.10.1 are off by 7 units in
#: the last place of float32 for 1e5 equal elements, 0.7 and 0.10.2 to 0.12 by less than 1.5.
PLAIN_IS_EXACT = tuple(int(n) for n in re.findall(r"\d+", jaxlib.__version__)[:3]) >= (0, 10, 2)

#: Up to here a sum is promised to be exact to a few units in the last place.
_PROMISED = 1 << 17


def accumulation(leaves: Sequence[Array]) -> Any:
    """As wide as the leaves: float64 costs where it is not needed."""
    wide = any(COMPONENT_BITS[name] == 64 for name in dtype_names(leaves))
    return jnp.float64 if wide else jnp.float32


class Measured(NamedTuple):
    """The partial of every pass. `total`: of a sum, each group's in float64, in its place where float64 is at hand.

    Then the partial is zeros, and `derivatives.whole` makes it of the total. Of a mean, the total is the mean.
    """

    joined: Seen
    total: Array | None = None


def partial(leaves: Sequence[Array], norm: Norm, groups: Groups, seen: Seen, joins: bool) -> Measured:
    """What the leaves contribute to the pass after those that were `seen`: an array (slots, groups).

    `joins`: whether it is to be joined with others. Else there is a total. Leaves that may be spread over a mesh join
    by one all-reduce: none is added up twice there on a condition.
    """
    arrays, acc, op = list(leaves), accumulation(leaves), norm.ops[len(seen)]
    on_mesh, count = any(map(may_be_sharded, leaves)), groups.count
    sums = isinstance(norm, SumNorm) and acc == jnp.float32

    def in_slots(slots: Array) -> Measured:
        return Measured((slots,), None if joins or not sums else in_zeros(jnp.float64, count))

    def in_zeros(dtype: Any, *shape: int) -> Array:
        with jax.enable_x64(True):
            return jnp.zeros(shape, dtype)

    if all(0 in leaf.shape for leaf in leaves):
        return in_slots(jnp.full((norm.slots[len(seen)], count), identity(op), acc))

    def merged(arrays: list[Array], alone: bool = False, in_tiles: bool = False) -> list[Rows]:
        return rows_of(arrays, groups, on_mesh, alone, in_tiles)

    # The cast to `acc` stands in the function that adds up. Outside, the wide array would be made: for 24 million
    # bfloat16 elements the norm took 47 ms with it, and takes 1 ms.
    def slot_by_slot(arrays: list[Array], seen: Seen, limit: int = SHORT, alone: bool = False) -> Measured:
        rows, limit = merged(arrays, alone), 0 if on_mesh else limit  # a compensated sum would gather
        terms = [norm.terms(jnp, parts(row.array, acc), tuple(entries(s, row) for s in seen)) for row in rows]
        return in_slots(jnp.stack([_slot(each, rows, count, acc, op, limit) for each in zip(*terms, strict=True)]))

    def by_largest(arrays: list[Array], seen: Seen, alone: bool = False) -> Measured:
        rows = merged(arrays, alone)
        return in_slots(jnp.stack(norm.terms(jnp, (largest(rows, count, acc),), ())))

    def summed(
        arrays: list[Array], seen: Seen, alone: bool = False, wide: bool = True, quick: bool = False
    ) -> Measured:
        assert isinstance(norm, SumNorm)
        rows = merged(arrays, alone, in_tiles=not wide)
        number = alike(1.0, rows, count, acc) if isinstance(norm, RmsNorm) else None
        if not wide:
            bins = plain_sums.in_float32(norm, rows, count)
            return in_slots(bins if number is None else jnp.concatenate([bins, number[None]]))
        total = plain_sums.in_float64(norm, rows, count, quick)
        if joins:
            return Measured((plain_sums.in_bins(norm, total, number),))
        with jax.enable_x64(True):
            total = total if number is None else total / jnp.maximum(number, 1).astype(total.dtype)
        return Measured((in_zeros(acc, norm.slots[0], count),), total)

    def chosen(ways: dict[str, Callable[..., Measured]], default: Callable[..., Measured]) -> Measured:
        on_gpu = with_(ways.pop("gpu", default), alone=True)
        return by_platform(arrays, seen, **ways, cuda=on_gpu, rocm=on_gpu, default=default)

    if op == "max" and not any(dtype_name(x).startswith("complex") for x in leaves):
        return chosen({}, by_largest)
    if op != "sum":
        return chosen({}, slot_by_slot)
    if not sums:
        return chosen({"cpu": with_(slot_by_slot, limit=SHORT if PLAIN_IS_EXACT else _PROMISED)}, slot_by_slot)
    quick = PLAIN_IS_EXACT and isinstance(norm, TwoNorm) and not on_mesh
    # Of many groups, one will be all zeros, and is taken for what lacks bits.
    elsewhere = slot_by_slot if on_mesh or groups.kept else with_(summed, wide=False)
    return chosen({"cpu": with_(summed, quick=quick), "gpu": summed}, elsewhere)


def _slot(terms: Sequence[Any], rows: list[Rows], count: int, acc: Any, op: ReduceOp, limit: int) -> Array:
    """A slot of every group, from what its elements contribute."""
    if isinstance(terms[0], float):
        return alike(terms[0], rows, count, acc)
    ids = np.concatenate([row.owners for row in rows])
    columns = [reduced(x, op, limit, row.axis) for x, row in zip(terms, rows, strict=True)]
    return joined(columns, ids, count, op, len(ids))


one_pass = jax.jit(partial, static_argnums=(1, 2, 4), inline=True)


def measured(backend: Backend, norm: Norm, groups: Groups, join: Any, leaves: list[Array]) -> Measured:
    """Every pass, joined with other shards by `join`."""
    if join is None and len(norm.ops) == 1 and is_traced(*leaves):
        return one_pass(leaves, norm, groups, (), False)
    return Measured(Backend.partials(backend, leaves, norm, groups, join))

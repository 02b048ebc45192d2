"""How partials join with those of shards that live elsewhere."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import cycle
from typing import Any

import array_api_compat

from gradclip._groups import Groups
from gradclip._norms import identity
from gradclip._tree import Flat
from gradclip._types import AllReduce, Array, Call, Engine, Leaf, ReduceOp


class Shards:
    """The shards' side of one call: a callable `(partial, op) -> joined`, or an `Engine`, and what it must know.

    Leaves that other shards hold copies of are measured apart: `measured` are the groups by kind of leaf, and `join`
    puts them together, with identities where this shard does not count them. `leaves`: those of `flat`, and as many
    again where parameters are measured beside them.
    """

    def __init__(
        self,
        all_reduce: AllReduce,
        flat: Flat,
        leaves: Sequence[Leaf],
        groups: Groups,
        call: Call,
        last: ReduceOp,
    ) -> None:
        self._groups, self._call, self._last = groups, call, last
        self._engine = all_reduce if isinstance(all_reduce, Engine) else _Plain(all_reduce)
        found: list[Hashable] = [None] * len(leaves)
        if self._engine is all_reduce:
            told = cycle(flat.spread(all_reduce.told, all_reduce.telling))
            found = [all_reduce.kind(leaf, entry.value) for leaf, entry in zip(leaves, told, strict=False)]
        self._kinds = list(dict.fromkeys(found)) or [None]
        self.measured = groups.split([self._kinds.index(kind) for kind in found])

    def join(self, partial: Array, op: ReduceOp) -> Array:
        """A partial of `measured`, joined: one column a group.

        After the last pass it has one more row: not 0 where a norm is float64 on any shard. That travels with the data,
        unless all shards run one program.
        """
        xp, n = array_api_compat.array_namespace(partial), self._groups.count
        counted = [self._counted(xp, partial[:, k * n : (k + 1) * n], op, kind) for k, kind in enumerate(self._kinds)]
        mine = counted[0] if len(counted) == 1 else getattr(xp, op)(xp.stack(counted), axis=0)
        if op != self._last or self._engine.same_program:
            return self._engine.join(mine, op, self._call)
        sign = -1.0 if op == "min" else 1.0
        flags = [sign * wide for wide in self._groups.each_wide]
        if len(set(flags)) == 1:  # then nothing is copied from the host: in a CUDA graph, nothing can be
            row = xp.full_like(mine[:1, :], flags[0])
        else:
            row = xp.asarray([flags], dtype=partial.dtype, device=array_api_compat.device(partial))
        return self._engine.join(xp.concat([mine, row]), op, self._call)

    def _counted(self, xp: Any, partial: Array, op: ReduceOp, kind: Hashable) -> Array:
        """A partial where this shard counts it, else what joins without effect: selected, for 0 * NaN is NaN."""
        counts = self._engine.counts(kind, partial)
        if counts is True:
            return partial
        nothing = xp.full_like(partial, identity(op))
        return nothing if counts is False else xp.where(counts, partial, nothing)

    def gather(self, text: str) -> list[str]:
        """The texts of all shards, by rank."""
        return self._engine.gather(text)


class _Plain(Engine):
    """A plain callable as an engine. What it gives may be traced: only type and shape are looked at."""

    def __init__(self, all_reduce: AllReduce) -> None:
        self._all_reduce = all_reduce

    def join(self, partial: Array, op: ReduceOp, call: Call) -> Array:
        joined = self._all_reduce(partial, op)
        shape = getattr(joined, "shape", None)
        if shape == partial.shape:
            return joined
        unlike = f"for a partial of shape {tuple(partial.shape)}: return the joined array, of the partial's shape"
        if isinstance(shape, tuple):
            raise ValueError(f"all_reduce gave an array of shape {tuple(shape)} {unlike}")
        got = "None" if joined is None else f"an object of type {type(joined).__name__}"
        raise TypeError(f"all_reduce gave {got} {unlike}")

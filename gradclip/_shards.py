"""How partials join with those of shards that live elsewhere."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import array_api_compat

from gradclip._groups import Groups
from gradclip._norms import identity
from gradclip._tree import Flat
from gradclip._types import AllReduce, Array, Call, Engine, Leaf, ReduceOp


class Shards:
    """The shards' side of one call: a callable `(partial, op) -> joined`, or an `Engine`, and what it must know.

    Leaves that other shards hold copies of are measured apart: `measured` are the groups by kind of leaf, and `join`
    puts them together, with identities where this shard does not count them.
    """

    def __init__(self, all_reduce: AllReduce, flat: Flat, groups: Groups, call: Call, last: ReduceOp) -> None:
        self._all_reduce, self._groups, self._call, self._last = all_reduce, groups, call, last
        found: list[Hashable] = [None] * len(flat.values)
        if isinstance(all_reduce, Engine):
            told: Sequence[Any] = found
            if all_reduce.told is not None:
                told = [entry.value for entry in flat.spread(all_reduce.told, all_reduce.telling)]
            leaves = map(Leaf, flat.paths(), flat.values)
            found = [all_reduce.kind(leaf, entry) for leaf, entry in zip(leaves, told, strict=True)]
        self._kinds = dict.fromkeys(found) or {None: None}
        number = {kind: i for i, kind in enumerate(self._kinds)}
        self.measured = groups.split([number[kind] for kind in found])

    def join(self, partial: Array, op: ReduceOp) -> Array:
        """A partial of `measured`, joined: one column a group.

        After the last pass it has one more row: not 0 where a norm is float64 on any shard. That travels with the data,
        unless all shards run one program.
        """
        xp, n = array_api_compat.array_namespace(partial), self._groups.count
        columns = [partial[:, k * n : (k + 1) * n] for k in range(len(self._kinds))]
        counted = [self._counted(xp, x, op, kind) for x, kind in zip(columns, self._kinds, strict=True)]
        mine = counted[0]
        if len(counted) > 1:
            table = xp.stack(counted)
            mine = (xp.sum if op == "sum" else xp.max if op == "max" else xp.min)(table, axis=0)
        if op != self._last or getattr(self._all_reduce, "same_program", False):
            return self._reduced(mine, op)
        sign = -1.0 if op == "min" else 1.0
        flags = [sign * wide for wide in self._groups.wide]
        if len(set(flags)) == 1:  # then nothing is copied from the host: in a CUDA graph, nothing can be
            row = xp.full_like(mine[:1, :], flags[0])
        else:
            row = xp.asarray([flags], dtype=partial.dtype, device=array_api_compat.device(partial))
        return self._reduced(xp.concat([mine, row]), op)

    def _counted(self, xp: Any, partial: Array, op: ReduceOp, kind: Hashable) -> Array:
        """A partial where this shard counts it, else what joins without effect: selected, for 0 * NaN is NaN."""
        counts = self._all_reduce.counts(kind, partial) if isinstance(self._all_reduce, Engine) else True
        if counts is True:
            return partial
        nothing = xp.full_like(partial, identity(op))
        return nothing if counts is False else xp.where(counts, partial, nothing)

    def _reduced(self, partial: Array, op: ReduceOp) -> Array:
        if isinstance(self._all_reduce, Engine):
            return self._all_reduce.join(partial, op, self._call)
        joined = self._all_reduce(partial, op)
        if getattr(joined, "shape", None) != partial.shape:
            raise _not_joined(joined, tuple(partial.shape))
        return joined

    def gather(self, text: str) -> list[str]:
        """The texts of all shards, by rank."""
        return self._all_reduce.gather(text) if isinstance(self._all_reduce, Engine) else []


def _not_joined(joined: Any, wanted: tuple[int, ...]) -> Exception:
    """What to raise for something that is no joined partial. It may be traced: only type and shape are looked at."""
    repair = "return the joined array, of the partial's shape"
    shape = getattr(joined, "shape", None)
    if isinstance(shape, tuple):
        return ValueError(f"all_reduce gave an array of shape {tuple(shape)} for a partial of shape {wanted}: {repair}")
    got = "None" if joined is None else f"an object of type {type(joined).__name__}"
    return TypeError(f"all_reduce gave {got} for a partial of shape {wanted}: {repair}")

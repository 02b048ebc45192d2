"""JAX: partials joined over the named axes of `shard_map`, `pmap` and `vmap`."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import jax
from jax import lax

from gradclip._backends.jax.arrays import varying
from gradclip._types import Array, Call, Engine, Leaf, ReduceOp, Tree

_COLLECTIVES = {"sum": lax.psum, "max": lax.pmax, "min": lax.pmin}


class Psum(Engine):
    """See `gradclip.distributed.psum`. The kind of a leaf: the joined axes over which all devices hold copies of it."""

    telling = "varying"
    same_program = True

    def __init__(self, axes: tuple[str, ...], varying: Tree) -> None:
        self.axes = axes
        self.told = varying

    def kind(self, leaf: Leaf, told: Any) -> Hashable:
        if told is not None:
            return frozenset(self.axes) - self._named(told, leaf.path)
        if not isinstance(leaf.value, jax.Array):  # NumPy's, in a program that all devices run: a constant
            return frozenset(self.axes)
        over = varying(leaf.value)
        for axis in self.axes:
            if axis not in over and axis not in varying(self._index(axis)):
                raise ValueError(
                    f"psum({axis!r}) cannot know whether {leaf.path} varies over {axis!r}: JAX does not track that in "
                    "vmap, pmap and shard_map(check_vma=False), and a leaf that is the same on all devices must count "
                    f"once. Say which leaves vary over which axes, psum(..., varying=...): varying={axis!r} if all of "
                    "them do, or a tree of axis names and PartitionSpecs, PartitionSpec() where a leaf varies over "
                    "none; the in_specs of the gradients will do. In shard_map, check_vma=True makes JAX track it."
                )
        return frozenset(self.axes) - over

    def counts(self, kind: Any, like: Array) -> Any:
        if not kind or not isinstance(like, jax.Array):
            return True
        return sum(self._index(axis) for axis in sorted(kind)) == 0  # the first device on each axis

    def join(self, partial: Array, op: ReduceOp, call: Call) -> Array:
        if not isinstance(partial, jax.Array):  # constants, which count once, are all that there is
            return partial
        over = varying(partial)
        # Told to vary where JAX tracks that it does not: JAX takes all of the axes or none.
        missing = tuple(axis for axis in self.axes if axis in varying(self._index(axis)) and axis not in over)
        if missing:  # JAX 0.8 calls it `pvary`
            cast = hasattr(lax, "pcast")
            partial = lax.pcast(partial, missing, to="varying") if cast else lax.pvary(partial, missing)
        return _COLLECTIVES[op](partial, self.axes)

    def _index(self, axis: str) -> Array:
        """This device's index on an axis, which varies over that axis where JAX tracks it."""
        try:
            return lax.axis_index(axis)
        except NameError:
            raise NameError(
                f"psum({axis!r}): there is no axis {axis!r} here. Call gradclip inside shard_map, pmap or "
                "vmap(axis_name=...) over that axis; under jax.jit alone pass no all_reduce, the compiler joins shards"
            ) from None

    def _named(self, told: Any, path: str) -> frozenset[str]:
        """The axes that an entry of `varying` names: a name, a set of names, or a PartitionSpec."""
        names: list[Any] = []
        for part in [told] if isinstance(told, str) or not isinstance(told, Iterable) else told:
            names += part if isinstance(part, tuple) else [] if part is None else [part]
        for name in names:
            if not isinstance(name, str):
                raise TypeError(
                    f"varying says {told!r} of {path}: it must be an axis name, a set of them, or a PartitionSpec"
                )
            if name not in self.axes:
                self._index(name)  # a misspelt name must not pass as "varies over nothing"
        return frozenset(names)

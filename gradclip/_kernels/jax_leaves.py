"""Leaves of JAX: short ones strung together, what their types say, where they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradclip._types import Array

#: XLA's CPU compiler adds up arrays below about 4096 elements one by one, which is off by up to 7 units of
#: rounding for 1000 equal elements; with a compensated sum it is 0.8, at 1.4 times the run time for 300 leaves of 1024.
#: Longer arrays it adds in a tree (0.7 units for 1e5 elements).
SHORT = 8192


def strung(leaves: Sequence[Array]) -> list[Array]:
    """The leaves, short ones of one dtype strung together.

    For 200 leaves of 1024 elements that takes the compilation of the norm from 7.2 s to 0.3 s, and its run
    from 1.6 ms to 0.2 ms. Leaves are kept apart that JAX's types keep apart (explicit shardings, varying axes).
    """
    whole, groups = [], defaultdict[Any, list[Array]](list)
    for leaf in leaves:
        if leaf.size > SHORT or is_sharded(leaf):
            whole.append(leaf)
        else:
            groups[leaf.dtype, varying(leaf)].append(leaf.reshape(-1))
    return whole + [jnp.concatenate(group) for group in groups.values()]


def is_sharded(x: Array) -> bool:
    """Whether the type of a traced array names mesh axes (sharding in types)."""
    spec = getattr(getattr(jax.typeof(x), "sharding", None), "spec", ()) if isinstance(x, jax.core.Tracer) else ()
    return any(axis is not None for axis in spec)


def varying(x: Array) -> frozenset[Any]:
    """The manual axes over which a value varies, as `shard_map` tracks them."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)
    return frozenset(getattr(manual, "varying", None) or getattr(kind, "vma", None) or ())


def replicate(x: Array, devices: frozenset[Any]) -> Array:
    mesh = jax.sharding.Mesh(np.asarray(sorted(devices, key=lambda d: d.id)), ("all",))
    return jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))

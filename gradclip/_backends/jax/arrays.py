"""What the types of JAX's arrays say, and where arrays are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gradclip._types import Array


def is_traced(*arrays: Array) -> bool:
    return any(isinstance(x, jax.core.Tracer) for x in arrays)


def varying(x: Array) -> frozenset[Any]:
    """The manual axes over which a value varies, as far as JAX tracks them. JAX 0.8 keeps them in `vma`."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)
    return frozenset(getattr(manual, "varying", None) or getattr(kind, "vma", None) or ())


def may_be_sharded(x: Array) -> bool:
    """Whether the type of a traced array names a mesh that the compiler spreads arrays over.

    The gradients of arrays on a mesh have such types; only `in_shardings` for arrays from elsewhere leave no trace.
    """
    mesh = jax.typeof(x).sharding.mesh
    return mesh.size > 1 and any(kind != jax.sharding.AxisType.Manual for kind in mesh.axis_types)


def whole(x: Array) -> Array:
    """A small array, which may be spread over a mesh, in whole on each device: once, not at each cut of it."""
    if not may_be_sharded(x):
        return x
    there = NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec())
    return jax.sharding.reshard(x, there) if _is_explicit(x) else jax.lax.with_sharding_constraint(x, there)


def spread(x: Array, like: Array) -> Array:
    """An array that broadcasts against another; as large and spread alike where JAX's types ask for that."""
    if x.ndim == 0 or not _is_explicit(like):
        return x
    return jax.sharding.reshard(jnp.broadcast_to(x, like.shape), jax.typeof(like).sharding)


def _is_explicit(x: Array) -> bool:
    return jax.sharding.AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def devices(x: Array) -> frozenset[Any] | None:
    """The devices that hold an array; None for one that can be anywhere: traced, or the host's."""
    return frozenset(x.sharding.device_set) if isinstance(x, jax.Array) and not is_traced(x) else None


def guarded() -> bool:
    """Whether JAX has been told to watch copies from the host that nobody asked for."""
    return jax.config.jax_transfer_guard_host_to_device not in (None, "allow")


def placed(x: Any, device: Any) -> Any:
    """Small arrays on the devices of `device` (a device or a sharding), in whole on each."""
    if device is None:
        return x
    where = sorted(getattr(device, "device_set", None) or [device], key=lambda d: d.id)
    mesh = device.mesh if isinstance(device, NamedSharding) else Mesh(np.asarray(where), ("all",))
    return jax.device_put(x, where[0] if len(where) == 1 else NamedSharding(mesh, PartitionSpec()))

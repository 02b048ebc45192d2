"""What a clip remembers between updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradclip._types import Array, Tree


class ClipState(NamedTuple):
    """The state of a clip: of the last update, and counts of all. Zeros before the first.

    `norm`, `bound` and `clipped` have one form, that of `gradclip.norms`: a 0-d array; with `per`, one number for each
    group.
    """

    count: Array
    """How many updates there were: int32, 0-d."""

    norm: Any
    """The norm before clipping: float32, or float64 where parameters have 64-bit components."""

    bound: Any
    """The bound that was held against it, in the same dtype."""

    clipped: Any
    """How many updates had a norm above the bound, int32: inf is above every bound but inf, NaN above none."""

    rule: Any = ()
    """The state of a rule of `gradclip.adaptive`, where one chooses the bound."""


def started(norms: Callable[[Tree], Tree], grads: Tree, rule: Any = None) -> ClipState:
    """The state before the first update. `norms` is only traced, for the form of the norms."""
    form = jax.eval_shape(norms, grads)

    def zeros(dtype: Any = None) -> Tree:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, dtype or x.dtype), form)

    rule = () if rule is None else as_before(rule, rule)
    return ClipState(jnp.zeros((), jnp.int32), zeros(), zeros(), zeros(jnp.int32), rule)


def stand_ins(params: Tree) -> Tree:
    """What has the form of gradients: JAX gives float0 for a parameter that is not floating-point."""

    def one(x: Array) -> Array:
        return x if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else np.zeros(jnp.shape(x), jax.dtypes.float0)

    return jax.tree.map(one, params)


def followed(state: ClipState, norm: Tree, bound: Tree, rule: Any = ()) -> ClipState:
    """The state after an update of this norm and bound, of the same structure, shapes and dtypes."""
    norm, bound = as_before(state.norm, norm), as_before(state.bound, bound)

    def counted(n: Array, norm: Array, bound: Array) -> Array:
        return jnp.where(norm > jnp.maximum(bound, jnp.zeros_like(bound)), optax.safe_increment(n), n)

    clipped = jax.tree.map(counted, state.clipped, norm, bound)
    return ClipState(optax.safe_increment(state.count), norm, bound, clipped, rule)


def as_before(old: Tree, new: Tree) -> Tree:
    """`new`, a tree prefix of `old`, in its form: a loop of JAX carries nothing whose dtype or shape changes."""

    def spread(new: Any, old: Tree) -> Tree:
        return jax.tree.map(lambda x: jnp.broadcast_to(jnp.asarray(new, x.dtype), x.shape), old)

    return jax.tree.map(spread, new, old)

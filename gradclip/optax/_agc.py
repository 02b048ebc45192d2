"""Adaptive clipping: the bound of a unit is a part of the norm of its parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

import gradclip
from gradclip import _arguments
from gradclip._leaves import active, backend_for, parameters
from gradclip._types import AllReduce, Array, Nonfinite, Per, Scalar, Tree
from gradclip.optax._state import ClipState, followed, stand_ins, started
from gradclip.optax._units import AsTheyLie, OptaxUnits


def adaptive_grad_clip(
    clipping: Scalar,
    eps: Scalar = 1e-3,
    axis: int | tuple[int, ...] | None = None,
    *,
    per: Per = None,
    nonfinite: Nonfinite = "propagate",
    all_reduce: AllReduce | None = None,
) -> optax.GradientTransformation:
    r"""Scale the updates of each unit down to a part of the norm of its parameters.

    .. math:: \mathrm{clip}(g_k) = g_k \min\Big(1, \lambda \frac{\max(\|w_k\|, \epsilon)}{\|g_k\|}\Big)

    with :math:`\lambda` = `clipping`, :math:`\epsilon` = `eps` (Brock, De, Smith, Simonyan, ICML 2021, equation 3):
    in place of `optax.adaptive_grad_clip`.

    Parameters
    ----------
    clipping : float or 0-d array
        The largest ratio of a unit's update to its parameters, >= 0.
    eps : float or 0-d array
        The least norm of parameters that counts, > 0.
    axis : int or tuple of ints, static
        The axes that a norm sums over, in every leaf. None: optax's for each leaf: all where at most one axis is longer
        than 1; the first of 2 or 3; all but the last of 4 and more. In `shard_map` that goes by the shapes of shards:
        name it, or `per`, where a shard has an axis of length 1 that the whole leaf has not.
    per : static
        Other groups than optax's, as in `gradclip.clip_grad_agc`: ``"unit"``, ``gradclip.Units(0)``, ...
    nonfinite : {"propagate", "zero", "error"}, static
        As in `clip_by_global_norm`, for each unit.
    all_reduce : callable, optional
        As in `clip_by_global_norm`.

    Returns
    -------
    optax.GradientTransformation
        Its state is a `ClipState`. The norms of a leaf broadcast against it; 0-d where it is one unit.

    Raises
    ------
    ValueError
        If both `axis` and `per` are given, or `clipping` or `eps` is out of range; by `update`, for parameters that are
        not given, or of another structure or shape.
    TypeError, LeafError, NonFiniteError
        As `clip_by_global_norm`.

    Notes
    -----
    `gradclip.clip_grad_agc`, which tells no bounds, gives the same but for the bound's rounding, and where the norm of
    parameters is beyond its dtype: here that clips nothing. `all_reduce` is called for updates and for parameters.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> params, grads = jnp.array([[3.0, 0.0], [4.0, 0.0]]), jnp.array([[0.0, 1.0], [2.0, 0.0]])
    >>> clipper = adaptive_grad_clip(0.1, eps=0.01)
    >>> updates, state = clipper.update(grads, clipper.init(params), params)
    >>> updates.tolist(), state.norm.tolist()
    ([[0.0, 0.0010000000474974513], [0.5, 0.0]], [[2.0, 1.0]])
    """
    clipping, eps = _arguments.scalar("clipping", clipping), _arguments.scalar("eps", eps, positive=True)
    _arguments.policy(nonfinite)
    if per is not None and axis is not None:
        raise ValueError(f"axis={axis!r} and per={per!r} both say what a unit is: pass one of them")
    units = AsTheyLie() if per is not None else OptaxUnits(axis)
    groups = "unit" if per is None else per

    def bounded(norm: Array) -> Array:
        return jnp.asarray(clipping, norm.dtype) * jnp.maximum(norm, jnp.asarray(eps, norm.dtype))

    def init(params: Tree) -> ClipState:
        return started(lambda x: units.norms(gradclip.norms(units.laid(x), per=groups), x), stand_ins(params))

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, ClipState]:
        if params is None:
            raise ValueError(
                "adaptive_grad_clip holds updates against the norms of parameters, and got none: call "
                "update(updates, state, params)"
            )
        state, weights, flat = state or init(params), stand_ins(params), active(updates)
        backend_for(flat)  # raises for what is no gradient, and the next where it is not that of these parameters
        parameters(weights, flat)
        # In place of `clip_grad_agc`, which reads the same, and does not tell the bounds.
        bounds = jax.tree.map(bounded, gradclip.norms(units.laid(weights), per=groups, all_reduce=all_reduce))
        clipped, norm = gradclip.clip_grad_norm(
            units.laid(updates), bounds, per=groups, nonfinite=nonfinite, all_reduce=all_reduce
        )
        bounds = units.norms(bounds, weights)
        return units.back(clipped, updates), followed(state, units.norms(norm, updates), bounds)

    return optax.GradientTransformation(init, update)

"""Adaptive clipping: the bound of a unit is a part of the norm of its parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

import gradclip
from gradclip import _arguments
from gradclip._types import AllReduce, Nonfinite, Per, Scalar, Tree
from gradclip.optax._state import ClipState, followed, stand_ins, started
from gradclip.optax._units import OptaxUnits


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
    `gradclip.clip_grad_agc` in place of `optax.adaptive_grad_clip`.

    Parameters
    ----------
    clipping : float or 0-d array
        The largest ratio of a unit's update to its parameters, >= 0.
    eps : float or 0-d array
        The least norm of parameters that counts, > 0.
    axis : int or tuple of ints, static
        The axes that a norm sums over, in every leaf. None: optax's for each leaf: all where at most one axis is longer
        than 1; the first of 2 or 3; all but the last of 4 and more.
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
        If both `axis` and `per` are given; by `update`, if it is given no parameters.
    TypeError, LeafError, NonFiniteError
        By `update`, as `gradclip.clip_grad_agc`.

    Notes
    -----
    `update` needs `params`. `bound` in the state is inf where the norm of parameters is beyond its dtype.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> params, grads = jnp.array([[3.0, 0.0], [4.0, 0.0]]), jnp.array([[0.0, 1.0], [2.0, 0.0]])
    >>> clipper = adaptive_grad_clip(0.1, eps=0.01)
    >>> updates, state = clipper.update(grads, clipper.init(params), params)
    >>> updates.tolist(), state.norm.tolist()
    ([[0.0, 0.0010000000474974513], [0.5, 0.0]], [[2.0, 1.0]])
    """
    _arguments.policy(nonfinite)
    if per is not None and axis is not None:
        raise ValueError(f"axis={axis!r} and per={per!r} both say what a unit is: pass one of them")
    units = OptaxUnits(axis) if per is None else None
    groups = "unit" if units else per

    def norms(weights: Tree, all_reduce: AllReduce | None = None) -> Tree:
        if units is None:
            return gradclip.norms(weights, per=groups, all_reduce=all_reduce)
        return units.norms(gradclip.norms(units.laid(weights), per=groups, all_reduce=all_reduce), weights)

    def init(params: Tree) -> ClipState:
        return started(norms, params)

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, ClipState]:
        if params is None:
            raise ValueError(
                "adaptive_grad_clip holds updates against the norms of parameters, and got none: call "
                "update(updates, state, params)"
            )
        state, weights = state or init(params), stand_ins(params)
        laid = (updates, weights) if units is None else (units.laid(updates), units.laid(weights))
        clipped, norm = gradclip.clip_grad_agc(
            *laid, clipping, eps=eps, per=groups, nonfinite=nonfinite, all_reduce=all_reduce
        )
        if units is not None:
            clipped, norm = units.back(clipped, updates), units.norms(norm, updates)
        return clipped, followed(state, norm, _bounds(norms(weights, all_reduce), clipping, eps))

    return optax.GradientTransformation(init, update)


def _bounds(norms: Tree, clipping: Any, eps: Any) -> Tree:
    """The bounds of adaptive clipping, from the norms of parameters."""

    def one(clipping: Any, norms: Tree) -> Tree:
        return jax.tree.map(lambda x: jnp.asarray(clipping, x.dtype) * jnp.maximum(x, jnp.asarray(eps, x.dtype)), norms)

    return jax.tree.map(one, clipping, norms)

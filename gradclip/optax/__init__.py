"""optax's own names for clipping, with the norm in their state.

    from optax import clip_by_global_norm  ->  from gradclip.optax import clip_by_global_norm

Names, positions and defaults are optax's, gradclip's own options are keywords behind them. What comes out is clipped as
`gradclip.clip_grad_norm` does it: float16 and large numbers do not overflow, sums are wide, a bound of 0 gives zeros,
what is not finite is met by `nonfinite`, and leaves must be floating-point arrays.

**The state** is a `ClipState`: count, norm, bound, clipped. Wherever it stands in an optimizer's state, optax finds it:

>>> import jax.numpy as jnp, optax
>>> import gradclip.optax as clip
>>> optimizer = optax.chain(clip.clip_by_global_norm(1.0), optax.adam(1e-3))
>>> params = {"w": jnp.zeros(2)}
>>> state = optimizer.init(params)
>>> updates, state = optimizer.update({"w": jnp.array([3.0, 4.0])}, state, params)
>>> float(optax.tree_utils.tree_get(state, "norm"))
5.0

`tree_get` raises KeyError where a name is not unique: `count` is Adam's, too, and parameters may be called "norm". Then
``tree_get_all_with_path`` lists all of them, and ``filtering`` says whose is meant:

>>> ours = lambda path, value: getattr(path[-1], "tuple_name", "") == "ClipState"
>>> int(optax.tree_utils.tree_get(state, "count", filtering=ours))
1

Numbers stay on the device until somebody reads them: no step waits. ``update`` makes a new state of None and of
`optax.EmptyState`: to clip once, outside a loop, and to go on from a checkpoint that was made with optax's clip.

**inject_hyperparams** makes arrays of all numbers and schedules of all callables. `max_norm`, `threshold`,
`max_delta`, `clipping` and `eps` may be either. Other numbers and callables must be named as static where given:
``optax.inject_hyperparams(clip_by_global_norm, static_args=("norm_type", "per", "all_reduce"))``.

**Several devices**: under `jax.jit` over sharded arrays pass nothing. In `shard_map` and `pmap` pass
``all_reduce=gradclip.distributed.psum("axis")``; the state is then the same on all devices, ``out_specs=P()``.
"""

from __future__ import annotations

from typing import Any

import optax

import gradclip
from gradclip import _arguments
from gradclip._types import AllReduce, Nonfinite, NormType, Per, Tree
from gradclip.adaptive import Rule
from gradclip.optax._agc import adaptive_grad_clip
from gradclip.optax._examples import per_example_global_norm_clip, per_example_layer_norm_clip
from gradclip.optax._state import ClipState, as_before, followed, stand_ins, started

__all__ = [
    "ClipState",
    "adaptive_grad_clip",
    "clip",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "per_example_global_norm_clip",
    "per_example_layer_norm_clip",
]


def clip_by_global_norm(
    max_norm: Any,
    norm_type: NormType | None = None,
    *,
    per: Per = None,
    nonfinite: Nonfinite = "propagate",
    all_reduce: AllReduce | None = None,
) -> optax.GradientTransformation:
    r"""Scale updates down, each group by one factor, so that its norm is at most `max_norm`.

    .. math:: \mathrm{clip}(g) = g \text{ if } \|g\| \le c, \text{ else } (c / \|g\|)\, g

    with c = `max_norm` (Pascanu, Mikolov, Bengio, ICML 2013): `gradclip.clip_grad_norm` in place of
    `optax.clip_by_global_norm`.

    Parameters
    ----------
    max_norm : float, 0-d array, schedule, or rule of `gradclip.adaptive`
        c >= 0, in the units of the updates; with `per` also one for each group, as in `gradclip.clip_grad_norm`. A
        schedule is called with the count of updates before this one, 0 first.
    norm_type : float or "rms", static
        p of the norm, as in `gradclip.global_norm`. None is 2.0: a default that `optax.inject_hyperparams` leaves as it
        is.
    per : None, "leaf", "unit", Units, "example", tree of labels, or function, static
        Which elements share a norm, as in `gradclip.clip_grad_norm`.
    nonfinite : {"propagate", "zero", "error"}, static
        As in `gradclip.clip_grad_norm`. "error" needs `jax.experimental.checkify` under `jax.jit`.
    all_reduce : callable, optional
        As in `gradclip.global_norm`.

    Returns
    -------
    optax.GradientTransformation
        Its state is a `ClipState`. It does not look at `params`.

    Raises
    ------
    TypeError, ValueError
        For a bad `norm_type` or `nonfinite`, at once; for a bad bound, or a `per` that does not fit, by `update`.
    LeafError, NonFiniteError
        By `update`, as `gradclip.clip_grad_norm`.

    Notes
    -----
    `init` takes parameters in place of gradients: those that are not floating-point have none. `norm` keeps the dtype
    that it has there.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> clipper = clip_by_global_norm(optax.linear_schedule(2.0, 1.0, 10), per="leaf")
    >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}
    >>> updates, state = clipper.update(grads, clipper.init(grads))
    >>> updates["w"].tolist(), float(state.norm["w"]), float(state.bound["w"]), int(state.clipped["b"])
    ([1.2000000476837158, 1.600000023841858], 5.0, 2.0, 0)
    """
    try:
        p = _arguments.norm_type(2.0 if norm_type is None else norm_type)
    except TypeError as error:
        raise TypeError(f"{error}. Under optax.inject_hyperparams, static_args=('norm_type',) keeps it") from None
    _arguments.policy(nonfinite)
    rule = max_norm if isinstance(max_norm, Rule) else None

    def init(params: Tree) -> ClipState:
        likes = stand_ins(params)
        return started(
            lambda x: gradclip.norms(x, p, per=per), likes, None if rule is None else rule.init(likes, per=per)
        )

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, ClipState]:
        state = state or init(updates)
        if rule is not None:
            updates, norm, bound, own = rule.clip(
                updates, state.rule, p, per=per, nonfinite=nonfinite, all_reduce=all_reduce
            )
            return updates, followed(state, norm, bound, as_before(state.rule, own))
        bound = max_norm(state.count) if callable(max_norm) else max_norm
        updates, norm = gradclip.clip_grad_norm(updates, bound, p, per=per, nonfinite=nonfinite, all_reduce=all_reduce)
        return updates, followed(state, norm, bound)

    return optax.GradientTransformation(init, update)


def clip_by_block_rms(
    threshold: Any, *, nonfinite: Nonfinite = "propagate", all_reduce: AllReduce | None = None
) -> optax.GradientTransformation:
    r"""Scale each leaf down, so that the root mean square of its elements is at most `threshold`.

    .. math:: \mathrm{clip}(g) = g \min\Big(1, \frac{c}{\mathrm{rms}(g)}\Big), \quad
              \mathrm{rms}(g) = \sqrt{\mathrm{mean} |g|^2}

    with c = `threshold`: ``clip_by_global_norm(threshold, "rms", per="leaf")`` in place of `optax.clip_by_block_rms`.

    Parameters
    ----------
    threshold : float, 0-d array, schedule, rule, or tree of bounds
        c >= 0, in the units of the updates. As `max_norm` of `clip_by_global_norm`.
    nonfinite : {"propagate", "zero", "error"}, static
        As in `clip_by_global_norm`, for each leaf.
    all_reduce : callable, optional
        As in `clip_by_global_norm`.

    Returns
    -------
    optax.GradientTransformation
        Its state is a `ClipState`, of trees like the updates.

    Raises
    ------
    TypeError, ValueError, LeafError, NonFiniteError
        As `clip_by_global_norm`.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> updates, state = clip_by_block_rms(2.0).update([jnp.array([3.0, -3.0])], None)
    >>> updates[0].tolist(), float(state.norm[0])
    ([2.0, -2.0], 3.0)
    """
    return clip_by_global_norm(threshold, "rms", per="leaf", nonfinite=nonfinite, all_reduce=all_reduce)


def clip(max_delta: Any) -> optax.GradientTransformation:
    r"""Limit every element: ``min(max(g, -max_delta), max_delta)``.

    `gradclip.clip_grad_value` in place of `optax.clip`.

    Parameters
    ----------
    max_delta : bound, pair, or tree of bounds
        v >= 0, in the units of the updates; or what `gradclip.clip_grad_value` takes.

    Returns
    -------
    optax.GradientTransformation
        Its state is `optax.EmptyState`: there is no norm to know.

    Raises
    ------
    TypeError, ValueError, LeafError
        By `update`, as `gradclip.clip_grad_value`: complex leaves are refused.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> clip(1.0).update(jnp.array([-3.0, 0.5]), optax.EmptyState())[0].tolist()
    [-1.0, 0.5]
    """

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        return gradclip.clip_grad_value(updates, max_delta), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

"""Adaptive gradient clipping: the bound of a group is a part of the norm of its parameters."""

from __future__ import annotations

from typing import TypeVar

from gradclip._call import given, settled
from gradclip._decide import Bounds
from gradclip._libraries import compilable
from gradclip._types import AllReduce, Clipped, Nonfinite, NormType, Per, Scalar, Tree

T = TypeVar("T")


@compilable
def clip_grad_agc(
    grads: T,
    params: Tree,
    clipping: Scalar = 0.01,
    norm_type: NormType = 2.0,
    *,
    eps: Scalar = 1e-3,
    per: Per = "unit",
    nonfinite: Nonfinite = "propagate",
    all_reduce: AllReduce | None = None,
) -> Clipped[T]:
    r"""Scale the gradients of each unit down to a part of the norm of its parameters.

    .. math:: \mathrm{clip}(g_k) = g_k \min\Big(1, \lambda \frac{\max(\|w_k\|, \epsilon)}{\|g_k\|}\Big)

    for every group k of gradients g and parameters w, with :math:`\lambda` = `clipping`, :math:`\epsilon` = `eps`
    (adaptive gradient clipping: Brock, De, Smith, Simonyan, ICML 2021, equation 3). Nothing is written to.

    Parameters
    ----------
    grads : tree of arrays
        As in `global_norm`.
    params : tree of arrays
        The parameters: the same structure, arrays of the same shapes, of any of the dtypes. What stands beside a
        gradient of None is not looked at.
    clipping : float or 0-d array
        The largest ratio of a group's gradient to its parameters, >= 0: the paper takes 0.01 to 0.16. One for all
        groups, or one for each as `max_norm` of `clip_grad_norm`.
    norm_type : float or "rms", static
        As in `clip_grad_norm`, for gradients and parameters.
    eps : float or 0-d array
        The least norm of parameters that counts, > 0, so that parameters of zeros can learn.
    per : static
        As in `clip_grad_norm`. ``"unit"``: the last axis of leaves of 2 or more dimensions counts the units (JAX,
        Keras, Flax); ``gradclip.Units(0)`` for PyTorch's layouts. A smaller leaf, a bias, is one unit.
    nonfinite : {"propagate", "zero", "error"}, static
        As in `clip_grad_norm`, for gradients that are not finite. A NaN among parameters gives NaN to its group; an inf
        there clips nothing.
    all_reduce : callable, optional
        As in `global_norm`: partials of gradients and parameters join in one collective.

    Returns
    -------
    Clipped
        ``grads, norm = ...``, as `clip_grad_norm` gives it: `norm` holds the norms of the gradients.

    Raises
    ------
    ValueError
        If `params` has another structure, or an array of another shape, with the key path.
    LeafError, NonFiniteError, TypeError
        As `clip_grad_norm`.

    Notes
    -----
    As exact as `clip_grad_norm`: norms of parameters count as they are also where they are beyond their dtype. The
    paper leaves the last layer unclipped: do so by labels, or by clipping the rest of the tree. In JAX differentiable
    in `grads` and `params`. Never waits for the device, but for ``nonfinite="error"``.

    Examples
    --------
    >>> import numpy as np
    >>> params = {"w": np.array([[3.0, 0.0], [4.0, 0.0]])}  # units: columns, of norm 5 and 0
    >>> grads = {"w": np.array([[0.0, 1.0], [2.0, 0.0]])}
    >>> clipped, norm = clip_grad_agc(grads, params, clipping=0.1, eps=0.01)
    >>> clipped["w"], norm["w"]
    (array([[0.   , 0.001],
           [0.5  , 0.   ]]), array([[2., 1.]]))
    """
    call = given(grads, norm_type, per, Bounds(clipping, unit=eps), nonfinite, all_reduce, (params,), "clipping")
    with call.backend.session(call.leaves, in_place=False):
        verdict = settled(call)
        leaves = call.backend.scale(call.leaves, verdict.factors, call.groups, in_place=False)
        return Clipped(call.grouped.flat.rebuild(list(leaves)), call.grouped.norms(verdict.norms))

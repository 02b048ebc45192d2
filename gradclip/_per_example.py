"""The sum of clipped examples, as differentially private training needs it."""

from __future__ import annotations

from typing import TypeVar

from gradclip import _arguments
from gradclip._call import given, settled
from gradclip._decide import Bounds
from gradclip._dtypes import COMPONENT_BITS, dtype_name
from gradclip._libraries import compilable
from gradclip._types import AllReduce, ClippedSum, Nonfinite, NormType, Scalar

T = TypeVar("T")

#: By how much the bound is lowered: a norm is off by at most 1e-6 (1e-13) for 1e8 elements; bound, factor and product
#: are rounded once each.
_MARGIN_SINGLE, _MARGIN_DOUBLE = 2.0**-19, 2.0**-42


@compilable
def clipped_sum(
    grads: T,
    max_norm: Scalar,
    norm_type: NormType = 2.0,
    *,
    nonfinite: Nonfinite = "zero",
    all_reduce: AllReduce | None = None,
) -> ClippedSum[T]:
    r"""Return the sum over examples of their clipped gradients, without ever storing the clipped ones.

    .. math:: \sum_b g_b \min\Big(1, \frac{c}{\|g_b\|}\Big)

    with c = `max_norm`, for the gradients g_b of each example, all leaves together (Abadi et al., Deep Learning with
    Differential Privacy, CCS 2016, algorithm 1, before the noise).

    **What an example adds has a norm of at most `max_norm`**, in exact arithmetic: the bound that is clipped to is
    lower by a part in 2**19 (in 2**42 if all leaves have 64-bit components, and no shards join), more than all errors
    of the norm and of the factor together. So the sensitivity of the sum, by which noise is measured, is `max_norm`,
    and not a little more.

    Parameters
    ----------
    grads : tree of arrays
        Per-example gradients, as `jax.vmap` of `jax.grad` makes them: axis 0 of every leaf counts the examples, B.
    max_norm : float, 0-d array, or array of shape (B,)
        c >= 0, in the units of the gradients.
    norm_type : float or "rms", static
        p >= 1 of the norm.
    nonfinite : {"zero", "propagate", "error"}, static
        What an example with an inf or a NaN adds: zeros, NaN, or `NonFiniteError`.
    all_reduce : callable, optional
        Where each shard holds a part of every example's gradient (tensor parallel): the norms are joined, and each
        shard has the sum of its part. Where shards hold different examples, pass nothing, and add up the sums.

    Returns
    -------
    ClippedSum
        ``total, norm = ...``: the tree without the examples' axis, in float32, float64 for leaves with 64-bit
        components (complex likewise); and the norm of each example before clipping, of shape (B,). What is below the
        smallest normal number of its dtype is 0. The sum of a single example, rounding included, has a norm of at
        most c.

    Raises
    ------
    ValueError
        If the leaves differ in their number of examples, or one is 0-d, with key paths; if `norm_type` is less than 1.
    LeafError, NonFiniteError, TypeError
        As `clip_grad_norm`.

    Notes
    -----
    Two reads of the gradients. For the mean, divide by the expected batch size, not by B. Add the noise to the sum.

    Examples
    --------
    >>> import numpy as np
    >>> grads = {"w": np.array([[3.0, 4.0], [0.3, 0.4], [np.nan, 1.0]])}
    >>> total, norm = clipped_sum(grads, max_norm=1.0)
    >>> total["w"].round(6), norm
    (array([0.9, 1.2]), array([5. , 0.5, nan]))
    """
    p = _arguments.norm_type(norm_type)
    if isinstance(p, float) and p < 1:
        raise ValueError(f"clipped_sum takes a norm: norm_type must be at least 1, or 'rms', got {norm_type!r}")
    call = given(grads, norm_type, "example", Bounds(max_norm), nonfinite, all_reduce)
    # Other shards may hold narrower leaves: the norm, and the factor, are the same on all.
    single = all_reduce is not None or any(COMPONENT_BITS[dtype_name(x)] < 64 for x in call.leaves)
    call = call._replace(bounds=call.bounds._replace(unit=1 - (_MARGIN_SINGLE if single else _MARGIN_DOUBLE)))
    with call.backend.session(call.leaves, in_place=False):
        verdict = settled(call)
        total = call.backend.weighted_sum(call.leaves, verdict.factors, call.groups)
        return ClippedSum(call.grouped.flat.rebuild(list(total)), call.grouped.norms(verdict.norms))

"""optax's functions of per-example gradients. They are no transformations: what comes out has an axis less."""

from __future__ import annotations

import math
from typing import TypeVar

import jax
import jax.numpy as jnp

import gradclip
from gradclip._types import AllReduce, Array, Nonfinite, Scalar, Tree

T = TypeVar("T")


def per_example_global_norm_clip(
    grads: T, l2_norm_clip: Scalar, *, nonfinite: Nonfinite = "zero", all_reduce: AllReduce | None = None
) -> tuple[T, Array]:
    r"""Return the sum of clipped per-example gradients, and how many were clipped.

    .. math:: \sum_b g_b \min\Big(1, \frac{c}{\|g_b\|}\Big)

    with c = `l2_norm_clip` (Abadi et al., Deep Learning with Differential Privacy, CCS 2016): `gradclip.clipped_sum` in
    place of `optax.per_example_global_norm_clip`.

    Parameters
    ----------
    grads : tree of arrays
        Per-example gradients: axis 0 of every leaf counts the examples, B. Integers count as float32, as in optax.
    l2_norm_clip : float or 0-d array
        c >= 0, in the units of the gradients.
    nonfinite : {"zero", "propagate", "error"}, static
        What an example with an inf or a NaN adds: zeros, NaN (as in optax), or `NonFiniteError`.
    all_reduce : callable, optional
        As in `gradclip.clipped_sum`.

    Returns
    -------
    sum : tree of arrays
        `grads` without the examples' axis, in float32 at least. What an example adds has a norm of at most c.
    num_clipped : int32, 0-d
        How many norms were above c: inf is above every c but inf, NaN above none.

    Raises
    ------
    ValueError, TypeError, LeafError, NonFiniteError
        As `gradclip.clipped_sum`.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> total, clipped = per_example_global_norm_clip([jnp.array([[0.0, 0.5], [3.0, 4.0]])], 1.25)
    >>> total[0].round(4).tolist(), int(clipped)
    ([0.75, 1.5], 1)
    """

    def floating(x: Array) -> Array:
        return x.astype(jnp.float32) if jnp.issubdtype(jnp.result_type(x), jnp.integer) else x

    total, norm = gradclip.clipped_sum(
        jax.tree.map(floating, grads), l2_norm_clip, nonfinite=nonfinite, all_reduce=all_reduce
    )
    return total, jnp.sum(norm > jnp.asarray(l2_norm_clip, norm.dtype), dtype=jnp.int32)


def per_example_layer_norm_clip(
    grads: Tree, global_l2_norm_clip: Scalar, uniform: bool = True, *, nonfinite: Nonfinite = "zero"
) -> tuple[Tree, Tree]:
    r"""Clip each leaf of per-example gradients by itself, as parts of one bound; return the sums and counts.

    .. math:: c_i = c \sqrt{1 / K} \quad\text{or}\quad c_i = c \sqrt{D_i / D}

    for K leaves, leaf i of :math:`D_i` of the D elements of an example, c = `global_l2_norm_clip` (McMahan, Ramage,
    Talwar, Zhang, Learning Differentially Private Recurrent Language Models, ICLR 2018).

    Parameters
    ----------
    grads : tree of arrays
        As in `per_example_global_norm_clip`.
    global_l2_norm_clip : float or 0-d array
        c >= 0: what an example adds to all leaves together has a norm of at most c, but for the rounding of
        :math:`c_i`.
    uniform : bool
        Whether all leaves have the same bound, or one by their size.
    nonfinite : {"zero", "propagate", "error"}, static
        As in `per_example_global_norm_clip`, for each leaf.

    Returns
    -------
    sum, num_clipped : trees
        As `per_example_global_norm_clip` returns them for each leaf.

    Raises
    ------
    ValueError, TypeError, LeafError, NonFiniteError
        As `gradclip.clipped_sum`.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> total, clipped = per_example_layer_norm_clip([jnp.array([[3.0], [0.5]]), jnp.array([[-2.0], [0.0]])], 2.0**0.5)
    >>> [x.round(5).tolist() for x in total], [int(n) for n in clipped]
    ([[1.5], [-1.0]], [1, 1])
    """
    leaves, structure = jax.tree.flatten(grads)
    sizes = [math.prod(x.shape[1:]) for x in leaves]
    parts = [1 / len(leaves) if uniform else size / sum(sizes) for size in sizes]
    done = [
        per_example_global_norm_clip(x, global_l2_norm_clip * math.sqrt(part), nonfinite=nonfinite)
        for x, part in zip(leaves, parts, strict=True)
    ]
    return structure.unflatten([total for total, _ in done]), structure.unflatten([n for _, n in done])

"""The public verbs. A clip goes one way, and `clip_grad_norm` shows it:

    tree -> leaves, groups -> partials -> (other shards) -> norms -> decision -> leaves -> tree

`given` checks what came (`_leaves`, `_groups`, `_arguments`), `settled` lets a backend make the partials of a norm
(`_norms`), `_shards` join them with others, and `_decide` say what is to be done; then the backend scales the leaves.
"""

from __future__ import annotations

from typing import Any, TypeVar

from gradclip import _arguments
from gradclip._call import given, settled
from gradclip._decide import Bounds
from gradclip._leaves import refuse_unwritable
from gradclip._libraries import compilable
from gradclip._types import AllReduce, Array, Clipped, Nonfinite, NormType, Per, Scalar, Tree

T = TypeVar("T")


@compilable
def global_norm(grads: Tree, norm_type: NormType = 2.0, *, all_reduce: AllReduce | None = None) -> Array:
    r"""Return the p-norm of all leaves taken together as one vector.

    .. math:: \|g\|_p = \Big(\sum_i \sum_j |g_{ij}|^p\Big)^{1/p}

    Parameters
    ----------
    grads : tree of arrays
        Any nesting of lists, tuples, dicts, named tuples and JAX pytree classes; float16, bfloat16, float32, float64,
        complex64 or complex128 leaves of any shape. None counts as nothing.
    norm_type : float or "rms", static
        p: any real number, `inf` (largest magnitude), `-inf` (smallest), 0 (number of non-zero elements). "rms": the
        root mean square, sqrt(mean \|x\|^2).
    all_reduce : callable, optional
        Where gradients are sharded: ``all_reduce(partial, op)`` joins a small array with those of the other shards,
        element by element, by op "sum", "max" or "min". `gradclip.distributed` makes them.

    Returns
    -------
    0-d array
        float32, or float64 if any leaf has 64-bit components. inf or NaN if an element is; inf also where the norm of
        finite gradients is beyond that dtype.

    Raises
    ------
    LeafError
        For a leaf that is no dense floating-point or complex array, or arrays of libraries that cannot work together.
    TypeError, ValueError
        For a `norm_type` that is no real number, an `all_reduce` that is not callable or joins to another shape, a tree
        that contains itself or is nested too deeply. An iterator that gives nothing warns (UserWarning).

    Notes
    -----
    At most 4 units in the last place off up to 1e5 elements (8, or 4/\|p\|, for p other than 0, 1, 2, inf, -inf),
    without overflow or underflow on the way: sums are wide, or in bins for big, middle and small magnitudes (Blue, ACM
    TOMS 4, 1978; Anderson, ACM TOMS 44, 2017). Never waits for the device. In JAX differentiable, 0 at g = 0.

    Examples
    --------
    >>> import numpy as np
    >>> float(global_norm([np.float32([3e38]), {"b": np.float32([4e30])}]))
    3.0000000054977558e+38
    """
    return norms(grads, norm_type, per=None, all_reduce=all_reduce)


@compilable
def norms(grads: Tree, norm_type: NormType = 2.0, *, per: Per = "leaf", all_reduce: AllReduce | None = None) -> Any:
    r"""Return the p-norm of every group of elements, all in one pass.

    .. math:: \|g_k\|_p = \Big(\sum_{i \in k} |g_i|^p\Big)^{1/p} \text{ for every group } k

    Parameters
    ----------
    grads : tree of arrays
        As in `global_norm`.
    norm_type : float or "rms", static
        As in `global_norm`.
    per : None, "leaf", "unit", Units, "example", tree of labels, or function, static
        Which elements share a norm, as in `clip_grad_norm`.
    all_reduce : callable, optional
        As in `global_norm`. The groups must be the same on all shards.

    Returns
    -------
    tree of arrays, array, or dict
        ``per="leaf"``: the tree, a 0-d array for each leaf. Units: the tree, arrays that broadcast against the leaves:
        as long as the kept axis, and 1 elsewhere. ``"example"``: an array of shape (B,). Labels: a dict from label to
        0-d array. None: the global norm, 0-d. Each number is what `global_norm` gives of its group alone.

    Raises
    ------
    LeafError, TypeError, ValueError
        As `global_norm`, and for a `per` that does not fit the gradients.

    Notes
    -----
    As exact and as lazy as `global_norm`: one pass over the data, no wait for the device. The global norm beside them
    costs no second pass: it is the norm of the norms, ``global_norm(norms(grads))``, for p > 0 ("rms": only of groups
    of one size).

    Examples
    --------
    >>> import numpy as np
    >>> grads = {"w": np.array([3.0, 4.0]), "b": np.array([12.0])}
    >>> {name: float(norm) for name, norm in norms(grads).items()}
    {'w': 5.0, 'b': 12.0}
    >>> float(norms(grads, per={"w": "all", "b": "all"})["all"])
    13.0
    """
    call = given(grads, norm_type, per, None, "propagate", all_reduce)
    with call.backend.session(call.leaves, in_place=False):
        return call.grouped.norms(settled(call).norms)


@compilable
def clip_grad_norm(
    grads: T,
    max_norm: Scalar,
    norm_type: NormType = 2.0,
    *,
    per: Per = None,
    nonfinite: Nonfinite = "propagate",
    norm: Scalar | None = None,
    divide_by: Scalar | None = None,
    all_reduce: AllReduce | None = None,
) -> Clipped[T]:
    r"""Scale the gradients down, each group by one factor, so that its norm is at most `max_norm`.

    .. math:: \mathrm{clip}(g) = g \text{ if } \|g\| \le c, \text{ else } (c / \|g\|)\, g

    with c = `max_norm` (Pascanu, Mikolov, Bengio, ICML 2013), for all elements together or each group of `per` by
    itself. The inputs are never written to.

    Parameters
    ----------
    grads : tree of arrays
        As in `global_norm`.
    max_norm : float or 0-d array
        c >= 0, in the units of the gradients; inf clips nothing. One on a device or traced is not read by the host:
        there a negative one acts as 0, NaN gives NaN. With `per`: one for all groups, or a tree prefix (``"leaf"``,
        units: of arrays that broadcast to the norms), an array of shape (B,) (``"example"``) or a dict (labels) of
        them.
    norm_type : float or "rms", static
        As in `global_norm`.
    per : None, "leaf", "unit", Units, "example", tree of labels, or function, static
        Which elements share a norm. None: all. ``"leaf"``: those of each leaf. ``"unit"``: those of each index along
        the last axis of a leaf of 2 or more dimensions, `Units(axis)` along another; a smaller leaf is one group.
        ``"example"``: those of each index along axis 0, over all leaves. Labels (any hashable): those of the leaves
        that share one; they come as a tree prefix of `grads`, or by a function of a leaf's key path
        (``"grads['encoder'][3]"``) and the leaf. Label None: left alone, not counted.
    nonfinite : {"propagate", "zero", "error"}, static
        If an element is inf or NaN: its group all NaN, all zeros, or `NonFiniteError`. "error" lets the host wait for
        one number a group; under `jax.jit` it needs `jax.experimental.checkify`, under `torch.compile` it is refused.
    norm : float or 0-d array, optional
        The norm of these gradients (after `divide_by`), if known already, as it would come back. It is trusted.
    divide_by : float or 0-d array, optional
        Divide the gradients by this first (a loss scale, a count), at no extra pass. Positive and finite; one that is
        not, and that the host cannot see, gives NaN everywhere.
    all_reduce : callable, optional
        As in `global_norm`.

    Returns
    -------
    Clipped
        ``grads, norm = ...``: the same tree, dtypes and devices; the norm before clipping, after `divide_by`, in the
        form of `norms`. Where nothing is clipped, every leaf comes back bit for bit (NumPy: the very same array).

    Raises
    ------
    LeafError
        As `global_norm`.
    NonFiniteError
        If `nonfinite` asks for it: the leaves that are not finite, with key paths and counts.
    ValueError, TypeError
        For any other bad argument, before any work.

    Examples
    --------
    >>> import numpy as np
    >>> grads, norm = clip_grad_norm({"w": np.array([6.0, 8.0]), "b": None}, max_norm=5.0)
    >>> grads, float(norm)
    ({'w': array([3., 4.]), 'b': None}, 10.0)
    """
    call = given(grads, norm_type, per, Bounds(max_norm, norm, divide_by), nonfinite, all_reduce)
    with call.backend.session(call.leaves, in_place=False):
        verdict = settled(call)
        leaves = call.backend.scale(call.leaves, verdict.factors, call.groups, in_place=False)
        return Clipped(call.grouped.flat.rebuild(list(leaves)), call.grouped.norms(verdict.norms))


@compilable
def clip_grad_norm_(
    grads: Tree,
    max_norm: Scalar,
    norm_type: NormType = 2.0,
    error_if_nonfinite: bool = False,
    *,
    per: Per = None,
    nonfinite: Nonfinite = "propagate",
    norm: Scalar | None = None,
    divide_by: Scalar | None = None,
    all_reduce: AllReduce | None = None,
) -> Any:
    """Clip as `clip_grad_norm` does, in place; return the norm before clipping.

    The signature of `torch.nn.utils.clip_grad_norm_`, given gradients, for arrays that can be written to (NumPy, CuPy,
    torch). `gradclip.torch` has it for parameters. All other parameters are those of `clip_grad_norm`.

    Parameters
    ----------
    error_if_nonfinite : bool
        True is `nonfinite="error"`: then nothing has been written when `NonFiniteError` is raised.

    Raises
    ------
    LeafError
        As `clip_grad_norm`, and for a leaf that cannot be written to: a JAX array, a read-only NumPy array.
    NonFiniteError, ValueError, TypeError
        As `clip_grad_norm`, and if `error_if_nonfinite` contradicts `nonfinite`. Nothing has been written.

    Examples
    --------
    >>> import numpy as np
    >>> g = np.array([3.0, 4.0])
    >>> float(clip_grad_norm_([g], max_norm=1.0)), g
    (5.0, array([0.6, 0.8]))
    """
    if _arguments.flag("error_if_nonfinite", error_if_nonfinite):
        if nonfinite not in ("propagate", "error"):
            raise ValueError(f"error_if_nonfinite=True contradicts nonfinite={nonfinite!r}: pass one of them")
        nonfinite = "error"
    call = given(grads, norm_type, per, Bounds(max_norm, norm, divide_by), nonfinite, all_reduce)
    refuse_unwritable(call.grouped.flat, "clip_grad_norm")
    with call.backend.session(call.leaves, in_place=True):
        verdict = settled(call)
        call.backend.scale(call.leaves, verdict.factors, call.groups, in_place=True)
        return call.grouped.norms(verdict.norms)

"""The public verbs that limit every element by itself."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

from gradclip import _arguments
from gradclip._dispatch import active, kernels_for, refuse_complex, refuse_unwritable
from gradclip._kernels.generic import Kernels
from gradclip._tree import Rebuild
from gradclip._types import Leaf, Tree

T = TypeVar("T")


def clip_grad_value(grads: T, clip_value: Any) -> T:
    r"""Limit every gradient element: return ``min(max(g, lo), hi)``, element by element.

    Parameters
    ----------
    grads : tree of real arrays
        As in `global_norm`, complex leaves excepted.
    clip_value : bound, pair, or tree of bounds
        v >= 0 stands for [-v, v]; a tuple of two is (lo, hi) with lo <= hi. Each is a number, an array that
        broadcasts to the leaf, or a tree of these; a bound that stands where the gradients have a
        container holds for all leaves below. Checked where the host can see it.

    Returns
    -------
    tree
        Like `grads`. NaN elements stay NaN. Bounds are rounded to the leaf's dtype.

    Raises
    ------
    LeafError
        As in `global_norm`, and for complex leaves, which have no order.
    ValueError, TypeError
        For v < 0, lo > hi, NaN, or bounds whose tree or shape does not match. A bound on a device is not read:
        there NaN gives NaN, and a negative v or lo > hi what the formula says.

    Notes
    -----
    Never waits for the device. The derivative is 1 inside the bounds and 0 outside.
    PyTorch: `torch.nn.utils.clip_grad_value_`.

    Examples
    --------
    >>> import numpy as np
    >>> clip_grad_value({"w": np.array([-3.0, 0.5, 7.0])}, (-1.0, 2.0))
    {'w': array([-1. ,  0.5,  2. ])}
    """
    job = _prepare(grads, clip_value)
    return job.rebuild(_clamped(job))  # type: ignore[no-any-return]


def clip_grad_value_(grads: Tree, clip_value: Any) -> None:
    """Limit every gradient element as `clip_grad_value` does, in place.

    Parameters
    ----------
    grads, clip_value
        As in `clip_grad_value`, for arrays that can be written to (NumPy, CuPy, torch).

    Raises
    ------
    LeafError
        As in `clip_grad_value`, and for a leaf that cannot be written to. Nothing has been written then.

    Examples
    --------
    >>> import numpy as np
    >>> g = np.array([-3.0, 0.5, 7.0])
    >>> clip_grad_value_([g], 1.0); g
    array([-1. ,  0.5,  1. ])
    """
    job = _prepare(grads, clip_value)
    refuse_unwritable(job.leaves, job.kernels, "clip_grad_value")
    for leaf, new in zip(job.leaves, _clamped(job), strict=True):
        job.kernels.write(leaf.value, new)


class _Job(NamedTuple):
    """The leaves that hold gradients, each with its checked bounds, and the way back to the tree."""

    kernels: Kernels
    leaves: list[Leaf]
    pairs: list[tuple[Any, Any]]
    rebuild: Rebuild


def _prepare(grads: Tree, clip_value: Any) -> _Job:
    leaves, rebuild = active(grads)
    kernels_for(leaves)
    refuse_complex(leaves)
    pairs = _arguments.bounds(clip_value, rebuild([leaf.value for leaf in leaves]), leaves)
    return _Job(kernels_for(leaves, [bound for pair in pairs for bound in pair]), leaves, pairs, rebuild)


def _clamped(job: _Job) -> list[Any]:
    with job.kernels.quiet():
        return [
            job.kernels.clamped(job.kernels.adopt(leaf.value), low, high)
            for leaf, (low, high) in zip(job.leaves, job.pairs, strict=True)
        ]

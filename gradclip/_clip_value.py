"""The public verbs that limit every element by itself."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

from gradclip import _arguments
from gradclip._backends.generic import Backend
from gradclip._leaves import active, backend_for, refuse_complex, refuse_unwritable
from gradclip._tree import Flat
from gradclip._types import Tree

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
    with job.backend.session(job.flat.values, in_place=False):
        return job.flat.rebuild(_clamped(job))  # type: ignore[no-any-return]


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
    refuse_unwritable(job.flat, "clip_grad_value")
    with job.backend.session(job.flat.values, in_place=True):
        for leaf, new in zip(job.flat.values, _clamped(job), strict=True):
            leaf[...] = new


class _Job(NamedTuple):
    """The leaves that hold gradients, each with its checked bounds."""

    backend: Backend
    flat: Flat
    pairs: list[tuple[Any, Any]]


def _prepare(grads: Tree, clip_value: Any) -> _Job:
    flat = active(grads)
    backend_for(flat)
    refuse_complex(flat)
    pairs = _arguments.bounds(clip_value, flat)
    return _Job(backend_for(flat, [bound for pair in pairs for bound in pair]), flat, pairs)


def _clamped(job: _Job) -> list[Any]:
    leaves = zip(job.backend.adopt(job.flat.values), job.pairs, strict=True)
    return [job.backend.clamp(leaf, low, high) for leaf, (low, high) in leaves]

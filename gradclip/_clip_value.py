"""The public verbs that limit every element by itself."""

from __future__ import annotations

from typing import Any, TypeVar

from gradclip import _arguments
from gradclip._leaves import active, backend_for, refuse_complex, refuse_unwritable
from gradclip._libraries import compilable
from gradclip._types import Tree

T = TypeVar("T")


@compilable
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
    return _clipped(grads, clip_value, in_place=False)  # type: ignore[no-any-return]


@compilable
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
    _clipped(grads, clip_value, in_place=True)


def _clipped(grads: Tree, clip_value: Any, in_place: bool) -> Tree:
    flat = active(grads)
    backend_for(flat)
    refuse_complex(flat)
    pairs = _arguments.bounds(clip_value, flat)
    beside = [bound for pair in pairs for bound in pair]
    backend = backend_for(flat, beside)
    if in_place:
        refuse_unwritable(flat, "clip_grad_value")
    backend, leaves = backend.adopt(flat.values, beside)
    with backend.session(leaves, in_place):
        clamped = backend.clamp(leaves, pairs, in_place)
        return None if in_place else flat.rebuild(list(clamped))

r"""PyTorch's own names and signatures, given parameters: one import changes, and no call::

    from torch.nn.utils import clip_grad_norm_  ->  from gradclip.torch import clip_grad_norm_

Positions and defaults are PyTorch's, gradclip's own options are keywords behind them. What PyTorch does otherwise: it
adds 1e-6 to the norm, counts leaves where p = 0, and leaves 0 beside NaN where an element is inf. `foreach` is accepted
and chooses nothing: gradclip has one way on each device. Nothing is recorded by autograd.

**Parameters** come as an iterable of tensors or as one tensor. Those without a `.grad` are left out, and keep their
place: errors call the gradient of the fourth parameter ``grads[3]`` (its name is the fourth of those that
`model.named_parameters()` gives), norms and bounds by leaf are lists in the order of the parameters, and so are the
labels of `per`. What has no gradients to clip is refused: modules, dicts, key-value pairs, and a list in which no
tensor is a `torch.nn.Parameter`, has a gradient or requires one: those are values of weights (of a `state_dict()`), or
gradients themselves. A frozen model is none of these: its norm is 0.

**GradScaler**: call ``scaler.unscale_(optimizer)`` first, as with PyTorch's, and pass nothing for it. `divide_by` is
for a loss scale of your own: gradients come out divided by it, and `scaler.step` would divide them again.

**Several ranks**: DDP has averaged the gradients already, and FSDP2's are DTensors, which know their mesh: pass
nothing. Of DTensors each rank measures and scales its own parts, one collective for each axis of the mesh that shards
joins the norm of the whole, and the norm is a DTensor, as PyTorch's is: `norm.full_tensor()`. (Not of units and
examples: these are left to torch, which refuses axes that are not divided evenly.) FSDP1's are plain tensors, each
rank's part: join them by `all_reduce`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from gradclip import _arguments, _clip, _clip_value
from gradclip._call import given, settled
from gradclip._groups import Units
from gradclip._types import AllReduce, Nonfinite, NormType, Per, Scalar
from gradclip.torch._parameters import each, gradients

__all__ = ["clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm"]


def clip_grad_norm_(
    parameters: Iterable[torch.Tensor] | torch.Tensor,
    max_norm: Scalar,
    norm_type: NormType = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    per: Per = None,
    nonfinite: Nonfinite = "propagate",
    norm: Scalar | None = None,
    divide_by: Scalar | None = None,
    all_reduce: AllReduce | None = None,
) -> Any:
    r"""Scale the gradients of parameters down in place, so that their norm is at most `max_norm`; return the norm.

    .. math:: g \leftarrow g \text{ if } \|g\| \le c, \text{ else } (c / \|g\|)\, g

    with c = `max_norm` and g all gradients as one vector: `torch.nn.utils.clip_grad_norm_`, done by
    `gradclip.clip_grad_norm_`.

    Parameters
    ----------
    parameters : iterable of tensors, or tensor
        Those whose `.grad` is clipped, of any dtypes and devices; `model.parameters()`.
    max_norm : float or 0-d tensor
        c >= 0. A tensor on another device than the CPU is not read by the host.
    error_if_nonfinite : bool
        True: raise `NonFiniteError`, which is a RuntimeError, if an element is inf or NaN. Nothing is written then.
    foreach : bool or None
        Of no effect.
    norm_type, per, nonfinite, norm, divide_by, all_reduce
        As in `gradclip.clip_grad_norm`. ``per=gradclip.Units(0)`` are the output units of PyTorch's layouts.

    Returns
    -------
    0-d tensor
        The norm before clipping, on the device of the first gradient; ``tensor(0.)`` if there is none; of DTensors a
        DTensor. With `per`: in the form of `gradclip.norms`, lists being in the order of the parameters.

    Raises
    ------
    LeafError
        For what is no parameter (above), and for gradients that cannot be clipped, sparse ones for example.
    NonFiniteError, ValueError, TypeError
        As `gradclip.clip_grad_norm_`. An iterator that gives nothing warns (UserWarning).

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> model(torch.tensor([3.0, 4.0])).backward()
    >>> clip_grad_norm_(model.parameters(), max_norm=1.0), model.weight.grad
    (tensor(5.), tensor([[0.6000, 0.8000]]))
    """
    _checked(foreach)
    with torch.no_grad():
        grads, mesh = _parts(gradients(parameters), per, all_reduce)
        if mesh is not None:
            max_norm, norm, divide_by, all_reduce = *map(mesh.whole, (max_norm, norm, divide_by)), mesh
        found = _clip.clip_grad_norm_(
            grads,
            max_norm,
            norm_type,
            error_if_nonfinite,
            per=per,
            nonfinite=nonfinite,
            norm=norm,
            divide_by=divide_by,
            all_reduce=all_reduce,
        )
        return _given_back(found, mesh)


def clip_grad_value_(
    parameters: Iterable[torch.Tensor] | torch.Tensor, clip_value: Any, foreach: bool | None = None
) -> None:
    r"""Limit every element of the gradients of parameters, in place.

    .. math:: g_i \leftarrow \min(\max(g_i, lo), hi)

    This is `torch.nn.utils.clip_grad_value_`, done by `gradclip.clip_grad_value_`.

    Parameters
    ----------
    parameters, foreach
        As in `clip_grad_norm_`; the gradients must be real.
    clip_value : bound, pair, or list of bounds
        v >= 0 stands for [-v, v], a tuple of two for [lo, hi]; tensors broadcast to the gradient. A list has an entry
        for each parameter.

    Raises
    ------
    LeafError, ValueError, TypeError
        As `clip_grad_norm_` and `gradclip.clip_grad_value_`. Nothing has been written then.

    Examples
    --------
    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(3))
    >>> (weight * torch.tensor([-3.0, 0.5, 7.0])).sum().backward()
    >>> clip_grad_value_(weight, 1.0); weight.grad
    tensor([-1.0000,  0.5000,  1.0000])
    """
    _checked(foreach)
    with torch.no_grad():
        _clip_value.clip_grad_value_(gradients(parameters), clip_value)


def get_total_norm(
    tensors: Iterable[torch.Tensor] | torch.Tensor,
    norm_type: NormType = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    all_reduce: AllReduce | None = None,
) -> Any:
    r"""Return the norm of tensors, gradients for example, taken together as one vector.

    .. math:: \|g\|_p = \Big(\sum_i |g_i|^p\Big)^{1/p}

    This is `torch.nn.utils.get_total_norm`, done as `gradclip.global_norm` does it.

    Parameters
    ----------
    tensors : iterable of tensors, or tensor
        The tensors themselves, not their `.grad`: of gradients ``[p.grad for p in model.parameters()]``, where None
        counts as nothing. Of parameters it is the norm of the weights.
    norm_type, error_if_nonfinite, foreach, all_reduce
        As in `clip_grad_norm_`.

    Returns
    -------
    0-d tensor
        On the device of the first tensor; ``tensor(0.)`` if there is none.

    Raises
    ------
    LeafError
        For what is no iterable of tensors, and for tensors that are not dense, floating-point or complex.
    NonFiniteError, ValueError, TypeError
        As `gradclip.global_norm`, and if `error_if_nonfinite` asks for it. An iterator that gives nothing warns.

    Examples
    --------
    >>> import torch
    >>> get_total_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
    tensor(5.)
    """
    _checked(foreach)
    policy: Nonfinite = "error" if _arguments.flag("error_if_nonfinite", error_if_nonfinite) else "propagate"
    with torch.no_grad():
        values, mesh = _parts([None if x is None else x.detach() for x in each(tensors, "tensors")], None, all_reduce)
        if policy == "propagate":
            return _given_back(_clip.global_norm(values, norm_type, all_reduce=mesh or all_reduce), mesh)
        call = given(values, norm_type, None, None, policy, mesh or all_reduce)
        with call.backend.session(call.leaves, in_place=False):
            return _given_back(call.grouped.norms(settled(call).norms), mesh)


def clip_grads_with_norm_(
    parameters: Iterable[torch.Tensor] | torch.Tensor,
    max_norm: Scalar,
    total_norm: Scalar,
    foreach: bool | None = None,
    *,
    per: Per = None,
    nonfinite: Nonfinite = "propagate",
    divide_by: Scalar | None = None,
) -> None:
    r"""Scale the gradients of parameters down in place, by a norm that is known.

    .. math:: g \leftarrow g \text{ if } n \le c, \text{ else } (c / n)\, g

    with c = `max_norm` and n = `total_norm`. This is `torch.nn.utils.clip_grads_with_norm_`.

    Parameters
    ----------
    parameters, max_norm, foreach
        As in `clip_grad_norm_`.
    total_norm : float or 0-d tensor
        What `get_total_norm` gave, of these gradients and of any others. It is trusted; with `divide_by` it is that
        after the division.
    per, nonfinite, divide_by
        As in `gradclip.clip_grad_norm`: with `per`, norms in the form in which `clip_grad_norm_` returns them. A
        norm that is not finite is what `nonfinite` decides about.

    Raises
    ------
    LeafError, NonFiniteError, ValueError, TypeError
        As `clip_grad_norm_`. Nothing has been written then.

    Examples
    --------
    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> (weight * torch.tensor([3.0, 4.0])).sum().backward()
    >>> clip_grads_with_norm_(weight, 1.0, get_total_norm(weight.grad)); weight.grad
    tensor([0.6000, 0.8000])
    """
    if total_norm is None:
        raise TypeError("total_norm must be a number or a 0-d tensor, got None: get_total_norm gives it")
    clip_grad_norm_(
        parameters, max_norm, foreach=foreach, per=per, nonfinite=nonfinite, norm=total_norm, divide_by=divide_by
    )


def _checked(foreach: Any) -> None:
    if foreach is not None:
        _arguments.flag("foreach", foreach)


def _parts(tensors: list[Any], per: Per, all_reduce: AllReduce | None) -> tuple[list[Any], Any]:
    """Of DTensors this rank's parts, and their mesh, which joins them; all else as it is, and None.

    Units and examples are groups along an axis, which may itself be sharded.
    """
    along_axis = per in ("unit", "example") if isinstance(per, str) else isinstance(per, Units)
    if all_reduce is not None or along_axis or not any(hasattr(x, "to_local") for x in tensors):
        return tensors, None
    from gradclip.torch._dtensors import parts

    return parts(tensors)


def _given_back(norm: Any, mesh: Any) -> Any:
    """A norm as torch gives it. gradclip gives that of no gradients as NumPy's."""
    if mesh is not None:
        return mesh.back(norm)
    return norm if isinstance(norm, _GIVEN) else torch.as_tensor(norm)


_GIVEN = (torch.Tensor, list, dict)  # a tuple: `torch.compile` does not follow every union of types

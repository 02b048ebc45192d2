r"""PyTorch's own names and signatures, given parameters: one import changes, and no call.

    from torch.nn.utils import clip_grad_norm_  ->  from gradclip.torch import clip_grad_norm_

Positions and defaults are PyTorch's, gradclip's own options are keywords behind them. What PyTorch does otherwise: it
adds 1e-6 to the norm, counts leaves where p = 0, and leaves 0 beside NaN where an element is inf. `foreach` is accepted
and chooses nothing: gradclip has one way on each device. Nothing is recorded by autograd.

**Parameters** come as an iterable of tensors or as one tensor. Those without a `.grad` are left out, and keep their
place: errors call the gradient of the fourth parameter ``grads[3]``, norms and bounds by leaf are lists in the order of
the parameters, and so are the labels of `per`. What has no gradients to clip is refused: modules, dicts, key-value
pairs, and a list in which no tensor is a `torch.nn.Parameter`, has a gradient or requires one: those are values of
weights (of a `state_dict()`), or gradients themselves. A frozen model is none of these: its norm is 0.

**GradScaler**: call ``scaler.unscale_(optimizer)`` first, as with PyTorch's, and pass nothing for it. `divide_by` is
for a loss scale of your own: gradients come out divided by it, and `scaler.step` would divide them again. **DDP** has
averaged the gradients already: pass nothing for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from gradclip import _arguments, _clip, _clip_value
from gradclip._call import given, settled
from gradclip._errors import LeafError, warn
from gradclip._types import AllReduce, Nonfinite, NormType, Per, Scalar

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
        The norm before clipping, on the device of the first gradient; ``tensor(0.)`` if there is none. With `per`: in
        the form of `gradclip.norms`, lists being in the order of the parameters.

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
        found = _clip.clip_grad_norm_(
            _gradients(parameters),
            max_norm,
            norm_type,
            error_if_nonfinite,
            per=per,
            nonfinite=nonfinite,
            norm=norm,
            divide_by=divide_by,
            all_reduce=all_reduce,
        )
    return _tensor(found)


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
        _clip_value.clip_grad_value_(_gradients(parameters), clip_value)


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
        values = [None if x is None else x.detach() for x in _each(tensors, "tensors")]
        call = given(values, norm_type, None, None, policy, all_reduce)
        with call.backend.session(call.leaves, in_place=False):
            return _tensor(call.grouped.norms(settled(call).norms))


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
    _checked(foreach)
    with torch.no_grad():
        _clip.clip_grad_norm_(
            _gradients(parameters), max_norm, per=per, nonfinite=nonfinite, norm=total_norm, divide_by=divide_by
        )


#: What to pass, where something else came.
_REPAIR = {
    "parameters": "pass the parameters, for example model.parameters(); the tensors of a state_dict() have no .grad",
    "tensors": "pass tensors, for example [p.grad for p in model.parameters()]",
}


def _checked(foreach: Any) -> None:
    if foreach is not None:
        _arguments.flag("foreach", foreach)


def _tensor(norm: Any) -> Any:
    """A norm as it came; that of no gradients, which gradclip gives as NumPy's, as a tensor."""
    return norm if isinstance(norm, torch.Tensor | list | dict) else torch.as_tensor(norm)


def _gradients(parameters: Any) -> list[Any]:
    """The gradients of parameters, None where there is none. Raises LeafError unless one of them may have one."""
    found = _each(parameters, "parameters")
    if any(x is not None for x in found) and not any(map(_may_have_gradient, found)):
        raise LeafError(
            "parameters are tensors of which none is a torch Parameter, has a gradient or requires one, so nothing "
            f"would be clipped: {_REPAIR['parameters']}. If these are the gradients themselves: "
            "gradclip.clip_grad_norm_ and gradclip.clip_grad_value_ take them"
        )
    return [None if x is None else x.grad for x in found]


def _may_have_gradient(x: torch.Tensor | None) -> bool:
    if x is None or isinstance(x, torch.nn.Parameter):
        return x is not None
    return x.requires_grad or x.grad is not None if x.is_leaf else x.retains_grad  # else torch warns of .grad


def _each(tensors: Any, name: str) -> list[Any]:
    """The tensors of an iterable, or of one tensor, which may be None. Raises LeafError for anything else."""
    if isinstance(tensors, torch.Tensor):
        return [tensors]
    is_module = isinstance(tensors, torch.nn.Module) and not isinstance(tensors, torch.nn.ParameterList)
    if is_module or isinstance(tensors, Mapping | str) or not isinstance(tensors, Iterable):
        raise LeafError(f"{name} is {_described(tensors)}: {_REPAIR[name]}")
    found = list(tensors)
    if not found and isinstance(tensors, Iterator):
        warn(f"gradclip was given an iterator of {name} that gives nothing, and does nothing: was it read before?")
    for i, x in enumerate(found):
        if x is not None and not isinstance(x, torch.Tensor):
            raise LeafError(f"{name}[{i}] is {_described(x)}: {_REPAIR[name]}")
    return found


def _described(x: Any) -> str:
    """What stands where a tensor is wanted."""
    kind = f"{type(x).__module__}.{type(x).__qualname__}"
    if isinstance(x, torch.nn.Module):
        return f"a module ({kind})"
    if isinstance(x, Mapping) and "params" in x:
        return "a parameter group of an optimizer, whose parameters are its ['params']"
    if isinstance(x, Mapping):
        return f"a mapping ({kind})"
    if isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], str):
        return f"a pair of a name ({x[0]!r}) and a value, as of named_parameters()"
    return f"a {kind}, and no tensor"

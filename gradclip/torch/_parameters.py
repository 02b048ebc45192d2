"""What comes for parameters: their gradients, or why it has none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from gradclip._errors import LeafError, warn

#: What to pass, where something else came.
_REPAIR = {
    "parameters": "pass the parameters, for example model.parameters(); the tensors of a state_dict() have no .grad",
    "tensors": "pass tensors, for example [p.grad for p in model.parameters()]",
}

#: What is iterable, and no iterable of tensors. A tuple: `torch.compile` does not follow every union of types.
_NO_ITERABLES = (Mapping, str)


def gradients(parameters: Any) -> list[Any]:
    """The gradients of parameters, None where there is none. Raises LeafError unless one of them may have one."""
    found = each(parameters, "parameters")
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


def each(tensors: Any, name: str) -> list[Any]:
    """The tensors of an iterable, or of one tensor, which may be None. Raises LeafError for anything else."""
    if isinstance(tensors, torch.Tensor):
        return [tensors]
    is_module = isinstance(tensors, torch.nn.Module) and not isinstance(tensors, torch.nn.ParameterList)
    if is_module or isinstance(tensors, _NO_ITERABLES) or not isinstance(tensors, Iterable):
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

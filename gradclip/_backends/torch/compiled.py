"""The verbs inside `torch.compile(fullgraph=True)`: a call is one operation of the graph that Dynamo makes.

Dynamo follows what stands above `run`: trees are taken apart, and built again. `run` it does not open: there the verb
itself runs, once, with tensors that stand for those of later runs.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Hashable, Iterator, KeysView, Sequence, ValuesView
from functools import lru_cache
from typing import Any, TypeAlias

import torch

from gradclip._groups import Units
from gradclip._types import VERBS, Clipped, ClippedSum

Form: TypeAlias = Any
"""A tree as constants that a graph can hold: ("tensor", its number), ("list", forms), ...; a constant is itself."""

# Tuples, for Dynamo does not follow all unions of types.
_CONSTANTS = (bool, int, float, str)
_CONTAINERS = (dict, list, tuple)
_ITERATORS = (Iterator, KeysView, ValuesView)
_WHOLE = (str, Units)

_NO_SHARDS = "shards cannot join in a program of torch.compile: clip outside of it, or join the norms and pass norm="
_NO_MATCH = "the tree of labels does not match the gradients: in a program of torch.compile it has their containers"


class Forms:
    """Trees taken apart: their tensors in order, and the classes that their forms cannot hold."""

    def __init__(self) -> None:
        self.tensors: list[Any] = []
        self.classes: list[Any] = []

    def of(self, x: Any) -> Form:
        if isinstance(x, torch.Tensor):
            self.tensors.append(x)
            return "tensor", len(self.tensors) - 1
        if x is None or isinstance(x, _CONSTANTS):
            return x
        if isinstance(x, Units):
            return "units", x.axis
        if isinstance(x, Clipped):
            return "clipped", None
        if isinstance(x, dict):
            self.classes.append(x)
            return "dict", len(self.classes) - 1, tuple(x.keys()), tuple([self.of(child) for child in x.values()])
        if isinstance(x, tuple) and hasattr(x, "_fields"):
            self.classes.append(type(x))
            return "named", len(self.classes) - 1, tuple(type(x)._fields), tuple([self.of(child) for child in x])
        if isinstance(x, tuple):
            return "tuple", tuple([self.of(child) for child in x])
        if isinstance(x, list):
            return "list", tuple([self.of(child) for child in x])
        if isinstance(x, _ITERATORS):
            return "list", tuple([self.of(child) for child in x])
        return "refused", f"an object of type {type(x).__name__}, which a program of torch.compile cannot be given"

    def tree(self, form: Form, leaves: Sequence[Any]) -> Any:
        """The tree of that form, with these at its tensors' places."""
        if not isinstance(form, tuple):
            return form
        sort = form[0]
        if sort == "tensor":
            return leaves[form[1]]
        children = [self.tree(child, leaves) for child in form[-1]]
        if sort == "named":
            return self.classes[form[1]](*children)
        if sort == "dict":
            like = self.classes[form[1]]
            if isinstance(like, OrderedDict):
                return OrderedDict(zip(form[2], children, strict=True))
            out = dict(zip(form[2], children, strict=True))
            return defaultdict(like.default_factory, out) if isinstance(like, defaultdict) else out
        return tuple(children) if sort == "tuple" else children


def call(name: str, parameters: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The verb of that name, with these parameters, as a program that is being traced calls it."""
    given = {parameters[i] if i < len(parameters) else f"argument_{i}": x for i, x in enumerate(args)}
    given.update(kwargs)
    refused: Any = None
    if given.pop("all_reduce", None) is not None:
        refused = "all_reduce", ("refused", _NO_SHARDS)
    if given.pop("error_if_nonfinite", False):
        given["nonfinite"] = "error"
    forms = Forms()
    grads = forms.of(given.pop("grads", None))
    leaves = list(forms.tensors)
    per = given.get("per", {"norms": "leaf", "clip_grad_agc": "unit"}.get(name))
    labels = None
    if per is None or isinstance(per, _WHOLE):
        pass
    elif isinstance(per, _CONTAINERS):
        labels = _spread(forms.of(per), grads)
        if labels is None:
            given["per"] = None
            refused = "per", ("refused", _NO_MATCH)
    else:
        labels = [per(path, leaf) for path, leaf in zip(_paths(grads, "grads"), leaves, strict=True)]
    if labels is not None:
        names = _named(labels)
        given["per"] = forms.tree(grads, [None if label is None else names[label] for label in labels])
        for key in ("max_norm", "norm", "clipping"):
            value = given.get(key)
            if isinstance(value, dict):
                given[key] = {names.get(label, label): bound for label, bound in value.items()}
    others = [(key, forms.of(value)) for key, value in given.items()]
    if refused:
        others += [refused]
    out = list(run(name.removesuffix("_"), grads, tuple(others), *forms.tensors))
    if name in ("norms", "global_norm"):
        changed, measured = [], out
    else:
        changed, measured = out[: len(leaves)], out[len(leaves) :]
    if name.endswith("_"):
        for leaf, new, label in zip(leaves, changed, labels or leaves, strict=True):
            if label is not None:
                leaf.copy_(new)
    if name in ("clip_grad_value", "clip_grad_value_"):
        return None if name.endswith("_") else forms.tree(grads, changed)
    norm: Any
    if labels is not None:
        norm = dict(zip(_named(labels), measured, strict=True))
    elif isinstance(per, Units) or per in ("leaf", "unit"):
        norm = forms.tree(grads, measured)
    else:
        norm = measured[0]
    if name in ("norms", "global_norm", "clip_grad_norm_"):
        return norm
    return (ClippedSum if name == "clipped_sum" else Clipped)(forms.tree(grads, changed), norm)


def _named(labels: Sequence[Hashable]) -> dict[Hashable, str]:
    """The labels in order, each with a name that a graph can hold."""
    names: dict[Hashable, str] = {}
    for label in labels:
        if label is not None and label not in names:
            names[label] = label if isinstance(label, str) else f"label {len(names)}"
    return names


def _paths(form: Form, path: str) -> list[str]:
    """The key paths of the tensors."""
    if not isinstance(form, tuple):
        return []
    if form[0] == "tensor":
        return [path]
    found = []
    for i, child in enumerate(form[-1]):
        key = f"[{form[2][i]!r}]" if form[0] == "dict" else f".{form[2][i]}" if form[0] == "named" else f"[{i}]"
        found += _paths(child, path + key)
    return found


def _spread(labels: Form, form: Form) -> list[Any] | None:
    """The label of every tensor; None where the two trees part."""
    if not isinstance(form, tuple):
        return []
    if form[0] == "tensor":
        return None if isinstance(labels, tuple) else [labels]
    found: list[Any] = []
    inner = isinstance(labels, tuple)
    if inner and (_sort(labels) != _sort(form) or len(labels[-1]) != len(form[-1])):
        return None
    for i, child in enumerate(form[-1]):
        below = labels
        if inner and form[0] == "dict":
            if form[2][i] not in labels[2]:
                return None
            below = labels[-1][labels[2].index(form[2][i])]
        elif inner:
            below = labels[-1][i]
        more = _spread(below, child)
        if more is None:
            return None
        found += more
    return found


def _sort(form: Form) -> Any:
    """What two containers must have in common, beside their number of children."""
    return form[2] if form[0] == "named" else form[0] == "dict"


def _run(name: str, grads: Form, others: tuple[tuple[str, Form], ...], *tensors: Any) -> tuple[Any, ...]:
    """What a functional verb returns, as a row of tensors. Not traced by Dynamo, but run."""
    arguments = dict(others)
    per = arguments.get("per", "unit" if name == "clip_grad_agc" else None)
    if name == "clipped_sum" or isinstance(per, tuple) or per in ("unit", "example"):
        tensors = tuple(_known(x) for x in tensors)  # the number of groups is part of a program
    given = {key: _given(form, tensors, key) for key, form in others}
    return tuple(_tensors(VERBS[name](_given(grads, tensors), **given)))


run = torch.compiler.allow_in_graph(_run)


def _known(x: Any) -> Any:
    """A tensor whose lengths are numbers: the program is one for these."""
    return x if all(isinstance(n, int) for n in x.shape) else x.expand([int(n) for n in x.shape])


def _given(form: Form, tensors: Sequence[Any], key: str = "") -> Any:
    """What has that form, in containers as plain as it goes: what is made of it is taken apart again."""
    if isinstance(form, torch.SymFloat | torch.SymInt):
        # A product: of these, and not of `scalar_tensor`, torch knows how not to compile anew for another number.
        return float(form) if key == "norm_type" else torch.ones((), dtype=torch.float64) * form
    if not isinstance(form, tuple):
        return form
    sort, last = form[0], form[-1]
    if sort == "tensor":
        return tensors[last]
    if sort == "units":
        return Units(last)
    if sort == "clipped":
        return Clipped(None, None)
    if sort == "refused":
        raise TypeError(f"{key or 'grads'}: {last}")
    children = [_given(child, tensors, key) for child in last]
    if sort == "dict":
        return dict(zip(form[2], children, strict=True))
    if sort == "named":
        return _named_tuple(form[2])(*children)
    return tuple(children) if sort == "tuple" else children


@lru_cache
def _named_tuple(fields: tuple[str, ...]) -> Any:
    return namedtuple("Named", fields, rename=True)


def _tensors(x: Any) -> list[Any]:
    """The tensors of a tree, in order."""
    if isinstance(x, torch.Tensor):
        return [x]
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, list | tuple):
        return [tensor for child in x for tensor in _tensors(child)]
    return [] if x is None else [torch.as_tensor(x)]

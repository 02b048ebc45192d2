"""Which leaves can be clipped, and by which backend: the gate that a leaf must pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import array_api_compat

from gradclip._backends.generic import Backend
from gradclip._dtypes import COMPONENT_BITS, dtype_name
from gradclip._errors import LeafError
from gradclip._libraries import (
    LIBRARIES,
    backend_of,
    can_join,
    detached,
    immutable,
    is_nothing,
    lacking,
    library,
    unsuitable,
)
from gradclip._tree import Flat, flatten
from gradclip._types import Array, Clipped, Leaf, Tree

#: Types and dtypes of leaves that were found to be good, and whose they are. For speed.
_admitted: dict[tuple[type, Any], str] = {}


def active(grads: Tree) -> Flat:
    """The leaves of a tree that hold gradients; JAX's float0 leaves stay where they are."""
    flat = flatten(grads)
    for i in flat.samples:
        if is_nothing(flat.values[i]):
            return flat.only([i for i, x in enumerate(flat.values) if not is_nothing(x)])
    return flat


def parameters(params: Tree, flat: Flat) -> list[Leaf]:
    """The parameters of the gradients in `flat`: a tree like theirs, an array of the same shape for each.

    Raises ValueError where they do not fit.
    """
    found = [Leaf(path, detached(x)) for path, x in flat.spread(params, "params")]
    for (path, param), here, x in zip(found, flat.paths(), flat.values, strict=True):
        if path != "params" + here.removeprefix("grads"):
            raise ValueError(f"{path} stands for {here}, and more: params must have an array for every gradient")
        if tuple(getattr(param, "shape", ())) != tuple(x.shape):
            got = f"an array of shape {tuple(param.shape)}" if hasattr(param, "shape") else repr(param)
            raise ValueError(f"{path} is {got}, and its gradient has the shape {tuple(x.shape)}: they must be alike")
    return found


def backend_for(flat: Flat, scalars: Sequence[Any] = (), params: Sequence[Leaf] = ()) -> Backend:
    """The backend for these leaves, and parameters; arrays among `scalars` have a say too.

    Raises LeafError for a leaf that cannot be clipped, or when two libraries meet that cannot work together.
    """
    if len(flat.samples) == 1 and not scalars and not params:  # as always, nearly
        x = flat.values[0]
        known = _admitted.get((type(x), getattr(x, "dtype", None)))
        if known is not None and LIBRARIES[known].are_alike(flat.values):
            return backend_of({known: x})
    names: dict[str, Any] = {}  # the libraries, each with the first of its arrays
    for places in (flat.samples, range(len(flat.values))):
        for i in places:
            names.setdefault(_admit(flat.values[i], partial(_path, flat, i)), flat.values[i])
        if names.keys() <= LIBRARIES.keys() and (len(names) != 1 or LIBRARIES[min(names)].are_alike(flat.values)):
            break  # type and dtype say all of them
    for path, x in params:
        names.setdefault(_admit(x, partial(str, path)), x)
    for value in scalars:
        if value is not None and not can_join(value, names):
            names.setdefault(str(library(value)), value)
    try:
        return backend_of(names)
    except ValueError:
        found = {id(x): path for path, x in reversed([*zip(flat.paths(), flat.values, strict=True), *params])}
        (one, kind), (two, other) = ((found.get(id(x), "a bound"), name) for name, x in list(names.items())[:2])
        raise LeafError(
            f"{one} is a {kind} array and {two} a {other} array: they cannot be clipped as one. "
            f"Convert one side first, or clip two trees with one norm (norm=...)"
        ) from None


def _path(flat: Flat, i: int) -> str:
    return flat.paths()[i]


def _admit(x: Any, path: Callable[[], str]) -> str:
    """The library of a leaf. Raises LeafError unless the leaf is a dense floating-point or complex array."""
    sort = type(x), getattr(x, "dtype", None)
    known = _admitted.get(sort)
    if known is not None and LIBRARIES[known].are_alike([x]):
        return known
    name = library(x)
    objection = _objection(x, name)
    if objection or name is None:
        raise LeafError(f"{path()} is {objection}")
    if name in LIBRARIES and LIBRARIES[name].are_alike([x]):
        _admitted[sort] = name
    return name


def _objection(x: Any, name: str | None) -> str:
    """What a leaf is that cannot be clipped, and how to repair it; empty for a good one."""
    kind = f"{type(x).__module__}.{type(x).__qualname__}"
    if isinstance(x, bool | int | float | complex) and name is None:
        return f"the Python number {x!r}: make it an array, for example numpy.asarray(x, dtype='float32')"
    if isinstance(x, Clipped):
        return "a Clipped, what a clip has returned, and its norm is no gradient: unpack it: grads, norm = ..."
    if isinstance(x, type):
        return f"the class {x.__module__}.{x.__qualname__}: pass an array, not its class"
    if isinstance(x, str | bytes):
        return f"the {type(x).__name__} {x[:40]!r}: a gradient tree holds arrays; take it out, or put None there"
    special = unsuitable(x)
    if special:
        return special
    if name is None:
        return (
            f"a {kind}, which is no array of the Python array API and no container that gradclip knows: "
            "pass arrays in lists, tuples, dicts or named tuples, or register the class as a JAX pytree"
        )
    lacks = "" if name in LIBRARIES else lacking(x)
    if lacks:
        return (
            f"of type {kind}, which does not speak the array API well enough ({lacks}): "
            "convert it first, to NumPy for example"
        )
    if dtype_name(x) not in COMPONENT_BITS:
        return (
            f"an array of dtype {dtype_name(x)}: gradients are floating point ({', '.join(COMPONENT_BITS)}): "
            "cast it, or put None in its place"
        )
    return ""


def refuse_unwritable(flat: Flat, verb: str) -> None:
    """Raise LeafError unless every leaf can be written in place. `verb`: the functional form's name."""
    is_plain: dict[type, Callable[[Any], bool]] = {}
    for i in flat.samples:
        x = flat.values[i]
        known = LIBRARIES.get(_admitted.get((type(x), x.dtype), ""))
        is_plain[type(x)] = known.is_plain if known else lambda x: False
    if len(is_plain) == 1 and all(map(is_plain[type(flat.values[0])], flat.values)):  # 1,000 leaves take 60 us
        return
    doubtful = [i for i, x in enumerate(flat.values) if not is_plain[type(x)](x)]
    for objection in (immutable, _unwritable):  # among NumPy leaves beside JAX leaves, one of JAX's is named
        for i in doubtful:
            reason = objection(flat.values[i])
            if reason:
                raise LeafError(
                    f"{flat.paths()[i]} {reason}, so it cannot be clipped in place: use gradclip.{verb}, "
                    "and take the gradients that it returns"
                )


def _unwritable(x: Array) -> str:
    """Why a leaf cannot be written to; empty if it can."""
    if not array_api_compat.is_writeable_array(x):
        return "is a read-only array"
    if any(getattr(y, "requires_grad", False) and getattr(y, "is_leaf", False) for y in (x, getattr(x, "_base", None))):
        return "is a variable that a gradient is taken for, or a view of one"
    strides = x.stride() if hasattr(x, "stride") else getattr(x, "strides", ())
    if 0 not in x.shape and any(s == 0 < n - 1 for n, s in zip(x.shape, strides or (), strict=False)):
        return "has elements that share memory (a stride of 0)"
    return ""


def refuse_complex(flat: Flat) -> None:
    """Raise LeafError for a complex leaf: complex numbers have no order."""
    for i in flat.samples:
        if dtype_name(flat.values[i]).startswith("complex"):
            raise LeafError(
                f"{flat.paths()[i]} is complex ({dtype_name(flat.values[i])}), and complex numbers have no order: clip "
                "its real and imaginary parts apart, or use gradclip.clip_grad_norm"
            )

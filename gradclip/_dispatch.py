"""Which leaves belong to which library. The one list of library names, and the gate that a leaf must pass."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import array_api_compat

from gradclip._errors import LeafError
from gradclip._kernels.generic import COMPONENT_BITS, Kernels, dtype_name
from gradclip._tree import Rebuild, flatten
from gradclip._types import Leaf, Tree


class Library(NamedTuple):
    """An array library that has kernels of its own."""

    name: str
    owns: Callable[[Any], bool]
    kernels: str  # the class, in gradclip/_kernels/<name>.py


LIBRARIES = (
    Library("numpy", array_api_compat.is_numpy_array, "NumpyKernels"),
    Library("jax", array_api_compat.is_jax_array, "JaxKernels"),
    Library("cupy", array_api_compat.is_cupy_array, "CupyKernels"),
)


def library(x: Any) -> str | None:
    """The name of the library that `x` belongs to, None if it is no array."""
    for known in LIBRARIES:
        if known.owns(x):
            return known.name
    if array_api_compat.is_array_api_obj(x):
        return str(array_api_compat.array_namespace(x).__name__).removeprefix("array_api_compat.").split(".")[0]
    return None


def is_real(x: Any) -> bool:
    """Whether an array holds real numbers, integers among them."""
    return re.fullmatch(r"u?int\d+|b?float\d+\w*|longdouble", dtype_name(x)) is not None


def on_host(x: Any) -> bool:
    """Whether the host can read a bound without waiting: a Python number or a NumPy array."""
    return isinstance(x, int | float) or library(x) == "numpy"


def host_number(x: Any) -> float | None:
    """A real number that the host can see (a Python number, or NumPy's), as a float; None for anything else."""
    if isinstance(x, bool):
        return None
    if isinstance(x, int | float) or (library(x) == "numpy" and x.shape == () and is_real(x)):
        try:
            return float(x)
        except OverflowError:  # an int beyond float64
            return math.inf if x > 0 else -math.inf
    return None


def _is_traced(x: Any) -> bool:
    core = getattr(sys.modules.get("jax"), "core", None)
    return core is not None and isinstance(x, core.Tracer)


def is_nothing(x: Any) -> bool:
    """Whether a leaf holds no gradient: JAX's float0, the tangent of an integer."""
    return str(getattr(x, "dtype", "")) == "[('float0', 'V')]"


@lru_cache
def _kernels(name: str) -> Kernels:
    known = next((lib for lib in LIBRARIES if lib.name == name), None)
    assert known is not None
    kernels: Kernels = getattr(import_module(f"gradclip._kernels.{name}"), known.kernels)()
    return kernels


@lru_cache
def _generic(xp: Any) -> Kernels:
    return Kernels(xp)


def kernels_for(leaves: Sequence[Leaf], scalars: Sequence[Any] = ()) -> Kernels:
    """The kernels for these leaves; arrays among `scalars` have a say too.

    Raises LeafError for a leaf that cannot be clipped, or when two libraries meet that cannot work together.
    """
    found: dict[str, Leaf] = {}
    for leaf in leaves:
        name = library(leaf.value)
        _admit(leaf, name)
        assert name is not None
        found.setdefault(name, leaf)
    for value in scalars:
        name = library(value)
        if name in (None, "numpy") or (name == "jax" and "numpy" in found and not _is_traced(value)):
            continue  # NumPy can read it
        found.setdefault(str(name), Leaf("a bound", value))
    if "jax" in found:
        found.pop("numpy", None)
    if len(found) > 1:
        (one, a), (two, b) = list(found.items())[:2]
        raise LeafError(
            f"{a.path} is a {one} array and {b.path} a {two} array: they cannot be clipped as one. "
            f"Convert one side first, or clip two trees with one norm (norm=...)"
        )
    if not found:
        return _kernels("numpy")
    name, leaf = next(iter(found.items()))
    if any(lib.name == name for lib in LIBRARIES):
        return _kernels(name)
    return _generic(array_api_compat.array_namespace(leaf.value))


def _admit(leaf: Leaf, name: str | None) -> None:
    """Raise LeafError unless the leaf is a dense floating-point or complex array."""
    what, repair = _objection(leaf.value, name)
    if what:
        raise LeafError(f"{leaf.path} is {what}: {repair}")


def _objection(x: Any, name: str | None) -> tuple[str, str]:
    kind = f"{type(x).__module__}.{type(x).__qualname__}"
    if isinstance(x, bool | int | float | complex) and name is None:
        return f"the Python number {x!r}", "make it an array, for example numpy.asarray(x, dtype='float32')"
    if isinstance(x, str | bytes):
        return (
            f"the {type(x).__name__} {x[:40]!r}",
            "a gradient tree holds arrays; take it out, or put None there",
        )
    if _is(x, "torch.nn", "Parameter"):
        return "a torch Parameter", "pass its gradient (p.grad), or the weights would be clipped"
    if "sparse" in kind or _is_sparse_tensor(x):
        return f"a sparse array ({kind})", "make it dense first; its stored duplicates would spoil the norm"
    if _is(x, "numpy.ma", "MaskedArray"):
        return "a masked array", "fill it first (x.filled(0)), so that masked elements have a value"
    if name is None:
        return (
            f"a {kind}, which is no array of the Python array API and no container that gradclip knows",
            "pass arrays in lists, tuples, dicts or named tuples, or register the class as a JAX pytree",
        )
    dtype = dtype_name(x)
    if dtype not in COMPONENT_BITS:
        return (
            f"an array of dtype {dtype}",
            f"gradients are floating point ({', '.join(COMPONENT_BITS)}): cast it, or put None in its place",
        )
    return "", ""


def _is(x: Any, module: str, name: str) -> bool:
    """isinstance without importing the library."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(x, kind)


def _is_sparse_tensor(x: Any) -> bool:
    layout = getattr(x, "layout", None)
    return _is(x, "torch", "Tensor") and "strided" not in str(layout)


def refuse_unwritable(leaves: Sequence[Leaf], kernels: Kernels, verb: str) -> None:
    """Raise LeafError unless every leaf can be written in place. `verb`: the functional form's name."""
    for leaf in leaves:
        own = kernels_for([leaf])  # among NumPy leaves beside JAX leaves, name one of JAX's
        reason = "" if own is not kernels else kernels.unwritable(leaf.value)
        if reason:
            raise LeafError(
                f"{leaf.path} {reason}, so it cannot be clipped in place: use gradclip.{verb}, "
                "and take the gradients that it returns"
            )


def refuse_complex(leaves: Sequence[Leaf]) -> None:
    """Raise LeafError for a complex leaf: complex numbers have no order."""
    for leaf in leaves:
        if dtype_name(leaf.value).startswith("complex"):
            raise LeafError(
                f"{leaf.path} is complex ({dtype_name(leaf.value)}), and complex numbers have no order: clip its "
                "real and imaginary parts apart, or use gradclip.clip_grad_norm"
            )


def active(grads: Tree) -> tuple[list[Leaf], Rebuild]:
    """The leaves of a tree that hold gradients, and the way back; JAX's float0 leaves stay where they are."""
    leaves, rebuild = flatten(grads)
    places = [i for i, leaf in enumerate(leaves) if not is_nothing(leaf.value)]

    def rebuild_all(values: list[Any]) -> Tree:
        out = [leaf.value for leaf in leaves]
        for i, value in zip(places, values, strict=True):
            out[i] = value
        return rebuild(out)

    return [leaves[i] for i in places], rebuild_all

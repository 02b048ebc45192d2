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
from gradclip._kernels.dtypes import COMPONENT_BITS, dtype_name
from gradclip._kernels.generic import Kernels
from gradclip._tree import Flat, flatten
from gradclip._types import Tree


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


_NAMES = frozenset(known.name for known in LIBRARIES)

#: Kinds of leaves (type and dtype) that were found to be good, and whose they are. For speed.
_admitted: dict[tuple[type, Any], str] = {}


def library(x: Any) -> str | None:
    """The name of the library that `x` belongs to, None if it is no array."""
    if type(x) is float or type(x) is int:
        return None
    for known in LIBRARIES:
        if known.owns(x):
            return known.name
    if array_api_compat.is_array_api_obj(x) and not isinstance(x, type):  # a class has its arrays' methods
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
    dtype = getattr(x, "dtype", None)
    return getattr(dtype, "names", None) is not None and str(dtype) == "[('float0', 'V')]"


@lru_cache
def _kernels(name: str) -> Kernels:
    known = next((lib for lib in LIBRARIES if lib.name == name), None)
    assert known is not None
    kernels: Kernels = getattr(import_module(f"gradclip._kernels.{name}"), known.kernels)()
    return kernels


@lru_cache
def _generic(xp: Any) -> Kernels:
    return Kernels(xp)


def active(grads: Tree) -> Flat:
    """The leaves of a tree that hold gradients; JAX's float0 leaves stay where they are."""
    flat = flatten(grads)
    return flat.without(is_nothing) if any(is_nothing(flat.values[i]) for i in flat.samples) else flat


def kernels_for(flat: Flat, scalars: Sequence[Any] = ()) -> Kernels:
    """The kernels for these leaves; arrays among `scalars` have a say too.

    Raises LeafError for a leaf that cannot be clipped, or when two libraries meet that cannot work together.
    """
    values, found = flat.values, dict[str, int | None]()  # where each library is seen first; None: in a bound
    for i in _to_check(flat):
        found.setdefault(_admit(flat, i), i)
    for value in scalars:
        name = None if value is None else library(value)
        if name in (None, "numpy") or (name == "jax" and "numpy" in found and not _is_traced(value)):
            continue  # NumPy can read it
        found.setdefault(str(name), None)
    if "jax" in found:
        found.pop("numpy", None)
    if len(found) > 1:
        one, two = (
            f"{'a bound' if i is None else flat.paths()[i]} {verb}a {name} array"
            for verb, (name, i) in zip(("is ", ""), list(found.items())[:2], strict=True)
        )
        raise LeafError(
            f"{one} and {two}: they cannot be clipped as one. "
            f"Convert one side first, or clip two trees with one norm (norm=...)"
        )
    if not found:
        return _kernels("numpy")
    name, first = next(iter(found.items()))
    if name in _NAMES:
        return _kernels(name)
    example = next(x for x in scalars if library(x) == name) if first is None else values[first]
    return _generic(array_api_compat.array_namespace(example))


def _to_check(flat: Flat) -> Sequence[int]:
    """Which leaves must be looked at: where type and dtype say all, one of each kind is enough."""
    samples = (flat.values[i] for i in flat.samples)
    if all(_kind(x) in _admitted or library(x) in _NAMES for x in samples):
        return flat.samples
    return range(len(flat.values))


def _admit(flat: Flat, i: int) -> str:
    """The library of a leaf. Raises LeafError unless the leaf is a dense floating-point or complex array."""
    x = flat.values[i]
    known = _admitted.get(_kind(x))
    if known is not None:
        return known
    name = library(x)
    what, repair = _objection(x, name)
    if what or name is None:
        raise LeafError(f"{flat.paths()[i]} is {what}: {repair}")
    if name in _NAMES:
        _admitted[_kind(x)] = name
    return name


def _kind(x: Any) -> tuple[type, Any]:
    return type(x), getattr(x, "dtype", None)


def _objection(x: Any, name: str | None) -> tuple[str, str]:
    kind = f"{type(x).__module__}.{type(x).__qualname__}"
    if isinstance(x, bool | int | float | complex) and name is None:
        return f"the Python number {x!r}", "make it an array, for example numpy.asarray(x, dtype='float32')"
    if isinstance(x, type):
        return f"the class {x.__module__}.{x.__qualname__}", "pass an array, not its class"
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
    if _is(x, "numpy", "matrix"):
        return "a numpy.matrix", "make it an array with numpy.asarray(x), for a matrix is never anything but 2-d"
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


def refuse_unwritable(flat: Flat, kernels: Kernels, verb: str) -> None:
    """Raise LeafError unless every leaf can be written in place. `verb`: the functional form's name."""
    if kernels.all_writable(flat.values):
        return
    for i, x in enumerate(flat.values):
        reason = kernels.unwritable(x)
        if reason and _owner(x) is kernels:  # among NumPy leaves beside JAX leaves, name one of JAX's
            raise LeafError(
                f"{flat.paths()[i]} {reason}, so it cannot be clipped in place: use gradclip.{verb}, "
                "and take the gradients that it returns"
            )


def _owner(x: Any) -> Kernels:
    name = str(library(x))
    return _kernels(name) if name in _NAMES else _generic(array_api_compat.array_namespace(x))


def refuse_complex(flat: Flat) -> None:
    """Raise LeafError for a complex leaf: complex numbers have no order."""
    for i in flat.samples:
        if dtype_name(flat.values[i]).startswith("complex"):
            raise LeafError(
                f"{flat.paths()[i]} is complex ({dtype_name(flat.values[i])}), and complex numbers have no order: clip "
                "its real and imaginary parts apart, or use gradclip.clip_grad_norm"
            )

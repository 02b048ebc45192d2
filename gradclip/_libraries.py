"""Which array belongs to which library, and whose backend does its work. The one list of library names."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from importlib import import_module
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

import array_api_compat

from gradclip._backends.generic import Backend
from gradclip._dtypes import dtype_name
from gradclip._types import VERBS, Array

F = TypeVar("F", bound=Callable[..., Any])


class Library(NamedTuple):
    """An array library that has a backend of its own, in `gradclip/_backends/<name>/`."""

    owns: Callable[[Any], bool]
    backend: str  # the class
    immutable: str = ""  # where its arrays cannot be written to: what a message says of one
    is_plain: Callable[[Any], bool] = lambda x: False  # told at once: each element can be written to by itself
    are_alike: Callable[[Sequence[Any]], bool] = lambda leaves: True  # whether type and dtype say all of each


def _is_plain_tensor(x: Any) -> bool:
    of = x._base
    refused = x.requires_grad or x.is_inference() or (of is not None and of.requires_grad)
    return not refused and x.is_contiguous()


def _are_dense(tensors: Sequence[Any]) -> bool:
    found = set(map(attrgetter("layout", "is_nested"), tensors))
    return [(str(layout), nested) for layout, nested in found] == [("torch.strided", False)]


LIBRARIES = {
    "numpy": Library(array_api_compat.is_numpy_array, "NumpyBackend", is_plain=attrgetter("flags.carray")),
    "jax": Library(array_api_compat.is_jax_array, "JaxBackend", "is a JAX array, and those are immutable"),
    "cupy": Library(array_api_compat.is_cupy_array, "CupyBackend", is_plain=lambda x: 0 not in x.strides),
    "torch": Library(array_api_compat.is_torch_array, "TorchBackend", is_plain=_is_plain_tensor, are_alike=_are_dense),
}


def library(x: Any) -> str | None:
    """The name of the library that `x` belongs to, None if it is no array."""
    if type(x) is float or type(x) is int:
        return None
    if _is(x, "torch.distributed.tensor", "DTensor"):  # it does not work with plain tensors
        return "torch DTensor"
    for name, known in LIBRARIES.items():
        if known.owns(x):
            return name
    if array_api_compat.is_array_api_obj(x) and not isinstance(x, type):  # a class has its arrays' methods
        try:
            return str(array_api_compat.array_namespace(x).__name__).removeprefix("array_api_compat.").split(".")[0]
        except Exception:  # `lacking` tells it
            return type(x).__module__.split(".")[0]
    return None


def immutable(x: Array) -> str:
    """Why no array of its library, or of its mode, can be written to; empty where they can."""
    if _is(x, "torch", "Tensor") and x.is_inference() and not sys.modules["torch"].is_inference_mode_enabled():
        return "is a tensor of torch's inference mode, and that is over"
    known = LIBRARIES.get(str(library(x)))
    return known.immutable if known else ""


def backend_of(names: dict[str, Any]) -> Backend:
    """The backend that works for these libraries, each with an array of it. Raises ValueError if none works for all."""
    if "jax" in names:
        names.pop("numpy", None)
    if len(names) > 1:
        raise ValueError(f"no backend for {' and '.join(names)} at once")
    for name, example in names.items():
        return _own(name) if name in LIBRARIES else Backend(array_api_compat.array_namespace(example))
    return _own("numpy")


def compilable(verb: F) -> F:
    """A public function that `torch.compile` takes as one operation; called outside of that, it is as it was."""
    VERBS[verb.__name__] = verb
    parameters = verb.__code__.co_varnames[: verb.__code__.co_argcount]

    @wraps(verb)
    def called(*args: Any, **kwargs: Any) -> Any:
        compiler = getattr(sys.modules.get("torch"), "compiler", None)  # it may be half imported
        if compiler is not None and compiler.is_dynamo_compiling():
            from gradclip._backends.torch import compiled

            return compiled.call(verb.__name__, parameters, args, kwargs)
        return verb(*args, **kwargs)

    return called  # type: ignore[return-value]


@lru_cache
def _own(name: str) -> Backend:
    backend: Backend = getattr(import_module(f"gradclip._backends.{name}"), LIBRARIES[name].backend)()
    return backend


def can_join(x: Any, names: dict[str, Any]) -> bool:
    """Whether a 0-d array is no reason for another backend: NumPy's can be read, and JAX reads those of its own."""
    name = library(x)
    return name in (None, "numpy") or (name == "jax" and "numpy" in names and not _is(x, "jax.core", "Tracer"))


def is_real(x: Any) -> bool:
    """Whether an array holds real numbers, integers among them."""
    return re.fullmatch(r"u?int\d+|b?float\d+\w*|longdouble", dtype_name(x)) is not None


def on_host(x: Any) -> bool:
    """Whether the host can read a bound without waiting: a Python number or a NumPy array."""
    return isinstance(x, int | float) or library(x) == "numpy"


def host_number(x: Any) -> float | None:
    """A real number that the host can see (a Python number, or NumPy's), as a float; None for anything else."""
    is_number = isinstance(x, int | float) and not isinstance(x, bool)
    if is_number or (library(x) == "numpy" and x.shape == () and is_real(x)):
        try:
            return float(x)
        except OverflowError:  # an int beyond float64
            return math.inf if x > 0 else -math.inf
    return None


def is_nothing(x: Any) -> bool:
    """Whether a leaf holds no gradient: JAX's float0, the tangent of an integer."""
    dtype = getattr(x, "dtype", None)
    return getattr(dtype, "names", None) is not None and str(dtype) == "[('float0', 'V')]"


def detached(x: Any) -> Any:
    """The values of a parameter: torch's without the graph of its derivatives."""
    return x.detach() if _is(x, "torch", "Tensor") else x


def constant(x: Array) -> Array:
    """An array without its derivatives: what is made of it is a constant to them."""
    if _is(x, "jax", "Array"):
        return sys.modules["jax"].lax.stop_gradient(x)
    return detached(x)


def fused(function: F, x: Array) -> F:
    """A function of arrays like `x`, its first argument aside, with small operations made one where each takes long.

    JAX starts a program for every operation on arrays that are not traced, which takes 30 us.
    """
    if not _is(x, "jax", "Array"):
        return function
    return import_module("gradclip._backends.jax.wide").fused(function)  # type: ignore[no-any-return]


def unsuitable(x: Any) -> str:
    """What an array of a special class is, and what to pass instead; empty for any other."""
    kind = f"{type(x).__module__}.{type(x).__qualname__}"
    if _is(x, "torch.nn", "Parameter"):
        return (
            "a torch Parameter: pass its gradient (p.grad), or the weights would be clipped; "
            "the functions of gradclip.torch take parameters"
        )
    layout = str(getattr(x, "layout", "strided")) if _is(x, "torch", "Tensor") else "strided"
    if "sparse" in kind or "sparse" in layout:
        return f"a sparse array ({kind}): make it dense first; its stored duplicates would spoil the norm"
    if "strided" not in layout or getattr(x, "is_nested", False):
        return f"a tensor ({kind}) of layout {layout}, nested or opaque: pass strided ones (unbind() or to_dense())"
    if _is(x, "numpy.ma", "MaskedArray") or _is(x, "torch.masked", "MaskedTensor"):
        return "a masked array: fill it first (x.filled(0), x.to_tensor(0)), so that masked elements have a value"
    if _is(x, "numpy", "matrix"):
        return "a numpy.matrix: make it an array with numpy.asarray(x), for a matrix is never anything but 2-d"
    return ""


def engine_instead(x: Any) -> str:
    """The maker of `all_reduce` that is wanted in place of a library's own collective, or group; empty for others."""
    named = "torch.distributed"
    own = getattr(sys.modules.get(named), "all_reduce", None)
    raw = own is not None and getattr(x, "func", x) is own  # a functools.partial of it, too
    if raw or _is(x, named, "ProcessGroup") or _is(x, "torch.distributed.device_mesh", "DeviceMesh"):
        return "gradclip.distributed.torch(group)"
    return ""


def _is(x: Any, module: str, name: str) -> bool:
    """isinstance without importing the library."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(x, kind)


def lacking(x: Any) -> str:
    """What an array has not that the work on it needs: a shape, a device, functions of the Python array API."""
    try:
        xp = array_api_compat.array_namespace(x)
        tuple(x.shape), array_api_compat.device(x)
        return ", ".join(name for name in _NEEDED if not hasattr(xp, name))
    except Exception as error:
        return str(error) or type(error).__name__


_NEEDED = ("astype", "where", "stack", "concat", "isfinite", "logical_and", "maximum", "full_like", "finfo")

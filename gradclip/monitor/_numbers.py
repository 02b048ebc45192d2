"""Numbers on their way to the log: what is kept of each when it is added, and how many are fetched at once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from enum import Enum
from typing import Any

import array_api_compat
import numpy as np

from gradclip._dtypes import dtype_name
from gradclip._libraries import detached, host_number, is_real, library, on_host
from gradclip._types import Array, Scalar


class _Sort(Enum):
    """What a type and a dtype say about how a number is had."""

    PLAIN = 0  # Python's
    HOST = 1  # an array of the host, which its owner may write to later
    LATER = 2  # of a library that computes while the host goes on, or when it is asked
    EITHER = 3  # its device says which


#: Types and dtypes that were looked at before: a leaf then costs a microsecond, not ten.
_sorts: dict[tuple[type, Any], _Sort] = {}


def kept(name: str, x: Any) -> Scalar:
    """The number where the host has it, else the array, which is not read.

    Raises TypeError or ValueError, with the name, for what is not one real number, or is none yet.
    """
    if type(x) is float:
        return x
    key = type(x), getattr(x, "dtype", None)
    sort = _sorts.get(key) or _sort(name, x)
    _sorts[key] = sort
    if sort is _Sort.PLAIN:
        return host_number(x)
    if tuple(x.shape) != ():
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, and one number is logged: as norm that of gradclip.global_norm, or "
            "of a clip with per=None; as per_leaf what gradclip.norms(grads) gives, or norms(grads, per=labels)"
        )
    if is_deleted(x):
        raise ValueError(f"{name} was deleted: add it before its buffer is donated or deleted")
    if sort is _Sort.EITHER:
        x = detached(x)  # the graph of its derivatives would be kept as long
        sort = _Sort.HOST if str(x.device) == "cpu" else sort
    return _typed(float(x), x) if sort is _Sort.HOST else x


def _sort(name: str, x: Any) -> _Sort:
    if host_number(x) is not None and not hasattr(x, "dtype"):
        return _Sort.PLAIN
    if library(x) is None or not is_real(x):
        raise TypeError(f"{name} must be a number or a 0-d real array, got {x!r} of type {type(x).__name__}")
    if hasattr(x, "full_tensor"):
        raise TypeError(f"{name} is spread over a device mesh ({type(x).__name__}): pass its full_tensor()")
    if hasattr(x, "aval") and not hasattr(x, "is_ready"):
        raise TypeError(
            f"{name} has no value yet, for it is being traced: return it from the jitted function and add it to the "
            "log outside, or jax.debug.callback(lambda step, norm: log.add(int(step), norm), step, norm)"
        )
    if on_host(x):
        return _Sort.HOST
    is_here = str(array_api_compat.device(x)) == "cpu"
    return _Sort.LATER if hasattr(x, "is_ready") or (is_here and array_api_compat.is_lazy_array(x)) else _Sort.EITHER


def fetched(arrays: Sequence[Array]) -> list[Scalar]:
    """The numbers that 0-d arrays hold. Those that can start their copies all do so before one is read; of others,
    those of one library, device and dtype come as one array.
    """
    groups: dict[Any, list[int]] = {}
    for i, x in enumerate(arrays):
        if not isinstance(x, float | np.floating):
            single = hasattr(x, "copy_to_host_async")
            key = None if single else (type(x), str(array_api_compat.device(x)), x.dtype)
            groups.setdefault(key, []).append(i)
    out = list(arrays)
    for key, places in groups.items():
        here = [arrays[i] for i in places]
        numbers = _each(here) if key is None else _stacked(here)
        for i, number in zip(places, numbers, strict=True):
            out[i] = _typed(float(number), arrays[i])
    return out


def _each(arrays: list[Array]) -> list[Any]:
    if getattr(arrays[0].device, "platform", "") != "cpu":  # on the host there is nothing to copy
        for x in arrays:
            x.copy_to_host_async()
    return list(map(np.asarray, arrays))


def _stacked(arrays: list[Array]) -> list[Any]:
    device = array_api_compat.device(arrays[0])
    with device if hasattr(device, "__enter__") else nullcontext():  # a GPU works for others as well, but slowly
        row = array_api_compat.array_namespace(arrays[0]).stack(arrays)
        return list(row.tolist()) if hasattr(row, "tolist") else [row[i] for i in range(len(arrays))]


def is_deleted(x: Any) -> bool:
    """Whether the buffer of an array is gone: JAX's, once it was donated."""
    return hasattr(x, "is_deleted") and x.is_deleted()


def text(number: Scalar) -> str:
    """The shortest decimal that reads back to the same number of its dtype."""
    return repr(number) if type(number) is float else str(number)


def _typed(number: float, x: Any) -> Scalar:
    """The number in the dtype of `x`, in which few digits tell it from its neighbours."""
    kind = _TYPES.get(dtype_name(x))
    return number if kind is None else kind(number)


_TYPES = {"float16": np.float16, "float32": np.float32}

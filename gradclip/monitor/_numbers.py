"""Numbers on their way to the log: what is kept of each when it is added, and how many are fetched at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import array_api_compat
import numpy as np

from gradclip._dtypes import dtype_name
from gradclip._libraries import detached, host_number, is_real, library
from gradclip._types import Array, Scalar

_PLAIN = (float, np.floating)


def kept(name: str, x: Any) -> Scalar:
    """The number where the host has it, for the caller may write to its array later; else the array, which is not read.

    Raises TypeError or ValueError, with the name, for what is not one real number, or is none yet.
    """
    number = host_number(x)
    if number is not None:
        return _typed(number, x)
    if library(x) is None or not is_real(x):
        raise TypeError(f"{name} must be a number or a 0-d real array, got {x!r} of type {type(x).__name__}")
    if hasattr(x, "full_tensor"):
        raise TypeError(f"{name} is spread over a device mesh ({type(x).__name__}): pass its full_tensor()")
    if tuple(x.shape) != ():
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, and one number is logged: as norm that of gradclip.global_norm, or "
            "of a clip with per=None; as per_leaf what gradclip.norms(grads) gives, or norms(grads, per=labels)"
        )
    if _is_traced(x):
        raise TypeError(
            f"{name} has no value yet, for it is being traced: return it from the jitted function and add it to the "
            "log outside, or pass it to jax.debug.callback(log.add, step, norm)"
        )
    if is_deleted(x):
        raise ValueError(f"{name} was deleted: add it before its buffer is donated or deleted")
    x = detached(x)  # the graph of its derivatives would be kept as long
    if str(array_api_compat.device(x)) == "cpu" and not array_api_compat.is_lazy_array(x):
        return _typed(float(x), x)
    return x


def fetched(arrays: Sequence[Array]) -> list[Scalar]:
    """The numbers that 0-d arrays hold. Those that can start their copies all do so before one is read; of others,
    those of one library, device and dtype come as one array.
    """
    groups: dict[Any, list[int]] = {}
    for i, x in enumerate(arrays):
        if isinstance(x, _PLAIN):
            continue
        starts = hasattr(x, "copy_to_host_async")
        if starts:
            x.copy_to_host_async()
        key = None if starts else (type(x), str(array_api_compat.device(x)), x.dtype)
        groups.setdefault(key, []).append(i)
    out = list(arrays)
    for key, places in groups.items():
        here = [arrays[i] for i in places]
        if key is None:
            numbers = [np.asarray(x)[()] for x in here]
        else:
            row = array_api_compat.array_namespace(here[0]).stack(here)
            numbers = row.tolist() if hasattr(row, "tolist") else [row[i] for i in range(len(here))]
        for i, number in zip(places, numbers, strict=True):
            out[i] = _typed(float(number), arrays[i])
    return out


def is_deleted(x: Any) -> bool:
    """Whether the buffer of an array is gone: JAX's, once it was donated."""
    return hasattr(x, "is_deleted") and x.is_deleted()


def text(number: Scalar) -> str:
    """The shortest decimal that reads back to the same number of its dtype."""
    return repr(number) if type(number) is float else str(number)


def _is_traced(x: Any) -> bool:
    try:
        is_deleted(x)
    except (AttributeError, TypeError):  # what stands for a value has no buffer
        return True
    return False


def _typed(number: float, x: Any) -> Scalar:
    """The number in the dtype of `x`, in which few digits tell it from its neighbours."""
    name = dtype_name(x) if hasattr(x, "dtype") else ""
    return getattr(np, name)(number) if name in ("float16", "float32") else number

"""The dtypes that can be clipped, by the names that they have in every library."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any

from gradclip._types import Array

#: Every dtype that can be clipped, and how many bits one of its real components has.
COMPONENT_BITS = {
    "float16": 16,
    "bfloat16": 16,
    "float32": 32,
    "float64": 64,
    "complex64": 32,
    "complex128": 64,
}


def dtype_name(x: Array) -> str:
    """The dtype's plain name, `"float32"`, in any library and byte order."""
    return plain_name(x.dtype)


def dtype_names(leaves: Sequence[Array]) -> set[str]:
    """The names of the dtypes among the leaves."""
    return {plain_name(dtype) for dtype in {x.dtype for x in leaves}}


@lru_cache(256, typed=True)  # typed: dtypes of two libraries may be equal, or warn when they are compared
def plain_name(dtype: Any) -> str:
    name = getattr(dtype, "name", None)
    return name if isinstance(name, str) else str(dtype).rsplit(".", maxsplit=1)[-1]


@lru_cache(64, typed=True)
def fits(name: str, acc: Any) -> bool:
    """Whether squares of any element of that dtype stay in the range of the accumulation dtype."""
    return COMPONENT_BITS[name] < 64 if "float64" in str(acc) else name == "float16"


def samples(values: Sequence[Any]) -> Sequence[int]:
    """In order, the first value of every kind, a kind being a type and a dtype. A thousand of one kind take 50 us."""
    if not values:
        return ()
    try:
        kinds: Sequence[Any] = list(map(_dtype, values))
    except AttributeError:  # no array
        kinds = [getattr(x, "dtype", None) for x in values]
    if len(set(map(type, values))) == 1:
        if kinds.count(kinds[0]) == len(kinds):
            return (0,)
    else:  # dtypes of two libraries may be equal, or warn when they are compared
        kinds = list(zip(map(type, values), kinds, strict=True))
    try:
        return sorted(map(kinds.index, set(kinds)))
    except TypeError:  # a dtype that is no array's
        return range(len(kinds))


_dtype = attrgetter("dtype")

"""The words that every room shares. Arrays stay `Any`: no type checker knows all array libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar

Array: TypeAlias = Any
"""An array of any library that speaks the Python array API."""

Tree: TypeAlias = Any
"""A nesting of containers with arrays at its leaves."""

Namespace: TypeAlias = Any
"""The module of an array library, as array-api-compat presents it (`xp`)."""

Scalar: TypeAlias = Any
"""A Python number or a 0-d array, traced ones included."""

ReduceOp = Literal["sum", "max", "min"]
"""How partial results join."""

AllReduce = Callable[[Array, ReduceOp], Array]
"""`(partial, op) -> joined`: joins a small array with its like on other shards, element by element."""

Nonfinite = Literal["propagate", "zero", "error"]
"""What happens when a gradient element is inf or NaN."""

T = TypeVar("T")


class Clipped(NamedTuple, Generic[T]):
    """What `clip_grad_norm` returns: `grads, norm = clip_grad_norm(...)`."""

    grads: T
    """The tree that went in, clipped: same containers, dtypes, devices and library."""

    norm: Array
    """The global norm before clipping (after `divide_by`), a 0-d array."""

"""What a caller may pass beside the gradients, checked before any work is done."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator
from typing import Any, get_args

import array_api_compat

from gradclip._groups import Grouped
from gradclip._libraries import engine_instead, host_number, is_real, library, on_host
from gradclip._tree import Flat, is_container, lasting
from gradclip._types import AllReduce, Nonfinite, Scalar

_POLICIES = get_args(Nonfinite)


def norm_type(p: Any) -> float | str:
    """p of the p-norm, or "rms". PyTorch's strings 'inf' and '-inf' are understood."""
    if type(p) is float and p == p:
        return p
    if isinstance(p, str) and p in ("inf", "-inf", "rms"):
        return p if p == "rms" else float(p)
    value = host_number(p)
    if value is None:
        raise TypeError(
            f"norm_type must be a real number known before tracing, got {p!r} of type {type(p).__name__}: "
            "pass 1, 2, 3.5, float('inf'), ..., or 'rms'"
        )
    if math.isnan(value):
        raise ValueError("norm_type must be a real number or inf, got nan")
    return value


def policy(nonfinite: Any) -> Nonfinite:
    """What to do about non-finite gradients."""
    if not isinstance(nonfinite, str) or nonfinite not in _POLICIES:
        raise ValueError(f"nonfinite must be one of {', '.join(map(repr, _POLICIES))}, got {nonfinite!r}")
    return nonfinite  # type: ignore[return-value]


def flag(name: str, value: Any) -> bool:
    """True or False. A string in its place is a mistake, not True."""
    if not isinstance(value, int) and type(value).__name__ not in ("bool_", "bool"):
        raise TypeError(f"{name} must be True or False, got {value!r} of type {type(value).__name__}")
    return bool(value)


def scalar(name: str, value: Any, *, positive: bool = False, finite: bool = True) -> Scalar:
    """A bound: a float where the host can see it, else the 0-d array that it is."""
    if type(value) is float and 0 < value < math.inf:
        return value
    wanted = "a positive number" if positive else "a number >= 0"
    number = host_number(value)
    if number is not None:
        if number < 0 or (finite and math.isnan(number)) or (positive and not 0 < number < math.inf):
            raise ValueError(f"{name} must be {wanted}, got {value!r}")
        return number
    if library(value) is None or not is_real(value):
        raise TypeError(f"{name} must be {wanted} or a 0-d real array, got {value!r} of type {type(value).__name__}")
    if value.shape != ():
        raise ValueError(f"{name} must be {wanted} or a 0-d array, got an array of shape {tuple(value.shape)}")
    return value


def scalars(name: str, value: Any, grouped: Grouped, *, finite: bool = True) -> Scalar | list[Scalar]:
    """One bound for all groups; or, given in the form in which their norms come back, those of one group after another:
    numbers and 0-d arrays, and arrays of several in a row.
    """
    if type(value) is float:
        return scalar(name, value, finite=finite)
    value = lasting(value, name) if isinstance(value, Iterator) else value
    if not is_container(value) and not _is_row(value):
        return scalar(name, value, finite=finite)
    blocks = zip(grouped.entries(value, name), grouped.groups.shapes, strict=True)
    each = [bound for (path, entry), shape in blocks for bound in _row(path, entry, shape, finite)]
    return each[0] if grouped.groups.count == len(each) == 1 else each or 0.0  # without groups any number will do


def _row(path: str, value: Any, shape: tuple[int, ...], finite: bool) -> list[Scalar]:
    """The bounds of one block, given as one for all, or an array that broadcasts to their norms."""
    if not shape or not _is_row(value):
        value = scalar(path, value, finite=finite)
        if isinstance(value, float):
            return [value] * math.prod(shape)
    elif not is_real(value):
        raise TypeError(f"{path} must be numbers >= 0, got {value!r} of type {type(value).__name__}")
    elif not _broadcasts(tuple(value.shape), shape):
        raise ValueError(
            f"{path} has shape {tuple(value.shape)}, which does not broadcast to that of the norms, {shape}"
        )
    if on_host(value):
        numbers = [float(x) for x in value.reshape(-1).tolist()]
        bad = [x for x in numbers if x < 0 or (finite and math.isnan(x))]
        if bad:
            raise ValueError(f"{path} must be numbers >= 0, got {bad[0]!r} among them")
    xp = array_api_compat.array_namespace(value)
    row = xp.reshape(xp.broadcast_to(value, shape), (-1,)) if shape else value
    return [float(x) for x in row.tolist()] if on_host(value) else [row]


def _is_row(value: Any) -> bool:
    """Whether it is an array of more than one number, or none: not 0-d."""
    return library(value) is not None and value.ndim > 0


def all_reduce(given: Any) -> AllReduce | None:
    """What joins shards, or None."""
    if given is None:
        return None
    instead = engine_instead(given)
    if instead or not callable(given):
        repair = f"pass {instead}" if instead else "take one of gradclip.distributed, for example psum('data')"
        raise TypeError(f"all_reduce must be a callable (partial, op) -> joined, got {given!r}: {repair}")
    return given  # type: ignore[no-any-return]


def bounds(clip_value: Any, flat: Flat) -> list[tuple[Any, Any]]:
    """`clip_value` as a pair for every leaf; a lower bound of None stands for minus the upper one."""
    clip_value = lasting(clip_value, "clip_value")
    if _is_pair(clip_value) and any(map(is_container, clip_value)):
        sides = (flat.spread(side, name) for side, name in zip(clip_value, ("lo", "hi"), strict=True))
        pairs = [_limits(f"{lo.path} and {hi.path}", (_real(*lo), _real(*hi))) for lo, hi in zip(*sides, strict=True)]
    else:
        if _is_pair(clip_value) or not is_container(clip_value):
            _limits("clip_value", clip_value)  # though there may be no leaves
        try:
            entries = flat.spread(clip_value, "clip_value", _is_pair)
        except ValueError as error:
            is_two = type(clip_value) is list and len(clip_value) == 2
            raise ValueError(f"{error}; a pair of bounds is a tuple, (lo, hi)" if is_two else str(error)) from None
        pairs = [_limits(*entry) for entry in entries]
    for i, (leaf, pair) in enumerate(zip(flat.values, pairs, strict=True)):
        for bound in pair:
            shape = tuple(getattr(bound, "shape", ()))
            if not _broadcasts(shape, tuple(leaf.shape)):
                where = "clip_value" + flat.paths()[i].removeprefix("grads")
                raise ValueError(
                    f"{where} has shape {shape}, which does not broadcast to the gradient's shape {tuple(leaf.shape)}"
                )
    return pairs


def _is_pair(x: Any) -> bool:
    return type(x) is tuple and len(x) == 2


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(to), strict=False))


def _limits(where: str, bound: Any) -> tuple[Any, Any]:
    """A bound or a pair of them as (lo, hi). Raise unless it makes sense, where the host can see it."""
    if not _is_pair(bound):
        high = _real(where, bound)
        if on_host(high) and not _all(high >= 0):
            raise ValueError(f"{where} must be >= 0 and not nan, got {high!r}; a pair (lo, hi) may be negative")
        return None, high
    low, high = (_real(where, side) for side in bound)
    if on_host(low) and on_host(high) and not _all(low <= high):
        raise ValueError(f"{where} must be a pair with lo <= hi and no nan, got lo={low!r}, hi={high!r}")
    for side in (low, high):
        if on_host(side) and not _all(side == side):
            raise ValueError(f"{where} must not be nan, got {side!r}")
    return low, high


def _real(where: str, bound: Any) -> Any:
    """A real number or array as it is, a Python int as a float: inf where it is beyond float64."""
    is_number = isinstance(bound, numbers.Real) and not isinstance(bound, bool)
    if not is_number and (library(bound) is None or not is_real(bound)):
        raise TypeError(
            f"{where} must be a real number or array, a pair (lo, hi), or a tree of these, "
            f"got {bound!r} of type {type(bound).__name__}"
        )
    return host_number(bound) if type(bound) is int else bound


def _all(truth: Any) -> bool:
    return bool(truth.all() if hasattr(truth, "all") else truth)

"""The settings of rules, checked when a rule is made."""

from __future__ import annotations

import math
from operator import index
from typing import Any

from gradclip._libraries import host_number


def real(rule: Any, name: str, least: float, most: float, *, open: bool = False) -> None:
    """A real number from `least` to `most`; `open`: these two are not allowed. It becomes a float."""
    value = getattr(rule, name)
    number = host_number(value)
    where = f"{type(rule).__name__}({name}=...)"
    wanted = f"a number {'between' if open else 'from'} {least:g} {'and' if open else 'to'} {most:g}"
    if number is None:
        raise TypeError(f"{where} must be {wanted}, known before tracing, got {value!r} of type {type(value).__name__}")
    if math.isnan(number) or not least <= number <= most or (open and number in (least, most)):
        raise ValueError(f"{where} must be {wanted}, got {value!r}")
    object.__setattr__(rule, name, number)


def whole(rule: Any, name: str, least: int) -> None:
    """A whole number that is no less than `least`."""
    value, where = getattr(rule, name), f"{type(rule).__name__}({name}=...)"
    if not hasattr(value, "__index__") or isinstance(value, bool):
        raise TypeError(f"{where} must be a whole number, got {value!r} of type {type(value).__name__}")
    if index(value) < least:
        raise ValueError(f"{where} must be at least {least}, got {value!r}")
    object.__setattr__(rule, name, index(value))

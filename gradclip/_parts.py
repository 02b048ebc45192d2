"""Real and complex elements alike: an array as its real components, and what can be said of them element by element."""

from __future__ import annotations

import math
from functools import reduce
from typing import TypeAlias

from gradclip._types import Array, Namespace

Parts: TypeAlias = tuple[Array, ...]
"""An array as its real components: `(x,)`, or `(re, im)`."""


def hypot(xp: Namespace, parts: Parts) -> Array:
    """|x| of real parts without overflow or underflow on the way."""
    if len(parts) == 1:
        return xp.abs(parts[0])
    a, b = xp.abs(parts[0]), xp.abs(parts[1])
    long, short = xp.maximum(a, b), xp.minimum(a, b)
    ratio = short / xp.where(long > 0, long, xp.ones_like(long))
    return xp.where(long >= math.inf, long, long * xp.sqrt(1 + ratio * ratio))


def longest_of(xp: Namespace, parts: Parts) -> Array:
    """The largest magnitude among the parts of each element; NaN if one of them is."""
    return reduce(xp.maximum, [xp.abs(part) for part in parts])


def pick(xp: Namespace, mask: Array, parts: Parts) -> Parts:
    return tuple(xp.where(mask, part, xp.zeros_like(part)) for part in parts)


def unit(xp: Namespace, parts: Parts) -> Parts:
    """x / |x| of every element, 0 at 0."""
    if len(parts) == 1:
        return (xp.sign(parts[0]),)
    longest = longest_of(xp, parts)
    safe = xp.where(longest > 0, longest, xp.ones_like(longest))
    scaled = tuple(part / safe for part in parts)
    size = hypot(xp, scaled)
    size = xp.where(size > 0, size, xp.ones_like(size))
    return tuple(part / size for part in scaled)

"""What a norm must tell: what a leaf contributes, how contributions join, how they end. `_norms` holds the norms.

A law describes one norm as one or two passes over the data. A pass turns a leaf into a partial, a small array
of fixed size; partials join element by element with the pass's operation; `finish` turns the joined ones
into the norm, kept as `root * step**exponent` so that it can lie outside the range of its dtype.

Three conventions make every law safe from the first subnormal to the last finite number:

- Powers of two do the scaling, so it is exact. Sums are kept in bins for big, middle and small magnitudes
  (Blue, ACM TOMS 4, 1978; Anderson, ACM TOMS 44, 2017, Algorithm 978), with room for 2**48 elements in each.
- `root` is inf or NaN exactly when some element is: finite gradients always have a finite root.
- A leaf arrives as its real parts: `(x,)`, or `(re, im)` for a complex one, in the accumulation dtype.
  It is `narrow` when no square of its elements can leave that dtype's range: then bins are not needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from gradclip._numbers import Measured, Parts
from gradclip._types import Array, Namespace, ReduceOp

Total: TypeAlias = Callable[..., Array]
"""`total(x, axis=None)`: a sum that is exact to a few units in the last place, however many the elements."""


@dataclass(frozen=True)
class Law:
    """A norm. `ops`: the operation of each pass; `sizes`: the length of its partial."""

    ops: tuple[ReduceOp, ...] = ("sum",)
    sizes: tuple[int, ...] = (3,)

    def contribute(self, xp: Namespace, parts: Parts, total: Total, narrow: bool, seen: tuple[Array, ...]) -> Array:
        """The partial of one leaf. `seen`: the joined partials of the passes before this one."""
        raise NotImplementedError

    def finish(self, xp: Namespace, joined: tuple[Array, ...], narrow: bool) -> Measured:
        """The norm that the joined partials stand for."""
        raise NotImplementedError

    def direction(self, xp: Namespace, parts: Parts, norm: Measured) -> tuple[Parts, Array | None]:
        """u with d||g|| = <u, dg>, and a weight: where given, <u, dg> is to be divided by its sum."""
        raise NotImplementedError


def identity(op: ReduceOp) -> float:
    """What joins without effect: the partial of no elements."""
    return math.inf if op == "min" else 0.0


def join(xp: Namespace, op: ReduceOp, partials: list[Array], total: Total) -> Array:
    """The partials of several leaves as one."""
    if len(partials) == 1:
        return partials[0]
    table = xp.stack(partials, axis=-1)
    if op == "sum":
        return total(table, -1)
    return xp.max(table, axis=-1) if op == "max" else xp.min(table, axis=-1)

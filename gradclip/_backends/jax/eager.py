"""Calls without `jit`, on arrays of one device: as few programs as can be, each of them small enough to compile fast.

To start a program takes 0.05 ms, and to put a number on a device as long. So what a call asks for is only noted until
a result is wanted, and one program gives it; numbers of the host go into that as they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradclip._backends.generic import Backend
from gradclip._backends.jax import decisions, reductions
from gradclip._decide import Bounds, Verdict
from gradclip._groups import Groups
from gradclip._norms import Norm, Seen
from gradclip._scaled import Factors
from gradclip._types import Array, Nonfinite, ReduceOp

#: What a verb makes of leaves.
End = Callable[[Groups, list[Array], Factors], list[Array]]

#: So many leaves of one shape share a program. To clip 1,000 leaves of 1,024 for the first time takes 0.6 s so, with
#: one program for all of them 2.7 s, and afterwards 7.4 ms and 5.9.
_SHARE = 100


def home(arrays: Sequence[Array]) -> Any:
    """The one device that holds all of these arrays; None where they are apart, spread, traced, or none."""
    kinds = set(map(type, arrays))
    if not kinds or any(issubclass(kind, jax.core.Tracer) or not issubclass(kind, jax.Array) for kind in kinds):
        return None
    place = arrays[0].sharding
    if len(place.device_set) > 1 or not all(x.sharding is place or x.sharding == place for x in arrays):
        return None
    return next(iter(place.device_set))


def shares(leaves: Sequence[Array], groups: Groups) -> list[list[int]]:
    """Which leaves, by number, a program takes: of many on one device, equal numbers of those that are alike."""
    alike: dict[Any, list[int]] = defaultdict(list)
    if len(leaves) < 2 * _SHARE or groups.count != 1 or groups.kept or home(leaves) is None:
        return [[*range(len(leaves))]]
    for i, x in enumerate(leaves):
        alike[x.shape, x.dtype].append(i)
    whole = {kind: len(some) // _SHARE * _SHARE if len(some) >= 2 * _SHARE else 0 for kind, some in alike.items()}
    found = [some[i : i + _SHARE] for kind, some in alike.items() for i in range(0, whole[kind], _SHARE)]
    rest = [i for kind, some in alike.items() for i in some[whole[kind] :]]
    return found + [rest] * bool(rest)


def each(
    leaves: Sequence[Array], groups: Groups, run: Callable[[list[Array], Groups], Any]
) -> tuple[list[list[int]], list[Any]]:
    """Each share of the leaves, and what `run` gives for it and its own groups."""
    of = shares(leaves, groups)
    if len(of) == 1:
        return of, [run(list(leaves), groups)]
    return of, [run([leaves[i] for i in some], _one(len(some), groups)) for some in of]


def _one(n: int, groups: Groups) -> Groups:
    """So many leaves of a single group."""
    return Groups((0,) * n, (None,) * n, groups.shapes, groups.wide)


class Noted(NamedTuple):
    """Partials that are still to be found, of a few leaves on one device."""

    leaves: list[Array]
    groups: Groups
    device: Any


class Line(NamedTuple):
    """What a program does, apart from arrays."""

    backend: Backend
    norm: Norm
    measured: Groups | None  # None: the partials are known
    groups: Groups
    nonfinite: Nonfinite
    relative: bool
    end: End | None = None  # what the factors are for


class Later:
    """A verdict that is still to be found, together with what its factors are for."""

    def __init__(self, line: Line, seen: Seen, arrays: list[Array], bounds: Bounds, device: Any) -> None:
        self._line, self._seen, self._arrays, self._bounds, self._device = line, seen, arrays, bounds, device

    @cached_property
    def found(self) -> Verdict:
        with at(self._device):
            found: Verdict = _run(self._line, 0, self._seen, self._arrays, self._bounds)
            return found

    @cached_property
    def norms(self) -> list[Array]:
        return self.found.norms

    @property
    def finite(self) -> Array:
        return self.found.finite

    @property
    def joined_finite(self) -> Array:
        return self.found.joined_finite

    @property
    def factors(self) -> Any:
        """Where they are not found yet, this: for `used`."""
        return self.found.factors if "found" in self.__dict__ else self

    def used(self, end: End, leaves: Sequence[Array]) -> list[Array] | None:
        """What `end` makes of the leaves, the first of those that were measured; None if it wants programs of its own."""
        arrays, device = self._arrays or list(leaves), self._device
        if not self._arrays:
            place = home(leaves)
            if place is None or device not in (None, place) or len(shares(leaves, self._line.groups)) > 1:
                return None
            device = place
        with at(device):
            out: list[Array]
            out, self.norms = _run(self._line._replace(end=end), len(leaves), self._seen, arrays, self._bounds)
        return out


def at(device: Any) -> AbstractContextManager[Any]:
    """While open, arrays stay on that device that were not put there on purpose."""
    return nullcontext() if device is None else jax.default_device(device)


@partial(jax.jit, static_argnums=(0, 1))
def _run(line: Line, count: int, seen: Seen, arrays: list[Array], bounds: Bounds) -> Any:
    """The verdict; or what is made of the first `count` arrays, and the norms."""
    if line.measured is not None:
        seen = Backend.partials(line.backend, arrays, line.norm, line.measured, None)
    found = decisions.decided(line.backend, line.norm, seen, bounds, line.groups, line.nonfinite, line.relative)
    return found if line.end is None else (line.end(line.groups, arrays[:count], found.factors), found.norms)


@partial(jax.jit, static_argnums=(1,))
def joined(found: list[Array], op: ReduceOp) -> Array:
    """The partials of several shares, each of one group, as one."""
    rows = [[x[k] for x in found] for k in range(len(found[0]))]
    return jnp.stack([reductions.joined(row, np.zeros(len(row), int), 1, op, len(row)) for row in rows])

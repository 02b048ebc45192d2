"""Calls without `jit`, on arrays of one device: as few programs as can be, each of them small enough to compile fast.

To start a program takes 0.05 ms, and to put a number on a device as long. So what a call asks for is only noted until
a result is wanted, and one program gives it; numbers of the host go into that as they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradclip._backends.generic import Backend
from gradclip._backends.jax import decisions, products, reductions, sums
from gradclip._backends.jax.sums import Measured
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


class Here(NamedTuple):
    """Leaves on one device, none of them traced, and which of them, by number, a program takes."""

    device: Any
    leaves: list[Array]
    groups: Groups
    shares: list[list[int]]

    def each(self, run: Callable[[list[Array], Groups], Any]) -> list[Any]:
        """What `run` gives for each share and its groups."""
        if len(self.shares) == 1:
            return [run(self.leaves, self.groups)]
        shapes, wide = self.groups.shapes, self.groups.wide  # of the one group that there is
        return [
            run([self.leaves[i] for i in some], Groups((0,) * len(some), (None,) * len(some), shapes, wide))
            for some in self.shares
        ]

    def in_order(self, each: list[list[Array]]) -> list[Array]:
        """What there is for each leaf, from what there is for each share."""
        found = dict(zip(chain.from_iterable(self.shares), chain.from_iterable(each), strict=True))
        return [found[i] for i in range(len(found))]


def here(leaves: Sequence[Array], groups: Groups) -> Here | None:
    """The leaves, where they are on one device. Of many alike ones, which are one group, equal numbers are a share."""
    device = home(leaves)
    if device is None:
        return None
    if len(leaves) < 2 * _SHARE or groups.count != 1 or groups.kept:
        return Here(device, list(leaves), groups, [[*range(len(leaves))]])
    alike: dict[Any, list[int]] = defaultdict(list)
    for i, kind in enumerate(map(_kind, leaves)):
        alike[kind].append(i)
    whole = {kind: len(some) // _SHARE * _SHARE if len(some) >= 2 * _SHARE else 0 for kind, some in alike.items()}
    shares = [some[i : i + _SHARE] for kind, some in alike.items() for i in range(0, whole[kind], _SHARE)]
    rest = [i for kind, some in alike.items() for i in some[whole[kind] :]]
    return Here(device, list(leaves), groups, shares + [rest] * bool(rest))


def home(arrays: Sequence[Array]) -> Any:
    """The one device that holds all of these arrays; None where they are apart, spread, traced, or none."""
    kinds = set(map(type, arrays))
    if not kinds or any(issubclass(kind, jax.core.Tracer) or not issubclass(kind, jax.Array) for kind in kinds):
        return None
    places = list(map(_place, arrays))
    alone = places.count(places[0]) == len(places) and len(places[0].device_set) == 1
    return next(iter(places[0].device_set)) if alone else None


_kind, _place = attrgetter("shape", "dtype"), attrgetter("sharding")


def _of_share(norm: Norm, seen: Seen, leaves: list[Array], groups: Groups) -> Array:
    return sums.one_pass(leaves, norm, groups, seen, True).joined[0]


def partials(here: Here, norm: Norm) -> Seen:
    """The partials of several shares, joined."""
    seen: Seen = ()
    for op in norm.ops:
        found = here.each(partial(_of_share, norm, seen))
        seen += (_joined(found, op),)
    return seen


@partial(jax.jit, static_argnums=1)
def _joined(found: list[Array], op: ReduceOp) -> Array:
    """Partials of one group as one."""
    rows = [[x[k] for x in found] for k in range(len(found[0]))]
    return jnp.stack([reductions.joined(row, np.zeros(len(row), int), 1, op, len(row)) for row in rows])


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
    """A verdict that is still to be found, together with what its factors are for.

    `seen`: the partials, where they are known; else `here` are the leaves that are measured.
    """

    def __init__(self, line: Line, seen: Measured, bounds: Bounds, here: Here | None) -> None:
        self._line, self._seen, self._bounds, self.here = line, seen, bounds, here
        self.device = home(seen.joined) if here is None else here.device

    @cached_property
    def found(self) -> Verdict:
        line, leaves = self._line, self.here.leaves if self.here else []
        if self.here is None:  # then it is the same for any leaves
            line = line._replace(groups=Groups((), (), line.groups.shapes, line.groups.wide))
        found: Verdict = _run(line, 0, self._seen, leaves, self._bounds)
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

    def used(self, end: End, here: Here, count: int) -> list[Array]:
        """What `end` makes of the first so many leaves."""
        out: list[Array]
        out, self.norms = _run(self._line._replace(end=end), count, self._seen, here.leaves, self._bounds)
        return out


def ended(
    end: End, alone: End, leaves: Sequence[Array], factors: Any, groups: Groups
) -> tuple[list[Array] | None, Factors]:
    """What `end` makes of leaves on one device, and the factors. None for other leaves: they may be apart, or traced.

    `alone`: the same, compiled by itself.
    """
    later = factors if isinstance(factors, Later) else None
    found = (later and later.here) or here(leaves, groups)
    if later is not None:
        if found and len(found.shares) == 1 and later.device in (None, found.device):
            return later.used(end, found, len(leaves)), factors
        factors = later.found.factors
    if found is None or len(found.shares) == 1 or home([factors.factor]) != found.device:
        return None, factors
    return found.in_order(found.each(lambda some, own: alone(own, some, factors))), factors


def weighted(groups: Groups, leaves: list[Array], factors: Factors) -> list[Array]:
    return products.weighted(leaves, factors)


@partial(jax.jit, static_argnums=(0, 1))
def _run(line: Line, count: int, seen: Measured, arrays: list[Array], bounds: Bounds) -> Any:
    """The verdict; or what is made of the first `count` arrays, and the norms."""
    if line.measured is not None:
        seen = sums.measured(line.backend, line.norm, line.measured, None, arrays)
    found = decisions.decided(line.backend, line.norm, seen, bounds, line.groups, line.nonfinite, line.relative)
    return found if line.end is None else (line.end(line.groups, arrays[:count], found.factors), found.norms)

"""One call of a verb: what it was given, checked, and what was found: measured, joined with other shards, decided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gradclip import _arguments
from gradclip._backends.generic import Backend
from gradclip._decide import Bounds, Verdict
from gradclip._dtypes import dtype_name, fits
from gradclip._groups import Grouped, Groups, grouped
from gradclip._leaves import active, backend_for, parameters
from gradclip._nonfinite import raise_if_bad
from gradclip._norms import Norm, Seen, norm_for
from gradclip._shards import Shards
from gradclip._types import AllReduce, Array, Call, Leaf, Nonfinite, NormType, Per, Tree


class Given(NamedTuple):
    """What a verb was given, checked."""

    grouped: Grouped
    backend: Backend
    leaves: Sequence[Array]
    norm: Norm
    bounds: Bounds  # each a number, a 0-d array, or a list of them for one group after the other
    nonfinite: Nonfinite
    shards: Shards | None
    params: Sequence[Array] | None  # where bounds are relative to them

    @property
    def groups(self) -> Groups:
        return self.grouped.groups


def given(
    grads: Tree,
    norm_type: NormType,
    per: Per,
    bounds: Bounds | None,
    nonfinite: Nonfinite,
    all_reduce: AllReduce | None,
    params: tuple[Tree] | None = None,
    name: str = "max_norm",
) -> Given:
    """Check everything, before any work. No bounds: norms are all that is asked for. `params`: in a tuple, a tree like
    the gradients. `name`: of `max_norm`.
    """
    norm_type, nonfinite = _arguments.norm_type(norm_type), _arguments.policy(nonfinite)
    all_reduce = _arguments.all_reduce(all_reduce)
    flat = active(grads)
    backend = backend_for(flat)  # what is no gradient is told before it is grouped
    parts = grouped(flat, per)
    bounds, arrays = (Bounds(), []) if bounds is None else _checked(bounds, parts, name)
    beside = None if params is None else parameters(*params, parts.flat)
    if arrays or beside or parts.flat is not flat:
        flat, backend = parts.flat, backend_for(parts.flat, arrays, beside or [])
    leaves: Sequence[Array] = flat.values
    others: Sequence[Array] | None = None
    if beside is None:
        backend, leaves = backend.adopt(leaves, arrays)
    else:  # one backend works on both
        backend, both = backend.adopt([*leaves, *[x.value for x in beside]], arrays)
        leaves, others = both[: len(leaves)], both[len(leaves) :]
    # Sums need bins where a square may leave the range; and among shards, for others may hold wider leaves.
    measured = [*map(leaves.__getitem__, flat.samples), *(others or ())]
    acc = backend.accumulation([*leaves, *others] if others else leaves)
    fit = False not in [fits(dtype_name(x), acc) for x in measured]
    norm = norm_for(norm_type, binned=all_reduce is not None or not fit)
    shards = None
    if all_reduce is not None and bounds.norm is None:  # else nothing is measured
        call, groups = Call(norm_type, nonfinite, parts.described()), parts.groups
        members = list(map(Leaf, flat.paths(), flat.values))
        if beside is not None:
            members, groups = members + beside, groups.beside()
        shards = Shards(all_reduce, flat, members, groups, call, norm.ops[-1])
    return Given(parts, backend, leaves, norm, bounds, nonfinite, shards, others)


def _checked(bounds: Bounds, grouped: Grouped, name: str) -> tuple[Bounds, list[Array]]:
    """The bounds, and the arrays among them."""
    max_norm, norm, divisor, unit = bounds
    max_norm = _arguments.scalars(name, max_norm, grouped)
    if type(max_norm) is float and norm is divisor is unit is None:
        return Bounds(max_norm), []
    bounds = Bounds(
        max_norm,
        None if norm is None else _arguments.scalars("norm", norm, grouped, finite=False),
        None if divisor is None else _arguments.scalar("divide_by", divisor, positive=True),
        None if unit is None else _arguments.scalar("eps", unit, positive=True),
    )
    found = [x for bound in bounds for x in (bound if type(bound) is list else (bound,))]
    return bounds, [x for x in found if x is not None and type(x) is not float]


def settled(given: Given) -> Verdict:
    """Measure, join, decide; raise if the policy asks for it. Nothing is written."""
    return decided(given, () if given.bounds.norm is not None else measured(given))


def measured(given: Given) -> Seen:
    """The partials of the norms, joined with other shards."""
    leaves, groups, shards = given.leaves, given.groups, given.shards
    if given.params is not None:
        leaves, groups = [*leaves, *given.params], groups.beside()
    groups, join = (groups, None) if shards is None else (shards.measured, shards.join)
    return given.backend.partials(leaves, given.norm, groups, join)


def decided(given: Given, partials: Seen) -> Verdict:
    """What is to be done, by these partials; raise if the policy asks for it."""
    backend, bounds, relative = given.backend, given.bounds, given.params is not None
    if bounds.max_norm is not None:
        bounds = backend.bounds(bounds, given.leaves if given.params is None else [*given.leaves, *given.params])
    verdict = backend.decide(given.norm, partials, bounds, given.groups, given.nonfinite, relative)
    if given.nonfinite == "error":
        raise_if_bad(backend, given.leaves, given.grouped.flat, verdict, given.shards)
    return verdict

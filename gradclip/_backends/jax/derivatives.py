"""Derivatives: d||g|| = Re<u, dg>, u the norm's direction; for p = 2 that is g / ||g||, and 0 at g = 0.

The rule stands around the whole measurement, collectives included. Two tangents are not what they seem, between the
functions of this file only: slot 0 of the last partial carries that of the norm's mantissa (`partials` to `finish`);
and that of a factor is the relative one, d(factor) / factor (`divided` to `scaled`): the absolute one is about
1 / ||g||**2, which is no normal float32 for norms from 1e19.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradclip._backends.generic import Backend
from gradclip._backends.jax import plain_sums, products, reductions
from gradclip._backends.jax.platforms import by_platform
from gradclip._backends.jax.reductions import parts, reduced
from gradclip._backends.jax.sums import Measured, measured
from gradclip._backends.leaf import against
from gradclip._groups import Groups
from gradclip._norms import Norm, RmsNorm, Seen, SumNorm
from gradclip._scaled import Factors, Scaled, quotient
from gradclip._types import Array

_XP = Backend(jnp)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def partials(backend: Backend, norm: Norm, groups: Groups, join: Any, leaves: list[Array]) -> Measured:
    """`sums.measured`."""
    return measured(backend, norm, groups, join, leaves)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def whole(norm: Norm, found: Measured) -> Seen:
    """The partials, also where the total stands in their place."""

    def of_total(found: Measured) -> Seen:
        assert isinstance(norm, SumNorm)
        number = jnp.ones_like(found.joined[0][0]) if isinstance(norm, RmsNorm) else None
        return (plain_sums.in_bins(norm, found.total, number),)

    if found.total is None:
        return found.joined
    return by_platform(found, cpu=of_total, cuda=of_total, rocm=of_total, default=lambda found: found.joined)


@whole.defjvp
def _whole_jvp(norm: Norm, primals: Any, tangents: Any) -> Any:
    return whole(norm, *primals), tangents[0].joined


@partials.defjvp
def _partials_jvp(backend: Backend, norm: Norm, groups: Groups, join: Any, primals: Any, tangents: Any) -> Any:
    found = partials(backend, norm, groups, join, *primals)
    joined = whole(norm, found)
    acc, count = joined[-1].dtype, joined[-1].shape[1]
    ends = finish(norm, tuple(x[:, :count] for x in joined))
    owners = [range(i, i + groups.lengths[k]) for i, k in zip(groups.base, groups.block, strict=True)]

    def slope_of(leaf: Array, tangent: Array, own: range, keep: int | None) -> tuple[Array, Array | None]:
        """<u, dg> of each group, and the sum of the weights."""
        if keep is None:
            leaf, tangent, keep = leaf[None], tangent[None], 0
        first = own[0] % count
        end = jax.tree.map(lambda x: x[first : first + len(own)].reshape(against(leaf, keep)), ends)
        u, weight = norm.direction(jnp, parts(leaf, acc), end)
        # Linear in the tangent: this can be transposed.
        each = [reduced(a * dg, "sum", 0, keep) for a, dg in zip(u, parts(tangent, acc), strict=True)]
        return sum(each[1:], each[0]), None if weight is None else reduced(weight, "sum", 0, keep)

    def total(each: Sequence[Array]) -> Array:
        row = reductions.joined(list(each), np.concatenate(some), groups.count, "sum", limit=0)
        return (row if join is None else join(row[None], "sum")[0])[:count]

    members = [x for x in zip(*primals, *tangents, owners, groups.keep, strict=True) if len(x[2])]
    some = [x[2] for x in members]
    slopes, ties = zip(*(slope_of(*x) for x in members), strict=True)
    slope = total(slopes)
    if ties[0] is not None:  # several elements that share the extreme magnitude get a part each
        slope = slope / jnp.maximum(total(ties), 1)
    last = jnp.concatenate([ends.over(jnp, slope)[None], jnp.zeros_like(joined[-1][1:])])
    zeros = jax.tree.map(jnp.zeros_like, found)
    return found, zeros._replace(joined=(*zeros.joined[:-1], last))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def finish(norm: Norm, joined: Seen) -> Scaled:
    """The norms that joined partials stand for."""
    return norm.finish(jnp, joined)


@finish.defjvp
def _finish_jvp(norm: Norm, primals: Any, tangents: Any) -> Any:
    found = finish(norm, *primals)
    return found, jax.tree.map(jnp.zeros_like, found)._replace(mantissa=tangents[0][-1][0])


@jax.custom_jvp
def divided(bound: Scaled, norm: Scaled) -> Factors:
    """`quotient`."""

    def at_once(bound: Scaled, norm: Scaled) -> Factors:
        return quotient(jnp, bound, norm)

    def on_condition(bound: Scaled, norm: Scaled) -> Factors:
        """1 / 1 is not computed; and XLA fuses nothing across a condition.

        Else its CPU compiler would compute the quotient again for every leaf: with 200 leaves, compiling took 1.9 s.
        """
        ones = [x == 1 for x in (bound.mantissa, norm.mantissa)]
        zeros = [x == 0 for x in (bound.exponent, norm.exponent) if x is not None]
        neither = jnp.all(reduce(jnp.logical_and, ones + zeros))
        return lax.cond(neither, lambda b, n: Factors(b.mantissa, n.mantissa), at_once, bound, norm)

    if norm.exponent is None and bound.exponent is None:
        return at_once(bound, norm)
    return by_platform(bound, norm, cpu=on_condition, default=at_once)


@divided.defjvp
def _divided_jvp(primals: Any, tangents: Any) -> Any:
    (bound, norm), (d_bound, d_norm) = primals, tangents
    factors = divided(bound, norm)
    by_bound = d_bound.mantissa / jnp.where(bound.mantissa == 0, jnp.full_like(bound.mantissa, jnp.inf), bound.mantissa)
    relative = by_bound - d_norm.mantissa / norm.mantissa
    return factors, jax.tree.map(jnp.zeros_like, factors)._replace(factor=relative)


@jax.custom_jvp
def _absolute(factor: Array) -> Array:
    """The factor, with its tangent as it really is."""
    return factor


@_absolute.defjvp
def _absolute_jvp(primals: Any, tangents: Any) -> Any:
    factor = _absolute(*primals)
    return factor, factor * tangents[0]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def scaled(groups: Groups, leaves: list[Array], factors: Factors) -> list[Array]:
    """Every element times the factor of its group."""
    return products.scaled(groups, leaves, factors)


@scaled.defjvp
def _scaled_jvp(groups: Groups, primals: Any, tangents: Any) -> Any:
    (leaves, factors), (d_leaves, relative) = primals, tangents
    outs = scaled(groups, leaves, factors)
    absolute = factors._replace(factor=_absolute(factors.factor))
    rows = products.by_block([relative.factor, *absolute.steps], groups)

    def slope(out: Array, d_leaf: Array, block: int, keep: int | None) -> Array:
        # Not by bits: this is linear in the tangents, and is transposed.
        by, *steps = (products.shaped(row, out, keep) for row in rows[block])
        straight = _XP._scaled(d_leaf, steps)
        wide = np.result_type(out.dtype, by.dtype)
        return straight + (out.astype(wide) * by.astype(wide)).astype(out.dtype)

    return outs, [slope(*these) for these in zip(outs, d_leaves, groups.block, groups.keep, strict=True)]


@jax.custom_jvp
def weighted(leaves: list[Array], factors: Factors) -> list[Array]:
    """The sum over axis 0 of every leaf, each example times its factor."""
    return products.weighted(leaves, factors)


@weighted.defjvp
def _weighted_jvp(primals: Any, tangents: Any) -> Any:
    (leaves, factors), (d_leaves, relative) = primals, tangents
    totals = weighted(leaves, factors)
    absolute = factors._replace(factor=_absolute(factors.factor))

    def slope(total: Array, leaf: Array, d_leaf: Array) -> Array:
        by, *steps = (products.shaped(row, leaf, 0) for row in (relative.factor, *absolute.steps))
        wide = np.result_type(leaf.dtype, by.dtype)
        leaf = jnp.where(steps[len(steps) // 2] == 0, jnp.zeros_like(leaf), leaf)  # what it holds may be NaN
        change = d_leaf.astype(wide) + leaf.astype(wide) * by.astype(wide)
        return jnp.sum(_XP._product(change, steps), axis=0).astype(total.dtype)

    return totals, list(map(slope, totals, leaves, d_leaves))

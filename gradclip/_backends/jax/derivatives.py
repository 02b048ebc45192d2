"""Derivatives: d||g|| = Re<u, dg>, u the norm's direction; for p = 2 that is g / ||g||, and 0 at g = 0.

The rule stands around the whole measurement, collectives included. Two tangents are not what they seem, between the
functions of this file only: slot 0 of the last partial carries that of the norm's mantissa (`partials` to `finish`);
and that of a factor is the relative one, d(factor) / factor (`divided` to `scaled`): the absolute one is about
1 / ||g||**2, which is no normal float32 for norms from 1e19.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradclip._backends.generic import Backend, entry
from gradclip._backends.jax import sums
from gradclip._backends.jax.arrays import may_be_sharded
from gradclip._groups import Groups
from gradclip._norms import Norm, Seen
from gradclip._scaled import Factors, Scaled, quotient
from gradclip._types import Array

_XP = Backend(jnp)

#: So many numbers of a row are cut out of it one by one.
FEW = 32


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def partials(measure: Callable[..., Seen], norm: Norm, groups: Groups, join: Any, leaves: list[Array]) -> Seen:
    """The partial of every pass, joined."""
    return measure(leaves, norm, groups, join)


@partials.defjvp
def _partials_jvp(measure: Any, norm: Norm, groups: Groups, join: Any, primals: Any, tangents: Any) -> Any:
    joined = partials(measure, norm, groups, join, *primals)
    acc, count = joined[-1].dtype, joined[-1].shape[1]
    ends = finish(norm, tuple(x[:, :count] for x in joined))
    slopes, ties = [], []
    for leaf, tangent, group in zip(*primals, *tangents, groups.base, strict=True):
        end = jax.tree.map(lambda x, i=group % count: x[i], ends)
        u, weight = norm.direction(jnp, sums.parts(leaf, acc), end)
        # Linear in the tangent: this can be transposed.
        slopes.append(sum(jnp.sum(a * dg) for a, dg in zip(u, sums.parts(tangent, acc), strict=True)))
        ties += [] if weight is None else [jnp.sum(weight)]

    def total(each: list[Any]) -> Array:
        row = sums.joined([jnp.stack(each)], list(groups.base), groups.count, "sum", limit=0)
        return (row if join is None else join(row[None], "sum")[0])[:count]

    slope = total(slopes)
    if ties:  # several elements that share the extreme magnitude get a part each
        slope = slope / jnp.maximum(total(ties), 1)
    last = jnp.concatenate([ends.over(jnp, slope)[None], jnp.zeros_like(joined[-1][1:])])
    return joined, (*map(jnp.zeros_like, joined[:-1]), last)


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
    return lax.platform_dependent(bound, norm, cpu=on_condition, default=at_once)


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


def split(x: Array) -> list[Array]:
    """The entries along the first axis, of which each keeps a length of 1.

    XLA's CPU compiler makes a kernel for each constant offset, in 10 to 20 ms. So there a long axis is cut into blocks
    of 100, and these into blocks of 10, with conditions between that it joins no cuts across: blocks share kernels.
    """

    def blocks(some: list[Array], size: int) -> list[Array]:
        return [y for x in some for y in lax.split(x, [min(size, len(x) - i) for i in range(0, len(x), size)])]

    def in_blocks(some: list[Array]) -> list[Array]:
        first = x[(0,) * x.ndim]
        for size in (1000, 100, 10):
            if size < len(x):
                cut = partial(blocks, size=size)
                some = lax.cond(first == first, cut, cut, some)
        return blocks(some, 1)

    if len(x) <= FEW:
        return blocks([x], 1)
    return lax.platform_dependent([x], cpu=in_blocks, default=partial(blocks, size=1))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def scaled(groups: Groups, leaves: list[Array], factors: Factors) -> list[Array]:
    """Every leaf times the factor of its group."""
    factor, steps = factors.factor, factors.steps
    keep = factor == 1 if len(steps) == 1 else jnp.logical_and(factor == 1, steps[0] == 1)
    live = [jnp.where(step == 0, jnp.ones_like(step), step) for step in steps]  # 0 * inf is NaN

    def one_by_one(leaves: list[Array], *rows: Array) -> list[Array]:
        by = list(zip(*(lax.split(row, [1] * row.size) for row in map(jnp.ravel, rows)), strict=True))
        return [_scaled(leaf, *by[group % len(by)]) for leaf, group in zip(leaves, groups.base, strict=True)]

    def in_stacks(leaves: list[Array], *rows: Array) -> list[Array]:
        out, stacks = list(leaves), sums.stacks(leaves)
        order = np.array([groups.base[i] for some in stacks for i in some])
        by = zip(*(lax.split(row[order, None], list(map(len, stacks))) for row in rows), strict=True)
        for some, these in zip(stacks, by, strict=True):
            x = jnp.stack([leaves[i].reshape(-1) for i in some])
            for i, leaf in zip(some, split(_scaled(x, *these)), strict=True):
                out[i] = leaf.reshape(leaves[i].shape)
        return out

    rows = keep, factor == 0, *live
    if factor.size <= FEW or any(map(may_be_sharded, leaves)):
        return one_by_one(leaves, *rows)
    return lax.platform_dependent(leaves, *rows, cpu=in_stacks, default=one_by_one)


# The norm casts a bfloat16 leaf to float32. Where such a cast has a second use, XLA's CPU compiler writes out the wide
# array, and a select has casts in it, too. By bits, the clip of 24 million elements takes 7 ms, and took 65.


@jax.jit
def _scaled(leaf: Array, keep: Array, nothing: Array, *steps: Array) -> Array:
    """Under a `jit` of its own it is traced once for all leaves of one type."""
    if keep.size == 1:
        keep, nothing, steps = jax.tree.map(lambda x: x.reshape(()), (keep, nothing, steps))
    acc = np.result_type(leaf.dtype, steps[0].dtype)
    by_bits = leaf.dtype == jnp.bfloat16 and acc == jnp.float32
    product = _widened(leaf) if by_bits else leaf.astype(acc)
    for step in steps:
        product = product * step.astype(acc)
    product = product.astype(leaf.dtype)
    if by_bits:
        product, leaf = product.view(jnp.uint16), leaf.view(jnp.uint16)
    product = jnp.where(keep, leaf, product)
    product = jnp.where(nothing, jnp.zeros_like(product), product)
    return product.view(jnp.bfloat16) if by_bits else product


def _widened(x: Array) -> Array:
    """bfloat16 as float32."""
    return (x.view(jnp.uint16).astype(jnp.uint32) << np.uint32(16)).view(jnp.float32)


@scaled.defjvp
def _scaled_jvp(groups: Groups, primals: Any, tangents: Any) -> Any:
    (leaves, factors), (d_leaves, relative) = primals, tangents
    outs = scaled(groups, leaves, factors)
    absolute = factors._replace(factor=_absolute(factors.factor))

    def slope(out: Array, d_leaf: Array, group: int) -> Array:
        # Not by bits: this is linear in the tangents, and is transposed.
        straight = _XP._scaled(d_leaf, [entry(step, group) for step in absolute.steps])
        by = entry(relative.factor, group)
        wide = np.result_type(out.dtype, by.dtype)
        return straight + (out.astype(wide) * by.astype(wide)).astype(out.dtype)

    return outs, [slope(*these) for these in zip(outs, d_leaves, groups.base, strict=True)]

"""JAX: the generic kernels under `jax.jit`, a derivative rule for the norm, and sums that XLA does not spoil."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import checkify

from gradclip._kernels.dtypes import dtype_name
from gradclip._kernels.generic import Kernels
from gradclip._kernels.jax_leaves import SHORT, replicate, strung
from gradclip._kernels.jax_sums import PLAIN_IS_EXACT, compensated, in_float64, total_on_cpu
from gradclip._law import Law, Total, join
from gradclip._norms import SumNorm, TwoNorm
from gradclip._numbers import Measured, range_of
from gradclip._types import Array, Call


class JaxKernels(Kernels):
    """Kernels for `jax.Array`, traced or not."""

    def __init__(self) -> None:
        super().__init__(jnp)

    def adopt(self, leaf: Array) -> Array:
        if isinstance(leaf, np.ndarray | np.generic) and not leaf.dtype.isnative:
            leaf = leaf.astype(leaf.dtype.newbyteorder("="))
        return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)

    def device(self, leaf: Array) -> Any:
        if isinstance(leaf, jax.core.Tracer | np.generic):
            return None  # anywhere
        return frozenset(leaf.sharding.device_set)

    def move(self, x: Array, device: Any) -> Array:
        if device is None or self.device(x) in (device, None):
            return x
        return jax.device_put(x, min(device, key=lambda d: d.id)) if len(device) == 1 else replicate(x, device)

    def full(self, value: float, dtype: Any, device: Any) -> Array:
        return np.dtype(dtype).type(value)

    def accumulation(self, leaves: Sequence[Array]) -> Any:
        return self.reported(leaves)

    def total(self, x: Array, axis: int | None = None) -> Array:
        return compensated(x, axis) if x.ndim > 0 and x.size <= SHORT else jnp.sum(x, axis=axis)

    def is_traced(self, arrays: Sequence[Array]) -> bool:
        return any(isinstance(x, jax.core.Tracer) for x in arrays)

    def staged(self, plan: Callable[..., Any], arrays: Sequence[Array], all_reduce: Call | None) -> Callable[..., Any]:
        devices = self.devices(arrays)
        if len(devices) > 1 or all_reduce is not None:  # a caller's `all_reduce` may be any code
            return plan

        def call(kernels: JaxKernels, arrays: Sequence[Array], bounds: Any, **static: Any) -> Any:
            here = jax.tree.map(lambda x: self.move(x, devices[0]), bounds)
            return _jitted(plan)(kernels, arrays, here, **static)

        return call

    def unwritable(self, leaf: Array) -> str:
        return "is a JAX array, and those are immutable"

    def partials(self, leaves: Sequence[Array], law: Law, acc: Any, seen: tuple[Array, ...]) -> list[Array]:
        leaves = [x for x in leaves if x.size]
        if not leaves:
            return []
        merged, narrow = strung(leaves), all(self.is_narrow(x, acc) for x in leaves)

        # The cast to `acc` stands in the function that adds up. Outside, the wide array would be made: for 24 million
        # bfloat16 elements the norm took 47 ms with it, and takes 1 ms.
        def found(merged: list[Array], total: Total = self.total) -> Array:
            each = [law.contribute(jnp, self.parts(x, acc), total, narrow and not seen, seen) for x in merged]
            return join(jnp, law.ops[len(seen)], each, self.total)

        if law.ops[len(seen)] != "sum":
            return [found(merged)]

        def plain_first(law: TwoNorm, merged: list[Array], safely: Callable[[list[Array]], Array]) -> Array:
            """One plain sum of squares; more only where that left the safe range. To look takes 0.1 ms."""
            parts = [these for x in merged for these in law.apart(self.parts(x, acc))]
            plain = self.total(jnp.stack([total_on_cpu(law.term(jnp, these)) for these in parts]))
            bins, r = jnp.stack([0 * plain, plain, 0 * plain]), range_of(plain)
            safe = jnp.logical_and(plain >= r.thin, plain <= r.huge**2)
            return lax.cond(safe, lambda bins, x: bins, lambda bins, x: safely(x), bins, merged)

        def on_cpu(merged: list[Array]) -> Array:
            if narrow or acc == jnp.float64 or not isinstance(law, SumNorm):
                safely: Callable[[list[Array]], Array] = partial(found, total=total_on_cpu)
            else:
                safely = partial(in_float64, law, parts=self.parts)
                if not PLAIN_IS_EXACT:
                    return safely(merged)
            return safely(merged) if narrow or not isinstance(law, TwoNorm) else plain_first(law, merged, safely)

        return [lax.platform_dependent(merged, cpu=on_cpu, default=found)]

    def measure(self, leaves: Sequence[Array], law: Law, acc: Any, all_reduce: Call | None) -> Measured:
        return _measure(self, law, acc, all_reduce, list(leaves))

    def quotient(self, bound: Measured, norm: Measured) -> tuple[Array, Array | None]:
        return _quotient(self, bound, norm)

    def scale(self, leaves: Sequence[Array], factor: Array, shift: Array | None) -> list[Array]:
        devices = self.devices([*leaves, factor])
        if len(devices) > 1 and None not in devices:
            return super().scale(leaves, factor, shift)
        return _scale(self, list(leaves), factor, shift)

    def scaled(self, leaf: Array, factor: Array, shift: Array | None) -> Array:
        return _scaled(self, [leaf], factor, shift)[0]

    def insist(self, leaf: Array, path: str) -> None:
        nan = jnp.sum(jnp.isnan(leaf))
        inf = jnp.sum(jnp.isinf(leaf)) - jnp.sum(jnp.logical_and(jnp.isinf(leaf), jnp.isnan(leaf)))
        checkify.check(
            nan + inf == 0,
            "the gradients are not finite: "
            + f"{path} ({dtype_name(leaf)}, shape {leaf.shape})".replace("{", "{{").replace("}", "}}")
            + " holds {nan} NaN, {inf} inf",
            nan=nan,
            inf=inf,
        )


@lru_cache
def _jitted(plan: Callable[..., Any]) -> Callable[..., Any]:
    static = ("law", "nonfinite", "all_reduce")
    return jax.jit(plan, static_argnums=0, static_argnames=static, inline=True)


@partial(jax.jit, static_argnums=0, inline=True)
def _scale(kernels: JaxKernels, leaves: list[Array], factor: Array, shift: Array | None) -> list[Array]:
    return _scaled(kernels, leaves, factor, shift)


# Between _quotient and _scaled, the tangent of a factor is the relative one, d(factor) / factor: the absolute one is
# about 1 / ||g||**2, which is no normal float32 for norms from 1e19. _scaled multiplies it with the clipped leaf.


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _quotient(kernels: JaxKernels, bound: Measured, norm: Measured) -> tuple[Array, Array | None]:
    def at_once(bound: Measured, norm: Measured) -> tuple[Array, Array | None]:
        return Kernels.quotient(kernels, bound, norm)

    def on_condition(bound: Measured, norm: Measured) -> tuple[Array, Array | None]:
        """1 / 1 is not computed; and XLA fuses nothing across a condition.

        Else its CPU compiler would compute the quotient again for every leaf: with 200 leaves, compiling took 1.9 s.
        """
        neither = jnp.logical_and(bound.root == 1, norm.root == 1)
        for exponent in (bound.exponent, norm.exponent):
            neither = neither if exponent is None else jnp.logical_and(neither, exponent == 0)
        return lax.cond(neither, lambda b, n: (b.root, n.root), at_once, bound, norm)

    if norm.exponent is None and bound.exponent is None:
        return at_once(bound, norm)
    return lax.platform_dependent(bound, norm, cpu=on_condition, default=at_once)


@_quotient.defjvp
def _quotient_jvp(kernels: JaxKernels, primals: Any, tangents: Any) -> Any:
    (bound, norm), (d_bound, d_norm) = primals, tangents
    factor, shift = _quotient(kernels, bound, norm)
    by_bound = d_bound.root / jnp.where(bound.root == 0, jnp.full_like(bound.root, jnp.inf), bound.root)
    return (factor, shift), (by_bound - d_norm.root / norm.root, None if shift is None else jnp.zeros_like(shift))


@jax.custom_jvp
def _absolute(factor: Array) -> Array:
    """The factor, with its tangent as it really is."""
    return factor


@_absolute.defjvp
def _absolute_jvp(primals: Any, tangents: Any) -> Any:
    factor = _absolute(*primals)
    return factor, factor * tangents[0]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _scaled(kernels: JaxKernels, leaves: list[Array], factor: Array, shift: Array | None) -> list[Array]:
    keep, nothing = factor == 1, factor == 0
    if shift is not None:
        keep = jnp.logical_and(keep, shift == 1)
    live = jnp.where(nothing, jnp.ones_like(factor), factor)

    def scaled(leaf: Array) -> Array:
        acc = kernels.working(leaf, factor.dtype)
        by_bits = leaf.dtype == jnp.bfloat16 and acc == jnp.float32
        product = _widened(leaf) if by_bits else leaf.astype(acc)
        for step in (live,) if shift is None else (shift, live, shift):
            product = product * step.astype(acc)
        product = product.astype(leaf.dtype)
        if by_bits:
            product, leaf = _bits(product), _bits(leaf)
        product = lax.select(keep, leaf, product)
        product = lax.select(nothing, jnp.zeros_like(product), product)
        return lax.bitcast_convert_type(product, jnp.bfloat16) if by_bits else product

    return [scaled(leaf) for leaf in leaves]


# The norm casts a bfloat16 leaf to float32. Where such a cast has a second use, XLA's CPU compiler writes out the wide
# array, and a select has casts in it, too. By bits, the clip of 24 million elements takes 7 ms, and took 65.


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.uint16)


def _widened(x: Array) -> Array:
    """bfloat16 as float32."""
    wide = _bits(x).astype(jnp.uint32)
    return lax.bitcast_convert_type(lax.shift_left(wide, lax.full_like(wide, 16)), jnp.float32)


@_scaled.defjvp
def _scaled_jvp(kernels: JaxKernels, primals: Any, tangents: Any) -> Any:
    leaves, factor, shift = primals
    d_leaves, relative, _ = tangents
    outs = _scaled(kernels, leaves, factor, shift)
    # Not by bits: this is linear in the tangents, and is transposed.
    straight = [Kernels.scaled(kernels, d_leaf, _absolute(factor), shift) for d_leaf in d_leaves]

    def by_factor(out: Array) -> Array:
        wide = kernels.working(out, factor.dtype)
        return (out.astype(wide) * relative.astype(wide)).astype(out.dtype)

    return outs, [x + by_factor(out) for x, out in zip(straight, outs, strict=True)]


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _measure(kernels: JaxKernels, law: Law, acc: Any, all_reduce: Call | None, leaves: list[Array]) -> Measured:
    return Kernels.measure(kernels, leaves, law, acc, all_reduce)


@_measure.defjvp
def _measure_jvp(
    kernels: JaxKernels,
    law: Law,
    acc: Any,
    all_reduce: Call | None,
    primals: tuple[list[Array]],
    tangents: tuple[list[Array]],
) -> tuple[Measured, Measured]:
    """d||g|| = Re<u, dg>, u the law's direction; for p = 2 that is g / ||g||, and 0 at g = 0."""
    norm = _measure(kernels, law, acc, all_reduce, *primals)
    slopes, weights = [kernels.full(0.0, acc, None)], []
    kinds = [None] * len(primals[0]) if all_reduce is None else all_reduce.kinds
    for leaf, tangent, kind in zip(*primals, *tangents, kinds, strict=True):
        counts = all_reduce is None or all_reduce.counts(kind, leaf)
        if 0 in leaf.shape or counts is False:
            continue
        u, weight = law.direction(jnp, kernels.parts(leaf, acc), norm)
        for u_part, dg in zip(u, kernels.parts(tangent, acc), strict=True):
            slopes.append(kernels.counted(jnp.sum(u_part * dg), "sum", counts))  # linear in dg: it can be transposed
        if weight is not None:
            weights.append(kernels.counted(jnp.sum(weight), "sum", counts))
    slope, *ties = (jnp.stack([jnp.sum(jnp.stack(x))]) for x in (slopes, weights) if x)
    if all_reduce is not None:
        slope, *ties = (all_reduce(x, "sum") for x in (slope, *ties))
    if ties:  # several elements share the extreme magnitude: each gets its part
        slope = slope / jnp.maximum(ties[0], 1)
    slope = norm.over(jnp, slope[0])
    still = None if norm.exponent is None else jnp.zeros_like(norm.exponent)
    return norm, Measured(slope, still)

"""The policy in the numbers that a platform is good at: float64 where that is at hand takes a tenth of the program.

In float32 a norm is a mantissa and an exponent, and what is done with it takes hundreds of operations, most of what
compiling a small clip took. In float64, which JAX has also where it is not enabled, it is one number. A TPU has none of
its own: it goes the long way, as does what is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gradclip._backends.generic import Backend
from gradclip._backends.jax.platforms import by_platform
from gradclip._decide import Bounds, Verdict
from gradclip._groups import Groups
from gradclip._norms import ExtremeNorm, Norm, Seen, SumNorm
from gradclip._scaled import RANGES, Factors, Scaled
from gradclip._types import Array, Namespace, Nonfinite

_R = RANGES["float32"]


class _Undifferentiated(Backend):
    """Runs the policy without derivative rules."""

    def __init__(self, reported: Callable[..., list[Array]]) -> None:
        super().__init__(jnp)
        self._as_reported = reported

    def _reported(self, norm: Array, wide: Any, groups: Groups) -> list[Array]:
        return self._as_reported(norm, wide, groups)


class _InFloat64(_Undifferentiated):
    """Runs the policy of narrow gradients on plain float64 numbers."""

    def _finish(self, xp: Namespace, norm: Norm, rows: Seen) -> Scaled:
        return _wide(norm.finish(xp, rows))

    def _quotient(self, xp: Namespace, numerator: Scaled, denominator: Scaled) -> Factors:
        return by_platform(
            numerator.mantissa, denominator.mantissa, cpu=_quotient_on_condition, default=_quotient
        )


def _quotient(numerator: Array, denominator: Array) -> Factors:
    """As `quotient` gives it: in float32, by steps that lose no bits."""
    plain = numerator / denominator
    small, large = plain < 1 / _R.lift, plain > _R.lift
    one, t = jnp.ones_like(plain), _R.shift
    shift = jnp.where(large, t * one, jnp.where(small, one / t, one))
    back = jnp.where(large, one / t**2, jnp.where(small, t**2 * one, one))
    factor = jnp.minimum(plain * back, _R.largest * one)
    return Factors(factor.astype(jnp.float32), shift.astype(jnp.float32))


def _quotient_on_condition(numerator: Array, denominator: Array) -> Factors:
    """XLA fuses nothing across a condition. Else its CPU compiler would compute the quotient again for every leaf."""

    def ones(numerator: Array, denominator: Array) -> Factors:
        one = (numerator * denominator).astype(jnp.float32)
        return Factors(one, one)

    neither = jnp.all(jnp.logical_and(numerator == 1, denominator == 1))
    return lax.cond(neither, ones, _quotient, numerator, denominator)


def _wide(x: Scaled) -> Scaled:
    """In float64. 2**(90 e) is put together from its bits: no power is exact in XLA for sure."""
    mantissa = jnp.asarray(x.mantissa).astype(jnp.float64)
    if x.exponent is None:
        return Scaled(mantissa, None)
    e = jnp.clip(jnp.asarray(x.exponent), -11, 11).astype(jnp.int64)  # what is beyond is beyond any float32
    power = lax.bitcast_convert_type((e * 90 + 1023) << 52, jnp.float64)
    least = jnp.where(mantissa > 0, jnp.finfo(jnp.float64).tiny, -jnp.inf)  # XLA may make less than that 0
    return Scaled(jnp.maximum(mantissa * power, least), None)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 4, 5, 6))
def decided(
    backend: Backend,
    norm: Norm,
    partials: Seen,
    bounds: Bounds,
    groups: Groups,
    nonfinite: Nonfinite,
    relative: bool,
) -> Verdict:
    """`Backend.decide`."""

    def in_float64(partials: Seen, bounds: Bounds) -> Verdict:
        with jax.enable_x64(True):
            wide = Bounds(*(None if x is None else _wide(x) for x in bounds))
            return run(_InFloat64(backend._reported), partials, wide)

    def at_length(partials: Seen, bounds: Bounds) -> Verdict:
        """One group has an empty one beside it: XLA's TPU compiler fuses rows, and not numbers."""
        plain = _Undifferentiated(backend._reported)
        if groups.count != 1:
            return run(plain, partials, bounds)
        partials = tuple(lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (0, 1, 1))) for x in partials)
        bounds = jax.tree.map(lambda x: jnp.append(x, jnp.ones((1,), x.dtype)), bounds)
        two = Groups((), (), ((2,),), groups.wide)
        found = jax.tree.map(lambda x: x[0], plain.decide(norm, partials, bounds, two, nonfinite, relative))
        return found._replace(norms=[x.reshape(groups.shapes[0]) for x in found.norms])

    run = partial(_run, norm=norm, groups=groups, nonfinite=nonfinite, relative=relative)
    narrow = all(x.dtype == jnp.float32 for x in jax.tree.leaves((partials, bounds)))
    if not narrow or any(groups.wide) or not isinstance(norm, SumNorm | ExtremeNorm):  # others may be beyond float64
        return run(backend, partials, bounds)
    return by_platform(partials, bounds, cpu=in_float64, cuda=in_float64, rocm=in_float64, default=at_length)


@decided.defjvp
def _decided_jvp(
    backend: Backend, norm: Norm, groups: Groups, nonfinite: Nonfinite, relative: bool, primals: Any, tangents: Any
) -> Any:
    run = partial(_run, backend, norm=norm, groups=groups, nonfinite=nonfinite, relative=relative)
    return jax.jvp(run, primals, tangents)


def _run(backend: Backend, partials: Seen, bounds: Bounds, groups: Groups, **settled: Any) -> Verdict:
    """What is decided about one group is 0-d, whatever the bounds are."""
    found = Backend.decide(backend, partials=partials, bounds=bounds, groups=groups, **settled)
    factor, shift = found.factors
    if shift is None:  # as the other ways have it
        found = found._replace(factors=Factors(factor, jnp.ones_like(factor)))
    rest = found._replace(norms=[])
    return found if groups.count != 1 else jax.tree.map(lambda x: x.reshape(()), rest)._replace(norms=found.norms)

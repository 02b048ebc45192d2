"""The policy in the numbers that a platform is good at: float64 where that is at hand takes a tenth of the program.

In float32 a norm is a mantissa and an exponent, and what is done with it takes hundreds of operations, most of what
compiling a small clip took. In float64, which JAX has also where it is not enabled, it is one number. A TPU has none of
its own: it goes the long way, as does what is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradclip._backends.generic import Backend
from gradclip._backends.jax.arrays import may_be_sharded, varying
from gradclip._backends.jax.derivatives import whole
from gradclip._backends.jax.platforms import by_platform
from gradclip._backends.jax.sums import Measured
from gradclip._backends.jax.wide import widened
from gradclip._decide import Bounds, Verdict
from gradclip._groups import Groups
from gradclip._norms import ExtremeNorm, Norm, Seen, SumNorm
from gradclip._scaled import RANGES, Factors, Scaled
from gradclip._types import Array, Namespace, Nonfinite

_R = RANGES["float32"]
T = TypeVar("T")


class _Undifferentiated(Backend):
    """Runs the policy without derivative rules. Norms stay one row."""

    def __init__(self) -> None:
        super().__init__(jnp)

    def _reported(self, norm: Array, wide: Any, groups: Groups) -> list[Array]:
        return [norm]


class _InFloat64(_Undifferentiated):
    """Runs the policy of narrow gradients on plain float64 numbers."""

    def decided(self, norm: Norm, measured: Measured, bounds: Bounds, groups: Groups, **settled: Any) -> Verdict:
        """`decide`, by the sums in float64 where they are known."""
        total, n = measured.total, groups.count
        if total is None:
            return self.decide(norm, measured.joined, bounds, groups, **settled)
        plain, relative = replace(norm, binned=False), settled.pop("relative")

        def ends(at: int) -> Scaled:
            row = total[at] if n == 1 else total[at : at + n]
            return plain.finish(jnp, ((row, row, row, jnp.ones_like(row)),))

        params = ends(n) if relative else None
        return self._settled(ends(0), params, bounds, groups, wide=False, **settled)

    def _finish(self, xp: Namespace, norm: Norm, rows: Seen) -> Scaled:
        return widened(norm.finish(xp, rows))

    def _quotient(self, xp: Namespace, numerator: Scaled, denominator: Scaled) -> Factors:
        """As `quotient` gives it: in float32, by steps that lose no bits."""
        plain = numerator.mantissa / denominator.mantissa
        small, large = plain < 1 / _R.lift, plain > _R.lift
        one, t = jnp.ones_like(plain), _R.shift
        shift = jnp.where(large, t * one, jnp.where(small, one / t, one))
        back = jnp.where(large, one / t**2, jnp.where(small, t**2 * one, one))
        factor = jnp.minimum(plain * back, _R.largest * one)
        return Factors(factor.astype(jnp.float32), shift.astype(jnp.float32))


def _at_once(run: Callable[..., T], given: tuple[Any, ...]) -> T:
    """`run(*given)`, which XLA's CPU compiler makes one kernel of, and computes once.

    Left to itself, it makes one for each result and each step that is used twice, of 10 to 20 ms to compile, and
    computes what is cheap again for every leaf. A loop over few numbers it keeps together, and this is one that runs
    once. The compiler does not know that: some number is as large as itself until it has run. And what is `given` is
    part of the loop's state: what does not change would be computed before.
    """

    def some(given: tuple[Any, ...]) -> Array:
        first: Array = jax.tree.leaves(given)[0]
        return first[(0,) * first.ndim]

    # In the types of a loop it would have to be told how numbers vary over devices.
    if any(x.size == 0 or varying(x) or may_be_sharded(x) for x in jax.tree.leaves(given)):
        return run(*given)
    once = jax.jit(run, inline=True)  # traced once
    zeros, nothing = (
        jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes) for shapes in (given, jax.eval_shape(once, *given))
    )
    one = np.ones((), some(given).dtype)
    state = (given, some(given), nothing)
    return lax.while_loop(lambda s: ~(some(s[0]) < s[1]), lambda s: (zeros, one, once(*s[0])), state)[2]


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 4, 5, 6))
def decided(
    backend: Backend,
    norm: Norm,
    measured: Measured,
    bounds: Bounds,
    groups: Groups,
    nonfinite: Nonfinite,
    relative: bool,
) -> Verdict:
    """`Backend.decide`."""
    settled: dict[str, Any] = {"nonfinite": nonfinite, "relative": relative}
    in_general = partial(_in_general, backend, norm, groups, settled)

    def in_float64(measured: Measured, bounds: Bounds) -> Verdict:
        # Without `jit`, which traces each step of the policy as a function of its own.
        with jax.enable_x64(True), jax.disable_jit():
            wide = Bounds(*(None if x is None else widened(x) for x in bounds))
            return _plain(_InFloat64().decided(norm, measured, wide, groups, **settled), groups)

    def on_cpu(measured: Measured, bounds: Bounds) -> Verdict:
        known = measured.total is not None
        given = (Measured((), measured.total) if known else measured, bounds)
        with jax.enable_x64(True):
            return _at_once(in_float64, given)

    def at_length(measured: Measured, bounds: Bounds) -> Verdict:
        """One group has an empty one beside it: XLA's TPU compiler fuses rows, and not numbers."""
        plain = _Undifferentiated()
        if groups.count != 1:
            return _plain(plain.decide(norm, measured.joined, bounds, groups, **settled), groups)
        partials = tuple(lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (0, 1, 1))) for x in measured.joined)
        bounds = jax.tree.map(lambda x: jnp.append(x, jnp.ones((1,), x.dtype)), bounds)
        two = Groups((), (), ((2,),), groups.wide)
        return _plain(jax.tree.map(lambda x: x[0], plain.decide(norm, partials, bounds, two, **settled)), groups)

    narrow = all(x.dtype == jnp.float32 for x in jax.tree.leaves((measured.joined, bounds)))
    if not narrow or any(groups.wide) or not isinstance(norm, SumNorm | ExtremeNorm):  # others may be beyond float64
        return in_general(measured, bounds)
    found = by_platform(measured, bounds, cpu=on_cpu, cuda=in_float64, rocm=in_float64, default=at_length)
    return found._replace(norms=backend._reported(found.norms[0], False, groups))


@decided.defjvp
def _decided_jvp(
    backend: Backend, norm: Norm, groups: Groups, nonfinite: Nonfinite, relative: bool, primals: Any, tangents: Any
) -> Any:
    in_general = partial(_in_general, backend, norm, groups, {"nonfinite": nonfinite, "relative": relative})
    return jax.jvp(in_general, primals, tangents)


def _in_general(
    backend: Backend, norm: Norm, groups: Groups, settled: dict[str, Any], measured: Measured, bounds: Bounds
) -> Verdict:
    return _plain(Backend.decide(backend, norm, whole(norm, measured), bounds, groups, **settled), groups)


def _plain(found: Verdict, groups: Groups) -> Verdict:
    """The same from every way: there is a shift; what is decided about one group is 0-d, whatever the bounds are."""
    factor, shift = found.factors
    if shift is None:
        found = found._replace(factors=Factors(factor, jnp.ones_like(factor)))
    rest = found._replace(norms=[])
    return found if groups.count != 1 else jax.tree.map(lambda x: x.reshape(()), rest)._replace(norms=found.norms)

"""The policy: the table of cases, as one factor a group. Pure, elementwise on rows (one number a group); no waits."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from gradclip._scaled import Factors, Scaled, to_float32
from gradclip._types import Array, Namespace, Nonfinite


class Bounds(NamedTuple):
    """What a call is given beside the gradients: one number for all groups, or a row of one a group."""

    max_norm: Any = None  # then norms are all that is asked for
    norm: Any = None
    divide_by: Any = None
    unit: Any = None  # that `max_norm` is a multiple of; where the norms of parameters are, the least of these


class Decision(NamedTuple):
    """Rows. The factor of a group is `numerator / denominator`, a division that no policy is needed for.

    Where norms are all that is asked for, it is the norm itself, which may be beyond its dtype; NaN if not finite.
    """

    norm: Array  # before clipping, as it is reported
    numerator: Scaled
    denominator: Scaled
    finite: Array  # whether nothing here asks for an error
    joined_finite: Array  # the same without `divide_by`: what all shards agree on


class Verdict(NamedTuple):
    """A decision as a backend hands it on."""

    norms: list[Array]  # one 0-d array a group
    factors: Factors
    finite: Array
    joined_finite: Array


def decide(
    xp: Namespace,
    norms: Scaled | None,
    bounds: Bounds,
    wide: Any,
    nonfinite: Nonfinite,
    params: Scaled | None = None,
) -> Decision:
    """What is to be done about groups of these norms.

    `norms`: those of the gradients as they are, None where `bounds.norm` tells them. `wide`: whether a norm is reported
    in float64, a bool or a row of them. `params`: the norms of the parameters, where bounds are relative to them.
    """
    if norms is not None and bounds.max_norm is None:
        value = norms.value(xp)
        unity, finite = Scaled(xp.ones_like(value), None), xp.isfinite(norms.mantissa)
        known = xp.where(finite, norms.mantissa, xp.full_like(norms.mantissa, math.nan))
        return Decision(_reported(xp, value, wide), Scaled(known, norms.exponent), unity, finite, finite)
    max_norm, divisor, unit = bounds.max_norm, bounds.divide_by, bounds.unit
    if params is not None:  # NaN stays NaN
        unit = unit.where(xp, unit.exceeds(xp, params), params)
    if unit is not None:
        max_norm = max_norm.multiplied(xp, unit)
    total = norm = norms or bounds.norm
    if divisor is not None:
        positive = xp.logical_and(divisor.mantissa > 0, divisor.mantissa < math.inf)
        nan = xp.full_like(divisor.mantissa, math.nan)
        divisor = Scaled(xp.where(positive, divisor.mantissa, nan), divisor.exponent)
        if norms is None:  # `bounds.norm` is that after the division
            total = norm.multiplied(xp, divisor)
        else:
            norm = norms.divided(xp, divisor)
    value = norm.value(xp)
    one = xp.ones_like(value)
    bound = Scaled(xp.maximum(max_norm.mantissa, 0 * one), max_norm.exponent)  # NaN stays NaN
    reported = _reported(xp, value, wide)
    # Both: a norm that was rounded up or down for the report must not make the difference.
    clips = norm.exceeds(xp, bound)
    clips = xp.logical_and(clips, Scaled(xp.astype(reported, value.dtype), None).exceeds(xp, bound))
    joined_finite = xp.isfinite(total.mantissa)
    finite = joined_finite if divisor is None else xp.logical_and(joined_finite, xp.isfinite(divisor.mantissa))
    clips = xp.logical_and(clips, joined_finite)
    # c / ||g|| where it clips, else 1 / divide_by; in the other branch of each select stands a harmless 1.
    unity = Scaled(one, None)
    numerator, denominator = bound.where(xp, clips, unity), total.where(xp, clips, divisor or unity)
    if divisor is not None:
        denominator = denominator.where(xp, finite, unity)
    mantissa = xp.where(xp.isnan(bound.mantissa), bound.mantissa, numerator.mantissa)
    mantissa = xp.where(finite, mantissa, (0 if nonfinite == "zero" else math.nan) * one)
    return Decision(reported, Scaled(mantissa, numerator.exponent), denominator, finite, joined_finite)


def may_blank(nonfinite: Nonfinite, is_told: bool) -> bool:
    """Whether a factor may be 0 where an element is not finite. `is_told`: whether the norm was not measured."""
    return nonfinite == "zero" or is_told


def _reported(xp: Namespace, value: Array, wide: Any) -> Array:
    """Norms rounded to float32, but those that are wide: they stay in a dtype that holds them all where some are."""
    if isinstance(wide, bool):
        return value if wide else to_float32(xp, value)
    return xp.where(wide, value, xp.astype(to_float32(xp, value), value.dtype))

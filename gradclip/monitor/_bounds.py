"""What other bounds would have clipped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

_SHARES = (0.5, 0.25, 0.1, 0.05, 0.02, 0.01, 0.001)


def would_clip(norm: Any) -> list[tuple[float, float]]:
    """Bounds of few digits, and the share of the steps whose norm was greater. Steps of inf or NaN do not count."""
    finite = norm[np.isfinite(norm)]
    if not finite.size:
        return []
    quantiles = np.quantile(finite, [1 - share for share in _SHARES])
    for digits in (2, 3, 4):  # norms that differ little want more
        bounds = sorted({float(f"{x:.{digits}g}") for x in quantiles})
        if len(bounds) > 4:
            break
    return [(bound, float(np.mean(finite > bound))) for bound in bounds]


def clipped_share(log: Mapping[str, Any]) -> float | None:
    """The share of the steps with a finite norm and a bound whose norm was greater; None if there are no such steps."""
    norm, bound = log["norm"], log["max_norm"]
    counted = np.isfinite(norm) & ~np.isnan(bound)
    return float(np.mean((norm > bound)[counted])) if counted.any() else None


def percent(share: float) -> str:
    """One digit after the point, and never 0 or 100 for what is neither."""
    shown = f"{100 * share:.1f}"
    if share > 0 and float(shown) == 0:
        return "< 0.1 %"
    return "> 99.9 %" if share < 1 and float(shown) == 100 else f"{shown} %"


def count(steps: int) -> str:
    return f"{steps:,} step{'s' * (steps != 1)}"

"""The picture of a log: norm and bound over the steps, the leaves' norms, a histogram, and a table of other bounds.

Colours are Okabe and Ito's (2008) and cividis (Nuñez, Anderton, Renslow, PLOS ONE 2018), which colour-blind readers
tell apart; markers and strokes differ as well. Matplotlib is imported when a picture is drawn.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from gradclip.monitor._bounds import clipped_share, count, percent, would_clip
from gradclip.monitor._read import FIRST

_BLUE, _SKY, _VERMILLION, _GREEN, _PURPLE, _BLACK = "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#000000"
_WIDTH = 7.5  # inches: a page's
_COLUMNS = 1200  # more steps than this are drawn by bins
_LABELS = 30
_FONTS = {"font.size": 8, "axes.labelsize": 8, "axes.titlesize": 9, "legend.fontsize": 8, "axes.linewidth": 0.6}
_FONTS |= {"xtick.labelsize": 8, "ytick.labelsize": 8}


def draw(log: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw what `read` gave into a file; its suffix says the format."""
    figure(log).savefig(path, dpi=150)


def figure(log: Mapping[str, Any]) -> Any:
    """The picture, for matplotlib to save or change."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    leaves = [name for name in log if name not in FIRST and not np.isnan(log[name]).all()]
    rows = min(len(leaves), _LABELS)
    heights = [2.5, 1.0 + 0.16 * rows] if leaves else [2.5]
    with matplotlib.rc_context(_FONTS):
        out = Figure(figsize=(_WIDTH, sum(heights) + 2.6), layout="constrained")
        FigureCanvasAgg(out)
        halves: Any = out.subfigures(2, 1, height_ratios=[sum(heights), 2.6])
        above, below = halves
        panels = above.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        _norms(panels[0], log)
        if leaves:
            _heat_map(above, panels[1], log, leaves)
        panels[-1].set_xlabel("step")
        panels[-1].xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 2.5, 5, 10]))
        panels[-1].xaxis.set_major_formatter("{x:,.0f}")
        histogram, table = below.subplots(1, 2, width_ratios=[3, 2])
        _histogram(histogram, log["norm"])
        _table(table, log["norm"])
        for axes in out.axes:
            axes.tick_params(labelsize=_FONTS["xtick.labelsize"])  # ticks that are made later would be matplotlib's
    return out


def _norms(axes: Any, log: Mapping[str, Any]) -> None:
    step, norm, bound = log["step"], log["norm"], log["max_norm"]
    starts = _bins(len(step))
    finite, x = np.isfinite(norm), step[starts]
    shown = _shown(norm)
    low, high = np.fmin.reduceat(shown, starts), np.fmax.reduceat(shown, starts)
    binned, few = len(starts) < len(step), len(step) <= 60
    if binned:
        label = f"norm: range of {math.ceil(len(step) / len(starts))} steps"
        axes.fill_between(x, low, high, facecolor=_SKY, edgecolor=_BLUE, linewidth=0.5, label=label)
    else:
        axes.plot(x, shown, color=_BLUE, linewidth=0.8, marker="." if few else "", label="norm")
    share = clipped_share(log)
    if share is not None:
        clipped = np.fmax.reduceat(np.where(norm > bound, shown, np.nan), starts)
        label, style = f"clipped: {percent(share)} of the steps", {"color": _VERMILLION, "zorder": 2.5}
        if binned and np.count_nonzero(clipped > 0) > 150:  # crosses would hide it all
            axes.vlines(x, np.fmin(np.fmax(low, bound[starts]), clipped), clipped, linewidth=0.7, label=label, **style)
        else:
            axes.plot(x, clipped, "x", markersize=6 if few else 3, markeredgewidth=0.8, label=label, **style)
        dash = {"linestyle": "--", "linewidth": 1.1, "marker": "_" * (len(step) == 1), "color": _BLACK}
        axes.plot(x, bound[starts], label="bound", zorder=3, **dash)
    for odd, marker, height, colour, label in (
        (~finite, "v", 0.96, _PURPLE, "inf or NaN"),
        (norm == 0, "^", 0.04, _GREEN, "zero"),
    ):
        if odd.any():
            at = x[np.logical_or.reduceat(odd, starts)]
            place, told = axes.get_xaxis_transform(), f"{label}: {count(int(odd.sum()))}"
            axes.plot(at, np.full(len(at), height), marker, color=colour, markersize=5, transform=place, label=told)
    seen = np.concatenate([shown, _shown(bound)])
    _log_axis(axes, axes.yaxis, seen, 8)
    gap = 0.01 * (step[-1] - step[0]) or 1.0
    axes.set_xlim(step[0] - gap, step[-1] + gap)
    axes.set_ylabel("gradient norm")
    axes.grid(axis="y", linewidth=0.4, color="0.85")
    axes.set_axisbelow(True)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.01), ncols=3, frameon=False, borderaxespad=0)


def _heat_map(figure: Any, axes: Any, log: Mapping[str, Any], leaves: list[str]) -> None:
    from matplotlib import colormaps

    has: Any = np.zeros(len(log["step"]), bool)  # the leaves may be logged at some steps only
    for name in leaves:
        has |= ~np.isnan(log[name])
    step = log["step"][has]
    starts = _bins(len(step))
    values = np.stack([np.fmax.reduceat(log[name][has], starts) for name in leaves])
    zero, infinite = values == 0, np.isinf(values)
    powers = np.log10(np.where(zero | infinite, np.nan, values))
    low, high = (float(np.nanmin(powers)), float(np.nanmax(powers))) if np.isfinite(powers).any() else (0.0, 0.0)
    low, high = (low - 0.2, high + 0.2) if low == high else (low, high)
    powers = np.where(zero, low - 1, np.where(infinite, high + 1, powers))
    colours = colormaps["cividis"].with_extremes(bad="0.85", over=_VERMILLION, under="white")
    gap = np.median(np.diff(step)) if len(step) > 1 else 1.0
    edges = np.append(step[starts], step[-1] + gap) - gap / 2
    rows = np.arange(len(leaves) + 1) - 0.5
    mesh = axes.pcolormesh(edges, rows, powers, cmap=colours, vmin=low, vmax=high, rasterized=True)
    axes.invert_yaxis()
    each = math.ceil(len(leaves) / _LABELS)
    places = range(0, len(leaves), each)
    axes.set_yticks(places, [short(leaves[i]) for i in places], parse_math=False)
    if each > 1:
        axes.set_ylabel(f"{len(leaves)} leaves, each {_ordinal(each)} named")
    extend = ("both" if zero.any() else "max") if infinite.any() else ("min" if zero.any() else "neither")
    bar = figure.colorbar(mesh, ax=axes, location="bottom", extend=extend, shrink=0.7, aspect=45, pad=0.02)
    told = {"white: zero": zero, "red: inf": infinite, "grey: NaN": np.isnan(powers)}
    words = ["norm of the leaf", *(word for word, is_there in told.items() if is_there.any())]
    bar.set_label("; ".join(words))
    ticks = _ticks(low, high, 6)
    bar.set_ticks(ticks, labels=[f"{10**x:g}" for x in ticks])


def _histogram(axes: Any, norm: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    shown = _shown(norm)
    shown = shown[~np.isnan(shown)]
    if not shown.size:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no finite norm above 0", ha="center", transform=axes.transAxes)
        return
    low, high = _log_axis(axes, axes.xaxis, shown, 5)
    axes.hist(shown, 10 ** np.linspace(low, high, 50), color=_SKY, edgecolor=_BLUE, linewidth=0.4)
    marks = {"median": (50, "-", _BLACK), "90th percentile": (90, "--", _VERMILLION), "99th": (99, ":", _GREEN)}
    for name, (share, stroke, colour) in marks.items():
        x = float(np.percentile(shown, share))
        axes.axvline(x, linestyle=stroke, color=colour, linewidth=1.4, label=f"{name}: {x:.3g}")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.01), ncols=3, frameon=False, borderaxespad=0,
                handlelength=1.6, columnspacing=1.2)  # fmt: skip
    axes.set(xlabel="gradient norm", ylabel="steps")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter("{x:,.0f}")


def _table(axes: Any, norm: Any) -> None:
    axes.set_axis_off()
    rows = [(f"{bound:g}", percent(share)) for bound, share in would_clip(norm)]
    for i, (bound, share) in enumerate([("a bound of", "would have clipped"), *rows]):
        y, weight = 0.97 - 0.12 * i, "bold" if i == 0 else "normal"
        axes.text(0.36, y, bound, ha="right", va="top", weight=weight, transform=axes.transAxes)
        axes.text(0.98, y, f"{share} of the steps" if i else share, ha="right", va="top", weight=weight,
                  transform=axes.transAxes)  # fmt: skip


def _shown(values: Any) -> Any:
    """Positive numbers, within what matplotlib can put on a logarithmic axis; NaN for others."""
    return np.where(np.isfinite(values) & (values > 0), np.clip(values, 1e-300, 1e300), np.nan)


def _bins(count: int) -> Any:
    """Where each bin of rows starts: a row a bin, if there are few."""
    return np.unique(np.linspace(0, count, min(count, _COLUMNS), endpoint=False).astype(int))


def _log_axis(axes: Any, axis: Any, values: Any, most: int) -> tuple[float, float]:
    """A logarithmic axis with room around the values; the powers of ten that are its limits."""
    from matplotlib.ticker import NullLocator

    values = values[~np.isnan(values)]
    low, high = (math.log10(values.min()), math.log10(values.max())) if values.size else (0.0, 0.0)
    room = max(0.06 * (high - low), 0.04)
    low, high = max(low - room, -303.0), min(high + room, 303.0)
    name, ticks = axis.axis_name, 10 ** np.array(_ticks(low, high, most))
    axes.set(**{f"{name}lim": (10**low, 10**high), f"{name}scale": "log"})  # limits first, or it would look for its own
    axis.set_ticks(ticks, labels=[f"{x:g}" for x in ticks])
    axis.set_minor_locator(NullLocator())
    return low, high


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Powers of ten between these two that are round numbers, so many or a few more."""
    from matplotlib.ticker import MaxNLocator

    if high - low < 1:
        numbers = [float(x) for x in MaxNLocator(most).tick_values(10**low, 10**high)]
    else:
        subs, each = ((1, 2, 5), 1) if high - low < 2.5 else ((1,), math.ceil((high - low) / most))
        numbers = [
            sub * 10.0**k for k in range(math.floor(low / each) * each, math.floor(high) + 1, each) for sub in subs
        ]
    return [math.log10(x) for x in numbers if x > 0 and low <= math.log10(x) <= high]


def short(path: str, most: int = 32) -> str:
    """A key path of so many ASCII letters at most: `encoder.3.weight` for `grads['encoder'][3].weight`."""
    name = re.sub(r"\[(['\"]?)(.*?)\1\]", r".\2", path).removeprefix("grads").removeprefix(".") or path
    name = name.encode("ascii", "backslashreplace").decode()
    return name if len(name) <= most else f"{name[: most - 14]}...{name[-11:]}"


def _ordinal(n: int) -> str:
    return f"{n}{'th' if 10 < n % 100 < 14 else {1: 'st', 2: 'nd', 3: 'rd'}.get(n % 10, 'th')}"

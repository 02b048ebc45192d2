"""The chart: one picture of a run, drawn from the data that its JSON file holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

OURS, THEIRS, PLAIN = "#1b6ca8", "#e07b39", "#9a9a9a"
COLOURS = ("#1b6ca8", "#e07b39", "#3d9a50", "#8e4fa8")

#: What the bars of NumPy show: a label, its colour, and the contenders of which the fastest is shown.
NUMPY_BARS = (
    ("gradclip clip_grad_norm_", OURS, ("gradclip clip_grad_norm_",)),
    ("gradclip, nothing to clip", "#7fb3d9", ("gradclip clip_grad_norm_, nothing to clip",)),
    ("torch clip_grad_norm_, given tensors", THEIRS, ("torch clip_grad_norm_", "torch clip_grad_norm_, one thread")),
    ("plain NumPy clip (fresh arrays)", PLAIN, ("plain NumPy clip",)),
)
NUMPY_FLOOR = "floor: read + in-place multiply"

#: Which figures the bars of JAX show, and how they are called.
JAX_BARS = (
    ("jitted / optax + its norm", "run, jitted", OURS),
    ("lower + compile / optax + its norm", "compile", THEIRS),
    ("not jitted / optax, not jitted", "run, not jitted", "#3d9a50"),
)


def bars(axes: Axes, groups: Sequence[str], series: Sequence[tuple[str, str, Sequence[float | None]]]) -> None:
    """Horizontal bars of ratios on a logarithmic scale: a group of bars for each tree, the value beside each bar."""
    height = 0.8 / max(1, len(series))
    labelled: set[str] = set()
    for row in range(len(groups)):
        here = [(label, colour, value) for label, colour, values in series if (value := values[row]) is not None]
        for i, (label, colour, value) in enumerate(here):
            y = row + (i - (len(here) - 1) / 2) * height
            axes.barh(y, value, height * 0.92, color=colour, label=None if label in labelled else label, zorder=2)
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            text = f"{value:.2f}" if value < 10 else f"{value:.0f}"
            axes.annotate(
                text, (value, y), (4, 0), textcoords="offset points", va="center", fontsize=8, bbox=box, zorder=4
            )
            labelled.add(label)
    axes.axvline(1, color="black", linewidth=1, zorder=3)
    axes.set_yticks(range(len(groups)), groups)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xscale("log")
    present = [value for _, _, values in series for value in values if value is not None]
    axes.set_xlim(0.6 * min(0.7, *present), 1.6 * max(2.0, *present))
    shown = [x for x in (0.01, 0.1, 0.25, 0.5, 1, 2, 4, 10, 25, 100) if axes.get_xlim()[0] <= x <= axes.get_xlim()[1]]
    axes.set_xticks(shown, [f"{x:g}" for x in shown])
    axes.minorticks_off()
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)


def numpy_panel(axes: Axes, section: dict[str, Any]) -> None:
    tables = section["tables"]
    times = [{row["name"]: row["median_us"] for row in table["rows"]} for table in tables]
    series = []
    for label, colour, names in NUMPY_BARS:
        best = [min((t[name] for name in names if name in t), default=None) for t in times]
        values = [None if us is None else us / t[NUMPY_FLOOR] for us, t in zip(best, times, strict=True)]
        if any(value is not None for value in values):
            series.append((label, colour, values))
    bars(axes, [table["tree"] for table in tables], series)
    axes.set_title("NumPy arrays, float32: time of a clip")
    axes.set_xlabel("time / (one read + one in-place multiply)")


def jax_panel(axes: Axes, section: dict[str, Any]) -> None:
    """gradclip's time by optax's, for each tree and dtype: jitted, compiling, and not jitted."""
    found: dict[str, dict[str, float]] = {}
    for finding in section["findings"]:
        group = f"{finding['tree']}\n{finding['dtype']}"
        found.setdefault(finding["target"]["what"], {}).setdefault(group, finding["value"])
    groups = list(dict.fromkeys(group for what, _, _ in JAX_BARS for group in found.get(what, {})))
    series = [
        (label, colour, [found[what].get(group) for group in groups])
        for what, label, colour in JAX_BARS
        if what in found
    ]
    bars(axes, groups, series)
    axes.set_title("JAX: gradclip beside optax")
    axes.set_xlabel("gradclip / (optax.clip_by_global_norm + optax.tree.norm)")


def growth_panel(axes: Axes, lines: Sequence[dict[str, Any]], against: str) -> None:
    each, size = ("leaf", 1.0) if against == "leaves" else ("million elements", 1e6)
    for line, colour in zip((line for line in lines if line["against"] == against), COLOURS, strict=False):
        xs = line["sizes"]
        label = f"{line['name']}: {_us(line['fixed_us'])} + {_us(size * line['each_us'])} per {each}"
        axes.plot(xs, line["us"], "o", color=colour, markersize=5, label=label)
        lengths = [xs[0] * (xs[-1] / xs[0]) ** (i / 60) for i in range(61)]
        fitted = [line["fixed_us"] + line["each_us"] * x for x in lengths]
        axes.plot(*zip(*((x, y) for x, y in zip(lengths, fitted, strict=True) if y > 0), strict=True), color=colour)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylabel("microseconds per call")
    if against == "leaves":
        axes.set_title("Growth with the number of leaves")
        axes.set_xlabel("leaves of 16 elements")
    else:
        axes.set_title("Growth with the number of elements")
        axes.set_xlabel("float32 elements in one leaf")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left")


def _us(value: float) -> str:
    return f"{value:,.0f} us" if abs(value) >= 100 else f"{value:.3g} us"


def draw(data: dict[str, Any], path: Path) -> bool:
    """Draw what the run measured, into a PNG file. False, and no file, if it measured nothing that has a panel."""
    sections = data["sections"]
    panels: list[Any] = []
    if sections.get("numpy", {}).get("tables"):
        panels.append((numpy_panel, sections["numpy"]))
    judged = {finding["target"]["what"] for finding in sections.get("jax", {}).get("findings", [])}
    if judged & {what for what, _, _ in JAX_BARS}:
        panels.append((jax_panel, sections["jax"]))
    for against in ("elements", "leaves"):
        lines = sections.get("growth", {}).get("lines", [])
        if any(line["against"] == against for line in lines):
            panels.append((growth_panel, lines, against))
    if not panels:
        return False
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(7.2 * columns, 5.4 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (panel, *arguments) in enumerate(panels):
        panel(figure.add_subplot(rows, columns, i + 1), *arguments)
    machine = data["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
    figure.suptitle(
        f"gradclip on {machine['processor']}, {machine['cores']} cores, {machine['date']}. "
        f"Bars: left of the line is faster.\n{versions}",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)
    return True

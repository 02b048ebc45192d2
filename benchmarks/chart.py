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

#: What the bars of NumPy show: a contender's name, its label and colour.
NUMPY_BARS = (
    ("gradclip clip_grad_norm_", "gradclip clip_grad_norm_", OURS),
    ("gradclip clip_grad_norm_, nothing to clip", "gradclip, nothing to clip", "#7fb3d9"),
    ("torch clip_grad_norm_", "torch clip_grad_norm_", THEIRS),
    ("plain NumPy clip", "plain NumPy clip (fresh arrays)", PLAIN),
)
NUMPY_FLOOR = "floor: read + in-place multiply"


def bars(axes: Axes, groups: Sequence[str], series: Sequence[tuple[str, str, Sequence[float | None]]]) -> None:
    """Horizontal bars of ratios on a logarithmic scale: a group of bars for each tree, the value beside each bar."""
    height = 0.8 / max(1, len(series))
    for i, (label, colour, values) in enumerate(series):
        for row, value in enumerate(values):
            if value is not None:
                y = row + (i - (len(series) - 1) / 2) * height
                axes.barh(y, value, height * 0.92, color=colour, label=label if row == _first(values) else None)
                axes.annotate(f" {value:.2f}", (value, y), va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(groups)), groups)
    axes.invert_yaxis()
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.5), max(2.0, 1.6 * high))
    shown = [x for x in (0.01, 0.1, 0.25, 0.5, 1, 2, 4, 10, 100) if axes.get_xlim()[0] <= x <= axes.get_xlim()[1]]
    axes.set_xticks(shown, [f"{x:g}" for x in shown])
    axes.minorticks_off()
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)


def _first(values: Sequence[float | None]) -> int:
    return next(i for i, value in enumerate(values) if value is not None)


def numpy_panel(axes: Axes, section: dict[str, Any]) -> None:
    tables = section["tables"]
    times = [{row["name"]: row["median_us"] for row in table["rows"]} for table in tables]
    series = []
    for name, label, colour in NUMPY_BARS:
        values = [t[name] / t[NUMPY_FLOOR] if name in t else None for t in times]
        if any(value is not None for value in values):
            series.append((label, colour, values))
    bars(axes, [table["tree"] for table in tables], series)
    axes.set_title("NumPy, float32: time of a clip")
    axes.set_xlabel("time / (one read + one in-place multiply)")


def jax_panel(axes: Axes, section: dict[str, Any]) -> None:
    """gradclip's time by optax's, for each tree and dtype: jitted, compiling, and not jitted."""
    kinds = {"jitted / optax + its norm": "run, jitted", "lower + compile / optax + its norm": "compile"}
    kinds["not jitted / optax, not jitted"] = "run, not jitted"
    found = [f for f in section["findings"] if f["target"]["what"] in kinds]
    groups = list(dict.fromkeys(f"{f['tree']}\n{f['dtype']}" for f in found))
    series = []
    for (what, label), colour in zip(kinds.items(), COLOURS, strict=False):
        by_group = {f"{f['tree']}\n{f['dtype']}": f["value"] for f in found if f["target"]["what"] == what}
        if by_group:
            series.append((label, colour, [by_group.get(group) for group in groups]))
    bars(axes, groups, series)
    axes.set_title("JAX: gradclip beside optax")
    axes.set_xlabel("gradclip / (optax.clip_by_global_norm + optax.global_norm)")


def growth_panel(axes: Axes, lines: Sequence[dict[str, Any]], against: str) -> None:
    each, size = ("leaf", 1.0) if against == "leaves" else ("million elements", 1e6)
    for line, colour in zip((line for line in lines if line["against"] == against), COLOURS, strict=False):
        xs = line["sizes"]
        label = f"{line['name']}: {line['fixed_us']:.3g} us + {size * line['each_us']:.3g} us per {each}"
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


def draw(data: dict[str, Any], path: Path) -> bool:
    """Draw what the run measured, into a PNG file. False, and no file, if it measured nothing that has a panel."""
    sections = data["sections"]
    panels: list[Any] = []
    if sections.get("numpy", {}).get("tables"):
        panels.append((numpy_panel, sections["numpy"]))
    if sections.get("jax", {}).get("findings"):
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
        f"Bars left of the line are faster.\n{versions}",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)
    return True

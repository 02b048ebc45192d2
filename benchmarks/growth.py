"""How cost grows: with the number of elements in one leaf, and with the number of small leaves.

Straight lines, fitted with every point's *relative* distance weighed alike, so that the fixed cost at the small end
counts as much as the memory's speed at the large one. Leaves of 16 elements, one cache line, show the cost of a leaf as
such. What the elements cost is no straight line where a cache ends: the points say where.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

import gradclip
from benchmarks.machine import available_memory
from benchmarks.on_numpy import Gradients
from benchmarks.results import Line, Section
from benchmarks.settings import Settings
from benchmarks.timing import Effort, Timings, compete
from benchmarks.trees import Shapes, gradients

ELEMENTS = (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 50_000_000, 200_000_000)
LEAVES = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000)
LEAF = 16
#: Compiling the clip of 10,000 leaves takes JAX minutes.
MOST_JITTED_LEAVES = 300

Contest = Callable[[Shapes, Effort], Timings]


def straight_line(name: str, against: str, sizes: Sequence[int], seconds: Sequence[float]) -> Line:
    """Least squares of (fixed + each * size) / time - 1."""
    us = 1e6 * np.asarray(seconds)
    columns = np.stack([np.ones(len(sizes)), np.asarray(sizes, float)], axis=1)
    weighted = columns / us[:, None]
    scale = weighted.max(axis=0)
    fixed, each = np.linalg.lstsq(weighted / scale, np.ones(len(us)), rcond=None)[0] / scale
    worst = float(np.max(np.abs(columns @ np.array([fixed, each]) / us - 1)))
    return Line(name, against, [int(n) for n in sizes], us.tolist(), float(fixed), float(each), worst)


def numpy_contest(shapes: Shapes, effort: Effort) -> Timings:
    g = Gradients(gradients(shapes))
    contenders = {
        "NumPy global_norm": lambda: gradclip.global_norm(g.tree),
        "NumPy clip_grad_norm_": lambda: gradclip.clip_grad_norm_(g.tree, g.bound()),
    }
    return compete(_title("NumPy", shapes), contenders, effort, prepare=lambda name: g.restore())


def jax_contest(shapes: Shapes, effort: Effort) -> Timings:
    import jax

    from benchmarks.on_jax import fresh, on_device, our_clip, wait

    tree = on_device(shapes, "float32", jax.devices()[0])
    clip = fresh(our_clip)
    # No tree stands at this bound: the clip does all its work, on the same input each time.
    return compete(_title("JAX", shapes), {"JAX clip_grad_norm, jitted": wait(lambda: clip(tree, 1e-3))}, effort)


def _title(library: str, shapes: Shapes) -> str:
    return f"growth, {library}, {len(shapes):,} leaves of {next(iter(shapes.values()))[0]:,}"


def curve(against: str, trees: Mapping[int, Shapes], contest: Contest, effort: Effort) -> list[Line]:
    medians: dict[str, list[float]] = {}
    for shapes in trees.values():
        timings = contest(shapes, effort)
        for name in timings.samples:
            medians.setdefault(name, []).append(timings.spread(name).median)
    return [straight_line(name, against, list(trees), seconds) for name, seconds in medians.items()]


def sizes(settings: Settings, section: Section) -> tuple[list[int], list[int]]:
    elements, leaves = list(ELEMENTS), list(LEAVES)
    if settings.short:
        elements, leaves = [n for n in elements if n <= 10_000_000], leaves[:7:2]
        section.not_run.append("growth beyond 1e7 elements or 1,000 leaves: not in short mode")
    # The tree, its kept copy, and the room that clips in JAX need for their outputs.
    fits = [n for n in elements if 4 * 4 * n < available_memory()]
    if fits != elements:
        section.not_run.append(f"growth beyond {fits[-1]:,} elements: the memory is too small")
    return fits, leaves


def run(settings: Settings) -> Section:
    section = Section("growth")
    elements, leaves = sizes(settings, section)
    effort = Effort(settings.effort.seconds / 4, settings.effort.least_rounds, 51)
    one_leaf: dict[int, Shapes] = {n: {"leaf": (n,)} for n in elements}
    many: dict[int, Shapes] = {n: {f"leaf{i}": (LEAF,) for i in range(n)} for n in leaves}
    section.lines += curve("elements", one_leaf, numpy_contest, effort)
    section.lines += curve("leaves", many, numpy_contest, effort)
    try:
        some = {n: shapes for n, shapes in many.items() if n <= MOST_JITTED_LEAVES}
        section.lines += curve("elements", one_leaf, jax_contest, effort)
        section.lines += curve("leaves", some, jax_contest, effort)
        section.not_run.append(f"growth of JAX beyond {max(some)} leaves: compiling takes too long")
    except ImportError as error:
        section.not_run.append(f"growth of JAX: {error}")
    for line in section.lines:
        tree = f"{line.name}, {line.sizes[0]:,} to {line.sizes[-1]:,} {line.against}"
        section.add("per call", line.fixed_us, tree=tree)
        if line.against == "leaves":
            section.add("per leaf", line.each_us, tree=tree)
        else:
            section.add("per element", 1e6 * line.each_us, tree=tree)
        section.notes.append(f"{tree}: no point is further than {line.worst:.0%} from the straight line")
    return section

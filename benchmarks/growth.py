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
from benchmarks.timing import Call, Effort, compete
from benchmarks.trees import Shapes, gradients

ELEMENTS = (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 50_000_000, 200_000_000)
LEAVES = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000)
LEAF = 16
#: Compiling the clip of 10,000 leaves takes JAX minutes.
MOST_JITTED_LEAVES = 300

#: By name, a call and what puts its gradients back.
Calls = dict[str, tuple[Call, Call]]


def straight_line(name: str, against: str, sizes: Sequence[int], seconds: Sequence[float]) -> Line:
    """Least squares of (fixed + each * size) / time - 1."""
    us = 1e6 * np.asarray(seconds)
    columns = np.stack([np.ones(len(sizes)), np.asarray(sizes, float)], axis=1)
    weighted = columns / us[:, None]
    scale = weighted.max(axis=0)
    fixed, each = np.linalg.lstsq(weighted / scale, np.ones(len(us)), rcond=None)[0] / scale
    worst = float(np.max(np.abs(columns @ np.array([fixed, each]) / us - 1)))
    return Line(name, against, [int(n) for n in sizes], us.tolist(), float(fixed), float(each), worst)


def numpy_calls(shapes: Shapes) -> Calls:
    g = Gradients(gradients(shapes))
    return {
        "NumPy global_norm": (lambda: gradclip.global_norm(g.tree), g.restore),
        "NumPy clip_grad_norm_": (lambda: gradclip.clip_grad_norm_(g.tree, g.bound()), g.restore),
    }


def jax_calls(shapes: Shapes) -> Calls:
    import jax

    from benchmarks.on_jax import fresh, on_device, our_clip, wait

    tree = on_device(shapes, "float32", jax.devices()[0])
    clip = fresh(our_clip)
    # The norm of every tree is above this bound: the clip does all its work, on the same input each time.
    return {"JAX clip_grad_norm, jitted": (wait(lambda: clip(tree, 1e-3)), lambda: None)}


def curve(against: str, trees: Mapping[int, Shapes], calls: Callable[[Shapes], Calls], effort: Effort) -> list[Line]:
    """All sizes in one contest: what slows the machine down for a while bends no line."""
    contenders: dict[str, Call] = {}
    restores: dict[str, Call] = {}
    keys: dict[str, list[str]] = {}
    for size, shapes in trees.items():
        for name, (call, restore) in calls(shapes).items():
            key = f"{name}, {size}"
            contenders[key], restores[key] = call, restore
            keys.setdefault(name, []).append(key)
    title = f"growth with {against}: {', '.join(keys)}"
    timings = compete(title, contenders, effort, prepare=lambda key: restores[key]())
    return [
        straight_line(name, against, list(trees), [timings.spread(key).median for key in mine])
        for name, mine in keys.items()
    ]


def sizes(settings: Settings, section: Section) -> tuple[list[int], list[int]]:
    elements, leaves = list(ELEMENTS), list(LEAVES)
    if settings.short:
        elements, leaves = [n for n in elements if n <= 10_000_000], leaves[:7:2]
        section.not_run.append("growth beyond 1e7 elements or 1,000 leaves: not in short mode")
    # The trees up to this one, their kept copies, and the outputs of a functional clip.
    fits = [n for i, n in enumerate(elements) if 3 * 4 * sum(elements[: i + 1]) < available_memory()]
    if fits != elements:
        section.not_run.append(f"growth beyond {fits[-1]:,} elements: the memory is too small")
    return fits, leaves


def run(settings: Settings) -> Section:
    section = Section("growth")
    elements, leaves = sizes(settings, section)
    effort = Effort(settings.effort.seconds * 2, settings.effort.least_rounds)
    one_leaf: dict[int, Shapes] = {n: {"leaf": (n,)} for n in elements}
    many: dict[int, Shapes] = {n: {f"leaf{i}": (LEAF,) for i in range(n)} for n in leaves}
    section.lines += curve("elements", one_leaf, numpy_calls, effort)
    section.lines += curve("leaves", many, numpy_calls, effort)
    try:
        some = {n: shapes for n, shapes in many.items() if n <= MOST_JITTED_LEAVES}
        section.lines += curve("elements", one_leaf, jax_calls, effort)
        section.lines += curve("leaves", some, jax_calls, effort)
        section.not_run.append(f"growth of JAX beyond {max(some)} leaves: compiling takes too long")
    except ImportError as error:
        section.not_run.append(f"growth of JAX: {error}")
    for line in section.lines:
        tree = f"{line.name}, {line.sizes[0]:,} to {line.sizes[-1]:,} {line.against}"
        section.add("per call", line.fixed_us, tree=tree)
        if line.against == "leaves":
            section.add("for each leaf", line.each_us, tree=tree)
        else:
            section.add("per element", 1e6 * line.each_us, tree=tree)
        section.notes.append(f"{tree}: no point is further than {line.worst:.0%} from the straight line")
    return section

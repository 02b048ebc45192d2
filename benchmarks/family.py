"""The family: clips per unit and by root mean square beside the global one, and the sum of clipped examples.

In place where arrays can be written to, for ResNet-50's shapes, whichever axis is kept; examples: 256 gradients of
100,000 parameters in 20 leaves, beside two reads of them, and in JAX beside optax's function for it.
"""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import gradclip
from benchmarks.on_numpy import CLIP, Gradients, preparation
from benchmarks.results import Section, Table
from benchmarks.settings import Settings
from benchmarks.timing import Effort, compete
from benchmarks.trees import MODELS, gradients

AXES = {"last": -1, "first": 0, "second": 1}
RMS = "gradclip clip_grad_norm_, rms"
READS = "floor: two reads (np.dot of each leaf)"
SUM = "gradclip clipped_sum"
OPTAX_SUM = "optax per_example_global_norm_clip"

EXAMPLES, LEAVES, WIDTH = 256, 20, 5000


def per_unit(axis: str) -> str:
    return f"gradclip clip_grad_norm_, per unit, {axis} axis kept"


def _clip_units(g: Gradients, per: Any) -> object:
    return gradclip.clip_grad_norm_(g.tree, g.bound_of_each() / 2, per=per)


def units(settings: Settings, section: Section) -> None:
    """Clips per unit and of the root mean square, each to a bound that clips every group."""
    model = MODELS["resnet50"]
    g = Gradients(gradients(model.shapes))
    root = math.sqrt(model.parameters)
    contenders: dict[str, Callable[[], object]] = {
        CLIP: lambda: gradclip.clip_grad_norm_(g.tree, g.bound()),
        RMS: lambda: gradclip.clip_grad_norm_(g.tree, g.bound() / root, "rms"),
    }
    for name, axis in AXES.items():
        contenders[per_unit(name)] = partial(_clip_units, g, gradclip.Units(axis))
    title = f"NumPy, units, {model.described()}"
    timings = compete(title, contenders, settings.effort, prepare=preparation(g, settings.threads))
    section.tables.append(Table.of(timings, CLIP, title=title, tree=model.name, dtype="float32"))
    section.compare(timings, {"tree": model.name, "dtype": "float32"}, ("rms", RMS, CLIP))
    for name in AXES:
        where = {"tree": f"{model.name}, {name} axis kept", "dtype": "float32"}
        section.compare(timings, where, ("per unit", per_unit(name), CLIP))


def per_example_gradients() -> dict[str, Any]:
    return gradients({f"leaf{i}": (EXAMPLES, WIDTH) for i in range(LEAVES)})


def examples(settings: Settings, section: Section) -> None:
    """The sum of clipped examples in NumPy, its time and its memory."""
    tree = per_example_gradients()
    flat = [leaf.reshape(-1) for leaf in tree.values()]
    bound = math.sqrt(LEAVES * WIDTH) / 2
    contenders: dict[str, Callable[[], object]] = {
        READS: lambda: [np.dot(x, x) for _ in range(2) for x in flat],
        SUM: lambda: gradclip.clipped_sum(tree, bound),
    }
    title = f"NumPy, {EXAMPLES} examples of {LEAVES * WIDTH:,} parameters in {LEAVES} leaves"
    timings = compete(title, contenders, settings.effort)
    where = {"tree": f"{EXAMPLES} examples", "dtype": "float32"}
    section.tables.append(Table.of(timings, READS, title=title, **where))
    section.compare(timings, where, ("clipped sum", SUM, READS))
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        gradclip.clipped_sum(tree, bound)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    section.add("clipped sum, memory", peak / sum(x.nbytes for x in flat), **where)


def on_jax(settings: Settings, section: Section) -> None:
    """The same jitted, beside optax's."""
    import jax
    import optax

    tree = {name: jax.numpy.asarray(leaf) for name, leaf in per_example_gradients().items()}
    bound = math.sqrt(LEAVES * WIDTH) / 2

    def ours(grads: Any, max_norm: Any) -> Any:
        return tuple(gradclip.clipped_sum(grads, max_norm))

    def theirs(grads: Any, max_norm: Any) -> Any:
        return optax.per_example_global_norm_clip(list(grads.values()), max_norm)

    clips = {SUM: jax.jit(ours), OPTAX_SUM: jax.jit(theirs)}
    warm = {name: (lambda f=f: jax.block_until_ready(f(tree, bound))) for name, f in clips.items()}
    title = f"JAX on {jax.devices()[0].device_kind}, {EXAMPLES} examples of {LEAVES * WIDTH:,} parameters"
    timings = compete(title, warm, settings.effort)
    where = {"tree": f"{EXAMPLES} examples", "dtype": "float32"}
    section.tables.append(Table.of(timings, OPTAX_SUM, title=title, **where))
    section.compare(timings, where, ("clipped sum, optax", SUM, OPTAX_SUM))
    cold = {name: (lambda f=f: f.lower(tree, bound).compile()) for name, f in clips.items()}
    effort = Effort(least_rounds=1 if settings.short else 3)
    timings = compete(f"{title}, compilation", cold, effort, prepare=lambda name: jax.clear_caches(), cold=True)
    section.tables.append(Table.of(timings, OPTAX_SUM, title=f"{title}, compilation", **where))
    section.compare(timings, where, ("compile, clipped sum", SUM, OPTAX_SUM))


def run(settings: Settings) -> Section:
    section = Section("family")
    if "resnet50" in settings.trees:
        units(settings, section)
    else:
        section.not_run.append("clips per unit: ResNet-50 is not among the trees")
    examples(settings, section)
    try:
        on_jax(settings, section)
    except ImportError as error:
        section.not_run.append(f"the sum of clipped examples in JAX: {error}")
    return section

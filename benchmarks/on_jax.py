"""JAX: gradclip's clip and norm against `optax.clip_by_global_norm` and the norm that a training log wants beside it.

Both sides get the same arrays on one device, and hand back the clipped tree and the norm. The section runs once for
every platform that JAX has here: the CPU always, a GPU by itself where there is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import gradclip
from benchmarks.results import Section, Table
from benchmarks.settings import Settings
from benchmarks.timing import Effort, compete
from benchmarks.trees import MODELS, Model, gradients

COPY = "a copy, jitted"
OURS = "gradclip, jitted"
OPTAX = "optax + its norm, jitted"
OURS_EAGER = "gradclip, not jitted"
OPTAX_EAGER = "optax + its norm, not jitted"

Tree = dict[str, jax.Array]
Clip = Callable[[Tree, Any], tuple[Tree, Any]]


def our_clip(grads: Tree, max_norm: Any) -> tuple[Tree, jax.Array]:
    clipped, norm = gradclip.clip_grad_norm(grads, max_norm)
    return clipped, norm


def optax_clip(grads: Tree, max_norm: Any) -> tuple[Tree, jax.Array]:
    clipped, _ = optax.clip_by_global_norm(max_norm).update(grads, optax.EmptyState())
    return clipped, optax.tree.norm(grads)


def our_clip_of_each(grads: Tree, max_norm: Any) -> tuple[Tree, Tree]:
    clipped, norms = gradclip.clip_grad_norm(grads, max_norm, per="leaf")
    return clipped, norms


def optax_clip_of_each(grads: Tree, max_norm: Any) -> tuple[Tree, Tree]:
    both = {name: optax_clip({name: leaf}, max_norm) for name, leaf in grads.items()}
    return {name: clipped[name] for name, (clipped, _) in both.items()}, {
        name: norm for name, (_, norm) in both.items()
    }


def fresh(clip: Clip, **options: Any) -> Any:
    """A jitted function that JAX has not seen: its cache goes by the function's identity."""
    return jax.jit(lambda grads, max_norm: clip(grads, max_norm), **options)


def on_device(shapes: Mapping[str, tuple[int, ...]], dtype: str, device: Any) -> Tree:
    tree = gradients(shapes)
    return {name: jax.device_put(jnp.asarray(leaf, dtype), device) for name, leaf in tree.items()}


def wait(call: Callable[[], object]) -> Callable[[], object]:
    return lambda: jax.block_until_ready(call())


class Donated:
    """A training loop's view: the clipped tree takes the memory of the one before it, under an ever lower bound."""

    step = 1 - 1e-4

    def __init__(self, clip: Clip, kept: Tree, norm: float) -> None:
        self._function, self._kept, self._norm = fresh(clip, donate_argnums=0), kept, norm
        self.restore()

    def restore(self) -> None:
        self._grads = jax.block_until_ready({name: jnp.copy(leaf) for name, leaf in self._kept.items()})
        self._bound = self._norm / 2

    def __call__(self) -> None:
        self._bound *= self.step
        self._grads, norm = self._function(self._grads, self._bound)
        jax.block_until_ready((self._grads, norm))


def jitted(model: Model, dtype: str, device: Any, settings: Settings, section: Section) -> None:
    tree = on_device(model.shapes, dtype, device)
    norm = math.sqrt(model.parameters)
    copy = jax.jit(lambda grads: {name: jnp.copy(leaf) for name, leaf in grads.items()})
    ours, theirs = fresh(our_clip), fresh(optax_clip)
    contenders = {
        COPY: wait(lambda: copy(tree)),
        OURS: wait(lambda: ours(tree, norm / 2)),
        OPTAX: wait(lambda: theirs(tree, norm / 2)),
    }
    place = f"JAX on {device.device_kind}"
    timings = compete(f"{place}, {dtype}, {model.name}", contenders, settings.effort)
    where = {"tree": model.name, "dtype": dtype}
    described = model.described(jnp.dtype(dtype).itemsize)
    section.tables.append(Table.of(timings, OPTAX, title=f"{place}, {dtype}, {described}", **where))
    narrow = ", bfloat16, cpu" if dtype == "bfloat16" and device.platform == "cpu" else ""
    section.compare(timings, where, (f"jit run{narrow}", OURS, OPTAX))
    if settings.short:
        return
    donated = {OURS: Donated(our_clip, tree, norm), OPTAX: Donated(optax_clip, tree, norm)}

    timings = compete(
        f"{place}, donated, {dtype}, {model.name}",
        donated,
        settings.effort,
        prepare=lambda name: donated[name].restore(),
    )
    section.tables.append(Table.of(timings, OPTAX, title=f"{place}, donated, {dtype}, {described}", **where))
    section.compare(timings, where, (f"jit donated{narrow}", OURS, OPTAX))


def compilation(model: Model, dtype: str, device: Any, settings: Settings, section: Section) -> None:
    """Tracing, lowering and compiling, from empty caches each time."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    tree = {
        name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding) for name, shape in model.shapes.items()
    }
    clips = {OURS: our_clip, OPTAX: optax_clip}
    contenders = {name: (lambda clip=clip: fresh(clip).lower(tree, 1.0).compile()) for name, clip in clips.items()}
    effort = Effort(least_rounds=2 if settings.short else 5)
    title = f"JAX on {device.device_kind}, compilation, {dtype}, {model.name}"
    timings = compete(title, contenders, effort, prepare=lambda name: jax.clear_caches(), cold=True)
    where = {"tree": model.name, "dtype": dtype}
    section.tables.append(Table.of(timings, OPTAX, title=title, **where))
    section.compare(timings, where, ("compile", OURS, OPTAX))


def by_leaf(device: Any, settings: Settings, section: Section) -> None:
    """Each leaf of 1,000 by itself."""
    model = MODELS["small"]
    tree = on_device(model.shapes, "float32", device)
    clips = {OURS: fresh(our_clip_of_each), OPTAX: fresh(optax_clip_of_each)}
    where = {"tree": model.name, "dtype": "float32"}
    cold: dict[str, Callable[[], object]] = {
        OURS: lambda: clips[OURS].lower(tree, 1.0).compile(),
        OPTAX: lambda: clips[OPTAX].lower(tree, 1.0).compile(),
    }
    title = f"JAX on {device.device_kind}, per leaf, compilation, {model.name}"
    timings = compete(title, cold, Effort(least_rounds=2), prepare=lambda name: jax.clear_caches(), cold=True)
    section.tables.append(Table.of(timings, OPTAX, title=title, **where))
    section.compare(timings, where, ("compile, per leaf", OURS, OPTAX))
    title = f"JAX on {device.device_kind}, per leaf, {model.name}"
    warm = {OURS: wait(lambda: clips[OURS](tree, 1.0)), OPTAX: wait(lambda: clips[OPTAX](tree, 1.0))}
    timings = compete(title, warm, settings.effort)
    section.tables.append(Table.of(timings, OPTAX, title=title, **where))
    section.compare(timings, where, ("jit run, per leaf", OURS, OPTAX))


def eager(model: Model, device: Any, settings: Settings, section: Section) -> None:
    tree = on_device(model.shapes, "float32", device)
    bound = math.sqrt(model.parameters) / 2
    contenders = {
        OURS_EAGER: wait(lambda: our_clip(tree, bound)),
        OPTAX_EAGER: wait(lambda: optax_clip(tree, bound)),
    }
    title = f"JAX on {device.device_kind}, not jitted, {model.described()}"
    timings = compete(title, contenders, settings.effort)
    where = {"tree": model.name, "dtype": "float32"}
    section.tables.append(Table.of(timings, OPTAX_EAGER, title=title, **where))
    section.compare(timings, where, ("eager", OURS_EAGER, OPTAX_EAGER))


def first_call(device: Any, settings: Settings, section: Section) -> None:
    """On 1,000 leaves that JAX has not seen, with nothing compiled."""
    model = MODELS["small"]
    tree = on_device(model.shapes, "float32", device)
    contenders = {OURS_EAGER: wait(lambda: our_clip(tree, 1.0))}
    if not settings.short:
        contenders[OPTAX_EAGER] = wait(lambda: optax_clip(tree, 1.0))
    effort = Effort(least_rounds=1 if settings.short else 5)
    title = f"JAX on {device.device_kind}, first call, not jitted, {model.name}"
    timings = compete(title, contenders, effort, prepare=lambda name: jax.clear_caches(), cold=True)
    where = {"tree": model.name, "dtype": "float32"}
    section.tables.append(Table.of(timings, OURS_EAGER, title=title, **where))
    section.add("first call", timings.spread(OURS_EAGER).median, **where)


def traces(clip: Clip, shapes: Mapping[str, tuple[int, ...]], device: Any) -> dict[str, int]:
    """How often the jitted clip is traced again: for another tree of the same shapes, and for another bound."""
    count = 0

    def counted(grads: Tree, max_norm: Any) -> tuple[Tree, jax.Array]:
        nonlocal count
        count += 1
        return clip(grads, max_norm)

    function = jax.jit(counted)
    tree = on_device(shapes, "float32", device)
    function(tree, 1.0)
    first = count
    function({name: 2 * leaf for name, leaf in tree.items()}, 1.0)
    same = count
    function(tree, 0.25)
    return {"same shapes": same - first, "changed bound": count - same}


def eager_compilations(clip: Clip, shapes: Mapping[str, tuple[int, ...]], device: Any) -> int:
    """How many programs JAX compiles for the second call without jit: same shapes, other values, another bound."""
    compiled: list[str] = []

    def listen(event: str, duration: float, **details: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    tree = on_device(shapes, "float32", device)
    other = {name: 2 * leaf for name, leaf in tree.items()}
    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.block_until_ready(clip(tree, 1.0))
    if not compiled:  # this JAX reports no compilations, or all was in its cache
        jax.clear_caches()
        jax.block_until_ready(clip(tree, 1.0))
        if not compiled:
            raise RuntimeError("this JAX reports no compilations")
    compiled.clear()
    jax.block_until_ready(clip(other, 0.25))
    return len(compiled)


def devices() -> list[Any]:
    """One device of each platform that JAX has here: the CPU, and an accelerator if there is one."""
    found = {device.platform: device for device in reversed([*jax.devices("cpu"), *jax.devices()])}
    return [found[platform] for platform in sorted(found)]


def run(settings: Settings) -> Section:
    section = Section("jax")
    places = devices()
    if {device.platform for device in places} == {"cpu"}:
        section.not_run.append("JAX on a GPU: none found, not run")
    for device in places:
        with jax.default_device(device):
            on(device, settings, section)
    return section


def on(device: Any, settings: Settings, section: Section) -> None:
    quick = [model for model in settings.models if not settings.short or model.leaves < 100]
    for model in quick:
        for dtype in ("float32", "bfloat16"):
            jitted(model, dtype, device, settings, section)
    for model in quick:
        for dtype in ("float32",) if settings.short else ("float32", "bfloat16"):
            compilation(model, dtype, device, settings, section)
    if settings.short:
        section.not_run.append("JAX with donated gradients: not in short mode")
    if len(quick) < len(settings.models):  # to compile optax's clip of 1,000 leaves alone takes 8 s
        section.not_run.append("JAX, jitted, trees of 100 leaves and more: not in short mode")
    if "resnet50" in settings.trees:
        eager(MODELS["resnet50"], device, settings, section)
    if "small" in settings.trees:
        first_call(device, settings, section)
        if settings.short:
            section.not_run.append("JAX, per leaf: not in short mode")
        else:
            by_leaf(device, settings, section)
    name, shapes = "MLP 784-256-128-10", MODELS["mlp"].shapes
    counts = traces(our_clip, shapes, device)
    section.add("retraces", counts["same shapes"], tree=name)
    section.add("retraces, bound", counts["changed bound"], tree=name)
    try:
        section.add("compilations", eager_compilations(our_clip, shapes, device), tree=name)
    except RuntimeError as error:
        section.not_run.append(f"compilations without jit: {error}")

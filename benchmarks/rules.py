"""Rules of `gradclip.adaptive`: a clip by the bound that one chooses, beside a clip by a fixed bound.

The global norm of float32 gradients, in NumPy and torch as called, in JAX jitted. No bound clips anything, so that what
differs is what a rule adds: it does not depend on the size of the gradients, but calculates with one norm, `AutoClip`
with its history.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

import gradclip
from benchmarks.results import Section, Table
from benchmarks.settings import Settings
from benchmarks.timing import Effort, compete
from benchmarks.trees import gradients
from gradclip.adaptive import AdaGC, AutoClip, NormGrowth, Rule, ZClip

FIXED = "gradclip clip_grad_norm"
RULES: dict[str, Rule] = {
    "AutoClip, history 1000": AutoClip(0.1),
    "ZClip": ZClip(),
    "AdaGC": AdaGC(max_norm=math.inf),
    "NormGrowth": NormGrowth(),
}


def calls(grads: Mapping[str, Any]) -> dict[str, Callable[[], object]]:
    """The contenders, as called."""
    found: dict[str, Callable[[], object]] = {FIXED: lambda: gradclip.clip_grad_norm(grads, math.inf)}
    return found | {name: partial(rule.clip, grads, rule.init(grads)) for name, rule in RULES.items()}


def jitted(grads: Mapping[str, Any]) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """The contenders as jitted functions, and what each is given."""
    import jax

    found: dict[str, tuple[Any, tuple[Any, ...]]] = {
        FIXED: (jax.jit(lambda g: tuple(gradclip.clip_grad_norm(g, math.inf))), (grads,))
    }
    for name, rule in RULES.items():
        found[name] = jax.jit(lambda g, s, rule=rule: tuple(rule.clip(g, s))), (grads, rule.init(grads))
    return found


def _contest(section: Section, settings: Settings, title: str, tree: str, contenders: Any, **how: Any) -> None:
    timings = compete(title, contenders, how.pop("effort", settings.effort), **how)
    section.tables.append(Table.of(timings, FIXED, title=title, tree=tree, dtype="float32"))


def on_jax(settings: Settings, section: Section) -> None:
    import jax

    for model in settings.models:
        grads = {name: jax.numpy.asarray(x) for name, x in gradients(model.shapes).items()}
        functions = jitted(grads)
        warm = {name: (lambda f=f, g=g: jax.block_until_ready(f(*g))) for name, (f, g) in functions.items()}
        _contest(section, settings, f"JAX, jitted, {model.described()}", model.name, warm)
        if model is settings.models[0]:
            cold = {name: (lambda f=f, g=g: f.lower(*g).compile()) for name, (f, g) in functions.items()}
            effort = Effort(least_rounds=1 if settings.short else 3)
            how = {"effort": effort, "cold": True, "prepare": lambda name: jax.clear_caches()}
            _contest(section, settings, f"JAX, compilation, {model.described()}", model.name, cold, **how)


def on_torch(settings: Settings, section: Section) -> None:
    import torch

    for model in settings.models:
        grads = {name: torch.from_numpy(np.asarray(x)) for name, x in gradients(model.shapes).items()}
        _contest(section, settings, f"torch, {model.described()}", model.name, calls(grads))


def run(settings: Settings) -> Section:
    section = Section("rules")
    for model in settings.models:
        _contest(section, settings, f"NumPy, {model.described()}", model.name, calls(gradients(model.shapes)))
    for name, on in {"JAX": on_jax, "torch": on_torch}.items():
        try:
            on(settings, section)
        except ImportError as error:
            section.not_run.append(f"rules in {name}: {error}")
    return section

"""`torch.compile(fullgraph=True)` of gradclip's clip and of torch's own: how fast it runs, and how long it compiles.

Bounds are tensors: a bound that is a Python number would be compiled anew for each number.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import gradclip.torch
from benchmarks.on_numpy import CLIP, TORCH
from benchmarks.on_torch import Tensors
from benchmarks.results import Section, Table
from benchmarks.settings import Settings
from benchmarks.timing import Effort, compete
from benchmarks.trees import Model

COMPILED, TORCH_COMPILED = f"{CLIP}, compiled", f"{TORCH}, compiled"
PARTNERS = {COMPILED: TORCH_COMPILED, CLIP: TORCH}


def our_clip(parameters: Any, max_norm: Any) -> Any:
    return gradclip.torch.clip_grad_norm_(parameters, max_norm)


def torch_clip(parameters: Any, max_norm: Any) -> Any:
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm)


CLIPS = {COMPILED: our_clip, TORCH_COMPILED: torch_clip}


def compiled(clip: Callable[..., Any], t: Tensors) -> Callable[[], Any]:
    """Calls of the clip as compiled. The first compiles."""
    call = torch.compile(clip, fullgraph=True)
    return lambda: call(t.parameters, torch.tensor(t.bound()))


def from_scratch(clip: Callable[..., Any], t: Tensors) -> None:
    """One call, and all that is compiled for it: nothing is found in Inductor's files."""
    from torch._inductor import utils

    empty = utils.fresh_cache if hasattr(utils, "fresh_cache") else utils.fresh_inductor_cache  # before torch 2.8
    with empty():
        compiled(clip, t)()


def contest(model: Model, settings: Settings, section: Section) -> None:
    t = Tensors(model.shapes, "float32")
    calls: dict[str, Callable[[], object]] = {}
    for name, clip in CLIPS.items():
        calls[name] = compiled(clip, t)
        try:
            calls[name]()
        except Exception as error:  # Dynamo's, Inductor's, a C++ compiler's: all of them say that there is no such row
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            section.not_run.append(f"{name}, {model.name}: not compiled: {reason}")
            return
    for name, clip in {CLIP: our_clip, TORCH: torch_clip}.items():
        calls[name] = partial(_clip_once, clip, t)
    title = f"torch tensors, compiled, {model.described()}"
    timings = compete(title, calls, settings.effort, prepare=lambda name: t.restore())
    where = {"tree": model.name, "dtype": "float32"}
    section.tables.append(Table.of(timings, "torch's own", PARTNERS, title=title, **where))
    section.compare(timings, where, ("tensors, compiled", COMPILED, TORCH_COMPILED))

    def prepare(name: str) -> None:
        t.restore()
        torch.compiler.reset()

    cold = {name: partial(from_scratch, clip, t) for name, clip in CLIPS.items()}
    title = f"{title}, compilation"
    timings = compete(title, cold, Effort(least_rounds=2), prepare=prepare, cold=True)
    section.tables.append(Table.of(timings, TORCH_COMPILED, title=title, **where))
    section.compare(timings, where, ("tensors, compilation", COMPILED, TORCH_COMPILED))


def _clip_once(clip: Callable[..., Any], t: Tensors) -> Any:
    return clip(t.parameters, torch.tensor(t.bound()))

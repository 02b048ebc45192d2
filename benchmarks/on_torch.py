"""torch tensors on the CPU: `gradclip.torch` beside `torch.nn.utils`, both given the same parameters.

On all threads and on one; the limits of torch and of gradclip are the same, for gradclip measures by its own threads
and multiplies by torch's. Floors, by torch's threads: a read of the bits, which is as fast in every dtype, where
`torch.dot` is ten times slower in 16 bits than in 32; and with a multiplication after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch

import gradclip.torch
from benchmarks.on_numpy import CLIP, EACH, IDLE, NO_NORM, TORCH, TORCH_IDLE, TORCH_NORM, Bounds
from benchmarks.results import Section, Table
from benchmarks.settings import Settings
from benchmarks.timing import compete
from benchmarks.trees import LEAVES_64, MODELS, Model, gradients

DTYPES = ("float32", "bfloat16", "float16")
READ = "floor: one read (the largest of each leaf's bits)"
IN_PLACE = "floor: read + in-place multiply"
NORM = "gradclip get_total_norm"
VALUE = "gradclip clip_grad_value_"
TORCH_VALUE = "torch clip_grad_value_"

#: What each is compared with: torch's function of that name. It has no clip per leaf, and floors are those of a clip.
PARTNERS = {
    READ: TORCH,
    IN_PLACE: TORCH,
    CLIP: TORCH,
    IDLE: TORCH_IDLE,
    NORM: TORCH_NORM,
    VALUE: TORCH_VALUE,
    EACH: TORCH,
}


class Tensors(Bounds):
    """Parameters whose gradients contenders may write to, put back between samples.

    A parameter stands on its gradient's memory: clipping looks at `.grad` only.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
        self.grads = [torch.from_numpy(leaf).to(getattr(torch, dtype)) for leaf in gradients(shapes).values()]
        self.parameters = [torch.nn.Parameter(grad) for grad in self.grads]
        for parameter, grad in zip(self.parameters, self.grads, strict=True):
            parameter.grad = grad
        self._kept = [grad.clone() for grad in self.grads]
        norms = [float(torch.linalg.vector_norm(grad, dtype=torch.float64)) for grad in self.grads]
        super().__init__([norm**2 for norm in norms])

    def restore(self) -> None:
        for grad, kept in zip(self.grads, self._kept, strict=True):
            grad.copy_(kept)
        self.begin()


@contextmanager
def limited(threads: int, after: int) -> Iterator[None]:
    """At most so many threads for both, and `after` for torch afterwards."""
    torch.set_num_threads(threads)
    gradclip.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(after)
        gradclip.set_num_threads(None)


def calls(t: Tensors) -> dict[str, Callable[[], object]]:
    """The contenders; torch's `get_total_norm` where it has one."""
    ours, theirs = gradclip.torch, torch.nn.utils
    bits = [grad.view(torch.int32 if grad.itemsize == 4 else torch.int16) for grad in t.grads]

    def read() -> object:
        return [x.max() for x in bits]

    def read_and_multiply() -> None:
        read()
        torch._foreach_mul_(t.grads, t.step)

    found: dict[str, Callable[[], object]] = {
        READ: read,
        IN_PLACE: read_and_multiply,
        CLIP: lambda: ours.clip_grad_norm_(t.parameters, t.bound()),
        TORCH: lambda: theirs.clip_grad_norm_(t.parameters, t.bound()),
        IDLE: lambda: ours.clip_grad_norm_(t.parameters, t.idle_bound()),
        TORCH_IDLE: lambda: theirs.clip_grad_norm_(t.parameters, t.idle_bound()),
    }
    if hasattr(theirs, "get_total_norm"):  # torch 2.6
        found[NORM] = lambda: ours.get_total_norm(t.grads)
        found[TORCH_NORM] = lambda: theirs.get_total_norm(t.grads)
    return found | {
        VALUE: lambda: ours.clip_grad_value_(t.parameters, 1.0),
        TORCH_VALUE: lambda: theirs.clip_grad_value_(t.parameters, 1.0),
        EACH: lambda: ours.clip_grad_norm_(t.parameters, t.bound_of_each(), per="leaf"),
    }


def aim(model: Model, dtype: str) -> str:
    """Which target a clip of this has."""
    if model is LEAVES_64:
        return "tensors, 50 leaves"
    if model not in (MODELS["resnet50"], MODELS["gpt2"]):
        return "tensors, no aim"
    return "tensors, float16" if dtype == "float16" else "tensors"


def contest(model: Model, dtype: str, threads: int, settings: Settings, section: Section) -> None:
    t = Tensors(model.shapes, dtype)
    effort = replace(settings.effort, seconds=settings.effort.seconds / 2)  # there are many of these
    on = f"{threads} thread{'s' if threads > 1 else ''}"
    title = f"torch tensors, {dtype}, {on}, {model.described(t.grads[0].itemsize)}"
    with limited(threads, settings.threads):
        timings = compete(title, calls(t), effort, prepare=lambda name: t.restore())
    where = {"tree": f"{model.name}, {on}", "dtype": dtype}
    section.tables.append(Table.of(timings, "torch's own", PARTNERS, title=title, **where))
    section.compare(timings, where, (aim(model, dtype), CLIP, TORCH))


def run(settings: Settings) -> Section:
    section = Section("torch")
    if not hasattr(torch.nn.utils, "get_total_norm"):
        section.not_run.append(NO_NORM)
    limits = sorted({1, settings.threads}, reverse=True)
    if settings.short and len(limits) > 1:
        section.not_run.append("torch tensors on one thread: not in short mode")
        limits = limits[:1]
    for model in [LEAVES_64, *settings.models]:
        for dtype in DTYPES:
            for threads in limits:
                contest(model, dtype, threads, settings, section)
    if settings.short:
        section.not_run.append("torch tensors, compiled: not in short mode")
        return section
    from benchmarks import torch_compiled

    for model in (MODELS["mlp"], LEAVES_64):
        torch_compiled.contest(model, settings, section)
    return section

"""CuPy on a GPU: gradclip against a copy of the same bytes on the device, measured in the same run.

A copy reads and writes every byte once. A norm reads them once, half of that; a clip that clips reads twice and writes
once, one and a half; the rest is launches. Times are between two CUDA events on the current stream, so that they hold
what the device did and what it waited for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import gradclip
from benchmarks.results import Section, Table
from benchmarks.settings import Settings
from benchmarks.timing import Stopwatch, compete
from benchmarks.trees import Model, gradients

COPY = "floor: a copy on the device"
TORCH = "torch clip_grad_norm_"
NORM = "gradclip global_norm"
CLIP = "gradclip clip_grad_norm_"
IDLE = "gradclip clip_grad_norm_, nothing to clip"
FUNCTIONAL = "gradclip clip_grad_norm"
ABSENT = "GPU: none found, not run"


def event_stopwatch(cupy: Any) -> Stopwatch:
    """Seconds between two events around the calls; the host waits once, at the end."""
    begin, end = cupy.cuda.Event(), cupy.cuda.Event()

    def run(call: Callable[[], object], repeats: int) -> float:
        cupy.cuda.get_current_stream().synchronize()
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return 1e-3 * float(cupy.cuda.get_elapsed_time(begin, end))

    return run


class DeviceGradients:
    """A tree on the device, put back between samples; and a bound a little lower with each call, as on the host."""

    step = 1 - 1e-4

    def __init__(self, cupy: Any, model: Model, dtype: str) -> None:
        self.tree = {name: cupy.asarray(leaf) for name, leaf in gradients(model.shapes, dtype).items()}
        self._kept = {name: leaf.copy() for name, leaf in self.tree.items()}
        self.norm = math.sqrt(model.parameters)
        self.bytes = sum(leaf.nbytes for leaf in self.tree.values())
        self.restore()

    def restore(self) -> None:
        for name, leaf in self.tree.items():
            leaf[...] = self._kept[name]
        self._bound = self.norm / 2

    def bound(self) -> float:
        self._bound *= self.step
        return self._bound


def copy_of(cupy: Any, size: int) -> Callable[[], None]:
    """One asynchronous copy of so many bytes, from one buffer on the device to another."""
    source, target = cupy.zeros(size, cupy.uint8), cupy.empty(size, cupy.uint8)
    return lambda: target.data.copy_from_device_async(source.data, size, cupy.cuda.get_current_stream())


def torch_peer(g: DeviceGradients) -> Callable[[], object]:
    """torch on the same memory; both libraries work on the default stream."""
    import torch

    if not torch.cuda.is_available():
        raise ImportError("this torch sees no GPU")
    params = []
    for leaf in g.tree.values():
        params.append(torch.nn.Parameter(torch.utils.dlpack.from_dlpack(leaf)))
        params[-1].grad = params[-1].detach()
    return lambda: torch.nn.utils.clip_grad_norm_(params, g.bound())


def contest(cupy: Any, model: Model, dtype: str, settings: Settings, section: Section) -> None:
    g = DeviceGradients(cupy, model, dtype)
    contenders: dict[str, Callable[[], object]] = {COPY: copy_of(cupy, g.bytes)}
    try:
        contenders[TORCH] = torch_peer(g)
    except ImportError as error:
        section.not_run.append(f"torch beside CuPy: {error}")
    contenders |= {
        NORM: lambda: gradclip.global_norm(g.tree),
        CLIP: lambda: gradclip.clip_grad_norm_(g.tree, g.bound()),
        IDLE: lambda: gradclip.clip_grad_norm_(g.tree, 2 * g.norm),
        FUNCTIONAL: lambda: gradclip.clip_grad_norm(g.tree, g.bound()),
    }
    place = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
    title = f"CuPy on {place}, {dtype}, {model.described(cupy.dtype(dtype).itemsize)}"
    watch = event_stopwatch(cupy)
    timings = compete(title, contenders, settings.effort, prepare=lambda name: g.restore(), stopwatch=watch)
    where = {"tree": model.name, "dtype": dtype}
    section.tables.append(Table.of(timings, COPY, title=title, **where))
    rows = [("gpu norm", NORM), ("gpu in place", CLIP), ("gpu functional", FUNCTIONAL), ("gpu idle", IDLE)]
    section.compare(timings, where, *((key, name, COPY) for key, name in rows))
    seconds = timings.spread(COPY).median
    section.notes.append(f"{title}: the copy moves {2 * g.bytes / seconds / 1e9:,.0f} GB/s, read and written")


def run(settings: Settings) -> Section:
    section = Section("gpu")
    try:
        import cupy
    except ImportError as error:
        section.not_run.append(f"{ABSENT} (CuPy: {error})")
        return section
    try:
        found = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        section.not_run.append(f"{ABSENT} (CuPy: {error})")
        return section
    if not found:
        section.not_run.append(ABSENT)
        return section
    for model in settings.models:
        for dtype in ("float32", "float16"):
            contest(cupy, model, dtype, settings, section)
    return section

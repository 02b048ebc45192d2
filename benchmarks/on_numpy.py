"""NumPy, float32: gradclip between the floor that one core's memory sets, and what a person would write or import.

Floors run on one thread: `np.dot` of each leaf with itself reads all once, and nothing that has to know the norm of
all leaves before it scales them can do with less than that read and one multiplication after it.

gradclip is given the NumPy arrays, and torch tensors on the same memory. `on_torch` gives the same tensors to both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

import gradclip
from benchmarks.results import Section, Table
from benchmarks.settings import Settings
from benchmarks.timing import compete
from benchmarks.trees import MODELS, Array, Model, gradients

READ = "floor: one read (np.dot of each leaf)"
IN_PLACE = "floor: read + in-place multiply"
FRESH = "floor: read + fresh product"
JOINED = "one concatenation, one np.dot"
PLAIN = "plain NumPy clip"
TORCH_NORM = "torch get_total_norm"
TORCH = "torch clip_grad_norm_"
TORCH_IDLE = "torch clip_grad_norm_, nothing to clip"
ONE_THREAD = ", one thread"
NO_NORM = f"{TORCH_NORM}: torch before 2.6 has none"
GIVEN = "; torch is given tensors on the same memory"
NORM = "gradclip global_norm"
CLIP = "gradclip clip_grad_norm_"
IDLE = "gradclip clip_grad_norm_, nothing to clip"
FUNCTIONAL = "gradclip clip_grad_norm"
EACH = "gradclip clip_grad_norm_, per leaf"


class Bounds:
    """Bounds that always clip, given the sum of squares of each leaf.

    A gradient that was clipped to a bound is not clipped by that bound again. So each call gets a bound a little lower
    than the last, half the norm at first: every call of a sample does the same work, and shrinks what it scales by one
    part in 10,000, far from subnormal numbers.
    """

    step = 1 - 1e-4

    def __init__(self, squares: Sequence[float]) -> None:
        self.norm = math.sqrt(sum(squares))
        self._least = math.sqrt(min(squares))  # the norm of a leaf
        self.begin()

    def begin(self) -> None:
        """Anew, for gradients as they were at first."""
        self._bound = self.norm / 2
        self._bound_of_each = self._least / 2

    def bound(self) -> float:
        self._bound *= self.step
        return self._bound

    def bound_of_each(self) -> float:
        """A bound that clips every leaf by itself."""
        self._bound_of_each *= self.step
        return self._bound_of_each

    def idle_bound(self) -> float:
        return 2 * self.norm


class Gradients(Bounds):
    """A tree that contenders may write to, put back between samples."""

    def __init__(self, tree: Mapping[str, Array]) -> None:
        self.tree = dict(tree)
        self.leaves = list(self.tree.values())
        self.flat = [leaf.reshape(-1) for leaf in self.leaves]
        self._kept = [leaf.copy() for leaf in self.leaves]
        super().__init__([_sum_of_squares(leaf) for leaf in self.flat])

    def restore(self) -> None:
        for leaf, kept in zip(self.leaves, self._kept, strict=True):
            np.copyto(leaf, kept)
        self.begin()


def _sum_of_squares(flat: Array) -> float:
    chunks: Iterator[Array] = (flat[i : i + (1 << 20)].astype(np.float64) for i in range(0, flat.size, 1 << 20))
    return sum(float(np.dot(chunk, chunk)) for chunk in chunks)


def plain_clip(grads: Mapping[str, Array], max_norm: float) -> tuple[dict[str, Array], Any]:
    """What one writes by hand: two lines that read well, overflow in float16, and write fresh arrays."""
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in grads.values()))
    factor = min(1.0, max_norm / (float(norm) + 1e-6))
    return {name: g * np.float32(factor) for name, g in grads.items()}, norm


def floors(g: Gradients) -> dict[str, Callable[[], object]]:
    near_one = g.leaves[0].dtype.type(g.step)

    def read() -> object:
        return [np.dot(x, x) for x in g.flat]

    def read_and_multiply() -> None:
        read()
        for x in g.flat:
            np.multiply(x, near_one, out=x)

    def read_and_fresh() -> object:
        read()
        return [x * near_one for x in g.flat]

    return {READ: read, IN_PLACE: read_and_multiply, FRESH: read_and_fresh}


def torch_peers(g: Gradients, threads: int) -> dict[str, Callable[[], object]]:
    """torch, given tensors on the memory of the NumPy arrays that gradclip is given.

    The parameters stand on it too: clipping looks at their `.grad` only.

    With several threads, also on one: for small trees that is the faster of the two, by far on a busy machine.
    """
    import torch

    tensors = [as_tensor(leaf) for leaf in g.leaves]
    params = [torch.nn.Parameter(tensor) for tensor in tensors]
    for param, tensor in zip(params, tensors, strict=True):
        param.grad = tensor
    clip = torch.nn.utils.clip_grad_norm_
    calls: dict[str, Callable[[], object]] = {
        TORCH: lambda: clip(params, g.bound()),
        TORCH_IDLE: lambda: clip(params, g.idle_bound()),
    }
    if hasattr(torch.nn.utils, "get_total_norm"):  # torch 2.6
        calls = {TORCH_NORM: lambda: torch.nn.utils.get_total_norm(tensors), **calls}
    return calls if threads == 1 else calls | {name + ONE_THREAD: call for name, call in calls.items()}


def preparation(g: Gradients, threads: int) -> Callable[[str], None]:
    """Before each sample: the gradients as they were, and torch's threads as the contender's name says."""

    def prepare(name: str) -> None:
        g.restore()
        if name.startswith("torch"):
            import torch

            torch.set_num_threads(1 if name.endswith(ONE_THREAD) else threads)

    return prepare


def as_tensor(leaf: Array) -> Any:
    """A tensor on the leaf's memory; bfloat16 goes by its bits, for torch takes none from NumPy."""
    import torch

    if leaf.dtype.name == "bfloat16":
        return torch.from_numpy(leaf.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(leaf)


def ours(g: Gradients) -> dict[str, Callable[[], object]]:
    return {
        NORM: lambda: gradclip.global_norm(g.tree),
        CLIP: lambda: gradclip.clip_grad_norm_(g.tree, g.bound()),
        IDLE: lambda: gradclip.clip_grad_norm_(g.tree, g.idle_bound()),
        FUNCTIONAL: lambda: gradclip.clip_grad_norm(g.tree, g.bound()),
        EACH: lambda: gradclip.clip_grad_norm_(g.tree, g.bound_of_each(), per="leaf"),
    }


def contest(model: Model, settings: Settings, section: Section) -> None:
    g = Gradients(gradients(model.shapes))
    contenders = floors(g)
    if model.parameters < 2_000_000:
        contenders[JOINED] = lambda: _dot_with_itself(np.concatenate(g.flat))
    contenders[PLAIN] = lambda: plain_clip(g.tree, g.bound())
    try:
        contenders |= torch_peers(g, settings.threads)
        section.not_run += [] if TORCH_NORM in contenders else [NO_NORM]
    except ImportError as error:
        section.not_run.append(f"torch beside NumPy: {error}")
    contenders |= ours(g)
    timings = compete(f"NumPy, {model.name}", contenders, settings.effort, prepare=preparation(g, settings.threads))
    where = {"tree": model.name, "dtype": "float32"}
    section.tables.append(Table.of(timings, READ, title=f"NumPy, {model.described()}{GIVEN}", **where))
    if model.parameters > 10_000_000:
        section.compare(timings, where, ("norm", NORM, READ), ("in place", CLIP, IN_PLACE))
        if settings.threads > 1:
            section.compare(timings, where, ("threads", CLIP, IN_PLACE))
        section.compare(timings, where, ("functional", FUNCTIONAL, FRESH))
        section.compare(
            timings, where, ("idle", IDLE, READ), ("idle, torch", IDLE, TORCH_IDLE, TORCH_IDLE + ONE_THREAD)
        )
        section.compare(timings, where, ("per leaf", EACH, CLIP))
    if model is MODELS["small"]:
        section.compare(timings, where, ("per leaf, small", EACH, CLIP))
    for key in ("small", "mlp"):
        if model is MODELS[key]:
            section.compare(timings, where, (key, CLIP, TORCH, TORCH + ONE_THREAD))


def _dot_with_itself(x: Array) -> Any:
    return np.dot(x, x)


def run(settings: Settings) -> Section:
    section = Section("numpy")
    for model in settings.models:
        contest(model, settings, section)
    return section

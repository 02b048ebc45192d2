"""Which kernels the model counts, and what of them. This is the one place to edit when the kernels change."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.nvrtc import without_cupy
from gradclip._norms import norm_for

without_cupy()

from gradclip._backends.cupy import programs  # noqa: E402
from gradclip._backends.cupy.numbers import KINDS, REAL  # noqa: E402
from gradclip._backends.cupy.text import KEPT, LEAVES, ONE, WHOLE  # noqa: E402

SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
#: The block of every kernel.
from gradclip._backends.cupy.text import THREADS  # noqa: E402


class Case(NamedTuple):
    name: str
    kind: str  # the dtype of the leaf
    kernel: str
    source: Callable[[], str]
    passes: int = 1  # how often an element crosses the memory bus: 2 where it is read and written
    beside: int = 0  # bytes that are loaded for each element and come out of a cache: factors of groups
    work: str = ""  # instructions, as a pattern, that are run for every element whose path counts
    worked: int = 0  # and how many
    around: int = 0  # count a turn of so many loops around the hot one: where that turns once
    pick: str = "cheap"  # of several loops with as many bytes: the cheap one or the dear one
    options: tuple[str, ...] = ()


def _norm(name: str, p: float | str, kind: str, step: int = 0) -> Case:
    norm = norm_for(p, binned=True)
    return Case(f"{name} {kind}", kind, "gradclip_measure", lambda: programs.measure(norm, step, (kind,)))


def _kept(name: str, kind: str, around: int) -> Case:
    norm = norm_for(2.0, binned=True)
    source = lambda: programs.spread(norm, 0, (kind,))  # noqa: E731
    return Case(f"norm, kept axis, {name}, {kind}", kind, "gradclip_spread", source, around=around)


def _scale(name: str, kind: str, grouped: int = ONE) -> Case:
    return Case(
        f"{name} {kind}",
        kind,
        "gradclip_scale",
        lambda: programs.scale((kind,), grouped),
        passes=2,
        beside=16 if grouped == KEPT else 0,
        work="DMUL|FMUL.*",
        worked=3,  # by shift, factor and shift: neither unchanged nor zero
    )


def _weighted(kind: str) -> Case:
    source = lambda: programs.weighted((kind,))  # noqa: E731
    return Case(f"weighted sum {kind}", kind, "gradclip_weighted", source, beside=16, work="DMUL|FMUL.*", worked=3)


CASES = [
    *(_norm("norm", 2.0, kind) for kind in ("float32", "float16", "bfloat16", "float64")),
    *(_norm("p = 1", 1.0, kind) for kind in ("float32", "bfloat16")),
    *(_norm("p = inf", math.inf, kind) for kind in ("float32", "bfloat16")),
    *(_norm("rms", "rms", kind) for kind in ("float32", "bfloat16")),
    *(_kept("long rows", kind, 0) for kind in ("float32", "bfloat16")),
    *(_kept("short rows or columns", kind, 1) for kind in ("float32", "bfloat16")),
    *(_scale("scale", kind) for kind in ("float32", "float16", "bfloat16", "float64")),
    *(_scale("scale, by leaf,", kind, WHOLE) for kind in ("float32", "bfloat16")),
    *(_scale("scale, kept axis,", kind, KEPT) for kind in ("float32", "bfloat16")),
    *(_weighted(kind) for kind in ("float32", "float64")),
]


def first_clip(kind: str = "float32") -> list[tuple[str, str, tuple[str, ...]]]:
    """Every program that a first clip at p = 2 of leaves of one dtype compiles: kernel, source, options."""
    norm = norm_for(2.0, binned=True)
    return [
        ("gradclip_measure", programs.measure(norm, 0, (kind,)), ()),
        ("gradclip_settle", programs.settle(norm), ("--fmad=false",)),
        ("gradclip_scale", programs.scale((kind,), ONE), ()),
    ]

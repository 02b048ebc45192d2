"""Which kernels the model counts, and what of them. This is the one place to edit when the kernels change."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.nvrtc import without_cupy
from gradclip._norms import norm_for

without_cupy()

from gradclip._backends.cupy import programs  # noqa: E402
from gradclip._backends.cupy.text import KEPT, ONE, THREADS, WHOLE  # noqa: E402

__all__ = ["CASES", "SIZES", "THREADS", "Case", "first_clip"]

SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class Case(NamedTuple):
    name: str
    kind: str  # the dtype of the leaf
    kernel: str
    source: Callable[[], str]
    passes: int = 1  # how often an element crosses the memory bus: 2 where it is read and written
    beside: int = 0  # bytes that are loaded for each element and come out of a cache: factors of groups
    # The path that ordinary data take: by the pattern of instructions that it runs `worked` times an element, and no
    # path oftener; by instructions that it does not run; and whether it is the cheapest or the dearest of what is left.
    work: str = ""
    worked: int = 1
    avoid: str = ""
    path: str = "cheap"
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
    """The leaf is neither unchanged nor made 0, and its numbers are normal, before and after."""
    work, worked, avoid, path = {
        # Three products and a conversion. Subnormal numbers become whole ones, or are multiplied by 2**896.
        "float32": (r"DMUL|F2F\.F32\.F64", 4, r"F2I\.S64\.F64|DMUL .*e\+", "cheap"),
        "float64": ("DMUL", 3, "", "cheap"),
    }.get(kind, ("DMUL", 4, r"F2I\.S64\.F64", "dear"))
    beside, source = 16 if grouped == KEPT else 0, lambda: programs.scale((kind,), grouped)
    return Case(f"{name} {kind}", kind, "gradclip_scale", source, 2, beside, work, worked, avoid, path)


def _weighted(kind: str) -> Case:
    source = lambda: programs.weighted((kind,))  # noqa: E731
    return Case(f"weighted sum {kind}", kind, "gradclip_weighted", source, beside=16)


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

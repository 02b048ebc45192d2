"""Which kernels the model counts, and what of them. This is the one place to edit when the kernels change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from typing import NamedTuple

from benchmarks import nvrtc  # noqa: F401 - before what writes CUDA C, which it makes importable
from gradclip._backends.cupy import programs
from gradclip._backends.cupy.numbers import KINDS, REAL
from gradclip._backends.cupy.text import KEPT, LEAVES, ONE, WHOLE
from gradclip._norms import Norm, norm_for

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


def _together(kinds: Iterable[str], most: int) -> Iterator[tuple[str, ...]]:
    """Which dtypes may be in one tree: up to so many."""
    for n in range(1, most + 1):
        yield from combinations(kinds, n)


def of_norm(p: float | str, most: int) -> set[str]:
    """The sources that a norm may need, for trees of up to so many dtypes."""
    norm = norm_for(p, binned=True)
    return _measuring(norm, most) | {programs.settle(norm)}


def of_the_rest(most: int) -> set[str]:
    """The sources that are the same for every norm: scaling, sums of examples, given norms, rows of bounds, counts."""
    found = {programs.settle(None), programs.row()} | _measuring(programs.Census(), most)
    for kinds in _together(REAL, min(most, len(REAL))):
        found |= {programs.weighted(kinds), *(programs.scale(kinds, grouped) for grouped in LEAVES)}
    return found


def _measuring(norm: Norm, most: int) -> set[str]:
    found = set()
    for step in range(len(norm.ops)):
        found.add(programs.joined(norm, step))
        for kinds in _together(KINDS, most):
            found |= {programs.measure(norm, step, kinds), programs.spread(norm, step, kinds)}
    return found

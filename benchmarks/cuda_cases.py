"""Which kernels the model counts, and what of them. This is the one place to edit when the kernels change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from typing import NamedTuple

from benchmarks import nvrtc  # noqa: F401 - before what writes CUDA C, which it makes importable
from gradclip._backends.cupy import programs
from gradclip._backends.cupy.numbers import KINDS, REAL
from gradclip._backends.cupy.text import ONE, WHOLE
from gradclip._norms import Norm, norm_for

SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class Case(NamedTuple):
    name: str
    kind: str  # the dtype of the leaf
    kernel: str
    source: Callable[[], str]
    passes: int = 1  # how often an element crosses the memory bus: 2 where it is read and written
    beside: int = 0  # bytes that are loaded for each element and come out of a cache: factors of groups
    # The path that ordinary data take: the cheapest that runs instructions of this pattern `worked` times an element.
    work: str = ""
    worked: float = 1
    by_element: bool = False  # the loop that loads elements one by one: else that which loads most at a time
    options: tuple[str, ...] = ()


#: What a term of a large leaf ends in: with how many neighbours it is made a double.
_DOUBLED = {"float16": ("DFMA", 1 / 4), "bfloat16": ("DFMA", 1 / 4), "float32": ("DFMA", 1 / 2), "float64": ("DADD", 6)}


def _norm(name: str, p: float | str, kind: str, *, quick: bool = True) -> Case:
    """Of large trees, unless not `quick`: of small ones, or on many shards."""
    norm = norm_for(p, binned=True)
    work, worked = _DOUBLED[kind] if quick else (r"DFMA|DADD", 1)
    work, worked = (r"ISETP|IMNMX|VIMNMX", 0.7) if p == math.inf else (work, worked)
    name = name if quick else f"{name}, small trees,"
    source = lambda: programs.measure(norm, 0, (kind,), quick and kind != "float64")  # noqa: E731
    return Case(f"{name} {kind}", kind, "gradclip_measure", source, work=work, worked=worked)


def _kept(kind: str, *, wide: bool) -> Case:
    """Rows of more elements than a block has threads are read by 16 bytes, others by elements."""
    norm = norm_for(2.0, binned=True)
    name = "long rows" if wide else "short rows or columns"
    work, worked = _DOUBLED[kind]
    source = lambda: programs.spread(norm, 0, (kind,), True)  # noqa: E731
    name = f"norm, kept axis, {name}, {kind}"
    return Case(name, kind, "gradclip_spread", source, work=work, worked=worked, by_element=not wide)


def _scale(name: str, kind: str, grouped: int = ONE) -> Case:
    work = "DMUL" if kind == "float64" else "FFMA"
    return Case(f"{name} {kind}", kind, "gradclip_scale", lambda: programs.scale((kind,), grouped), 2, work=work)


def _scale_kept(kind: str, *, wide: bool) -> Case:
    name = "long rows" if wide else "short rows or columns"
    source = lambda: programs.scale_spread((kind,))  # noqa: E731
    name = f"scale, kept axis, {name}, {kind}"
    return Case(name, kind, "gradclip_scale_spread", source, 2, work="FFMA", by_element=not wide)


def _clamp(kind: str) -> Case:
    work = "DSETP" if kind == "float64" else "FSETP"
    return Case(f"clip by value {kind}", kind, "gradclip_clamp", lambda: programs.clamp((kind,)), 2, work=work)


def _weighted(kind: str) -> Case:
    source = lambda: programs.weighted((kind,))  # noqa: E731
    return Case(f"weighted sum {kind}", kind, "gradclip_weighted", source, beside=16, work="DFMA|DADD")


_NARROW = ("float32", "float16", "bfloat16")
CASES = [
    *(_norm("norm", 2.0, kind) for kind in SIZES),
    *(_norm("norm", 2.0, kind, quick=False) for kind in _NARROW),
    *(_norm("p = 1", 1.0, kind) for kind in SIZES),
    *(_norm("p = inf", math.inf, kind) for kind in SIZES),
    *(_norm("rms", "rms", kind) for kind in SIZES),
    *(_kept(kind, wide=wide) for wide in (True, False) for kind in _NARROW),
    *(_scale("scale", kind) for kind in SIZES),
    *(_scale("scale, by leaf,", kind, WHOLE) for kind in _NARROW),
    *(_scale_kept(kind, wide=wide) for wide in (True, False) for kind in _NARROW),
    *(_clamp(kind) for kind in SIZES),
    *(_weighted(kind) for kind in SIZES),
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
        found |= {programs.weighted(kinds), *(programs.scale(kinds, grouped) for grouped in (ONE, WHOLE))}
        found |= {programs.scale_spread(kinds), programs.clamp(kinds)}
    return found


def _measuring(norm: Norm, most: int) -> set[str]:
    found = set()
    for step in range(len(norm.ops)):
        found.add(programs.joined(norm, step))
        for kinds in _together(KINDS, most):
            for quick in (False, True):
                found |= {programs.measure(norm, step, kinds, quick), programs.spread(norm, step, kinds, quick)}
    return found

"""How far off the norm is where naive sums go wrong: at 1e8 float32 elements."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

import gradclip
from benchmarks.machine import available_memory
from benchmarks.results import Section
from benchmarks.settings import Settings
from benchmarks.trees import Array

CHUNK = 1 << 16


def exact_norm(x: Array) -> float:
    """The root of the sum of squares, which are exact in float64; chunks are summed pairwise, their sums exactly.

    Pairwise sums of 65,536 numbers are off by 17 units of rounding at the worst, 2e-15.
    """
    chunks: Iterator[Array] = (x[i : i + CHUNK].astype(np.float64) for i in range(0, x.size, CHUNK))
    return math.sqrt(math.fsum(float(np.sum(chunk * chunk)) for chunk in chunks))


def run(settings: Settings) -> Section:
    section = Section("accuracy")
    size = 10**7 if settings.short else 10**8
    if settings.short:
        section.not_run.append("the norm's error at 1e8 elements: 1e7 in short mode")
    if 8 * size > available_memory():
        section.not_run.append("the norm's error at 1e8 elements: the memory is too small")
        return section
    inputs = {
        "normal": np.random.default_rng(0).standard_normal(size, np.float32),
        "all 0.01": np.broadcast_to(np.float32(0.01), (size,)).copy(),
    }
    for name, x in inputs.items():
        exact = exact_norm(x)
        # The promise is about the sum; float32 rounds the result once more, by up to 6e-8.
        section.add(
            "norm error", abs(float(gradclip.global_norm([x])) / exact - 1), tree=f"{size:.0e} elements, {name}"
        )
        dot = math.sqrt(float(np.dot(x, x)))
        section.notes.append(f"np.dot of {size:.0e} elements, {name}: {abs(dot / exact - 1):.1e} off")
    return section

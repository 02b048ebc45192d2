"""NumPy, float16 and bfloat16: for these, arithmetic and not memory is the bottleneck.

NumPy computes in float16 element by element, through float32; bfloat16, from ml_dtypes, likewise. The yardsticks are
NumPy's own cast to float32, and the naive clip's one multiplication in the narrow dtype.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.on_numpy import (
    CLIP,
    FUNCTIONAL,
    GIVEN,
    NO_NORM,
    NORM,
    ONE_THREAD,
    TORCH,
    TORCH_NORM,
    Gradients,
    ours,
    preparation,
    torch_peers,
)
from benchmarks.results import Section, Table
from benchmarks.settings import Settings
from benchmarks.timing import compete
from benchmarks.trees import Model, gradients

CAST = "NumPy's cast to float32"
NAIVE = "naive in-place multiply"
NAIVE_FRESH = "naive fresh product"


def contest(model: Model, dtype: Any, settings: Settings, section: Section) -> None:
    g = Gradients(gradients(model.shapes, dtype))
    near_one = np.dtype(dtype).type(g.step)

    def naive() -> None:
        for x in g.flat:
            np.multiply(x, near_one, out=x)

    contenders: dict[str, Any] = {
        CAST: lambda: [x.astype(np.float32) for x in g.flat],
        NAIVE: naive,
        NAIVE_FRESH: lambda: [x * near_one for x in g.flat],
    }
    try:
        peers = torch_peers(g, settings.threads)
        contenders |= {name: call for name, call in peers.items() if "nothing" not in name}
        section.not_run += [] if TORCH_NORM in peers else [NO_NORM]
    except ImportError as error:
        section.not_run.append(f"torch beside NumPy's narrow dtypes: {error}")
    contenders |= {name: call for name, call in ours(g).items() if name in (NORM, CLIP, FUNCTIONAL)}
    name = np.dtype(dtype).name
    timings = compete(
        f"NumPy, {name}, {model.name}", contenders, settings.effort, prepare=preparation(g, settings.threads)
    )
    where = {"tree": model.name, "dtype": name}
    title = f"NumPy, {name}, {model.described(2)}{GIVEN}"
    section.tables.append(Table.of(timings, NAIVE, title=title, **where))
    section.add("narrow norm", model.parameters / timings.spread(NORM).median / 1e9, **where)
    section.compare(
        timings, where, ("narrow clip", CLIP, NAIVE), ("narrow clip, torch", CLIP, TORCH, TORCH + ONE_THREAD)
    )
    cast = model.parameters / timings.spread(CAST).median / 1e9
    section.notes.append(f"{name}, {model.name}: NumPy's cast to float32 alone runs at {cast:.2f} G elements/s")


def run(settings: Settings) -> Section:
    section = Section("narrow")
    dtypes: list[Any] = [np.float16]
    try:
        from ml_dtypes import bfloat16

        dtypes.append(bfloat16)
    except ImportError as error:
        section.not_run.append(f"bfloat16 in NumPy: {error}")
    large = [model for model in settings.models if model.parameters > 10_000_000]
    for model in large or settings.models[:1]:
        for dtype in dtypes:
            contest(model, dtype, settings, section)
    return section

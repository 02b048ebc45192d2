"""Beyond this machine: the join of 65,536 simulated shards of 1e12 elements, and the sums of docs/cost-model.md."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import array_api_compat.numpy as xp
import mpmath
import numpy as np
import pytest

import exact
import gradclip
from gradclip._norms import Norm, norm_for


def law(p: float) -> Norm:
    """A norm whose sums are in bins, as those of shards are."""
    return norm_for(p, binned=True)


SHARDS, ELEMENTS = 65_536, 10**12
INF = math.inf
COST_MODEL = Path(__file__).parents[1] / "docs" / "cost-model.md"


def model(dtype: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """For each shard how many elements it holds, 1e12 together, and the one value that they all have."""
    rng = np.random.default_rng(0)
    sizes = rng.dirichlet(np.full(SHARDS, 0.3)) * (ELEMENTS - SHARDS)
    counts = 1 + sizes.astype(np.int64)
    counts[0] += ELEMENTS - counts.sum()
    values = rng.standard_normal(SHARDS) * 10.0 ** rng.uniform(-6, -2, SHARDS)
    if kind != "ordinary":
        some = rng.permutation(SHARDS)
        largest = float(np.finfo(dtype).max)
        high, low = {"float64": (1e290, 1e-300), "float32": (1e37, 1e-37)}[dtype]
        values[some[:20]] = low
        values[some[20:40]] = {"small": -low, "large": high, "largest": largest}[kind]
        if kind == "small":
            values[some[40:]] *= low
    return counts, values.astype(dtype)


def partials(p: Norm, counts: np.ndarray, values: np.ndarray, seen: tuple[Any, ...]) -> np.ndarray:
    """What each shard contributes: a sum over n equal elements is n times that of one, rounded once."""
    terms = np.stack(p.terms(xp, (values,), seen))
    return (terms * counts.astype(values.dtype)).astype(values.dtype) if p.ops[len(seen)] == "sum" else terms


def tree(op: str, table: np.ndarray) -> np.ndarray:
    """Halves added to each other, as trees of devices do."""
    join = {"sum": np.add, "max": np.maximum, "min": np.minimum}[op]
    while table.shape[-1] > 1:
        half = table.shape[-1] // 2
        table = join(table[:, :half], table[:, half:])
    return table[:, 0]


def ring(op: str, table: np.ndarray) -> np.ndarray:
    """One after the other, the worst order there is."""
    return np.cumsum(table, axis=-1, dtype=table.dtype)[:, -1] if op == "sum" else tree(op, table)


def exact_norm(counts: np.ndarray, values: np.ndarray, p: float) -> Any:
    if math.isinf(p):
        return mpmath.mpf(float(np.abs(values).max()))
    if p == 0:
        return mpmath.mpf(int(counts[values != 0].sum()))
    if p in (1, 2):
        numbers, exponent = exact.integers(np.abs(values).tolist())
        total = sum(n * v ** int(p) for n, v in zip(counts.tolist(), numbers, strict=True))
        return mpmath.root(mpmath.ldexp(total, int(p) * exponent), int(p))
    terms = (int(n) * mpmath.mpf(float(abs(v))) ** p for n, v in zip(counts, values, strict=True) if v)
    return mpmath.fsum(terms) ** (1 / mpmath.mpf(p))


def finished(p: float, joined: tuple[np.ndarray, ...]) -> Any:
    """The norm that joined float32 partials stand for."""
    with np.errstate(all="ignore"):  # as the backends do
        norm = norm_for(p, binned=True).finish(xp, joined)
    exponent = 0 if norm.exponent is None else int(norm.exponent)
    return mpmath.mpf(float(norm.mantissa)) * mpmath.mpf(2) ** (90 * exponent)


CASES = [(2.0, dtype, kind) for dtype in ("float64", "float32") for kind in ("ordinary", "small", "large", "largest")]
CASES += [(1.0, "float64", "large"), (1.0, "float32", "ordinary"), (0.0, "float64", "small")]
CASES += [(INF, "float32", "largest"), (3.0, "float64", "large"), (3.0, "float32", "ordinary")]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("p", "dtype", "kind", "order"),
    [(*case, tree) for case in CASES] + [(*case, ring) for case in CASES[::3]],
)
def test_a_trillion_elements(p: float, dtype: str, kind: str, order: Any) -> None:
    """float64 (NumPy, CuPy: MPI, NCCL) within 1e-13 in a tree; float32 (JAX) within 1e-6. In a ring 100 times that."""
    counts, values = model(dtype, kind)
    assert counts.sum() == ELEMENTS
    asked: list[str] = []
    tables: list[np.ndarray] = []

    def all_reduce(partial: Any, op: str) -> Any:
        tables.append(order(op, partials(law(p), counts, values, tuple(tables))))
        asked.append(op)
        # One column, as there is one group; the last row of what came says whether norms are float64.
        return None if partial is None else np.append(tables[-1], partial[len(tables[-1]) :, 0])[:, None]

    with np.errstate(all="ignore"), mpmath.workdps(60):
        if dtype == "float64":  # the public way: this process is one of the shards
            mine = np.full(3, 2.0**1000 if "large" in kind else 1.0)  # so that what comes out is a normal number
            out = gradclip.clip_grad_norm([mine], 1.0, p, all_reduce=all_reduce)
            norm = mpmath.mpf(float(out.norm))
            factor = mpmath.mpf(out.grads[0][0]) / mine[0]
        else:
            for op in law(p).ops:
                all_reduce(None, op)
            norm, factor = finished(p, tuple(tables)), None
        want = exact_norm(counts, values, p)
        assert len(asked) == len(law(p).ops)
        if want > exact.largest("float64"):
            assert norm == INF
        else:
            bound = {"float64": 1e-13, "float32": 1e-6}[dtype] * (1 if order is tree else 100)
            off = abs(norm / want - 1)
            assert off <= bound, f"norm {mpmath.nstr(norm, 20)}, exactly {mpmath.nstr(want, 20)}: {mpmath.nstr(off, 3)}"
        if factor is not None:
            assert abs(factor * max(want, 1) - 1) <= 1e-11, "also where the norm itself is beyond float64"


@pytest.mark.parametrize("kind", ["ordinary", "small", "large", "largest"])
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_shards_that_add_up_in_float64_join_in_float32(p: float, kind: str) -> None:
    """What JAX does with float32 on the CPU: each shard's sum is in the bin that holds it."""
    counts, values = model("float32", kind)
    table = law(p).in_bins(xp, counts * np.abs(values.astype(np.float64)) ** p)
    assert table.dtype == np.float32
    assert (np.count_nonzero(table, axis=0) == (values != 0)).all()
    with mpmath.workdps(60):
        want = exact_norm(counts, values, p)
        assert abs(finished(p, (tree("sum", table),)) / want - 1) <= 1e-6


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_every_sum_has_its_bin(p: float) -> None:
    """One shard, or as many as can be; from the least sum of float32 elements to that of 2**30 of the largest."""
    least, most = -149 * int(p), 128 * int(p) + 30
    totals = 1.7 * np.exp2(np.arange(least, most, dtype=np.float64))
    bins = law(p).in_bins(xp, totals)
    for total, one in zip(totals, bins.T, strict=True):
        for shards in (1, 2**20):
            joined = one * np.float32(shards)
            assert np.isfinite(joined).all(), (total, shards)
            root = mpmath.root(mpmath.mpf(float(total)) * shards, int(p))
            assert abs(finished(p, (joined,)) / root - 1) <= 2e-7, (total, shards)
    for bad in (math.inf, math.nan):
        norm = law(p).finish(xp, (law(p).in_bins(xp, np.float64(bad)),)).mantissa
        np.testing.assert_array_equal(norm, bad)


# -- the cost model ----------------------------------------------------------------------------------------------------


def latency(devices: int) -> float:
    """Microseconds of one small all-reduce, by NCCL's own model: a tree of nodes, a chain of 8 GPUs in each."""
    base, link, network = 6.8, 0.6, 5.0
    nodes = max(1, devices // 8)
    return 0.0 if devices == 1 else base + 2 * ((min(devices, 8) - 1) * link + int(math.log2(nodes)) * network)


def test_the_cost_model_adds_up() -> None:
    if not COST_MODEL.is_file():
        pytest.skip("docs/ is not beside the tests")
    text = COST_MODEL.read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) % \|$", text, re.M)
    assert [int(row[0].replace(",", "")) for row in rows] == [1, 8, 64, 512, 4096, 16384]
    elements, bandwidth = 405e9 / 16384, 3.35e12
    step = 6 * 405e9 * (128 * 16 * 8192) / (16384 * 400e12)
    memory = 3 * 4 * elements / bandwidth
    assert f"{step:.1f} s" in text
    for row in rows:
        devices, us, collective, both, share = (float(cell.replace(",", "")) for cell in row)
        assert us == round(memory * 1e6, 1)
        assert collective == round(latency(int(devices)), 1)
        assert both == round(memory * 1e6 + latency(int(devices)), 1)
        assert share == round(100 * (memory + latency(int(devices)) * 1e-6) / step, 4)

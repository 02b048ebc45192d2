"""The benchmarks' instrument, on clocks and inputs whose answers are known. No test here looks at a real time."""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("benchmarks.trees", reason="benchmarks/ is not beside these tests")

import gradclip
from backends import MISSING
from benchmarks import accuracy, growth, memory, on_numpy, pinning, report, rules
from benchmarks.results import Finding, Section, Table
from benchmarks.settings import Settings
from benchmarks.targets import TARGETS
from benchmarks.timing import Effort, Spread, Timings, calibrated, compete, host_stopwatch
from benchmarks.trees import GPT2_BLOCK, MODELS, Model, gradients

pytestmark = [pytest.mark.library("numpy"), pytest.mark.full]

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "benchmarks").glob("*.py"))
TINY = {"weight": (30, 20), "bias": (20,)}


def needs(*modules):
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


# -- trees ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "leaves", "parameters"),
    [("mlp", 6, 235_146), ("small", 1000, 1_024_000), ("resnet50", 161, 25_557_032), ("gpt2", 148, 124_439_808)],
)
def test_models_have_the_published_sizes(name, leaves, parameters):
    shapes = MODELS[name].shapes
    assert len(shapes) == leaves
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters


def test_models_described_in_megabytes():
    assert MODELS["resnet50"].described() == "ResNet-50: 161 leaves, 102.2 MB"
    assert MODELS["gpt2"].described() == "GPT-2 small: 148 leaves, 497.8 MB"
    assert set(GPT2_BLOCK.shapes) == {n.removeprefix("h3.") for n in MODELS["gpt2"].shapes if n.startswith("h3.")}


def test_a_model_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 620\) leaves and parameters, not \(2, 621\)"):
        Model("wrong", TINY, 2, 621)


def test_gradients_are_the_same_each_time_and_far_from_subnormal():
    first, again = gradients(TINY), gradients(TINY)
    for name, shape in TINY.items():
        assert first[name].shape == shape
        assert first[name].dtype == np.float32
        assert first[name].tobytes() == again[name].tobytes()
    assert gradients(TINY, np.float16)["bias"].dtype == np.float16
    assert 0.5 < np.std(first["weight"]) < 1.5


# -- the instrument ------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only when a contender says so, and more slowly or faster in each round."""

    def __init__(self):
        self.now = 0.0
        self.slowness = 1.0

    def __call__(self):
        return self.now

    def call(self, seconds, log=None, name=""):
        def contender():
            self.now += seconds * self.slowness
            if log is not None:
                log.append(name)

        return contender


def test_ratios_are_taken_within_a_round():
    """A machine that is up to 64 times slower in some rounds changes medians of times, and no ratio."""
    clock, samples = Clock(), []

    def prepare(name):
        clock.now += 1000.0  # must not count
        clock.slowness = 2.0 ** (len(samples) // 2 % 7)
        samples.append(name)

    contenders = {"two": clock.call(2.0), "one": clock.call(1.0)}
    watch = host_stopwatch(clock)
    timings = compete("", contenders, Effort(0, 15), prepare=prepare, stopwatch=watch, cold=True)
    assert timings.rounds == 15
    assert timings.ratio("two", "one") == Spread(2.0, 2.0, 2.0)
    assert timings.ratio("one", "two") == Spread(0.5, 0.5, 0.5)
    assert timings.spread("one").median == np.median(timings.samples["one"])
    assert timings.spread("one").high > 4 * timings.spread("one").low


def test_the_median_of_ratios_is_not_the_ratio_of_medians():
    timings = Timings({"a": [1.0, 8.0, 3.0], "b": [1.0, 2.0, 6.0]})
    assert timings.ratio("a", "b").median == 1.0
    assert timings.spread("a").median / timings.spread("b").median == 1.5


def test_quartiles():
    assert Spread.of([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_every_contender_runs_once_a_round_in_changing_order():
    clock, log = Clock(), []
    contenders = {name: clock.call(1.0, log, name) for name in "abcd"}
    compete("", contenders, Effort(0, 20), stopwatch=host_stopwatch(clock), cold=True)
    rounds = ["".join(log[i : i + 4]) for i in range(0, len(log), 4)]
    assert len(rounds) == 20
    assert all(sorted(order) == list("abcd") for order in rounds)
    assert len(set(rounds)) > 10
    assert len({order[0] for order in rounds}) == 4


def test_short_calls_are_timed_several_in_a_row():
    clock = Clock()
    watch = host_stopwatch(clock)
    repeats = calibrated(clock.call(1e-6), watch)
    assert 1000 <= repeats <= 1300
    assert calibrated(clock.call(0.1), watch) == 1
    timings = compete("", {"short": clock.call(1e-6)}, Effort(0, 3), stopwatch=watch)
    assert timings.samples["short"] == pytest.approx([1e-6] * 3)


def test_a_cold_contest_calls_nothing_before_it_is_timed():
    clock, log = Clock(), []
    compete("", {"a": clock.call(1e-6, log, "a")}, Effort(100, 2, 50), stopwatch=host_stopwatch(clock), cold=True)
    assert log == ["a", "a"]


def test_prepared_before_each_sample_by_name():
    clock, log, prepared = Clock(), [], []
    contenders = {name: clock.call(1.0, log, name) for name in "ab"}
    compete("", contenders, Effort(0, 4), prepare=prepared.append, stopwatch=host_stopwatch(clock), cold=True)
    assert prepared == log


def test_the_garbage_collector_is_off_meanwhile():
    seen = []
    assert gc.isenabled()
    compete("", {"a": lambda: seen.append(gc.isenabled())}, Effort(0, 2), cold=True)
    assert seen == [False, False]
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError, match="division"):
        compete("", {"a": lambda: 1 / 0}, Effort(0, 2))
    assert gc.isenabled()


# -- contenders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_every_call_in_place_clips_and_is_undone(dtype):
    g = on_numpy.Gradients(gradients(TINY, dtype))
    before = [leaf.tobytes() for leaf in g.leaves]
    for _ in range(50):
        found = float(gradclip.global_norm(g.tree))
        bound = g.bound()
        assert bound < found
        gradclip.clip_grad_norm_(g.tree, bound)
    assert [leaf.tobytes() for leaf in g.leaves] != before
    g.restore()
    assert [leaf.tobytes() for leaf in g.leaves] == before
    assert g.bound() == pytest.approx(g.norm / 2, rel=1e-3)
    assert g.idle_bound() > g.norm


def test_contenders_do_what_they_are_called():
    g = on_numpy.Gradients(gradients(TINY))
    contenders = on_numpy.floors(g) | on_numpy.ours(g)
    kept = {name: leaf.copy() for name, leaf in g.tree.items()}
    writes = set()
    for name, call in contenders.items():
        call()
        if any(leaf.tobytes() != kept[key].tobytes() for key, leaf in g.tree.items()):
            writes.add(name)
        g.restore()
    assert writes == {on_numpy.IN_PLACE, on_numpy.CLIP, on_numpy.EACH}
    assert float(contenders[on_numpy.NORM]()) == pytest.approx(g.norm, rel=1e-6)
    assert math.sqrt(sum(map(float, contenders[on_numpy.READ]()))) == pytest.approx(g.norm, rel=1e-6)
    plain, norm = on_numpy.plain_clip(g.tree, 1.5)
    assert float(norm) == pytest.approx(g.norm, rel=1e-6)
    assert float(gradclip.global_norm(plain)) == pytest.approx(1.5, rel=1e-5)


def test_torch_works_on_the_same_memory():
    needs("torch", "ml_dtypes")
    import torch
    from ml_dtypes import bfloat16

    norm = [on_numpy.TORCH_NORM] if hasattr(torch.nn.utils, "get_total_norm") else []  # torch 2.6

    for dtype, rel in [(np.float32, 1e-6), (bfloat16, 2e-2)]:
        g = on_numpy.Gradients(gradients(TINY, dtype))
        peers = on_numpy.torch_peers(g, 2)
        assert set(peers) == {
            name + end for name in (*norm, on_numpy.TORCH, on_numpy.TORCH_IDLE) for end in ("", on_numpy.ONE_THREAD)
        }
        for name in norm:
            assert float(peers[name]()) == pytest.approx(g.norm, rel=rel)
        peers[on_numpy.TORCH]()
        assert float(gradclip.global_norm(g.tree)) == pytest.approx(g.norm / 2, rel=rel + 1e-3)
        on_numpy.preparation(g, 1)("torch clip_grad_norm_")
        assert float(gradclip.global_norm(g.tree)) == pytest.approx(g.norm, rel=1e-6)


def test_tensors_that_both_are_given():
    needs("torch")
    import torch

    from benchmarks import on_torch

    for dtype in on_torch.DTYPES:
        t = on_torch.Tensors(TINY, dtype)
        norm = float(torch.linalg.vector_norm(torch.cat([grad.double().ravel() for grad in t.grads])))
        assert t.norm == pytest.approx(norm, rel=1e-12)
        writes = set()
        for name, call in on_torch.calls(t).items():
            before = [grad.clone() for grad in t.grads]
            call()
            if not all(map(torch.equal, before, t.grads)):
                writes.add(name)
            t.restore()
            assert all(map(torch.equal, before, t.grads))
        values = {on_torch.VALUE, on_torch.TORCH_VALUE}
        assert writes - {on_torch.IN_PLACE} == {on_torch.CLIP, on_torch.TORCH, on_torch.EACH, *values}
        assert (on_torch.IN_PLACE in writes) == (dtype == "float32")  # 16 bits round one part in 10,000 away
        assert all(parameter.grad is grad for parameter, grad in zip(t.parameters, t.grads, strict=True))


def test_the_contest_of_tensors(monkeypatch):
    """That it runs, within the limits of threads, and what its ratios are to."""
    needs("torch")
    import torch

    from benchmarks import on_torch
    from gradclip import _threads

    limits, compete = set(), on_torch.compete

    def watched(*args, **options):
        limits.add((torch.get_num_threads(), _threads.num_threads()))
        return compete(*args, **options)

    monkeypatch.setitem(MODELS, "tiny", Model("tiny", TINY, 2, 620))
    monkeypatch.setattr(on_torch, "compete", watched)
    monkeypatch.setattr(on_torch, "LEAVES_64", MODELS["tiny"])
    before = torch.get_num_threads(), _threads.num_threads()
    try:
        section = on_torch.run(Settings(True, 2, (), Effort(0, 1, 1)))
    finally:
        torch.set_num_threads(before[0])
    assert _threads.num_threads() == before[1]
    assert limits == {(2, 2)}
    assert [table.dtype for table in section.tables] == list(on_torch.DTYPES)
    assert [finding.target for finding in section.findings] == [TARGETS["tensors, 50 leaves"]] * 3
    assert section.not_run[-1] == "torch tensors, compiled: not in short mode"
    for table in section.tables:
        ratios = {row.name: row.ratio for row in table.rows}
        us = {row.name: row.median_us for row in table.rows}
        for name, other in on_torch.PARTNERS.items():
            if other in ratios:
                assert ratios[name] == pytest.approx(us[name] / us[other])
                assert ratios[other] == 1


def test_aims_of_tensors():
    needs("torch")
    from benchmarks.on_torch import LEAVES_64, aim

    assert aim(MODELS["gpt2"], "bfloat16") == aim(MODELS["resnet50"], "float32") == "tensors"
    assert aim(MODELS["gpt2"], "float16") == "tensors, float16"
    assert aim(LEAVES_64, "float16") == "tensors, 50 leaves"
    assert aim(MODELS["mlp"], "float32") == aim(MODELS["small"], "float32") == "tensors, no aim"


def test_a_clip_that_torch_does_not_compile_is_named(monkeypatch):
    needs("torch")
    import torch

    from benchmarks import torch_compiled

    def refuse(function, fullgraph):
        def call(*args):
            raise RuntimeError("for a reason\nand more")

        assert fullgraph
        return call

    monkeypatch.setattr(torch, "compile", refuse)
    section = Section("torch")
    torch_compiled.contest(Model("tiny", TINY, 2, 620), Settings(effort=Effort(0, 1, 1)), section)
    assert section.not_run == [f"{torch_compiled.COMPILED}, tiny: not compiled: for a reason"]
    assert section.tables == section.findings == []


def test_the_contest_of_compiled_clips(monkeypatch):
    """With a compiler that hands back what it is given."""
    needs("torch")
    import torch

    from benchmarks import torch_compiled

    monkeypatch.setattr(torch, "compile", lambda function, fullgraph: function)
    monkeypatch.setattr(torch_compiled, "from_scratch", lambda clip, t: torch_compiled.compiled(clip, t)())
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    section = Section("torch")
    torch_compiled.contest(Model("tiny", TINY, 2, 620), Settings(effort=Effort(0, 1, 1)), section)
    assert [finding.target for finding in section.findings] == [
        TARGETS["tensors, compiled"],
        TARGETS["tensors, compilation"],
    ]
    assert section.not_run == []


# -- growth, memory, accuracy, threads -----------------------------------------------------------------------


def test_a_straight_line_is_found_at_both_ends():
    sizes = [1, 10, 100, 1000, 10_000]
    line = growth.straight_line("a", "leaves", sizes, [(7 + 3 * n) * 1e-6 for n in sizes])
    assert (line.fixed_us, line.each_us) == pytest.approx((7, 3))
    assert line.worst < 1e-9
    bent = growth.straight_line("a", "leaves", sizes, [(7 + 3 * n**1.5) * 1e-6 for n in sizes])
    assert bent.worst > 0.5


def test_growth_names_every_line():
    lines = growth.curve("leaves", {1: {"a": (16,)}, 2: {"a": (16,), "b": (16,)}}, growth.numpy_calls, Effort(0, 1, 1))
    assert [line.name for line in lines] == ["NumPy global_norm", "NumPy clip_grad_norm_"]
    assert all(line.sizes == [1, 2] for line in lines)
    assert all(us > 0 for line in lines for us in line.us)


def test_peaks_of_memory():
    assert 2_000_000 <= memory.traced_peak(lambda: np.ones(250_000)) < 2_100_000

    def transient():
        np.ones(500_000)

    assert 4_000_000 <= memory.traced_peak(transient) < 4_100_000
    found = memory.peaks(gradients({"a": (1000, 1000)}))
    assert found["functional"]["tracemalloc"] >= 4_000_000
    assert found["in place"]["tracemalloc"] < 1_000_000
    peak = memory.resident_peak(lambda: np.ones(8_000_000))
    if peak is not None:
        assert peak > 60_000_000


def test_the_yardstick_of_the_norm_is_exact():
    x = gradients({"x": (70_000,)})["x"]
    squares = sum(Fraction(float(value)) ** 2 for value in x[::7])
    assert accuracy.exact_norm(x[::7].copy()) == pytest.approx(math.sqrt(squares), rel=1e-15)
    assert accuracy.exact_norm(np.full(65_536 * 4, 0.5, np.float32)) == 256.0


def test_limits_on_threads(monkeypatch):
    assert pinning.limits(1) == [1]
    assert pinning.limits(6) == [1, 2, 4, 6]
    assert pinning.limits(8) == [1, 2, 4, 8]
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert pinning.pinned(3) == {
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        pinning.VARIABLE: "3",
    }
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert pinning.pinned(3)["OMP_WAIT_POLICY"] == "ACTIVE"


# -- the report ----------------------------------------------------------------------------------------------

MACHINE = {
    "processor": "a processor",
    "cores": 2,
    "memory_GB": 8.0,
    "system": "Linux x86_64",
    "python": "3.11.0",
    "versions": {"gradclip": "0.0", "numpy": "2.0"},
    "threads": {"torch": 2},
    "date": "2000-01-01",
}


def sections():
    """What a run might have found, small enough to check by eye."""
    times = {name: [1e-3 * factor] * 3 for name, factor in [(on_numpy.READ, 1), (on_numpy.IN_PLACE, 2)]}
    times |= {name: [3e-3] * 3 for name in (on_numpy.CLIP, on_numpy.TORCH + on_numpy.ONE_THREAD)}
    times |= {on_numpy.TORCH: [6e-3] * 3, on_numpy.NORM: [1e-3] * 3}
    timings = Timings(times)
    where = {"tree": "a tree", "dtype": "float32"}
    section = Section("numpy", [Table.of(timings, on_numpy.READ, title="NumPy, a tree", **where)])
    section.compare(timings, where, ("in place", on_numpy.CLIP, on_numpy.IN_PLACE))
    section.compare(timings, where, ("norm", on_numpy.NORM, on_numpy.READ))
    section.compare(timings, where, ("mlp", on_numpy.CLIP, on_numpy.TORCH, on_numpy.TORCH + on_numpy.ONE_THREAD))
    section.compare(timings, where, ("idle", "absent", on_numpy.READ), ("idle", on_numpy.CLIP, "absent"))
    section.not_run.append("a part: for a reason")
    section.notes.append("a note")
    grown = Section("growth")
    for against in ("elements", "leaves"):
        grown.lines.append(growth.straight_line("NumPy clip", against, [1, 10, 100], [8e-6, 35e-6, 305e-6]))
    jax = Section("jax")
    jax.add("jit run", 0.8, tree="a tree")
    jax.add("compile", 1.25, tree="a tree")
    return [section, grown, jax]


def test_findings_are_beside_the_fastest_reference():
    values = {f.target.what: (f.value, f.met) for f in sections()[0].findings}
    assert values == {
        TARGETS["in place"].what: (1.5, False),
        TARGETS["norm"].what: (1.0, True),
        TARGETS["mlp"].what: (1.0, False),
    }


def test_the_report_says_it_all():
    text = report.full_text(MACHINE, sections())
    for said in ("2000-01-01: a processor, 2 cores, 8.0 GB, Linux", "numpy 2.0", "torch 2", "- a note"):
        assert said in text
    assert "NumPy, a tree (medians of 3 rounds" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["1", "global_norm", "/", "one", "read", "a", "tree", "float32", "1", "x", "<=", "1.1", "x", "met"] in rows
    assert [row[-2:] for row in rows if row[:2] == ["2", "clip_grad_norm_"]] == [["NOT", "MET"]]
    assert "3 of 5 figures" not in text
    assert "2 of 5 figures with a target meet it" in text
    assert text.endswith("Not run:\n- a part: for a reason")
    assert report.full_text(MACHINE, []).endswith("- nothing was left out")


def test_targets():
    assert TARGETS["narrow norm"].met(1.6)
    assert not TARGETS["narrow norm"].met(1.4)
    assert TARGETS["retraces"].met(0)
    assert not TARGETS["retraces"].met(1)
    assert Finding(TARGETS["scaling"], "a tree", "float32", 0.5).met is None
    assert not TARGETS["norm"].met(math.nan)


@pytest.mark.parametrize(("us", "text"), [(0.5, "0.5 us"), (12.34, "12.3 us"), (1234.0, "1.23 ms"), (2.5e6, "2.5 s ")])
def test_durations(us, text):
    assert report.duration(us) == text


def test_json_holds_the_run(tmp_path):
    data = report.as_data(MACHINE, {"short": True}, sections())
    report.write(data, tmp_path / "results.json")
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert found == data
    assert found["sections"]["numpy"]["tables"][0]["rows"][0]["median_us"] == pytest.approx(1000)
    assert [f["met"] for f in found["sections"]["jax"]["findings"]] == [True, False]


def test_chart(tmp_path):
    needs("matplotlib")
    from benchmarks import chart

    data = report.as_data(MACHINE, {}, sections())
    assert chart.draw(data, tmp_path / "all.png")
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert chart.draw({**data, "sections": {"jax": data["sections"]["jax"]}}, tmp_path / "one.png")
    assert not chart.draw({**data, "sections": {}}, tmp_path / "none.png")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["all.png", "one.png"]


# -- CuPy ----------------------------------------------------------------------------------------------------


@pytest.mark.library("cupy")
def test_the_contest_on_a_gpu(monkeypatch):
    """That it runs, on whatever device there is; a fake one's times mean nothing."""
    needs("cupy")
    if "cupy" in MISSING:
        pytest.skip(f"backend cupy: {MISSING['cupy']}")
    from benchmarks import on_gpu

    monkeypatch.setitem(MODELS, "tiny", Model("tiny", TINY, 2, 620))
    section = on_gpu.run(Settings(trees=("tiny",), effort=Effort(0, 1, 1)))
    assert [table.dtype for table in section.tables] == ["float32", "float16"]
    assert all(table.rows[0].name == on_gpu.COPY for table in section.tables)
    assert len(section.findings) == 8
    assert len(section.notes) == 2


# -- JAX -----------------------------------------------------------------------------------------------------

HLO = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%squares (g: f32[64]) -> f32[] {
  %g.1 = f32[64]{0} parameter(0)
  %zero = f32[] constant(0)
  %m = f32[64]{0} multiply(%g.1, %g.1)
  ROOT %r = f32[] reduce(%m, %zero), dimensions={0}, to_apply=%add
}

ENTRY %main (g: f32[64], c: f32[]) -> (f32[64], f32[]) {
  %g = f32[64]{0} parameter(0), metadata={op_name="grads"}
  %c = f32[] parameter(1), metadata={op_name="max_norm"}
  %wide = (f32[64]{0}, /*index=1*/f32[8]{0}) fusion(%g), kind=kLoop, calls=%elsewhere
  %first = f32[64]{0} get-tuple-element(%wide), index=0
  %n = f32[] fusion(%first), kind=kLoop, calls=%squares
  %clipped = f32[64]{0} fusion(%g, %n, %c), kind=kLoop, calls=%scaling
  %pair = (f32[64]{0}, f32[64]{0}) fusion(%clipped), kind=kLoop, calls=%update
  %new = f32[64]{0} get-tuple-element(%pair), index=1
  ROOT %out = (f32[64]{0}, f32[]) tuple(%new, %n)
}
"""


@pytest.mark.library("jax")
def test_evidence_is_read_from_the_programs_text():
    needs("jax", "optax")
    from benchmarks.training_step import reductions, written_out

    assert reductions(HLO, 64) == 1
    assert reductions(HLO, 65) == 0
    found = written_out(HLO, {64})
    assert found.clipped == ["clipped[0]", "pair[0]"]
    assert found.other == ["wide[0]"]


@pytest.mark.library("jax")
def test_a_clipped_gradient_that_is_written_out_is_seen():
    """A sort cannot be fused into its readers, nor with what it reads."""
    needs("jax", "optax")
    import jax
    import jax.numpy as jnp

    from benchmarks.training_step import evidence

    def scaled(grads, max_norm):
        norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in grads.values()))
        return {name: g * (max_norm / norm) for name, g in grads.items()}, norm

    def sorted_after(grads, max_norm):
        grads, norm = scaled(grads, max_norm)
        return {name: jnp.sort(g, axis=0) for name, g in grads.items()}, norm

    shapes, device = {"a": (64, 32), "b": (500,)}, jax.devices("cpu")[0]
    fused, held, without = (evidence(clip, shapes, device) for clip in (scaled, sorted_after, None))
    assert len(fused["clipped"]) == 0
    assert len(held["clipped"]) >= 2
    assert (without["reductions"], without["clipped"], without["other"]) == (0, [], [])


@pytest.mark.library("jax")
def test_retraces_and_compilations_are_counted():
    needs("jax", "optax")
    import jax

    from benchmarks.on_jax import eager_compilations, our_clip, traces

    def compiles_for_each_bound(grads, max_norm):
        return {name: jax.jit(lambda x: x * max_norm)(leaf) for name, leaf in grads.items()}, max_norm

    device = jax.devices("cpu")[0]
    assert traces(our_clip, TINY, device) == {"same shapes": 0, "changed bound": 0}
    assert eager_compilations(our_clip, TINY, device) == 0
    assert eager_compilations(compiles_for_each_bound, TINY, device) == 2


# -- the command ---------------------------------------------------------------------------------------------


def command(*args, cwd, before="pass"):
    """`python -m benchmarks`, after a line of preparation."""
    run = (
        f"import runpy, sys; {before}; sys.argv[0] = 'benchmarks'; runpy.run_module('benchmarks', run_name='__main__')"
    )
    path = os.pathsep.join(p for p in (os.environ.get("PYTHONPATH"), str(ROOT)) if p)
    env = {"JAX_PLATFORMS": "cpu", **os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, "-c", run, *map(str, args)],
        cwd=cwd,
        env=env,
        capture_output=True,
        encoding="utf-8",
        timeout=900,
    )


def test_rules_beside_a_fixed_bound():
    """Each contender clips the same gradients, by a bound of its own."""
    tree = gradients(TINY)
    clips = rules.calls(tree)
    assert clips.keys() == {rules.FIXED, *rules.RULES}
    norm = float(gradclip.global_norm(tree))
    for name, clip in clips.items():
        assert float(clip().norm) == norm, name
        assert len(clip()) == (2 if name == rules.FIXED else 4)


def test_the_command(tmp_path):
    out = tmp_path / "out"
    done = command("--short", "--only", "numpy", "gpu", "--trees", "mlp", "--out", out, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "MLP 784-256-128-10: 6 leaves, 0.9 MB" in done.stdout
    for name in (on_numpy.READ, on_numpy.IN_PLACE, on_numpy.PLAIN, on_numpy.NORM, on_numpy.CLIP, on_numpy.FUNCTIONAL):
        assert name in done.stdout
    assert "figures with a target meet it" in done.stdout
    gpu = json.loads((out / "results.json").read_text(encoding="utf-8"))["sections"]["gpu"]
    assert gpu["tables"] or "GPU: none found, not run" in done.stdout
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert (out / "chart.png").is_file() == drawn
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_what_is_not_installed_is_named(tmp_path):
    absent = ("torch", "jax", "optax", "cupy", "matplotlib", "tqdm")
    (tmp_path / "absent.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(name, path=None, target=None):\n"
        f"        if name in {absent}:\n"
        "            raise ModuleNotFoundError(f'{name} is not there', name=name)\n"
        "sys.meta_path.insert(0, Absent)\n"
    )
    done = command(
        *("--short", "--only", "numpy", "torch", "jax", "step", "gpu", "--trees", "mlp", "--out", tmp_path / "out"),
        cwd=tmp_path,
        before="sys.path.insert(0, '.'); import absent",
    )
    assert done.returncode == 0, done.stderr
    named = done.stdout.split("Not run:\n")[1]
    for said in (
        "torch beside NumPy: ",
        "torch: ",
        "jax: ",
        "step: ",
        "GPU: none found, not run",
        "the chart: ",
        "progress bars: ",
    ):
        assert f"- {said}" in named
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["results.json"]


def test_limits_are_set_before_numpy_is_imported(tmp_path):
    done = command(
        "--help", cwd=tmp_path, before="import atexit; atexit.register(lambda: print('numpy' in sys.modules))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_file_is_too_long(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) < 300

"""What the CUDA kernels' machine code is held to, and the cards' arithmetic. Its reader: test_sass.py.

The kernels are compiled and disassembled, not run: `pip install 'gradclip[cuda-model]'` brings what that takes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest

pytest.importorskip("benchmarks.cuda_model", reason="benchmarks/ is not beside these tests")

from benchmarks import cards, cuda_model
from benchmarks.cuda_cases import CASES, Case, first_clip, of_norm, of_the_rest

ARCH = cuda_model.SHOWN
needs_compiler = pytest.mark.skipif(bool(cuda_model.missing()), reason=cuda_model.missing() or "all is here")

# -- cards -----------------------------------------------------------------------------------------------------


def test_shares_are_the_busiest_pipe_of_all_sms_beside_the_dram():
    card = cards.Card("a card", 86, 100, 2.0, 1600)
    for counts, traffic, low, high in [
        ({"fp64": 1, "convert64": 1}, 2, 0.25, 0.5),  # 2 / 2 or 2 / 1 a clock, 200 clocks a ns, 2 bytes, of 1600
        ({"fp64": 1, "convert64": 1}, 16, 1, 1),  # no card uses more than all
        ({"alu": 16}, 2, 1, 1),
        ({"alu": 32}, 2, 0.5, 0.5),  # 64 / 32 a clock
        ({"fp32": 32, "mad": 32}, 2, 0.5, 0.5),  # 128 / 64
        ({"mad": 32}, 2, 0.5, 0.5),  # 64 / 32
        ({"other": 64}, 2, 0.5, 0.5),  # 128 / 64
        ({"memory": 8}, 2, 0.5, 0.5),  # 16 / 8
    ]:
        assert cards.shares(card, counts, traffic) == pytest.approx((low, high), rel=1e-12), counts


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads"),
    [(80, 32, 4096, 2048), (80, 33, 4096, 1536), (75, 58, 4096, 1024), (86, 32, 40 * 1024, 512), (90, 255, 0, 256)],
)
def test_threads_of_an_sm(arch, registers, shared, threads):
    assert cards.threads_per_sm(arch, registers, shared, 256) == threads


def test_every_card_has_figures():
    assert {card.arch for card in cards.CARDS} <= set(cards.RATES) & set(cards.LIMITS)
    assert cuda_model.percent(0.294, 0.376) == "29-38"
    assert cuda_model.percent(0.994, 1.0) == "99-100"
    assert cuda_model.percent(1.0, 1.0) == "100"


# -- the kernels -----------------------------------------------------------------------------------------------


class Held(NamedTuple):
    """The most that the hot loop of a kernel may have for an element, on sm_80, and the cards that must reach 90 %."""

    instructions: float
    fp64: float
    convert64: float
    worst: float  # instructions, where the threads of a warp take every branch both ways
    reach: str = ""  # cards, by the lower bound: with ordinary data
    always: str = ""  # and with any data


ALL = "A100 H100 4090 T4 3090"
#: To be tightened as kernels get better, never loosened in silence. The first ones are what matters: norms and scaling
#: at the bandwidth of every card, whatever the data; of float64 where there are units for it.
HELD = {
    "norm float16": Held(6, 0.3, 0.3, 9.5, ALL, ALL),
    "norm bfloat16": Held(6.5, 0.3, 0.3, 10, ALL, ALL),
    "norm float32": Held(8, 0.5, 0.5, 13.5, ALL, ALL),
    "norm float64": Held(28, 10, 0, 57.5, "A100 H100", "A100 H100"),
    "norm, small trees, float32": Held(3.5, 1, 1, 3.5, "A100 H100 4090", "A100 H100 4090"),
    "norm, small trees, float16": Held(4.5, 1, 1, 4.5, "A100 H100", "A100 H100"),
    "norm, small trees, bfloat16": Held(5, 1, 1, 5, "A100 H100", "A100 H100"),
    "p = 1 float16": Held(5.5, 0.3, 0.3, 9, ALL, ALL),
    "p = 1 bfloat16": Held(6, 0.3, 0.3, 9.5, ALL, ALL),
    "p = 1 float32": Held(7.5, 0.5, 0.5, 12.5, ALL, ALL),
    "p = 1 float64": Held(27, 9, 0, 55.5, "A100 H100", "A100 H100"),
    "p = inf float16": Held(3, 0, 0, 4, ALL, ALL),
    "p = inf bfloat16": Held(3, 0, 0, 4, ALL, ALL),
    "p = inf float32": Held(3.5, 0, 0, 3.5, ALL, ALL),
    "p = inf float64": Held(4.5, 0, 0, 9.5, ALL, ALL),
    "rms float16": Held(6, 0.3, 0.3, 9.5, ALL, ALL),
    "rms bfloat16": Held(6.5, 0.3, 0.3, 10, ALL, ALL),
    "rms float32": Held(8, 0.5, 0.5, 13.5, ALL, ALL),
    "rms float64": Held(28, 10, 0, 57.5, "A100 H100", "A100 H100"),
    "norm, kept axis, long rows, float32": Held(8, 0.5, 0.5, 13.5, ALL, ALL),
    "norm, kept axis, long rows, float16": Held(6, 0.3, 0.3, 9.5, ALL, ALL),
    "norm, kept axis, long rows, bfloat16": Held(6.5, 0.3, 0.3, 10, ALL, ALL),
    "norm, kept axis, short rows or columns, float32": Held(24.5, 0.5, 0.5, 30, ALL, ALL),
    "norm, kept axis, short rows or columns, float16": Held(14.5, 0.3, 0.3, 18, ALL, ALL),
    "norm, kept axis, short rows or columns, bfloat16": Held(14.5, 0.3, 0.3, 18, ALL, ALL),
    "scale float16": Held(9.5, 0, 0, 9.5, ALL, ALL),
    "scale bfloat16": Held(17, 0, 0, 17, ALL, ALL),
    "scale float32": Held(13.5, 0.3, 0, 32.5, ALL, ALL),
    "scale float64": Held(9.5, 1, 0, 9.5, ALL, ALL),
    "scale, by leaf, float32": Held(12.5, 0, 0, 31.5, ALL, ALL),
    "scale, by leaf, float16": Held(9.5, 0, 0, 9.5, ALL, ALL),
    "scale, by leaf, bfloat16": Held(17, 0, 0, 17, ALL, ALL),
    "scale, kept axis, long rows, float32": Held(13, 0, 0, 32.5, ALL, ALL),
    "scale, kept axis, long rows, float16": Held(10, 0, 0, 10, ALL, ALL),
    "scale, kept axis, long rows, bfloat16": Held(18, 0, 0, 18, ALL, ALL),
    "scale, kept axis, short rows or columns, float32": Held(34, 0, 0, 52, ALL, ALL),
    "scale, kept axis, short rows or columns, float16": Held(30, 0, 0, 30, ALL, ALL),
    "scale, kept axis, short rows or columns, bfloat16": Held(37, 0, 0, 37, ALL, ALL),
    "clip by value float16": Held(6.5, 0, 0, 10, ALL, ALL),
    "clip by value bfloat16": Held(7.5, 0, 0, 14.5, ALL, ALL),
    "clip by value float32": Held(7, 0, 0, 13.5, ALL, ALL),
    "clip by value float64": Held(8.5, 1, 0, 13, ALL, ALL),
    "weighted sum float16": Held(37, 3, 1, 37, "", ""),
    "weighted sum bfloat16": Held(37, 3, 1, 37, "", ""),
    "weighted sum float32": Held(35.5, 3, 1, 35.5, "A100 H100", "A100 H100"),
    "weighted sum float64": Held(35.5, 3, 0, 35.5, "A100 H100 4090 T4", "A100 H100 4090 T4"),
}
SPILLED = 8  # bytes, at most, on any card
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def test_every_case_is_held():
    assert [case.name for case in CASES] == list(HELD)
    names = {card.name.split()[-1] for card in cards.CARDS}
    assert all(set((held.reach + " " + held.always).split()) <= names for held in HELD.values())


@needs_compiler
@pytest.mark.full
@each_case
def test_counts_are_held(case: Case) -> None:
    found, held = cuda_model.counted(case, ARCH), HELD[case.name]
    ordinary, worst = found.ways[0], found.ways[-1]
    assert ordinary.instructions <= held.instructions
    assert ordinary.counts.get("fp64", 0) <= held.fp64
    assert ordinary.counts.get("convert64", 0) <= held.convert64
    assert worst.instructions <= held.worst
    assert found.machine.registers > 0  # the compiler's log was understood
    assert found.threads >= 768
    assert ordinary.in_flight[1] * found.threads >= 12 * 1024  # bytes of loads under way, on an SM
    newest = cuda_model.counted(case, max(cuda_model.ARCHS))  # no card of it is in the table
    assert newest.machine.spilled <= SPILLED
    assert newest.ways[0].counts.get("fp64", 0) <= held.fp64 + 1


@needs_compiler
@pytest.mark.full
@pytest.mark.parametrize("card", cards.CARDS, ids=lambda card: card.name)
@each_case
def test_shares_are_held(case: Case, card: cards.Card) -> None:
    found, held = cuda_model.counted(case, card.arch), HELD[case.name]
    name = card.name.split()[-1]
    for cards_held, way in ((held.reach, found.ways[0]), (held.always, found.ways[-1])):
        if name in cards_held.split():
            assert cuda_model.share(case, card, way)[0] >= 0.9
    assert found.machine.spilled <= SPILLED


@needs_compiler
@pytest.mark.full
def test_work_that_no_path_does_is_told():
    """In the table too, which goes on."""
    case = CASES[0]._replace(work="MUFU")
    why = f"{case.name}: no path of the hot loop of gradclip_measure does the work"
    with pytest.raises(LookupError, match=why):
        cuda_model.counted(case, ARCH)
    told, counted, *_ = cuda_model.rows([case, CASES[3]])
    assert told[0].startswith(f"{cuda_model.NOT_COUNTED}, sm_75: {why}")
    assert counted[0] == "norm float64"
    assert len(told) == len(counted) == len(cuda_model.HEAD)


@needs_compiler
@pytest.mark.full
def test_the_command_prints_the_table(capsys):
    assert cuda_model.main(["--markdown", "--only", "norm float64"]) == 0
    head, rule, row, *rest = capsys.readouterr().out.splitlines()
    assert head.startswith("| per element | instructions | FP64 |")
    assert rule.startswith("| --- | ---: |")
    counted = cuda_model.counted(next(case for case in CASES if case.name == "norm float64"), ARCH)
    assert row.startswith(f"| norm float64 | {counted.ways[0].instructions:.1f} | 10 | 0 |")
    assert head.count("|") == rule.count("|") == row.count("|") == 18
    assert "p = 2.0 22 and 248" in "\n".join(rest)


def test_programs_are_counted():
    """Of one dtype of six: to measure and to spread six each, of narrow ones quickly too; one joins, one settles."""
    assert len(of_norm(2.0, 1)) == 2 * (6 + 4) + 1 + 1
    assert len(of_norm(2.0, 6)) == 248
    assert len(of_norm(math.inf, 1)) == 2 * 6 + 1 + 1
    assert len(of_norm(math.inf, 6)) == 2 * 63 + 1 + 1
    assert len(of_the_rest(1)) == 2 + (6 + 6 + 1) + 5 * 4
    assert len(first_clip()) == len({source for _, source, _ in first_clip()})

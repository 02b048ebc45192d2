"""What the CUDA kernels' machine code is held to, and the cards' arithmetic. Its reader: test_sass.py.

The kernels are compiled and disassembled, not run: `pip install 'gradclip[cuda-model]'` brings what that takes.
"""

from __future__ import annotations

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


#: To be tightened as kernels get better, never loosened in silence.
HELD = {
    "norm float32": Held(9.5, 1, 1, 21, "A100 H100 4090", "A100 H100"),
    "norm float16": Held(15.5, 2, 0, 15.5, "A100 H100", "A100 H100"),
    "norm bfloat16": Held(15.5, 2, 0, 15.5, "A100 H100", "A100 H100"),
    "norm float64": Held(39, 26, 0, 39, "H100", "H100"),
    "p = 1 float32": Held(9.5, 1, 1, 21, "A100 H100 4090", "A100 H100"),
    "p = 1 bfloat16": Held(15.5, 2, 0, 15.5, "A100 H100", "A100 H100"),
    "p = inf float32": Held(37.5, 14, 1, 49, "H100"),
    "p = inf bfloat16": Held(42.5, 15, 0, 42.5),
    "rms float32": Held(10.5, 1, 1, 22, "A100 H100 4090", "A100 H100"),
    "rms bfloat16": Held(15.5, 2, 0, 15.5, "A100 H100", "A100 H100"),
    "norm, kept axis, long rows, float32": Held(20, 1, 1, 32.5, "A100 H100 4090", "A100 H100"),
    "norm, kept axis, long rows, bfloat16": Held(24, 2, 0, 24),
    "norm, kept axis, short rows or columns, float32": Held(41, 1, 1, 53.5, "A100 H100 4090"),
    "norm, kept axis, short rows or columns, bfloat16": Held(45, 2, 0, 45),
    "scale float32": Held(20.5, 6.5, 2, 61, "A100 H100", "A100 H100"),
    "scale float16": Held(43, 4.5, 0, 50),
    "scale bfloat16": Held(43, 4.5, 0, 50),
    "scale float64": Held(6, 3, 0, 6, "A100 H100 4090 T4 3090", "A100 H100 4090 T4 3090"),
    "scale, by leaf, float32": Held(25, 7, 2, 64.5, "A100 H100", "A100 H100"),
    "scale, by leaf, bfloat16": Held(47, 5, 0, 53.5),
    "scale, kept axis, float32": Held(64, 9, 2, 243.5, "A100 H100"),
    "scale, kept axis, bfloat16": Held(127.5, 7, 0, 226),
    "weighted sum float32": Held(25, 4, 1, 37.5, "A100 H100", "A100 H100"),
    "weighted sum float64": Held(16.5, 4, 0, 16.5, "A100 H100 4090", "A100 H100 4090"),
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
    assert found.threads >= 512
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
def test_work_that_no_path_does_is_told():
    """In the table too, which goes on."""
    case, why = (
        CASES[0]._replace(work="MUFU"),
        "norm float32: no path of the hot loop of gradclip_measure does the work",
    )
    with pytest.raises(LookupError, match=why):
        cuda_model.counted(case, ARCH)
    told, counted = cuda_model.rows([case, CASES[3]])
    assert told[0].startswith(f"{cuda_model.NOT_COUNTED}, sm_75: {why}")
    assert counted[0] == "norm float64"
    assert len(told) == len(counted) == len(cuda_model.HEAD)


@needs_compiler
def test_the_command_prints_the_table(capsys):
    assert cuda_model.main(["--markdown", "--only", "norm float64"]) == 0
    head, rule, row, *rest = capsys.readouterr().out.splitlines()
    assert head.startswith("| per element | instructions | FP64 |")
    assert rule.startswith("| --- | ---: |")
    counted = cuda_model.counted(next(case for case in CASES if case.name == "norm float64"), ARCH)
    assert row.startswith(f"| norm float64 | {counted.ways[0].instructions:.1f} | 26 | 0 |")
    assert head.count("|") == rule.count("|") == row.count("|") == 18
    assert "p = 2.0 14 and 128" in "\n".join(rest)


def test_programs_are_counted():
    """Of one dtype of six: six to measure, six to spread, one that joins, one that settles."""
    assert len(of_norm(2.0, 1)) == 6 + 6 + 1 + 1
    assert len(of_norm(2.0, 6)) == 63 + 63 + 1 + 1
    assert len(of_the_rest(1)) == 2 + (6 + 6 + 1) + 4 * 4
    assert len(first_clip()) == len({source for _, source, _ in first_clip()})

"""The reader of machine code on snippets whose counts are known by hand, and what the real kernels are held to.

The kernels are compiled and disassembled, not run: `pip install 'gradclip[cuda-model]'` brings what that takes.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest

pytest.importorskip("benchmarks.cuda_model", reason="benchmarks/ is not beside these tests")

from benchmarks import cards, cuda_model, sass
from benchmarks.cuda_cases import CASES, Case, first_clip, of_norm, of_the_rest

ARCH = cuda_model.SHOWN
needs_compiler = pytest.mark.skipif(bool(cuda_model.missing()), reason=cuda_model.missing() or "all is here")

# -- the reader ------------------------------------------------------------------------------------------------


def blocks(body: str) -> list[sass.Block]:
    """A function `f` with these lines, labels beside them, after another one; written as nvdisasm prints it."""
    lines = ['\t.section\t.text.g,"ax",@progbits', "\t.sectionflags\t@", "g:", "        /*0000*/  EXIT ;"]
    lines += ['\t.section\t.text.f,"ax",@progbits', '\t.sectioninfo\t@"SHI_REGISTERS=32"', "f:", ".text.f:"]
    for i, line in enumerate(body.strip().splitlines()):
        line = line.strip()
        lines.append(line if line.endswith(":") else f"        /*{16 * i:04x}*/            {line} ;")
    return sass.blocks_of("\n".join([*lines, ".L_x_999:"]), "f")


def one_loop(body: str) -> tuple[list[sass.Block], sass.Loop]:
    found = blocks(body)
    (loop,) = sass.loops(found)
    return found, loop


def by_number(one: sass.Instruction) -> float:
    return 1.0


LOOP = """
MOV R1, c[0x0][0x28]
.L_x_0:
LDG.E.128 R4, [R2.64]
@P1 F2F.F64.F32 R8, R4
DFMA R10, R8, R8, R10
F2F.F16.F32 R12, R5
IADD3 R0, R0, 0x1, RZ
ISETP.GE.AND P0, PT, R0, c[0x0][0x160], PT
@!P0 BRA `(.L_x_0)
EXIT
"""


def test_one_turn_of_a_loop_is_counted():
    """A predicated instruction is issued in any case."""
    found, loop = one_loop(LOOP)
    assert [len(block.instructions) for block in found] == [1, 7, 1]
    assert (loop.head, loop.body, loop.loads(found)) == (1, {1}, 16)
    ((key, (cheap, dear)),) = sass.turns(found, loop, by_number).items()
    assert key == (16, 0)
    assert cheap == dear == sass.everything(found, loop, 16)
    assert cheap.counts() == {"memory": 1, "convert64": 1, "fp64": 1, "convert": 1, "alu": 2, "other": 1}
    assert cheap.instructions[1] == ("@P1", "F2F.F64.F32", "R8, R4")


def test_loops_inside_are_told_apart():
    found = blocks("""
    .L_x_0:
    LDG.E.64 R4, [R2.64]
    .L_x_1:
    LDG.E.U16 R6, desc[UR4][R2.64+0x10]
    FADD R7, R6, R7
    @P0 BRA `(.L_x_1)
    FFMA R8, R7, R7, R8
    @P1 BRA `(.L_x_0)
    EXIT
    """)
    inner, outer = sass.loops(found)
    assert (inner.loads(found), outer.loads(found)) == (2, 8)
    assert inner.body == outer.inner
    assert inner.body < outer.body
    ((cheap, _),) = sass.turns(found, outer, by_number).values()  # the loop inside turns once
    assert (cheap.loaded, cheap.counts()) == (10, {"memory": 2, "fp32": 2, "other": 2})


BRANCH = """
.L_x_0:
LDG.E R4, [R2.64]
LOP3.LUT P0, RZ, R4, 0x7f800000, RZ, 0xc0, !PT
@P0 BRA `(.L_x_1)
SHF.L.U32 R5, R4, 0x3, RZ
DMUL R8, R4, 5.28294531135665246352e+269
BRA `(.L_x_2)
.L_x_1:
F2F.F64.F32 R8, R4
.L_x_2:
DADD R10, R8, R10
@P1 BRA `(.L_x_0)
EXIT
"""


def test_a_branch_has_a_cheap_path_and_a_dear_one():
    found, loop = one_loop(BRANCH)
    ((cheap, dear),) = sass.turns(found, loop, by_number).values()
    assert cheap.counts() == {"memory": 1, "alu": 1, "convert64": 1, "fp64": 1, "other": 2}
    assert dear.counts() == {"memory": 1, "alu": 2, "fp64": 2, "other": 3}
    both = sass.everything(found, loop, 4).counts()
    assert both == {"memory": 1, "alu": 2, "convert64": 1, "fp64": 2, "other": 3}


def test_what_is_dear_depends_on_the_price():
    found, loop = one_loop(BRANCH)
    ((cheap, dear),) = sass.turns(found, loop, lambda one: 9.0 if one.kind == "convert64" else 1.0).values()
    assert (cheap.counts()["convert64"], dear.counts()["convert64"]) == (0, 1)


def test_ordinary_paths_are_told_by_what_they_run():
    found, loop = one_loop(BRANCH)
    by_work = sass.turns(found, loop, by_number, "DMUL|DADD")
    assert {key: len(cheap.instructions) for key, (cheap, _) in by_work.items()} == {(4, 1): 6, (4, 2): 8}
    ((_, dear),) = sass.turns(found, loop, by_number, avoid=r"DMUL .*e\+").values()
    assert len(dear.instructions) == 6


def test_paths_differ_by_what_they_load():
    """Half of the data may be left out by a branch: both turns are there."""
    found, loop = one_loop("""
    .L_x_0:
    LDG.E.128 R4, [R2.64]
    @P0 BRA `(.L_x_1)
    LDG.E.128 R8, [R2.64+0x10]
    .L_x_1:
    @P1 BRA `(.L_x_0)
    EXIT
    """)
    assert {key: len(dear.instructions) for key, (_, dear) in sass.turns(found, loop, by_number).items()} == {
        (16, 0): 3,
        (32, 0): 4,
    }


def test_a_branch_may_have_its_condition_as_an_operand():
    found = blocks("""
    BRA.U !UP0, `(.L_x_1)
    @P0 EXIT
    BRA `(.L_x_1)
    NOP
    .L_x_1:
    BSSY B0, `(.L_x_2)
    RET.REL.NODEC R2 `(f)
    .L_x_2:
    EXIT
    """)
    assert [block.after for block in found] == [(4, 1), (2,), (4,), (4,), (), ()]


@pytest.mark.parametrize(
    ("body", "most"),
    [
        ("LDG.E.128 R4, [R2.64]; LDG.E.128 R8, [R2.64+0x10]; FADD R0, R4, R0; FADD R0, R8, R0", (2, 32)),
        ("LDG.E.128 R4, [R2.64]; FADD R0, R7, R0; LDG.E.128 R8, [R2.64+0x10]; FADD R0, R8, R0", (1, 16)),
        ("FADD R0, R4, R0; LDG.E R4, [R2.64]; FADD R0, R8, R0; LDG.E R8, [R2.64+0x10]", (2, 8)),  # for the next turn
        ("LDG.E R4, [R2.64]; FADD R0, R4, R0; FADD R0, R8, R0; LDG.E R8, [R2.64]", (2, 8)),  # R8 waits when R4 comes
        ("LDG.E R5, [R2.64]; DADD R10, R4, R10; LDG.E R8, [R2.64]; FADD R0, R8, R0", (1, 4)),  # R4 is R4 and R5
        ("LDG.E R4, [R2.64]; LDG.E R4, [R2.64]; FADD R0, R4, R0", (1, 4)),  # the same register again
    ],
)
def test_loads_in_flight(body, most):
    found, loop = one_loop(".L_x_0:\n" + body.replace("; ", "\n") + "\n@P1 BRA `(.L_x_0)\nEXIT")
    ((turn, _),) = sass.turns(found, loop, by_number).values()
    assert turn.in_flight() == most


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
    case = CASES[0]
    with pytest.raises(LookupError, match="norm float32: no path of the hot loop of gradclip_measure does the work"):
        cuda_model.counted(case._replace(work="MUFU"), ARCH)


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

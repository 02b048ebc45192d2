"""The reader of machine code (`benchmarks/sass.py`), on snippets whose counts are known by hand."""

from __future__ import annotations

import pytest

pytest.importorskip("benchmarks.sass", reason="benchmarks/ is not beside these tests")

from benchmarks import sass


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

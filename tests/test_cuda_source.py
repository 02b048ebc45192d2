"""The CUDA C that is written from the norms and the policy: its formulas, and that NVIDIA's compiler takes it all.

The compiler is NVRTC, from PyPI (`pip install 'gradclip[nvrtc]'`); it needs no GPU. That nothing here has run on one
stands in docs/tested.md; what the kernels compute is tested in test_cupy_kernels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest

pytest.importorskip("benchmarks.nvrtc", reason="benchmarks/ is not beside these tests")

from benchmarks import nvrtc
from benchmarks.nvrtc import architectures, compiled
from gradclip._backends import expressions as xp
from gradclip._backends.cupy import gathers, programs, table, tiles
from gradclip._backends.cupy.numbers import KINDS, REAL
from gradclip._backends.cupy.text import LEAVES, ONE, WHOLE
from gradclip._backends.expressions import Expression, Printed
from gradclip._norms import Norm, TwoNorm, norm_for
from gradclip._scaled import RANGES

INF = math.inf
NARROW = tuple(kind for kind in KINDS if KINDS[kind].component != "float64")
NORMS = [2.0, "rms", 1.0, 0.0, 3.0, 0.5, INF, -INF, -1.0, 1000.0]

# -- expressions -----------------------------------------------------------------------------------------------


def test_expressions_print_as_statements_each_once():
    printed, x, y = Printed("x"), Expression("x"), Expression("y")
    root = xp.sqrt(y * y + 1)
    out = xp.where(xp.logical_and(x > root, xp.isfinite(x)), 2.0**600 * x, -1 / (x - root)) ** 2.5
    assert printed.name(out) == printed.name(out)
    assert printed.once == [
        "const double v0 = y * y;",
        "const double v1 = v0 + 1.0;",
        "const double v2 = sqrt(v1);",
    ]
    assert printed.each == [
        "const bool v3 = x > v2;",
        "const bool v4 = fabs(x) < INFINITE;",
        "const bool v5 = v3 && v4;",
        "const double v6 = 4.149515568880993e+180 * x;",
        "const double v7 = x - v2;",
        "const double v8 = (-1.0) / v7;",
        "const double v9 = v5 ? v6 : v8;",
        "const double v10 = pow(v9, 2.5);",
    ]


def test_every_operation_prints_as_itself():
    x, y = Expression("x"), Expression("y")
    cases = {
        "x + y": x + y,
        "1.0 + x": 1 + x,
        "x - y": x - y,
        "1.0 - x": 1 - x,
        "x * y": x * y,
        "2.0 * x": 2 * x,
        "x / y": x / y,
        "1.0 / x": 1 / x,
        "-x": -x,
        "x < y": x < y,
        "x <= y": x <= y,
        "x > y": x > y,
        "x >= y": x >= y,
        "x == y": x == y,
        "larger(x, y)": xp.maximum(x, y),
        "smaller(x, 0.5)": xp.minimum(x, 0.5),
        "fabs(x)": xp.abs(x),
        "log(x)": xp.log(x),
        "x != x": xp.isnan(x),
        "fabs(x) == INFINITE": xp.isinf(x),
        "as_float32(x)": xp.astype(x, xp.float32),
        "x * x * x": x**3,
        "sqrt(x)": x**0.5,
    }
    for text, value in cases.items():
        printed = Printed()
        printed.name(value)
        (line,) = printed.once
        assert line.split(" = ", 1)[1] == f"{text};"
    assert [xp.number(v).form for v in (INF, -INF, math.nan, -0.0)] == [
        "INFINITE",
        "(-INFINITE)",
        "NOT_A_NUMBER",
        "(-0.0)",
    ]


def test_a_branch_on_an_expression_is_refused():
    x = Expression("x")
    for branch in (lambda: bool(x), lambda: x > 0 or x, lambda: max(x, x + 1)):
        with pytest.raises(TypeError, match="do not branch"):
            branch()


def test_what_is_written_is_the_norm():
    """A plain sum of squares for narrow leaves; of large ones, and of wide ones, the term of a few at a time."""
    narrow, quick = (programs.measure(TwoNorm(), 0, ("float32",), quick) for quick in (False, True))
    assert re.search(r"= re \* re;\s+s\[1\] \+= v\d+;\s+}\s*}\);", narrow)
    assert "contribute" not in narrow
    assert re.search(r"R term\(R x\) {\s+const R v0 = x \* x;\s+return v0;", quick)
    assert "contribute(x, s, c)" in quick.split("gather_float32")[1]
    wide = programs.measure(TwoNorm(), 0, ("complex128",))
    assert "contribute(x, s, c)" in wide.split("gather_complex128")[1]
    assert wide == programs.measure(TwoNorm(), 0, ("complex128",), True)


def test_sums_are_safe_from_what_is_lost_to_what_overflows():
    """Below, squares that underflow are too small to see; above, there is inf, or no room for 2**48 of them in a bin.

    And what is scaled by a step is within these again, be it a first subnormal or a last finite number.
    """
    unit = {"float": Fraction(2) ** -126, "double": Fraction(2) ** -1074}  # flushed below, or rounded to
    bits = {"float": 24, "double": 53}
    for real, (least, most) in gathers.SAFE.items():
        r = RANGES["float32" if real == "float" else "float64"]
        few = 4 if real == "float" else 2
        assert few * unit[real] / Fraction(least) <= Fraction(2) ** -(bits[real] + 2)
        assert Fraction(2) ** 48 * Fraction(least) <= Fraction(r.thin) * Fraction(2) ** -bits[real] or real == "float"
        assert few * Fraction(least) * Fraction(r.step) ** 2 < Fraction(r.largest)
        assert few * (Fraction(r.largest) / Fraction(r.step)) ** 2 < Fraction(r.largest)
        assert Fraction(2) ** 48 * Fraction(most) < Fraction(r.largest) or real == "float"
        assert Fraction(2) ** -(149 if real == "float" else 1074) * Fraction(r.step) > Fraction(r.tiny)


def test_programs_are_written_once():
    norm = norm_for(3.0, binned=True)
    assert programs.measure(norm, 1, ("float32",)) is programs.measure(norm, 1, ("float32",))
    assert programs.settle(norm) is programs.settle(norm_for(3.0, binned=True))


def test_one_program_for_each_norm_settles_everything():
    """Bounds, relative ones too, policies, dtypes, bins and groups are data to it; and one serves all given norms."""
    norms = [norm_for(p, binned) for p in (2.0, "rms", 1.0, 0.0, 3.0, INF, -INF) for binned in (True, False)]
    assert len({programs.settle(norm) for norm in [*norms, None]}) == 8
    for step in (0, 1):
        found = {programs.joined(norm, step) for norm in norms if step < len(norm.ops)}
        assert len(found) <= 5  # by operation and slots


def test_bins_are_no_matter_of_the_program():
    for p in NORMS:
        wide, plain = norm_for(p, binned=True), norm_for(p, binned=False)
        for step in range(len(wide.ops)):
            for kernel in (programs.measure, programs.spread):
                assert kernel(wide, step, ("float16",)) == kernel(plain, step, ("float16",))


def test_what_all_elements_add_alike_is_counted_once_a_chunk():
    """The number of elements, for their mean: not a 1 for each; and 0 is not added at all."""
    for kernel in (programs.measure, programs.spread):
        for quick in (False, True):
            source = kernel(norm_for("rms", True), 0, ("float32",), quick)
            before, inside = source.split("__forceinline__ void gather_float32")[1].split("each<4>(p, n, [&]")
            assert "merge(s[3], c[3], 1.0 * elements, 0.0);" in before
            assert "s[3]" not in inside.split("});")[0]
            plain = kernel(TwoNorm(), 0, ("float32",), quick).split("void gather_float32")[1].split("{", 1)[1]
            assert "elements" not in plain.split("\n}\n")[0]


# -- tables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [ONE, WHOLE])
def test_tables_of_long_leaves_hold_every_element_once(grouped: int) -> None:
    assert max(tiles.TILES.itemsize + 5 * 8, table.ROW.itemsize + 3 * 8, table.FLIPS.itemsize + 20 * 8) <= 4096
    assert table.TABLE[grouped].itemsize + 9 * 8 <= 4096  # and the other parameters
    most = table.LONGEST
    lengths = [most, 1, most - 5, most // 4 + 3, most, 65536, 4096, most, 7] + [2**20 + 1] * 600 + [most] * 600
    sizes = [2, 2, 4, 8, 8, 16]
    lines = sorted(
        (i % 6, i % 7 if grouped else 0, 4096 * i, n // sizes[i % 6] or 1, sizes[i % 6], i)
        for i, n in enumerate(lengths)
    )
    held = []
    for one in table.tables(table.Lines(*np.array(lines, np.uint64).T), grouped=grouped):
        n, bits = int(one["leaves"]), int(one["bits"])
        assert n <= LEAVES[grouped]
        ends = [*one["first"][1:n].tolist(), int(one["chunks"])]
        for i in range(n):
            chunks = ends[i] - int(one["first"][i])
            kind = int(np.searchsorted(one["until"], i, side="right"))
            length = (chunks - 1) * (2**bits // sizes[kind]) + int(one["last"][i]) + 1
            group = int(one["group"][i]) if grouped else 0
            held.append((kind, group, int(one["from"][i]), length, sizes[kind], int(one["to"][i])))
    assert held == lines


# -- the compiler ----------------------------------------------------------------------------------------------

NEEDED = (70, 75, 80, 86, 89, 90, 100, 103, 120)


needs_nvrtc = pytest.mark.skipif(isinstance(nvrtc.library(), str), reason=str(nvrtc.library()))


def programs_of(norm: Norm) -> Iterator[tuple[str, str, list[str]]]:
    """Every kernel for a norm: its name, its source and CuPy's options."""
    for step in range(len(norm.ops)):
        yield "gradclip_measure", programs.measure(norm, step, tuple(KINDS)), []
        yield "gradclip_measure", programs.measure(norm, step, NARROW, True), []
        yield "gradclip_spread", programs.spread(norm, step, tuple(KINDS)), []
        yield "gradclip_spread", programs.spread(norm, step, NARROW, True), []
        yield "gradclip_join", programs.joined(norm, step), []
    if not isinstance(norm, programs.Census):
        yield "gradclip_settle", programs.settle(norm), ["--fmad=false"]


OTHERS = [
    *(("gradclip_scale", programs.scale(tuple(REAL), grouped), []) for grouped in (ONE, WHOLE)),
    ("gradclip_scale_spread", programs.scale_spread(tuple(REAL)), []),
    ("gradclip_clamp", programs.clamp(tuple(REAL)), []),
    ("gradclip_weighted", programs.weighted(tuple(REAL)), []),
    ("gradclip_settle", programs.settle(None), ["--fmad=false"]),
    ("gradclip_row", programs.row(), []),
    *programs_of(programs.Census()),
]


@needs_nvrtc
@pytest.mark.full
@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("arch", [a if a in (70, 120) else pytest.param(a, marks=pytest.mark.slow) for a in NEEDED])
def test_every_kernel_compiles(arch: int, p: float) -> None:
    if arch not in architectures():
        pytest.skip(f"this NVRTC does not know sm_{arch}")
    for name, source, options in [*programs_of(norm_for(p, binned=True)), *(OTHERS if p == 2 else [])]:
        code, log = compiled(source, f"sm_{arch}", *options)
        assert code.startswith(b"\x7fELF"), log
        assert name.encode() in code
        assert not [line for line in log.splitlines() if line and "deprecated" not in line]


@needs_nvrtc
def test_the_compiler_sees_errors_and_the_table_is_as_the_host_lays_it_out() -> None:
    arch = max(set(NEEDED) & set(architectures()))
    sources = [programs.scale(("float32",), grouped) for grouped in (ONE, WHOLE)]
    for source in (*sources, programs.spread(TwoNorm(), 0, ("float32",)), programs.weighted(("float32",))):
        code, log = compiled(source.replace("unsigned to[", "u64 to["), f"sm_{arch}")
        assert code == b""
        assert "the host lays it out otherwise" in log


@needs_nvrtc
@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
def test_loads_are_wide_and_the_table_is_not_copied(kind: str) -> None:
    """16 bytes are loaded and stored at a time, and the table is read where it came: no thread has a copy of it."""
    scaling = [programs.scale((kind,), grouped) for grouped in (ONE, WHOLE)]
    scaling += [programs.scale_spread((kind,)), programs.clamp((kind,))]
    measuring = [programs.measure(TwoNorm(), 0, (kind,), quick) for quick in (False, True)]
    for source in (*measuring, programs.spread(TwoNorm(), 0, (kind,), True), *scaling):
        code, log = compiled(source, "compute_80")
        assert re.search(rb"ld\.global\.v(4\.u32|2\.[uf]64)", code), log
        assert b".local" not in code
        assert b"st.global.v" in code or source not in scaling


@needs_nvrtc
def test_what_must_not_be_flushed_is_not() -> None:
    """CuPy asks for subnormal numbers to be flushed to zero; where they count, the instructions are such as do not."""

    def ptx(source: str) -> bytes:
        code, log = compiled(source, "compute_80")
        assert code, log
        return code

    plain, quick = (ptx(programs.measure(TwoNorm(), 0, ("float32",), quick)) for quick in (False, True))
    assert b"cvt.f64.f32" in plain
    assert b".ftz" not in plain  # all else is in double
    assert b"cvt.f64.f32" in quick
    assert b"mul.rn.f32" in quick  # what is scaled
    assert b"fma.rn.ftz.f32" in quick  # squares that were, or that are not small: their sum has told
    clip = ptx(programs.clamp(("float32",)))
    assert b"setp.lt.f32" in clip
    scale = ptx(programs.scale(("float32",), ONE))
    assert b"mul.rn.f32" in scale
    assert b"fma.rn.f32" in scale
    assert b"fma.rn.ftz" not in scale
    for code in (plain, quick, clip, scale):
        assert not re.search(rb"cvt\.(rn\.)?ftz\.f64", code)


@needs_nvrtc
@pytest.mark.parametrize("p", [2.0, "rms", 3.0])
def test_kernels_for_kept_axes_spill_nothing(p: float) -> None:
    """Neither sums nor the table are in memory of a thread's own."""
    norm, kinds = norm_for(p, binned=True), ("float16", "complex128")
    sources = [programs.spread(norm, step, kinds) for step in range(len(norm.ops))]
    for source in (*sources, programs.joined(norm, 0), programs.weighted(("float16", "float64"))):
        code, log = compiled(source, "compute_80")
        assert code, log
        assert b".local" not in code
    code, log = compiled(programs.settle(norm), "compute_80", "--fmad=false")
    assert code, log
    assert b".local" not in code

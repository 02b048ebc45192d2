"""The CUDA C that is written from the norms and the policy: its formulas, and that NVIDIA's compiler takes it all.

The compiler is NVRTC, from PyPI (`pip install 'gradclip[nvrtc]'`); it needs no GPU. That nothing here has run on one
stands in docs/tested.md; what the kernels compute is tested in test_cupy_kernels.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import gradclip
from gradclip._norms import Norm, TwoNorm, norm_for

if importlib.util.find_spec("cupy") is None:
    # The package itself imports CuPy; what writes and lays out text for it does not, and is here without it.
    package = ModuleType("gradclip._backends.cupy")
    package.__path__ = [str(Path(gradclip.__file__).parent / "_backends" / "cupy")]
    sys.modules.setdefault(package.__name__, package)

from gradclip._backends.cupy import expressions as xp
from gradclip._backends.cupy import programs, table, tiles
from gradclip._backends.cupy.expressions import Expression, Printed
from gradclip._backends.cupy.numbers import KINDS, REAL
from gradclip._backends.cupy.text import LEAVES, ONE, WHOLE

INF = math.inf
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
    """The plain sum of squares for narrow leaves; three bins, summed exactly, for others."""
    narrow, wide = programs.measure(TwoNorm(), 0, ("float32",)), programs.measure(TwoNorm(), 0, ("complex128",))
    assert re.search(r"= re \* re;\s+s\[1\] \+= v\d+;\s+}\);", narrow)
    assert "s[0]" not in narrow.split("gather_float32")[1].split("gradclip_measure")[0]
    assert len(re.findall(r"add\(s\[[012]\], c\[[012]\], v\d+\);", wide)) == 3


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
        source = kernel(norm_for("rms", True), 0, ("float32",))
        before, inside = source.split("__forceinline__ void gather_float32")[1].split("each(p, n, [&]")
        assert "s[3] += 1.0 * elements;" in before
        assert "s[3]" not in inside.split("});")[0]
        assert (
            "elements"
            not in kernel(TwoNorm(), 0, ("float32",)).split("gather_float32")[1].split("{", 1)[1].split("}\n")[0]
        )


# -- tables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [ONE, WHOLE])
def test_tables_of_long_leaves_hold_every_element_once(grouped: int) -> None:
    assert max(tiles.TILES.itemsize + 5 * 8, table.ROW.itemsize + 3 * 8, table.FLIPS.itemsize + 20 * 8) <= 4096
    assert table.TABLE[grouped].itemsize + 9 * 8 <= 4096  # and the other parameters
    most = table.LONGEST
    lengths = [most, 1, most - 5, most // 4 + 3, most, 65536, 4096, most, 7] + [2**20 + 1] * 600 + [most] * 600
    if grouped == KEPT:  # such leaves are not cut
        lengths += [2**34 + 3, 2**31]
    lines = sorted(
        (i % 3, i % 7 if grouped else 0, 4096 * i, n, i, *((i % 5 + 1, 2**33 + i) if grouped == KEPT else (1, 1)))
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
            length = (chunks - 1) * 2**bits + int(one["last"][i]) + 1
            group = int(one["group"][i]) if grouped else 0
            kept = (int(one["length"][i]), int(one["inner"][i])) if grouped == KEPT else (1, 1)
            held.append((kind, group, int(one["from"][i]), length, int(one["to"][i]), *kept))
    assert held == lines


# -- the compiler ----------------------------------------------------------------------------------------------

NEEDED = (70, 75, 80, 86, 89, 90, 100, 103, 120)


def _nvrtc() -> Any:
    """NVRTC as PyPI has it: the library's path is among the distribution's files. Else why there is none."""
    if "cupycpu" in os.environ.get("LD_PRELOAD", ""):
        return "emulated devices stand in for NVIDIA's libraries: run this file without them"
    for name in ("nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc"):
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            if re.fullmatch(r"libnvrtc\.so\.\d+|nvrtc64_\d+_0\.dll", file.name):
                return ctypes.CDLL(str(file.locate()))
    return "NVRTC is not installed: pip install 'gradclip[nvrtc]'"


NVRTC = _nvrtc()
needs_nvrtc = pytest.mark.skipif(isinstance(NVRTC, str), reason=str(NVRTC))


def architectures() -> list[int]:
    n = ctypes.c_int()
    assert NVRTC.nvrtcGetNumSupportedArchs(ctypes.byref(n)) == 0
    found = (ctypes.c_int * n.value)()
    assert NVRTC.nvrtcGetSupportedArchs(found) == 0
    return list(found)


def compiled(source: str, arch: str, *options: str) -> tuple[bytes, str]:
    """The machine code (PTX for a virtual architecture; empty if it fails) and the log. CuPy's options are given."""
    given = [f"-arch={arch}", "-ftz=true", "--device-as-default-execution-space", *options]
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert NVRTC.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None) == 0
    status = NVRTC.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*map(str.encode, given)))
    kind = "ProgramLog", "PTX" if arch.startswith("compute") else "CUBIN"
    texts = []
    for what in kind if status == 0 else kind[:1]:
        assert getattr(NVRTC, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) == 0
        room = ctypes.create_string_buffer(size.value)
        assert getattr(NVRTC, f"nvrtcGet{what}")(program, room) == 0
        texts.append(room.raw)
    NVRTC.nvrtcDestroyProgram(ctypes.byref(program))
    return texts[1] if status == 0 else b"", texts[0].decode().strip("\0")


def programs_of(norm: Norm) -> Iterator[tuple[str, str, list[str]]]:
    """Every kernel for a norm: its name, its source and CuPy's options."""
    for step in range(len(norm.ops)):
        yield "gradclip_measure", programs.measure(norm, step, tuple(KINDS)), []
        yield "gradclip_spread", programs.spread(norm, step, tuple(KINDS)), []
        yield "gradclip_join", programs.joined(norm, step), []
    if not isinstance(norm, programs.Census):
        yield "gradclip_settle", programs.settle(norm), ["--fmad=false"]


OTHERS = [
    *(("gradclip_scale", programs.scale(tuple(REAL), grouped), []) for grouped in LEAVES),
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
    sources = [programs.scale(("float32",), grouped) for grouped in LEAVES]
    for source in (*sources, programs.spread(TwoNorm(), 0, ("float32",))):
        code, log = compiled(source.replace("unsigned to[", "u64 to["), f"sm_{arch}")
        assert code == b""
        assert "the host lays it out otherwise" in log


@needs_nvrtc
@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
def test_loads_are_wide_and_the_table_is_not_copied(kind: str) -> None:
    """16 bytes are loaded and stored at a time, and the table is read where it came: no thread has a copy of it."""
    scaling = [programs.scale((kind,), grouped) for grouped in LEAVES]
    for source in (programs.measure(TwoNorm(), 0, (kind,)), *scaling):
        code, log = compiled(source, "compute_80")
        assert re.search(rb"ld\.global\.v(4\.u32|2\.[uf]64)", code), log
        assert b".local" not in code
        assert b"st.global.v" in code or b"gradclip_measure" in code


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

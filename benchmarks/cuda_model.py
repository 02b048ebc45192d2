"""What the CUDA kernels can reach, counted from their machine code: `python -m benchmarks.cuda_model --help`.

Each kernel is compiled with NVRTC for the GPUs of `cards`, disassembled, and its hot loop is counted: an upper bound of
the share of the DRAM's bandwidth that it can use. It runs nothing, and needs no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

from benchmarks import cards, nvrtc, sass
from benchmarks.cuda_cases import CASES, SIZES, Case, first_clip, of_norm, of_the_rest
from gradclip._backends.cupy.text import THREADS

ARCHS = (75, 80, 86, 89, 90, 120)
#: Counts are shown for this one.
SHOWN = 80
NOT_COUNTED = "not counted"
#: The ways through a loop: that of ordinary data has no name.
ORDER = ("", "dearest path", "every branch both ways")
UNSAID = """What such a model cannot say: how long loads take and whether enough of them are in flight to hide it (the
column "KB in flight" has what an SM holds); what caches give and take; how much of its bandwidth a DRAM gives at all
(about nine tenths); clocks under load, which are below the boost clocks taken here; the ends of grids, launches and the
host; leaves and chunks so short that the hot loop hardly turns; whether two kinds of instructions wait for each other.
It is a bound from above: no card does better, and one may do worse."""


def disassembler() -> Path | str:
    """Where `nvdisasm` lies in triton's wheel; else why there is none."""
    spec = importlib.util.find_spec("triton")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        found = Path(folder) / "backends" / "nvidia" / "bin" / "nvdisasm"
        if found.is_file():
            return found
    return "nvdisasm is not here: pip install 'gradclip[cuda-model]' (on Linux)"


def missing() -> str:
    """Why nothing can be counted here; empty if it can."""
    found = [one for one in (nvrtc.library(), disassembler()) if isinstance(one, str)]
    return "; ".join(found)


class Machine(NamedTuple):
    """A kernel as compiled for one architecture."""

    blocks: list[sass.Block]
    registers: int
    shared: int
    spilled: int  # bytes stored


@cache
def machine(kernel: str, source: str, arch: int, options: tuple[str, ...] = ()) -> Machine:
    code, log = nvrtc.compiled(source, f"sm_{arch}", "--ptxas-options=-v", *options)
    if not code:
        raise RuntimeError(log)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        run = subprocess.run([str(disassembler()), "-c", file.name], capture_output=True, text=True, check=True)

    def told(pattern: str) -> int:
        found = re.search(pattern, log)
        return int(found[1]) if found else 0

    shared, spilled = told(r"(\d+) bytes smem"), told(r"(\d+) bytes spill stores")
    return Machine(sass.blocks_of(run.stdout, kernel), told(r"Used (\d+) registers"), shared, spilled)


def cost(arch: int) -> sass.Cost:
    """By which paths are compared: the slots for instructions that pass while a pipe takes this one."""
    rates = cards.RATES[arch]
    slots = {kind: max(1.0, rates.issue / rate) for kind, rate in rates._asdict().items()}
    return lambda one: slots.get(one.kind, 1.0)


class Way(NamedTuple):
    """One way through a hot loop, for one element."""

    name: str
    counts: dict[str, float]
    in_flight: tuple[int, int]  # loads, bytes

    @property
    def instructions(self) -> float:
        return sum(self.counts.values())


class Counted(NamedTuple):
    case: Case
    arch: int
    machine: Machine
    threads: int  # that an SM holds
    ways: list[Way]  # the cheapest, the dearest, all of them


def counted(case: Case, arch: int) -> Counted:
    """A case's hot loop. Its turns that load most are taken."""
    found = machine(case.kernel, case.source(), arch, case.options)
    size, price = SIZES[case.kind] + case.beside, cost(arch)

    def spent(turn: sass.Turn) -> float:
        return sum(map(price, turn.instructions))

    loops = sass.loops(found.blocks)
    loading = [loop for loop in loops if loop.loads(found.blocks)]
    inner = [loop for loop in loading if not any(other.body < loop.body for other in loading)]
    if not inner:
        raise LookupError(f"{case.name}: {case.kernel} has no loop that loads")
    if case.by_element:
        inner = [loop for loop in inner if loop.widest(found.blocks) <= SIZES[case.kind]]
    most = max(loop.loads(found.blocks) for loop in inner)
    several = []
    for loop in (loop for loop in inner if loop.loads(found.blocks) == most):
        paths = sass.turns(found.blocks, loop, price, case.work)
        paths = {key: both for key, both in paths.items() if key[0] and _does(case, key, size)}
        if paths:
            loaded = max(key[0] for key in paths)
            ordinary = min((cheap for key, (cheap, _) in paths.items() if key[0] == loaded), key=spent)
            dear = sass.turns(found.blocks, loop, price)[loaded, 0][1]
            both = ordinary, dear, sass.everything(found.blocks, loop, loaded)
            several.append((spent(ordinary) / loaded, loaded, *both))
    if not several:
        raise LookupError(f"{case.name}: no path of the hot loop of {case.kernel} does the work that is looked for")
    _, loaded, *turns = min(several, key=lambda one: one[0])
    ways = [_way(name, turn, loaded / size) for name, turn in zip(ORDER, turns, strict=True)]
    held = cards.threads_per_sm(arch, found.registers, found.shared, THREADS)
    return Counted(case, arch, found, held, [way for i, way in enumerate(ways) if not i or way[1:] != ways[i - 1][1:]])


def _does(case: Case, key: tuple[int, int], size: int) -> bool:
    loaded, worked = key
    return not case.work or worked >= case.worked * (loaded // size)


def _way(name: str, turn: sass.Turn, elements: float) -> Way:
    counts: Counter[str] = turn.counts()
    return Way(name, {kind: n / elements for kind, n in counts.items()}, turn.in_flight())


def share(case: Case, card: cards.Card, way: Way) -> tuple[float, float]:
    return cards.shares(card, way.counts, case.passes * SIZES[case.kind])


HEAD = ["per element", "instructions", "FP64", "to and from 64 bits", "FP32, FP16", "integer, logic", "memory"]
HEAD += [
    "loads in flight",
    "registers",
    "threads an SM",
    "KB in flight an SM",
    "spilled",
    *(c.name for c in cards.CARDS),
]
#: The columns of the short table.
SHORT = [i for i, name in enumerate(HEAD) if i < 4 or name in {card.name for card in cards.CARDS}]


def rows(cases: Sequence[Case]) -> list[list[str]]:
    """The table: a row for each way through the hot loop of each case, or one that says why it was not counted."""

    def tried(one: tuple[Case, int]) -> Counted | str:
        try:
            return counted(*one)
        except LookupError as error:
            return str(error)

    needed = [(case, arch) for case in cases for arch in ARCHS]
    with ThreadPoolExecutor() as pool:
        found = dict(zip(needed, pool.map(tried, needed), strict=True))
    out: list[list[str]] = []
    for case in cases:
        several: dict[int, Counted] = {}
        for arch in ARCHS:
            one = found[case, arch]
            if isinstance(one, str):
                out.append([f"{NOT_COUNTED}, sm_{arch}: {one}", *[""] * (len(HEAD) - 1)])
                break
            several[arch] = one
        else:
            names = {way.name for one in several.values() for way in one.ways}
            out += [_row(case, several, name) for name in ORDER if name in names]
    return out


def _row(case: Case, several: dict[int, Counted], name: str) -> list[str]:
    one = several[SHOWN]
    way = _named(one, name)
    n = Counter(way.counts)
    numbers = way.instructions, n["fp64"], n["convert64"], n["fp32"], n["alu"] + n["mad"], n["memory"]
    loads, loaded = way.in_flight
    machine = [str(one.machine.registers), str(one.threads), f"{loaded * one.threads / 1024:.0f}"]
    return [
        f"{case.name}: {name}" if name else case.name,
        *(f"{x:.1f}".removesuffix(".0") for x in numbers),
        f"{loads}: {loaded} B",
        *machine,
        str(max(found.machine.spilled for found in several.values())),
        *(percent(*share(case, card, _named(several[card.arch], name))) for card in cards.CARDS),
    ]


def _named(one: Counted, name: str) -> Way:
    """The way of this name; where it is like the one before it, that."""
    return [way for way in one.ways if ORDER.index(way.name) <= ORDER.index(name)][-1]


def percent(low: float, high: float) -> str:
    low, high = (int(100 * x + 0.5) for x in (low, high))
    return str(low) if low == high else f"{low}-{high}"


def compile_seconds(arch: int) -> float:
    """NVRTC's time for all that a first clip needs, one after the other, in this process."""
    begun = time.perf_counter()
    for _, source, options in first_clip():
        if not nvrtc.compiled(source, f"sm_{arch}", *options)[0]:
            raise RuntimeError("a kernel does not compile")
    return time.perf_counter() - begun


def reachable() -> str:
    """How many programs there are, by norm; a norm of another p has as many as p = 3."""
    counts = {f"p = {p}" if p != "rms" else p: (of_norm(p, 1), of_norm(p, 6)) for p in (2.0, "rms", 1.0, math.inf, 3.0)}
    counts["for all norms"] = of_the_rest(1), of_the_rest(6)
    return ", ".join(f"{name} {len(one)} and {len(several)}" for name, (one, several) in counts.items())


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_model", description=__doc__)
    parser.add_argument("--markdown", action="store_true", help="the table in Markdown")
    parser.add_argument("--short", action="store_true", help="fewer columns")
    parser.add_argument("--only", metavar="TEXT", default="", help="the cases whose names hold this")
    asked = parser.parse_args(given)
    if missing():
        print(missing(), file=sys.stderr)
        return 1
    table = [HEAD, *rows([case for case in CASES if asked.only in case.name])]
    if asked.short:
        table = [[row[i] for i in SHORT] for row in table]
    if asked.markdown:
        lines = ["| " + " | ".join(row) + " |" for row in table]
        print("\n".join([lines[0], "| --- " + "| ---: " * (len(table[0]) - 1) + "|", *lines[1:]]))
    else:
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        for row in table:
            print("  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]))
    seconds = ", ".join(f"sm_{arch} {compile_seconds(arch):.2f} s" for arch in (75, 80, 90))
    print(f"\nCounts as compiled by NVRTC {nvrtc.version()} for sm_{SHOWN}; shares for each card's own architecture.")
    print(f"First clip at p = 2 of float32 leaves, {len(first_clip())} programs: {seconds}.")
    print("Programs that can be reached, by trees of one dtype and of any: " + reachable())
    print(UNSAID)
    return int(any(row[0].startswith(NOT_COUNTED) for row in table))


if __name__ == "__main__":
    sys.exit(main())

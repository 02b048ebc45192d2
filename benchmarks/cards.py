"""What NVIDIA publishes of its GPUs, and how long an SM takes by it. Every figure has its source beside it.

[guide] CUDA C++ Best Practices Guide (before 13.0: CUDA C++ Programming Guide), "Throughput of Native Arithmetic
    Instructions": results per clock and SM, by compute capability.
[limits] CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
[pipes] Nsight Compute, Profiling Guide, "Pipelines": ALU (logic, comparisons, integers but multiplications), FMA (FP32
    and integer multiplications), FP64, XU (special functions and conversions), LSU.
[A100] "A100 80GB Tensor Core GPU", datasheet (SXM: 2,039 GB/s), and "A100 Tensor Core GPU Architecture" (108 SMs,
    1,410 MHz).
[H100] "H100 Tensor Core GPU Architecture" v1.04 and datasheet (SXM5: 132 SMs; 1,980 MHz outside the tensor cores, that
    is 67 TFLOPS in FP32; 3,350 GB/s).
[4090] "Ada GPU Architecture" (128 SMs, 2,520 MHz, 1,008 GB/s, two FP64 units an SM).
[T4] "Turing GPU Architecture" and the T4's datasheet (40 SMs, 1,590 MHz, 320 GB/s, two FP64 units an SM).
[3090] "Ampere GA102 GPU Architecture" (82 SMs, 1,695 MHz, 936 GB/s, two FP64 units an SM).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Rates(NamedTuple):
    """What an SM does in a clock, in results (threads)."""

    fp32: int  # [guide] add, multiply, multiply-add; [pipes] integer multiplications share the pipe
    fp64: int  # [guide] the same in 64 bits
    convert64: int  # [guide] type conversions from and to 64-bit types
    convert: int  # [guide] all other type conversions; special functions alike
    mad: int  # [guide] 32-bit integer multiply, multiply-add
    alu: int  # [guide] 32-bit integer add, compare, shift, logic
    memory: int  # load/store units: figures of the SM in the architecture papers
    issue: int = 128  # four schedulers, one instruction of 32 threads each: the architecture papers


#: By compute capability.
RATES = {
    75: Rates(fp32=64, fp64=2, convert64=2, convert=16, mad=64, alu=64, memory=16),
    80: Rates(fp32=64, fp64=32, convert64=16, convert=16, mad=64, alu=64, memory=32),
    86: Rates(fp32=128, fp64=2, convert64=2, convert=16, mad=64, alu=64, memory=16),
    89: Rates(fp32=128, fp64=2, convert64=2, convert=16, mad=64, alu=64, memory=16),
    90: Rates(fp32=128, fp64=64, convert64=16, convert=16, mad=64, alu=64, memory=32),
    120: Rates(fp32=128, fp64=2, convert64=2, convert=16, mad=64, alu=64, memory=16),
}


class Limits(NamedTuple):
    """What an SM holds at once [limits]. Registers come to warps in lots of 256; 64 K of them are everywhere."""

    threads: int
    blocks: int
    shared: int  # bytes
    reserved: int  # bytes of them for each block


LIMITS = {
    75: Limits(1024, 16, 64 * 1024, 0),
    80: Limits(2048, 32, 164 * 1024, 1024),
    86: Limits(1536, 16, 100 * 1024, 1024),
    89: Limits(1536, 24, 100 * 1024, 1024),
    90: Limits(2048, 32, 228 * 1024, 1024),
    120: Limits(1536, 24, 100 * 1024, 1024),
}


class Card(NamedTuple):
    name: str
    arch: int
    sms: int
    clock: float  # boost, GHz
    bandwidth: float  # GB/s


CARDS = [
    Card("A100", 80, 108, 1.410, 2039),
    Card("H100", 90, 132, 1.980, 3350),
    Card("RTX 4090", 89, 128, 2.520, 1008),
    Card("T4", 75, 40, 1.590, 320),
    Card("RTX 3090", 86, 82, 1.695, 936),
]


def threads_per_sm(arch: int, registers: int, shared: int, threads: int) -> int:
    """How many threads of such blocks an SM holds."""
    limits, warps = LIMITS[arch], threads // 32
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // warps
    by_memory = limits.shared // (shared + limits.reserved) if shared + limits.reserved else limits.blocks
    return min(limits.threads // threads, limits.blocks, by_registers, by_memory) * threads


def clocks(arch: int, counts: Mapping[str, float]) -> tuple[float, float]:
    """Clocks of an SM for so many instructions of each class: where 64-bit conversions have units of their own, or not.

    A pipe that is fully busy is the least that it takes; that nothing waits is assumed.
    """
    rates = RATES[arch]
    n = {kind: counts.get(kind, 0) for kind in ("fp32", "fp64", "convert64", "convert", "mufu", "mad", "alu", "memory")}
    others = max(
        sum(counts.values()) / rates.issue,
        (n["fp32"] + n["mad"]) / rates.fp32,
        n["mad"] / rates.mad,
        n["alu"] / rates.alu,
        (n["convert"] + n["mufu"]) / rates.convert,
        n["memory"] / rates.memory,
    )
    doubles, conversions = n["fp64"] / rates.fp64, n["convert64"] / rates.convert64
    return max(others, doubles, conversions), max(others, doubles + conversions)


def shares(card: Card, counts: Mapping[str, float], traffic: float) -> tuple[float, float]:
    """The most of its DRAM's bandwidth that a card can use: the lower and the upper bound.

    `counts`: instructions for an element, of one thread; `traffic`: the bytes that it reads and writes.
    """
    own, shared = clocks(card.arch, counts)
    least = traffic / card.bandwidth  # of an element, in ns
    low, high = (least / (spent / card.sms / card.clock) for spent in (shared, own))
    return min(low, 1.0), min(high, 1.0)

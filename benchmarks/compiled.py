"""JAX programs, compiled by XLA for GPUs and TPUs that are not here, and what the compiler made of them.

Nothing is run, so nothing is timed but the compiler. Import this before JAX: it says that there is no device to ask.
Needs the extra `devices`: libtpu for TPUs; for GPUs JAX's CUDA plugins and NVIDIA's `ptxas`.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # no driver is asked for its version
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # nor a cloud for the machine's name
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from benchmarks.hlo import Instruction, computations

Program = dict[str, list[Instruction]]


@dataclass(frozen=True)
class Gpu:
    """What XLA's cost model asks of a GPU: figures of NVIDIA's datasheets and tables of compute capabilities."""

    capability: tuple[int, int]
    multiprocessors: int
    float32_lanes: int  # of a multiprocessor
    bytes_a_second: float
    l2_cache: int
    gigahertz: float
    memory: int
    shared_memory: int  # of a multiprocessor


GPUS = {
    "A100": Gpu((8, 0), 108, 64, 2.039e12, 40 << 20, 1.41, 80 << 30, 164 << 10),
    "H100": Gpu((9, 0), 132, 128, 3.352e12, 50 << 20, 1.98, 80 << 30, 228 << 10),
}
TPUS = {"TPU v5e": "v5e:2x2x1"}
DEVICES = (*GPUS, *TPUS)


@cache
def device(name: str) -> Any:
    """A device that is described, not there."""
    if name in TPUS:
        return topologies.get_topology_desc(platform="tpu", topology_name=TPUS[name]).devices[0]
    gpu = GPUS[name]
    fields: dict[str, Any] = {
        "threads_per_warp": 32,
        "threads_per_block_limit": 1024,
        "threads_per_core_limit": 2048,
        "registers_per_block_limit": 65536,
        "registers_per_core_limit": 65536,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "core_count": gpu.multiprocessors,
        "fpus_per_core": gpu.float32_lanes,
        "memory_bandwidth": int(gpu.bytes_a_second),
        "l2_cache_size": gpu.l2_cache,
        "clock_rate_ghz": gpu.gigahertz,
        "device_memory_size": gpu.memory,
        "shared_memory_per_core": gpu.shared_memory,
        "shared_memory_per_block": 48 << 10,
        "shared_memory_per_block_optin": gpu.shared_memory - 1024,
    }
    major, minor = gpu.capability
    described = " ".join(f"{key}: {value}" for key, value in fields.items())
    config = f"""
        gpu_device_info {{ {described} cuda_compute_capability {{ major: {major} minor: {minor} }} }}
        platform_name: "CUDA" device_description_str: "{name}"
        runtime_version {{ major: 12 minor: 9 }} dnn_version_info {{ major: 9 minor: 8 }}
    """
    return topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=config, topology="1x1x1"
    ).devices[0]


@dataclass(frozen=True)
class Counts:
    """What a program does. Bytes, and seconds of this machine to trace, lower and compile."""

    kernels: int
    traffic: float
    temporary: int
    seconds: float


def compiled(function: Callable[..., Any], shapes: Any, name: str) -> Counts:
    """The counts of `function`, jitted for a tree of `jax.ShapeDtypeStruct` on that device."""
    place, platform = SingleDeviceSharding(device(name)), "tpu" if name in TPUS else "cuda"
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    began = time.perf_counter()
    program = jax.jit(function).trace(*given).lower(lowering_platforms=(platform,)).compile()
    seconds = time.perf_counter() - began
    text = computations(program.as_text())
    if platform == "tpu":  # whose own count knows its memories; of a condition it takes the dearest branch
        cost = program.cost_analysis()
        total = (cost[0] if isinstance(cost, list) else cost)["bytes accessed"]
        moved = total - sum(max(each) - min(each) for each in branches(text))
    else:
        moved = traffic(text, "ENTRY")
    memory = program.memory_analysis()
    return Counts(kernels(text["ENTRY"]), moved, memory.temp_size_in_bytes, seconds)


#: These do no work; and of what is started and waited for, the start is counted.
_FREE = re.compile(
    r"parameter|constant|tuple|get-tuple-element|bitcast|after-all|partition-id|replica-id|opt-barrier|.*-done"
)


def kernels(body: list[Instruction]) -> int:
    """On a GPU: launches. A condition counts as one."""
    return sum(_FREE.fullmatch(x.operation) is None for x in body)


def traffic(program: Program, body: str) -> int:
    """Bytes that the instructions of a computation read and write; of a condition, on its cheapest branch."""
    sizes, total = {x.name: x.bytes for x in program[body]}, 0
    for x in program[body]:
        if x.operation == "conditional":
            total += min(traffic(program, branch) for branch in _called(x))
        elif _FREE.fullmatch(x.operation) is None:
            total += x.bytes + sum(_read(program, x, i, sizes.get(name, 0)) for i, name in enumerate(x.operands))
    return total


def branches(program: Program) -> list[list[int]]:
    """What the branches of each condition read and write."""
    return [
        [traffic(program, branch) for branch in _called(x)]
        for body in program.values()
        for x in body
        if x.operation == "conditional"
    ]


def _called(x: Instruction) -> list[str]:
    """The computations that an instruction names."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", x.text)
    found = listed[1].split(",") if listed else re.findall(r"(?:calls|\w+_computation)=%?([\w.\-]+)", x.text)
    return [name.strip().lstrip("%") for name in found]


def _read(program: Program, x: Instruction, i: int, size: int) -> int:
    """Bytes of its i-th operand that an instruction reads: of one that a fusion only cuts pieces from, the pieces."""
    if x.operation != "fusion":
        return size
    body = program[_called(x)[0]]
    parameter = next(y.name for y in body if y.operation == "parameter" and f"parameter({i})" in y.text)
    users = [y for y in body if parameter in y.operands]
    if users and all(y.operation in ("slice", "dynamic-slice") and y.operands[0] == parameter for y in users):
        return min(size, sum(y.bytes for y in users))
    return size

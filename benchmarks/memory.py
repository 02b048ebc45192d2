"""The most memory that a clip takes beyond its gradients, in a process of its own.

Twice: as NumPy reports it to `tracemalloc`, which is exact and sees array memory only; and as the peak of the resident
size, which sees everything that was touched (thread stacks, caches of shapes) in pages. Linux resets that peak on
request (proc(5), clear_refs); elsewhere the second is not measured. Of torch tensors the first
sees what NumPy takes, not what torch does.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gradclip
from benchmarks.machine import available_memory
from benchmarks.results import Section
from benchmarks.settings import Settings
from benchmarks.trees import MODELS, Array, gradients

RESET = Path("/proc/self/clear_refs")


def traced_peak(call: Callable[[], object]) -> int:
    """Bytes beyond those before the call, at most."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        kept = call()
        _, peak = tracemalloc.get_traced_memory()
        del kept
    finally:
        tracemalloc.stop()
    return peak - before


def _resident(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return 1024 * int(found[1])


def resident_peak(call: Callable[[], object]) -> int | None:
    """The same of resident memory; None where the peak cannot be reset."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else the call may reuse what was freed, and its peak looks lower
        RESET.write_text("5")
        before = _resident("VmRSS")
    except (OSError, AttributeError):  # no Linux, or no glibc
        return None
    kept = call()
    peak = _resident("VmHWM")
    del kept
    return max(0, peak - before)


def run(settings: Settings) -> Section:
    section = Section("memory")
    name = max(settings.trees, key=lambda tree: MODELS[tree].parameters)
    if name != "gpt2":
        section.not_run.append(f"memory for GPT-2: {MODELS[name].name} in its place")
    if 3 * 4 * MODELS[name].parameters > available_memory():
        section.not_run.append(f"memory for {MODELS[name].name}: the memory is too small")
        return section
    for dtype in ("float32", "float16"):
        measure(section, name, dtype)
    if importlib.util.find_spec("torch") is None:
        section.not_run.append("memory of torch tensors: torch is not installed")
        return section
    for dtype in ("float32", "bfloat16", "float16"):
        measure(section, name, dtype, "--tensors")
    return section


def measure(section: Section, name: str, dtype: str, *options: str) -> None:
    """What a child finds: of NumPy arrays, or of tensors where `options` say so."""
    kind = "tensors, " if options else ""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", name, dtype, *options],
        capture_output=True,
        text=True,
        env=dict(os.environ),
    )
    if done.returncode:
        section.not_run.append(f"memory, {kind}{dtype}: {done.stderr.strip().splitlines()[-1]}")
        return
    found = json.loads(done.stdout.splitlines()[-1])
    section.evidence[f"{kind}{dtype}"] = found
    for key, verb, output in [
        ("in-place memory", "in place", 0),
        ("functional memory", "functional", found["output"]),
    ]:
        for how, peak in found[verb].items():
            if peak is None:
                section.not_run.append(f"resident size, {kind}{dtype}: this system does not reset its peak")
                continue
            seen = 0 if kind and how == "tracemalloc" else output  # torch makes the outputs
            section.add(key, (peak - seen) / 1e6, tree=f"{MODELS[name].name}, {kind}{how}", dtype=dtype)


def peaks(tree: Mapping[str, Any]) -> dict[str, dict[str, int | None]]:
    """Bytes that both forms take at most, by what sees them."""
    bounds = iter([4.0, 2.0, 1.0, 0.5])  # ever lower: a gradient is not clipped twice to one bound
    calls = {
        "functional": lambda: gradclip.clip_grad_norm(tree, next(bounds)),
        "in place": lambda: gradclip.clip_grad_norm_(tree, next(bounds)),
    }
    # The resident size first: what a first call on these shapes keeps is seen by it.
    return {name: {"resident": resident_peak(call), "tracemalloc": traced_peak(call)} for name, call in calls.items()}


def tensors(tree: Mapping[str, Array], dtype: str) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(leaf).to(getattr(torch, dtype)) for name, leaf in tree.items()}


def main() -> None:
    """In the child: peaks of both forms as JSON, in bytes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("tree")
    parser.add_argument("dtype")
    parser.add_argument("--tensors", action="store_true")
    asked = parser.parse_args()
    shapes, warm = MODELS[asked.tree].shapes, {"leaf": (1 << 20,)}  # what is imported or started once is not a clip's
    tree: dict[str, Any]
    small: dict[str, Any]
    if asked.tensors:
        tree, small = tensors(gradients(shapes), asked.dtype), tensors(gradients(warm), asked.dtype)
    else:
        tree, small = gradients(shapes, asked.dtype), gradients(warm, asked.dtype)
    gradclip.clip_grad_norm_(small, 1.0)
    gradclip.clip_grad_norm(small, 0.5)
    print(json.dumps({**peaks(tree), "output": sum(leaf.nbytes for leaf in tree.values())}))


if __name__ == "__main__":
    main()

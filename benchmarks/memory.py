"""The most memory that a clip takes beyond its gradients, in a process of its own.

Twice: as NumPy reports it to `tracemalloc`, which is exact and sees array memory only; and as the peak of the resident
size, which sees everything that was touched (thread stacks, caches of shapes) in pages. Linux resets that peak on
request (proc(5), clear_refs); elsewhere the second is not measured.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from benchmarks.machine import available_memory
from benchmarks.results import Section
from benchmarks.settings import Settings
from benchmarks.trees import MODELS, gradients

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
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.memory", name, dtype],
            capture_output=True,
            text=True,
            env=dict(os.environ),
        )
        if done.returncode:
            section.not_run.append(f"memory, {dtype}: {done.stderr.strip().splitlines()[-1]}")
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        section.evidence[dtype] = found
        for key, verb, output in [
            ("in-place memory", "in place", 0),
            ("functional memory", "functional", found["output"]),
        ]:
            for how in ("tracemalloc", "resident"):
                if found[verb][how] is None:
                    section.not_run.append(f"resident size, {dtype}: this system does not reset its peak")
                else:
                    extra = (found[verb][how] - output) / 1e6
                    section.add(key, extra, tree=f"{MODELS[name].name}, {how}", dtype=dtype)
    return section


def main() -> None:
    """In the child: peaks of both forms as JSON, in bytes."""
    import gradclip

    parser = argparse.ArgumentParser()
    parser.add_argument("tree")
    parser.add_argument("dtype")
    asked = parser.parse_args()
    tree = gradients(MODELS[asked.tree].shapes, asked.dtype)
    warm = gradients({"leaf": (1 << 20,)}, asked.dtype)  # what is imported or started once is not a clip's
    gradclip.clip_grad_norm_(warm, 1.0)
    gradclip.clip_grad_norm(warm, 0.5)
    bounds = iter([4.0, 2.0, 1.0, 0.5])  # ever lower: a gradient is not clipped twice to one bound
    calls = {
        "functional": lambda: gradclip.clip_grad_norm(tree, next(bounds)),
        "in place": lambda: gradclip.clip_grad_norm_(tree, next(bounds)),
    }
    # The resident size first: what a first call on these shapes keeps is seen by it.
    peaks = {name: {"resident": resident_peak(call), "tracemalloc": traced_peak(call)} for name, call in calls.items()}
    print(json.dumps({**peaks, "output": sum(leaf.nbytes for leaf in tree.values())}))


if __name__ == "__main__":
    main()

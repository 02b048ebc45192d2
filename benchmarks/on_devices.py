"""JAX on GPUs and TPUs that are not here: what XLA makes of a clip for them. By counting; nothing is run.

Kernels, bytes that they read and write (3 times the gradients' is the floor of a clip: read for the norm, read and
written to be scaled), temporary memory, and the compiler's time, which is this machine's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from typing import Any

from benchmarks.results import Section
from benchmarks.settings import Settings


def run(settings: Settings) -> Section:
    section = Section("devices")
    chosen = [tree for tree in settings.trees if tree != "resnet50"]
    command = [sys.executable, "-m", "benchmarks.devices_report", "--trees", *chosen]
    outer = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(
        command + ["--short"] * settings.short, capture_output=True, text=True, env=outer, check=False
    )
    if done.returncode:
        section.not_run.append(f"JAX for other devices: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        return section
    found = json.loads(done.stdout.splitlines()[-1])
    section.evidence = found
    section.notes += table(found["lines"])
    section.not_run += [f"JAX for {device}: {reason}" for device, reason in found["absent"].items()]
    for beside, line in pairwise(found["lines"]):
        if (beside["who"], line["who"]) != ("optax", "gradclip"):  # the other clips stand in the table
            continue
        where: dict[str, Any] = {"tree": f"{line['device']}, {line['what']}", "dtype": line["dtype"]}
        section.add("devices, kernels", line["kernels"] / beside["kernels"], **where)
        section.add("devices, traffic", line["traffic"] / beside["traffic"], **where)
        section.add("devices, compile", line["seconds"] / beside["seconds"], **where)
    return section


def table(lines: list[dict[str, Any]]) -> list[str]:
    """One row for each program."""
    head = ("as compiled for", "what", "dtype", "whose", "kernels", "traffic", "temporary", "compile")
    rows = [head] + [
        (
            *(line[key] for key in ("device", "what", "dtype", "who")),
            f"{line['kernels']:,}",
            f"{line['traffic']:.2f}",
            f"{line['temporary']:.4f}",
            f"{line['seconds']:.2f} s",
        )
        for line in lines
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return ["  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]

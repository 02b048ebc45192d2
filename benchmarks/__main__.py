"""Runs the benchmarks on what is installed: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.pinning import available, pinned

#: What `--only` chooses from, and the module of each.
SECTIONS = {
    "numpy": "on_numpy",
    "narrow": "narrow",
    "family": "family",
    "rules": "rules",
    "accuracy": "accuracy",
    "threads": "threads",
    "memory": "memory",
    "growth": "growth",
    "torch": "on_torch",
    "jax": "on_jax",
    "step": "training_step",
    "devices": "on_devices",
    "gpu": "on_gpu",
}
TREES = ("mlp", "small", "resnet50", "gpt2")


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time gradclip beside floors and peers; print a table, write results.json and chart.png.",
    )
    parser.add_argument("--short", action="store_true", help="about a minute: smaller trees, fewer rounds")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--trees", nargs="+", choices=TREES, metavar="TREE", help=", ".join(TREES))
    parser.add_argument("--threads", type=int, default=available(), help="limit for gradclip and torch; default: all")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"), help="folder for the files")
    asked = parser.parse_args(given)
    if asked.threads < 1:
        parser.error("--threads must be 1 or more")
    return asked


def main(given: list[str] | None = None) -> int:
    asked = arguments(given)
    os.environ.update(pinned(asked.threads))  # before NumPy is there
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    from benchmarks import machine, progress, report
    from benchmarks.results import Section
    from benchmarks.settings import Settings
    from benchmarks.timing import Effort

    trees = tuple(asked.trees or (tree for tree in TREES if not (asked.short and tree == "gpt2")))
    effort = Effort(0.8, 3, 51) if asked.short else Effort()
    settings = Settings(asked.short, asked.threads, trees, effort)
    begun, sections = time.perf_counter(), []
    for name in asked.only or SECTIONS:
        print(f"[{time.perf_counter() - begun:4.0f} s] {name}", file=sys.stderr, flush=True)
        try:
            module = importlib.import_module(f"benchmarks.{SECTIONS[name]}")
            sections.append(module.run(settings))
        except ImportError as error:
            if (error.name or "").split(".")[0] in ("benchmarks", "gradclip"):
                raise
            sections.append(Section(name, not_run=[f"{name}: {error}"]))
    last = Section("files")
    if asked.short and not asked.trees:
        last.not_run.append("GPT-2: not in short mode")
    if not progress.SHOWN:
        last.not_run.append("progress bars: tqdm is not installed")

    described = machine.described(asked.threads)
    data = report.as_data(described, {**asdict(settings), "seconds": time.perf_counter() - begun}, sections)
    asked.out.mkdir(parents=True, exist_ok=True)
    report.write(data, asked.out / "results.json")
    written = ["results.json"]
    try:
        from benchmarks import chart

        if chart.draw(data, asked.out / "chart.png"):
            written.append("chart.png")
    except ImportError as error:
        last.not_run.append(f"the chart: {error}")
    print(report.full_text(described, [*sections, last]))
    print(f"\n{time.perf_counter() - begun:.0f} s; written to {asked.out}: {', '.join(written)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

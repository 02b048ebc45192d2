"""What threads give: the same contest for each limit, in a process of its own: `GRADCLIP_NUM_THREADS` is read once."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict

from benchmarks.pinning import limits, pinned
from benchmarks.results import Section, Table
from benchmarks.settings import Settings
from benchmarks.timing import Effort, compete
from benchmarks.trees import MODELS, gradients


def run(settings: Settings) -> Section:
    section = Section("threads")
    counts = limits(settings.threads)
    if counts == [1]:
        section.not_run.append("threads: one core, or --threads 1")
        return section
    names = [name for name in settings.trees if name in ("mlp", "resnet50")] or list(settings.trees[:1])
    for name in names:
        for count in counts:
            command = [sys.executable, "-m", "benchmarks.threads", name, str(count), str(settings.effort.seconds / 2)]
            done = subprocess.run(command, env={**os.environ, **pinned(count)}, capture_output=True, text=True)
            if done.returncode:
                section.not_run.append(f"threads, {name}: {done.stderr.strip().splitlines()[-1]}")
                continue
            ratio = json.loads(done.stdout.splitlines()[-1])
            section.evidence[f"{name}, {count}"] = ratio
            what = f"{MODELS[name].name}, limit {count}: clip_grad_norm_ / (read + in-place multiply)"
            section.notes.append(f"{what} = {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})")
        one, most = (section.evidence.get(f"{name}, {count}") for count in (1, counts[-1]))
        if one and most:
            section.add("scaling", most["median"] / one["median"], tree=f"{MODELS[name].name}, N = {counts[-1]}")
    return section


def main() -> None:
    """In the child: one contest, its ratio as JSON."""
    from benchmarks.on_numpy import CLIP, IN_PLACE, Gradients, floors, ours

    parser = argparse.ArgumentParser()
    parser.add_argument("tree")
    parser.add_argument("threads", type=int)
    parser.add_argument("seconds", type=float)
    asked = parser.parse_args()
    g = Gradients(gradients(MODELS[asked.tree].shapes))
    contenders = {IN_PLACE: floors(g)[IN_PLACE], CLIP: ours(g)[CLIP]}
    title = f"NumPy, {asked.threads} threads, {MODELS[asked.tree].name}"
    timings = compete(title, contenders, Effort(asked.seconds), prepare=lambda name: g.restore())
    table = Table.of(timings, IN_PLACE, title=title, tree=asked.tree, dtype="float32")
    print(json.dumps({**asdict(timings.ratio(CLIP, IN_PLACE)), "us": table.rows[1].median_us}))


if __name__ == "__main__":
    main()

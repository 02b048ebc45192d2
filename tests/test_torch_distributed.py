"""The recipes of docs/sharding.md for `torch.distributed`, run with gloo by two processes, one without leaves."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import blocks

import gradclip

PAGE = Path(__file__).parents[1] / "docs" / "sharding.md"
WORKER = Path(__file__).parent / "ranks" / "torch_gloo.py"


@pytest.mark.full
@pytest.mark.library("torch")
def test_recipes_with_two_processes(tmp_path):
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    code = [b.body for b in blocks(PAGE.read_text(encoding="utf-8")) if b.language == "python"]
    files = []
    for mark in ("dist.all_reduce(", ".to_local()"):
        (body,) = (body for body in code if mark in body)
        files.append(tmp_path / f"recipe{len(files)}.py")
        files[-1].write_text(body, encoding="utf-8")
    here = str(Path(gradclip.__file__).parents[1])
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), tmp_path / "store", *files],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        for rank in range(2)
    ]
    try:
        ends = [rank.communicate(timeout=180) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()  # what waits for the other
    for rank, (out, err) in enumerate(ends):
        assert ranks[rank].returncode == 0, err
        assert out == f"rank {rank} is done\n"

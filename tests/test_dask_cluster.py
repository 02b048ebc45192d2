"""Dask: gradients as dask arrays on a cluster of worker processes, clipped lazily, in one graph."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gradclip

SCRIPT = Path(__file__).parent / "ranks" / "dask_cluster.py"

MISSING = [name for name in ("dask", "distributed") if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.full,
    pytest.mark.library("dask"),
    pytest.mark.skipif(bool(MISSING), reason=f"Dask's cluster: not installed: {', '.join(MISSING)}"),
]


def test_local_cluster() -> None:
    """In a process of its own: a cluster leaves threads and event loops behind."""
    here = str(Path(gradclip.__file__).resolve().parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in (here, os.environ.get("PYTHONPATH")) if p)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], env=env, capture_output=True, encoding="utf-8", timeout=180, check=False
    )
    assert done.stdout.splitlines() == [
        "lazy: no task ran before compute",
        "one compute, one graph: norm and 3 leaves",
        "policies: so",
    ], done.stderr[-4000:]
    assert done.returncode == 0, done.stderr[-4000:]

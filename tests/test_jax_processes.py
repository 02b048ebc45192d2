"""JAX in two processes with two CPU devices each, over loopback: one norm, the same on all devices."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import gradclip

pytest.importorskip("jax")
pytestmark = [pytest.mark.library("jax"), pytest.mark.full]

SCRIPT = Path(__file__).parent / "ranks" / "jax_processes.py"
CASES = ("under_jit", "in_shard_map", "errors_on_all", "drift")


@pytest.fixture(scope="module")
def outputs() -> list[str]:
    """What the two processes say."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = str(Path(gradclip.__file__).resolve().parents[1])
    env = {
        **{k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
        "PYTHONPATH": os.pathsep.join(p for p in (here, os.environ.get("PYTHONPATH")) if p),
        "JAX_PLATFORMS": "cpu",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(i), str(port)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )
        for i in range(2)
    ]
    try:
        return [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("case", CASES)
def test_two_processes(outputs: list[str], case: str) -> None:
    for i, text in enumerate(outputs):
        assert f"process {i}: {case} is so" in text, text[-4000:]

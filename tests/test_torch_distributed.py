"""`torch.distributed`: real ranks run the cases of tests/ranks/torch_gloo.py, and FSDP's recipes of the documents."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_docs import blocks

import gradclip

PAGE = Path(__file__).parents[1] / "docs" / "sharding.md"
WORKER = Path(__file__).parent / "ranks" / "torch_gloo.py"
RECIPES = {"fsdp1": "over(fsdp.process_group)", "fsdp2": ".to_local()"}
pytestmark = [
    pytest.mark.library("torch"),
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed"),
]

QUICK = (
    "family",
    "no_leaves",
    "dtypes",
    "groups",
    "policies",
    "disagreement",
    "communicators",
    "partials",
    "on_devices",
)
FULL = ("fsdp1", "fsdp2", "dtensors")


def reports(folder: Path, cases: tuple[str, ...], n: int = 2) -> dict[str, str]:
    """Per case, what went wrong. One launch runs all cases; after one that fails, the rest is launched anew."""
    for name, mark in RECIPES.items():
        (body,) = (
            b.body for b in blocks(PAGE.read_text(encoding="utf-8")) if b.language == "python" and mark in b.body
        )
        (folder / f"{name}.py").write_text(body, encoding="utf-8")
    wrong, left = {}, list(cases)
    while left:
        said, errors = together(folder, left, n)
        while left and {f"rank {rank}: {left[0]} is so" for rank in range(n)} <= said:
            wrong[left.pop(0)] = ""
        if left:
            wrong[left.pop(0)] = errors or "it ended early, without a word"
    return wrong


def together(folder: Path, cases: list[str], n: int) -> tuple[set[str], str]:
    """The lines that n ranks print, and the errors of the first that fails."""
    (folder / "store").unlink(missing_ok=True)
    here = str(Path(gradclip.__file__).parents[1])
    path = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    # torch 2.5 leaves a folder behind, and warns of meshes on the CPU.
    strict = ["-W", "error", "-W", "ignore::ResourceWarning", "-W", "ignore:DTensor random"]
    ranks = [
        subprocess.Popen(
            [sys.executable, *strict, WORKER, str(rank), str(n), folder, *cases],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        for rank in range(n)
    ]
    try:
        ends = [rank.communicate(timeout=180) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()  # what waits for the others
    errors = [err[-4000:] for rank, (_, err) in zip(ranks, ends, strict=True) if rank.returncode]
    return {line for out, _ in ends for line in out.splitlines()}, "\n".join(errors)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return reports(tmp_path_factory.mktemp("quick"), QUICK)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return reports(tmp_path_factory.mktemp("full"), FULL)


@pytest.mark.parametrize("case", QUICK)
def test_two_ranks(quick: dict[str, str], case: str) -> None:
    assert quick[case] == ""


@pytest.mark.full
@pytest.mark.parametrize("case", FULL)
def test_two_ranks_with_sharded_modules(full: dict[str, str], case: str) -> None:
    assert full[case] == ""


@pytest.mark.full
def test_four_ranks(tmp_path: Path) -> None:
    assert reports(tmp_path, ("hybrid",), 4) == {"hybrid": ""}


def test_no_process_group_yet() -> None:
    with pytest.raises(RuntimeError, match=r"no process group yet: call torch\.distributed\.init_process_group first"):
        gradclip.distributed.torch()


def test_a_raw_all_reduce_is_told_what_to_pass() -> None:
    dist = pytest.importorskip("torch.distributed")
    for raw in (dist.all_reduce, functools.partial(dist.all_reduce, group=None)):
        with pytest.raises(TypeError, match=r"all_reduce must be .*all_reduce.*: pass gradclip\.distributed\.torch\(g"):
            gradclip.global_norm([np.ones(2)], all_reduce=raw)


@pytest.mark.parametrize(
    ("config", "device"),
    [
        ("cpu:gloo,cuda:gloo", "cpu"),
        ("cpu:gloo", "cpu"),
        ("cpu:mpi,cuda:mpi", "cpu"),
        ("cuda:nccl", "cuda"),
        ("cpu:gloo,cuda:nccl", "cuda"),
        ("xpu:xccl", "xpu"),
    ],
)
def test_where_a_group_joins(config: str, device: str) -> None:
    from gradclip.distributed._torch import _device

    assert _device(config) == device

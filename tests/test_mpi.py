"""MPI: four real ranks run the cases of tests/ranks/mpi.py, one norm and one factor for all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import MISSING, ranks

SCRIPT = Path(__file__).parent / "ranks" / "mpi.py"
pytestmark = [
    pytest.mark.full,
    pytest.mark.library("numpy"),
    pytest.mark.skipif(bool(MISSING), reason=f"MPI: not installed: {', '.join(MISSING)}"),
]

CASES = (
    "groups",
    "family",
    "norms",
    "extremes",
    "boundary",
    "policies",
    "disagreement",
    "communicators",
    "one_shot",
    "drift",
    "two_communicators",
    "expert_groups",
    "disjoint_parts",
)


def said(case: str, n: int = 4) -> set[str]:
    return {f"rank {rank}: {case} is so" for rank in range(n)}


@pytest.fixture(scope="module")
def reports() -> dict[str, str]:
    """Per case, what went wrong. One launch runs all cases; after one that fails, the rest is launched anew."""
    wrong, left = {}, list(CASES)
    while left:
        done = ranks(4, "-m", "mpi4py", str(SCRIPT), *left)
        lines = set(done.stdout.splitlines())
        while left and said(left[0]) <= lines:
            wrong[left.pop(0)] = ""
        if left:
            wrong[left.pop(0)] = done.stderr[-4000:] or f"exit code {done.returncode}"
    return wrong


@pytest.mark.parametrize("case", CASES)
def test_four_ranks(reports: dict[str, str], case: str) -> None:
    assert reports[case] == ""


def test_one_and_three_ranks() -> None:
    for n in (1, 3):
        done = ranks(n, "-m", "mpi4py", str(SCRIPT), "norms", "drift")
        assert said("norms", n) | said("drift", n) <= set(done.stdout.splitlines()), done.stderr


@pytest.mark.library("jax")
def test_jax_arrays_outside_jit() -> None:
    pytest.importorskip("jax")
    done = ranks(2, "-m", "mpi4py", str(SCRIPT), "jax_arrays")
    assert said("jax_arrays", 2) <= set(done.stdout.splitlines()), done.stderr


def test_a_rank_that_dies_ends_all() -> None:
    done = ranks(4, str(SCRIPT), "dies", timeout=60)
    assert done.returncode != 0
    assert "clipped to" not in done.stdout


def test_a_rank_that_raises_ends_all() -> None:
    done = ranks(4, "-m", "mpi4py", str(SCRIPT), "raises", timeout=60)
    assert done.returncode != 0
    assert "clipped to" not in done.stdout
    assert "LeafError: grads[0] is an array of dtype int64" in done.stderr

"""Limits on threads, set before NumPy is imported: a BLAS reads its own once."""

from __future__ import annotations

import os

#: The environment variable by which gradclip's pool is limited.
VARIABLE = "GRADCLIP_NUM_THREADS"

WAITING = "OMP_WAIT_POLICY"


def available() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pinned(threads: int) -> dict[str, str]:
    """The environment in which the floors run on one thread, and gradclip on at most `threads`.

    OpenMP's threads sleep while they wait, unless the user has said how: torch's team would go on spinning after its
    own turn, on a core that the next contender needs. On a busy machine of two cores spinning made torch itself slower
    too: between 13 and 670 ms for 161 leaves of 160,000 elements, against 13 ms.
    """
    one = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return one | {WAITING: os.environ.get(WAITING, "PASSIVE"), VARIABLE: str(threads)}


def limits(most: int) -> list[int]:
    """1, 2, 4, ..., and `most`."""
    return sorted({most, *(1 << i for i in range(most.bit_length()) if 1 << i <= most)})

"""Limits on threads, set before NumPy is imported: a BLAS reads its own once."""

from __future__ import annotations

import os

#: The environment variable by which gradclip's pool is limited.
VARIABLE = "GRADCLIP_NUM_THREADS"


def available() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pinned(threads: int) -> dict[str, str]:
    """The environment in which the floors run on one thread, and gradclip on at most `threads`."""
    return {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", VARIABLE: str(threads)}


def limits(most: int) -> list[int]:
    """1, 2, 4, ..., and `most`."""
    return sorted({most, *(1 << i for i in range(most.bit_length()) if 1 << i <= most)})

"""A few threads for work that waits for memory: NumPy's loops release the interpreter, so two of them run at once."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import copy_context
from functools import lru_cache
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

#: More threads than this are taken only if asked for: a few cores use up what memory gives.
_ENOUGH = 8

_asked: int | None = None


def set_num_threads(limit: int | None) -> None:
    """Let at most `limit` threads work on NumPy gradients, and measure torch's on the CPU, at once; None: the default.

    Parameters
    ----------
    limit : int or None
        At least 1, which means no threads but the caller's own. The default is the environment variable
        ``GRADCLIP_NUM_THREADS``, read at each call, or else the number of cores of this process, at most 8.

    Raises
    ------
    ValueError, TypeError
        If `limit` is less than 1, or no int.

    Notes
    -----
    The result does not depend on the number of threads, not in one bit. The caller works alone on trees of less than
    2**20 elements, on norms with float16 or bfloat16 leaves or p other than 2, and on trees with float16 leaves of
    which no 2**17 elements share a factor.
    Norms of plain torch tensors on the CPU are measured by these threads, products are made by torch's, which have a
    limit of their own (`torch.set_num_threads`). JAX and CuPy use other threads.

    Examples
    --------
    >>> set_num_threads(1)
    >>> set_num_threads(None)
    """
    global _asked
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool)):
        raise TypeError(f"limit must be an int or None, got {limit!r} of type {type(limit).__name__}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit!r}")
    _asked = limit


def num_threads() -> int:
    """How many threads may work at once, the caller's among them."""
    return _asked or _default(os.environ.get("GRADCLIP_NUM_THREADS", "").strip())


@lru_cache(1)
def _default(told: str) -> int:
    """What the environment variable says, or the cores."""
    if told:
        if not told.isdecimal() or int(told) < 1:
            raise ValueError(f"the environment variable GRADCLIP_NUM_THREADS must be a number >= 1, got {told!r}")
        return int(told)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _ENOUGH)


@lru_cache(1)
def _pool(n: int) -> Any:
    """So many threads, made when they are first needed."""
    from concurrent.futures import ThreadPoolExecutor  # 10 ms, which `import gradclip` need not take

    return ThreadPoolExecutor(n, thread_name_prefix="gradclip")


if hasattr(os, "register_at_fork"):  # the child has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


def each(f: Callable[[T], R], jobs: Sequence[T], threads: int) -> list[R]:
    """`[f(job) for job in jobs]`, by so many threads. The caller works, too."""
    threads = min(threads, len(jobs))
    if threads <= 1:
        return [f(job) for job in jobs]
    todo = deque([*enumerate(jobs), *[None] * threads])  # each thread stops at a None
    out: list[R | None] = [None] * len(jobs)

    def work() -> None:
        for i, job in iter(todo.popleft, None):
            out[i] = f(job)

    try:  # with the caller's context: NumPy keeps its error state there
        pool = _pool(max(1, num_threads() - 1))
        others = [pool.submit(copy_context().run, work) for _ in range(threads - 1)]
    except RuntimeError:  # the interpreter is shutting down
        others = []
    work()
    for other in others:
        other.result()
    return out  # type: ignore[return-value]

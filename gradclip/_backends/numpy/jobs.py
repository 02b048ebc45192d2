"""Jobs for threads, each as much as one should take at once: of leaves of one group each, strung together or cut."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import attrgetter
from typing import Any, TypeVar

from gradclip._backends.numpy.loops import blocks, padded, squares, squares_of_each, strung
from gradclip._backends.numpy.sixteen import CHUNK
from gradclip._dtypes import dtype_names
from gradclip._groups import Groups
from gradclip._threads import each, num_threads
from gradclip._types import Array

T = TypeVar("T")
R = TypeVar("R")

#: What one thread takes at once, in elements. A second one pays for no fewer.
BLOCK = 1 << 20

#: Leaves up to here are strung together, so that a norm costs one pass of 0.1 us an element and not 2 us a leaf.
_SMALL = 1 << 13
_LITTLE = padded(_SMALL)

_dtype, _size = attrgetter("dtype"), attrgetter("size")


class Leaves(list[Any]):
    """NumPy leaves, and what is asked of them again and again in a call: 1,000 of them take 90 us to answer."""

    def __init__(self, leaves: Iterable[Array]) -> None:
        super().__init__(leaves)
        self.sizes: list[int] = list(map(_size, self))
        self.longest = max(self.sizes, default=0)
        dtypes = list(map(_dtype, self))
        #: That of all leaves, None where they have several, or none.
        self.dtype: Any = dtypes[0] if dtypes and dtypes.count(dtypes[0]) == len(dtypes) else None


def asked(leaves: Sequence[Array]) -> Leaves:
    return leaves if isinstance(leaves, Leaves) else Leaves(leaves)


@dataclass(slots=True)
class Job:
    """Arrays of one dtype whose squares a thread adds up at once: one sum for each, or one for all of one group."""

    arrays: Sequence[Array]
    groups: Sequence[int]
    wide: bool
    room: int = CHUNK


def jobs_of(leaves: Sequence[Array], base: Sequence[int], groups: Groups) -> list[Job]:
    """The leaves as jobs, each as long as one thread should take at once."""
    leaves = asked(leaves)
    apart, mixed, sizes = groups.count > 1, any(groups.wide) and not all(groups.wide), leaves.sizes
    if not mixed and leaves.dtype is not None and leaves.longest <= _SMALL and 0 not in sizes:
        lengths = list(map(padded, sizes)) if apart else sizes
        if sum(lengths) <= CHUNK:
            return [Job(leaves, base, groups.wide[0])]
        cuts = _cuts(lengths)
        return [Job(leaves[i:j], base[i:j], groups.wide[0]) for i, j in pairwise(cuts)]
    jobs: list[Job] = []
    is_open: dict[Any, Job] = {}
    for leaf, n, group in zip(leaves, sizes, base, strict=True):
        wide = groups.each_wide[group]
        if n > _SMALL:
            jobs += [Job([x], [group], wide) for x in blocks(leaf, BLOCK)]
        elif n:
            key = (leaf.dtype, wide) if mixed else leaf.dtype
            job = is_open.get(key)
            if job is None:
                job = is_open[key] = Job([], [], wide)
            job.arrays.append(leaf)  # type: ignore[attr-defined]
            job.groups.append(group)  # type: ignore[attr-defined]
            job.room -= padded(n) if apart else n
            if job.room < _LITTLE:
                jobs.append(is_open.pop(key))
    return jobs + list(is_open.values())


def _cuts(sizes: Sequence[int]) -> list[int]:
    """Where to cut a row of small leaves, so that each piece is a chunk together, or less."""
    ends = list(accumulate(sizes))
    return [*(bisect_left(ends, n) for n in range(0, ends[-1], CHUNK - _LITTLE)), len(sizes)]


def sums_of(job: Job) -> list[float]:
    """The sums of |x|^2, NaN where a plain sum cannot say."""
    if len(set(job.groups)) > 1:
        return squares_of_each(job.arrays, job.wide)
    block = job.arrays[0]
    block = strung(job.arrays) if len(job.arrays) > 1 or not block.dtype.isnative else block.reshape(-1)
    return [squares(block, job.wide)]


def shared(f: Callable[[T], R], jobs: Sequence[T], leaves: Sequence[Array], *alone: str) -> list[R]:
    """`[f(job) for job in jobs]`, by threads where they pay. `alone`: dtypes whose blocks take so many short steps that
    threads wait for each other's interpreter lock: the norm of 25 million float16 elements took 15 ms with one, and 25
    with two.
    """
    if len(jobs) < 2 or sum(asked(leaves).sizes) < BLOCK or dtype_names(leaves).intersection(alone):
        return list(map(f, jobs))
    return each(f, jobs, num_threads())

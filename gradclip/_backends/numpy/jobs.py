"""Leaves of one group each, cut and strung together into jobs for threads: as much as one should take at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradclip._backends.numpy.loops import blocks, padded, squares, squares_of_each
from gradclip._backends.numpy.sixteen import CHUNK
from gradclip._groups import Groups
from gradclip._types import Array

#: What one thread takes at once, in elements. A second one pays for no fewer.
BLOCK = 1 << 20

#: Leaves up to here are strung together, so that a norm costs one pass of 0.1 us an element and not 2 us a leaf.
_SMALL = 1 << 13
_LITTLE = padded(_SMALL)


@dataclass(slots=True)
class Job:
    """Arrays of one dtype whose squares a thread adds up at once: one sum for each, or one for all of one group."""

    arrays: list[Array]
    groups: list[int]
    wide: bool
    room: int = CHUNK


def jobs_of(leaves: Sequence[Array], base: Sequence[int], groups: Groups) -> list[Job]:
    """The leaves as jobs, each as long as one thread should take at once."""
    jobs: list[Job] = []
    is_open: dict[Any, Job] = {}
    apart, mixed = groups.count > 1, len(set(groups.wide)) > 1
    for leaf, group in zip(leaves, base, strict=True):
        n, wide = leaf.size, groups.each_wide[group]
        if n > _SMALL:
            jobs += [Job([x], [group], wide) for x in blocks(leaf, BLOCK)]
        elif n:
            key = (leaf.dtype, wide) if mixed else leaf.dtype
            job = is_open.get(key)
            if job is None:
                job = is_open[key] = Job([], [], wide)
            job.arrays.append(leaf)
            job.groups.append(group)
            job.room -= padded(n) if apart else n
            if job.room < _LITTLE:
                jobs.append(is_open.pop(key))
    return jobs + list(is_open.values())


def sums_of(job: Job) -> list[float]:
    """The sums of |x|^2, NaN where a plain sum cannot say."""
    if len(set(job.groups)) > 1:
        return squares_of_each(job.arrays, job.wide)
    block = job.arrays[0].reshape(-1) if len(job.arrays) == 1 else np.concatenate(job.arrays, axis=None)
    return [squares(block if block.dtype.isnative else block.astype(block.dtype.newbyteorder("=")), job.wide)]

"""Bounds as the kernel that decides takes them: a number by value, or numbers on the device."""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import accumulate, groupby
from typing import Any

import cupy
import numpy as np

from gradclip._backends.cupy import compiler, programs, table
from gradclip._backends.cupy.columns import NULL, check
from gradclip._backends.cupy.compiler import NotCompiled
from gradclip._backends.cupy.devices import move
from gradclip._backends.cupy.graphs import keep
from gradclip._backends.cupy.numbers import REAL
from gradclip._backends.cupy.text import ENTRIES, THREADS
from gradclip._dtypes import dtype_name
from gradclip._scaled import Scaled


def number(value: Any, device: Any) -> Scaled:
    """A Python number stays one: it goes to the kernel by value. So does one that is given to all groups."""
    several = [(_readable(x, device), n) for x, n in _repeated(value if isinstance(value, list) else [value])]
    if len(several) == 1:
        ((one, _),) = several
        return Scaled(one if isinstance(one, float) else one.astype(cupy.float64, copy=False), None)
    starts = [0, *accumulate(n for _, n in several)]
    out = cupy.empty(starts[-1], cupy.float64)
    with suppress(NotCompiled):
        check(out.size)
        kernel = compiler.compiled(programs.row(), "gradclip_row")
        for i in range(0, len(several), ENTRIES):
            some = several[i : i + ENTRIES]
            begin, end = starts[i], starts[i + len(some)]
            what = table.row(some, begin), out, np.uint32(len(some)), np.uint32(end)
            kernel(kernel.blocks(-(-(end - begin) // THREADS)), what)
        return Scaled(out, None)
    for (x, n), start in zip(several, starts, strict=False):
        out[start : start + n] = x
    return Scaled(out, None)


def numbers_of(pair: tuple[Any, Any]) -> tuple[Any, Any] | None:
    """A pair of bounds, if both are numbers, here or on a device: those as 0-d arrays, any other as a float."""
    sides = []
    for side in pair:
        if side is None or isinstance(side, numbers.Real):
            sides.append(side if side is None else float(side))
        elif isinstance(side, cupy.ndarray) and side.size == 1:
            sides.append(side.reshape(()) if side.ndim else side)
        else:
            return None
    return sides[0], sides[1]


def _repeated(values: Sequence[Any]) -> Iterator[tuple[Any, int]]:
    """Bounds that follow each other, and for how many groups: a number that is given again and again is one of them."""
    for _, same in groupby(values, lambda x: (x, 0) if isinstance(x, float) else (0.0, id(x))):
        x, *more = same
        if getattr(x, "ndim", 0):
            yield from ((x, x.size) for x in (x, *more))
        else:
            yield x, 1 + len(more)


def _readable(value: Any, device: Any) -> Any:
    """A Python number, or an array on a device, of a dtype that the kernels read: 0-d, or a row."""
    if isinstance(value, float):
        return value
    keep(value)
    value = move(value, device)
    if value.ndim and value.strides[0] == 0:
        value = value[0]  # one number for a row of groups
    value = value if dtype_name(value) in REAL else value.astype(cupy.float64)
    return cupy.ascontiguousarray(value) if value.ndim else value


def argument(bound: Scaled) -> tuple[Any, ...]:
    """A bound as the kernel takes it: where it is, how far from one group's to the next one's, or its value."""
    if isinstance(bound.mantissa, float):
        return NULL, np.uint32(0), np.float64(bound.mantissa)
    return bound.mantissa, np.uint32(bound.mantissa.size > 1), np.float64(0.0)

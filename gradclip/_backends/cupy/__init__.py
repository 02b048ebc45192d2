"""CuPy: a few launches for all leaves together, where the generic backend takes some twenty for each.

For 1,000 leaves of 1,024 float32 elements: 5 launches for the global norm and 9 for a clip, in place or not; with a
group for each leaf 5 and 10. Of leaves of which an axis is kept, 88 are measured and 115 scaled or added up in one
launch, however many units or examples there are. Counted on emulated devices; no time was measured on a GPU.

The kernels are written by `programs` and compiled when they are first needed; one that will not compile on this machine
is replaced by the generic form, with one warning. Everything is queued on the current stream and the host never waits;
the addresses of the leaves go to the kernels by value, in their parameters. So a call can be captured in a CUDA graph:
keep the leaves and what the call returns as long as the graph (see `graphs`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import array_api_compat.cupy as xp
import cupy
import numpy as np

from gradclip._backends.cupy import bounds as bounds_of
from gradclip._backends.cupy import compiler, programs, table
from gradclip._backends.cupy.bounds import argument
from gradclip._backends.cupy.columns import NULL, Columns, blocks, joined, measured, split
from gradclip._backends.cupy.compiler import NotCompiled
from gradclip._backends.cupy.devices import by_device, move
from gradclip._backends.cupy.graphs import recording
from gradclip._backends.cupy.text import ALIGNMENT, KEPT, ONE, THREADS, TURNS, WHOLE
from gradclip._backends.generic import Backend
from gradclip._decide import Bounds, Verdict
from gradclip._groups import Groups
from gradclip._norms import Norm, Seen
from gradclip._scaled import Factors, Scaled
from gradclip._types import Array, Nonfinite


class CupyBackend(Backend):
    """Work on `cupy.ndarray`s. Everything is queued on the current stream; the host never waits."""

    def __init__(self) -> None:
        super().__init__(xp)

    @contextmanager
    def session(self, leaves: Sequence[Array], in_place: bool) -> Iterator[None]:
        """What is made belongs to the first leaf's device, and to the graph where one is captured."""
        home = leaves[0].device if leaves else nullcontext()
        with super().session(leaves, in_place), home, recording(leaves, in_place):
            yield

    def move(self, x: Array, device: Any) -> Array:
        return move(x, device)

    def accumulation(self, leaves: Sequence[Array]) -> Any:
        return cupy.float64

    def number(self, value: Any, acc: Any, device: Any) -> Scaled:
        return bounds_of.number(value, device)

    # -- norms ---------------------------------------------------------------------------------------------

    def partials(self, leaves: Sequence[Array], norm: Norm, groups: Groups, join: Callable[..., Array] | None) -> Seen:
        """Without other shards the last partials stay columns: the kernel that decides joins them."""
        with suppress(NotCompiled):
            compiler.compiled(programs.settle(norm), "gradclip_settle", "--fmad=false")
            if join is None:
                seen = (self.partial(leaves, norm, groups, ()),) if len(norm.ops) > 1 else ()
                return (*seen, self._columns(leaves, norm, groups, seen))
            self._compile_all(leaves, norm, groups)
        return super().partials(leaves, norm, groups, join)

    def partial(self, leaves: Sequence[Array], norm: Norm, groups: Groups, seen: Seen) -> Array:
        with suppress(NotCompiled):
            return joined(self._columns(leaves, norm, groups, seen), norm, len(seen), groups.count)
        return super().partial(leaves, norm, groups, seen)

    def _columns(self, leaves: Sequence[Array], norm: Norm, groups: Groups, seen: Seen) -> Columns:
        """What leaves contribute to one pass, on the first one's device."""
        home, found, places = cupy.cuda.Device(), [], by_device(leaves)
        for device, here in places:
            with cupy.cuda.Device(device):
                where = [groups.base[i] for i in here], [groups.keep[i] for i in here], groups.count
                columns = measured([leaves[i] for i in here], norm, *where, list(map(_here, seen)))
                if len(places) == 1 and device == home.id:
                    return columns
                found.append(move(joined(columns, norm, len(seen), groups.count), home))
        return Columns(cupy.concatenate(found, axis=1) if found else cupy.empty((norm.slots[len(seen)], 0)))

    def _compile_all(self, leaves: Sequence[Array], norm: Norm, groups: Groups) -> None:
        """Compile now what a clip needs: once other shards have been called, nothing may be begun again, or fail."""
        places = by_device(leaves)
        for device, here in [*places, (cupy.cuda.Device().id, [])]:
            with cupy.cuda.Device(device):
                sorts = split([leaves[i] for i in here], [groups.keep[i] for i in here])
                whole, kept = (table.kinds([leaves[here[i]] for i in sort], real=False) for sort in sorts)
                for step in range(len(norm.ops)):
                    compiler.compiled(programs.joined(norm, step), "gradclip_join")
                    if whole:
                        compiler.compiled(programs.measure(norm, step, whole), "gradclip_measure")
                    if kept:
                        compiler.compiled(programs.spread(norm, step, kept), "gradclip_spread")
        for several in {False, groups.count > 1}:  # groups by kind of leaf may be one group
            _scaling(leaves, places, groups, several)
        if any(len(shape) == 1 for shape in groups.shapes):  # examples
            _weighting(leaves, places)

    # -- the policy ----------------------------------------------------------------------------------------

    def decide(
        self,
        norm: Norm,
        partials: Seen,
        bounds: Bounds,
        groups: Groups,
        nonfinite: Nonfinite,
        relative: bool = False,
    ) -> Verdict:
        """The policy in one launch for all groups, unless their norms turn from float32 to float64 very often."""
        try:
            kernel = compiler.compiled(programs.settle(norm if partials else None), "gradclip_settle", "--fmad=false")
        except NotCompiled:
            bounds = Bounds(*(x and Backend.number(self, x.mantissa, cupy.float64, None) for x in bounds))
            return super().decide(norm, partials, bounds, groups, nonfinite, relative)
        n, one = groups.count, Scaled(1.0, None)
        given = *argument(bounds.max_norm), *argument(bounds.divide_by or one), *argument(bounds.unit or one)
        given += (*_found(norm, partials), np.bool_(relative)) if partials else argument(bounds.norm)
        rows, finite = cupy.empty((3, n), cupy.float64), cupy.empty((2, n), cupy.bool_)
        flips = table.flips(groups)
        for i in range(0, len(flips), TURNS):
            begin, end = flips[i], [*flips, n][min(i + TURNS, len(flips))]
            what = table.turns(flips[i : i + TURNS]), np.uint32(begin), np.uint32(n), np.bool_(nonfinite == "zero")
            if begin < end:
                kernel((end - begin,), (THREADS,), (rows, finite, *what, *given))
        return Verdict(_reported(rows, flips, groups), Factors(rows[1], rows[2]), finite[0], finite[1])

    # -- clipping ------------------------------------------------------------------------------------------

    def scale(self, leaves: Sequence[Array], factors: Factors, groups: Groups, in_place: bool) -> Sequence[Array]:
        """`leaf * shift * factor * shift`. The outputs on one device share one allocation: while one is kept, all are.

        A leaf whose elements lie side by side keeps its layout; any other comes back in C order. In place, what two
        leaves share is scaled once, from what it was.
        """
        places = by_device(leaves)
        try:
            kernels = _scaling(leaves, places, groups, factors.factor.size > 1)
        except NotCompiled:
            return super().scale(leaves, factors, groups, in_place)
        out: list[Array] = list(leaves)
        for (device, here), (kernel, grouped) in zip(places, kernels, strict=True):
            if in_place:
                here = list({_memory(leaves[i]): i for i in here}.values())
            with cupy.cuda.Device(device):
                by = [NULL if x is None else _here(x) for x in factors]
                mine = [leaves[i] for i in here]
                sources = [x if table.is_dense(x) else cupy.array(x, order="C") for x in mine]
                starts, end = table.room_for([x.nbytes for x in sources])
                room: Any = NULL if in_place else cupy.empty(end * ALIGNMENT, cupy.uint8)
                if in_place and table.overlap(sources):
                    sources = [x.copy() if x is leaf else x for x, leaf in zip(sources, mine, strict=True)]
                runs = _runs(sources, here, groups) if grouped else []
                lines = table.entries(sources, real=True, room=starts, runs=runs, cut=grouped != KEPT)
                for launch in table.tables(lines, grouped=grouped):
                    kernel((blocks(launch["chunks"]),), (THREADS,), (launch, *by, room))
                for i, x, start in zip(here, sources, starts, strict=True):
                    if not in_place:
                        out[i] = cupy.ndarray(x.shape, x.dtype, room.data + start * ALIGNMENT, x.strides)
                    elif x is not leaves[i]:
                        leaves[i][...] = x
        return leaves if in_place else out

    def weighted_sum(self, leaves: Sequence[Array], factors: Factors, groups: Groups) -> list[Array]:
        """As the reference, in double precision. A thread goes down the examples of one element of the result.

        So many examples of few elements are slow. Outputs share one allocation; a leaf that is not in one piece is
        copied. The results lie as the leaves do.
        """
        places = by_device(leaves)
        try:
            kernels = _weighting(leaves, places)
        except NotCompiled:
            return super().weighted_sum(leaves, factors, groups)
        out: dict[int, Array] = {}
        for (device, here), kernel in zip(places, kernels, strict=True):
            with cupy.cuda.Device(device):
                by = [NULL if x is None else _here(x) for x in factors]
                sources = [x if table.is_dense(x) else cupy.array(x, order="C") for x in (leaves[i] for i in here)]
                sums = [_without_first(x) for x in sources]
                starts, end = table.room_for([math.prod(shape) * dtype.itemsize for shape, dtype, _ in sums])
                room = cupy.empty(end * ALIGNMENT, cupy.uint8)
                lines = table.entries(sources, real=True, room=starts, runs=_runs(sources, here, groups), cut=False)
                lines = [line._replace(length=line.length // line.groups) for line in lines]
                for launch in table.tables(lines, grouped=KEPT, bits=8):
                    kernel((blocks(launch["chunks"]),), (THREADS,), (launch, *by, room))
                for i, start, (shape, dtype, strides) in zip(here, starts, sums, strict=True):
                    out[i] = cupy.ndarray(shape, dtype, room.data + start * ALIGNMENT, strides)
        for i, x in enumerate(leaves):
            if i not in out:
                with x.device:
                    out[i] = cupy.zeros(x.shape[1:], _dtype_of_sum(x))
        return [out[i] for i in range(len(leaves))]

    def _scaled(self, leaf: Array, steps: Sequence[Array]) -> Array:
        return super()._scaled(leaf, steps).astype(leaf.dtype, copy=False)  # cupy.where widens bfloat16

    def count_nonfinite(
        self, leaves: Sequence[Array], finite: Array, named: Callable[[int], str]
    ) -> list[tuple[int, int]] | None:
        """Counted by the kernels that measure: no memory is needed but some columns."""
        if finite.get().all():
            return None
        n = len(leaves)
        each = Groups(tuple(range(n)), (None,) * n, ((),) * n, (False,) * n)
        nans, infs = self.partial(leaves, programs.Census(), each, ()).get().tolist()
        return [(int(nan), int(inf)) for nan, inf in zip(nans, infs, strict=True)]


def _here(x: Array) -> Array:
    """An array of numbers as the kernels take it, on the current device."""
    return cupy.ascontiguousarray(move(x, cupy.cuda.Device()), cupy.float64)


def _reported(rows: Array, flips: Sequence[int], groups: Groups) -> list[Array]:
    """The norms of each block, where the kernel that decides has put them: `text.SETTLE`."""
    out, turn = [], 0
    for start, shape, wide in zip(groups.starts, groups.shapes, groups.wide, strict=True):
        turn += turn % 2 != wide
        place = rows.itemsize * start if wide else rows.itemsize * flips[turn] + 4 * (start - flips[turn])
        out.append(cupy.ndarray(shape, cupy.float64 if wide else cupy.float32, rows.data + place))
    return out


def _runs(leaves: Sequence[Array], here: Sequence[int], groups: Groups) -> list[table.Run]:
    """Where the groups of dense leaves are: those of the numbers `here`."""
    return [table.run_of(x, groups.keep[i], groups.base[i]) for x, i in zip(leaves, here, strict=True)]


def _without_first(leaf: Array) -> tuple[tuple[int, ...], Any, tuple[int, ...]]:
    """Shape, dtype and strides of what is left of a dense leaf without its axis 0: its elements move together."""
    dtype, n = _dtype_of_sum(leaf), leaf.shape[0]
    ratio = dtype.itemsize / leaf.itemsize
    outside = [stride > leaf.strides[0] for stride in leaf.strides[1:]]
    sides = zip(leaf.strides[1:], outside, strict=True)
    return leaf.shape[1:], dtype, tuple(int((s // n if out else s) * ratio) for s, out in sides)


def _dtype_of_sum(leaf: Array) -> Any:
    """float32 or complex64, for 64-bit components float64 or complex128."""
    return leaf.dtype if leaf.dtype.char in "dFD" else np.dtype(np.float32)


def _found(norm: Norm, partials: Seen) -> tuple[Any, ...]:
    """Partials as the kernel that decides takes them."""
    *before, last = partials
    widths = NULL
    if not isinstance(last, Columns):
        last = Columns(_here(last))
        if len(last.values) > norm.slots[-1]:  # other shards have said it
            widths = last.values[norm.slots[-1] :]
    return *last.arguments(), widths, _here(before[0]) if before else NULL


def _scaling(
    leaves: Sequence[Array], places: Sequence[tuple[int, list[int]]], groups: Groups, several: bool
) -> list[tuple[Any, int]]:
    """The kernel that scales, for each device, and what its table says of groups.

    All are compiled before the first leaf is written. `several`: there are several factors.
    """
    kernels = []
    for device, here in places:
        with cupy.cuda.Device(device):
            mine = [leaves[i] for i in here]
            kept = several and split(mine, [groups.keep[i] for i in here])[1]
            grouped = KEPT if kept else WHOLE if several else ONE
            source = programs.scale(table.kinds(mine, real=True), grouped)
            kernels.append((compiler.compiled(source, "gradclip_scale"), grouped))
    return kernels


def _weighting(leaves: Sequence[Array], places: Sequence[tuple[int, list[int]]]) -> list[Any]:
    """The kernel that adds up examples, for each device."""
    kernels = []
    for device, here in places:
        with cupy.cuda.Device(device):
            source = programs.weighted(table.kinds([leaves[i] for i in here], real=True))
            kernels.append(compiler.compiled(source, "gradclip_weighted"))
    return kernels


def _memory(leaf: Array) -> Any:
    """What is the same for two leaves that are the very same memory."""
    layout = (leaf.size,) if leaf.flags.c_contiguous else (leaf.shape, leaf.strides)
    return leaf.data.ptr, str(leaf.dtype), layout

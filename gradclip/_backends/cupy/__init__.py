"""CuPy: a few launches for all leaves together, where the generic backend takes some twenty for each.

For 1,000 leaves of 1,024 float32 elements: 5 launches for the global norm and 9 for a clip, in place or not; with a
group for each leaf 5 and 10. Counted on emulated devices; no time was measured on a GPU.

The kernels are written by `programs` and compiled when they are first needed; one that will not compile on this machine
is replaced by the generic form, with one warning. Everything is queued on the current stream and the host never waits;
the addresses of the leaves go to the kernels by value, in their parameters. So a call can be captured in a CUDA graph:
keep the leaves and what the call returns as long as the graph (see `graphs`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import array_api_compat.cupy as xp
import cupy
import numpy as np

from gradclip._backends.cupy import compiler, programs, table
from gradclip._backends.cupy.columns import NULL, Columns, blocks, joined, measured
from gradclip._backends.cupy.compiler import NotCompiled
from gradclip._backends.cupy.devices import by_device, move
from gradclip._backends.cupy.graphs import keep, recording
from gradclip._backends.cupy.numbers import REAL
from gradclip._backends.cupy.text import ALIGNMENT, ENTRIES, GROUPS, THREADS
from gradclip._backends.generic import Backend
from gradclip._decide import Bounds, Verdict
from gradclip._dtypes import dtype_name
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
        """A Python number stays one: it goes to the kernel by value. So does one that is given to all groups."""
        values = value if isinstance(value, list) else [value]
        if all(x is values[0] for x in values):
            values = values[:1]
        values = [_readable(x, device) for x in values]
        if len(values) == 1:
            (one,) = values
            return Scaled(one if isinstance(one, float) else one.astype(cupy.float64, copy=False), None)
        out = cupy.empty(len(values), cupy.float64)
        with suppress(NotCompiled):
            kernel = compiler.compiled(programs.row(), "gradclip_row")
            for begin in range(0, len(values), ENTRIES):
                some = values[begin : begin + ENTRIES]
                kernel((1,), (THREADS,), (table.row(some), out[begin:], np.uint32(len(some))))
            return Scaled(out, None)
        for i, x in enumerate(values):
            out[i] = x
        return Scaled(out, None)

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
                base = [groups.base[i] for i in here] if groups.count > 1 else []
                columns = measured([leaves[i] for i in here], norm, base, groups.count, list(map(_here, seen)))
                if len(places) == 1 and device == home.id:
                    return columns
                found.append(move(joined(columns, norm, len(seen), groups.count), home))
        return Columns(cupy.concatenate(found, axis=1) if found else cupy.empty((norm.slots[len(seen)], 0)))

    def _compile_all(self, leaves: Sequence[Array], norm: Norm, groups: Groups) -> None:
        """Compile now what a clip needs: once other shards have been called, nothing may be begun again, or fail."""
        places = by_device(leaves)
        for device, here in [*places, (cupy.cuda.Device().id, [])]:
            with cupy.cuda.Device(device):
                kinds = table.kinds([leaves[i] for i in here], real=False)
                for step in range(len(norm.ops)):
                    compiler.compiled(programs.joined(norm, step), "gradclip_join")
                    if kinds:
                        compiler.compiled(programs.measure(norm, step, kinds), "gradclip_measure")
        for grouped in {False, groups.count > 1}:  # groups by kind of leaf may be one group
            _scaling(leaves, places, grouped)

    # -- the policy ----------------------------------------------------------------------------------------

    def decide(self, norm: Norm, partials: Seen, bounds: Bounds, groups: Groups, nonfinite: Nonfinite) -> Verdict:
        """The policy in one launch for all groups; 8,192 at a time."""
        try:
            kernel = compiler.compiled(programs.settle(norm if partials else None), "gradclip_settle", "--fmad=false")
        except NotCompiled:
            bounds = Bounds(*(x and Backend.number(self, x.mantissa, cupy.float64, None) for x in bounds))
            return super().decide(norm, partials, bounds, groups, nonfinite)
        n = groups.count
        given = *_argument(bounds.max_norm), *_argument(bounds.divide_by or Scaled(1.0, None))
        given += _found(norm, partials) if partials else _argument(bounds.norm)
        rows, finite = cupy.empty((3, n), cupy.float64), cupy.empty((2, n), cupy.bool_)
        for begin in range(0, n, GROUPS):
            wide = groups.wide[begin : begin + GROUPS]
            what = table.flags(wide), np.uint32(begin), np.uint32(n), np.bool_(nonfinite == "zero")
            kernel((len(wide),), (THREADS,), (rows, finite, *what, *given))
        dtypes = [cupy.float64 if wide else cupy.float32 for wide in groups.wide]
        norms = [cupy.ndarray((), dtype, rows.data + rows.itemsize * g) for g, dtype in enumerate(dtypes)]
        return Verdict(norms, Factors(rows[1], rows[2]), finite[0], finite[1])

    # -- clipping ------------------------------------------------------------------------------------------

    def scale(self, leaves: Sequence[Array], factors: Factors, groups: Groups, in_place: bool) -> Sequence[Array]:
        """`leaf * shift * factor * shift`. The outputs on one device share one allocation: while one is kept, all are.

        A leaf whose elements lie side by side keeps its layout; any other comes back in C order. In place, what two
        leaves share is scaled once, from what it was.
        """
        places, grouped = by_device(leaves), factors.factor.size > 1
        try:
            kernels = _scaling(leaves, places, grouped)
        except NotCompiled:
            return super().scale(leaves, factors, groups, in_place)
        out: list[Array] = list(leaves)
        for (device, here), kernel in zip(places, kernels, strict=True):
            if in_place:
                here = list({_memory(leaves[i]): i for i in here}.values())
            with cupy.cuda.Device(device):
                by = [NULL if x is None else _here(x) for x in factors]
                mine = [leaves[i] for i in here]
                sources = [x if table.is_dense(x) else cupy.array(x, order="C") for x in mine]
                starts, end = table.room_for(sources)
                room: Any = NULL if in_place else cupy.empty(end * ALIGNMENT, cupy.uint8)
                if in_place and table.overlap(sources):
                    sources = [x.copy() if x is leaf else x for x, leaf in zip(sources, mine, strict=True)]
                base = [groups.base[i] for i in here] if grouped else []
                lines = table.entries(sources, real=True, room=starts, groups=base)
                for launch in table.tables(lines, grouped=grouped):
                    kernel((blocks(launch),), (THREADS,), (launch, *by, room))
                for i, x, start in zip(here, sources, starts, strict=True):
                    if not in_place:
                        out[i] = cupy.ndarray(x.shape, x.dtype, room.data + start * ALIGNMENT, x.strides)
                    elif x is not leaves[i]:
                        leaves[i][...] = x
        return leaves if in_place else out

    def _scaled(self, leaf: Array, steps: Sequence[Array]) -> Array:
        return super()._scaled(leaf, steps).astype(leaf.dtype, copy=False)  # cupy.where widens bfloat16

    def count_nonfinite(
        self, leaves: Sequence[Array], finite: Array, named: Callable[[int], str]
    ) -> list[tuple[int, int]] | None:
        """Counted by the kernels that measure: no memory is needed but some columns."""
        if finite.get().all():
            return None
        each = Groups(tuple(range(len(leaves))), len(leaves), (False,) * len(leaves))
        nans, infs = self.partial(leaves, programs.Census(), each, ()).get().tolist()
        return [(int(nan), int(inf)) for nan, inf in zip(nans, infs, strict=True)]


def _here(x: Array) -> Array:
    """An array of numbers as the kernels take it, on the current device."""
    return cupy.ascontiguousarray(move(x, cupy.cuda.Device()), cupy.float64)


def _readable(value: Any, device: Any) -> Any:
    """A Python number, or a 0-d array on a device, of a dtype that the kernels read."""
    if isinstance(value, float):
        return value
    keep(value)
    value = move(value, device)
    return value if dtype_name(value) in REAL else value.astype(cupy.float64)


def _found(norm: Norm, partials: Seen) -> tuple[Any, ...]:
    """Partials as the kernel that decides takes them."""
    *before, last = partials
    widths = NULL
    if not isinstance(last, Columns):
        last = Columns(_here(last))
        if len(last.values) > norm.slots[-1]:  # other shards have said it
            widths = last.values[norm.slots[-1] :]
    return *last.arguments(), widths, _here(before[0]) if before else NULL


def _scaling(leaves: Sequence[Array], places: Sequence[tuple[int, list[int]]], grouped: bool) -> list[Any]:
    """The kernel that scales, for each device: all are compiled before the first leaf is written."""
    kernels = []
    for device, here in places:
        with cupy.cuda.Device(device):
            kinds = table.kinds([leaves[i] for i in here], real=True)
            kernels.append(compiler.compiled(programs.scale(kinds, grouped), "gradclip_scale"))
    return kernels


def _argument(bound: Scaled) -> tuple[Any, ...]:
    """A bound as the kernel takes it: where it is, how far from one group's to the next one's, or its value."""
    if isinstance(bound.mantissa, float):
        return NULL, np.uint32(0), np.float64(bound.mantissa)
    return bound.mantissa, np.uint32(bound.mantissa.size > 1), np.float64(0.0)


def _memory(leaf: Array) -> Any:
    """What is the same for two leaves that are the very same memory."""
    layout = (leaf.size,) if leaf.flags.c_contiguous else (leaf.shape, leaf.strides)
    return leaf.data.ptr, str(leaf.dtype), layout

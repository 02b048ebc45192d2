"""CuPy: a few launches for all leaves together, where the generic backend takes some twenty for each.

For 1,000 leaves of 1,024 float32 elements: 5 launches for the global norm and 9 for a clip, in place or not; with a
group for each leaf 5 and 10. Of leaves of which an axis is kept, 88 are measured, scaled or added up in one
launch, however many units or examples there are. Counted on emulated devices; no time was measured on a GPU.

The kernels are written by `programs` and compiled when they are first needed; one that will not compile on this machine
is replaced by the generic form, with one warning. Everything is queued on the current stream and the host never waits;
the addresses of the leaves go to the kernels by value, in their parameters. So a call can be captured in a CUDA graph:
keep the leaves and what the call returns as long as the graph (see `graphs`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache
from typing import Any

import array_api_compat.cupy as xp
import cupy
import numpy as np

from gradclip._backends.cupy import bounds as bounds_of
from gradclip._backends.cupy import compiler, programs, table
from gradclip._backends.cupy.bounds import argument
from gradclip._backends.cupy.columns import NULL, Columns, joined, measured, split, threads
from gradclip._backends.cupy.compiler import NotCompiled
from gradclip._backends.cupy.devices import move
from gradclip._backends.cupy.graphs import recording
from gradclip._backends.cupy.laid import Laid, laid_out
from gradclip._backends.cupy.scaling import Launch, clamping, dtype_of_sum, scaling, weigh, weighting, written
from gradclip._backends.cupy.text import TURNS
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

    def adopt(self, leaves: Sequence[Array], bounds: Sequence[Any] = ()) -> tuple[Backend, Sequence[Array]]:
        return self, laid_out(leaves)

    def move(self, x: Array, device: Any) -> Array:
        return move(x, device)

    def accumulation(self, leaves: Sequence[Array]) -> Any:
        return cupy.float64

    def _number(self, value: Any, acc: Any, device: Any) -> Scaled:
        return bounds_of.number(value, device)

    # -- norms ---------------------------------------------------------------------------------------------

    def partials(self, leaves: Sequence[Array], norm: Norm, groups: Groups, join: Callable[..., Array] | None) -> Seen:
        """Without other shards the last partials stay columns: the kernel that decides joins them."""
        with suppress(NotCompiled):
            compiler.compiled(programs.settle(norm), "gradclip_settle", "--fmad=false")
            if join is None:
                seen = (self.partial(leaves, norm, groups, ()),) if len(norm.ops) > 1 else ()
                return (*seen, self._columns(leaves, norm, groups, seen, single=not any(groups.wide)))
            self._compile_all(leaves, norm, groups)
        return super().partials(leaves, norm, groups, join)

    def partial(self, leaves: Sequence[Array], norm: Norm, groups: Groups, seen: Seen) -> Array:
        with suppress(NotCompiled):
            return joined(self._columns(leaves, norm, groups, seen), norm, len(seen), groups.count)
        return super().partial(leaves, norm, groups, seen)

    def _columns(
        self, leaves: Sequence[Array], norm: Norm, groups: Groups, seen: Seen, single: bool = False
    ) -> Columns:
        """What leaves contribute to one pass, on the first one's device.

        Those that are not in one piece are copied, some at a time: each time gives a partial, as each device does.
        """
        home, found, devices = cupy.cuda.Device(), [], laid_out(leaves).parts
        parts = [some for part in devices for some in part.by_copies()]
        for part in parts:
            with cupy.cuda.Device(part.device):
                columns = measured(part, norm, groups, list(map(_here, seen)), single)
                if len(parts) == 1 and part.device == home.id:
                    return columns
                found.append(move(joined(columns, norm, len(seen), groups.count), home))
                del columns
            if len(found) > len(devices):  # not all partials are held either
                found = [joined(Columns(cupy.concatenate(found, axis=1)), norm, len(seen), groups.count)]
        return Columns(cupy.concatenate(found, axis=1) if found else cupy.empty((norm.slots[len(seen)], 0)))

    def _compile_all(self, leaves: Sequence[Array], norm: Norm, groups: Groups) -> None:
        """Compile now what a clip needs: once other shards have been called, nothing may be begun again, or fail."""
        parts = laid_out(leaves).parts
        for part in [*parts, Laid([], [], cupy.cuda.Device().id, [], False)]:
            with cupy.cuda.Device(part.device):
                sorts = split(part, part.of(groups.keep))
                whole, kept = (table.kinds(sort.distinct, real=False) for sort in sorts)
                for step in range(len(norm.ops)):
                    compiler.compiled(programs.joined(norm, step), "gradclip_join")
                    if whole:
                        compiler.compiled(programs.measure(norm, step, whole), "gradclip_measure")
                    if kept:
                        compiler.compiled(programs.spread(norm, step, kept), "gradclip_spread")
        for several in {False, groups.count > 1}:  # groups by kind of leaf may be one group
            scaling(parts, groups, several)
        if any(len(shape) == 1 for shape in groups.shapes):  # examples
            weighting(parts)

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
            bounds = Bounds(*(x and Backend._number(self, x.mantissa, cupy.float64, None) for x in bounds))
            return super().decide(norm, partials, bounds, groups, nonfinite, relative)
        n, one = groups.count, Scaled(1.0, None)
        given = *argument(bounds.max_norm or one), *argument(bounds.divide_by or one), *argument(bounds.unit or one)
        if partials:
            given += *_found(norm, partials), np.bool_(relative), np.bool_(bounds.max_norm is None)
        else:
            given += argument(bounds.norm)
        rows, finite = cupy.empty((3, n), cupy.float64), cupy.empty((2, n), cupy.bool_)
        flips, dtypes, places = _reports(groups)
        for i in range(0, len(flips), TURNS):
            begin, end = flips[i], [*flips, n][min(i + TURNS, len(flips))]
            what = table.turns(flips[i : i + TURNS]), np.uint32(begin), np.uint32(n), np.bool_(nonfinite == "zero")
            if begin < end:
                kernel(end - begin, (rows, finite, *what, *given), threads(n))
        norms = list(map(cupy.ndarray, groups.shapes, dtypes, [rows.data + place for place in places]))
        return Verdict(norms, Factors(rows[1], rows[2]), finite[0], finite[1])

    # -- clipping ------------------------------------------------------------------------------------------

    def scale(self, leaves: Sequence[Array], factors: Factors, groups: Groups, in_place: bool) -> Sequence[Array]:
        """`leaf * shift * factor * shift`. Outputs share allocations, see `laid`: while one is kept, all of it is.

        A leaf whose elements lie side by side keeps its layout; any other comes back in C order. In place, what two
        leaves share is scaled once, from what it was.
        """
        parts = laid_out(leaves).parts
        try:
            kernels = scaling(parts, groups, factors.factor.size > 1)
        except NotCompiled:
            return super().scale(leaves, factors, groups, in_place)
        out: list[Array] = list(leaves)
        for part, (kernel, grouped) in zip(parts, kernels, strict=True):
            with cupy.cuda.Device(part.device):
                how = Launch(kernel, grouped, groups, [NULL if x is None else _here(x) for x in factors])
                written(part, how, in_place, out)
        return leaves if in_place else out

    def clamp(self, leaves: Sequence[Array], pairs: Sequence[tuple[Any, Any]], in_place: bool) -> Sequence[Array]:
        """Leaves whose bounds are numbers all together, by one kernel."""
        given, out = [bounds_of.numbers_of(pair) for pair in pairs], list(leaves)
        done: set[int] = set()
        for part in laid_out(leaves).parts:
            some = part.only([k for k, i in enumerate(part.here) if given[i]])
            if some.leaves:
                with cupy.cuda.Device(part.device), suppress(NotCompiled):
                    written(some, clamping(some, [pair or (0.0, 0.0) for pair in given]), in_place, out)
                    done.update(some.here)
        rest = [i for i in range(len(out)) if i not in done]
        others = super().clamp([leaves[i] for i in rest], [pairs[i] for i in rest], in_place)
        for i, x in zip(rest, others, strict=True):
            out[i] = x
        return out

    def weighted_sum(self, leaves: Sequence[Array], factors: Factors, groups: Groups) -> list[Array]:
        """As the reference, in double precision. A thread goes down the examples of one element of the result.

        So many examples of few elements are slow. Outputs share allocations; a leaf that is not in one piece is
        copied. The results lie as the leaves do.
        """
        parts = laid_out(leaves).parts
        try:
            kernels = weighting(parts)
        except NotCompiled:
            return super().weighted_sum(leaves, factors, groups)
        out: list[Any] = [None] * len(leaves)
        for part, kernel in zip(parts, kernels, strict=True):
            with cupy.cuda.Device(part.device):
                by = [NULL if x is None else _here(x) for x in factors]
                sums = np.array([x.size // x.shape[0] * dtype_of_sum(x).itemsize for x in part.leaves])
                for piece in part.by_outputs(sums):
                    for some in piece.by_copies():
                        some.put(weigh(some, kernel, groups, by), out)
        for i, x in enumerate(leaves):
            if not x.size:
                with x.device:
                    out[i] = cupy.zeros(x.shape[1:], dtype_of_sum(x))
        return out

    def _scaled(self, leaf: Array, steps: Sequence[Array]) -> Array:
        return super()._scaled(leaf, steps).astype(leaf.dtype, copy=False)  # cupy.where widens bfloat16

    def count_nonfinite(
        self, leaves: Sequence[Array], finite: Array, named: Callable[[int], str]
    ) -> list[tuple[int, int]] | None:
        """Counted by the kernels that measure: no memory is needed but some columns."""
        if finite.get().all():
            return None
        each = Groups.of_leaves(len(leaves))
        nans, infs = self.partial(leaves, programs.Census(), each, ()).get().tolist()
        return [(int(nan), int(inf)) for nan, inf in zip(nans, infs, strict=True)]


def _here(x: Array) -> Array:
    """An array of numbers as the kernels take it, on the current device."""
    return cupy.ascontiguousarray(move(x, cupy.cuda.Device()), cupy.float64)


@lru_cache
def _reports(groups: Groups) -> tuple[list[int], list[Any], list[int]]:
    """Where norms turn from float32 to float64, and the dtype and place of each block's, as `text.SETTLE` has them."""
    flips, turn, dtypes, places = table.flips(groups), 0, [], []
    for start, wide in zip(groups.starts, groups.wide, strict=True):
        turn += turn % 2 != wide
        dtypes.append(cupy.float64 if wide else cupy.float32)
        places.append(8 * start if wide else 8 * flips[turn] + 4 * (start - flips[turn]))
    return flips, dtypes, places


def _found(norm: Norm, partials: Seen) -> tuple[Any, ...]:
    """Partials as the kernel that decides takes them."""
    *before, last = partials
    widths = NULL
    if not isinstance(last, Columns):
        last = Columns(_here(last))
        if len(last.values) > norm.slots[-1]:  # other shards have said it
            widths = last.values[norm.slots[-1] :]
    return *last.arguments(), widths, _here(before[0]) if before else NULL

"""CuPy: a few launches for all leaves together, where the generic kernels take some twenty for each.

For 1,000 leaves of 1,024 float32 elements: 5 launches for the norm and 9 for a clip, in place or not, where the generic
kernels take 6,032 and 17,032. Counted on emulated devices; no time was measured on a GPU.

The kernels are written by `cuda` and compiled when they are first needed; one that will not compile on this machine
is replaced by the generic form, with one warning. Everything is queued on the current stream and the host never waits;
the addresses of the leaves go to the kernels by value, in their parameters. So a call can be captured in a CUDA graph:
keep the leaves and what the call returns as long as the graph (see `cupy_graphs`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import array_api_compat.cupy as xp
import cupy
import numpy as np

from gradclip._kernels import cuda, cuda_table
from gradclip._kernels.cuda_text import ALIGNMENT, THREADS
from gradclip._kernels.cupy_compiler import NotCompiled, compiled
from gradclip._kernels.cupy_graphs import Recorded
from gradclip._kernels.generic import Kernels
from gradclip._law import Law
from gradclip._numbers import Measured
from gradclip._types import Array, Call, Nonfinite

#: Blocks of one launch: as many threads as the largest GPUs run at once.
_BLOCKS = 1024
_NULL = np.uint64(0)


class _Kernels(Kernels):
    """The work of `CupyKernels`."""

    def __init__(self) -> None:
        super().__init__(xp)

    def device(self, leaf: Array) -> Any:
        return int(leaf.device.id)

    def on(self, device: Any) -> AbstractContextManager[Any]:
        return cupy.cuda.Device(device)

    def move(self, x: Array, device: Any) -> Array:
        source = self.device(x)
        if source == device:
            return x
        # Events order the streams of the two devices; the host does not wait.
        with cupy.cuda.Device(source):
            made = cupy.cuda.get_current_stream().record()
        with cupy.cuda.Device(device):
            stream = cupy.cuda.get_current_stream()
            stream.wait_event(made)
            out = cupy.array(x)
            copied = stream.record()
        with cupy.cuda.Device(source):  # or x may be freed, and its memory used again, before it is read
            cupy.cuda.get_current_stream().wait_event(copied)
        return out

    def full(self, value: float, dtype: Any, device: Any) -> Array:
        with cupy.cuda.Device(device):
            return cupy.full((), value, dtype)

    def accumulation(self, leaves: Sequence[Array]) -> Any:
        return cupy.float64

    def shares(self, leaf: Array) -> Any:
        layout = (leaf.size,) if leaf.flags.c_contiguous else (leaf.shape, leaf.strides)
        return leaf.data.ptr, str(leaf.dtype), layout

    # -- norms ---------------------------------------------------------------------------------------------

    def partials(self, leaves: Sequence[Array], law: Law, acc: Any, seen: tuple[Array, ...]) -> list[Array]:
        try:
            return [self._joined(self._blocks(leaves, law, seen), law, len(seen))]
        except NotCompiled:
            return super().partials(leaves, law, acc, seen)

    def _blocks(self, leaves: Sequence[Array], law: Law, seen: tuple[Array, ...]) -> Array:
        """What leaves on the current device contribute to one pass: one partial for each block, as columns."""
        leaves = [leaf if cuda_table.is_dense(leaf) else cupy.ascontiguousarray(leaf) for leaf in leaves]
        kernel = compiled(cuda.measure(law, len(seen), cuda_table.kinds(leaves, real=False)), "gradclip_measure")
        tables = list(cuda_table.tables(cuda_table.entries(leaves, real=False)))
        blocks = [_grid(table) for table in tables]
        out = cupy.empty((law.sizes[len(seen)], sum(blocks)), cupy.float64)
        known = cupy.concatenate(seen) if len(seen) > 1 else cupy.ascontiguousarray(seen[0]) if seen else _NULL
        at = 0
        for table, n in zip(tables, blocks, strict=True):
            kernel((n,), (THREADS,), (table, out, np.uint32(out.shape[1]), np.uint32(at), known))
            at += n
        return out

    def _joined(self, columns: Array, law: Law, step: int) -> Array:
        """The columns of a table as one."""
        kernel = compiled(cuda.joined(law, step), "gradclip_settle")
        out = cupy.empty(law.sizes[step], cupy.float64)
        kernel((1,), (THREADS,), (out, columns, np.uint32(columns.shape[1])))
        return out

    # -- the policy ----------------------------------------------------------------------------------------

    def argument(self, value: Any, acc: Any, device: Any) -> Measured:
        if isinstance(value, int | float):
            return Measured(float(value), None)  # it goes to the kernel by value
        return self.number(value, acc, device)

    def staged(self, plan: Callable[..., Any], arrays: Sequence[Array], all_reduce: Call | None) -> Callable[..., Any]:
        def call(kernels: Kernels, arrays: Sequence[Array], bounds: Any, *, law: Law, **static: Any) -> Any:
            leaves = _counted(arrays, static["all_reduce"])
            try:
                if leaves is not None:
                    return self._settled(plan, arrays, leaves, bounds, law, **static)
            except NotCompiled:
                pass
            home = self.devices(arrays)[0]
            numbers = (x if x is None else self.number(x.root, cupy.float64, home) for x in bounds)
            return plan(kernels, arrays, bounds._make(numbers), law=law, **static)

        return call

    def _settled(
        self,
        plan: Callable[..., Any],
        arrays: Sequence[Array],
        leaves: Sequence[Array],
        bounds: Any,
        law: Law,
        nonfinite: Nonfinite,
        all_reduce: Call | None,
    ) -> tuple[Array, Array, Array | None, Array, Array]:
        """What `plan` gives, in one kernel after those that measure `leaves`."""
        home = self.devices(arrays)[0]
        kinds = {x.dtype: x for x in leaves}.values()  # the name of a dtype takes long to find
        form = cuda.Form(
            law,
            nonfinite,
            narrow=all_reduce is None and all(self.is_narrow(x, cupy.float64) for x in kinds),
            wide=self.reported([*{x.dtype: x for x in arrays}.values()]) == cupy.float64,
            bounds=bounds._make(x and ("value" if isinstance(x.root, float) else "array") for x in bounds),
        )
        source, shifts = cuda.settle(plan, form)
        with self.on(home):
            # No fusing: the same norm is the same number in every program, to the last bit.
            kernel = compiled(source, "gradclip_settle", "--fmad=false")
        if all_reduce is not None:
            self._compile_all(leaves, law, home)
        columns, seen = self._measured(leaves, law, home, all_reduce) if bounds.norm is None else (None, ())
        with self.on(home):
            out = cupy.empty(5, cupy.float64)
            measured = [] if columns is None else [columns, np.uint32(columns.shape[1]), *seen]
            given = [x.root for x in bounds if x is not None]
            kernel((1,), (THREADS,), (out, *measured, *given))
            norm = out[0] if form.wide else out.view(cupy.float32)[0]
            return norm, out[1], out[2] if shifts else None, out[3], out[4]

    def _measured(
        self, leaves: Sequence[Array], law: Law, home: Any, all_reduce: Call | None
    ) -> tuple[Array, tuple[Array, ...]]:
        """The partials of the last pass, as columns, and those of the passes before it, joined; on `home`."""
        seen: tuple[Array, ...] = ()
        for step, (op, size) in enumerate(zip(law.ops, law.sizes, strict=True)):
            columns = self._columns(leaves, law, home, seen)
            with self.on(home):
                if columns is None:
                    columns = cupy.empty((size, 0), cupy.float64)
                if all_reduce is None and step + 1 == len(law.sizes):
                    break  # the kernel that settles joins these
                joined = self._joined(columns, law, step)
                if all_reduce is not None:
                    joined = cupy.ascontiguousarray(self.move(all_reduce(joined, op), home), cupy.float64)
                seen, columns = (*seen, joined), joined[:, None]
        return columns, seen[: len(law.sizes) - 1]

    def _compile_all(self, leaves: Sequence[Array], law: Law, home: Any) -> None:
        """Compile now what `_measured` needs: once other shards have been called, nothing may be begun again."""
        for device, places in [*_by_device(leaves), (home, [])]:
            with self.on(device):
                kinds = cuda_table.kinds([leaves[i] for i in places], real=False)
                for step in range(len(law.sizes)):
                    compiled(cuda.joined(law, step), "gradclip_settle")
                    if kinds:
                        compiled(cuda.measure(law, step, kinds), "gradclip_measure")

    def _columns(self, leaves: Sequence[Array], law: Law, home: Any, seen: tuple[Array, ...]) -> Array | None:
        """The partials of one pass on `home`, whatever devices the leaves are on."""
        columns = []
        groups = _by_device(leaves)
        for device, places in groups:
            with self.on(device):
                known = tuple(self.move(x, device) for x in seen)
                blocks = self._blocks([leaves[i] for i in places], law, known)
                if len(groups) == 1 and device == home:
                    return blocks
                columns.append(self.move(self._joined(blocks, law, len(seen)), home))
        with self.on(home):
            return cupy.stack(columns, axis=1) if columns else None

    # -- clipping ------------------------------------------------------------------------------------------

    def scaled(self, leaf: Array, factor: Array, shift: Array | None) -> Array:
        return super().scaled(leaf, factor, shift).astype(leaf.dtype, copy=False)  # cupy.where widens bfloat16

    def scale(self, leaves: Sequence[Array], factor: Array, shift: Array | None) -> list[Array]:
        """`leaf * shift * factor * shift`. The outputs on one device share one allocation: while one is kept, all are.

        A leaf whose elements lie side by side keeps its layout; any other comes back in C order.
        """
        groups = _by_device(leaves)
        try:
            kernel = self._scaling(leaves, groups)
        except NotCompiled:
            return super().scale(leaves, factor, shift)
        out: list[Array] = list(leaves)
        for device, places in groups:
            with self.on(device):
                by = self.move(factor, device), _NULL if shift is None else self.move(shift, device)
                dense = [i for i in places if leaves[i].size and cuda_table.is_dense(leaves[i])]
                starts, end = cuda_table.room_for([leaves[i] for i in dense])
                room = cupy.cuda.alloc(end * ALIGNMENT)
                for i, start in zip(dense, starts, strict=True):
                    x = leaves[i]
                    out[i] = cupy.ndarray(x.shape, x.dtype, room + start * ALIGNMENT, x.strides)
                kernel([leaves[i] for i in dense], by, starts, room.ptr)
                others = sorted(set(places).difference(dense))
                for i in others:
                    out[i] = cupy.array(leaves[i], order="C")
                kernel([out[i] for i in others if out[i].size], by)
        return out

    def scale_into(self, leaves: Sequence[Array], factor: Array, shift: Array | None) -> None:
        leaves = [x for x in leaves if x.size]
        groups = _by_device(leaves)
        try:
            kernel = self._scaling(leaves, groups)
        except NotCompiled:
            return super().scale_into(leaves, factor, shift)
        for device, places in groups:
            with self.on(device):
                by = self.move(factor, device), _NULL if shift is None else self.move(shift, device)
                here = [leaves[i] for i in places]
                dense = [x for x in here if cuda_table.is_dense(x)]
                if cuda_table.overlap(dense):
                    dense = []  # what two leaves share is scaled once, from what it was
                own = {id(x) for x in dense}
                others = [x for x in here if id(x) not in own]
                copies = [cupy.array(x, order="C") for x in others]
                kernel([*dense, *copies], by)
                for x, new in zip(others, copies, strict=True):
                    x[...] = new
        return None

    def _scaling(self, leaves: Sequence[Array], groups: Sequence[tuple[int, list[int]]]) -> Callable[..., None]:
        """The launches of `scale`, compiled for every device before the first leaf is written."""
        for device, places in groups:
            with self.on(device):
                compiled(cuda.scale(cuda_table.kinds([leaves[i] for i in places], real=True)), "gradclip_scale")

        def launch(leaves: Sequence[Array], by: tuple[Any, Any], room: Sequence[int] = (), base: int = 0) -> None:
            if leaves:
                kernel = compiled(cuda.scale(cuda_table.kinds(leaves, real=True)), "gradclip_scale")
                for table in cuda_table.tables(cuda_table.entries(leaves, real=True, room=room)):
                    kernel((_grid(table),), (THREADS,), (table, *by, np.uint64(base)))

        return launch


class CupyKernels(Recorded, _Kernels):
    """Kernels for `cupy.ndarray`. Everything is queued on the current stream; the host never waits."""


def _counted(arrays: Sequence[Array], all_reduce: Call | None) -> list[Array] | None:
    """The leaves that this shard counts and that hold something; None where only the device knows whether it counts."""
    counted = []
    for kind, group in ({None: arrays} if all_reduce is None else all_reduce.groups(arrays)).items():
        counts = all_reduce is None or (len(group) > 0 and all_reduce.counts(kind, group[0]))
        if counts is not True and counts is not False:
            return None
        counted += [x for x in group if counts and x.size]
    return counted


def _grid(table: Any) -> int:
    return min(int(table["chunks"]), _BLOCKS)


def _by_device(leaves: Sequence[Array]) -> list[tuple[int, list[int]]]:
    """The devices of the leaves, in order of appearance, and which leaves are there."""
    found: dict[int, list[int]] = {}
    for i, leaf in enumerate(leaves):
        found.setdefault(leaf.device.id, []).append(i)
    return list(found.items())

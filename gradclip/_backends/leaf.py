"""The reference's work on one leaf, in terms of the Python array API; `generic` does all leaves of a call with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import array_api_compat

from gradclip._dtypes import dtype_name
from gradclip._norms import Norm, Seen
from gradclip._parts import Parts
from gradclip._types import Array, Namespace, ReduceOp

_ROW = 128
_CHUNK = 1 << 16


class OneLeaf:
    """What is done to one leaf, and to small arrays, of the library whose array-API namespace is `xp`."""

    def __init__(self, xp: Namespace) -> None:
        self.xp = xp

    # -- small arrays --------------------------------------------------------------------------------------

    def move(self, x: Array, device: Any) -> Array:
        """A small array on another device."""
        return x if array_api_compat.device(x) == device else array_api_compat.to_device(x, device)

    def _row(self, numbers: Sequence[Array]) -> Array:
        return self.xp.concat([self.xp.reshape(x, (-1,)) for x in numbers])

    def _here(self, x: Array, device: Any) -> Array:
        """An array of any library as one of this, on that device."""
        if array_api_compat.array_namespace(x) is not self.xp:
            x = self.xp.asarray(x)
        return self.move(x, device)

    def _full(self, value: float, dtype: Any, device: Any) -> Array:
        """A 0-d array that needs no copy from the host: the value rounded to `dtype`."""
        info = self.xp.finfo(dtype)
        largest, eps = float(info.max), float(info.eps)
        if abs(value) > largest:  # some libraries refuse it
            beyond = abs(value) >= largest + largest / (2 - eps) * eps / 2  # half a unit in the last place
            value = math.copysign(math.inf if beyond else largest, value)
        return self.xp.full((), value, dtype=dtype, device=device)

    # -- norms ---------------------------------------------------------------------------------------------

    def _contribution(self, leaf: Array, keep: int | None, norm: Norm, acc: Any, seen: Seen) -> Array:
        """What one leaf contributes: (slots, groups of the leaf)."""
        xp, op = self.xp, norm.ops[len(seen)]
        leaf = xp.reshape(leaf, (1, -1)) if keep is None else self._by_unit(leaf, keep)
        if dtype_name(leaf).startswith("complex"):
            parts: Parts = (xp.astype(xp.real(leaf), acc), xp.astype(xp.imag(leaf), acc))
        else:
            parts = (xp.astype(leaf, acc),)
        # In float64, what a plain sum of narrower elements loses cannot be seen in the result.
        total = _last_axis(xp.sum) if acc == xp.float64 and not norm.binned else self._total
        reduce = total if op == "sum" else _last_axis(getattr(xp, op))
        known = tuple([x[k, :, None] for k in range(x.shape[0])] for x in seen)
        terms = norm.terms(xp, parts, known)
        each = [reduce(x) if hasattr(x, "shape") else x for x in terms]
        like = next(x for x in each if hasattr(x, "shape"))  # of the leaf's own sort: torch's may be sharded
        return xp.stack([x if hasattr(x, "shape") else xp.full_like(like, x * leaf.shape[1]) for x in each])

    def _by_unit(self, leaf: Array, keep: int) -> Array:
        """A row for each index along the axis `keep`."""
        return self.xp.reshape(self.xp.moveaxis(leaf, keep, 0), (leaf.shape[keep], -1))

    def _joined(self, columns: list[Array], op: ReduceOp) -> Array:
        """What several leaves contribute to the same groups, as one."""
        if len(columns) == 1:
            return columns[0]
        table = self.xp.stack(columns, axis=-1)
        return self._total(table) if op == "sum" else getattr(self.xp, op)(table, axis=-1)

    def _total(self, x: Array) -> Array:
        """The sum along the last axis, exact to a few units in the last place.

        Halves are added to each other: no sum in one row, whatever the library does, is longer than _ROW.
        (torch's own sum is 5 units off for 4097 equal float64 elements.)
        """
        xp = self.xp
        odd = []
        while (n := x.shape[-1]) > _ROW:
            if n % 2:
                odd.append(x[..., -1:])
            x = x[..., : n // 2] + x[..., n // 2 : n - n % 2]
        return xp.sum(xp.concat([x, *odd], axis=-1) if odd else x, axis=-1)

    # -- clipping ------------------------------------------------------------------------------------------

    def _product(self, leaf: Array, steps: Sequence[Array]) -> Array:
        """Steps of 0 give 0, whatever the leaf holds."""
        xp, factor = self.xp, steps[len(steps) // 2]
        acc = factor.dtype
        if dtype_name(leaf).startswith("complex"):
            acc = xp.complex128 if acc == xp.float64 else xp.complex64
        product = xp.astype(leaf, acc)
        for step in steps:
            product = product * xp.astype(xp.where(step == 0, xp.ones_like(step), step), acc)  # 0 * inf would warn
        return xp.where(factor == 0, xp.zeros_like(product), product)

    def _scaled(self, leaf: Array, steps: Sequence[Array]) -> Array:
        xp, factor = self.xp, steps[len(steps) // 2]
        keep = factor == 1 if len(steps) == 1 else xp.logical_and(factor == 1, steps[0] == 1)
        return xp.where(keep, leaf, xp.astype(self._product(leaf, steps), leaf.dtype))

    def _normal(self, x: Array, wide: bool) -> Array:
        """Rounded to float32, or float64 where `wide`; 0 where it is no normal number."""
        xp = self.xp
        if dtype_name(x).startswith("complex"):
            re, im = self._normal(xp.real(x), wide), self._normal(xp.imag(x), wide)
            return xp.astype(re, xp.complex128 if wide else xp.complex64) + 1j * im
        x = xp.astype(x, xp.float64 if wide else xp.float32)
        return xp.where(xp.abs(x) < xp.finfo(x.dtype).smallest_normal, xp.zeros_like(x), x)

    def _bound(self, value: Any, dtype: Any, device: Any) -> Array:
        if isinstance(value, int | float):
            return self._full(float(value), dtype, device)
        return self.xp.astype(self._here(value, device), dtype)

    def _census(self, leaf: Array) -> tuple[int, int]:
        """Counted in pieces, for the memory may be full."""
        xp, nans, infs = self.xp, 0, 0
        with on(array_api_compat.device(leaf)):
            for piece in pieces(leaf):
                nan = xp.isnan(piece)
                inf = xp.logical_and(xp.isinf(piece), xp.logical_not(nan))
                nans += int(xp.sum(xp.astype(nan, xp.int32)))
                infs += int(xp.sum(xp.astype(inf, xp.int32)))
        return nans, infs


def pieces(x: Array) -> list[Array]:
    """Views of at most _CHUNK elements, whatever the shape."""
    if math.prod(x.shape) <= _CHUNK:
        return [x]
    half = x.shape[0] // 2
    parts = [x[:half, ...], x[half:, ...]] if half else [x[0, ...]]
    return [piece for part in parts for piece in pieces(part)]


def _last_axis(reduce: Callable[..., Array]) -> Callable[[Array], Array]:
    return lambda x: reduce(x, axis=-1)


def on(device: Any) -> AbstractContextManager[Any]:
    """While open, arrays made and kernels launched belong to `device`, in libraries that have such a thing."""
    return device if hasattr(device, "use") else nullcontext()


def entries(row: Array, start: int, n: int) -> Array:
    """The numbers of n groups, from a row of all groups, or 0-d from one number for all."""
    if row.ndim and row.shape[0] != 1:
        return row[start : start + n]
    return row[0] if row.ndim else row


def against(leaf: Array, keep: int | None) -> tuple[int, ...]:
    """The shape in which the numbers of a leaf's groups broadcast against it."""
    return () if keep is None else tuple(-1 if axis == keep else 1 for axis in range(leaf.ndim))


def columns(partial: Array, start: int, n: int) -> Array:
    """Those of n groups, of a partial in which groups may stand apart by kind of leaf."""
    start %= partial.shape[1] or 1
    return partial[:, start : start + n]

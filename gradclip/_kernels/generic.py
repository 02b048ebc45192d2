"""The reference kernels, for any library that speaks the Python array API, and the oracle for the special ones.

A kernel knows dtypes, devices, accumulation and scaling. It knows no policy: it is told a factor, and only that
1 leaves every bit as it is, and 0 gives zeros whatever the leaf holds.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import Any

import array_api_compat

from gradclip._kernels.dtypes import COMPONENT_BITS, dtype_name, dtype_names
from gradclip._law import Law, identity, join
from gradclip._numbers import RANGES, Measured, Parts, host_split, moderate, quotient
from gradclip._types import Array, Call, Namespace, ReduceOp

_ROW = 128


class Kernels:
    """Kernels for the library whose array-API namespace is `xp`."""

    def __init__(self, xp: Namespace) -> None:
        self.xp = xp

    # -- what a library may do otherwise -------------------------------------------------------------------

    def adopt(self, leaf: Array) -> Array:
        """`leaf` as an array of this library."""
        if isinstance(leaf, int | float) or array_api_compat.array_namespace(leaf) is not self.xp:
            return self.xp.asarray(leaf)
        return leaf

    def adopted(self, leaves: Sequence[Array]) -> Sequence[Array]:
        return [self.adopt(x) for x in leaves]

    def device(self, leaf: Array) -> Any:
        """Where `leaf` lives: equal values can work together."""
        return array_api_compat.device(leaf)

    def move(self, x: Array, device: Any) -> Array:
        """A small array on another device."""
        return x if self.device(x) == device else array_api_compat.to_device(x, device)

    def on(self, device: Any) -> AbstractContextManager[Any]:
        """While open, arrays made and kernels launched belong to `device`."""
        return nullcontext()

    def quiet(self) -> AbstractContextManager[Any]:
        """While open, floating-point warnings are off: inf and NaN are answered by the policy."""
        numpy = sys.modules.get("numpy")
        return nullcontext() if numpy is None else numpy.errstate(all="ignore")

    def full(self, value: float, dtype: Any, device: Any) -> Array:
        """A 0-d array that needs no copy from the host: the value rounded to `dtype`."""
        info = self.xp.finfo(dtype)
        largest, eps = float(info.max), float(info.eps)
        if abs(value) > largest:  # some libraries refuse it
            beyond = abs(value) >= largest + largest / (2 - eps) * eps / 2  # half a unit in the last place
            value = math.copysign(math.inf if beyond else largest, value)
        return self.xp.full((), value, dtype=dtype, device=device)

    def total(self, x: Array, axis: int | None = None) -> Array:
        """The sum of all elements, or along the last axis, exact to a few units in the last place.

        Halves are added to each other: no sum in one row, whatever the library does, is longer than _ROW.
        (torch's own sum is 5 units off for 4097 equal float64 elements.)
        """
        xp = self.xp
        x = xp.reshape(x, (-1,)) if axis is None else x
        odd = []
        while (n := x.shape[-1]) > _ROW:
            if n % 2:
                odd.append(x[..., -1:])
            x = x[..., : n // 2] + x[..., n // 2 : n - n % 2]
        return xp.sum(xp.concat([x, *odd], axis=-1) if odd else x, axis=-1)

    def scalar(self, value: Any, dtype: Any, device: Any) -> Array:
        """A number or 0-d array as a 0-d array of another dtype."""
        if isinstance(value, int | float):
            return self.full(float(value), dtype, device)
        with self.on(device):
            return self.xp.astype(self.move(self.adopt(value), device), dtype)

    def number(self, value: Any, acc: Any, device: Any) -> Measured:
        """A number or 0-d array, in or beyond the range of the accumulation dtype."""
        xp = self.xp
        wide = acc == xp.float64
        step = RANGES["float64" if wide else "float32"].step
        subnormal = isinstance(value, float) and 0 < value < sys.float_info.min  # its reciprocal is beyond float64
        if wide and not subnormal:
            return Measured(self.scalar(value, acc, device), None)
        if isinstance(value, int | float):
            root, exponent = host_split(float(value), step)
            return Measured(self.full(root, acc, device), self.full(exponent, acc, device))
        if dtype_name(value) != "float64":
            return Measured(self.scalar(value, acc, device), self.full(0.0, acc, device))
        with self.on(device):
            m, e = moderate(xp, self.move(self.adopt(value), device), step)
            return Measured(xp.astype(m, acc), xp.astype(e, acc))

    def report(self, norm: Array) -> Array:
        """A norm as the caller gets it, a 0-d array."""
        return norm

    def quotient(self, bound: Measured, norm: Measured) -> tuple[Array, Array | None]:
        """`bound / norm` as a factor and a shift."""
        return quotient(self.xp, bound, norm)

    def staged(self, plan: Callable[..., Any], arrays: Sequence[Array], all_reduce: Call | None) -> Callable[..., Any]:
        """`plan`, to be called with `arrays`, in the form that this library runs fastest."""
        return plan

    def argument(self, value: Any, acc: Any, device: Any) -> Measured:
        """A bound as `staged` takes it."""
        return self.number(value, acc, device)

    def is_traced(self, arrays: Sequence[Array]) -> bool:
        """Whether the values are not there yet, so that the host cannot read them."""
        return False

    def all_writable(self, leaves: Sequence[Array]) -> bool:
        """Whether no leaf is `unwritable`, where that is known at a glance."""
        return False

    def unwritable(self, leaf: Array) -> str:
        """Why a leaf cannot be written to; empty if it can."""
        if not array_api_compat.is_writeable_array(leaf):
            return "is a read-only array"
        if getattr(leaf, "requires_grad", False) and getattr(leaf, "is_leaf", False):
            return "is a variable that a gradient is taken for"
        strides = leaf.stride() if hasattr(leaf, "stride") else getattr(leaf, "strides", ())
        if 0 not in leaf.shape and any(s == 0 < n - 1 for n, s in zip(leaf.shape, strides or (), strict=False)):
            return "has elements that share memory (a stride of 0)"
        return ""

    def distinct(self, leaves: Sequence[Array]) -> Sequence[Array]:
        """The leaves, each only once that is there several times."""
        return list({self.shares(x): x for x in leaves}.values())

    def shares(self, leaf: Array) -> Any:
        """A key that two leaves share when they are the very same memory."""
        return id(leaf)

    # -- dtypes --------------------------------------------------------------------------------------------

    def accumulation(self, leaves: Sequence[Array]) -> Any:
        """The dtype that norms are summed and factors formed in: float64 where every device has it."""
        xp = self.xp
        for device in self.devices(leaves):
            if "float64" not in xp.__array_namespace_info__().dtypes(device=device, kind="real floating"):
                return xp.float32
        return xp.float64

    def reported(self, leaves: Sequence[Array]) -> Any:
        """The dtype of the norm: float64 if any leaf has 64-bit components, else float32."""
        wide = any(COMPONENT_BITS[name] == 64 for name in dtype_names(leaves))
        return self.xp.float64 if wide else self.xp.float32

    def is_narrow(self, leaf: Array, acc: Any) -> bool:
        """Whether squares of the leaf's elements stay in the range of `acc`."""
        return self._fits(dtype_name(leaf), acc)

    def _fits(self, dtype: str, acc: Any) -> bool:
        return dtype == "float16" if acc == self.xp.float32 else COMPONENT_BITS[dtype] < 64

    def devices(self, leaves: Sequence[Array]) -> list[Any]:
        """The devices of the leaves, in order of appearance; `[None]`, the default one, if there are none."""
        out: list[Any] = []
        for leaf in leaves:
            device = self.device(leaf)
            if device not in out:
                out.append(device)
        return out or [None]

    # -- norms ---------------------------------------------------------------------------------------------

    def parts(self, leaf: Array, acc: Any) -> Parts:
        """The real components of a leaf in the accumulation dtype."""
        xp = self.xp
        if dtype_name(leaf).startswith("complex"):
            return xp.astype(xp.real(leaf), acc), xp.astype(xp.imag(leaf), acc)
        return (xp.astype(leaf, acc),)

    def partial(self, leaf: Array, law: Law, acc: Any, seen: tuple[Array, ...]) -> Array:
        """What one leaf contributes to one pass."""
        narrow = self.is_narrow(leaf, acc)
        # In float64, what a plain sum of narrower elements loses cannot be seen in the result.
        total = self.xp.sum if narrow and acc == self.xp.float64 else self.total
        # What is seen comes from all leaves, wider ones among them.
        return law.contribute(self.xp, self.parts(leaf, acc), total, narrow and not seen, seen)

    def partials(self, leaves: Sequence[Array], law: Law, acc: Any, seen: tuple[Array, ...]) -> list[Array]:
        """What leaves on one device contribute to one pass: any number of partials."""
        return [self.partial(leaf, law, acc, seen) for leaf in leaves if 0 not in leaf.shape]

    def counted(self, partial: Array, op: ReduceOp, counts: Any) -> Array:
        """A partial where this shard counts it, else what joins without effect: selected, for 0 * NaN is NaN."""
        return partial if counts is True else self.xp.where(counts, partial, self.xp.full_like(partial, identity(op)))

    def measure(self, leaves: Sequence[Array], law: Law, acc: Any, all_reduce: Call | None) -> Measured:
        """The norm of all leaves as one vector, on the first leaf's device."""
        joined = self.joined(leaves, law, acc, all_reduce)
        # Other shards may be wide.
        narrow = all_reduce is None and all(self._fits(name, acc) for name in dtype_names(leaves))
        with self.on(self.devices(leaves)[0]):
            return law.finish(self.xp, joined, narrow)

    def joined(self, leaves: Sequence[Array], law: Law, acc: Any, all_reduce: Call | None) -> tuple[Array, ...]:
        """The joined partial of each pass of a law, on the first leaf's device."""
        devices = self.devices(leaves)
        home = devices[0]
        groups = {None: leaves} if all_reduce is None else all_reduce.groups(leaves)
        seen: tuple[Array, ...] = ()
        for op, size in zip(law.ops, law.sizes, strict=True):
            partials = []
            for device, (kind, group) in product(devices, groups.items()):
                here = group if len(devices) == 1 else [x for x in group if self.device(x) == device]
                counts = all_reduce is None or (bool(here) and all_reduce.counts(kind, here[0]))
                if counts is not False:
                    with self.on(device):
                        known = tuple(self.move(x, device) for x in seen)
                        found = [self.counted(p, op, counts) for p in self.partials(here, law, acc, known)]
                        partials += [self.move(p, home) for p in found]
            with self.on(home):
                if not partials:
                    partials = [self.xp.stack([self.full(identity(op), acc, home)] * size)]
                joined = join(self.xp, op, partials, self.total)
                seen += (joined if all_reduce is None else all_reduce(joined, op),)
        return seen

    # -- clipping ------------------------------------------------------------------------------------------

    def scale(self, leaves: Sequence[Array], factor: Array, shift: Array | None) -> list[Array]:
        """`leaf * shift * factor * shift` for every leaf: formed in the accumulation dtype, rounded once."""
        scaled = []
        by_device: dict[Any, tuple[Array, Array | None]] = {}
        for leaf in leaves:
            device = self.device(leaf)
            with self.on(device):
                if device not in by_device:
                    by_device[device] = (
                        self.move(factor, device),
                        None if shift is None else self.move(shift, device),
                    )
                scaled.append(self.scaled(leaf, *by_device[device]))
        return scaled

    def working(self, leaf: Array, acc: Any) -> Any:
        """The dtype in which a leaf is scaled: the accumulation dtype, or the complex one of its width."""
        if not dtype_name(leaf).startswith("complex"):
            return acc
        return self.xp.complex128 if acc == self.xp.float64 else self.xp.complex64

    def scaled(self, leaf: Array, factor: Array, shift: Array | None) -> Array:
        """One leaf of `scale`."""
        xp = self.xp
        acc = self.working(leaf, factor.dtype)
        product = xp.astype(leaf, acc)
        keep = factor == 1
        if shift is not None:
            product = product * xp.astype(shift, acc)
            keep = xp.logical_and(keep, shift == 1)
        live = xp.where(factor == 0, xp.ones_like(factor), factor)  # 0 * inf would warn
        product = product * xp.astype(live, acc)
        if shift is not None:
            product = product * xp.astype(shift, acc)
        product = xp.astype(product, leaf.dtype)
        return xp.where(keep, leaf, xp.where(factor == 0, xp.zeros_like(leaf), product))

    def scale_into(self, leaves: Sequence[Array], factor: Array, shift: Array | None) -> None:
        """`scale`, written back into the leaves."""
        for leaf, new in zip(leaves, self.scale(leaves, factor, shift), strict=True):
            self.write(leaf, new)

    def write(self, leaf: Array, new: Array) -> None:
        """Overwrite a leaf."""
        with self.on(self.device(leaf)):
            leaf[...] = new

    def clamped(self, leaf: Array, low: Any, high: Any) -> Array:
        """min(max(leaf, low), high), `low` None for -high. NaN stays NaN, and a NaN bound gives NaN."""
        xp = self.xp
        device = self.device(leaf)
        with self.on(device):
            upper = self.scalar(high, leaf.dtype, device)
            lower = -upper if low is None else self.scalar(low, leaf.dtype, device)
            out = xp.where(leaf < lower, lower, leaf)
            out = xp.where(out > upper, upper, out)
            if all(isinstance(bound, int | float | None) for bound in (low, high)):
                return out  # the host has seen that they are numbers
            unknown = xp.logical_or(xp.isnan(lower), xp.isnan(upper))
            return xp.where(unknown, xp.full_like(out, math.nan), out)

    # -- looking for culprits ------------------------------------------------------------------------------

    def census(self, leaf: Array) -> tuple[int, int]:
        """How many elements of a leaf are NaN, and how many are infinite. Waits for the device."""
        xp = self.xp
        with self.on(self.device(leaf)):
            nan = xp.isnan(leaf)
            inf = xp.logical_and(xp.isinf(leaf), xp.logical_not(nan))
            count = [xp.sum(xp.astype(mask, xp.int32)) for mask in (nan, inf)]
        return self.read(count[0], int), self.read(count[1], int)

    def read(self, x: Array, kind: Callable[[Array], Any]) -> Any:
        """A 0-d array as a Python number. Waits for the device."""
        return kind(x)

    def insist(self, leaf: Array, path: str) -> None:
        """Inside a trace: make the program report `leaf` if it is not finite."""
        raise NotImplementedError("this library has no traces")

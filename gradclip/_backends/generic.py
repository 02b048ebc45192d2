"""The reference backend, for any library that speaks the Python array API, and the oracle for the special ones.

A backend knows dtypes, devices, accumulation and scaling. It knows no policy: it runs the one that it is handed, and of
factors it knows that 1 leaves every bit as it is, and 0 gives zeros whatever a leaf holds. `docs/backends.md` shows a
new one, written with two methods: `partial` and `scale`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import array_api_compat

from gradclip._decide import Bounds, Verdict, decide
from gradclip._dtypes import dtype_name
from gradclip._groups import Groups
from gradclip._norms import Norm, Seen, identity
from gradclip._parts import Parts
from gradclip._scaled import RANGES, Factors, Scaled, host_split, moderate, quotient
from gradclip._types import Array, Namespace, Nonfinite, ReduceOp

_ROW = 128
_CHUNK = 1 << 16


class Backend:
    """The work on arrays of the library whose array-API namespace is `xp`. Its public methods are all that is asked."""

    def __init__(self, xp: Namespace) -> None:
        self.xp = xp
        self._xp_of_numbers = xp  # where the policy of one group is run, on 0-d numbers

    # -- arrays and numbers --------------------------------------------------------------------------------

    def adopt(self, leaves: Sequence[Array]) -> Sequence[Array]:
        """The leaves as arrays of this library."""
        return leaves

    def accumulation(self, leaves: Sequence[Array]) -> Any:
        """The dtype that norms are summed and factors formed in: float64 where every device has it."""
        xp = self.xp
        for device in {str(d): d for d in map(array_api_compat.device, leaves)}.values():
            if "float64" not in xp.__array_namespace_info__().dtypes(device=device, kind="real floating"):
                return xp.float32
        return xp.float64

    def move(self, x: Array, device: Any) -> Array:
        """A small array on another device."""
        return x if array_api_compat.device(x) == device else array_api_compat.to_device(x, device)

    def number(self, value: Any, acc: Any, device: Any) -> Scaled:
        """A float or 0-d array, in or beyond the range of `acc`; or a row of them, given as a list."""
        xp, wide = self.xp, acc == self.xp.float64
        if isinstance(value, list):
            numbers = [self.number(x, acc, device) for x in value]
            plain = all(e is None for _, e in numbers)
            exponents = None if plain else xp.stack([xp.zeros_like(m) if e is None else e for m, e in numbers])
            return Scaled(xp.stack([m for m, _ in numbers]), exponents)
        if isinstance(value, int | float):
            subnormal = 0 < value < sys.float_info.min  # its reciprocal is beyond float64
            if wide and not subnormal:
                return Scaled(self._full(value, acc, device), None)
            mantissa, exponent = host_split(float(value), RANGES["float64" if wide else "float32"].step)
            return Scaled(self._full(mantissa, acc, device), self._full(exponent, acc, device))
        with _on(device):
            value = self._here(value, device)
            if wide or dtype_name(value) != "float64":
                return Scaled(xp.astype(value, acc), None if wide else self._full(0.0, acc, device))
            m, e = moderate(xp, value, RANGES["float32"].step)
            return Scaled(xp.astype(m, acc), xp.astype(e, acc))

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

    def partials(
        self, leaves: Sequence[Array], norm: Norm, groups: Groups, join: Callable[[Array, ReduceOp], Array] | None
    ) -> Seen:
        """The partial of each pass, joined with those of other shards by `join`; None where there are no others."""
        seen: Seen = ()
        for op in norm.ops:
            found = self.partial(leaves, norm, groups, seen)
            seen += (found if join is None else join(found, op),)
        return seen

    def partial(self, leaves: Sequence[Array], norm: Norm, groups: Groups, seen: Seen) -> Array:
        """What the leaves contribute to the pass after those that were `seen`: an array (slots, groups)."""
        xp, acc, op = self.xp, self.accumulation(leaves), norm.ops[len(seen)]
        home = array_api_compat.device(leaves[0]) if leaves else None
        columns: list[list[Array]] = [[] for _ in range(groups.count)]
        for leaf, group in zip(leaves, groups.base, strict=True):
            if 0 not in leaf.shape:
                device = array_api_compat.device(leaf)
                with _on(device):
                    known = tuple(self.move(x[:, group % x.shape[1]], device) for x in seen)
                    columns[group].append(self.move(self._contribution(leaf, norm, acc, known), home))
        with _on(home):
            nothing = xp.stack([self._full(identity(op), acc, home)] * norm.slots[len(seen)])
            joined = [self._joined(column, op) if column else nothing for column in columns]
            return xp.stack(joined, axis=1) if joined else xp.zeros((len(nothing), 0), dtype=acc, device=home)

    def _contribution(self, leaf: Array, norm: Norm, acc: Any, seen: Seen) -> Array:
        """The slots of one leaf."""
        xp, op = self.xp, norm.ops[len(seen)]
        device = array_api_compat.device(leaf)
        if dtype_name(leaf).startswith("complex"):
            parts: Parts = (xp.astype(xp.real(leaf), acc), xp.astype(xp.imag(leaf), acc))
        else:
            parts = (xp.astype(leaf, acc),)
        # In float64, what a plain sum of narrower elements loses cannot be seen in the result.
        total = xp.sum if acc == xp.float64 and not norm.binned else self._total
        reduce = total if op == "sum" else getattr(xp, op)
        nothing = self._full(identity(op), acc, device)
        return xp.stack([nothing if x is None else reduce(x) for x in norm.terms(xp, parts, seen)])

    def _joined(self, column: list[Array], op: ReduceOp) -> Array:
        """What several leaves contribute to one group, as one."""
        if len(column) == 1:
            return column[0]
        table = self.xp.stack(column, axis=-1)
        return self._total(table, -1) if op == "sum" else getattr(self.xp, op)(table, axis=-1)

    def _total(self, x: Array, axis: int | None = None) -> Array:
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

    # -- the policy ----------------------------------------------------------------------------------------

    def decide(self, norm: Norm, partials: Seen, bounds: Bounds, groups: Groups, nonfinite: Nonfinite) -> Verdict:
        """Run the policy on joined partials, and divide. No partials: `bounds` tell the norms."""
        # The numbers of one group are 0-d.
        rows = tuple([x[k, 0] if groups.count == 1 else x[k, :] for k in range(x.shape[0])] for x in partials)
        wide: Any = all(groups.wide)
        if rows and len(rows[-1]) > norm.slots[-1]:  # other shards have said it
            wide = rows[-1][norm.slots[-1]] != 0
        elif any(groups.wide) and not wide:
            like = partials[-1] if partials else bounds.norm.mantissa
            wide = self.xp.asarray(groups.wide, device=array_api_compat.device(like))
        xp = self._xp_of_numbers if groups.count == 1 else self.xp
        norms = self._finish(xp, norm, rows) if rows else None
        decision = decide(xp, norms, bounds, wide, nonfinite)
        factors = self._quotient(xp, decision.numerator, decision.denominator)
        return Verdict(self._reported(decision.norm, wide, groups), factors, decision.finite, decision.joined_finite)

    def _finish(self, xp: Namespace, norm: Norm, rows: Seen) -> Scaled:
        return norm.finish(xp, rows)

    def _quotient(self, xp: Namespace, numerator: Scaled, denominator: Scaled) -> Factors:
        return quotient(xp, numerator, denominator)

    def _reported(self, norm: Array, wide: Any, groups: Groups) -> list[Array]:
        """A row of norms as one 0-d array a group, each in its own dtype, as far as that is known without a wait."""
        xp = self.xp
        dtypes = [xp.float64 if wide else xp.float32 for wide in groups.wide]
        return [xp.astype(entry(norm, i), dtype) for i, dtype in enumerate(dtypes)]

    # -- clipping ------------------------------------------------------------------------------------------

    def scale(self, leaves: Sequence[Array], factors: Factors, groups: Groups, in_place: bool) -> Sequence[Array]:
        """Every leaf times the factor of its group: formed in the accumulation dtype, rounded once.

        In place each array is scaled once, though it may be there several times.
        """
        steps: dict[Any, list[Array]] = {}
        scaled = []
        for leaf, group in zip(leaves, groups.base, strict=True):
            device = array_api_compat.device(leaf)
            with _on(device):
                place = str(device), group  # CuPy's devices have no hash
                if place not in steps:
                    steps[place] = [self.move(entry(step, group), device) for step in factors.steps]
                scaled.append(self._scaled(leaf, steps[place]))
        if in_place:
            for leaf, new in {id(x): (x, new) for x, new in zip(leaves, scaled, strict=True)}.values():
                with _on(array_api_compat.device(leaf)):
                    leaf[...] = new
        return leaves if in_place else scaled

    def _scaled(self, leaf: Array, steps: Sequence[Array]) -> Array:
        xp = self.xp
        acc = steps[0].dtype
        factor = steps[len(steps) // 2]
        if dtype_name(leaf).startswith("complex"):
            acc = xp.complex128 if acc == xp.float64 else xp.complex64
        keep = factor == 1 if len(steps) == 1 else xp.logical_and(factor == 1, steps[0] == 1)
        product = xp.astype(leaf, acc)
        for step in steps:
            product = product * xp.astype(xp.where(step == 0, xp.ones_like(step), step), acc)  # 0 * inf would warn
        product = xp.astype(product, leaf.dtype)
        return xp.where(keep, leaf, xp.where(factor == 0, xp.zeros_like(leaf), product))

    def clamp(self, leaf: Array, low: Any, high: Any) -> Array:
        """min(max(leaf, low), high), `low` None for -high. NaN stays NaN, and a NaN bound gives NaN."""
        xp = self.xp
        device = array_api_compat.device(leaf)
        with _on(device):
            upper = self._bound(high, leaf.dtype, device)
            lower = -upper if low is None else self._bound(low, leaf.dtype, device)
            out = xp.where(leaf < lower, lower, leaf)
            out = xp.where(out > upper, upper, out)
            if all(isinstance(bound, int | float | None) for bound in (low, high)):
                return out  # the host has seen that they are numbers
            unknown = xp.logical_or(xp.isnan(lower), xp.isnan(upper))
            return xp.where(unknown, xp.full_like(out, math.nan), out)

    def _bound(self, value: Any, dtype: Any, device: Any) -> Array:
        if isinstance(value, int | float):
            return self._full(float(value), dtype, device)
        return self.xp.astype(self._here(value, device), dtype)

    # -- around a call -------------------------------------------------------------------------------------

    def count_nonfinite(
        self, leaves: Sequence[Array], finite: Array, named: Callable[[int], str]
    ) -> list[tuple[int, int]] | None:
        """How many elements of each leaf are NaN, how many infinite; None if all of `finite` are true.

        Waits for the device. Where a program is traced: puts checks into it, which call leaf i `named(i)`.
        """
        if bool(self.xp.all(finite)):
            return None
        return [self._census(x) for x in leaves]

    def _census(self, leaf: Array) -> tuple[int, int]:
        """Counted in pieces, for the memory may be full."""
        xp, nans, infs = self.xp, 0, 0
        with _on(array_api_compat.device(leaf)):
            for piece in _pieces(leaf):
                nan = xp.isnan(piece)
                inf = xp.logical_and(xp.isinf(piece), xp.logical_not(nan))
                nans += int(xp.sum(xp.astype(nan, xp.int32)))
                infs += int(xp.sum(xp.astype(inf, xp.int32)))
        return nans, infs

    def session(self, leaves: Sequence[Array], in_place: bool) -> AbstractContextManager[Any]:
        """What is open around a whole call: floating-point warnings are off, for the policy answers inf and NaN."""
        numpy = sys.modules.get("numpy")
        return nullcontext() if numpy is None else numpy.errstate(all="ignore")


def _pieces(x: Array) -> list[Array]:
    """Views of at most _CHUNK elements, whatever the shape."""
    if math.prod(x.shape) <= _CHUNK:
        return [x]
    half = x.shape[0] // 2
    parts = [x[:half, ...], x[half:, ...]] if half else [x[0, ...]]
    return [piece for part in parts for piece in _pieces(part)]


def _on(device: Any) -> AbstractContextManager[Any]:
    """While open, arrays made and kernels launched belong to `device`, in libraries that have such a thing."""
    return device if hasattr(device, "use") else nullcontext()


def entry(row: Array, group: int) -> Array:
    """The number of one group, from a row or from one number for all."""
    return row[group if row.shape[0] > 1 else 0] if row.ndim else row

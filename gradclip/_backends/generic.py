"""The reference backend, for any library that speaks the Python array API, and the oracle for the special ones.

A backend knows dtypes, devices, accumulation and scaling. It knows no policy: it runs the one that it is handed, and of
factors it knows that 1 leaves every bit as it is, and 0 gives zeros whatever a leaf holds. `docs/backends.md` shows a
new one, written with two methods: `partial` and `scale`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import array_api_compat

from gradclip._backends.leaf import OneLeaf, against, columns, entries, on
from gradclip._decide import Bounds, Verdict, decide
from gradclip._dtypes import COMPONENT_BITS, dtype_name
from gradclip._groups import Groups
from gradclip._norms import Norm, Seen, identity
from gradclip._scaled import RANGES, Factors, Scaled, host_split, moderate, quotient
from gradclip._types import Array, Namespace, Nonfinite, ReduceOp


class Backend(OneLeaf):
    """The work on arrays of the library whose array-API namespace is `xp`. Its public methods are all that is asked."""

    # -- arrays and numbers --------------------------------------------------------------------------------

    def adopt(self, leaves: Sequence[Array], bounds: Sequence[Any] = ()) -> tuple[Backend, Sequence[Array]]:
        """The backend for just these leaves, given beside such bounds, and the leaves as arrays of its library."""
        return self, leaves

    def accumulation(self, leaves: Sequence[Array]) -> Any:
        """The dtype that norms are summed and factors formed in: float64 where every device has it."""
        xp = self.xp
        for device in {str(d): d for d in map(array_api_compat.device, leaves)}.values():
            if "float64" not in xp.__array_namespace_info__().dtypes(device=device, kind="real floating"):
                return xp.float32
        return xp.float64

    def bounds(self, given: Bounds, leaves: Sequence[Array]) -> Bounds:
        """What a call is given beside the gradients, as numbers that go with the leaves."""
        acc, home = self.accumulation(leaves), array_api_compat.device(leaves[0]) if leaves else None
        return Bounds(*[None if x is None else self._number(x, acc, home) for x in given])

    def _number(self, value: Any, acc: Any, device: Any) -> Scaled:
        """A float or an array, in or beyond the range of `acc`; or a row of them, given as a list."""
        xp, wide = self.xp, acc == self.xp.float64
        if isinstance(value, list):
            known = {id(x): self._number(x, acc, device) for x in value}
            numbers = [known[id(x)] for x in value]
            plain = all(e is None for _, e in numbers)
            exponents = None if plain else self._row([xp.zeros_like(m) if e is None else e for m, e in numbers])
            return Scaled(self._row([m for m, _ in numbers]), exponents)
        if isinstance(value, int | float):
            subnormal = 0 < value < sys.float_info.min  # its reciprocal is beyond float64
            if wide and not subnormal:
                return Scaled(self._full(value, acc, device), None)
            mantissa, exponent = host_split(float(value), RANGES["float64" if wide else "float32"].step)
            return Scaled(self._full(mantissa, acc, device), self._full(exponent, acc, device))
        with on(device):
            value = self._here(value, device)
            if wide or dtype_name(value) != "float64":
                value = xp.astype(value, acc)
                return Scaled(value, None if wide else xp.zeros_like(value))
            m, e = moderate(xp, value, RANGES["float32"].step)
            return Scaled(xp.astype(m, acc), xp.astype(e, acc))

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
        found: list[list[Array]] = [[] for _ in groups.shapes]
        for leaf, block, keep in zip(leaves, groups.block, groups.keep, strict=True):
            if 0 not in leaf.shape:
                device = array_api_compat.device(leaf)
                with on(device):
                    own = range(groups.lengths[block])
                    known = tuple(self.move(columns(x, groups.starts[block], len(own)), device) for x in seen)
                    found[block].append(self.move(self._contribution(leaf, keep, norm, acc, known), home))
        with on(home):
            nothing = self._row([self._full(identity(op), acc, home)] * norm.slots[len(seen)])[:, None]
            joined = [
                self._joined(column, op) if column else xp.concat([nothing] * n, axis=1)
                for column, n in zip(found, groups.lengths, strict=True)
                if n
            ]
            return xp.concat(joined, axis=1) if joined else nothing[:, :0]

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
        """Run the policy on joined partials, and divide. No partials: `bounds` tell the norms; no bounds: only norms.

        `relative`: bounds are relative to parameters, whose columns follow those of the gradients.
        """
        n = groups.count

        def rows(at: int) -> Seen:  # the numbers of one group are 0-d
            which: Any = at if n == 1 else slice(at, at + n)
            return tuple([[x[k, which] for k in range(x.shape[0])] for x in partials])

        found = rows(0)
        wide: Any = all(groups.wide)
        if found and len(found[-1]) > norm.slots[-1]:  # other shards have said it
            wide = found[-1][norm.slots[-1]] != 0
        elif any(groups.wide) and not wide:
            like = partials[-1] if partials else bounds.norm.mantissa
            wide = self.xp.asarray(groups.each_wide, device=array_api_compat.device(like))
        xp = self.xp
        norms = self._finish(xp, norm, found) if found else None
        params = self._finish(xp, norm, rows(n)) if relative else None
        return self._settled(norms, params, bounds, groups, nonfinite, wide)

    def _settled(
        self,
        norms: Scaled | None,
        params: Scaled | None,
        bounds: Bounds,
        groups: Groups,
        nonfinite: Nonfinite,
        wide: Any,
    ) -> Verdict:
        """The policy, and its division."""
        decision = decide(self.xp, norms, bounds, wide, nonfinite, params)
        factors = self._quotient(self.xp, decision.numerator, decision.denominator)
        return Verdict(self._reported(decision.norm, wide, groups), factors, decision.finite, decision.joined_finite)

    def _finish(self, xp: Namespace, norm: Norm, rows: Seen) -> Scaled:
        return norm.finish(xp, rows)

    def _quotient(self, xp: Namespace, numerator: Scaled, denominator: Scaled) -> Factors:
        return quotient(xp, numerator, denominator)

    def _reported(self, norm: Array, wide: Any, groups: Groups) -> list[Array]:
        """A row of norms as an array a block, each in its own dtype, as far as that is known without a wait."""
        xp = self.xp
        row = xp.broadcast_to(norm, (groups.count,))
        blocks = zip(groups.starts, groups.lengths, groups.shapes, groups.wide, strict=True)
        return [
            xp.astype(xp.reshape(row[start : start + n], shape), xp.float64 if wide else xp.float32)
            for start, n, shape, wide in blocks
        ]

    # -- clipping ------------------------------------------------------------------------------------------

    def scale(self, leaves: Sequence[Array], factors: Factors, groups: Groups, in_place: bool) -> Sequence[Array]:
        """Every element times the factor of its group: formed in the accumulation dtype, rounded once.

        In place each array is scaled once, though it may be there several times.
        """
        scaled = [self._scaled(leaf, steps) for leaf, steps in self._each_with_steps(leaves, factors, groups)]
        if in_place:
            for leaf, new in {id(x): (x, new) for x, new in zip(leaves, scaled, strict=True)}.values():
                with on(array_api_compat.device(leaf)):
                    leaf[...] = new
        return leaves if in_place else scaled

    def weighted_sum(self, leaves: Sequence[Array], factors: Factors, groups: Groups) -> list[Array]:
        """The sum over axis 0 of every leaf, each element times the factor of its group.

        Formed in the accumulation dtype, rounded to float32, with 64-bit components to float64. What is below the
        smallest normal number of that comes as 0: no rounding makes a single product longer than it is.
        """
        out = []
        for leaf, steps in self._each_with_steps(leaves, factors, groups):
            product = self._product(leaf, steps)
            total = self._total(self.xp.moveaxis(product, 0, -1))
            out.append(self._normal(total, wide=COMPONENT_BITS[dtype_name(leaf)] == 64))
        return out

    def _each_with_steps(
        self, leaves: Sequence[Array], factors: Factors, groups: Groups
    ) -> Iterator[tuple[Array, list[Array]]]:
        """Every leaf and what to multiply it by, in order, on its device, which is current meanwhile."""
        xp = self.xp
        known: dict[Any, list[Array]] = {}
        for leaf, block, keep in zip(leaves, groups.block, groups.keep, strict=True):
            device = array_api_compat.device(leaf)
            with on(device):
                place = str(device), block, keep, leaf.ndim  # CuPy's devices have no hash
                if place not in known:
                    shape = against(leaf, keep)
                    own = [entries(step, groups.starts[block], groups.lengths[block]) for step in factors.steps]
                    known[place] = [self.move(xp.reshape(x, shape if x.ndim else ()), device) for x in own]
                yield leaf, known[place]

    def clamp(self, leaves: Sequence[Array], pairs: Sequence[tuple[Any, Any]], in_place: bool) -> Sequence[Array]:
        """min(max(x, low), high) for each leaf with its pair, `low` None for -high; in place, one after the other.

        NaN stays NaN, and a NaN bound gives NaN.
        """
        if not in_place:
            return [self._clamped(leaf, *pair) for leaf, pair in zip(leaves, pairs, strict=True)]
        for leaf, pair in zip(leaves, pairs, strict=True):
            with on(array_api_compat.device(leaf)):
                leaf[...] = self._clamped(leaf, *pair)
        return leaves

    def _clamped(self, leaf: Array, low: Any, high: Any) -> Array:
        xp = self.xp
        device = array_api_compat.device(leaf)
        with on(device):
            upper = self._bound(high, leaf.dtype, device)
            lower = -upper if low is None else self._bound(low, leaf.dtype, device)
            out = xp.where(leaf < lower, lower, leaf)
            out = xp.where(out > upper, upper, out)
            if all(isinstance(bound, int | float | None) for bound in (low, high)):
                return out  # the host has seen that they are numbers
            unknown = xp.logical_or(xp.isnan(lower), xp.isnan(upper))
            return xp.where(unknown, xp.full_like(out, math.nan), out)

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

    def session(self, leaves: Sequence[Array], in_place: bool) -> AbstractContextManager[Any]:
        """What is open around a whole call: floating-point warnings are off, for the policy answers inf and NaN."""
        numpy = sys.modules.get("numpy")
        return nullcontext() if numpy is None else numpy.errstate(all="ignore")

"""Leaves of a program that torch traces: the reference's work in few operations, which a compiler fuses.

An operation costs time when the program is compiled, and a kernel of its own, however small, at each run. So sums are
plain ones in float64, numbers of all groups stay together until a leaf wants its own, and leaves of at most 32 bits
are multiplied in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import array_api_compat.torch as xp
import torch

from gradclip._backends.generic import Backend
from gradclip._backends.leaf import against, columns
from gradclip._dtypes import dtype_name
from gradclip._groups import Groups
from gradclip._norms import Norm, Seen, TwoNorm, identity
from gradclip._parts import Parts
from gradclip._scaled import RANGES, Factors
from gradclip._types import Array, ReduceOp

#: No sum in one row is longer, where every last place counts.
_ROW = 128

#: Dtypes whose elements are multiplied in float32.
_NARROW = ("float16", "bfloat16", "float32")

#: Beyond it, and below its reciprocal, a factor is multiplied with in three steps.
_FAR = 2.0**100

#: Where the kernels that a compiler makes are one function, and the number of them costs nothing.
_FUSED = ("cpu",)

Number: TypeAlias = Any
"""An array, or a number that the tracer knows."""


class Steps(NamedTuple):
    """What elements are multiplied by, in this order, and where they become 0 instead."""

    multipliers: tuple[Array, ...]
    zero: Array

    def each(self, change: Callable[[Array], Array]) -> Steps:
        return Steps(tuple(map(change, self.multipliers)), change(self.zero))


class TracedBackend(Backend):
    """The work on tensors that stand for those of a program's later runs. Nothing is read."""

    def __init__(self) -> None:
        super().__init__(xp)

    # -- norms ---------------------------------------------------------------------------------------------

    def partial(self, leaves: Sequence[Array], norm: Norm, groups: Groups, seen: Seen) -> Array:
        acc, op, slots = self.accumulation(leaves), norm.ops[len(seen)], range(norm.slots[len(seen)])
        home = leaves[0].device if leaves else None
        found: list[list[list[Number]]] = [[[] for _ in slots] for _ in groups.shapes]
        lengths = _lengths(leaves, norm, groups, acc)
        for j, (leaf, block, keep) in enumerate(zip(leaves, groups.block, groups.keep, strict=True)):
            if 0 not in leaf.shape:
                known = [self.move(columns(x, groups.starts[block], groups.lengths[block]), leaf.device) for x in seen]
                measured = self._measured(leaf, keep, norm, acc, tuple(known), lengths.get(j))
                for column, x in zip(found[block], measured, strict=True):
                    column.append(self.move(x, home) if isinstance(x, torch.Tensor) else x)
        blocks = [(column, n) for column, n in zip(found, groups.lengths, strict=True) if n]
        return torch.stack([_row([(self._one(x[k], op), n) for x, n in blocks], acc, home) for k in slots])

    def _measured(
        self, leaf: Array, keep: int | None, norm: Norm, acc: Any, seen: Seen, length: Array | None
    ) -> list[Number]:
        """What one leaf contributes to each slot: a number, or one for each index along the axis that is kept.

        `length`: its 2-norm where that is known. Then it counts as one element of that size.
        """
        op = norm.ops[len(seen)]
        row = leaf if keep is None else self._by_unit(leaf, keep)
        count = row.numel() if keep is None else row.shape[-1]
        parts: Parts = (row if length is None else length,)
        if length is None and row.is_complex():
            parts = (row.real, row.imag)
        known = tuple([x[k, 0] if keep is None else x[k, :, None] for k in range(x.shape[0])] for x in seen)
        exact = norm.binned or acc != torch.float64  # else what a plain sum loses cannot be seen in the result
        out: list[Number] = []
        for x in norm.terms(xp, tuple(part.to(acc) for part in parts), known):
            if isinstance(x, float):
                known_count = isinstance(count, int) or not x
                out.append(x * (count if known_count else torch.scalar_tensor(count, dtype=acc, device=row.device)))
            elif length is not None:
                out.append(x)
            elif op != "sum":
                out.append(getattr(torch, f"a{op}")(x, dim=() if keep is None else -1))
            elif exact:
                out.append(self._total(x.reshape(-1) if keep is None else x))
            else:
                out.append(torch.sum(x) if keep is None else torch.sum(x, dim=-1))
        return out

    def _one(self, numbers: list[Number], op: ReduceOp) -> Number:
        """What several leaves contribute to the same slot, as one."""
        arrays = [x for x in numbers if isinstance(x, torch.Tensor)]
        if not arrays:
            return sum(numbers) if op == "sum" else identity(op)
        if len(arrays) == 1:
            return arrays[0]
        table = torch.stack(arrays, dim=-1)
        return self._total(table) if op == "sum" else getattr(torch, f"a{op}")(table, dim=-1)

    def _total(self, x: Array) -> Array:
        while x.shape[-1] > _ROW:
            rest = -x.shape[-1] % _ROW
            x = torch.nn.functional.pad(x, (0, rest)) if rest else x
            x = torch.sum(x.reshape(*x.shape[:-1], -1, _ROW), dim=-1)
        return torch.sum(x, dim=-1)

    # -- clipping ------------------------------------------------------------------------------------------

    def scale(self, leaves: Sequence[Array], factors: Factors, groups: Groups, in_place: bool) -> Sequence[Array]:
        scaled = [_times(leaf, steps) for leaf, steps in self._with_steps(leaves, factors, groups)]
        if in_place:
            for leaf, new in zip(leaves, scaled, strict=True):  # one that is there twice gets the same twice
                leaf.copy_(new)
        return leaves if in_place else scaled

    def _with_steps(self, leaves: Sequence[Array], factors: Factors, groups: Groups) -> Iterator[tuple[Array, Steps]]:
        """Every leaf and what to multiply it by, in order."""
        by_block: dict[bool, list[Steps]] = {}
        known: dict[Any, Steps] = {}
        for leaf, block, keep in zip(leaves, groups.block, groups.keep, strict=True):
            narrow = factors.shift is None and dtype_name(leaf) in _NARROW
            place = narrow, leaf.device, block, keep, leaf.ndim
            if place not in known:
                if narrow not in by_block:
                    by_block[narrow] = _split(_narrowed(factors.factor) if narrow else _plain(factors), groups)
                known[place] = by_block[narrow][block].each(partial(self._placed, leaf, keep))
            yield leaf, known[place]

    def _placed(self, leaf: Array, keep: int | None, x: Array) -> Array:
        """The numbers of a leaf's groups, where it is, in the shape that broadcasts against it."""
        return self.move(x.reshape(against(leaf, keep)), leaf.device)

    # -- around a call -------------------------------------------------------------------------------------

    def count_nonfinite(
        self, leaves: Sequence[Array], finite: Array, named: Callable[[int], str]
    ) -> list[tuple[int, int]] | None:
        raise ValueError(
            "nonfinite='error' lets the host wait for the norm, and a program that torch compiles cannot wait: pass "
            "nonfinite='propagate' or 'zero', and look at the norm that comes back; or clip outside of torch.compile"
        )


def _lengths(leaves: Sequence[Array], norm: Norm, groups: Groups, acc: Any) -> dict[int, Array]:
    """The 2-norms of whole leaves by one kernel for many, where it is the number of kernels that counts."""
    if not isinstance(norm, TwoNorm) or norm.binned or acc != torch.float64:
        return {}
    on: dict[Any, list[int]] = {}
    for j, (leaf, keep) in enumerate(zip(leaves, groups.keep, strict=True)):
        if keep is None and leaf.device.type not in _FUSED and not leaf.is_complex() and 0 not in leaf.shape:
            on.setdefault(leaf.device, []).append(j)
    found: dict[int, Array] = {}
    for places in on.values():
        lengths = torch._foreach_norm([leaves[j] for j in places], 2, dtype=acc)
        found.update(zip(places, lengths, strict=True))
    return found


def _row(numbers: Sequence[tuple[Number, int]], dtype: Any, device: Any) -> Array:
    """The numbers of blocks in a row, each with the number of groups that it is for."""
    if all(isinstance(x, torch.Tensor) and x.ndim == 0 for x, _ in numbers) and numbers:
        return torch.stack([x for x, _ in numbers])
    if not any(isinstance(x, torch.Tensor) for x, _ in numbers) and len({x for x, _ in numbers}) < 2:
        return torch.full((sum(n for _, n in numbers),), numbers[0][0] if numbers else 0.0, dtype=dtype, device=device)
    each = [(x if isinstance(x, torch.Tensor) else torch.full((n,), x, dtype=dtype, device=device)) for x, n in numbers]
    return torch.cat([x.reshape(-1) for x in each])


def _plain(factors: Factors) -> Array:
    """What elements are multiplied by, in this order, and last, where not 0, those that become 0 instead."""
    zero = factors.factor == 0  # 0 * inf would spoil the derivative
    return torch.stack([*(torch.where(zero, 1, x) for x in factors.steps), zero.to(factors.factor.dtype)])


def _narrowed(factor: Array) -> Array:
    """A float64 factor as `_plain` gives it, in float32: so many steps that its range is no limit."""
    small, large, one = factor < 1 / _FAR, factor > _FAR, torch.ones_like(factor)
    shift = torch.where(large, _FAR, torch.where(small, 1 / _FAR, one))
    middle = factor * torch.where(large, _FAR**-2, torch.where(small, _FAR**2, one))
    middle = torch.clamp(middle, max=RANGES["float32"].largest)  # not inf: 0 * inf is NaN
    zero = middle < 2.0**-150
    # One table, for a compiler would else decide anew for each leaf.
    return torch.stack([x.to(torch.float32) for x in (shift, torch.where(zero, 1, middle), shift, zero)])


def _split(table: Array, groups: Groups) -> list[Steps]:
    """The steps of each block."""
    if table.numel() == table.shape[0]:
        *steps, zero = torch.unbind(table.reshape(-1))
        return [Steps(tuple(steps), zero != 0)] * len(groups.shapes)
    parts = torch.split(table, list(groups.lengths), dim=1)
    return [Steps(tuple(torch.unbind(x[:-1])), x[-1] != 0) for x in parts]


def _times(leaf: Array, steps: Steps) -> Array:
    """Every element times its steps, rounded once."""
    if leaf.is_complex():  # as its components: (1 + 0j) * (a + bj) is not always a + bj
        components = _times(torch.view_as_real(leaf.resolve_conj()), steps.each(lambda x: x[..., None]))
        return torch.view_as_complex(components)
    product = leaf.to(steps.multipliers[0].dtype)
    for x in steps.multipliers:
        product = product * x
    return product.masked_fill(steps.zero, 0).to(leaf.dtype)

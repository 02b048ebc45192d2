"""Plain tensors on the CPU: norms and policy by NumPy on the same memory, products by torch, which is as fast there.

torch multiplies in the threads that its user has allowed, knows bfloat16, and notes for autograd what was written to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch._utils import _flatten_dense_tensors

from gradclip._backends.leaf import against, pieces
from gradclip._backends.numpy import NumpyBackend, scaling, units
from gradclip._backends.numpy.jobs import asked
from gradclip._backends.numpy.sixteen import BITS
from gradclip._backends.torch.borrowed import BorrowedBackend
from gradclip._backends.torch.plain import may_overlap
from gradclip._decide import Bounds
from gradclip._groups import Groups
from gradclip._norms import Norm, Seen
from gradclip._scaled import Factors
from gradclip._types import Array, ReduceOp

_dtype, _is_cpu = attrgetter("dtype"), attrgetter("is_cpu")

#: Leaves of up to so many elements are little; and so many elements are strung together.
_LITTLE, _TOGETHER = 1 << 13, 1 << 17

#: As NumPy writes them.
_TYPES = {
    getattr(torch, name): np.dtype(name).str for name in ("float16", "float32", "float64", "complex64", "complex128")
} | {torch.bfloat16: BITS.str}


class _Memory:
    """A tensor's memory as NumPy takes that of others. After `Tensor.numpy()`, which takes two thirds of the time for
    float32 and as long for bfloat16, a tensor cannot be resized any more.
    """

    __slots__ = ("__array_interface__", "tensor")

    tensor: Array
    __array_interface__: dict[str, Any]


class HostBackend(BorrowedBackend):
    """The work on tensors that have NumPy arrays, bfloat16 by its bits."""

    def __init__(self) -> None:
        self._numpy = NumpyBackend()
        super().__init__(self._numpy)

    def takes(self, leaves: Sequence[Array]) -> bool:
        odd = any(map(torch.Tensor.is_conj, leaves)) or any(map(torch.Tensor.is_neg, leaves))
        return all(map(_is_cpu, leaves)) and not odd

    def array(self, x: Array) -> Array:
        if not x.numel():
            return np.empty(tuple(x.shape), _TYPES[x.dtype])
        if x.data_ptr() == 0:
            raise RuntimeError(f"a gradient of shape {tuple(x.shape)} has no memory: its storage was freed")
        memory = _Memory()
        memory.tensor = x
        memory.__array_interface__ = told = {
            "data": (x.data_ptr(), False),
            "shape": x.shape,
            "typestr": _TYPES[x.dtype],
            "version": 3,
        }
        if not x.is_contiguous():
            told["strides"] = tuple([n * x.itemsize for n in x.stride()])
        return np.asarray(memory)

    def tensor(self, x: Array) -> Array:
        return torch.from_numpy(np.asarray(x))

    def number(self, x: Array) -> Any:
        return x.detach().to("cpu", torch.float64).numpy()

    def bounds(self, given: Bounds, leaves: Sequence[Array]) -> Bounds:
        return self._numpy.bounds(Bounds(*map(self._lent, given)), ())

    def partials(
        self, leaves: Sequence[Array], norm: Norm, groups: Groups, join: Callable[[Array, ReduceOp], Array] | None
    ) -> Seen:
        if len(leaves) > 1 and groups.count == 1 and not groups.kept and len(set(map(_dtype, leaves))) == 1:
            leaves = _strung(leaves)
            groups = groups.only((0,) * len(leaves))
        return super().partials(leaves, norm, groups, join)

    def count_nonfinite(
        self, leaves: Sequence[Array], finite: Array, named: Callable[[int], str]
    ) -> list[tuple[int, int]] | None:
        return None if np.all(finite) else list(map(self._census, leaves))

    # -- clipping ------------------------------------------------------------------------------------------

    def scale(self, leaves: Sequence[Array], factors: Factors, groups: Groups, in_place: bool) -> Sequence[Array]:
        """A leaf that is not clipped comes back itself."""
        factor, shift = scaling.both(factors, groups.count)
        if in_place and may_overlap(leaves):
            return super().scale(leaves, Factors(torch.from_numpy(factor), torch.from_numpy(shift)), groups, in_place)
        if groups.count == 1 and not groups.kept and len(set(map(_dtype, leaves))) == 1:
            f, s, x = float(factor[0]), float(shift[0]), leaves[0]
            if f == s == 1:
                return leaves
            if in_place and not x.is_complex() and _is_one_step(f, s, x, groups.wide[0]):
                torch._foreach_mul_(leaves, [_as_tensor(f, x.dtype)] * len(leaves))
                return leaves
        changes = (factor != 1) | (shift != 1)
        changed, by, others = [], [], [i for i in groups.kept if changes[groups.of(i)].any()]
        whole = [i for i, axis in enumerate(groups.keep) if axis is None]
        first = [groups.base[i] for i in whole]
        for i, group, f, s in zip(whole, first, factor[first].tolist(), shift[first].tolist(), strict=True):
            if f == s == 1:
                continue
            if _is_one_step(f, s, leaves[i], groups.each_wide[group]):
                changed.append(i)
                by.append(f)
            else:
                others.append(i)
        out = list(leaves)
        if changed:
            numbers = [leaves[i] for i in changed]
            numbers = [torch.view_as_real(x) if x.is_complex() else x for x in numbers]
            if in_place:
                torch._foreach_mul_(numbers, _as_tensors(by, numbers))
            else:
                for i, x in zip(changed, torch._foreach_mul(numbers, by), strict=True):
                    out[i] = torch.view_as_complex(x) if leaves[i].is_complex() else x
        if others:
            self._others(leaves, others, factors, groups, in_place, out)
        return out

    def _others(
        self,
        leaves: Sequence[Array],
        which: Sequence[int],
        factors: Factors,
        groups: Groups,
        in_place: bool,
        out: list[Array],
    ) -> None:
        """Leaves of which an axis is kept, or whose factors are 0 or no normal numbers, or wider than they are."""
        known = [i for i in which if leaves[i].dtype is not torch.bfloat16]
        some, arrays = groups.only(known), self.arrays([leaves[i] for i in known])
        scaled = scaling.scaled(asked(arrays), factors, some, in_place, self._numpy._scaled)
        assert scaled is not None  # nothing overlaps
        for i, x in zip(known, scaled, strict=True):
            if in_place:
                torch.autograd.graph.increment_version(leaves[i])
            else:
                out[i] = torch.from_numpy(x)
        factor, shift = scaling.both(factors, groups.count)
        for i in sorted({*which}.difference(known)):
            out[i] = target = leaves[i] if in_place else torch.empty_like(leaves[i])
            at = groups.of(i)
            _multiply(leaves[i], target, factor[at], shift[at], groups.keep[i], groups.wide[groups.block[i]])


def _strung(leaves: Sequence[Array]) -> list[Array]:
    """Leaves of one dtype and one group, the little ones strung together: for 50 of 4,096 elements in 60 % of the time
    that NumPy takes, which wants an array of each.
    """
    out: list[Array] = []
    some: list[Array] = []
    room = _TOGETHER
    for x, n in zip(leaves, map(torch.numel, leaves), strict=True):
        if n > _LITTLE:
            out.append(x)
            continue
        some.append(x)
        room -= n
        if room < 0:
            out.append(_flatten_dense_tensors(some))
            some, room = [], _TOGETHER
    return [*out, _flatten_dense_tensors(some)] if some else out


def _multiply(leaf: Array, out: Array, factor: Array, shift: Array, keep: int | None, wide: bool) -> None:
    """`out` = leaf * shift * factor * shift, some at a time; zeros where the factor is 0, whatever the leaf holds."""
    if not factor.any():
        out.zero_()
        return
    usual = not wide and units.are_usual(factor, shift).all()
    numbers = [factor.astype(np.float32)] if usual else [shift, factor, shift]
    steps = [torch.from_numpy(row).reshape(against(leaf, keep)).expand(leaf.shape) for row in numbers]
    zero = not factor.all()
    for x, y, *by in zip(*map(pieces, (leaf, out, *steps)), strict=True):
        product = x.to(by[0].dtype)
        for step in by:
            product *= step
        y.copy_(product.masked_fill_(by[len(by) // 2] == 0, 0) if zero else product)


def _is_one_step(factor: float, shift: float, x: Array, wide: bool) -> bool:
    """Whether torch's product with one number is what is wanted: not if it is to be formed wider than the leaf."""
    usual = factor != factor or len(scaling.steps_of(factor, shift)) == 1
    return usual and (not wide or x.dtype in (torch.float64, torch.complex128))


def _as_tensor(number: float, dtype: Any) -> Array:
    """A number to multiply leaves by, in half the time. In place, too, it is then rounded to float32 for 16-bit leaves,
    not to these leaves' own dtype.
    """
    return torch.tensor(number, dtype=torch.float64 if dtype is torch.float64 else torch.float32, device="cpu")


def _as_tensors(numbers: Sequence[float], leaves: Sequence[Array]) -> list[Array]:
    sorts = list(zip(numbers, map(_dtype, leaves), strict=True))
    known = {sort: _as_tensor(*sort) for sort in set(sorts)}
    return [known[sort] for sort in sorts]

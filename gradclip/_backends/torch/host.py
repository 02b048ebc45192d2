"""Plain tensors on the CPU: norms and policy by NumPy on the same memory, products by torch, which is as fast there.

torch multiplies in the threads that its user has allowed, knows bfloat16, and notes for autograd what was written to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from gradclip._backends.leaf import against, pieces
from gradclip._backends.numpy import NumpyBackend, scaling
from gradclip._backends.numpy.jobs import asked
from gradclip._backends.numpy.sixteen import BITS
from gradclip._backends.torch.borrowed import BorrowedBackend
from gradclip._backends.torch.plain import may_overlap
from gradclip._decide import Bounds
from gradclip._groups import Groups
from gradclip._scaled import Factors
from gradclip._types import Array

_dtype = attrgetter("dtype")

#: Within these a factor is one step, in float32 too.
_LEAST, _MOST = 2.0**-126, 2.0**126


#: As NumPy writes them.
_TYPES = {
    getattr(torch, name): np.dtype(name).str for name in ("float16", "float32", "float64", "complex64", "complex128")
} | {torch.bfloat16: BITS.str}


class _Memory:
    """A tensor's memory as NumPy takes that of others. After `Tensor.numpy()`, which takes two thirds of the time for
    float32 and as long for bfloat16, a tensor cannot be resized any more.
    """

    __slots__ = ("__array_interface__", "tensor")

    def __init__(self, x: Array) -> None:
        address = x.data_ptr()
        if address == 0 and x.numel():
            raise RuntimeError(f"a gradient of shape {tuple(x.shape)} has no memory: its storage was freed")
        strides = None if x.is_contiguous() else tuple([n * x.itemsize for n in x.stride()])
        self.tensor = x
        self.__array_interface__ = {
            "data": (address, False),
            "shape": tuple(x.shape),
            "strides": strides,
            "typestr": _TYPES[x.dtype],
            "version": 3,
        }


class HostBackend(BorrowedBackend):
    """The work on tensors that have NumPy arrays, bfloat16 by its bits."""

    def __init__(self) -> None:
        self._numpy = NumpyBackend()
        super().__init__(self._numpy)

    def takes(self, x: Array) -> bool:
        return x.is_cpu and not (x.is_conj() or x.is_neg())

    def array(self, x: Array) -> Array:
        return np.asarray(_Memory(x))

    tensor = staticmethod(torch.from_numpy)

    def number(self, x: Array) -> Any:
        return x.detach().to("cpu", torch.float64).numpy()

    def bounds(self, given: Bounds, leaves: Sequence[Array]) -> Bounds:
        return self._numpy.bounds(Bounds(*map(self._lent, given)), ())

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
        changes = (factor != 1) | (shift != 1)
        changed, by, others = [], [], [i for i in groups.kept if changes[groups.of(i)].any()]
        whole = [i for i, axis in enumerate(groups.keep) if axis is None]
        first = [groups.base[i] for i in whole]
        for i, group, f, s in zip(whole, first, factor[first].tolist(), shift[first].tolist(), strict=True):
            if f == s == 1:
                continue
            if (f != f or (s == 1 and _LEAST <= f <= _MOST)) and not _wider(leaves[i], groups, group):
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
            at, wide = groups.of(i), _wider(leaves[i], groups, groups.base[i])
            _multiply(leaves[i], target, factor[at], shift[at], groups.keep[i], wide)


def _multiply(leaf: Array, out: Array, factor: Array, shift: Array, keep: int | None, wide: bool) -> None:
    """`out` = leaf * shift * factor * shift, some at a time; zeros where the factor is 0, whatever the leaf holds."""
    if not factor.any():
        out.zero_()
        return
    usual = not wide and bool(((shift == 1) & (factor >= _LEAST) & (factor <= _MOST)).all())
    numbers = [factor.astype(np.float32)] if usual else [shift, factor, shift]
    steps = [torch.from_numpy(row).reshape(against(leaf, keep)).expand(leaf.shape) for row in numbers]
    zero = not factor.all()
    for x, y, *by in zip(*map(pieces, (leaf, out, *steps)), strict=True):
        product = x.to(by[0].dtype)
        for step in by:
            product *= step
        y.copy_(product.masked_fill_(by[len(by) // 2] == 0, 0) if zero else product)


def _as_tensors(numbers: Sequence[float], leaves: Sequence[Array]) -> list[Array]:
    """Numbers to multiply leaves by, in half the time. In place, too, they are then rounded to float32 for 16-bit
    leaves, not to these leaves' own dtype.
    """
    known = {
        sort: torch.tensor(sort[0], dtype=torch.float64 if sort[1] is torch.float64 else torch.float32)
        for sort in set(zip(numbers, map(_dtype, leaves), strict=True))
    }
    return [known[sort] for sort in zip(numbers, map(_dtype, leaves), strict=True)]


def _wider(x: Array, groups: Groups, group: int) -> bool:
    """Whether its product is to be formed wider than torch would: the group's norm is float64."""
    return True in groups.wide and groups.each_wide[group] and x.dtype not in (torch.float64, torch.complex128)

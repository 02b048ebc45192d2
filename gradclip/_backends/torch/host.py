"""Plain tensors on the CPU: norms and policy by NumPy on the same memory, products by torch, which is as fast there.

torch multiplies in the threads that its user has allowed, knows bfloat16, and notes for autograd what was written to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from operator import attrgetter
from typing import Any

import array_api_compat.torch as xp
import numpy as np
import torch

from gradclip._backends.generic import Backend
from gradclip._backends.leaf import against, pieces
from gradclip._backends.numpy import NumpyBackend, scaling
from gradclip._backends.numpy.jobs import Leaves
from gradclip._backends.numpy.sixteen import BITS
from gradclip._decide import Bounds, Verdict
from gradclip._groups import Groups
from gradclip._norms import Norm, Seen
from gradclip._scaled import Factors
from gradclip._types import Array, Nonfinite, ReduceOp

_dtype, _nbytes = attrgetter("dtype"), attrgetter("nbytes")

#: Within these a factor is one step, in float32 too.
_LEAST, _MOST = 2.0**-126, 2.0**126


class Tensors(list[Any]):
    """Tensors, and what NumPy sees of each: bfloat16 by its bits."""

    def __init__(self, tensors: Sequence[Array], arrays: Sequence[Array]) -> None:
        super().__init__(tensors)
        self.arrays = Leaves(arrays)


class HostBackend(Backend):
    """The work on tensors that `tensors` takes."""

    def __init__(self) -> None:
        super().__init__(xp)
        self._numpy = NumpyBackend()

    def tensors(self, leaves: Sequence[Array]) -> Tensors | None:
        """The leaves with their arrays; None if one has none: it is elsewhere, or its elements are told otherwise."""
        if not torch.is_grad_enabled():
            leaves = [x.detach() if x.requires_grad else x for x in leaves]
        try:
            if torch.bfloat16 in set(map(_dtype, leaves)):
                return Tensors(leaves, list(map(_array, leaves)))
            return Tensors(leaves, list(map(torch.Tensor.numpy, leaves)))
        except (TypeError, RuntimeError):
            return None

    def accumulation(self, leaves: Sequence[Array]) -> Any:
        return xp.float64

    def bounds(self, given: Bounds, leaves: Sequence[Array]) -> Bounds:
        return self._numpy.bounds(Bounds(*map(_on_host, given)), leaves)

    # -- norms and policy ----------------------------------------------------------------------------------

    def partials(
        self, leaves: Sequence[Array], norm: Norm, groups: Groups, join: Callable[[Array, ReduceOp], Array] | None
    ) -> Seen:
        def joined(partial: Array, op: ReduceOp) -> Array:
            assert join is not None
            return _on_host(join(torch.from_numpy(partial), op))

        return self._numpy.partials(_arrays(leaves), norm, groups, None if join is None else joined)

    def decide(
        self,
        norm: Norm,
        partials: Seen,
        bounds: Bounds,
        groups: Groups,
        nonfinite: Nonfinite,
        relative: bool = False,
    ) -> Verdict:
        verdict = self._numpy.decide(norm, partials, bounds, groups, nonfinite, relative)
        return verdict._replace(norms=list(map(torch.from_numpy, verdict.norms)))

    def count_nonfinite(
        self, leaves: Sequence[Array], finite: Array, named: Callable[[int], str]
    ) -> list[tuple[int, int]] | None:
        return None if np.all(finite) else list(map(self._census, leaves))

    # -- clipping ------------------------------------------------------------------------------------------

    def scale(self, leaves: Sequence[Array], factors: Factors, groups: Groups, in_place: bool) -> Sequence[Array]:
        """A leaf that is not clipped comes back itself."""
        factor, shift = scaling.both(factors, groups.count)
        if in_place and _overlap(leaves):
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
        some, arrays = groups.only(known), _arrays([leaves[i] for i in known])
        scaled = scaling.scaled(arrays, factors, some, in_place, self._numpy._scaled)
        assert scaled is not None  # nothing overlaps
        for i, x in zip(known, scaled, strict=True):
            if in_place:
                torch.autograd.graph.increment_version(leaves[i])
            else:
                out[i] = torch.from_numpy(x)
        rows = Factors(*scaling.both(factors, groups.count)).steps
        for i in sorted({*which}.difference(known)):
            x, at, keep = leaves[i], groups.of(i), groups.keep[i]
            out[i] = target = x if in_place else torch.empty_like(x)
            steps = [torch.from_numpy(row[at]).reshape(against(x, keep)).expand(x.shape) for row in rows]
            for piece, to, *some_steps in zip(*map(pieces, (x, target, *steps)), strict=True):
                to.copy_(self._scaled(piece, some_steps))

    def weighted_sum(self, leaves: Sequence[Array], factors: Factors, groups: Groups) -> list[Array]:
        return list(map(torch.from_numpy, self._numpy.weighted_sum(_arrays(leaves), factors, groups)))

    def clamp(self, leaves: Sequence[Array], pairs: Sequence[tuple[Any, Any]], in_place: bool) -> Sequence[Array]:
        return [self._limited(x, *pair, x if in_place else None) for x, pair in zip(leaves, pairs, strict=True)]

    def _limited(self, leaf: Array, low: Any, high: Any, out: Array | None) -> Array:
        upper = self._bound(high, leaf.dtype, leaf.device)
        lower = -upper if low is None else self._bound(low, leaf.dtype, leaf.device)
        if upper.ndim == lower.ndim == 0 and not (upper.isnan() or lower.isnan()):
            upper, lower = upper.item(), lower.item()  # in half the time
        return torch.clamp(leaf, lower, upper, out=out)


def _array(x: Array) -> Array:
    return x.view(torch.int16).numpy().view(BITS) if x.dtype is torch.bfloat16 else x.numpy()


def _arrays(leaves: Sequence[Array]) -> Leaves:
    return leaves.arrays if isinstance(leaves, Tensors) else Leaves(map(_array, leaves))


def _on_host(x: Any) -> Any:
    """A tensor as NumPy's float64, in a list of bounds, too; anything else as it is."""
    if isinstance(x, list):
        return list(map(_on_host, x))
    return x.detach().to("cpu", torch.float64).numpy() if isinstance(x, torch.Tensor) else x


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


def _overlap(leaves: Sequence[Array]) -> bool:
    """Whether two elements may share memory."""
    arrays = _arrays(leaves)
    if not all(map(torch.Tensor.is_contiguous, leaves)):
        return scaling.overlap(arrays)
    spans = sorted(zip(map(torch.Tensor.data_ptr, leaves), map(_nbytes, arrays), strict=True))
    return any(start + n > other for (start, n), (other, _) in pairwise(spans))

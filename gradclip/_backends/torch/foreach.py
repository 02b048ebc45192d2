"""CUDA tensors without CuPy: one launch for many norms, by `torch._foreach_norm`, and one for each leaf's product.

Sums are made, and products formed, in float64: torch's kernels widen and round as they read and write, so that nothing
is copied. The host never waits. Never run on a GPU: tested with tensors on the CPU and on the `meta` device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gradclip._backends.torch.plain import PlainBackend, may_overlap
from gradclip._decide import Bounds, Verdict, may_blank
from gradclip._groups import Groups
from gradclip._norms import ExtremeNorm, Norm, OneNorm, RmsNorm, Seen, TwoNorm
from gradclip._scaled import Factors
from gradclip._types import Array, Nonfinite


class _Zeros(Factors):
    """Factors that may be 0 where an element is not finite: to multiply would give NaN."""


class ForeachBackend(PlainBackend):
    """The work on plain tensors, by torch alone."""

    def partial(self, leaves: Sequence[Array], norm: Norm, groups: Groups, seen: Seen) -> Array:
        p = _order(norm)
        if norm.binned or p is None or groups.kept or not leaves or 0 in map(torch.numel, leaves):
            return super().partial(leaves, norm, groups, seen)
        if len(set(map(_device, leaves))) > 1 or any(map(torch.is_complex, leaves)):
            return super().partial(leaves, norm, groups, seen)
        each = torch.stack(torch._foreach_norm(list(leaves), p, dtype=torch.float64))
        if groups.count == len(leaves) and groups.base == tuple(range(len(leaves))):
            found = each
        else:
            members: list[list[Array]] = [[] for _ in range(groups.count)]
            for x, group in zip(each.unbind(), groups.base, strict=True):
                members[group].append(x)
            found = torch.stack([_joined(torch.stack(x), p) if x else each.new_zeros(()) for x in members])
        zero = torch.zeros_like(found)
        if p != torch.inf:
            return torch.stack([zero, found * found if p == 2 else found, zero])
        bad = torch.where(found.isnan(), 2.0, torch.where(found.isinf(), 1.0, zero))
        return torch.stack([torch.where(bad > 0, zero, found), zero, bad])

    def decide(
        self,
        norm: Norm,
        partials: Seen,
        bounds: Bounds,
        groups: Groups,
        nonfinite: Nonfinite,
        relative: bool = False,
    ) -> Verdict:
        verdict = super().decide(norm, partials, bounds, groups, nonfinite, relative)
        if may_blank(nonfinite, not partials):
            return verdict._replace(factors=_Zeros(*verdict.factors))
        return verdict

    def scale(self, leaves: Sequence[Array], factors: Factors, groups: Groups, in_place: bool) -> Sequence[Array]:
        """In place, and else into new leaves, with nothing beside them."""
        complex_or_scaled = factors.shift is not None or any(map(torch.is_complex, leaves))
        if complex_or_scaled or (in_place and may_overlap(leaves)):
            return super().scale(leaves, factors, groups, in_place)
        out = []
        for leaf, (step,) in self._each_with_steps(leaves, factors, groups):
            by = step if step.ndim or not leaf.ndim else step.reshape(1)  # 0-d, it would take the leaf's dtype
            out.append(torch.mul(leaf, by, out=leaf if in_place else torch.empty_like(leaf)))
            if isinstance(factors, _Zeros):
                out[-1].masked_fill_(step == 0, 0)
        return leaves if in_place else out


def _device(x: Array) -> Any:
    return x.device


def _order(norm: Norm) -> float | None:
    """p, where the norm of norms is the norm, and torch has it for many tensors at once."""
    if isinstance(norm, RmsNorm):
        return None
    if isinstance(norm, ExtremeNorm):
        return torch.inf if norm.ops == ("max",) else None
    return 2.0 if isinstance(norm, TwoNorm) else 1.0 if isinstance(norm, OneNorm) else None


def _joined(norms: Array, p: float) -> Array:
    return norms.amax() if p == torch.inf else torch.linalg.vector_norm(norms, p)

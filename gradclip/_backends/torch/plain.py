"""Plain tensors, which nobody traces or differentiates: what is done to them alike, wherever they are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from operator import add, attrgetter, le
from typing import Any

import array_api_compat.torch as xp
import torch

from gradclip._backends.generic import Backend
from gradclip._backends.numpy.scaling import folds
from gradclip._types import Array

_nbytes = attrgetter("nbytes")


class PlainBackend(Backend):
    """The work on plain tensors."""

    def __init__(self) -> None:
        super().__init__(xp)

    def tensors(self, leaves: Sequence[Array]) -> Sequence[Array] | None:
        """The leaves as it takes them; None if it does not."""
        return values(leaves)

    def accumulation(self, leaves: Sequence[Array]) -> Any:
        return xp.float64

    def clamp(self, leaves: Sequence[Array], pairs: Sequence[tuple[Any, Any]], in_place: bool) -> Sequence[Array]:
        return [self._limited(x, *pair, x if in_place else None) for x, pair in zip(leaves, pairs, strict=True)]

    def _limited(self, leaf: Array, low: Any, high: Any, out: Array | None) -> Array:
        if isinstance(high, int | float) and isinstance(low, int | float | None):  # in half the time of tensors
            upper = _rounded(high, leaf.dtype)
            lower = -upper if low is None else _rounded(low, leaf.dtype)
        else:
            upper = self._bound(high, leaf.dtype, leaf.device)
            lower = -upper if low is None else self._bound(low, leaf.dtype, leaf.device)
        return torch.clamp(leaf, lower, upper) if out is None else torch.clamp_(out, lower, upper)


@lru_cache(64)
def _rounded(bound: float, dtype: Any) -> float:
    """A bound as that dtype has it. (`torch.tensor` refuses one beyond the dtype's range.)"""
    return float(torch.tensor(bound, dtype=torch.float64, device="cpu").to(dtype))


def values(leaves: Sequence[Array]) -> Sequence[Array]:
    """Tensors without the graph of their derivatives, where none are recorded."""
    return leaves if torch.is_grad_enabled() else [x.detach() if x.requires_grad else x for x in leaves]


def may_overlap(leaves: Sequence[Array]) -> bool:
    """Whether two elements may share memory: of two leaves, as their first and last bytes say, or of one."""
    held = [x for x in leaves if x.numel()]
    whole = all(map(torch.Tensor.is_contiguous, held))
    spans = sorted(zip(map(torch.Tensor.data_ptr, held), map(_nbytes if whole else _span, held), strict=True))
    starts, sizes = zip(*spans, strict=True) if spans else ((), ())
    apart = all(map(le, map(add, starts, sizes), starts[1:]))
    return not apart or (not whole and any(folds(x.stride(), x.shape, 1) for x in held))


def _span(x: Array) -> int:
    """The bytes from its first element to its last, that among them."""
    return x.itemsize * (1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)))

"""Plain tensors as another library's arrays, on the same memory: norms and the policy are that library's backend's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gradclip._backends.generic import Backend
from gradclip._backends.torch.plain import PlainBackend, values
from gradclip._decide import Bounds, Verdict
from gradclip._groups import Groups
from gradclip._norms import Norm, Seen
from gradclip._scaled import Factors
from gradclip._types import Array, Nonfinite, ReduceOp


class Tensors(list[Any]):
    """Tensors, and the array of each, made when it is wanted."""

    arrays: Sequence[Array] | None = None


class BorrowedBackend(PlainBackend):
    """The work on tensors that have arrays of the library whose backend is `lender`."""

    def __init__(self, lender: Backend) -> None:
        super().__init__()
        self.lender = lender

    def takes(self, leaves: Sequence[Array]) -> bool:
        """Whether tensors have arrays: they are there, of dtypes known there, and are read as they lie in memory."""
        raise NotImplementedError

    def array(self, x: Array) -> Array:
        """A tensor as an array."""
        raise NotImplementedError

    def tensor(self, x: Array) -> Array:
        """An array as a tensor."""
        raise NotImplementedError

    def number(self, x: Array) -> Any:
        """A bound that is a tensor, or partials that were joined, as the lender takes them."""
        raise NotImplementedError

    def tensors(self, leaves: Sequence[Array]) -> Tensors | None:
        """The leaves with their arrays; None if one has none."""
        found = Tensors(values(leaves))
        return found if self.takes(found) else None

    def arrays(self, leaves: Sequence[Array]) -> Sequence[Array]:
        """The arrays of tensors, as the lender adopts them."""
        known = leaves.arrays if isinstance(leaves, Tensors) else None
        arrays = known or self.lender.adopt(list(map(self.array, leaves)))[1]
        if isinstance(leaves, Tensors):
            leaves.arrays = arrays
        return arrays

    def move(self, x: Array, device: Any) -> Array:
        """A small array, the lender's too."""
        return super().move(x if isinstance(x, torch.Tensor) else self.tensor(x), device)

    def bounds(self, given: Bounds, leaves: Sequence[Array]) -> Bounds:
        return self.lender.bounds(Bounds(*map(self._lent, given)), self.arrays(leaves))

    def _lent(self, given: Any) -> Any:
        if isinstance(given, list):
            return list(map(self._lent, given))
        return self.number(given) if isinstance(given, torch.Tensor) else given

    def partials(
        self, leaves: Sequence[Array], norm: Norm, groups: Groups, join: Callable[[Array, ReduceOp], Array] | None
    ) -> Seen:
        def joined(partial: Array, op: ReduceOp) -> Array:
            assert join is not None
            return self._lent(join(self.tensor(partial), op))

        return self.lender.partials(self.arrays(leaves), norm, groups, None if join is None else joined)

    def decide(
        self,
        norm: Norm,
        partials: Seen,
        bounds: Bounds,
        groups: Groups,
        nonfinite: Nonfinite,
        relative: bool = False,
    ) -> Verdict:
        verdict = self.lender.decide(norm, partials, bounds, groups, nonfinite, relative)
        return verdict._replace(norms=list(map(self.tensor, verdict.norms)))

    def weighted_sum(self, leaves: Sequence[Array], factors: Factors, groups: Groups) -> list[Array]:
        return list(map(self.tensor, self.lender.weighted_sum(self.arrays(leaves), factors, groups)))

    def count_nonfinite(
        self, leaves: Sequence[Array], finite: Array, named: Callable[[int], str]
    ) -> list[tuple[int, int]] | None:
        return self.lender.count_nonfinite(self.arrays(leaves), finite, named)

"""The exceptions that gradclip raises beside ValueError and TypeError."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_SHOWN = 10


class LeafError(TypeError):
    """A leaf is not an array that can be clipped. The message names its key path and the repair."""


class Culprit(NamedTuple):
    """A leaf that holds non-finite elements."""

    path: str
    description: str
    nans: int
    infs: int


class NonFiniteError(FloatingPointError, RuntimeError):
    """The gradients hold inf or NaN, and the caller asked for an error.

    It is a `RuntimeError` too, so that code written for PyTorch's `error_if_nonfinite=True` catches it.

    Attributes
    ----------
    culprits : tuple of Culprit
        The bad leaves: key path, dtype and shape, how many NaN, how many inf.
    """

    def __init__(self, norm: str, culprits: Sequence[Culprit], hint: str = "") -> None:
        self.culprits = tuple(culprits)
        lines = [f"the gradients are not finite: their global norm is {norm}"]
        for c in self.culprits[:_SHOWN]:
            lines.append(f"  {c.path} ({c.description}): {c.nans} NaN, {c.infs} inf")
        if len(self.culprits) > _SHOWN:
            lines.append(f"  and {len(self.culprits) - _SHOWN} more leaves")
        if hint:
            lines.append(f"  {hint}")
        lines.append(
            "Nothing was changed. Skip this step, lower the loss scale or the learning rate, "
            "or pass nonfinite='zero' or nonfinite='propagate'."
        )
        super().__init__("\n".join(lines))

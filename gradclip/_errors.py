"""The exceptions that gradclip raises beside ValueError and TypeError, and how it warns."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

_SHOWN = 10


class LeafError(TypeError):
    """A leaf is not an array that can be clipped. The message names its key path and the repair."""


class Culprit(NamedTuple):
    """A leaf that holds non-finite elements: its key path, dtype and shape, and how many NaN and inf there are."""

    path: str
    description: str
    nans: int
    infs: int


def described(culprits: Sequence[Culprit]) -> list[str]:
    """The first of them, a line each."""
    return _first([f"  {c.path} ({c.description}): {c.nans} NaN, {c.infs} inf" for c in culprits], "leaves")


def _first(entries: list[str], what: str) -> list[str]:
    more = len(entries) - _SHOWN
    return [*entries[:_SHOWN], f"  and {more} more {what}"] if more > 0 else entries


class NonFiniteError(FloatingPointError, RuntimeError):
    """The gradients hold inf or NaN, and the caller asked for an error.

    It is a `RuntimeError` too, so that code written for PyTorch's `error_if_nonfinite=True` catches it.

    Attributes
    ----------
    culprits : tuple of Culprit
        The bad leaves: key path, dtype and shape, how many NaN, how many inf. With shards, those of this shard;
        the message tells the others'.
    """

    def __init__(self, norm: str, culprits: Sequence[Culprit], hint: str = "", shards: Sequence[str] = ()) -> None:
        self.culprits = tuple(culprits)
        self._given = norm, self.culprits, hint, tuple(shards)
        of, indented = f"of {len(shards)}:\n  ", [text.replace("\n", "\n  ") for text in shards]
        ranks = [f"  rank {rank} {of}{text}" for rank, text in enumerate(indented) if text]
        lines = [
            f"the gradients are not finite: {norm}",
            *(_first(ranks, "ranks") if shards else described(culprits)),
            *([f"  {hint}"] if hint else []),
            "Nothing was changed. Skip this step, lower the loss scale or the learning rate, "
            "or pass nonfinite='zero' or nonfinite='propagate'.",
        ]
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._given


def warn(message: str) -> None:
    """A UserWarning that shows the line which called gradclip, however deep inside it arises."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == __name__.split(".")[0]:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)

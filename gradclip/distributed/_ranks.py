"""What engines over numbered ranks share: leaves of which all ranks hold copies count on rank 0."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from gradclip._types import Array, Engine, Leaf, Tree


class Ranks(Engine):
    """The kind of a leaf: whether all ranks hold copies of it."""

    telling = "replicated"

    def __init__(self, comm: Any, replicated: Tree, rank: int) -> None:
        self.comm, self.told, self.rank = comm, replicated, rank

    def kind(self, leaf: Leaf, told: Any) -> Hashable:
        if not isinstance(told, bool | None):
            raise TypeError(f"replicated says {told!r} of {leaf.path}: it must be True, False or None (False)")
        return bool(told)

    def counts(self, kind: Hashable, like: Array) -> bool:
        return not kind or self.rank == 0

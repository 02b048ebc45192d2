"""What engines over numbered ranks share: leaves of which all ranks hold copies count on rank 0; what all agree on."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NoReturn
from zlib import crc32

from gradclip._types import Array, Call, Engine, Leaf, ReduceOp, Tree

#: What ranks that join must mean alike, in the order of `head`.
AGREED = ("norm_type", "nonfinite", "operation", "bits of the accumulation", "groups")
OPS: tuple[ReduceOp, ...] = ("sum", "max", "min")


def head(op: ReduceOp, call: Call, bits: int, size: int) -> tuple[float, ...]:
    """The numbers that a message of `size` ones begins with: the same on all ranks that mean the same."""
    norm_type, groups = (crc32(text.encode()) for text in (str(call.norm_type), f"{call.groups}: {size}"))
    return norm_type, call.nonfinite == "error", OPS.index(op), bits, groups


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

    def refuse(self, split: Sequence[int], op: ReduceOp, call: Call, bits: int) -> NoReturn:
        """Raise ValueError, on all ranks, that names what each of them means; `split`: where their heads differ."""
        policy = "'error'" if call.nonfinite == "error" else "another policy"
        told = str(call.norm_type).removesuffix(".0"), policy, op, str(bits), call.groups
        said = self.gather(", ".join(told[i] for i in split))
        wrong = " and ".join(AGREED[i] for i in split)
        ranks = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(said[:16]))
        raise ValueError(f"the ranks do not agree on {wrong}, and nothing was clipped: {ranks}")

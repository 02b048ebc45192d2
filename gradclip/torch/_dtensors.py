"""DTensors, as FSDP2 and tensor parallelism make them: each rank's parts, and what joins them over their mesh.

Torch can flatten a DTensor only where its axis is divided evenly, and joins each of them apart. Here each rank measures
and scales its own parts, and one collective for each axis of the mesh that shards joins a few numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate

from gradclip._types import Array, Call, Engine, Leaf, ReduceOp


class Mesh(Engine):
    """The kind of a leaf: over which axes of the mesh it is sharded. Along the others, ranks of index 0 count it."""

    telling = "placements"
    same_program = True  # all ranks hold a part of each DTensor

    def __init__(self, mesh: Any, sharded: list[frozenset[int] | None]) -> None:
        self.mesh, self.told = mesh, sharded
        self.axes = sorted(frozenset().union(*(axes for axes in sharded if axes is not None)))

    def kind(self, leaf: Leaf, told: frozenset[int]) -> frozenset[int]:
        return told

    def counts(self, kind: Any, like: Array) -> bool:
        here = self.mesh.get_coordinate()
        return all(here[axis] == 0 for axis in self.axes if axis not in kind)

    def join(self, partial: Array, op: ReduceOp, call: Call) -> Array:
        joined = torch.as_tensor(partial).clone(memory_format=torch.contiguous_format)
        for axis in self.axes:
            dist.all_reduce(joined, getattr(dist.ReduceOp, op.upper()), group=self.mesh.get_group(axis))
        return joined.numpy() if isinstance(partial, np.ndarray) else joined

    def gather(self, text: str) -> list[str]:
        texts = [text]
        for axis in reversed(self.axes):  # the last one changes first, as the ranks of a mesh are numbered
            parts: list[Any] = [None] * self.mesh.size(axis)
            dist.all_gather_object(parts, texts, group=self.mesh.get_group(axis))
            texts = [text for part in parts for text in part]
        return texts

    def whole(self, bound: Any) -> Any:
        """A bound or a norm that may be a DTensor, for what works on parts."""
        return _each(bound, lambda x: x.full_tensor() if isinstance(x, DTensor) else x)

    def back(self, norm: Any) -> Any:
        """A norm as torch gives it: a DTensor that every rank holds whole."""
        everywhere = [Replicate()] * self.mesh.ndim
        return _each(norm, lambda x: DTensor.from_local(x, self.mesh, everywhere, run_check=False))


def parts(tensors: list[Any]) -> tuple[list[Any], Mesh | None]:
    """This rank's parts, in the memory of the DTensors, and their mesh. Those that are sums yet to be made, that lie on
    several meshes or stand beside plain tensors come back as they are, without a mesh.
    """
    found = [x for x in tensors if x is not None]
    if not all(isinstance(x, DTensor) and x.device_mesh == found[0].device_mesh for x in found):
        return tensors, None
    if any(placement.is_partial() for x in found for placement in x.placements):
        return tensors, None
    sharded = [None if x is None else _sharded(x) for x in tensors]
    return [None if x is None else x.to_local() for x in tensors], Mesh(found[0].device_mesh, sharded)


def _sharded(x: Any) -> frozenset[int]:
    return frozenset(axis for axis, placement in enumerate(x.placements) if not placement.is_replicate())


def _each(given: Any, change: Callable[[Any], Any]) -> Any:
    """The same form of norms, each changed."""
    if isinstance(given, list):
        return [_each(x, change) for x in given]
    if isinstance(given, dict):
        return {label: _each(x, change) for label, x in given.items()}
    return None if given is None else change(given)

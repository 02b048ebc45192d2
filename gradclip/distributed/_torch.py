"""torch.distributed: the ranks' partials in one collective, in a message that also shows whether they mean the same."""

from __future__ import annotations

from collections.abc import Hashable
from functools import reduce
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from gradclip._types import Array, Call, Leaf, ReduceOp, Tree
from gradclip.distributed._ranks import AGREED, Ranks, head

#: A message: what all ranks must agree on, then the partial, if there is room. Its length depends on how many ranks
#: there are alone, so ranks that differ are still able to say so. To gloo 1,024 numbers take hardly longer than 5.
_START, _LEAST, _MOST, _TOGETHER = len(AGREED), 64, 1024, 2**16

_JOIN = {"sum": np.add, "max": np.maximum, "min": np.minimum}

#: What the ranks of a group were found to agree on: the same on all of them.
_agreed: WeakKeyDictionary[Any, set[tuple[Any, ...]]] = WeakKeyDictionary()


class Torch(Ranks):
    """See `gradclip.distributed.torch`."""

    def __init__(self, group: Any, replicated: Tree) -> None:
        group = _group(group)
        super().__init__(group, replicated, dist.get_rank(group))
        self.device = _device(dist.get_backend_config(group))
        self.asks_once = self.device != "cpu"  # to read what a device has gathered is to wait for it

    def kind(self, leaf: Leaf, told: Any) -> Hashable:
        if hasattr(leaf.value, "to_local"):
            raise TypeError(
                f"{leaf.path} is a DTensor, which is joined over its own mesh, and torch joins local tensors: "
                "pass x.to_local() of each, or no all_reduce"
            )
        return super().kind(leaf, told)

    def join(self, partial: Array, op: ReduceOp, call: Call) -> Array:
        mine = self._moved(partial)
        what = op, call, mine.dtype, mine.numel()
        known = _agreed.setdefault(self.comm, set()) if self.asks_once else set()
        if what not in known and not _captures(mine):
            said = self._said(mine, op, call)
            known.add(what)
            if said.shape[1] >= mine.numel():
                with np.errstate(all="ignore"):  # one rank after the other: the same bits on all
                    numbers = reduce(_JOIN[op], said[:, : mine.numel()])
                return _like(torch.from_numpy(numbers).reshape(mine.shape), partial)
        joined = mine.clone(memory_format=torch.contiguous_format)  # it is written to
        dist.all_reduce(joined, getattr(dist.ReduceOp, op.upper()), group=self.comm)
        return _like(joined, partial)

    def _moved(self, partial: Array) -> torch.Tensor:
        """A partial where the group joins: on the current device if it comes from another sort of device."""
        if isinstance(partial, np.ndarray | np.generic):
            return torch.tensor(partial, device=self.device)
        if not isinstance(partial, torch.Tensor):
            kind = type(partial).__module__
            raise TypeError(f"torch joins torch and NumPy arrays, and these gradients are of {kind}")
        if partial.requires_grad:
            raise TypeError(
                "torch joins numbers without their derivatives: detach the gradients, or call gradclip under "
                "torch.no_grad()"
            )
        return partial if partial.device.type == self.device else partial.to(self.device)

    def _said(self, mine: torch.Tensor, op: ReduceOp, call: Call) -> Any:
        """The partials of all ranks, a row each, if there is room for them: else what there is of a message.

        Raises ValueError, on all ranks, if they do not agree.
        """
        ranks, bits = dist.get_world_size(self.comm), 8 * mine.element_size()
        sent = np.zeros(max(_LEAST, min(_MOST, _TOGETHER // ranks)))
        sent[:_START] = head(op, call, bits, mine.numel())
        if _START + mine.numel() <= sent.size:
            sent[_START : _START + mine.numel()] = mine.cpu().numpy().reshape(-1)
        message = torch.from_numpy(sent).to(self.device)
        got = message.new_empty((ranks, sent.size))
        dist.all_gather(list(got.unbind()), message, group=self.comm)
        table = got.cpu().numpy()
        split = np.flatnonzero((table[:, :_START] != table[0, :_START]).any(axis=0)).tolist()
        if split:
            self.refuse(split, op, call, bits)
        return table[:, _START:]

    def gather(self, text: str) -> list[str]:
        texts: list[Any] = [None] * dist.get_world_size(self.comm)
        dist.all_gather_object(texts, text, group=self.comm)
        return texts


def _like(joined: torch.Tensor, partial: Array) -> Array:
    if isinstance(partial, torch.Tensor):
        return joined.to(partial)
    return joined.cpu().numpy().astype(partial.dtype, copy=False)


def _captures(x: torch.Tensor) -> bool:
    """Whether it goes into a CUDA graph: then nothing may wait."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _group(given: Any) -> Any:
    """The process group that was given; None: the default one, as it is now."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "torch.distributed has no process group yet: call torch.distributed.init_process_group first, on all ranks"
        )
    group = dist.group.WORLD if given is None else given
    outside = dist.GroupMember.NON_GROUP_MEMBER
    if isinstance(given, DeviceMesh):
        if given.ndim != 1:
            raise TypeError(f"torch takes a mesh of one dimension, got {given!r}: pass one of its, mesh[name]")
        group = outside if given.get_coordinate() is None else given.get_group()
    if group is outside or group == outside:
        raise ValueError("torch got a group that this rank is not in: it must not call the clip")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"torch takes a torch.distributed.ProcessGroup, a DeviceMesh or None, got {given!r} of type "
            f"{type(given).__name__}"
        )
    return group


def _device(config: str) -> str:
    """The sort of device at which a group joins, by its backends ("cpu:gloo,cuda:nccl"): the host, unless another has a
    backend of its own. So it is the same on all ranks, whatever leaves they hold.
    """
    backends = dict(part.split(":") for part in config.split(","))
    own = [device for device, backend in backends.items() if backend != backends.get("cpu")]
    return own[0] if own else "cpu"

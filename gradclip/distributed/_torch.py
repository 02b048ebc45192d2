"""torch.distributed: the ranks' partials in one collective, in a message that also shows whether they mean the same."""

from __future__ import annotations

from functools import reduce
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from gradclip._types import Array, Call, ReduceOp, Tree
from gradclip.distributed._ranks import AGREED, Ranks, head

#: A message: what all ranks must agree on, then the partial, where it has room: 12 groups of 5 numbers do. Every rank
#: sends as many numbers, so ranks that differ are still able to say so. To gloo 64 take as long as 5.
_START, _LENGTH = len(AGREED), 65

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

    def join(self, partial: Array, op: ReduceOp, call: Call) -> Array:
        with torch.no_grad():
            mine = self._copied(partial)
            what = op, call, mine.dtype, mine.numel()
            known = _agreed.setdefault(self.comm, set()) if self.asks_once else set()
            if what not in known and not (self.asks_once and _captures(mine)):
                table = self._gathered(mine, op, call)
                known.add(what)
                if _START + mine.numel() <= _LENGTH:  # one rank after the other: the same bits on all
                    with np.errstate(all="ignore"):
                        joined = reduce(_JOIN[op], table[:, _START : _START + mine.numel()])
                    return _like(torch.from_numpy(joined).reshape(mine.shape), partial)
            dist.all_reduce(mine, getattr(dist.ReduceOp, op.upper()), group=self.comm)
            return _like(mine, partial)

    def _copied(self, partial: Array) -> torch.Tensor:
        """A copy where the group joins: on that device of the current index if it comes from another sort of device."""
        if isinstance(partial, np.ndarray | np.generic):
            return torch.tensor(partial, device=self.device)
        if not isinstance(partial, torch.Tensor):
            kind = type(partial).__module__
            raise TypeError(f"torch joins torch and NumPy arrays, and these gradients are of {kind}")
        if hasattr(partial, "to_local"):
            raise TypeError(
                "torch joins local tensors, and a DTensor is joined over its own mesh: pass x.to_local() of each, "
                "or no all_reduce"
            )
        if partial.requires_grad:
            raise TypeError(
                "torch joins numbers without their derivatives: detach the gradients, or call gradclip under "
                "torch.no_grad()"
            )
        here = partial if partial.device.type == self.device else partial.to(self.device)
        return here.clone(memory_format=torch.contiguous_format)

    def _gathered(self, mine: torch.Tensor, op: ReduceOp, call: Call) -> Any:
        """The messages of all ranks, a row each. Raises ValueError, on all ranks, if they do not agree."""
        numbers, bits = mine.reshape(-1), 8 * mine.element_size()
        sent = torch.zeros(_LENGTH, dtype=torch.float64, device=mine.device)
        sent[:_START] = torch.tensor(head(op, call, bits, numbers.numel()), dtype=torch.float64)
        if _START + numbers.numel() <= _LENGTH:
            sent[_START : _START + numbers.numel()] = numbers
        got = sent.new_empty((dist.get_world_size(self.comm), _LENGTH))
        dist.all_gather(list(got.unbind()), sent, group=self.comm)
        table = got.cpu().numpy()
        split = [i for i in range(_START) if (table[:, i] != table[0, i]).any()]
        if split:
            self.refuse(split, op, call, bits)
        return table

    def gather(self, text: str) -> list[str]:
        texts: list[Any] = [None] * dist.get_world_size(self.comm)
        dist.all_gather_object(texts, text, group=self.comm)
        return texts


def _like(joined: torch.Tensor, partial: Array) -> Array:
    if isinstance(partial, torch.Tensor):
        return joined.to(partial)
    return joined.cpu().numpy().astype(partial.dtype, copy=False)


def _captures(x: torch.Tensor) -> bool:
    """Whether a CUDA graph is captured: then nothing may wait."""
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

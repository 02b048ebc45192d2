"""PyTorch: plain tensors go to who does them best, what torch must see, to trace or differentiate it, to the reference.

`host` does plain tensors on the CPU, by NumPy and torch's own products; `cuda` those on GPUs, by CuPy's kernels, and
`foreach` without CuPy. `traced` does those of a program that torch compiles, which the verbs enter by `compiled`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from operator import attrgetter
from typing import Any

import array_api_compat.torch as xp
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from gradclip._backends.generic import Backend
from gradclip._backends.torch.foreach import ForeachBackend
from gradclip._backends.torch.host import HostBackend
from gradclip._backends.torch.plain import PlainBackend
from gradclip._backends.torch.traced import TracedBackend
from gradclip._types import Array

_is_cuda, _requires_grad = attrgetter("is_cuda"), attrgetter("requires_grad")


class TorchBackend(Backend):
    """The work on `torch.Tensor`s of any sort."""

    def __init__(self) -> None:
        super().__init__(xp)
        self._host, self._traced = HostBackend(), TracedBackend()

    def adopt(self, leaves: Sequence[Array], bounds: Sequence[Any] = ()) -> tuple[Backend, Sequence[Array]]:
        if not leaves or _is_seen(leaves, bounds):
            return self._traced if leaves and _are_traced(leaves) else self, leaves
        backends = (self._host,) if leaves[0].is_cpu else _on_gpus() if all(map(_is_cuda, leaves)) else ()
        for backend in backends:
            found = backend.tensors(leaves)
            if found is not None:
                return backend, found
        return self, leaves


@lru_cache
def _on_gpus() -> tuple[PlainBackend, ...]:
    """Those that may take tensors on GPUs, the best first. A build of torch for ROCm has no CUDA tensors."""
    if torch.version.cuda is not None:
        with suppress(ImportError):
            from gradclip._backends.torch.cuda import CudaBackend

            return CudaBackend(), ForeachBackend()
    return (ForeachBackend(),)


def _are_traced(leaves: Sequence[Array]) -> bool:
    """Whether tensors stand for those of a program's later runs."""
    return all(isinstance(x, FakeTensor | FunctionalTensor) for x in leaves)


def _is_seen(leaves: Sequence[Array], bounds: Sequence[Any]) -> bool:
    """Whether more is to come of the work than its results: a graph of derivatives, a trace, a call of a subclass."""
    tensors = [x for x in bounds if isinstance(x, torch.Tensor)]
    return (
        set(map(type, leaves)) != {torch.Tensor}
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or (torch.is_grad_enabled() and True in (*map(_requires_grad, leaves), *map(_requires_grad, tensors)))
        or any(type(x) is not torch.Tensor or x.is_meta for x in tensors)
    )

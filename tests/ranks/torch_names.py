"""What tests/test_torch_names.py runs with two processes: `gradclip.torch` under DDP and under FSDP2."""

from __future__ import annotations

import datetime
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import gradclip
from gradclip.torch import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm

HAS_FSDP2 = hasattr(dist.fsdp, "fully_shard")  # torch 2.6


def network() -> Any:
    """Its axes are even: each of two ranks has as large a part of every parameter."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def after_backward(model: Any) -> list[Any]:
    model.zero_grad()
    model(torch.arange(12.0).reshape(4, 3)).square().sum().backward()
    return list(model.parameters())


def whole(x: Any) -> Any:
    """A tensor as one process would have it."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def alike(sharded: list[Any], plain: list[Any]) -> None:
    for p, q in zip(sharded, plain, strict=True):
        torch.testing.assert_close(whole(p.grad), q.grad, rtol=1e-6, atol=0)


def averaged(rank: int) -> None:
    """DDP has averaged the gradients, and each rank clips the same ones."""
    layer = nn.Linear(2, 1, bias=False)
    model = DistributedDataParallel(layer, gradient_as_bucket_view=True)
    model(torch.tensor([0.0, 8.0] if rank else [6.0, 0.0])).sum().backward()
    assert float(clip_grad_norm_(model.parameters(), 2.5)) == 5.0
    assert layer.weight.grad.tolist() == [[1.5, 2.0]]


def sharded() -> None:
    """FSDP2's gradients are DTensors, and so may the norm be: that of the whole."""
    model, plain = network(), network()
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2], model):
        dist.fsdp.fully_shard(layer, mesh=mesh)
    for p in (2.0, 1.0, 3.0, float("inf")):
        ours, theirs = after_backward(model), after_backward(plain)
        norm = clip_grad_norm_(model.parameters(), 0.5, p)
        torch.testing.assert_close(whole(norm), clip_grad_norm_(theirs, 0.5, p), rtol=1e-6, atol=0)
        alike(ours, theirs)
    ours, theirs = after_backward(model), after_backward(plain)
    norms = clip_grad_norm_(ours, 0.25, per=gradclip.Units(0))
    for norm, want in zip(norms, clip_grad_norm_(theirs, 0.25, per=gradclip.Units(0)), strict=True):
        torch.testing.assert_close(whole(norm), want, rtol=1e-6, atol=0)
    alike(ours, theirs)
    for parameters in (ours, theirs):
        clip_grads_with_norm_(parameters, 0.25, get_total_norm([p.grad for p in parameters]))
        clip_grad_value_(parameters, 0.0625)
    alike(ours, theirs)
    assert max(float(p.grad.abs().max()) for p in theirs) == 0.0625


def main(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    averaged(rank)
    if HAS_FSDP2:
        sharded()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    other = torch.multiprocessing.get_context("spawn").Process(target=main, args=(1, sys.argv[1]))
    other.start()
    try:
        main(0, sys.argv[1])
        other.join()
    finally:
        other.kill()  # where it waits for this one
    assert other.exitcode == 0
    print("DDP, FSDP2" if HAS_FSDP2 else "DDP")

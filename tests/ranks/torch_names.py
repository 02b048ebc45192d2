"""What tests/test_torch_names.py runs with two processes: `gradclip.torch` under DDP and under FSDP2."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gradclip
from gloo import process_group
from gradclip.torch import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm

INF = float("inf")
HAS_FSDP2 = hasattr(dist.fsdp, "fully_shard")  # torch 2.6


def network(*widths: int) -> Any:
    torch.manual_seed(0)
    first, last = widths
    return nn.Sequential(nn.Linear(3, first), nn.Tanh(), nn.Linear(first, last))


def after_backward(model: Any) -> list[Any]:
    model.zero_grad()
    model(torch.arange(12.0).reshape(4, 3)).square().sum().backward()
    return list(model.parameters())


def alike(sharded: list[Any], plain: list[Any]) -> None:
    for p, q in zip(sharded, plain, strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-6, atol=0)


def averaged(rank: int) -> None:
    """DDP has averaged the gradients, and each rank clips the same ones."""
    layer = nn.Linear(2, 1, bias=False)
    model = DistributedDataParallel(layer, gradient_as_bucket_view=True)
    model(torch.tensor([0.0, 8.0] if rank else [6.0, 0.0])).sum().backward()
    assert float(clip_grad_norm_(model.parameters(), 2.5)) == 5.0
    assert layer.weight.grad.tolist() == [[1.5, 2.0]]


def sharded(*widths: int) -> None:
    """FSDP2's gradients are DTensors, and so is the norm: that of the whole."""
    model, plain = network(*widths), network(*widths)
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2], model):
        dist.fsdp.fully_shard(layer, mesh=mesh)
    for p in (2.0, 1.0, 0.0, 3.0, INF, -INF):
        ours, theirs = after_backward(model), after_backward(plain)
        norm = clip_grad_norm_(model.parameters(), 0.0625, p)
        want = clip_grad_norm_(theirs, 0.0625, p)
        assert isinstance(norm, DTensor)
        torch.testing.assert_close(norm.full_tensor(), want, rtol=1e-6, atol=0)
        assert float(norm) == float(norm.full_tensor())
        alike(ours, theirs)
        apart = after_backward(model)
        clip_grads_with_norm_(apart, 0.0625, get_total_norm([q.grad for q in apart], p))
        alike(apart, theirs)
    for per in ("leaf", ["body", "body", None, "head"]):
        ours, theirs = after_backward(model), after_backward(plain)
        norms, wants = (clip_grad_norm_(x, 0.25, per=per) for x in (ours, theirs))
        if per != "leaf":
            assert list(norms) == list(wants) == ["body", "head"]
            norms, wants = list(norms.values()), list(wants.values())
        for norm, want in zip(norms, wants, strict=True):
            torch.testing.assert_close(norm.full_tensor(), want, rtol=1e-6, atol=0)
        alike(ours, theirs)
    torch.testing.assert_close(get_total_norm(model.parameters()).full_tensor(), get_total_norm(plain.parameters()))
    for parameters in (ours, theirs):
        clip_grad_value_(parameters, 0.0625)
    alike(ours, theirs)
    assert max(float(p.grad.abs().max()) for p in theirs) == 0.0625


def units() -> None:
    """Groups along an axis, which may be the one that is sharded: torch joins them, where it can."""
    model, plain = network(4, 2), network(4, 2)
    dist.fsdp.fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    for per in (gradclip.Units(0), "unit"):
        ours, theirs = after_backward(model), after_backward(plain)
        norms, wants = (clip_grad_norm_(x, 0.25, per=per) for x in (ours, theirs))
        for norm, want in zip(norms, wants, strict=True):
            torch.testing.assert_close(norm.full_tensor(), want, rtol=1e-6, atol=0)
        alike(ours, theirs)


def placed(rank: int, shape: tuple[int, ...], *placements: Any) -> None:
    """A copy counts once, on whatever axis of the mesh; an inf or NaN of one rank is one of all."""
    mesh = init_device_mesh("cpu", shape)
    values = [torch.arange(1.0, 13.0).reshape(3, 4), torch.arange(1.0, 6.0), torch.tensor(7.0)]
    last = [Replicate()] * mesh.ndim
    everything = [placements, [Replicate() if x == Shard(1) else x for x in placements], last]

    def parameters() -> list[Any]:
        out = [nn.Parameter(distribute_tensor(x * 0, mesh, y)) for x, y in zip(values, everything, strict=True)]
        for p, x, y in zip(out, values, everything, strict=True):
            p.grad = distribute_tensor(x.clone(), mesh, y)
        return out

    want = float(sum(float((x**2).sum()) for x in values)) ** 0.5
    ps = parameters()
    torch.testing.assert_close(float(clip_grad_norm_(ps, 1.0)), want, rtol=1e-6, atol=0)
    for p, x in zip(ps, values, strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), x / want, rtol=1e-6, atol=1e-9)
    values[0][0, 0] = INF
    ps = parameters()
    with pytest.raises(gradclip.NonFiniteError, match=r"grads\[0\] \(float32.* 0 NaN, 1 inf") as caught:
        clip_grad_norm_(ps, 1.0, error_if_nonfinite=True)
    mine = any(x.isinf().any() for x in (p.grad.to_local() for p in ps))
    assert len(caught.value.culprits) == mine == (rank == 0 or Replicate() in placements), "all name that of rank 0"
    assert float(clip_grad_norm_(ps, 1.0, nonfinite="zero")) == INF
    assert not any(p.grad.full_tensor().any() for p in ps)


def main(rank: int, store: str) -> None:
    with process_group(Path(store), rank, 2):
        averaged(rank)
        placed(rank, (2,), Shard(0))
        placed(rank, (2,), Shard(1))
        placed(rank, (1, 2), Shard(0), Shard(1))
        placed(rank, (2, 1), Replicate(), Shard(0))
        if HAS_FSDP2:
            sharded(4, 2)
            sharded(5, 3)  # uneven parts
            sharded(5, 1)  # rank 1 has none of the last layer
            units()
        dist.barrier()


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

"""One of the processes of tests/test_torch_distributed.py: rank 1 holds no leaves, then FSDP's shards."""

from __future__ import annotations

import datetime
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import gradclip

rank, store, recipe, fsdp = int(sys.argv[1]), *map(Path, sys.argv[2:])
dist.init_process_group(
    "gloo", init_method=store.as_uri(), rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
)
names = {"gradclip": gradclip}
exec(recipe.read_text(encoding="utf-8"), names)
over = names["over"]

for dtype in (torch.float32, torch.float64):
    mine = [torch.tensor([3.0, 4.0], dtype=dtype)] if rank == 0 else []
    for p, norm in [(2.0, 5.0), (1.0, 7.0), (0.0, 2.0), (math.inf, 4.0), (-math.inf, 3.0), (3.0, 91 ** (1 / 3))]:
        found = gradclip.global_norm(mine, p, all_reduce=over())
        assert isinstance(found, torch.Tensor if rank == 0 else np.ndarray | np.generic)
        assert math.isclose(float(found), norm, rel_tol=1e-6), (p, found)
    grads, norm = gradclip.clip_grad_norm(mine, 1.0, all_reduce=over())
    assert float(norm) == 5.0
    assert len(grads) == len(mine)
    if rank == 0:
        torch.testing.assert_close(grads[0], torch.tensor([0.6, 0.8], dtype=dtype))
labelled = {"a": torch.tensor([3.0 if rank else 4.0]), "b": torch.tensor([12.0 * rank])}
norms = gradclip.norms(labelled, per={"a": "x", "b": "y"}, all_reduce=over())
assert {label: float(x) for label, x in norms.items()} == {"x": 5.0, "y": 12.0}

mesh = init_device_mesh("cpu", (2,))
weight = torch.nn.Parameter(distribute_tensor(torch.zeros(3, 2), mesh, [Shard(0)]))  # two rows and one
bias = torch.nn.Parameter(distribute_tensor(torch.zeros(1), mesh, [Shard(0)]))  # rank 1 has none of it
weight.grad = distribute_tensor(torch.full((3, 2), 2.0), mesh, [Shard(0)])
bias.grad = distribute_tensor(torch.ones(1), mesh, [Shard(0)])
whole = gradclip.norms([x.grad.to_local() for x in (weight, bias)], all_reduce=over())
assert [float(x) for x in whole] == [float(np.float32(24**0.5)), 1.0], whole


class Model:
    def parameters(self):
        return [weight, bias]


names.update(model=Model(), group=None)
exec(fsdp.read_text(encoding="utf-8"), names)
assert float(names["norm"]) == 5.0
torch.testing.assert_close(weight.grad.full_tensor(), torch.full((3, 2), 0.4))
torch.testing.assert_close(bias.grad.full_tensor(), torch.tensor([0.2]))
dist.barrier()
dist.destroy_process_group()
print(f"rank {rank} is done")

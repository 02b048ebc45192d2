"""Two processes of two CPU devices each, one global mesh: `python jax_processes.py PROCESS PORT`.

tests/test_jax_processes.py runs it. A case raises where it is not so; at the end each process prints "process N: so".
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from pathlib import Path
from typing import Any

process, port = int(sys.argv[1]), int(sys.argv[2])
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax  # noqa: E402

jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process, initialization_timeout=60)

import numpy as np  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402
from jax.sharding import Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import exact  # noqa: E402
import gradclip  # noqa: E402
from gradclip.distributed import psum  # noqa: E402

assert jax.process_count() == 2
assert len(jax.devices()) == 4
assert len(jax.local_devices()) == 2

AXES = ("data", "model")
MESH = Mesh(np.array(jax.devices()).reshape(2, 2), AXES)  # "data" goes from process to process
SPECS = {"both": P("data", "model"), "model": P("model"), "none": P()}


def host(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"both": (4, 6), "model": (2, 3), "none": (5,)}
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}


def placed(tree: dict[str, np.ndarray]) -> dict[str, Any]:
    def put(x: np.ndarray, spec: P) -> Any:
        return jax.make_array_from_callback(x.shape, NamedSharding(MESH, spec), lambda index: x[index])

    return {key: put(x, SPECS[key]) for key, x in tree.items()}


def check(clipped: Any, norm: Any, grads: dict[str, np.ndarray], p: float) -> None:
    want = exact.norm(grads.values(), p)
    assert norm.is_fully_replicated
    exact.check_norm(norm, want, "float32", 8)
    for key, leaf in grads.items():
        out = clipped[key]
        assert out.sharding.is_equivalent_to(NamedSharding(MESH, SPECS[key]), out.ndim), (key, out.sharding)
        for shard in out.addressable_shards:
            part = leaf[shard.index].astype(np.float64) * float(0.25 / want)
            np.testing.assert_allclose(np.asarray(shard.data), part, rtol=1e-6)


def same_on_all(raw: bytes) -> None:
    digest = np.frombuffer(hashlib.sha256(raw).digest(), np.int32)
    table = np.asarray(multihost_utils.process_allgather(digest))
    assert (table == table[0]).all(), "the processes differ"


def under_jit() -> None:
    for p in (2.0, 3.0):
        grads = host(1)
        clipped, norm = jax.jit(lambda g, p=p: gradclip.clip_grad_norm(g, 0.25, p))(placed(grads))
        check(clipped, norm, grads, p)


def in_shard_map() -> None:
    for p in (2.0, 3.0):
        grads = host(2)

        def clip(g: Any, p: float = p) -> Any:
            return tuple(gradclip.clip_grad_norm(g, 0.25, p, all_reduce=psum(AXES)))

        clip = jax.jit(jax.shard_map(clip, mesh=MESH, in_specs=(SPECS,), out_specs=(SPECS, P())))
        check(*clip(placed(grads)), grads, p)


def errors_on_all() -> None:
    grads = host(3)
    grads["both"][3, 5] = np.nan  # a device of process 1 holds it
    message = ""
    try:
        gradclip.clip_grad_norm(placed(grads), 1.0, nonfinite="error")
    except gradclip.NonFiniteError as error:
        message = str(error)
    assert re.search(r"grads\['both'\] \(float32, shape \(4, 6\)\): 1 NaN, 0 inf", message), message


def drift() -> None:
    """100 steps: the replicated leaf is the same on all devices of all processes."""

    def step(params: Any, grads: Any) -> Any:
        grads, norm = gradclip.clip_grad_norm(grads, 0.25, all_reduce=psum(AXES))
        return jax.tree.map(lambda x, g: x - g, params, grads), norm

    step = jax.jit(jax.shard_map(step, mesh=MESH, in_specs=(SPECS, SPECS), out_specs=(SPECS, P())))
    params = placed({key: 0 * x for key, x in host(0).items()})
    copies = []
    for i in range(100):
        params, norm = step(params, placed(host(i)))
        here = {np.asarray(shard.data).tobytes() for shard in params["none"].addressable_shards}
        assert len(here) == 1, f"drift in step {i}"
        copies += [here.pop(), np.asarray(norm.addressable_shards[0].data).tobytes()]
    same_on_all(b"".join(copies))


for case in (under_jit, in_shard_map, errors_on_all, drift):
    case()
    print(f"process {process}: {case.__name__} is so", flush=True)
jax.distributed.shutdown()

"""gradclip's clip and optax's, as XLA compiles them for GPUs and TPUs; prints JSON. `on_devices` runs it by itself.

By itself, for libtpu and the flags of a machine without devices stay in the process.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import inf, prod
from typing import Any

import jax
import jax.numpy as jnp
import optax

import gradclip
from benchmarks.compiled import DEVICES, Counts, compiled  # before JAX
from benchmarks.trees import MODELS

OPTAX, OURS = "optax", "gradclip"

#: The clips: how they are called, `norm_type` and `per`.
CLIPS: dict[str, tuple[Any, Any]] = {
    "": (2.0, None),
    "per leaf": (2.0, "leaf"),
    "by labels": (2.0, lambda path, leaf: "matrices" if leaf.ndim > 1 else "vectors"),
    "p = 1": (1.0, None),
    "p = inf": (inf, None),
    "rms": ("rms", None),
}

WIDTH, LAYERS, BATCH = 1024, 8, 64


@dataclass(frozen=True)
class Line:
    """One program: traffic and temporary memory in sizes of the gradients."""

    device: str
    what: str
    dtype: str
    who: str
    kernels: int
    traffic: float
    temporary: float
    seconds: float


def optax_clip(*grads: Any) -> Any:
    leaves = list(grads)
    clipped, _ = optax.clip_by_global_norm(1.0).update(leaves, optax.EmptyState())
    return clipped, optax.tree.norm(leaves)


def our_clip(name: str) -> Callable[..., Any]:
    norm_type, per = CLIPS[name]
    return lambda *grads: tuple(gradclip.clip_grad_norm(list(grads), 1.0, norm_type, per=per))


def step(who: str | None) -> Callable[..., Any]:
    """Residual layers, a squared error, adam; the norm is returned."""
    optimiser = optax.adam(1e-3)

    def loss(params: Any, x: Any, y: Any) -> Any:
        for weight, bias in params:
            x = x + jax.nn.relu(x @ weight + bias)
        return jnp.mean((x - y).astype(jnp.float32) ** 2)

    def run(params: Any, state: Any, x: Any, y: Any) -> Any:
        grads = jax.grad(loss)(params, x, y)
        norm = None
        if who is not None:
            leaves, tree = jax.tree.flatten(grads)
            leaves, norm = (optax_clip if who == OPTAX else our_clip(""))(*leaves)
            grads = jax.tree.unflatten(tree, leaves)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state, norm

    return run


def step_shapes(dtype: str, layers: int = LAYERS, width: int = WIDTH) -> tuple[Any, ...]:
    weight, bias = jax.ShapeDtypeStruct((width, width), dtype), jax.ShapeDtypeStruct((width,), dtype)
    params = [(weight, bias)] * layers
    batch = jax.ShapeDtypeStruct((BATCH, width), dtype)
    return params, jax.eval_shape(optax.adam(1e-3).init, params), batch, batch


def bytes_of(tree: Any) -> int:
    return sum(prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def line(device: str, what: str, dtype: str, who: str, counts: Counts, size: int) -> Line:
    each = counts.traffic / size, counts.temporary / size
    return Line(device, what, dtype, who, counts.kernels, *each, counts.seconds)


def alone(device: str, name: str, dtype: str, shapes: Sequence[Any], clips: Sequence[str]) -> list[Line]:
    """The clips of one tree, beside optax's."""
    given = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
    size = bytes_of(given)
    found = [line(device, name, dtype, OPTAX, compiled(optax_clip, given, device), size)]
    for clip in clips:
        what = f"{name}, {clip}" if clip else name
        found.append(line(device, what, dtype, OURS, compiled(our_clip(clip), given, device), size))
    return found


def in_a_step(device: str, dtype: str, layers: int = LAYERS) -> list[Line]:
    """The training step without a clip, and with each."""
    shapes, who = step_shapes(dtype, layers), {"no clip": None, OPTAX: OPTAX, OURS: OURS}
    name, size = f"step of {layers} layers", bytes_of(shapes[0])
    return [line(device, name, dtype, key, compiled(step(x), shapes, device), size) for key, x in who.items()]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--trees", nargs="*", choices=MODELS, default=[])
    asked = parser.parse_args()
    lines: list[Line] = []
    absent = {}
    for device in DEVICES:
        try:
            compiled(optax_clip, (jax.ShapeDtypeStruct((8,), "float32"),), device)  # the compiler starts
        except (RuntimeError, ValueError, ImportError) as error:
            absent[device] = str(error).splitlines()[0][:200]
            continue
        for tree in asked.trees:
            shapes = list(MODELS[tree].shapes.values())
            for dtype in ("float32", "bfloat16") if tree != "small" else ("float32",):
                lines += alone(device, MODELS[tree].name, dtype, shapes, [""] if tree == "small" else list(CLIPS))
        for dtype in ("float32", "bfloat16"):
            lines += in_a_step(device, dtype, 2 if asked.short else LAYERS)
    print(json.dumps({"lines": [asdict(x) for x in lines], "absent": absent, "jax": jax.__version__}))


if __name__ == "__main__":
    main()

"""Train a small transformer on real text, sharded over a mesh of 2 x 2 devices, with one norm for all of it.

    python examples/jax_sharded_train.py               # under a minute, on four devices made of the CPU
    python examples/jax_sharded_train.py --steps 10

Three runs from the same weights, on the same batches: on one device; under `jax.jit` over sharded arrays, where the
compiler joins the norm and gradclip is told nothing; and in `jax.shard_map`, where `psum` joins it. The batch is
spread over the axis "data"; attention heads and hidden units are spread over "model"; embeddings and scales are
the same everywhere, and count once. The text is the language reference that comes with Python.
"""

import argparse
import os
import time
from functools import partial
from pydoc_data.topics import topics

if "device_count" not in os.environ.get("XLA_FLAGS", ""):  # before JAX is imported
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import gradclip
from gradclip.distributed import psum

WIDTH, HEADS, HIDDEN, LAYERS = 32, 4, 128, 2
LENGTH, BATCH = 32, 16  # characters in a sequence, sequences in a batch
LEARNING_RATE, MAX_NORM = 0.5, 1.0

LAYER_SPECS = {"qkv": P(None, None, "model"), "project": P("model"), "up": P(None, "model"), "down": P("model")}
SPECS = {"embed": P(), "position": P(), "scale": P(), "layers": [LAYER_SPECS] * LAYERS}


def init(key, vocabulary):
    """Draw the weights."""
    keys = iter(jax.random.split(key, 2 + 4 * LAYERS))

    def normal(scale, *shape):
        return scale * jax.random.normal(next(keys), shape)

    def layer():
        return {
            "qkv": normal(WIDTH**-0.5, WIDTH, 3, HEADS, WIDTH // HEADS),
            "project": normal(WIDTH**-0.5, HEADS, WIDTH // HEADS, WIDTH),
            "up": normal(WIDTH**-0.5, WIDTH, HIDDEN),
            "down": normal(HIDDEN**-0.5, HIDDEN, WIDTH),
        }

    return {
        "embed": normal(0.5, vocabulary, WIDTH),
        "position": normal(0.5, LENGTH, WIDTH),
        "scale": jnp.ones(WIDTH),
        "layers": [layer() for _ in range(LAYERS)],
    }


def normalized(x):
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def loss_fn(params, codes, over_model=lambda x: x, over_data=lambda x: x):
    """Nats per character. `over_model` adds up what the heads and the hidden units give, `over_data` averages."""
    inputs, targets = codes[:, :-1], codes[:, 1:]
    x = params["embed"][inputs] + params["position"]
    past = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
    for layer in params["layers"]:
        q, k, v = jnp.einsum("btd,dihe->ibhte", normalized(x), layer["qkv"])
        scores = jnp.where(past, jnp.einsum("bhte,bhse->bhts", q, k) * (WIDTH // HEADS) ** -0.5, -1e9)
        mixed = jnp.einsum("bhts,bhse->bhte", jax.nn.softmax(scores), v)
        x = x + over_model(jnp.einsum("bhte,hed->btd", mixed, layer["project"]))
        x = x + over_model(jax.nn.gelu(normalized(x) @ layer["up"]) @ layer["down"])
    logits = (normalized(x) * params["scale"]) @ params["embed"].T
    likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)
    return over_data(-jnp.mean(likelihood))


def update(params, grads):
    return jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, grads)


@jax.jit
def step(params, codes):
    """One device, or sharded arrays: the same code, and nothing is said about devices."""
    loss, grads = jax.value_and_grad(loss_fn)(params, codes)
    grads, norm = gradclip.clip_grad_norm(grads, MAX_NORM)
    return update(params, grads), loss, norm


def manual_step(mesh):
    """The same with every collective written down."""

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(SPECS, P("data")), out_specs=(SPECS, P(), P()))
    def step(params, codes):
        loss, grads = jax.value_and_grad(loss_fn)(
            params, codes, over_model=lambda x: lax.psum(x, "model"), over_data=lambda x: lax.pmean(x, "data")
        )
        grads, norm = gradclip.clip_grad_norm(grads, MAX_NORM, all_reduce=psum(("data", "model")))
        return update(params, grads), loss, norm

    return step


def train(step, params, batches, place=lambda x: x):
    """The losses, the norms before clipping, and the weights at the end."""
    history = []
    for codes in batches:
        params, loss, norm = step(params, place(codes))
        history.append((float(loss), float(norm)))
    return np.array(history), jax.device_get(params)


def main():
    parser = argparse.ArgumentParser(description="A sharded transformer with gradient clipping.")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()

    text = "\n".join(topics[name] for name in sorted(topics))
    alphabet = sorted(set(text))
    codes = np.array([alphabet.index(c) for c in text[:200_000]], np.int32)
    starts = np.random.default_rng(0).integers(0, len(codes) - LENGTH - 1, (args.steps, BATCH, 1))
    batches = codes[starts + np.arange(LENGTH + 1)]

    params = init(jax.random.key(0), len(alphabet))
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    sharded = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), params, SPECS)
    place = partial(jax.device_put, device=NamedSharding(mesh, P("data")))
    runs = {
        "one device": (step, params, batches),
        "jit over shards": (step, sharded, batches, place),
        "shard_map": (manual_step(mesh), sharded, batches, place),
    }

    results = {}
    for name, run in runs.items():
        began = time.perf_counter()
        history, end = results[name] = train(*run)
        clipped = int(np.sum(history[:, 1] > MAX_NORM))
        print(
            f"{name:<16} loss {history[0, 0]:.4f} -> {history[-1, 0]:.4f}, first norm {history[0, 1]:.6f}, "
            f"clipped {clipped} of {len(history)} steps, {time.perf_counter() - began:.1f} s"
        )

    want_history, want = results["one device"]
    for name in ("jit over shards", "shard_map"):
        history, end = results[name]
        off = max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(end), jax.tree.leaves(want), strict=True))
        relative = np.abs(history / want_history - 1).max(axis=0)
        print(f"{name:<16} off by: losses {relative[0]:.1e}, norms {relative[1]:.1e}, weights {off:.1e}")


if __name__ == "__main__":
    main()

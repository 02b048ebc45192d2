"""Let a rule choose the bound: a small language model in JAX, whose data goes wrong for one step.

    python examples/jax_adaptive.py                # half a minute; draws jax_adaptive.png
    python examples/jax_adaptive.py --steps 200    # a few seconds

A model learns to predict the next character of Python's language reference. At two thirds of the way, one batch is bad:
its characters are noise, and its loss is a sum where it should be a mean, so that its gradient is a thousand times too
long. The model is trained four times from the same start, on the same batches: with no bound, with a fixed bound, as
one finds in many scripts, and with `AutoClip` and `ZClip`, which find theirs from the norms that they have seen.

Needs jax, optax and matplotlib.
"""

import argparse
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")  # draws into files, and needs no display
import matplotlib.pyplot as plt
import numpy as np
import optax

import gradclip
from gradclip.__main__ import read_text
from gradclip.adaptive import AutoClip, ZClip

CONTEXT, WIDTH, HIDDEN, BATCH = 16, 24, 192, 64
optimizer = optax.sgd(0.05, momentum=0.9)

RUNS = {
    "no bound": math.inf,
    "fixed bound": 1.0,
    "AutoClip": AutoClip(quantile=0.5, history=200),
    "ZClip": ZClip(warmup=25),
}
COLORS = dict(
    zip(RUNS, ("#000000", "#D55E00", "#0072B2", "#009E73"), strict=True)
)  # told apart by the colour-blind, too


def start(vocabulary):
    table, first, last = jax.random.split(jax.random.key(0), 3)
    return {
        "table": jax.random.normal(table, (vocabulary, WIDTH)),
        "hidden": jax.random.normal(first, (CONTEXT * WIDTH, HIDDEN)) * (CONTEXT * WIDTH) ** -0.5,
        "output": jax.random.normal(last, (HIDDEN, vocabulary)) * 0.1 * HIDDEN**-0.5,
        "bias": jnp.zeros(vocabulary),
    }


def loss_fn(params, codes, weight):
    """The mean loss in nats per character, of which the last one of each row is to be guessed; times `weight`."""
    seen = params["table"][codes[:, :-1]].reshape(len(codes), -1)
    logits = jnp.tanh(seen @ params["hidden"]) @ params["output"] + params["bias"]
    return weight * optax.softmax_cross_entropy_with_integer_labels(logits, codes[:, -1]).mean()


@partial(jax.jit, static_argnames="bound", donate_argnames=("params", "opt_state", "state"))
def train_step(params, opt_state, state, codes, weight, bound):
    loss, grads = jax.value_and_grad(loss_fn)(params, codes, weight)
    if isinstance(bound, float):
        (grads, norm), max_norm = gradclip.clip_grad_norm(grads, bound), bound
    else:
        grads, norm, max_norm, state = bound.clip(grads, state)
    updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state, state, (loss / weight, norm, max_norm)


def train(codes, vocabulary, bound, steps):
    """Return loss, norm before clipping, and bound of every step: an array (steps, 3)."""
    rng, window = np.random.default_rng(0), np.arange(CONTEXT + 1)
    params = start(vocabulary)
    opt_state = optimizer.init(params)
    state = None if isinstance(bound, float) else bound.init(params)
    seen = []
    for step in range(steps):
        batch, weight = codes[window + rng.integers(0, len(codes) - CONTEXT, (BATCH, 1))], 1.0
        if step == 2 * steps // 3:
            batch, weight = rng.integers(0, vocabulary, batch.shape), float(batch.size)
        params, opt_state, state, found = train_step(params, opt_state, state, batch, weight, bound=bound)
        seen.append(found)  # still on the device: nothing here waits for the step
    return np.array(jax.device_get(seen), float)


def plot(runs, path):
    """Draw loss, norm and bound of all runs into the file `path`."""
    figure, axes = plt.subplots(2, len(runs), figsize=(11, 5.5), sharex=True, sharey="row", layout="constrained")
    for (name, seen), (above, below) in zip(runs.items(), axes.T, strict=True):
        loss, norm, max_norm = seen.T
        steps = np.arange(1, len(seen) + 1)
        above.plot(steps[2:-2], np.convolve(loss, np.ones(5) / 5, "valid"), COLORS[name], linewidth=1)
        above.set(title=f"{name}: ends at {ending(seen):.2f}", yscale="log")
        below.plot(steps, norm, COLORS[name], linewidth=0.8, label="norm")
        below.plot(steps, np.where(np.isinf(max_norm), np.nan, max_norm), "k.", markersize=2, label="bound")
        below.set(xlabel="step", yscale="log")
        below.legend(loc="upper left", frameon=False)
        for axis in (above, below):
            axis.axvline(2 * len(seen) // 3 + 1, color="0.6", linestyle=":", zorder=0)
            axis.grid(alpha=0.25)
    axes[0, 0].set_ylabel("loss (nats per character)")
    axes[1, 0].set_ylabel("gradient norm before clipping")
    figure.savefig(path, dpi=130)


def ending(seen):
    return float(np.mean(seen[-len(seen) // 20 :, 0]))


def main():
    parser = argparse.ArgumentParser(description="Rules that choose the bound of gradient clipping.")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=Path("jax_adaptive.png"))
    args = parser.parse_args()

    characters, codes = np.unique(np.array(list(read_text()[0])), return_inverse=True)
    runs = {name: train(codes, len(characters), bound, args.steps) for name, bound in RUNS.items()}
    plot(runs, args.out)

    bad = 2 * args.steps // 3
    print(f"{'':12} {'before':>8} {'after':>8} {'end':>8}   {'norm, bad batch':>16} {'bound':>8} {'clipped':>8}")
    for name, seen in runs.items():
        loss, norm, max_norm = seen.T
        around = loss[bad - 20 : bad].mean(), loss[bad + 1 : bad + 21].mean(), ending(seen)
        print(
            f"{name:12} {around[0]:8.2f} {around[1]:8.2f} {around[2]:8.2f}   {norm[bad]:16.1f} {max_norm[bad]:8.3f}"
            f" {np.mean(norm > max_norm):8.0%}"
        )
    print(f"a uniform guess: {math.log(len(characters)):.2f}; plot: {args.out}")


if __name__ == "__main__":
    main()

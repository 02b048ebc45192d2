"""Clip inside an optax chain, train a Flax NNX network, and log the norm that the clip leaves in the optimizer's state.

A small network learns scikit-learn's handwritten digits. Its chain is ``clip_by_global_norm`` and Adam, as with optax;
the clip is `gradclip.optax`'s, so that the norm before clipping, the bound and the number of clipped steps stand in the
optimizer's state, and are not computed twice to be logged. The bound is a schedule. A `NormLog` keeps norms on the
device and fetches many at a time, so that no step waits for them. See its file as a picture, which needs matplotlib:

    python examples/flax_optax.py [--epochs 10] [--max-norm 0.5] [--log norms.csv]
    python -m gradclip.monitor norms.csv -o norms.png

Needs jax, flax, optax and scikit-learn.
"""

import argparse
from pathlib import Path

import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import gradclip.optax as clip
from gradclip.monitor import NormLog, read

BATCH = 64


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.out = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


def loss_fn(net, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(net(x), y).mean()


def seen(optimizer, name):
    """What the clip has seen, by its name in the state: norm, bound or clipped."""
    return optax.tree_utils.tree_get(optimizer.opt_state, name)[...]


@nnx.jit
def train_step(net, optimizer, x, y):
    loss, grads = nnx.value_and_grad(loss_fn)(net, x, y)
    optimizer.update(net, grads)
    return loss, seen(optimizer, "norm"), seen(optimizer, "bound")


@nnx.jit
def accuracy(net, x, y):
    return (net(x).argmax(axis=1) == y).mean()


def main():
    parser = argparse.ArgumentParser(description="Flax NNX and gradclip.optax in a chain, the norm logged.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--max-norm", type=float, default=0.5)
    parser.add_argument("--log", type=Path, default=Path("norms.csv"))
    args = parser.parse_args()
    args.log.unlink(missing_ok=True)  # else it would be continued

    digits = load_digits()
    images = (digits.data / 16).astype(np.float32)
    labels = digits.target.astype(np.int32)
    x_train, x_test, y_train, y_test = train_test_split(images, labels, test_size=0.25, random_state=0)
    steps = len(x_train) // BATCH

    # The bound grows from a tenth to all of --max-norm over the first two epochs.
    bound = optax.linear_schedule(0.1 * args.max_norm, args.max_norm, 2 * steps)
    net = Net(nnx.Rngs(0))
    chain = optax.chain(clip.clip_by_global_norm(bound), optax.adam(2e-3))
    optimizer = nnx.Optimizer(net, chain, wrt=nnx.Param)

    rng, losses = np.random.default_rng(0), []
    with NormLog(args.log) as log:
        for _ in range(args.epochs):
            order = rng.permutation(len(x_train))
            for batch in np.split(order[: steps * BATCH], steps):
                loss, norm, max_norm = train_step(net, optimizer, x_train[batch], y_train[batch])
                log.add(len(losses), norm, max_norm=max_norm)
                losses.append(loss)

    seen_norms = read(args.log)
    for epoch in range(args.epochs):
        part = slice(epoch * steps, (epoch + 1) * steps)
        norms, bounds = seen_norms["norm"][part], seen_norms["max_norm"][part]
        print(
            f"epoch {epoch + 1:3d}  loss {np.mean(losses[part]):.4f}  gradient norm {norms.mean():.3f}"
            f" (largest {norms.max():.3f})  bound {bounds[-1]:.3f}  clipped {(norms > bounds).mean():4.0%}"
        )

    print(f"accuracy: train {accuracy(net, x_train, y_train):.3f}, test {accuracy(net, x_test, y_test):.3f}")
    print(f"clipped in {seen(optimizer, 'clipped')} of {args.epochs * steps} steps")


if __name__ == "__main__":
    main()

"""Clip by the global norm inside a jitted JAX training step, with optax.

A small multilayer perceptron learns scikit-learn's handwritten digits. The step computes the loss and the
gradients, clips the gradients, and lets Adam use them. `max_norm` is an ordinary argument of the jitted step,
so it can follow a schedule without a new compilation. At the end a batch is broken on purpose, and
`nonfinite="error"` under `jax.experimental.checkify` says which gradients it spoiled.

Needs jax, optax and scikit-learn. Run it with

    python examples/jax_train_step.py [--epochs 20] [--max-norm 0.5]
"""

import argparse
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import checkify
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import gradclip

BATCH = 64
optimizer = optax.adam(2e-3)


def init_params(key, sizes=(64, 128, 10)):
    layers = {}
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        key, sub = jax.random.split(key)
        w = jax.random.normal(sub, (fan_in, fan_out)) * jnp.sqrt(2.0 / fan_in)
        layers[f"layer{i}"] = {"w": w, "b": jnp.zeros(fan_out)}
    return layers


def logits(params, x):
    *hidden, last = params.values()
    for layer in hidden:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


def loss_fn(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


@partial(jax.jit, donate_argnames=("params", "opt_state"))
def train_step(params, opt_state, x, y, max_norm):
    loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
    grads, norm = gradclip.clip_grad_norm(grads, max_norm)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss, norm


@jax.jit
def accuracy(params, x, y):
    return jnp.mean(jnp.argmax(logits(params, x), axis=1) == y)


@jax.jit
@partial(checkify.checkify, errors=checkify.user_checks)
def checked_gradients(params, x, y, max_norm):
    grads = jax.grad(loss_fn)(params, x, y)
    return gradclip.clip_grad_norm(grads, max_norm, nonfinite="error")


def main():
    parser = argparse.ArgumentParser(description="A jitted JAX training step with gradient clipping.")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--max-norm", type=float, default=0.5)
    args = parser.parse_args()

    digits = load_digits()
    images = (digits.data / 16).astype(np.float32)
    labels = digits.target.astype(np.int32)
    x_train, x_test, y_train, y_test = train_test_split(images, labels, test_size=0.25, random_state=0)

    params = init_params(jax.random.key(0))
    opt_state = optimizer.init(params)
    rng = np.random.default_rng(0)
    for epoch in range(args.epochs):
        # The bound grows from a tenth to all of --max-norm over the first five epochs.
        max_norm = args.max_norm * min(1.0, 0.1 + 0.9 * epoch / 5)
        order = rng.permutation(len(x_train))
        losses, norms = [], []
        for start in range(0, len(order) - BATCH + 1, BATCH):
            batch = order[start : start + BATCH]
            params, opt_state, loss, norm = train_step(params, opt_state, x_train[batch], y_train[batch], max_norm)
            losses.append(loss)  # still on the device: nothing here waits for the step
            norms.append(norm)
        norms = np.array(norms)
        print(
            f"epoch {epoch + 1:3d}  loss {np.mean(losses):.4f}  gradient norm {norms.mean():.3f}"
            f" (largest {norms.max():.3f})  bound {max_norm:.3f}  clipped {(norms > max_norm).mean():4.0%}"
        )

    train, test = accuracy(params, x_train, y_train), accuracy(params, x_test, y_test)
    print(f"accuracy: train {train:.3f}, test {test:.3f}")
    print(f"the jit cache of the step holds {train_step._cache_size()} entry")

    print("\nNow a batch with one infinite pixel:")
    broken = x_train[:BATCH].copy()
    broken[3, 20] = np.inf
    error, _ = checked_gradients(params, broken, y_train[:BATCH], args.max_norm)
    print(error.get() or "no error")
    error, _ = checked_gradients(params, x_train[:BATCH], y_train[:BATCH], args.max_norm)
    print(f"and with the pixel as it was: {error.get() or 'no error'}")


if __name__ == "__main__":
    main()

"""Differentially private training in JAX: clipped per-example gradients, noise, and the privacy that was spent.

A small network learns scikit-learn's handwritten digits by DP-SGD (Abadi et al., Deep Learning with Differential
Privacy, CCS 2016, algorithm 1). In each step

- every training image is drawn with the same probability, apart from the others (Poisson sampling): that is what the
  accountant assumes, and neither shuffling nor batches of a fixed size. So that shapes stay the same, the drawn images
  fill some of a fixed number of slots; the others are masked by a bound of 0, with which an example adds zeros;
- `jax.vmap` of `jax.grad` makes a gradient for each image, and `gradclip.clipped_sum` adds them up, none longer than
  `--max-norm`. `lax.scan` goes through the slots in microbatches, so that per-example gradients exist for one of them
  at a time;
- Gaussian noise of standard deviation `--noise-multiplier * --max-norm` is added to the sum, which is divided by the
  EXPECTED batch size: the true one is private.

Google's dp-accounting says what all steps together cost: (epsilon, delta) for data sets that differ by one image, added
or removed.

What is covered: an image adds a vector whose exact norm is at most `--max-norm`, rounding of norm, factor and product
included, and one with an inf or a NaN in its gradient adds zeros. What is not: the sum of several images and the noise
are rounded to float32, where the theorem has real numbers, and a discrete Gaussian would be needed to close that gap
(Mironov, CCS 2012, on what can be read from low bits; Canonne, Kamath, Steinke, NeurIPS 2020); `jax.random` is a good
generator for simulations and not a cryptographic one; the seed is fixed here, so that runs can be repeated, and who
knows it can subtract the noise; learning rate and other settings were chosen by looking at results, which costs
privacy that nobody counted; the number of training images counts as public; and what this script prints about the
training images, and the run without noise beside it, are there to look at, and not private.

Needs jax, optax, scikit-learn and dp-accounting: pip install "gradclip[private]". Run it with

    python examples/jax_private_train.py [--steps 300] [--max-norm 1.0] [--noise-multiplier 1.5]
"""

import argparse
import math
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import binom
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import gradclip

try:
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant
except ImportError:
    dp_accounting = None

HIDDEN = 64
MICROBATCH, MICROBATCHES = 64, 4
SLOTS = MICROBATCH * MICROBATCHES
DELTA = 1e-4  # well below one in the number of training images


def init_params(key):
    first, second = jax.random.split(key)
    return {
        "hidden": {"w": jax.random.normal(first, (64, HIDDEN)) * jnp.sqrt(2 / 64), "b": jnp.zeros(HIDDEN)},
        "out": {"w": jax.random.normal(second, (HIDDEN, 10)) * jnp.sqrt(1 / HIDDEN), "b": jnp.zeros(10)},
    }


def logits(params, x):
    hidden = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"])
    return hidden @ params["out"]["w"] + params["out"]["b"]


def loss_of_one(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)


per_example_grads = jax.vmap(jax.grad(loss_of_one), in_axes=(None, 0, 0))


def sum_of_clipped(params, x, y, taken, max_norm):
    """The sum of the clipped gradients of the images in `taken` slots, and how many of them were clipped."""

    def microbatch(total, slots):
        x, y, taken = slots
        summed, norm = gradclip.clipped_sum(per_example_grads(params, x, y), jnp.where(taken, max_norm, 0.0))
        return jax.tree.map(jnp.add, total, summed), jnp.sum(taken & (norm > max_norm))

    rows = [a.reshape(MICROBATCHES, MICROBATCH, *a.shape[1:]) for a in (x, y, taken)]
    total, clipped = jax.lax.scan(microbatch, jax.tree.map(jnp.zeros_like, params), rows)
    return total, clipped.sum()


@partial(jax.jit, static_argnames="rate")
def private_step(params, key, x, y, rate, max_norm, noise_multiplier, learning_rate):
    """One step of DP-SGD; `rate` is the probability with which each image is drawn."""
    sampling, *keys = jax.random.split(key, 1 + len(jax.tree.leaves(params)))
    drawn = jax.random.bernoulli(sampling, rate, y.shape)
    which = jnp.nonzero(drawn, size=SLOTS, fill_value=len(y))[0]
    taken = which < len(y)  # the other slots read the last image, whose bound is 0 there
    total, clipped = sum_of_clipped(params, x[which], y[which], taken, max_norm)

    keys = jax.tree.unflatten(jax.tree.structure(params), keys)
    noise = jax.tree.map(lambda g, key: noise_multiplier * max_norm * jax.random.normal(key, g.shape), total, keys)
    expected = rate * len(y)
    params = jax.tree.map(lambda p, g, z: p - learning_rate * (g + z) / expected, params, total, noise)
    return params, clipped / jnp.sum(drawn)


@jax.jit
def accuracy(params, x, y):
    return jnp.mean(jnp.argmax(logits(params, x), axis=1) == y)


def privacy(rate, noise_multiplier, steps, examples):
    """Epsilon and delta of all steps together, for neighbours that differ by one image, added or removed."""
    step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise_multiplier))
    epsilon = RdpAccountant().compose(step, steps).get_epsilon(DELTA)
    # A draw of more images than there are slots would lose some, and be no Poisson sampling any more. How likely is it?
    overflow = steps * binom.sf(SLOTS, examples + 1, rate)
    return epsilon, DELTA + (1 + math.exp(epsilon)) * overflow, overflow


def train(data, args, noise_multiplier):
    """Train; the accuracy on training and test images, and the part of the images that was clipped, on average."""
    x_train, x_test, y_train, y_test = data
    key = jax.random.key(args.seed)
    params, clipped = init_params(jax.random.fold_in(key, 0)), []
    for step in range(args.steps):
        params, part = private_step(
            params,
            jax.random.fold_in(key, 1 + step),
            x_train,
            y_train,
            args.batch / len(y_train),
            args.max_norm,
            noise_multiplier,
            args.learning_rate,
        )
        clipped.append(part)
    return accuracy(params, x_train, y_train), accuracy(params, x_test, y_test), np.mean(clipped)


def main():
    parser = argparse.ArgumentParser(description="Differentially private training with clipped per-example gradients.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=float, default=128, help="the expected batch size")
    parser.add_argument("--max-norm", type=float, default=1.0)
    parser.add_argument("--noise-multiplier", type=float, default=1.5)
    parser.add_argument("--learning-rate", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if dp_accounting is None:
        print('jax_private_train.py needs dp-accounting: pip install "gradclip[private]"', file=sys.stderr)
        return 2

    digits = load_digits()
    images = (digits.data / 16).astype(np.float32)  # 16 is the largest grey there can be: nothing is read from the data
    labels = digits.target.astype(np.int32)
    data = train_test_split(images, labels, test_size=0.25, random_state=0)
    examples = len(data[0])

    epsilon, delta, overflow = privacy(args.batch / examples, args.noise_multiplier, args.steps, examples)
    if not delta < 1.01 * DELTA:
        parser.error(f"too large a batch: a draw may not fit into {SLOTS} slots, with a chance of {overflow:.1g}")

    for label, noise in (("no noise", 0.0), (f"noise {args.noise_multiplier:g}", args.noise_multiplier)):
        train_accuracy, test_accuracy, clipped = train(data, args, noise)
        accuracies = f"train {train_accuracy:.3f}, test {test_accuracy:.3f}"
        print(f"{label:10} accuracy: {accuracies}; {clipped:.0%} of the images clipped")
    draws = f"{args.steps} steps of {args.batch:g} of {examples} images"
    print(f"epsilon {epsilon:.2f} at delta {delta:.2g}: {draws}, on average")
    print(f"the chance that a draw did not fit into {SLOTS} slots, counted into delta: {overflow:.1g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Clip by the global norm, in place, in a CuPy training loop that never waits for the GPU.

A two-layer network with a backward pass written by hand learns scikit-learn's handwritten digits. The norm
that `gradclip.clip_grad_norm_` returns stays on the device; losses and norms are gathered there too, and
read once an epoch, for printing: that is the only time the host waits.

Needs CuPy, an NVIDIA GPU and scikit-learn. Run it with

    python examples/cupy_pipeline.py [--epochs 20] [--max-norm 1.0] [--limit 1797]
"""

import argparse
import sys

import numpy as np
from sklearn.datasets import load_digits

import gradclip

try:
    import cupy as cp
except ImportError:
    cp = None

HIDDEN = 64
BATCH = 64
LEARNING_RATE = 0.5


def init_params(rng):
    def layer(fan_in, fan_out):
        w = rng.normal(0, np.sqrt(2 / fan_in), (fan_in, fan_out))
        return {"w": cp.asarray(w, dtype=cp.float32), "b": cp.zeros(fan_out, dtype=cp.float32)}

    return {"hidden": layer(64, HIDDEN), "out": layer(HIDDEN, 10)}


def forward(params, x):
    hidden = cp.maximum(x @ params["hidden"]["w"] + params["hidden"]["b"], 0)
    scores = hidden @ params["out"]["w"] + params["out"]["b"]
    scores -= scores.max(axis=1, keepdims=True)
    return hidden, scores - cp.log(cp.exp(scores).sum(axis=1, keepdims=True))


def loss_and_grads(params, x, targets):
    """Mean cross-entropy against one-hot `targets`, and its gradient: the same tree as `params`."""
    hidden, log_probs = forward(params, x)
    loss = -(targets * log_probs).sum() / len(x)
    d_scores = (cp.exp(log_probs) - targets) / len(x)
    d_hidden = (d_scores @ params["out"]["w"].T) * (hidden > 0)
    grads = {
        "hidden": {"w": x.T @ d_hidden, "b": d_hidden.sum(axis=0)},
        "out": {"w": hidden.T @ d_scores, "b": d_scores.sum(axis=0)},
    }
    return loss, grads


def accuracy(params, x, targets):
    _, log_probs = forward(params, x)
    return float((log_probs.argmax(axis=1) == targets.argmax(axis=1)).mean())


def main():
    parser = argparse.ArgumentParser(description="A CuPy training loop with gradient clipping in place.")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--max-norm", type=float, default=1.0)
    parser.add_argument("--limit", type=int, default=1797, help="use only so many images")
    args = parser.parse_args()

    if cp is None:
        print("cupy_pipeline.py needs CuPy: pip install cupy-cuda12x (or cupy-cuda13x)", file=sys.stderr)
        return 2
    if not cp.cuda.is_available():
        print("cupy_pipeline.py needs a GPU: CuPy is installed but finds no CUDA device", file=sys.stderr)
        return 2

    digits = load_digits()
    rng = np.random.default_rng(0)
    order = rng.permutation(len(digits.data))[: args.limit]
    x = cp.asarray(digits.data[order] / 16, dtype=cp.float32)
    targets = cp.asarray(np.eye(10)[digits.target[order]], dtype=cp.float32)
    split = len(x) * 3 // 4
    x_train, x_test, t_train, t_test = x[:split], x[split:], targets[:split], targets[split:]

    params = init_params(rng)
    starts = range(0, max(split - BATCH, 0) + 1, BATCH)
    history = cp.empty((len(starts), 2), dtype=cp.float32)  # loss and norm of each step of an epoch
    for epoch in range(args.epochs):
        for step, start in enumerate(rng.permutation(starts)):
            batch = slice(start, start + BATCH)
            loss, grads = loss_and_grads(params, x_train[batch], t_train[batch])
            norm = gradclip.clip_grad_norm_(grads, args.max_norm)
            for name, layer in params.items():
                for key, value in layer.items():
                    value -= LEARNING_RATE * grads[name][key]
            history[step, 0] = loss
            history[step, 1] = norm
        losses, norms = history.get().T  # the one wait of the epoch
        print(
            f"epoch {epoch + 1:3d}  loss {losses.mean():.4f}  gradient norm {norms.mean():.3f}"
            f" (largest {norms.max():.3f})  clipped {(norms > args.max_norm).mean():4.0%}"
        )

    train, test = accuracy(params, x_train, t_train), accuracy(params, x_test, t_test)
    print(f"accuracy: train {train:.3f}, test {test:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

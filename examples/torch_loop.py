"""An ordinary PyTorch training loop, in which one import has changed: `clip_grad_norm_` comes from `gradclip.torch`.

A character RNN (`torch.nn.RNN` between an embedding and a linear layer) learns the language reference that comes with
Python, by plain gradient descent. It is trained twice at one learning rate, from the same weights and on the same
batches: first with an infinite `max_norm`, which clips nothing, and then with `--max-norm`.

    python examples/torch_loop.py                # a few seconds; the status is 0 only if the claim held
    python examples/torch_loop.py --rate 1       # a rate that needs no clipping: the claim does not hold

Clipping is no magic: it makes room for the rate. Over the seeds 0 to 9, after 3 epochs at a rate of 5, the loss was
2.07 to 2.13 with clipping and 6.7 to 28 without, where a uniform guess has 4.63. At rates that suit both, the clipped
run is the slower one: at 1 it came to 2.30, and the unclipped one to 2.14.

Needs PyTorch; a build for the CPU will do.
"""

import argparse
import math
import sys

try:
    import torch
except ImportError:
    sys.exit("torch_loop.py needs PyTorch: pip install torch")
from torch import nn

from gradclip.__main__ import read_text
from gradclip.torch import clip_grad_norm_

LENGTH, BATCH, STEPS = 32, 16, 60  # characters in a sequence, sequences in a batch, batches in an epoch
torch.set_num_threads(1)  # products so small take longer on several


class Network(nn.Module):
    """Predicts each character from those before it."""

    def __init__(self, characters, width=96):
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.rnn = nn.RNN(width, width)
        self.output = nn.Linear(width, characters)

    def forward(self, codes):
        return self.output(self.rnn(self.embedding(codes))[0])


def train(codes, characters, max_norm, args):
    """Gradient descent: for each epoch the mean loss, and the norms before clipping."""
    torch.manual_seed(args.seed)  # the same seed for both runs: same weights, same batches
    model = Network(characters)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.rate)
    window = torch.arange(LENGTH + 1)[:, None]
    for _ in range(args.epochs):
        losses, norms = [], []
        for _ in range(STEPS):
            batch = codes[window + torch.randint(len(codes) - LENGTH, (BATCH,))]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(batch[:-1]).flatten(0, 1), batch[1:].flatten())
            loss.backward()
            norms.append(clip_grad_norm_(model.parameters(), max_norm))
            optimizer.step()
            losses.append(loss.detach())
        yield torch.stack(losses).mean().item(), torch.stack(norms)


def main():
    """Train twice, print both, and see whether the claim holds."""
    parser = argparse.ArgumentParser(description="A PyTorch training loop, without and with gradient clipping.")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rate", type=float, default=5.0, help="the learning rate of both runs")
    parser.add_argument("--max-norm", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    text, source = read_text()
    characters = sorted(set(text))
    number = {character: i for i, character in enumerate(characters)}
    codes = torch.tensor([number[character] for character in text])
    guessing = math.log(len(characters))
    print(
        f"{source}: {len(text):,} characters, {len(characters)} different ones; a uniform guess loses {guessing:.2f}\n"
    )

    runs = [train(codes, len(characters), bound, args) for bound in (math.inf, args.max_norm)]
    print(f"       {'without clipping':^26}   {f'with max_norm={args.max_norm:g}':^26}")
    print("epoch" + 2 * f"  {'loss':>8} {'norm':>8} {'largest':>9}", flush=True)
    for epoch, rows in enumerate(zip(*runs, strict=True), 1):
        cells = [f"  {loss:8.2f} {norms.mean():8.2f} {norms.max():9.2f}" for loss, norms in rows]
        print(f"{epoch:5d}{''.join(cells)}", flush=True)

    (plain, _), (clipped, _) = rows
    fails, learns = not plain < guessing, clipped < 0.75 * guessing  # NaN is a failure too
    outcome = f"{'fails' if fails else 'does not fail'} without clipping, and with it "
    outcome += "learns" if learns else "does not learn"
    held = fails and learns
    print(f"\nat a rate of {args.rate:g} the network {outcome}: the claim {'held' if held else 'did not hold'}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())

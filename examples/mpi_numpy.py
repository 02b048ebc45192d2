"""Clip gradients that are spread over MPI ranks, in NumPy: each rank's part, and the one norm of all.

    mpiexec -n 4 python -m mpi4py examples/mpi_numpy.py     # needs mpi4py and an MPI: pip install mpi4py mpich

A linear model on the digits of 64 pixels: each rank holds the weights of its pixels only, and all hold the same bias.
The bias is replicated: its gradient must count once, not once for each rank. `python -m mpi4py` ends all ranks when
one of them fails; without it the others would wait for it forever.
"""

import sys

try:
    from mpi4py import MPI
except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, an MPI library is not
    sys.exit(f"this example needs mpi4py and an MPI: pip install mpi4py mpich ({error})")

import numpy as np
from sklearn.datasets import load_digits

import gradclip
from gradclip.distributed import mpi

STEPS, BATCH, LEARNING_RATE, MAX_NORM = 60, 256, 0.5, 0.1


def gradients(params, images, labels, comm):
    """The loss, and the gradients of this rank's weights and of the bias, which are the same on all ranks."""
    logits = np.empty((len(images), 10))
    comm.Allreduce(images @ params["weights"], logits)
    logits += params["bias"]
    logits -= logits.max(axis=1, keepdims=True)
    p = np.exp(logits)
    p /= p.sum(axis=1, keepdims=True)
    rows = np.arange(len(labels))
    loss = -np.log(p[rows, labels]).mean()
    p[rows, labels] -= 1
    p /= len(labels)
    return loss, {"weights": images.T @ p, "bias": p.sum(axis=0)}


def main():
    comm = MPI.COMM_WORLD
    rank, size = comm.Get_rank(), comm.Get_size()
    digits = load_digits()
    mine = np.array_split(np.arange(64), size)[rank]  # this rank's pixels
    images, labels = digits.data[:, mine] / 16, digits.target
    params = {"weights": np.zeros((len(mine), 10)), "bias": np.zeros(10)}
    all_reduce = mpi(comm, replicated={"weights": False, "bias": True})

    rng = np.random.default_rng(0)  # the same batches on all ranks
    for step in range(STEPS):
        batch = rng.integers(0, len(labels), BATCH)
        loss, grads = gradients(params, images[batch], labels[batch], comm)
        part = gradclip.global_norm(grads["weights"])
        grads, norm = gradclip.clip_grad_norm(grads, MAX_NORM, all_reduce=all_reduce)
        for key, g in grads.items():
            params[key] -= LEARNING_RATE * g
        if step in (0, STEPS - 1):
            lines = comm.gather(f"  rank {rank}: {len(mine)} pixels, norm of its part {part:.12f}, joined {norm:.12f}")
            if rank == 0:
                bias = gradclip.global_norm(grads["bias"]) * max(1.0, float(norm) / MAX_NORM)
                print(f"step {step}: loss {loss:.4f}, norm {norm:.12f}, norm of the bias's part {bias:.12f}")
                print(*lines, sep="\n", flush=True)
    same = comm.allgather(params["bias"].tobytes())
    if rank == 0:
        print(f"after {STEPS} steps the bias is the same on all {size} ranks, bit for bit: {len(set(same)) == 1}")


if __name__ == "__main__":
    main()

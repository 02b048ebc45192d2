"""Draw docs/norms.png: the norms of the network of `python -m gradclip`, as it is trained with a bound.

    python docs/norms.py [FILE]

It takes some seconds, and needs matplotlib. The log itself is left in a temporary folder.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import gradclip
from gradclip.__main__ import BATCH, LENGTH, loss_and_grads, read_text, start
from gradclip.monitor import NormLog
from gradclip.monitor.__main__ import main

STEPS, MAX_NORM, LEARNING_RATE = 500, 1.0, 0.6


def train(path):
    characters, codes = np.unique(np.array(list(read_text()[0])), return_inverse=True)
    rng = np.random.default_rng(0)
    params, offsets = start(len(characters), rng), np.arange(LENGTH + 1)[:, None]
    with NormLog(path) as log:
        for step in range(STEPS):
            _, grads = loss_and_grads(params, codes[offsets + rng.integers(0, len(codes) - LENGTH, BATCH)])
            norms = gradclip.norms(grads)
            grads, norm = gradclip.clip_grad_norm(grads, MAX_NORM)
            log.add(step, norm, max_norm=MAX_NORM, per_leaf=norms)
            for name in params:
                params[name] -= np.float32(LEARNING_RATE) * grads[name]


if __name__ == "__main__":
    log = Path(tempfile.mkdtemp()) / "norms.csv"
    train(log)
    picture = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).with_name("norms.png"))
    status = main([str(log), "-o", picture])
    Image.open(picture).quantize(256).save(picture, optimize=True)  # a third of the bytes
    sys.exit(status)

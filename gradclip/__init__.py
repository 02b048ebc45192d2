"""Gradient clipping for every array library: exact, functional, and one call for NumPy, JAX, CuPy and others.

>>> import numpy as np
>>> import gradclip
>>> grads, norm = gradclip.clip_grad_norm({"w": np.array([3.0, 4.0])}, max_norm=1.0)
>>> grads["w"], float(norm)
(array([0.6, 0.8]), 5.0)
"""

from gradclip import distributed as distributed
from gradclip._agc import clip_grad_agc
from gradclip._clip import clip_grad_norm, clip_grad_norm_, global_norm, norms
from gradclip._clip_value import clip_grad_value, clip_grad_value_
from gradclip._errors import Culprit, LeafError, NonFiniteError
from gradclip._groups import Units
from gradclip._per_example import clipped_sum
from gradclip._threads import set_num_threads
from gradclip._types import Clipped, ClippedSum

__version__ = "0.2.0"

__all__ = [
    "Clipped",
    "ClippedSum",
    "Culprit",
    "LeafError",
    "NonFiniteError",
    "Units",
    "clip_grad_agc",
    "clip_grad_norm",
    "clip_grad_norm_",
    "clip_grad_value",
    "clip_grad_value_",
    "clipped_sum",
    "global_norm",
    "norms",
    "set_num_threads",
]

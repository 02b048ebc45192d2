"""Rules that choose `max_norm` from the norms seen so far.

A rule is made once, and holds settings only. What it remembers is a state, which goes in and comes out:

>>> import numpy as np
>>> from gradclip.adaptive import AutoClip
>>> rule = AutoClip(quantile=0.1)
>>> grads = {"w": np.array([3.0, 4.0])}
>>> state = rule.init(grads)
>>> grads, norm, max_norm, state = rule.clip(grads, state)

So it goes through `jax.jit` and `lax.scan`, into checkpoints, and works for every library that gradclip clips. `Rule`
says how to write one of your own.
"""

from gradclip.adaptive._autoclip import AutoClip, AutoClipState
from gradclip.adaptive._numbers import Number, minimum, where
from gradclip.adaptive._rule import ClippedByRule, Rule
from gradclip.adaptive._rules import (
    AdaGC,
    AdaGCState,
    NormGrowth,
    NormGrowthState,
    QuantileBound,
    QuantileBoundState,
    ZClip,
    ZClipState,
)

__all__ = [
    "AdaGC",
    "AdaGCState",
    "AutoClip",
    "AutoClipState",
    "ClippedByRule",
    "NormGrowth",
    "NormGrowthState",
    "Number",
    "QuantileBound",
    "QuantileBoundState",
    "Rule",
    "ZClip",
    "ZClipState",
    "minimum",
    "where",
]

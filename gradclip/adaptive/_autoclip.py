"""AutoClip: a quantile of the norms seen so far."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from gradclip._types import Array
from gradclip.adaptive._numbers import Number, where
from gradclip.adaptive._rule import Rule
from gradclip.adaptive._settings import real, whole


class AutoClipState(NamedTuple):
    """What `AutoClip` remembers of each group: the last norms, in the order in which they came, and in their own."""

    count: Array
    recent: Any
    """A ring of `history` entries along axis 0: norm i, counted from 0, is entry i mod `history`."""
    ordered: Any
    """The same from the smallest to the largest; inf where there is none yet."""


@dataclass(frozen=True)
class AutoClip(Rule):
    r"""The bound is a quantile of the last norms, that of this step among them.

    .. math:: c_t = \mathrm{quantile}_q\{\|g_s\| : t - H < s \le t\}

    With linear interpolation, as `numpy.quantile` has it.

    Parameters
    ----------
    quantile : float
        q, from 0 to 1: 0.1 clips nine steps in ten, and keeps their direction only.
    history : int
        H >= 1: how many norms are remembered. A step takes a time that grows with it, and for each group two arrays of
        that length are kept.

    Notes
    -----
    P. Seetharaman, G. Wichern, B. Pardo, J. Le Roux, "AutoClip: Adaptive Gradient Clipping for Source Separation
    Networks", MLSP 2020, arXiv:2007.14469. The paper, and its authors' code for PyTorch, remember every norm, and
    their code for TensorFlow the last 10,000: `history`. That takes the nearest norm for the quantile; here it is
    interpolated, as in the code for PyTorch.

    Examples
    --------
    >>> import numpy as np
    >>> from gradclip.adaptive import AutoClip
    >>> rule = AutoClip(quantile=0.5)
    >>> state = rule.init([np.zeros(2)])
    >>> for scale in (1.0, 2.0, 3.0, 100.0):
    ...     grads, norm, max_norm, state = rule.clip([scale * np.array([3.0, 4.0])], state)
    >>> float(norm), float(max_norm), grads  # of 5, 10, 15 and 500
    (500.0, 12.5, [array([ 7.5, 10. ])])
    """

    quantile: float = 0.1
    history: int = 1000

    def __post_init__(self) -> None:
        real(self, "quantile", 0, 1)
        whole(self, "history", 1)

    def start(self, count: Array, zero: Number) -> AutoClipState:
        recent = zero.repeated(self.history)
        return AutoClipState(count, recent, recent + math.inf)

    def step(self, state: AutoClipState, norm: Number) -> tuple[Number, AutoClipState]:
        xp, count, ordered = norm.xp, state.count, state.ordered
        number = xp.ones_like(state.recent.mantissa) > 0
        place = xp.cumulative_sum(xp.astype(number, count.dtype), axis=0, dtype=count.dtype) - 1  # the entries' numbers
        at = place == count % self.history
        gone = where(count >= self.history, state.recent.chosen(at), math.inf)

        # One number leaves the ordered ones, and one comes: what is between their places moves by one.
        def smaller(than: Number) -> Array:
            return xp.sum(xp.astype(ordered < than, count.dtype), axis=0, dtype=count.dtype)

        left, come = smaller(gone), smaller(norm) - xp.astype(gone < norm, count.dtype)
        back = xp.logical_and(place >= left, place < come)
        forth = xp.logical_and(place > come, place <= left)
        ordered = where(back, ordered.shifted(-1), where(forth, ordered.shifted(1), ordered))
        ordered = where(place == come, norm, ordered)

        last = xp.minimum(count, xp.full_like(count, self.history - 1))
        position = self.quantile * xp.astype(last, norm.mantissa.dtype)
        below = xp.floor(position)
        part, low = position - below, xp.astype(below, count.dtype)
        one = ordered.chosen(place == low)
        next_one = ordered.chosen(place == xp.minimum(low + 1, last))
        bound = where(part > 0, one + (next_one - one) * part, one)
        return bound, AutoClipState(count, where(at, norm, state.recent), ordered)

"""Rules that remember a few numbers of each group."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from gradclip._types import Array, Scalar
from gradclip.adaptive._numbers import Number, minimum, where
from gradclip.adaptive._rule import Rule
from gradclip.adaptive._settings import real, whole


class ZClipState(NamedTuple):
    """What `ZClip` remembers of each group."""

    count: Array
    mean: Any
    variance: Any


@dataclass(frozen=True)
class ZClip(Rule):
    r"""Clip what stands out: norms by more than `threshold` standard deviations above their running mean.

    .. math::

        c_t = \mu + \frac{z^2 \sigma^2}{\|g_t\| - \mu} \text{ if } \|g_t\| > \mu + z \sigma, \text{ else } \infty

    so that the further out a norm is, the closer to the mean it comes. Mean and variance learn from what is left, x:

    .. math:: \mu' = \alpha \mu + (1 - \alpha) x, \qquad \sigma'^2 = \alpha \sigma^2 + (1 - \alpha) (x - \mu')^2

    Parameters
    ----------
    threshold : float
        z > 0, in standard deviations.
    decay : float
        :math:`\alpha`, from 0 to 1, both excluded.
    warmup : int
        So many steps nothing stands out, and mean and variance are those of the norms so far.
    max_norm : float
        No bound is larger. inf, the default: none is given, in the first `warmup` steps neither.

    Notes
    -----
    A. Kumar, L. Owen, N. R. Chowdhury, F. Güra, "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", 2025,
    arXiv:2504.02507, and its authors' code (mode "zscore", "adaptive_scaling"), which this follows in learning from
    what the rule left, not from what `max_norm` did. Theirs limits norms to 1 besides, unless told otherwise, and adds
    1e-6 to the standard deviation: here nothing is added, so that the rule does the same at any scale.

    Examples
    --------
    >>> import numpy as np
    >>> from gradclip.adaptive import ZClip
    >>> rule = ZClip(warmup=4)
    >>> state = rule.init([np.zeros(2)])
    >>> for scale in (0.9, 1.1, 0.9, 1.1, 10.0):
    ...     grads, norm, max_norm, state = rule.clip([scale * np.array([0.6, 0.8])], state)
    >>> float(norm), round(float(max_norm), 4)  # the mean of the first four is 1, their variance 0.01
    (10.0, 1.0069)
    """

    threshold: float = 2.5
    decay: float = 0.97
    warmup: int = 25
    max_norm: float = math.inf

    def __post_init__(self) -> None:
        real(self, "threshold", 0, math.inf, open=True)
        real(self, "decay", 0, 1, open=True)
        whole(self, "warmup", 1)
        real(self, "max_norm", 0, math.inf)

    def start(self, count: Array, zero: Number) -> ZClipState:
        return ZClipState(count, zero, zero)

    def step(self, state: ZClipState, norm: Number) -> tuple[Number, ZClipState]:
        xp, mean, variance = norm.xp, state.mean, state.variance
        warm, above = state.count < self.warmup, norm - mean
        allowed = self.threshold**2 * variance
        stands_out = xp.logical_and(xp.logical_and(above > 0, above * above > allowed), xp.logical_not(warm))
        bound = where(stands_out, mean + allowed / where(stands_out, above, 1.0), math.inf)
        left = minimum(norm, bound)
        weight = 1 / xp.astype(state.count + 1, norm.mantissa.dtype)
        weight = xp.where(warm, weight, xp.full_like(weight, 1 - self.decay))
        new = mean + (left - mean) * weight
        # In the beginning the variance of all norms so far, by Welford's recurrence; then the running one.
        square = (left - new) * where(warm, left - mean, left - new)
        spread = variance + (square - variance) * weight
        return minimum(bound, self.max_norm), ZClipState(state.count, new, where(spread > 0, spread, 0.0))


class AdaGCState(NamedTuple):
    """What `AdaGC` remembers of each group."""

    count: Array
    mean: Any
    """The running mean of the clipped norms, in the first `warmup` steps their minimum; 0 if none was above 0."""


@dataclass(frozen=True)
class AdaGC(Rule):
    r"""Let each norm be at most `factor` times the running mean of what was left of it: for ``per="leaf"``.

    .. math:: c_{t,i} = \lambda \gamma_{t-1,i}, \qquad
        \gamma_{t,i} = \beta \gamma_{t-1,i} + (1 - \beta) \min(\|g_{t,i}\|, c_{t,i})

    In the first `warmup` steps all groups are clipped as one, by their global norm, and :math:`\gamma_i` is the
    smallest norm that was left of group i.

    Parameters
    ----------
    factor : float
        :math:`\lambda` > 0, 1.05 in the paper.
    decay : float
        :math:`\beta`, from 0 to 1, both excluded.
    warmup : int
        How many steps the warm-up takes.
    max_norm : float
        The bound of the global norm in the warm-up.

    Notes
    -----
    G. Wang et al., "AdaGC: Enhancing LLM Pretraining Stability via Adaptive Gradient Clipping", 2025, arXiv:2502.11034.
    The global norm is the 2-norm of the groups' norms. A norm of 0 tells no scale: as long as a group has had no other,
    it is clipped by the global norm alone, and not held at 0 for ever, as the paper's minimum would have it.

    Examples
    --------
    >>> import numpy as np
    >>> from gradclip.adaptive import AdaGC
    >>> rule = AdaGC(factor=2.0, warmup=1)
    >>> state = rule.init({"w": np.zeros(1), "b": np.zeros(1)}, per="leaf")
    >>> for scale in (1.0, 1.0, 10.0):
    ...     grads = {"w": np.array([0.6 * scale]), "b": np.array([0.2])}
    ...     grads, norm, max_norm, state = rule.clip(grads, state, per="leaf")
    >>> {name: round(float(c), 2) for name, c in max_norm.items()}, grads
    ({'w': 1.2, 'b': 0.4}, {'w': array([1.2]), 'b': array([0.2])})
    """

    factor: float = 1.05
    decay: float = 0.98
    warmup: int = 100
    max_norm: float = 1.0

    def __post_init__(self) -> None:
        real(self, "factor", 0, math.inf, open=True)
        real(self, "decay", 0, 1, open=True)
        whole(self, "warmup", 0)
        real(self, "max_norm", 0, math.inf)

    def start(self, count: Array, zero: Number) -> AdaGCState:
        return AdaGCState(count, zero)

    def step(self, state: AdaGCState, norm: Number) -> tuple[Number, AdaGCState]:
        mean, warm = state.mean, state.count < self.warmup
        finite = where(norm.isfinite(), norm, 0.0)
        total = (finite * finite).sum().sqrt()
        share = where(total > self.max_norm, norm * (self.max_norm / where(total > 0, total, 1.0)), math.inf)
        known = mean > 0
        early = norm.xp.logical_or(warm, norm.xp.logical_not(known))
        bound = where(early, share, self.factor * mean)
        left = minimum(norm, bound)
        later = where(warm, minimum(mean, left), self.decay * mean + (1 - self.decay) * left)
        later = where(norm.xp.logical_and(warm, left <= 0), mean, later)
        return bound, AdaGCState(state.count, where(known, later, left))


class NormGrowthState(NamedTuple):
    """What `NormGrowth` remembers of each group."""

    count: Array
    last: Any
    """The last norm that was above 0, after clipping."""


@dataclass(frozen=True)
class NormGrowth(Rule):
    r"""Let a norm grow by at most a factor from one step to the next.

    .. math:: c_t = \gamma \min(\|g_{t-1}\|, c_{t-1})

    Parameters
    ----------
    limit : float
        :math:`\gamma` >= 1. The first norm is not limited.

    Notes
    -----
    X. Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?", 2024,
    arXiv:2410.01623, where it limits one part of the update of each matrix: ``per="leaf"`` has a limit for each. Theirs
    adds 1e-8 to the last norm, and starts from there after a norm of 0. Here 0 is not learned from, so that gradients
    which are 0 for a step come back as they were.

    Examples
    --------
    >>> import numpy as np
    >>> from gradclip.adaptive import NormGrowth
    >>> rule = NormGrowth(limit=1.5)
    >>> state = rule.init([np.zeros(2)])
    >>> for scale in (1.0, 10.0, 10.0):
    ...     grads, norm, max_norm, state = rule.clip([scale * np.array([3.0, 4.0])], state)
    >>> float(max_norm)  # 5, 7.5, and
    11.25
    """

    limit: float = 1.01

    def __post_init__(self) -> None:
        real(self, "limit", 1, math.inf)

    def start(self, count: Array, zero: Number) -> NormGrowthState:
        return NormGrowthState(count, zero)

    def step(self, state: NormGrowthState, norm: Number) -> tuple[Number, NormGrowthState]:
        bound = where(state.last > 0, self.limit * state.last, math.inf)
        return bound, NormGrowthState(state.count, where(norm > 0, minimum(norm, bound), state.last))


class QuantileBoundState(NamedTuple):
    """What `QuantileBound` remembers."""

    count: Array
    max_norm: Any
    """The bound for the next step."""


@dataclass(frozen=True)
class QuantileBound(Rule):
    r"""Follow a quantile of the norms of examples: for ``per="example"``. All norms of a step have one bound.

    .. math:: c_{t+1} = c_t \exp(-\eta\, (b_t - q)), \qquad b_t = \text{the share of norms at most } c_t

    Parameters
    ----------
    quantile : float
        q, from 0 to 1.
    rate : float
        :math:`\eta` > 0: how fast the bound moves.
    max_norm : float
        The first bound, > 0.

    Notes
    -----
    G. Andrew, O. Thakkar, H. B. McMahan, S. Ramaswamy, "Differentially Private Learning with Adaptive Clipping",
    NeurIPS 2021, arXiv:1905.03871: the geometric update. TensorFlow Privacy's, besides, keeps the noisy share within 0
    and 1, and divides by the expected number of examples: here it is divided by the number of finite norms. The bound
    of a step does not depend on its norms. Where examples are spread over devices, hand on the norms of all of them
    (`jax.lax.all_gather`).

    Examples
    --------
    >>> import numpy as np
    >>> from gradclip.adaptive import QuantileBound
    >>> rule = QuantileBound(quantile=0.5, rate=0.2, max_norm=1.0)
    >>> state = rule.init([np.zeros((4, 2))], per="example")
    >>> norm = np.array([0.5, 2.0, 3.0, 4.0])  # of four examples, a quarter of them at most 1
    >>> max_norm, state = rule.update(state, norm)
    >>> max_norm, state = rule.update(state, norm)
    >>> round(float(max_norm), 4)  # exp(0.2 * 0.25)
    1.0513
    """

    pooled: ClassVar[bool] = True

    quantile: float = 0.5
    rate: float = 0.2
    max_norm: float = 0.1

    def __post_init__(self) -> None:
        real(self, "quantile", 0, 1)
        real(self, "rate", 0, math.inf, open=True)
        real(self, "max_norm", 0, math.inf, open=True)

    def update(self, state: Any, norm: Any, noise: Scalar | None = None) -> tuple[Any, Any]:
        """As `Rule.update`. `noise`: added to the number of norms that are at most the bound, for privacy: the paper's
        :math:`N(0, \\sigma_b^2)`; a number or a 0-d array.
        """
        return self._updated(state, norm, *([] if noise is None else [noise]))

    def step(self, state: QuantileBoundState, norm: Number, noise: Scalar = 0.0) -> tuple[Number, QuantileBoundState]:
        xp, bound, dtype = norm.xp, state.max_norm, norm.mantissa.dtype
        number, below = (xp.sum(xp.astype(x, dtype)) for x in (norm.isfinite(), norm <= bound))
        share = (below + noise) / xp.maximum(number, xp.ones_like(number))
        return bound, QuantileBoundState(state.count, bound * xp.exp(-self.rate * (share - self.quantile)))

    def start(self, count: Array, zero: Number) -> QuantileBoundState:
        return QuantileBoundState(count, zero + self.max_norm)

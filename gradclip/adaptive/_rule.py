"""What all rules have in common: their states as arrays, a row for each group, and the way from a norm to a bound."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import array_api_compat

from gradclip._backends.generic import Backend
from gradclip._call import Given, decided, given, measured
from gradclip._decide import Bounds, Verdict
from gradclip._dtypes import dtype_name, fits
from gradclip._groups import grouped
from gradclip._leaves import active, backend_for, refuse_unwritable
from gradclip._libraries import constant, fused, library
from gradclip._scaled import Scaled
from gradclip._tree import flatten
from gradclip._types import AllReduce, Array, Namespace, Nonfinite, NormType, Per, Scalar, Tree
from gradclip.adaptive._numbers import Number, where
from gradclip.adaptive._rows import Rows

T = TypeVar("T")


class ClippedByRule(NamedTuple, Generic[T]):
    """What `Rule.clip` returns: ``grads, norm, max_norm, state = rule.clip(grads, state)``."""

    grads: T
    """The tree that went in, clipped."""

    norm: Any
    """The norm before clipping, as `gradclip.clip_grad_norm` gives it."""

    max_norm: Any
    """The bound that the rule has chosen, in the form of `norm`; inf where it lets everything pass."""

    state: Any
    """What the rule remembers, for the next step."""


class Rule:
    """A rule that chooses `max_norm` from the norms seen so far. Subclasses say how, by `start` and `step`.

    A rule is settings only, and hashable; what it remembers is a state that goes in and comes out: a named tuple of small
    arrays of the gradients' own library, on their device. So it goes through `jax.jit`, `lax.scan`, `vmap`, donation
    and checkpoints. Each group of `per` has numbers of its own. A norm that is not finite is answered by `nonfinite`,
    and never learned from. In derivatives, the bound is a constant.

    Notes
    -----
    A rule of your own is a frozen dataclass with two methods, on `Number` objects, which calculate beyond the range of
    their dtype, and on plain arrays for counts. This one allows twice the running mean of the norms:

    >>> from dataclasses import dataclass
    >>> from typing import Any, NamedTuple
    >>> import numpy as np
    >>> from gradclip.adaptive import Number, Rule, minimum, where
    >>> class MeanState(NamedTuple):
    ...     count: Any
    ...     mean: Any
    >>> @dataclass(frozen=True)
    ... class TwiceTheMean(Rule):
    ...     decay: float = 0.9
    ...
    ...     def start(self, count, zero):
    ...         return MeanState(count, mean=zero)
    ...
    ...     def step(self, state, norm):
    ...         bound = where(state.count == 0, norm, 2 * state.mean)
    ...         mean = where(state.count == 0, norm, self.decay * state.mean + (1 - self.decay) * minimum(norm, bound))
    ...         return bound, state._replace(mean=mean)
    >>> rule = TwiceTheMean()
    >>> grads = [np.array([3.0, 4.0])]
    >>> state = rule.init(grads)
    >>> for scale in (1.0, 1.0, 10.0):
    ...     clipped, norm, max_norm, state = rule.clip([scale * x for x in grads], state)
    >>> float(norm), float(max_norm), clipped
    (50.0, 10.0, [array([6., 8.])])
    """

    pooled: ClassVar[bool] = False
    """Whether all norms of a step share one memory, and get one bound."""

    def start(self, count: Array, zero: Number) -> Any:
        """The state before the first norm: a named tuple whose first field is `count`, made of these.

        `count`: how many norms were learned from, 0, as int32; it is kept up by the class. `zero`: a number. Both are 0-d
        for the global norm, or have one entry for each group.
        """
        raise NotImplementedError

    def step(self, state: Any, norm: Number) -> tuple[Number, Any]:
        """The bound for gradients of this norm, and the state after it: pure, and reading no element.

        Where a norm is not finite it is inf here, and what becomes of that group's state is not kept.
        """
        raise NotImplementedError

    def init(self, grads: Tree, per: Per = None) -> Any:
        """Return the state before the first step.

        Parameters
        ----------
        grads : tree of arrays
            Gradients, or what is like them: parameters. Only shapes, dtypes, library and device count.
        per : None, "leaf", "unit", Units, "example", tree of labels, or function, static
            As in `gradclip.clip_grad_norm`: the state has an entry for each group.

        Returns
        -------
        named tuple of arrays
            Numbers are pairs, mantissa and exponent (see `Number`); the exponent is None where the library is wide
            enough without: float64 for gradients of up to 32 bits.

        Raises
        ------
        LeafError, TypeError, ValueError
            As `gradclip.norms`.
        """
        flat = active(grads)
        parts = grouped(flat, per)
        backend, leaves = backend_for(flat).adopt(flat.values)
        xp, acc = backend.xp, backend.accumulation(leaves)
        wide = all(fits(dtype_name(x), acc) for x in leaves)
        shape = () if self.pooled or per is None else (parts.groups.count,)
        with backend.session(leaves, in_place=False):
            home = array_api_compat.device(leaves[0]) if leaves else None
            zero, count = (backend.move(xp.zeros(shape, dtype=dtype), home) for dtype in (acc, xp.int32))
            start = self.start(count, Number.of(xp, zero, wide))
            return start._make(map(_closed, start))

    def update(self, state: Any, norm: Any) -> tuple[Any, Any]:
        """Choose the bound for gradients of this norm, and learn from it.

        Parameters
        ----------
        state : named tuple
            What `init` or the last step has given.
        norm : 0-d array, tree of arrays, array, or dict
            The norm of this step's gradients, as `gradclip.norms` gives it for the same `per`.

        Returns
        -------
        max_norm : 0-d array, tree of arrays, array, or dict
            The bound, in the form of `norm` and its dtypes.
        state : named tuple
            What is remembered now.

        Raises
        ------
        TypeError, ValueError
            For norms of another library, or of another number than the state is for.

        Notes
        -----
        A norm that is beyond its dtype comes as inf, and cannot be told from that of gradients that are not finite:
        `clip` sees it as it is.
        """
        return self._updated(state, norm)

    def _updated(self, state: Any, norm: Any, *more: Any) -> tuple[Any, Any]:
        flat, like = flatten(norm, "norm"), state[0]
        xp, home, dtype = array_api_compat.array_namespace(like), library(like), _dtype(state)
        for path, x in zip(flat.paths(), flat.values, strict=True):
            if library(x) not in (None, home):
                raise TypeError(
                    f"{path} is a {library(x)} array, and the state is made of {home} arrays: pass the norm that gradclip "
                    "gave for gradients of that library"
                )
        device = array_api_compat.device(like)
        own = [xp.asarray(x, dtype=dtype, device=device) if library(x) is None else x for x in flat.values]
        blocks = [xp.astype(constant(x), dtype) for x in own]
        rows = Rows.in_form(norm, blocks)
        with Backend(xp).session(blocks, in_place=False):
            row = rows.joined(xp, blocks)
            number = Number.of(xp, xp.zeros((0,), dtype=dtype) if row is None else row, _is_wide(state))
            bound, state = self._stepped(state, number, *more)
            if bound.mantissa.ndim == 0 and len(own) != 1:  # one for all
                return bound.value(), state
            each = [xp.astype(x, y.dtype) for x, y in zip(rows.split(xp, bound.value()), own, strict=True)]
            return flat.rebuild(list(map(xp.asarray, each))), state

    def clip(
        self,
        grads: T,
        state: Any,
        norm_type: NormType = 2.0,
        *,
        per: Per = None,
        nonfinite: Nonfinite = "propagate",
        divide_by: Scalar | None = None,
        all_reduce: AllReduce | None = None,
    ) -> ClippedByRule[T]:
        """Clip gradients by the bound that the rule chooses for them: `update` and `gradclip.clip_grad_norm` in one.

        Parameters
        ----------
        grads : tree of arrays
            As in `gradclip.clip_grad_norm`.
        state : named tuple
            What `init` or the last step has given, for the same `per`.
        norm_type, per, nonfinite, divide_by, all_reduce
            As in `gradclip.clip_grad_norm`. With `all_reduce`, all shards come to the same bound, to the bit.

        Returns
        -------
        ClippedByRule
            ``grads, norm, max_norm, state = ...``: the clipped tree, the norm before clipping, the bound, the new state.

        Raises
        ------
        LeafError, NonFiniteError, TypeError, ValueError
            As `gradclip.clip_grad_norm`; ValueError for a state that was made for another number of groups.
        """
        call = given(grads, norm_type, per, Bounds(math.inf, None, divide_by), nonfinite, all_reduce)
        with call.backend.session(call.leaves, in_place=False):
            verdict, max_norm, state = self._settled(call, state)
            leaves = call.backend.scale(call.leaves, verdict.factors, call.groups, in_place=False)
            return ClippedByRule(
                call.grouped.flat.rebuild(list(leaves)), call.grouped.norms(verdict.norms), max_norm, state
            )

    def clip_(
        self,
        grads: Tree,
        state: Any,
        norm_type: NormType = 2.0,
        *,
        per: Per = None,
        nonfinite: Nonfinite = "propagate",
        divide_by: Scalar | None = None,
        all_reduce: AllReduce | None = None,
    ) -> tuple[Any, Any, Any]:
        """Clip as `clip` does, in place: ``norm, max_norm, state = rule.clip_(grads, state)``.

        For arrays that can be written to (NumPy, CuPy, torch). Parameters are those of `clip`.

        Raises
        ------
        LeafError
            As `clip`, and for a leaf that cannot be written to. Nothing has been written.
        """
        call = given(grads, norm_type, per, Bounds(math.inf, None, divide_by), nonfinite, all_reduce)
        refuse_unwritable(call.grouped.flat, "clip")
        with call.backend.session(call.leaves, in_place=True):
            verdict, max_norm, state = self._settled(call, state)
            call.backend.scale(call.leaves, verdict.factors, call.groups, in_place=True)
            return call.grouped.norms(verdict.norms), max_norm, state

    def _settled(self, call: Given, state: Any) -> tuple[Verdict, Any, Any]:
        """Measure, choose the bound, decide."""
        partials, divisor = measured(call), call.bounds.divide_by
        found = decided(call._replace(bounds=Bounds(), nonfinite="propagate"), partials)
        reported, rows, like = found.norms, Rows.of(call.grouped), state[0]
        xp = array_api_compat.array_namespace(like)
        for x in reported[:1]:
            if library(x) != library(like):
                raise TypeError(
                    f"the gradients are {library(x)} arrays, and the state is made of {library(like)} ones: "
                    "make it by rule.init(grads), for these gradients"
                )
        # The factors are the norms, as they are: a factor that is multiplied with a shift twice.
        factor, shift = (None if x is None else rows.of_groups(xp, xp.asarray(constant(x))) for x in found.factors)
        norm = Number.of(xp, factor, _is_wide(state))
        if shift is not None:
            norm = norm * shift * shift
        if divisor is not None:
            norm = norm / (divisor if isinstance(divisor, float) else constant(divisor))
        bound, state = self._stepped(state, norm)
        max_norm, unit = (None if x is None else rows.for_groups(x) for x in bound.in_two())
        verdict = decided(call._replace(bounds=Bounds(max_norm, None, divisor, unit)), partials)
        if bound.mantissa.ndim == 0 and len(reported) != 1:
            return verdict, bound.value(), state
        each = [xp.asarray(xp.astype(x, y.dtype)) for x, y in zip(rows.split(xp, bound.value()), reported, strict=True)]
        return verdict, call.grouped.norms(each), state

    def _stepped(self, state: Any, norm: Number, *more: Any) -> tuple[Number, Any]:
        """`step`, on arrays."""
        wanted, got = tuple(state[0].shape), tuple(norm.mantissa.shape)
        if wanted != got and not self.pooled:
            raise ValueError(
                f"the state is for {_described(wanted)}, and there is {_described(got)}: make it by rule.init(grads, per), "
                "with the same per"
            )
        run = fused(_step, norm.mantissa)
        mantissa, exponent, state = run(self, state, norm.mantissa, norm.exponent, *more)
        return Number(norm.xp, mantissa, exponent), state


def _step(rule: Rule, state: Any, mantissa: Array, exponent: Array | None, *more: Any) -> tuple[Array, Array | None, Any]:
    """One step of a rule, from arrays to arrays."""
    xp = array_api_compat.array_namespace(mantissa)
    norm = Number(xp, mantissa, exponent)
    finite = norm.isfinite()
    opened = state._make(Number(xp, *x) if isinstance(x, Scaled) else x for x in state)
    bound, after = rule.step(opened, where(finite, norm, math.inf), *more)
    learned = xp.any(finite) if rule.pooled else finite
    after = after._replace(count=state[0] + xp.astype(learned, state[0].dtype))
    return bound.mantissa, bound.exponent, state._make(map(partial(_kept, xp, learned), after, state))


def _kept(xp: Namespace, learned: Array, new: Any, old: Any) -> Any:
    """A field of a state after a step: the new one where something was learned, in the form of the old one."""
    if isinstance(old, Scaled):
        pair = (new.value(), None) if old.exponent is None else _closed(new)
        return Scaled(*[None if x is None else _kept(xp, learned, x, y) for x, y in zip(pair, old, strict=True)])
    return xp.asarray(xp.astype(xp.where(learned, new, old), old.dtype))


def _closed(x: Any) -> Any:
    """A field of a state as it is kept."""
    return Scaled(x.mantissa, x.exponent) if isinstance(x, Number) else x


def _is_wide(state: Any) -> bool:
    return all(x.exponent is None for x in state if isinstance(x, Scaled))


def _dtype(state: Any) -> Any:
    """That of the numbers of a state."""
    return next((x.mantissa for x in state if isinstance(x, Scaled)), state[0]).dtype


def _described(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} norms" if shape else "one norm"

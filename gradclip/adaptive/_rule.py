"""What all rules have in common: their states as arrays, a row for each group, and the way from a norm to a bound."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import array_api_compat

from gradclip._backends.generic import Backend
from gradclip._call import Given, decided, given, measured
from gradclip._decide import Bounds, Verdict
from gradclip._dtypes import dtype_name, fits
from gradclip._groups import grouped
from gradclip._leaves import active, backend_for, refuse_unwritable
from gradclip._libraries import constant, fused, library
from gradclip._tree import flatten
from gradclip._types import AllReduce, Array, Nonfinite, NormType, Per, Scalar, Tree
from gradclip.adaptive._numbers import Number
from gradclip.adaptive._rows import Rows
from gradclip.adaptive._states import Step, apart, closed, dtype_of, refuse_other, step

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

    A rule is settings only, and hashable; what it remembers is a state that goes in and comes out: a named tuple of
    small arrays of the gradients' own library, on their device. So it goes through `jax.jit`, `lax.scan`, `vmap`,
    donation and checkpoints. Each group of `per` has numbers of its own. A norm that is not finite is answered by
    `nonfinite`, and never learned from. In derivatives, the bound is a constant.

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

        `count`: how many norms were learned from, 0, as int32; this class keeps it. `zero`: a number. Both are 0-d for
        the global norm, or have one entry for each group.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define start(count, zero), as gradclip.adaptive.Rule shows"
        )

    def step(self, state: Any, norm: Number) -> tuple[Number, Any]:
        """The bound for gradients of this norm, and the state after it: pure, and reading no element.

        Where a norm is not finite it is inf here, and what becomes of that group's state is not kept.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define step(state, norm), as gradclip.adaptive.Rule shows"
        )

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
        backend_for(flat)  # what is no gradient is told before it is grouped
        parts = grouped(flat, per)
        backend, leaves = backend_for(parts.flat).adopt(parts.flat.values)
        xp, acc = backend.xp, backend.accumulation(leaves)
        wide = all(fits(dtype_name(x), acc) for x in leaves)
        shape = () if self.pooled or per is None else (parts.groups.count,)
        with backend.session(leaves, in_place=False):
            home = array_api_compat.device(leaves[0]) if leaves else None
            zero, count = (backend.move(xp.zeros(shape, dtype=dtype), home) for dtype in (acc, xp.int32))
            start = self.start(count, Number.of(xp, zero, wide))
            return start._make(apart(xp, closed(x)) for x in start)

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
        refuse_other(self, state)
        flat, like = flatten(norm, "norm"), state[0]
        xp, home, dtype = array_api_compat.array_namespace(like), library(like), dtype_of(state)
        for path, x in zip(flat.paths(), flat.values, strict=True):
            if library(x) not in (None, home):
                raise TypeError(
                    f"{path} is a {library(x)} array, and the state is made of {home} arrays: pass the norm that "
                    "gradclip gave for gradients of that library"
                )
        device = array_api_compat.device(like)
        own = [xp.asarray(x, dtype=dtype, device=device) if library(x) is None else x for x in flat.values]
        blocks = [xp.astype(constant(x), dtype) for x in own]
        rows = Rows.in_form(norm, blocks)
        with Backend(xp).session(blocks, in_place=False):
            row = rows.joined(xp, blocks)
            found = self._stepped(state, xp.zeros((0,), dtype=dtype) if row is None else row, None, (), *more)
            return rows.shown(xp, found.bound, own, flat.rebuild), found.state

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
            ``grads, norm, max_norm, state = ...``: the clipped tree, the norm before clipping, the bound, the state.

        Raises
        ------
        LeafError, NonFiniteError, TypeError, ValueError
            As `gradclip.clip_grad_norm`; for a state that was made for another number of groups, or by another rule.
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
        refuse_other(self, state)
        partials = measured(call)
        found = decided(call._replace(bounds=Bounds(), nonfinite="propagate"), partials)
        reported, rows, like = found.norms, Rows.of(call.grouped), state[0]
        xp, home = array_api_compat.array_namespace(like), array_api_compat.device(like)
        for x in reported[:1]:
            if library(x) != library(like):
                raise TypeError(
                    f"the gradients are {library(x)} arrays, and the state is made of {library(like)} ones: "
                    "make it by rule.init(grads), for these gradients"
                )
        # The factors are the norms, as they are: a factor that is multiplied with a shift twice.
        own = (None if x is None else xp.asarray(call.backend.move(constant(x), home)) for x in found.factors)
        norm, shift = (None if x is None else rows.of_groups(xp, x) for x in own)
        divisor = call.bounds.divide_by
        step = self._stepped(state, norm, shift, _divisors(divisor))
        max_norm, unit = (None if x is None else rows.for_groups(x) for x in step.product)
        verdict = decided(call._replace(bounds=Bounds(max_norm, None, divisor, unit)), partials)
        return verdict, rows.shown(xp, step.bound, reported, call.grouped.norms), step.state

    def _stepped(self, state: Any, norm: Array, *more: Any) -> Step:
        """`step`, on arrays."""
        wanted, got = tuple(state[0].shape), tuple(norm.shape)
        if wanted != got and not self.pooled:
            raise ValueError(
                f"the state is for {_described(wanted)}, and there is {_described(got)}: make it by "
                "rule.init(grads, per), with the same per"
            )
        return fused(step, norm)(self, state, norm, *more)


def _divisors(divide_by: Any) -> tuple[Any, ...]:
    """`divide_by` as numbers to divide by one after the other: a float as two, for `jax.jit` makes it a float32."""
    if divide_by is None:
        return ()
    if not isinstance(divide_by, float):
        return (constant(divide_by),)
    m, e = math.frexp(divide_by)
    return (divide_by,) if abs(e) < 125 else (math.ldexp(m, e // 2), math.ldexp(1.0, e - e // 2))


def _described(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} norms" if shape else "one norm"

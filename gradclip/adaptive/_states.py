"""States: named tuples of arrays, in which a number is a pair of them. To a rule, they hold `Number` objects."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import array_api_compat
import array_api_compat.numpy as np

from gradclip._scaled import Product, Scaled
from gradclip._types import Array, Namespace
from gradclip.adaptive._numbers import Number, where


class Step(NamedTuple):
    """What a rule makes of a step, as arrays: the bound, the same as a product of two, and the state after it."""

    bound: Array
    product: Product
    state: Any


def step(rule: Any, state: Any, norm: Array, shift: Array | None, divisors: Sequence[Any], *more: Any) -> Step:
    """One step of a rule, for gradients of norm ``norm * shift**2``, divided by each of these; `shift` None: 1."""
    xp = array_api_compat.array_namespace(norm)
    like = _first(state, norm)
    number = Number.of(xp, norm, _is_wide(state), like)
    if shift is not None:
        power = Number.of(xp, shift, _is_wide(state), like)
        number = number * power * power
    for divisor in divisors:
        number = number / divisor
    finite = number.isfinite()
    opened = state._make(Number(xp, *x) if isinstance(x, Scaled) else x for x in state)
    bound, after = rule.step(opened, where(finite, number, math.inf), *more)
    learned = xp.any(finite) if rule.pooled else finite
    after = after._replace(count=state[0] + xp.astype(learned, state[0].dtype))
    return Step(bound.value(), bound.product(), state._make(map(partial(_kept, xp, learned), after, state)))


def _kept(xp: Namespace, learned: Array, new: Any, old: Any) -> Any:
    """A field of a state after a step: the new one where something was learned, in the form of the old one."""
    if isinstance(old, Scaled):
        pair = (new.value(), None) if old.exponent is None else closed(new)
        return Scaled(*[None if x is None else _kept(xp, learned, x, y) for x, y in zip(pair, old, strict=True)])
    return xp.asarray(xp.astype(xp.where(learned, new, old), old.dtype, copy=False))


def closed(x: Any) -> Any:
    """A field of a state as it is kept."""
    return Scaled(x.mantissa, x.exponent) if isinstance(x, Number) else x


def apart(xp: Namespace, x: Any) -> Any:
    """A field, in memory of its own: where a state is donated, no array may be in it twice."""
    if isinstance(x, Scaled):
        return Scaled(*map(partial(apart, xp), x))
    return x if x is None else xp.asarray(x, copy=True)


def refuse_other(rule: Any, state: Any) -> None:
    """Raise TypeError for what is no state of this rule: by its fields and their shapes."""
    got = _form(state) if hasattr(state, "_fields") else {}
    wanted = _wanted(rule, next(iter(got.values()), ()))
    if got != wanted:
        said = f"has {_listed(got)}" if got else f"is a {type(state).__name__}"
        raise TypeError(
            f"the state {said}, where that of {rule} has {_listed(wanted)}: pass what init or the last step of this "
            "rule has given (a checkpoint is restored into the form of rule.init)"
        )


def _wanted(rule: Any, groups: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The form of its states for so many groups: that for none, which takes no memory, with their number put in."""
    none = tuple(0 for _ in groups)
    form = _form(rule.start(np.zeros(none, dtype=np.int32), Number(np, np.zeros(none))))
    return {name: tuple(n or groups[0] for n in shape) for name, shape in form.items()}


def _form(state: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each field; a rule may start one as a Python number."""
    arrays = (getattr(x, "mantissa", x) for x in state)
    return {name: tuple(getattr(x, "shape", ())) for name, x in zip(state._fields, arrays, strict=True)}


def _listed(form: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in form.items())


def _is_wide(state: Any) -> bool:
    return all(x.exponent is None for x in state if isinstance(x, Scaled))


def dtype_of(state: Any) -> Any:
    """That of the numbers of a state."""
    return _first(state, state[0]).dtype


def _first(state: Any, other: Array) -> Array:
    """The mantissa of the first number in a state, or the other array where it holds none."""
    return next((x.mantissa for x in state if isinstance(x, Scaled)), other)

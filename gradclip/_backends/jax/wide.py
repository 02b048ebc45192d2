"""Functions of numbers that may be beyond float32, in float64 where a platform has it: a tenth of the operations."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from gradclip._backends.jax.platforms import by_platform
from gradclip._scaled import Product, Scaled
from gradclip._types import Array

F = TypeVar("F", bound=Callable[..., Any])


@lru_cache
def fused(function: F) -> F:
    """A function of arrays and `Scaled` numbers, its first argument aside, as one program.

    What it gives in float32, where a number is a pair of arrays, it must give in float64 with None in the place of the
    second one.
    """

    @partial(jax.jit, static_argnums=0)
    def run(settings: Any, *given: Any) -> Any:
        narrow = partial(function, settings)
        if any(x.dtype == jnp.float64 for x in jax.tree.leaves(given)):
            return narrow(*given)
        shapes = jax.eval_shape(narrow, *given)

        def in_float64(*given: Any) -> Any:
            # Without `jit`, which traces each step as a function of its own.
            with jax.enable_x64(True), jax.disable_jit():
                found = narrow(*jax.tree.map(_widened, given, is_leaf=_is_number))
                return jax.tree.map(_narrowed, shapes, found, is_leaf=_is_number)

        return by_platform(*given, cpu=in_float64, cuda=in_float64, rocm=in_float64, default=narrow)

    return run


def widened(x: Scaled) -> Scaled:
    """In float64, as one number."""
    mantissa = jnp.asarray(x.mantissa).astype(jnp.float64)
    if x.exponent is None:
        return Scaled(mantissa, None)
    e = jnp.clip(jnp.asarray(x.exponent), -11, 11)  # what is beyond is beyond any float32
    least = jnp.where(mantissa > 0, jnp.finfo(jnp.float64).tiny, -jnp.inf)  # XLA may make less than that 0
    return Scaled(jnp.maximum(mantissa * _power(e), least), None)


def _is_number(x: Any) -> bool:
    return isinstance(x, Scaled | Product)


def _widened(x: Any) -> Any:
    if isinstance(x, Scaled):
        return widened(x)
    return x.astype(jnp.float64) if x.dtype == jnp.float32 else x


def _narrowed(like: Any, x: Any) -> Any:
    if not _is_number(like):
        return x.astype(like.dtype)
    if like[1] is None:
        return type(like)(x[0].astype(like[0].dtype), None)
    mantissa, steps = _split(x[0], most=1 if isinstance(like, Product) else 11)
    second = _power(steps) if isinstance(like, Product) else steps
    return type(like)(mantissa.astype(jnp.float32), second.astype(jnp.float32))


def _split(x: Array, most: int) -> tuple[Array, Array]:
    """`(m, e)` with x = m * 2**(90 e), m near 1 unless e is the largest or least."""
    e = jnp.floor((_exponent(x) + 45) / 90)
    e = jnp.where((x == 0) | ~jnp.isfinite(x), 0.0, jnp.clip(e, -most, most))
    return x * _power(-e), e


def _exponent(x: Array) -> Array:
    """That of 2 in |x|, from its bits."""
    return ((lax.bitcast_convert_type(x, jnp.int64) >> 52) & 0x7FF) - 1023


def _power(e: Array) -> Array:
    """2**(90 e), put together from its bits: no power is exact in XLA for sure."""
    return lax.bitcast_convert_type((e.astype(jnp.int64) * 90 + 1023) << 52, jnp.float64)

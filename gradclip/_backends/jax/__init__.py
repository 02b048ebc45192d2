"""JAX: whole rooms under one `jax.jit`, derivative rules of their own, and sums that XLA does not spoil."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import array_api_compat
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import checkify

from gradclip._backends.generic import Backend
from gradclip._backends.jax import decisions, derivatives, eager, products, sums
from gradclip._backends.jax.arrays import devices, guarded, is_traced, placed
from gradclip._backends.jax.eager import Here, Later, Line
from gradclip._backends.jax.sums import Measured, one_pass
from gradclip._decide import Bounds
from gradclip._groups import Groups
from gradclip._norms import Norm, Seen
from gradclip._scaled import RANGES, Factors, Scaled, host_split
from gradclip._types import Array, Namespace, Nonfinite, ReduceOp


class JaxBackend(Backend):
    """The work on `jax.Array`, traced or not. What runs eagerly is compiled, and cached by shapes."""

    def __init__(self) -> None:
        super().__init__(jnp)
        with jax.transfer_guard("allow"):  # array-api-compat makes an array when it first meets a class
            array_api_compat.array_namespace(jnp.zeros(()))

    def adopt(self, leaves: Sequence[Array], bounds: Sequence[Any] = ()) -> tuple[Backend, Sequence[Array]]:
        """JAX takes no array of NumPy's in a foreign byte order."""
        return self, [
            x if isinstance(x, jax.Array) else jnp.asarray(np.asarray(x, x.dtype.newbyteorder("="))) for x in leaves
        ]

    @contextmanager
    def session(self, leaves: Sequence[Array], in_place: bool) -> Iterator[None]:
        """Arrays that were made on a device, and not put there, stay with the first leaf."""
        there = devices(leaves[0]) if leaves else None
        home = jax.default_device(*there) if there and len(there) == 1 else nullcontext()
        with super().session(leaves, in_place), home:
            yield

    accumulation = staticmethod(sums.accumulation)

    def move(self, x: Array, device: Any) -> Array:
        if device is None or is_traced(x) or devices(x) == getattr(device, "device_set", {device}):
            return x
        return placed(x, device)

    def _number(self, value: Any, acc: Any, device: Any) -> Scaled:
        step = RANGES["float64" if acc is jnp.float64 else "float32"].step
        if isinstance(value, float) and acc is jnp.float32:
            mantissa, exponent = host_split(value, step)
            found = Scaled(np.float32(mantissa), np.float32(exponent))
        elif isinstance(value, list) and all(isinstance(x, float) for x in value):  # one copy, not one each
            mantissas, exponents = np.array([host_split(x, step) for x in value], acc).T
            found = Scaled(mantissas, exponents if exponents.any() else None)
        elif isinstance(value, jax.Array) and acc == jnp.float32 and value.dtype != jnp.float64:
            found = Scaled(self.move(value, device).astype(acc), None)  # by no hidden copy
        else:
            found = super()._number(value, acc, device)
        stays = is_traced(*found) or (isinstance(device, jax.Device) and not guarded())
        return found if stays else placed(found, device)

    def _full(self, value: float, dtype: Any, device: Any) -> Array:
        return np.dtype(dtype).type(value)

    # -- norms ---------------------------------------------------------------------------------------------

    def partials(
        self, leaves: Sequence[Array], norm: Norm, groups: Groups, join: Callable[[Array, ReduceOp], Array] | None
    ) -> Any:
        here = None if join else eager.here(leaves, groups)
        if here is not None:
            return here if len(here.shares) == 1 else eager.partials(here, norm)
        direct = join is not None or _apart(leaves)  # a caller's `all_reduce` may be any code
        run = derivatives.partials if direct else _partials
        return run(self, norm, groups, join, list(leaves))

    def partial(self, leaves: Sequence[Array], norm: Norm, groups: Groups, seen: Seen) -> Array:
        if _apart(leaves):
            return super().partial(leaves, norm, groups, seen)
        return one_pass(leaves, norm, groups, seen, True).joined[0]

    def _contribution(self, leaf: Array, keep: int | None, norm: Norm, acc: Any, seen: Seen) -> Array:
        shape = () if keep is None else (leaf.shape[keep],)
        return one_pass([leaf], norm, Groups((0,), (keep,), (shape,), (False,)), seen, True).joined[0]

    # -- the policy ----------------------------------------------------------------------------------------

    def decide(
        self,
        norm: Norm,
        partials: Seen,
        bounds: Bounds,
        groups: Groups,
        nonfinite: Nonfinite,
        relative: bool = False,
    ) -> Any:
        numbers = [x for bound in bounds if bound is not None for x in bound]
        here = partials if isinstance(partials, Here) else None
        measured = partials if isinstance(partials, Measured) else Measured(() if here else partials)
        if is_traced(*jax.tree.leaves(measured), *numbers):
            if here is not None:
                measured = _partials(self, norm, here.groups, None, here.leaves)
            return _decide(self, norm, measured, bounds, groups, nonfinite, relative)
        line = Line(self, norm, here and here.groups, groups, nonfinite, relative)
        return Later(line, measured, bounds, here)

    def _finish(self, xp: Namespace, norm: Norm, rows: Seen) -> Scaled:
        return derivatives.finish(norm, rows)

    def _quotient(self, xp: Namespace, numerator: Scaled, denominator: Scaled) -> Factors:
        return derivatives.divided(numerator, denominator)

    def _reported(self, norm: Array, wide: Any, groups: Groups) -> list[Array]:
        dtypes = [norm.dtype if wide else jnp.float32 for wide in groups.wide]  # float64 may not be enabled
        each = products.by_block([jnp.broadcast_to(norm, groups.count)], groups)
        return [x.reshape(shape).astype(dtype) for (x,), shape, dtype in zip(each, groups.shapes, dtypes, strict=True)]

    # -- clipping ------------------------------------------------------------------------------------------

    def scale(self, leaves: Sequence[Array], factors: Factors, groups: Groups, in_place: bool) -> Sequence[Array]:
        found, factors = eager.ended(products.scaled, _scale, leaves, factors, groups)
        if found is not None:
            return found
        if _apart([*leaves, factors.factor]):
            return super().scale(leaves, factors, groups, in_place)
        return _scale(groups, list(leaves), factors)

    def weighted_sum(self, leaves: Sequence[Array], factors: Factors, groups: Groups) -> list[Array]:
        found, factors = eager.ended(eager.weighted, _weighted, leaves, factors, groups)
        if found is not None:
            return found
        if not _apart([*leaves, factors.factor]):
            return _weighted(groups, list(leaves), factors)
        places = map(array_api_compat.device, leaves)
        there = [jax.tree.map(lambda x, place=place: self.move(x, place), factors) for place in places]
        return [_weighted(groups, [x], own)[0] for x, own in zip(leaves, there, strict=True)]

    def _clamped(self, leaf: Array, low: Any, high: Any) -> Array:
        device = array_api_compat.device(leaf)
        bounds = [x if x is None else self.move(self._bound(x, leaf.dtype, device), device) for x in (low, high)]
        return _clamp(leaf, *bounds)

    def count_nonfinite(
        self, leaves: Sequence[Array], finite: Array, named: Callable[[int], str]
    ) -> list[tuple[int, int]] | None:
        held, finite = [_held(x) for x in leaves], _held(finite)
        if not is_traced(finite, *held):
            return super().count_nonfinite(held, finite, named)
        for i, x in enumerate(leaves):
            nan = jnp.sum(jnp.isnan(x))
            inf = jnp.sum(jnp.logical_and(jnp.isinf(x), jnp.logical_not(jnp.isnan(x))))
            name = named(i).replace("{", "{{").replace("}", "}}")
            message = f"the gradients are not finite: {name} holds {{nan}} NaN, {{inf}} inf"
            checkify.check(nan + inf == 0, message, nan=nan, inf=inf)
        checkify.check(jnp.all(finite), "the gradients are not finite: a norm, norm= or divide_by= is not")
        return None


def _apart(arrays: Sequence[Array]) -> bool:
    """Whether arrays live on different devices."""
    return len({devices(x) for x in arrays} - {None}) > 1


def _held(x: Array) -> Array:
    """The array that a tracer of `grad` or `vmap` stands for, where there is one: without `jit`, those compute."""
    x = lax.stop_gradient(x)
    while type(x).__name__ == "BatchTracer":  # JAX does not export it
        x = x.val
    return x


_partials = jax.jit(derivatives.partials, static_argnums=(0, 1, 2, 3), inline=True)
_decide = jax.jit(decisions.decided, static_argnums=(0, 1, 4, 5, 6), inline=True)
_scale = jax.jit(derivatives.scaled, static_argnums=0, inline=True)
_weighted = jax.jit(lambda groups, *given: derivatives.weighted(*given), static_argnums=0, inline=True)
_clamp = jax.jit(Backend(jnp)._clamped, inline=True)

"""One way for each platform, of which only those are traced that are asked for.

`lax.platform_dependent` traces them all: of the time that tracing the clip of one leaf took on a CPU, more than half
went into what only TPUs run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from gradclip._backends.jax.arrays import is_traced
from gradclip._types import Array

#: By JAX's names for them, where a program is lowered; `jax.default_backend` says "gpu" of two of them.
_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

_Way = Callable[..., Any]


def by_platform(*args: Any, default: _Way, **ways: _Way) -> Any:
    """`lax.platform_dependent`: the way of this machine is traced, others only where a program is lowered for them.

    What is traced comes as an argument: a way must not close over it.
    """
    flat, tree = jax.tree.flatten(args)
    if not is_traced(*flat):
        return lax.platform_dependent(*args, default=default, **ways)
    here = jax.default_backend()
    own = ways.get("cuda" if here == "gpu" else here, default)
    traced, shapes = jax.make_jaxpr(own, return_shape=True)(*args)

    def flattened(way: _Way) -> _Way:
        return lambda *flat: jax.tree.leaves(way(*jax.tree.unflatten(tree, flat)))

    each = tuple((name, None if (way := ways.get(name, default)) is own else flattened(way)) for name in _PLATFORMS)
    rest = None if default is own else flattened(default)
    return jax.tree.unflatten(jax.tree.structure(shapes), _choice.bind(*flat, traced=traced, each=each, rest=rest))


def _in_full(*flat: Array, traced: ClosedJaxpr, each: Sequence[tuple[str, _Way | None]], rest: _Way | None) -> Any:
    """The same by JAX's own means, which transform it in every way."""
    own = jaxpr_as_fun(traced)
    return lax.platform_dependent(*flat, default=rest or own, **{name: way or own for name, way in each})


def _lowered(name: str | None, ctx: Any, *flat: Any, traced: ClosedJaxpr, each: Any, rest: Any) -> Any:
    way = dict(each).get(name, rest)
    return mlir.lower_fun(way or jaxpr_as_fun(traced))(ctx, *flat)


def _mapped(axis: Any, flat: Sequence[Array], axes: Sequence[int | None], **settled: Any) -> Any:
    if all(x is None for x in axes):
        return _choice.bind(*flat, **settled), [None] * len(settled["traced"].out_avals)
    run = jax.vmap(lambda *flat: _in_full(*flat, **settled), tuple(axes), spmd_axis_name=axis.spmd_name)
    found = run(*flat)
    return found, [0] * len(found)


def _jvp(flat: Sequence[Array], tangents: Sequence[Any], **settled: Any) -> Any:
    return jax.jvp(lambda *flat: _in_full(*flat, **settled), flat, list(map(ad.instantiate_zeros, tangents)))


_choice = Primitive("by_platform")
_choice.multiple_results = True
_choice.def_impl(_in_full)
_choice.def_abstract_eval(lambda *flat, traced, **settled: traced.out_avals)
ad.primitive_jvps[_choice] = _jvp
batching.fancy_primitive_batchers[_choice] = _mapped
for _name in _PLATFORMS:
    mlir.register_lowering(
        _choice, lambda ctx, *flat, name=_name, **settled: _lowered(name, ctx, *flat, **settled), _name
    )
mlir.register_lowering(_choice, lambda ctx, *flat, **settled: _lowered(None, ctx, *flat, **settled))

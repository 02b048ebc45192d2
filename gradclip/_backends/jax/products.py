"""Leaves times the factors of their groups, and sums of such products, in programs that compile fast and store nothing.

What is multiplied are `rows`, one number a group each: whether the factor is 1, whether it is 0, and its steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradclip._backends.jax.arrays import may_be_sharded, spread, whole
from gradclip._backends.jax.platforms import by_platform
from gradclip._backends.jax.rows import stacks as stacked
from gradclip._backends.leaf import against
from gradclip._dtypes import COMPONENT_BITS, dtype_name
from gradclip._groups import Groups
from gradclip._scaled import Factors
from gradclip._types import Array

#: So many numbers of a row are cut out of it one by one.
FEW = 32

#: So many examples are added to the sum at once.
_AT_ONCE = 2


def split(x: Array, sure: Array | None = None) -> list[Array]:
    """The entries along the first axis, of which each keeps a length of 1. `sure`: see `_surely`.

    XLA's CPU compiler makes a kernel for each constant offset, in 10 to 20 ms. So there a long axis is cut into blocks
    of 100, and these into blocks of 10, with conditions between that it joins no cuts across: blocks share kernels.
    """

    def blocks(some: list[Array], size: int) -> list[Array]:
        return [y for x in some for y in lax.split(x, [min(size, len(x) - i) for i in range(0, len(x), size)])]

    def in_blocks(some: list[Array]) -> list[Array]:
        condition = _surely(x) if sure is None else sure
        for size in (1000, 100, 10, 1):
            if size < len(x):
                cut = partial(blocks, size=size)
                some = lax.cond(condition, cut, cut, some)
        return some

    if len(x) <= FEW:
        return blocks([x], 1)
    return lax.platform_dependent([x], cpu=in_blocks, default=partial(blocks, size=1))


def _surely(x: Array) -> Array:
    """True, which the compiler does not know, so that it joins nothing across a condition on it. x: real numbers."""
    first = x[(0,) * x.ndim]
    return first == first if jnp.iscomplexobj(x) else jnp.logical_not(jnp.logical_and(first < 0, first > 0))


def by_block(rows: Sequence[Array], groups: Groups) -> list[list[Array]]:
    """The numbers of each block, from rows of all groups, or of one number for all.

    To XLA's CPU compiler, kernels are alike where the offset is no constant. 161 blocks of a ResNet-50's units and
    their products with leaves take 9 s to compile with constant ones, and 3 with those that are read from an array.
    """
    rows, n = [row.reshape(-1) for row in rows], groups.count
    if len(groups.shapes) == 1:
        return [rows]
    if n == 1 or any(len(row) != n for row in rows):
        return [[row[:1] for row in rows]] * len(groups.shapes)

    def straight(rows: list[Array]) -> list[Array]:
        return [whole(part) for row in rows for part in lax.split(whole(row), groups.lengths)]

    def in_blocks(rows: list[Array]) -> list[Array]:
        if set(groups.lengths) == {1}:
            return [part for row in rows for part in split(row)]
        sure = _surely(rows[-1])
        starts = split(np.asarray(groups.starts, np.int32) + jnp.logical_not(sure).astype(jnp.int32), sure)

        def cut(rows: list[Array], starts: list[Array]) -> list[Array]:
            each = list(zip(starts, groups.lengths, strict=True))
            return [lax.dynamic_slice(row, (i.reshape(()),), (n,)) for row in rows for i, n in each]

        return lax.cond(sure, cut, lambda rows, _: [row[:n] for row in rows for n in groups.lengths], rows, starts)

    few = len(groups.shapes) <= FEW or any(map(may_be_sharded, rows))
    parts = straight(rows) if few else lax.platform_dependent(rows, cpu=in_blocks, default=straight)
    return [parts[i :: len(groups.shapes)] for i in range(len(groups.shapes))]


def shaped(row: Array, leaf: Array, keep: int | None) -> Array:
    """The numbers of a leaf's groups, to broadcast against it."""
    return spread(row.reshape(() if row.size == 1 else against(leaf, keep)), leaf)


def _rows(factors: Factors) -> tuple[Array, ...]:
    """Whether to keep what there is, whether to give zeros, the factor, and its shift where there are any."""
    factor, shift = factors
    with jax.disable_jit():  # see `_scaled`
        nothing, one = factor == 0, jnp.ones_like(factor)
        live = jnp.where(nothing, one, factor)  # 0 * inf is NaN
        if shift is None:
            return factor == 1, nothing, live
        return jnp.logical_and(factor == 1, shift == 1), nothing, live, shift


def scaled(groups: Groups, leaves: list[Array], factors: Factors) -> list[Array]:
    """Every element times the factor of its group."""

    def one_by_one(leaves: list[Array], *rows: Array) -> list[Array]:
        by = by_block(rows, groups)
        if all(row.size == 1 for some in by for row in some):  # `_scaled` gives them the shape
            return [_scaled(leaf, *by[block]) for leaf, block in zip(leaves, groups.block, strict=True)]
        each = zip(leaves, groups.block, groups.keep, strict=True)
        return [_scaled(leaf, *(shaped(x, leaf, keep) for x in by[block])) for leaf, block, keep in each]

    def in_stacks(leaves: list[Array], *rows: Array) -> list[Array]:
        out, stacks = list(leaves), stacked(leaves)
        order = np.array([groups.base[i] for some in stacks for i in some])
        by = zip(*(lax.split(row[order, None], list(map(len, stacks))) for row in rows), strict=True)
        for some, these in zip(stacks, by, strict=True):
            x = jnp.stack([leaves[i].reshape(-1) for i in some])
            for i, leaf in zip(some, split(_scaled(x, *these)), strict=True):
                out[i] = leaf.reshape(leaves[i].shape)
        return out

    rows = _rows(factors)
    if factors.factor.size <= FEW or groups.kept or any(map(may_be_sharded, leaves)):
        return one_by_one(leaves, *rows)
    return by_platform(leaves, *rows, cpu=in_stacks, default=one_by_one)


@jax.jit
def _scaled(leaf: Array, *rows: Array) -> Array:
    """Under a `jit` of its own it is traced once for all leaves of one type.

    The norm casts a bfloat16 leaf to float32. Where such a cast has a second use, XLA's CPU compiler writes out the
    wide array, and a select has casts in it, too. By bits, the clip of 24 million elements takes 7 ms, and took 65.
    """
    if rows[0].size == 1:
        rows = tuple(x.reshape(()) for x in rows)

    def straight(leaf: Array, keep: Array, nothing: Array, *steps: Array) -> Array:
        with jax.disable_jit():  # else JAX traces each step as a function of its own
            product = _multiplied(leaf, *steps).astype(leaf.dtype)
            return jnp.where(nothing, jnp.zeros_like(leaf), jnp.where(keep, leaf, product))

    def by_bits(leaf: Array, keep: Array, nothing: Array, *steps: Array) -> Array:
        bits = leaf.view(jnp.uint16)
        product = _multiplied(_widened(bits), *steps).astype(leaf.dtype).view(jnp.uint16)
        return jnp.where(nothing, jnp.zeros_like(bits), jnp.where(keep, bits, product)).view(leaf.dtype)

    if leaf.dtype != jnp.bfloat16 or rows[2].dtype != jnp.float32:
        return straight(leaf, *rows)
    return by_platform(leaf, *rows, cpu=by_bits, default=straight)


def _multiplied(x: Array, factor: Array, shift: Array | None = None) -> Array:
    """In the dtype in which a product is formed."""
    acc = np.result_type(x.dtype, factor.dtype)
    product, factor = x.astype(acc), factor.astype(acc)
    if shift is None:
        return product * factor
    shift = shift.astype(acc)
    return product * shift * factor * shift


def _widened(x: Array) -> Array:
    """Bits of bfloat16 as float32."""
    return (x.astype(jnp.uint32) << np.uint32(16)).view(jnp.float32)


def weighted(leaves: list[Array], factors: Factors) -> list[Array]:
    """The sum over axis 0 of every leaf, each example times its factor.

    XLA fuses products with their sum (on GPUs it writes out those of leaves of a few thousand parameters, which it
    finds faster), but not on the CPU: 256 examples of 1e5 parameters take 59 ms so, as a product of matrices 5, and
    added up in a loop 8. A loop it is where a factor is 0 (0 * NaN is NaN) or shifted, or leaves are narrow.
    """

    wide = [COMPONENT_BITS[dtype_name(leaf)] == 64 for leaf in leaves]

    def rounded(totals: Iterable[Array]) -> list[Array]:
        return [_normal(x, jnp.float64 if is_wide else jnp.float32) for x, is_wide in zip(totals, wide, strict=True)]

    def at_once(leaves: list[Array], *rows: Array) -> list[Array]:
        return rounded(jnp.sum(_product(x, *(shaped(row, x, 0) for row in rows)), axis=0) for x in leaves)

    def in_a_loop(leaves: list[Array], *rows: Array) -> list[Array]:
        n = len(leaves[0])
        each = [jnp.broadcast_to(row, n) for row in rows]

        def some(i: Any, count: int, arrays: list[Array]) -> list[Array]:
            """The sums of `count` examples from the i-th on."""
            by = [[_entry(row, i + k) for row in each] for k in range(count)]
            return [reduce(lax.add, [_product(_entry(x, i + k), *by[k]) for k in range(count)]) for x in arrays]

        def body(k: Any, totals: list[Array]) -> list[Array]:
            # Behind a barrier: XLA would take the cast of narrow leaves out of the loop, and write it out.
            # One for each leaf: a joint one has all of them vary over the axes, in `shard_map`, over which any does.
            arrays = [lax.optimization_barrier((x, k))[0] for x in leaves]
            return [x + y for x, y in zip(totals, some(first + k * _AT_ONCE, _AT_ONCE, arrays), strict=True)]

        first = (n - 1) % _AT_ONCE + 1
        return rounded(lax.fori_loop(0, (n - first) // _AT_ONCE, body, some(0, first, leaves)))

    def by_dot(leaves: list[Array], *rows: Array) -> list[Array]:
        over, factor = (((0,), (0,)), ((), ())), rows[1]
        steps = [jnp.broadcast_to(factor, len(x)).astype(x.dtype) for x in leaves]
        each = zip(steps, leaves, strict=True)
        return rounded(lax.dot_general(step, x, over, precision=lax.Precision.HIGHEST) for step, x in each)

    def on_cpu(leaves: list[Array], factors: Factors) -> list[Array]:
        factor, (_, *rows) = factors.factor, _rows(factors)
        if any(np.result_type(x.dtype, factor.dtype) != x.dtype for x in leaves):  # a cast would be written out
            return in_a_loop(leaves, *rows)
        ones = [step == 1 for step in (factors.shift,) if step is not None]
        plain = jnp.all(reduce(jnp.logical_and, ones, factor != 0))
        return lax.cond(plain, by_dot, in_a_loop, leaves, *rows)

    def elsewhere(leaves: list[Array], factors: Factors) -> list[Array]:
        return at_once(leaves, *_rows(factors)[1:])

    if not leaves:
        return []
    if len(leaves[0]) <= _AT_ONCE or any(map(may_be_sharded, leaves)):
        return elsewhere(leaves, factors)
    return by_platform(leaves, factors, cpu=on_cpu, default=elsewhere)


def _normal(x: Array, dtype: Any) -> Array:
    """Rounded to a dtype; 0 where it is no normal number of it."""
    if jnp.iscomplexobj(x):
        return lax.complex(_normal(jnp.real(x), dtype), _normal(jnp.imag(x), dtype))
    x = x.astype(dtype)
    return jnp.where(jnp.abs(x) < jnp.finfo(dtype).smallest_normal, jnp.zeros_like(x), x)


def _entry(x: Array, i: Any) -> Array:
    """Entry i of an array; that of a bfloat16 one by its bits, as float32 (see above)."""
    if x.dtype == jnp.bfloat16:
        return _widened(lax.dynamic_index_in_dim(x.view(jnp.uint16), i, keepdims=False))
    return lax.dynamic_index_in_dim(x, i, keepdims=False)


def _product(x: Array, nothing: Array, *steps: Array) -> Array:
    product = _multiplied(x, *steps)
    return jnp.where(nothing, jnp.zeros_like(product), product)

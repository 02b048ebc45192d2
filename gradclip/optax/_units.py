"""optax's units for adaptive clipping: any axes of a leaf may count them, where gradclip keeps one."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from gradclip._types import Array, Tree


class AsTheyLie:
    """Leaves as they are, for groups that gradclip knows."""

    def laid(self, tree: Tree) -> Tree:
        return tree

    def back(self, laid: Tree, like: Tree) -> Tree:
        return laid

    def norms(self, norms: Tree, like: Tree) -> Tree:
        return norms


class OptaxUnits(AsTheyLie):
    """Lays leaves out so that optax's units are gradclip's: the last axis of a matrix, or the whole of a vector.

    `axis`: what a norm sums over; None: what optax takes, which stands first, so that no element moves.
    """

    def __init__(self, axis: int | tuple[int, ...] | None) -> None:
        self.axis = axis

    def kept(self, x: Array) -> tuple[int, ...]:
        """The axes that count the units of a leaf."""
        if self.axis is not None:
            summed = np.lib.array_utils.normalize_axis_tuple(self.axis, x.ndim)
            return tuple(i for i in range(x.ndim) if i not in summed)
        if sum(n != 1 for n in x.shape) <= 1:
            return ()
        return tuple(range(1 if x.ndim <= 3 else x.ndim - 1, x.ndim))

    def laid(self, tree: Tree) -> Tree:
        def one(x: Array) -> Array:
            kept = self.kept(x)
            if not jnp.issubdtype(x.dtype, jnp.inexact) or (x.ndim > 1 and kept == (x.ndim - 1,)):
                return x
            moved = jnp.moveaxis(x, kept, _last(kept, x))
            count = moved.shape[x.ndim - len(kept) :]
            return moved.reshape(math.prod(moved.shape[: x.ndim - len(kept)]), *([math.prod(count)] if kept else []))

        return jax.tree.map(one, tree)

    def back(self, laid: Tree, like: Tree) -> Tree:
        """Leaves that `laid` gave, as they lay in `like`."""

        def one(x: Array, like: Array) -> Array:
            if x.shape == like.shape:
                return x
            kept = self.kept(like)
            summed = [n for i, n in enumerate(like.shape) if i not in kept]
            x = x.reshape(*summed, *(like.shape[i] for i in kept))
            return jnp.moveaxis(x, _last(kept, like), kept)

        return jax.tree.map(one, laid, like)

    def norms(self, norms: Tree, like: Tree) -> Tree:
        """Norms of what `laid` gave, so that they broadcast against the leaves of `like`."""

        def one(norm: Array | None, like: Array) -> Array | None:
            if norm is None or norm.ndim == 0:
                return norm
            kept = self.kept(like)
            return norm.reshape([n if i in kept else 1 for i, n in enumerate(like.shape)])

        return jax.tree.map(one, norms, like, is_leaf=lambda x: x is None)


def _last(kept: tuple[int, ...], x: Array) -> range:
    """Where the kept axes go."""
    return range(x.ndim - len(kept), x.ndim)

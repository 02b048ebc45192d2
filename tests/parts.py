"""Which elements `per` groups, found anew from its definition: leaf by leaf and index by index."""

from __future__ import annotations

from typing import Any

import numpy as np

from gradclip import Units

#: A part of a leaf: its number, and what to index it with.
Part = tuple[int, tuple[Any, ...]]

ALL = (...,)


def parts_of(tree: list[np.ndarray], per: Any) -> dict[Any, list[Part]]:
    """The parts of the leaves that make each group, by a key that `norm_at` understands."""
    if per is None:
        return {(): [(i, ALL) for i in range(len(tree))]}
    if per == "leaf":
        return {(i,): [(i, ALL)] for i in range(len(tree))}
    if per == "example":
        return {(b,): [(i, (b,)) for i in range(len(tree))] for b in range(len(tree[0]))}
    if per == "unit" or isinstance(per, Units):
        axis = -1 if per == "unit" else per.axis
        found: dict[Any, list[Part]] = {}
        for i, x in enumerate(tree):
            if x.ndim < 2:
                found[i,] = [(i, ALL)]
                continue
            for k in range(x.shape[axis]):
                where: list[Any] = [slice(None)] * x.ndim
                where[axis] = k
                spot = tuple(k if a == axis % x.ndim else 0 for a in range(x.ndim))
                found[(i, *spot)] = [(i, tuple(where))]
        return found
    labels = list(per)
    return {(g,): [(i, ALL) for i, label in enumerate(labels) if label == g] for g in labels if g is not None}


def norm_at(norms: Any, key: tuple[Any, ...]) -> Any:
    """The norm of one group, in what came back for a list of leaves."""
    for step in key[:1]:
        norms = norms[step]
    return norms[key[1:]] if len(key) > 1 else norms


def pieces(tree: list[np.ndarray], parts: list[Part]) -> list[np.ndarray]:
    return [np.asarray(tree[i][where]) for i, where in parts]


def norm_shape(x: np.ndarray, per: Any) -> tuple[int, ...]:
    """The shape in which the norms of a leaf come back."""
    if per == "leaf" or x.ndim < 2:
        return ()
    axis = -1 if per == "unit" else per.axis
    return tuple(n if a == axis % x.ndim else 1 for a, n in enumerate(x.shape))

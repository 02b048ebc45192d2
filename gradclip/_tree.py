"""Containers and key paths: `flatten(tree)` gives the leaves and the way back.

Knows list, tuple, dict, their subclasses, named tuples, one-shot iterators, and, once JAX is loaded, every class
in JAX's pytree registry (Flax and Equinox modules, dataclasses registered by the user). None is an empty
place. Everything else is a leaf; whether it is an array is not this room's business.
"""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, KeysView, ValuesView
from typing import Any, NamedTuple, TypeAlias

from gradclip._types import Leaf, Tree

Build: TypeAlias = Callable[[list[Any]], Any]
Rebuild: TypeAlias = Callable[[list[Any]], Tree]


class Node(NamedTuple):
    """One container, one level deep: its children, how each is reached, and how to make its like."""

    keys: list[str]
    children: list[Any]
    build: Build


def _mapping(tree: Any) -> Node:
    keys = list(tree)
    kind = type(tree)

    def build(children: list[Any]) -> Any:
        if kind is dict:
            return dict(zip(keys, children, strict=True))
        out = copy.copy(tree)  # keeps order, default factory and attributes of a subclass
        for key, child in zip(keys, children, strict=True):
            out[key] = child
        return out

    return Node([f"[{key!r}]" for key in keys], [tree[key] for key in keys], build)


def _sequence(tree: Any) -> Node:
    kind: Any = type(tree)
    fields = getattr(kind, "_fields", None)

    def build(children: list[Any]) -> Any:
        if kind is list or kind is tuple:
            return kind(children)
        if fields is not None:
            return kind._make(children)
        if isinstance(tree, tuple):
            out = tuple.__new__(kind, children)  # its own __new__ may take something else
            if hasattr(tree, "__dict__"):
                out.__dict__.update(tree.__dict__)
            return out
        out = copy.copy(tree)
        out[:] = children
        return out

    children = list(tree)
    keys = [f".{name}" for name in fields] if fields else [f"[{i}]" for i in range(len(children))]
    return Node(keys, children, build)


def _registered(tree: Any) -> Node | None:
    """A node of JAX's registry, None if JAX is not loaded or does not know the class."""
    jax = sys.modules.get("jax")
    tree_util = getattr(jax, "tree_util", None)
    if tree_util is None or tree_util.all_leaves((tree,)):
        return None
    if ".sparse" in type(tree).__module__:  # JAX's sparse arrays are nodes; to us they are leaves, and refused
        return None
    pairs, treedef = tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    if len(pairs) == 1 and pairs[0][1] is tree:
        return None
    return Node([_key(path[0]) for path, _ in pairs], [child for _, child in pairs], treedef.unflatten)


def _key(entry: Any) -> str:
    """JAX's key entries as a reader would write them."""
    if hasattr(entry, "name"):
        return f".{entry.name}"
    if hasattr(entry, "idx"):
        return f"[{entry.idx}]"
    key = entry.key if hasattr(entry, "key") else entry
    return f"[{key!r}]"


_EXACT: dict[type, Callable[[Any], Node]] = {
    dict: _mapping,
    OrderedDict: _mapping,
    defaultdict: _mapping,
    list: _sequence,
    tuple: _sequence,
}


def _open(tree: Any) -> Node | None:
    """The container `tree` one level deep, or None for a leaf."""
    exact = _EXACT.get(type(tree))
    if exact is not None:
        return exact(tree)
    if isinstance(tree, tuple) and hasattr(type(tree), "_fields"):
        return _sequence(tree)
    if isinstance(tree, Iterator | KeysView | ValuesView):
        children = list(tree)
        return Node([f"[{i}]" for i in range(len(children))], children, list)
    registered = _registered(tree)
    if registered is not None:
        return registered
    if isinstance(tree, dict):
        return _mapping(tree)
    if isinstance(tree, list | tuple):
        return _sequence(tree)
    return None


def flatten(tree: Tree, root: str = "grads") -> tuple[list[Leaf], Rebuild]:
    """Leaves of `tree` in order, and the function that puts as many values back in their places.

    Parameters
    ----------
    tree
        Any nesting of containers. One-shot iterators are read once and come back as lists.
    root
        How key paths begin.

    Returns
    -------
    leaves : list of Leaf
        Every leaf that is not None.
    rebuild
        `rebuild(values)` gives a tree like the one that came, with `values` at the leaves.
    """
    leaves: list[Leaf] = []
    inside: set[int] = set()

    def visit(node: Any, path: str) -> Callable[[Iterator[Any]], Any]:
        if node is None:
            return lambda values: None
        opened = _open(node)
        if opened is None:
            leaves.append(Leaf(path, node))
            return next
        if id(node) in inside:
            raise ValueError(f"{path} contains itself: a gradient tree must be finite")
        inside.add(id(node))
        parts = [visit(child, path + key) for key, child in zip(opened.keys, opened.children, strict=True)]
        inside.discard(id(node))
        return lambda values: opened.build([part(values) for part in parts])

    plan = visit(tree, root)
    return leaves, lambda values: plan(iter(values))


def is_container(x: Any) -> bool:
    """Whether `x` has places for leaves."""
    return _open(x) is not None


def spread(
    bounds: Any, tree: Tree, name: str, is_bound: Callable[[Any], bool], is_nothing: Callable[[Any], bool]
) -> list[Any]:
    """One bound for every leaf of `tree`: `bounds` is a bound, or a tree whose bounds stand for what is below.

    `is_bound` tells a bound that looks like a container, `is_nothing` a leaf that needs none. Raises ValueError
    where the two trees part, with the path.
    """
    out: list[Any] = []

    def visit(bound: Any, node: Any, path: str) -> None:
        if node is None or is_nothing(node):
            return
        opened = _open(node)
        inner = None if bound is None or is_bound(bound) else _open(bound)
        if opened is None:
            if inner is not None:
                raise ValueError(f"{path} is a container ({type(bound).__name__}), but its gradient is a single array")
            out.append(bound)
        elif inner is None:
            for child in opened.children:
                visit(bound, child, path)
        elif sorted(opened.keys) != sorted(inner.keys):
            raise ValueError(
                f"{path} does not match the gradients there: "
                f"it has {_listed(inner.keys)}, they have {_listed(opened.keys)}"
            )
        else:
            below = dict(zip(inner.keys, inner.children, strict=True))
            for key, child in zip(opened.keys, opened.children, strict=True):
                visit(below[key], child, path + key)

    visit(bounds, tree, name)
    return out


def _listed(keys: list[str]) -> str:
    shown = ", ".join(keys[:6])
    return (shown + (", ..." if len(keys) > 6 else "")) or "nothing"

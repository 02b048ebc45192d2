"""Containers and key paths: `flatten(tree)` gives the leaves, their key paths, and the way back.

Knows list, tuple, dict, their subclasses, named tuples, one-shot iterators, and, once JAX is loaded, every class
in JAX's pytree registry (Flax and Equinox modules, dataclasses registered by the user). None is an empty
place. Everything else is a leaf; whether it is an array is not this room's business.
"""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, KeysView, Sequence, Sized, ValuesView
from itertools import islice
from typing import Any

from gradclip._dtypes import samples
from gradclip._errors import warn
from gradclip._types import Clipped, Leaf, Tree


class Node:
    """One container, one level deep: its children, how each is reached, and how to make its like."""

    __slots__ = ("build", "children", "keys", "places")

    def __init__(self, keys: Callable[[], list[str]], children: list[Any], build: Callable[[list[Any]], Any]) -> None:
        self.keys, self.children, self.build = keys, children, build  # only an error needs keys
        #: What `flatten` remembers of each child: another node, None, or `_LEAF`. None where all are leaves.
        self.places: list[Any] | None = None


class _Dict(Node):
    """As most containers are, or lists: methods take half the time that closures do."""

    __slots__ = ("_names",)

    def __init__(self, tree: dict[Any, Any]) -> None:
        self._names, self.children, self.places = list(tree), list(tree.values()), None

    def keys(self) -> list[str]:
        return [f"[{key!r}]" for key in self._names]

    def build(self, children: list[Any]) -> Any:
        return dict(zip(self._names, children, strict=True))


class _List(Node):
    __slots__ = ("_kind",)

    def __init__(self, tree: list[Any] | tuple[Any, ...]) -> None:
        self._kind, self.children, self.places = type(tree), list(tree), None

    def keys(self) -> list[str]:
        return _indices(self.children)()

    def build(self, children: list[Any]) -> Any:
        return self._kind(children)


def _mapping(tree: Any) -> Node:
    keys = list(tree)

    def build(children: list[Any]) -> Any:
        out = copy.copy(tree)  # keeps order, default factory and attributes of a subclass
        for key, child in zip(keys, children, strict=True):
            out[key] = child
        return out

    return Node(lambda: [f"[{key!r}]" for key in keys], [tree[key] for key in keys], build)


def _sequence(tree: Any) -> Node:
    kind: Any = type(tree)
    fields = getattr(kind, "_fields", None)

    def build(children: list[Any]) -> Any:
        if fields is not None:
            return getattr(kind, "_make", kind)(children)
        if isinstance(tree, tuple):
            out = tuple.__new__(kind, children)  # its own __new__ may take something else
            if hasattr(tree, "__dict__"):
                out.__dict__.update(tree.__dict__)
            return out
        out = copy.copy(tree)
        out[:] = children
        return out

    keys = (lambda: [f".{name}" for name in fields]) if fields else _indices(tree)
    return Node(keys, list(tree), build)


def _indices(children: Sized) -> Callable[[], list[str]]:
    return lambda: [f"[{i}]" for i in range(len(children))]


def _registered(tree: Any) -> Node | None:
    """A node of JAX's registry, None if JAX is not loaded or does not know the class."""
    tree_util = getattr(sys.modules.get("jax"), "tree_util", None)
    # JAX's sparse arrays are nodes; to us they are leaves, and refused.
    if tree_util is None or ".sparse" in type(tree).__module__ or tree_util.all_leaves((tree,)):
        return None
    pairs, treedef = tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    if len(pairs) == 1 and pairs[0][1] is tree:
        return None
    return Node(lambda: [_key(path[0]) for path, _ in pairs], [child for _, child in pairs], treedef.unflatten)


def _key(entry: Any) -> str:
    """JAX's key entries as a reader would write them."""
    if hasattr(entry, "name"):
        return f".{entry.name}"
    if hasattr(entry, "idx"):
        return f"[{entry.idx}]"
    return f"[{getattr(entry, 'key', entry)!r}]"


#: Types of leaves met before, for speed. Array types only: another class may be registered with JAX later on.
_leaf_types: set[type] = set()
_SIMPLE = {float, int, str, bool}


def _open(tree: Any) -> Node | None:
    """The container `tree` one level deep, or None for a leaf."""
    kind = type(tree)
    if kind is dict:
        return _Dict(tree)
    if kind is list or kind is tuple:
        return _List(tree)
    if kind in _leaf_types or kind in _SIMPLE or isinstance(tree, Clipped):  # the gate for leaves refuses a Clipped
        return None
    if kind in (OrderedDict, defaultdict):  # which JAX would sort
        return _mapping(tree)
    if isinstance(tree, tuple) and hasattr(kind, "_fields"):
        return _sequence(tree)
    if isinstance(tree, Iterator | KeysView | ValuesView):
        children = list(tree)
        if not children and isinstance(tree, Iterator):
            warn("gradclip was given an iterator that gives nothing, and clips nothing: was it read before?")
        return Node(_indices(children), children, list)
    node = _registered(tree)
    if node is None and isinstance(tree, dict | list | tuple):
        return _mapping(tree) if isinstance(tree, dict) else _sequence(tree)
    return node


_LEAF = object()


class Flat:
    """The leaves of a tree: `values`, in order, without the empty places."""

    samples: Sequence[int]
    """In order, the first leaf of every kind, a kind being a type and a dtype."""

    def __init__(self, leaves: list[Any], plan: Any, root: str, places: Sequence[int]) -> None:
        self._leaves, self._plan, self._root, self._places = leaves, plan, root, places
        self.values = leaves if len(places) == len(leaves) else [leaves[i] for i in places]
        self.samples = samples(self.values)

    def rebuild(self, values: list[Any], blank: bool = False) -> Tree:
        """A tree like the one that came, with `values` at the leaves. `blank`: None where a leaf is not among them."""
        if len(self._places) < len(self._leaves):
            out = [None] * len(self._leaves) if blank else list(self._leaves)
            for i, value in zip(self._places, values, strict=True):
                out[i] = value
            values = out
        return _build(self._plan, iter(values))

    def paths(self) -> list[str]:
        """How a reader would write the way to each leaf: `grads['encoder'][3].weight`."""
        paths = list(_ways(self._plan, self._root))
        return [paths[i] for i in self._places]

    def only(self, places: list[int]) -> Flat:
        """The same tree, where only the leaves at these places are among `values`; the others stay as they are."""
        if len(places) == len(self.values):
            return self
        return Flat(self._leaves, self._plan, self._root, [self._places[i] for i in places])

    def spread(self, bounds: Any, name: str, is_bound: Callable[[Any], bool] = lambda x: False) -> list[Leaf]:
        """One bound for every leaf: `bounds` is a bound, or a tree whose bounds stand for what is below.

        Each comes with the path to the place where it stands in `bounds`, which is called `name`. `is_bound` tells a
        bound that looks like a container. Raises ValueError where the two trees part, with the path.
        """
        return list(_spread(lasting(bounds, name), self.rebuild(self.values, blank=True), name, is_bound))


def flatten(tree: Tree, root: str = "grads") -> Flat:
    """Open any nesting of containers. `root`: how key paths begin.

    One-shot iterators are read once and come back as lists.
    """
    values: list[Any] = []
    try:
        plan = _visit(tree, root, values, [])
    except RecursionError:
        raise ValueError(f"{root} is nested too deeply for Python's recursion limit: take some levels out") from None
    return Flat(values, plan, root, range(len(values)))


# These call themselves, and are not closures: one would be in a cycle with itself, and the gradients would stay alive
# until Python looks for cycles.


def _visit(x: Any, root: str, values: list[Any], inside: list[tuple[Any, Node]]) -> Any:
    """What is to be remembered of `x`; leaves go to `values`. `inside`: the containers that stand open."""
    if type(x) in _leaf_types:
        values.append(x)
        return _LEAF
    if x is None:
        return None
    node = _open(x)
    if node is None:
        if hasattr(type(x), "__dlpack__"):
            _leaf_types.add(type(x))
        values.append(x)
        return _LEAF
    for outer, _ in inside:
        if x is outer:
            below = [outer for outer, _ in inside[1:]] + [x]
            keys = (_key_of(child, node) for child, (_, node) in zip(below, inside, strict=True))
            raise ValueError(f"{root}{''.join(keys)} contains itself: a gradient tree must be finite")
    if _leaf_types.issuperset(map(type, node.children)):
        values.extend(node.children)
        return node
    inside.append((x, node))
    node.places = [_visit(child, root, values, inside) for child in node.children]
    inside.pop()
    return node


def _build(place: Any, values: Iterator[Any]) -> Any:
    """The tree below a place."""
    if place is _LEAF:
        return next(values)
    if place is None:
        return None
    if place.places is None:
        return place.build(list(islice(values, len(place.children))))
    return place.build([next(values) if p is _LEAF else _build(p, values) for p in place.places])


def _ways(place: Any, path: str) -> Iterator[str]:
    """The key paths of the leaves below a place."""
    if place is _LEAF:
        yield path
    elif place is not None:
        places = [_LEAF] * len(place.children) if place.places is None else place.places
        for key, below in zip(place.keys(), places, strict=True):
            yield from _ways(below, path + key)


def _key_of(child: Any, node: Node) -> str:
    return next(key for key, other in zip(node.keys(), node.children, strict=True) if other is child)


def lasting(tree: Tree, root: str) -> Tree:
    """The same tree, with its one-shot iterators read: they come as lists, which can be read again."""
    flat = flatten(tree, root)
    return flat.rebuild(flat.values)


def is_container(x: Any) -> bool:
    """Whether `x` has places for leaves. A one-shot iterator is used up by the answer: see `lasting`."""
    return x is not None and _open(x) is not None


def _spread(bound: Any, tree: Tree, path: str, is_bound: Callable[[Any], bool]) -> Iterator[Leaf]:
    if tree is None:
        return
    opened = _open(tree)
    inner = None if bound is None or is_bound(bound) else _open(bound)
    if opened is None:
        if inner is not None:
            raise ValueError(f"{path} is a container ({type(bound).__name__}), but its gradient is a single array")
        yield Leaf(path, bound)
    elif inner is None:
        for child in opened.children:
            yield from _spread(bound, child, path, is_bound)
    else:
        keys, given = opened.keys(), inner.keys()
        if sorted(keys) != sorted(given):
            raise ValueError(
                f"{path} does not match the gradients there: it has {_listed(given)}, they have {_listed(keys)}"
            )
        below = dict(zip(given, inner.children, strict=True))
        for key, child in zip(keys, opened.children, strict=True):
            yield from _spread(below[key], child, path + key, is_bound)


def _listed(keys: list[str]) -> str:
    shown = ", ".join(keys[:6])
    return (shown + (", ..." if len(keys) > 6 else "")) or "nothing"

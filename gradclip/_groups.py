"""`per`: which elements share a norm and a factor. Plain data of the host, found from the tree alone."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from gradclip._dtypes import COMPONENT_BITS, dtype_name
from gradclip._tree import Flat
from gradclip._types import Array, Leaf, Per


@dataclass(frozen=True)
class Groups:
    """The elements of leaf j belong to group `base[j]`, one of `count`. `wide`: which norms are float64.

    A norm is that where an element of its group has 64-bit components.
    """

    base: tuple[int, ...]
    count: int
    wide: tuple[bool, ...]

    def split(self, kinds: Sequence[int]) -> Groups:
        """Groups by kind of leaf: those of kind k are `k * count` and on, so that `i % count` are alike."""
        base = tuple(kind * self.count + group for kind, group in zip(kinds, self.base, strict=True))
        copies = max(kinds, default=0) + 1
        return Groups(base, copies * self.count, copies * self.wide)


class Grouped(NamedTuple):
    """The leaves that are in a group, the groups, and how their norms come back."""

    flat: Flat
    groups: Groups
    labels: tuple[Hashable, ...] | None = None
    by_leaf: bool = False

    def described(self) -> str:
        """What shards must agree on: the groups, in the same order."""
        if self.labels is not None:
            return f"labels {', '.join(map(repr, self.labels))}"
        return f"{self.groups.count} leaves" if self.by_leaf else "all elements"

    def norms(self, each: Sequence[Array]) -> Any:
        """One number a group in the form that the caller gets: a 0-d array, the tree of them, or a dict by label."""
        if self.labels is not None:
            return dict(zip(self.labels, each, strict=True))
        return self.flat.rebuild(list(each), blank=True) if self.by_leaf else each[0]

    def entries(self, given: Any, name: str) -> list[Leaf]:
        """What the caller gave for each group, with the path to the place where it stands in `given`.

        Raises ValueError where it does not fit the groups.
        """
        if self.by_leaf:
            return self.flat.spread(given, name)
        if self.labels is None or not isinstance(given, dict):
            return [Leaf(name, given)]
        lacking, unknown = set(self.labels).difference(given), set(given).difference(self.labels)
        if lacking:
            raise ValueError(f"{name} has no entry for {_listed(lacking)}, a label of per: it must have one for each")
        if unknown:
            raise ValueError(f"{name} has an entry for {_listed(unknown)}, and no leaf has that label")
        return [Leaf(f"{name}[{label!r}]", given[label]) for label in self.labels]


def _listed(labels: Iterable[Any]) -> str:
    return " and ".join(sorted(map(repr, labels))[:6])


def grouped(flat: Flat, per: Per) -> Grouped:
    """The groups that `per` makes of the leaves."""
    wide, n = any(_is_wide(flat.values[i]) for i in flat.samples), len(flat.values)
    if per is None:
        return Grouped(flat, _one_group(n, wide))
    if not isinstance(per, str):
        found = _labels(flat, per)
        flat = flat.only([i for i, label in enumerate(found) if label is not None])
        number: dict[Hashable, int] = {}
        base = [number.setdefault(label, len(number)) for label in found if label is not None]
        return Grouped(flat, _groups(flat, base, len(number), wide), tuple(number))
    if per == "leaf":
        return Grouped(flat, _groups(flat, range(n), n, wide), by_leaf=True)
    raise ValueError(f"per must be None, 'leaf', a tree of labels or a function (key path, leaf) -> label, got {per!r}")


def _groups(flat: Flat, base: Sequence[int], count: int, wide: bool) -> Groups:
    has_wide = {group for group, x in zip(base, flat.values, strict=True) if _is_wide(x)} if wide else ()
    return Groups(tuple(base), count, tuple(i in has_wide for i in range(count)))


@lru_cache
def _one_group(n: int, wide: bool) -> Groups:
    return Groups((0,) * n, 1, (wide,))


def _is_wide(leaf: Array) -> bool:
    return COMPONENT_BITS[dtype_name(leaf)] == 64


def _labels(flat: Flat, per: Per) -> list[Hashable]:
    """The label of every leaf."""
    if callable(per):
        entries = [Leaf(path, per(path, x)) for path, x in zip(flat.paths(), flat.values, strict=True)]
    else:
        entries = flat.spread(per, "per")
    for path, label in entries:
        try:
            hash(label)
        except TypeError:
            raise TypeError(
                f"per says {label!r} of {path}: a label must be hashable, a string for example, or None"
            ) from None
    return [label for _, label in entries]

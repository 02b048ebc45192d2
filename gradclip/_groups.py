"""`per`: which elements share a norm and a factor. Plain data of the host, found from the tree alone."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from operator import index
from typing import Any, NamedTuple
from zlib import crc32

from gradclip._dtypes import COMPONENT_BITS, dtype_name
from gradclip._tree import Flat
from gradclip._types import Array, Leaf, Per


@dataclass(frozen=True)
class Units:
    """``per=Units(axis)``: each index along one axis of a leaf of 2 or more dimensions is a group.

    A leaf of fewer dimensions is one group. ``per="unit"`` is ``Units(-1)``: the output units of JAX, Keras and Flax
    layouts. ``Units(0)``: those of PyTorch's.

    >>> import numpy as np
    >>> from gradclip import Units, norms
    >>> norms([np.array([[3.0, 4.0], [4.0, 3.0], [0.0, 12.0]])], per=Units(0))
    [array([[ 5.],
           [ 5.],
           [12.]])]
    """

    axis: int = -1

    def __post_init__(self) -> None:
        if not hasattr(self.axis, "__index__") or isinstance(self.axis, bool):
            raise TypeError(
                f"Units takes the axis to keep, an int, got {self.axis!r} of type {type(self.axis).__name__}"
            )
        object.__setattr__(self, "axis", index(self.axis))


@dataclass(frozen=True)
class Groups:
    """Which group each element is in. Groups stand in blocks: those whose norms come back as one array.

    Leaf j is in block `block[j]`, of which `base[j]` is the first group: element i is in group `base[j] + i[keep[j]]`,
    in `base[j]` itself where `keep[j]` is None. `shapes`: those of each block's norms. `wide`: which blocks have
    float64 norms, for an element has 64-bit components.
    """

    block: tuple[int, ...]
    keep: tuple[int | None, ...]
    shapes: tuple[tuple[int, ...], ...]
    wide: tuple[bool, ...]

    @classmethod
    def of_leaves(cls, n: int) -> Groups:
        """Each leaf a group, of float32 norm."""
        return cls(tuple(range(n)), (None,) * n, ((),) * n, (False,) * n)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """How many groups each block has."""
        return tuple(map(math.prod, self.shapes))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first group of each block."""
        return (0, *accumulate(self.lengths))[:-1]

    @cached_property
    def count(self) -> int:
        return sum(self.lengths)

    @cached_property
    def base(self) -> tuple[int, ...]:
        """The first group of each leaf."""
        return tuple(self.starts[k] for k in self.block)

    @cached_property
    def kept(self) -> dict[int, int]:
        """The leaves of which an axis is kept, and which."""
        return {j: axis for j, axis in enumerate(self.keep) if axis is not None}

    def of(self, leaf: int) -> slice:
        """The groups of one leaf."""
        return slice(self.base[leaf], self.base[leaf] + self.lengths[self.block[leaf]])

    def only(self, leaves: Sequence[int]) -> Groups:
        """These groups, and only some of their leaves."""
        return Groups(tuple(self.block[i] for i in leaves), tuple(self.keep[i] for i in leaves), self.shapes, self.wide)

    @cached_property
    def each_wide(self) -> tuple[bool, ...]:
        """`wide` of each group."""
        return tuple(wide for wide, n in zip(self.wide, self.lengths, strict=True) for _ in range(n))

    def split(self, kinds: Sequence[int]) -> Groups:
        """Groups by kind of leaf: those of kind k are `k * count` and on, so that `i % count` are alike."""
        block = tuple(kind * len(self.shapes) + k for kind, k in zip(kinds, self.block, strict=True))
        copies = max(kinds, default=0) + 1
        return Groups(block, self.keep, copies * self.shapes, copies * self.wide)

    def beside(self) -> Groups:
        """These groups, and as many again for as many leaves of the same shapes."""
        others = tuple(k + len(self.shapes) for k in self.block)
        return Groups(self.block + others, 2 * self.keep, 2 * self.shapes, 2 * self.wide)


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
        if self.by_leaf:
            lengths = self.groups.lengths
            return f"{len(lengths)} leaves" + (
                f" of {_listed(lengths)} units" if self.groups.count > len(lengths) else ""
            )
        return "all elements" if self.groups.shapes == ((),) else f"{self.groups.count} examples"

    def norms(self, blocks: Sequence[Array]) -> Any:
        """One array of each block in the form that the caller gets: an array, the tree of them, or a dict by label."""
        if self.labels is not None:
            return dict(zip(self.labels, blocks, strict=True))
        return self.flat.rebuild(list(blocks), blank=True) if self.by_leaf else blocks[0]

    def entries(self, given: Any, name: str) -> list[Leaf]:
        """What the caller gave for each block, with the path to the place where it stands in `given`.

        Raises ValueError where it does not fit the groups.
        """
        if self.by_leaf:
            return self.flat.spread(given, name)
        if self.labels is None or not isinstance(given, dict):
            return [Leaf(name, given)] * len(self.groups.shapes)
        lacking, unknown = set(self.labels).difference(given), set(given).difference(self.labels)
        if lacking:
            raise ValueError(f"{name} has no entry for {_named(lacking)}, a label of per: it must have one for each")
        if unknown:
            raise ValueError(f"{name} has an entry for {_named(unknown)}, and no leaf has that label")
        return [Leaf(f"{name}[{label!r}]", given[label]) for label in self.labels]


def _named(labels: Iterable[Any]) -> str:
    return " and ".join(sorted(map(repr, labels))[:6])


def _listed(lengths: Sequence[int]) -> str:
    shown = ", ".join(map(str, lengths[:6]))
    return shown if len(lengths) <= 6 else f"{shown}, ... (in all {sum(lengths)}, {crc32(str(lengths).encode()):08x})"


def grouped(flat: Flat, per: Per) -> Grouped:
    """The groups that `per` makes of the leaves."""
    leaves = flat.values
    n, is_wide = len(leaves), True in [_is_wide(leaves[i]) for i in flat.samples]
    if per is None:
        return Grouped(flat, _of_all(n, is_wide))
    if per == "example":
        return Grouped(flat, _made((0,) * n, (0,) * n, ((_examples(flat),),), (is_wide,)))
    if per is Units or (isinstance(per, str) and per not in ("leaf", "unit")):
        raise ValueError(
            "per must be None, 'leaf', 'unit', 'example', gradclip.Units(axis), a tree of labels or a function "
            f"(key path, leaf) -> label, got {per!r}"
        )
    if isinstance(per, str | Units):
        keep: tuple[int | None, ...] = (None,) * n
        shapes: tuple[tuple[int, ...], ...] = ((),) * n
        if per != "leaf":
            axes = _kept(flat, per.axis if isinstance(per, Units) else -1)
            shapes = tuple(map(_shape, leaves, axes))
            keep = tuple(None if math.prod(shape) == 1 else axis for axis, shape in zip(axes, shapes, strict=True))
        return Grouped(flat, _made(tuple(range(n)), keep, shapes, _wide(leaves, range(n), n, is_wide)), by_leaf=True)
    found = _labels(flat, per)
    flat = flat.only([i for i, label in enumerate(found) if label is not None])
    number: dict[Hashable, int] = {}
    block = tuple(number.setdefault(label, len(number)) for label in found if label is not None)
    wide = _wide(flat.values, block, len(number), is_wide)
    return Grouped(flat, _made(block, (None,) * len(block), ((),) * len(number), wide), tuple(number))


#: The same groups come at every step: what they know of themselves is found once.
_made = lru_cache(Groups)


@lru_cache
def _of_all(n: int, is_wide: bool) -> Groups:
    return Groups((0,) * n, (None,) * n, ((),), (is_wide,))


def _wide(leaves: Sequence[Array], block: Iterable[int], count: int, is_any: bool) -> tuple[bool, ...]:
    if not is_any:
        return (False,) * count
    has_wide = {k for k, x in zip(block, leaves, strict=True) if _is_wide(x)}
    return tuple(k in has_wide for k in range(count))


def _is_wide(leaf: Array) -> bool:
    return COMPONENT_BITS[dtype_name(leaf)] == 64


def _shape(leaf: Array, keep: int | None) -> tuple[int, ...]:
    """The shape in which the norms of a leaf's groups broadcast against it: 1 along all axes but the kept one."""
    return () if keep is None else tuple(n if axis == keep else 1 for axis, n in enumerate(leaf.shape))


def _kept(flat: Flat, axis: int) -> tuple[int | None, ...]:
    """The axis whose indices are the units of each leaf; None where it is one group as a whole."""
    for i, x in enumerate(flat.values):
        if x.ndim >= 2 and not -x.ndim <= axis < x.ndim:
            raise ValueError(
                f"{flat.paths()[i]} has {x.ndim} dimensions, so that Units({axis}) has no axis to keep there"
            )
    keep = tuple(None if x.ndim < 2 else axis % x.ndim for x in flat.values)
    _known(flat, keep)
    return keep


def _examples(flat: Flat) -> int:
    """How many examples all leaves have along axis 0."""
    leaves = flat.values
    for i, x in enumerate(leaves):
        if x.ndim == 0:
            raise ValueError(f"{flat.paths()[i]} is 0-d: with per='example' axis 0 of every leaf counts the examples")
    _known(flat, (0,) * len(leaves))
    for i, x in enumerate(leaves):
        if x.shape[0] != leaves[0].shape[0]:
            one, other = flat.paths()[0], flat.paths()[i]
            raise ValueError(
                f"{other} has {x.shape[0]} examples along axis 0, and {one} has {leaves[0].shape[0]}: "
                "with per='example' all leaves must have the same"
            )
    return leaves[0].shape[0] if leaves else 0


def _known(flat: Flat, keep: Sequence[int | None]) -> None:
    """Raise ValueError unless the lengths of kept axes are known."""
    for i, (x, axis) in enumerate(zip(flat.values, keep, strict=True)):
        if axis is not None and not isinstance(x.shape[axis], int):
            raise ValueError(
                f"{flat.paths()[i]} has length {x.shape[axis]} along axis {axis}: the number of groups must be known"
            )


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

"""The norms of a step as one row, of the same order every time: `jax.jit` sorts the keys of a dict."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from gradclip._groups import Grouped
from gradclip._tree import flatten, is_container
from gradclip._types import Array, Namespace, Tree


class Rows:
    """Where the arrays of norms that a step gives, its blocks, lie in the row. Those of a tree have names."""

    def __init__(self, names: Sequence[str] | None, shapes: Sequence[tuple[int, ...]]) -> None:
        self.shapes = [tuple(shape) for shape in shapes]
        self.lengths = list(map(math.prod, self.shapes))
        self._is_tree = names is not None
        self._order = (
            sorted(range(len(names)), key=[(_parts(x), x) for x in names].__getitem__) if names else [0] * bool(shapes)
        )

    @classmethod
    def of(cls, parts: Grouped) -> Rows:
        """For the norms of these groups."""
        names = None
        if parts.labels is not None:
            names = [f"norm[{label!r}]" for label in parts.labels]
        elif parts.by_leaf:
            names = parts.flat.paths()
        return cls(names, parts.groups.shapes)

    @classmethod
    def in_form(cls, norm: Tree, blocks: Sequence[Array]) -> Rows:
        """For norms in the form in which they came back."""
        names = flatten(norm, "norm").paths() if is_container(norm) else None
        return cls(names, [x.shape for x in blocks])

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the row: 0-d for one norm that stands alone."""
        return (sum(self.lengths),) if self._is_tree else self.shapes[0]

    def joined(self, xp: Namespace, blocks: Sequence[Array]) -> Array | None:
        """The row of these blocks; None where there are none."""
        if not self._is_tree:
            return xp.reshape(blocks[0], self.shape)
        return xp.concat([xp.reshape(blocks[i], (-1,)) for i in self._order]) if blocks else None

    def shown(self, xp: Namespace, row: Array, like: Sequence[Array], form: Callable[[list[Array]], Any]) -> Any:
        """A row as blocks of the dtypes of those in `like`, put in their form; one number for all as it is."""
        if row.ndim == 0:
            return xp.asarray(xp.astype(row, like[0].dtype) if like else row)
        blocks = zip(self._cut(row), self.shapes, like, strict=True)
        return form([xp.astype(xp.reshape(x, shape), block.dtype) for x, shape, block in blocks])

    def of_groups(self, xp: Namespace, numbers: Array) -> Array:
        """The row of what a backend gives, one number a group."""
        if self._is_sorted():
            return xp.reshape(numbers, self.shape)
        ends = list(accumulate(self.lengths))
        return self.joined(xp, [numbers[end - n : end] for end, n in zip(ends, self.lengths, strict=True)])

    def for_groups(self, row: Array) -> Any:
        """What a backend takes, one number a group: 0-d for one alone, else a list of arrays that follow each other."""
        if sum(self.lengths) == 1 or row.ndim == 0:
            return row if row.ndim == 0 else row[0, ...]
        return [row] if self._is_sorted() else self._cut(row)

    def _is_sorted(self) -> bool:
        return not self._is_tree or self._order == list(range(len(self._order)))

    def _cut(self, row: Array) -> list[Array]:
        out: list[Array] = [row] * len(self.lengths)
        end = 0
        for i in self._order:
            start, end = end, end + self.lengths[i]
            out[i] = row[start:end]
        return out


def _parts(name: str) -> list[Any]:
    """As people sort: `[2]` before `[10]`. Text and numbers take turns. `w1` and `w01` are equal to this."""
    return [int(x) if i % 2 else x for i, x in enumerate(re.split(r"(\d+)", name))]

"""Leaves merged into rows before they are reduced, so that programs of many leaves compile fast.

For 1,000 leaves of 1,024 elements, the norm of each takes 0.9 s to compile so on a CPU, and 1.9 s with a reduction for
each. Elsewhere leaves stay as they are: to bring them together is to copy them.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradclip._backends.jax.arrays import varying
from gradclip._groups import Groups
from gradclip._types import Array

#: XLA's CPU compiler adds up arrays below about 4096 elements one by one, which is off by up to 7 units of
#: rounding for 1000 equal elements; with a compensated sum it is 0.8. Longer arrays it adds in a tree.
SHORT = 8192

#: So many arrays are stacked at most: what XLA takes to stack them grows with the square of their number.
_STACK = 100

#: From so many leaves of one length on, a string of leaves in 16 bits takes long to compile for a TPU.
_MANY = 8

#: So many leaves on a mesh are reduced one by one: XLA combines that many small all-reduces into one.
_ALONE = 256


class Rows(NamedTuple):
    """An array, and which group the elements at each index along an axis belong to; all of them, without an axis."""

    array: Array
    axis: int | None
    owners: Sequence[int]

    @property
    def length(self) -> Any:
        """How many elements each index has: an int, but in `jax.export` it may be a symbol."""
        return math.prod(n for axis, n in enumerate(self.array.shape) if axis != self.axis)


def rows_of(
    leaves: Sequence[Array], groups: Groups, on_mesh: bool, alone: bool = False, in_tiles: bool = False
) -> list[Rows]:
    """All elements, in arrays of one dtype each.

    Short leaves of one group are strung together, and short rows of one length stacked. One of which an axis is kept
    stays as it is: to bring that axis to the front would copy it.
    On a mesh, leaves that are spread in different ways would be gathered so: there they stay apart, unless they are too
    many. Leaves are kept apart that JAX's types keep apart (varying axes, explicit shardings).
    `in_tiles`: many 16-bit leaves of one length are the rows of one array: to string the 98 vectors of a GPT-2 together
    takes XLA's TPU compiler 1.5 s, for they share tiles, and to stack them 0.3.
    """
    alone = alone or (on_mesh and len(leaves) <= _ALONE)
    strings: dict[Any, list[Array]] = defaultdict(list)
    kept, lengths = [], Counter(x.size for x in leaves if in_tiles and is_short(x))
    for i, (leaf, keep, group) in enumerate(zip(leaves, groups.keep, groups.base, strict=True)):
        if 0 in leaf.shape:
            continue
        if keep is not None:
            kept.append(Rows(leaf, keep, range(group, group + leaf.shape[keep])))
        else:
            strung = is_short(leaf) and not on_mesh and not alone
            stacked = strung and leaf.dtype.itemsize == 2 and lengths[leaf.size] >= _MANY
            key = (group, leaf.dtype, varying(leaf), leaf.size if stacked else None) if strung else (group, i)
            strings[key].append(leaf.reshape((1, -1) if stacked else -1) if strung else leaf)
    pieces = [string[0] if len(string) == 1 else jnp.concatenate(string) for string in strings.values()]
    owners = [group for group, *_ in strings]
    together = [[i] for i in range(len(pieces))] if alone else stacks(pieces)
    found = [
        Rows(jnp.stack([pieces[i] for i in some]), 0, [owners[i] for i in some])
        if len(some) > 1
        else Rows(pieces[some[0]], None, [owners[some[0]]])
        for some in together
    ]
    return found + kept


def is_short(x: Array) -> bool:
    return all(isinstance(n, int) for n in x.shape) and x.size <= SHORT  # in `jax.export`, n may be a symbol


def stacks(arrays: Sequence[Array]) -> list[list[int]]:
    """Short arrays of one type together, by their numbers; any other alone."""
    found: dict[Any, list[int]] = defaultdict(list)
    for i, x in enumerate(arrays):
        key = (x.shape, x.dtype, varying(x), jax.typeof(x).sharding) if is_short(x) else i
        found[key].append(i)
    return [some[i : i + _STACK] for some in found.values() for i in range(0, len(some), _STACK)]


def entries(seen: Array, row: Rows) -> Array:
    """The slots of these groups, to broadcast against the array."""
    first, n = row.owners[0] % seen.shape[1], len(row.owners)
    in_order = isinstance(row.owners, range) or n == 1
    found = seen[:, first : first + n] if in_order else seen[:, np.asarray(row.owners) % seen.shape[1]]
    shape = [n if axis == row.axis else 1 for axis in range(row.array.ndim)]
    return found.reshape(-1, *shape)


def alike(value: float, rows: list[Rows], count: int, acc: Any) -> Array:
    """What each group gets of elements that add `value` each: counted on the host, in integers."""
    sizes: Array = np.zeros(count, object)
    for row in rows if value else ():
        np.add.at(sizes, np.asarray(row.owners), row.length)
    if all(isinstance(n, int) for n in sizes):
        return jnp.asarray(np.asarray(value * sizes, acc))
    return value * jnp.stack([jnp.asarray(n).astype(acc) for n in sizes])

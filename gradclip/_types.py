"""The words that every room shares. Arrays stay `Any`: no type checker knows all array libraries."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar

Array: TypeAlias = Any
"""An array of any library that speaks the Python array API."""

Tree: TypeAlias = Any
"""A nesting of containers with arrays at its leaves."""

Namespace: TypeAlias = Any
"""The module of an array library, as array-api-compat presents it (`xp`)."""

Scalar: TypeAlias = Any
"""A Python number or a 0-d array, traced ones included."""

ReduceOp = Literal["sum", "max", "min"]
"""How partial results join."""

AllReduce = Callable[[Array, ReduceOp], Array]
"""`(partial, op) -> joined`: joins a small array with its like on other shards, element by element."""

Nonfinite = Literal["propagate", "zero", "error"]
"""What happens when a gradient element is inf or NaN."""

T = TypeVar("T")


class Clipped(NamedTuple, Generic[T]):
    """What `clip_grad_norm` returns: `grads, norm = clip_grad_norm(...)`."""

    grads: T
    """The tree that went in, clipped: same containers, dtypes, devices and library."""

    norm: Array
    """The global norm before clipping (after `divide_by`), a 0-d array."""


class Leaf(NamedTuple):
    """One leaf of a tree and how a reader would write the way to it: `grads['encoder'][3].weight`."""

    path: str
    value: Any


class Engine:
    """An `all_reduce` that tells gradclip more than how partials join; a plain callable answers as this class does.

    `gradclip.distributed` holds the ready ones, and says what each method is for to those who write another.
    """

    told: Tree = None
    """What the caller said about each leaf: a tree prefix of the gradients, each entry handed to `kind`."""

    telling: str = "told"
    """The name of the argument that `told` came by, for messages."""

    def kind(self, leaf: Leaf, told: Any) -> Hashable:
        """Which shards hold copies of this leaf: leaves of one kind are counted alike. Called before any work."""
        return None

    def counts(self, kind: Hashable, like: Array) -> Any:
        """Whether this shard counts its leaves of that kind: True, False, or a 0-d array that goes with `like`."""
        return True

    def join(self, partial: Array, op: ReduceOp, call: Call) -> Array:
        """The partials of all shards as one, the same on every shard. `call`: what all of them must agree on."""
        raise NotImplementedError

    def gather(self, text: str) -> list[str]:
        """The texts of all shards, by rank: only called when each of them knows that the gradients are not finite."""
        return []

    def __call__(self, partial: Array, op: ReduceOp) -> Array:
        """As a plain `all_reduce`."""
        return self.join(partial, op, Call(self, ()))


@dataclass(eq=False)
class Call:
    """The shards' side of one call: the engine, or a plain callable, and what it should know."""

    all_reduce: AllReduce
    kinds: Sequence[Hashable]  # one for each leaf
    norm_type: float = 2.0
    nonfinite: Nonfinite = "propagate"
    wide: bool = False  # whether the norm is float64; an engine sets it where another shard's is

    def __call__(self, partial: Array, op: ReduceOp) -> Array:
        if isinstance(self.all_reduce, Engine):
            return self.all_reduce.join(partial, op, self)
        joined = self.all_reduce(partial, op)
        if getattr(joined, "shape", None) != partial.shape:
            raise _not_joined(joined, tuple(partial.shape))
        return joined

    def groups(self, leaves: Sequence[Array]) -> dict[Hashable, list[Array]]:
        """The leaves by kind."""
        out: dict[Hashable, list[Array]] = {}
        for leaf, kind in zip(leaves, self.kinds, strict=True):
            out.setdefault(kind, []).append(leaf)
        return out

    def counts(self, kind: Hashable, like: Array) -> Any:
        return self.all_reduce.counts(kind, like) if isinstance(self.all_reduce, Engine) else True

    def gather(self, text: str) -> list[str]:
        return self.all_reduce.gather(text) if isinstance(self.all_reduce, Engine) else []


def _not_joined(joined: Any, wanted: tuple[int, ...]) -> Exception:
    """What to raise for something that is no joined partial. It may be traced: only type and shape are looked at."""
    repair = "return the joined array, of the partial's shape"
    shape = getattr(joined, "shape", None)
    if isinstance(shape, tuple):
        return ValueError(f"all_reduce gave an array of shape {tuple(shape)} for a partial of shape {wanted}: {repair}")
    got = "None" if joined is None else f"an object of type {type(joined).__name__}"
    return TypeError(f"all_reduce gave {got} for a partial of shape {wanted}: {repair}")

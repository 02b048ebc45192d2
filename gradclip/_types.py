"""The words that every room shares. Arrays stay `Any`: no type checker knows all array libraries."""

from __future__ import annotations

from collections.abc import Callable, Hashable
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

Per: TypeAlias = Any
"""Which elements share a norm: None, "leaf", "unit", `Units(axis)`, "example", a tree prefix of labels, or a function
`(key path, leaf) -> label`."""

NormType: TypeAlias = Any
"""p of the p-norm, a real number; or "rms"."""

Nonfinite = Literal["propagate", "zero", "error"]
"""What happens when a gradient element is inf or NaN."""

T = TypeVar("T")

VERBS: dict[str, Callable[..., Any]] = {}
"""The public functions that take gradients, by name: for one that is called from within a traced program."""


class Clipped(NamedTuple, Generic[T]):
    """What `clip_grad_norm` returns: `grads, norm = clip_grad_norm(...)`.

    To JAX it is a named tuple, a node of a tree: where `lax.cond`, a carry or `out_specs` wants a plain tuple, hand on
    ``tuple(...)``. It is no tree of gradients itself: given back to gradclip, it is refused, for its norm would count.
    """

    grads: T
    """The tree that went in, clipped: same containers, dtypes, devices and library."""

    norm: Any
    """The norm before clipping (after `divide_by`): a 0-d array; with `per`, as `norms` gives it."""


class ClippedSum(NamedTuple, Generic[T]):
    """What `clipped_sum` returns: `total, norm = clipped_sum(...)`."""

    sum: T
    """The sum over the examples of what is left of each: the tree that went in, without the examples' axis."""

    norm: Array
    """The norm of each example before clipping: an array of shape (B,)."""


class Leaf(NamedTuple):
    """One leaf of a tree and how a reader would write the way to it: `grads['encoder'][3].weight`."""

    path: str
    value: Any


class Call(NamedTuple):
    """What all shards of one call must agree on."""

    norm_type: float | str = 2.0
    nonfinite: Nonfinite = "propagate"
    groups: str = "all elements"


class Engine:
    """An `all_reduce` that tells gradclip more than how partials join; a plain callable answers as this class does.

    `gradclip.distributed` holds the ready ones, and says what each method is for to those who write another.
    """

    told: Tree = None
    """What the caller said about each leaf: a tree prefix of the gradients, each entry handed to `kind`."""

    telling: str = "told"
    """The name of the argument that `told` came by, for messages."""

    same_program: bool = False
    """Whether all shards run one program, and so have leaves of the same dtypes."""

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
        return self.join(partial, op, Call())

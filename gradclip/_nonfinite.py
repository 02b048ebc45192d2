"""What `nonfinite="error"` raises: which leaves are not finite, here and on the other shards."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gradclip._backends.generic import Backend
from gradclip._decide import Verdict
from gradclip._dtypes import dtype_name
from gradclip._errors import Culprit, NonFiniteError, described
from gradclip._shards import Shards
from gradclip._tree import Flat
from gradclip._types import Array


def raise_if_bad(
    backend: Backend, leaves: Sequence[Array], flat: Flat, verdict: Verdict, shards: Shards | None
) -> None:
    """Raise NonFiniteError if a norm is not finite. A few numbers are read, and the leaves only if one is bad.

    `joined_finite` is the same on all shards, so that all of them ask each other for culprits, or none; also one that
    fails while it counts.
    """

    def named(i: int) -> str:
        return f"{flat.paths()[i]} ({_description(leaves[i])})"

    failure = None
    try:
        counts = backend.count_nonfinite(leaves, verdict.finite, named)
    except Exception as error:  # out of memory, say
        if shards is None:
            raise
        counts, failure = [], error
    if counts is None:
        return
    culprits = [
        Culprit(path, _description(x), *count)
        for path, x, count in zip(flat.paths(), leaves, counts, strict=failure is None)
        if any(count)
    ]
    texts: list[str] = []
    if shards is not None and backend.count_nonfinite([], verdict.joined_finite, named) is not None:
        mine = [f"  could not count: {failure!r}"] if failure else described(culprits)
        texts = shards.gather("\n".join(mine))
    found = culprits or any(texts)
    hint = "" if found else "Every leaf here is finite: look at norm=, divide_by=, or the other shards."
    raise NonFiniteError(_described(verdict.norms), culprits, hint, texts) from failure


def _described(norms: Sequence[Array]) -> str:
    try:
        values = [number for block in norms for number in _numbers(block)]
    except TypeError:  # under JAX's `grad` and `vmap` a norm is not one number
        return "their norms are not"
    if len(values) == 1:
        return f"their global norm is {values[0]}"
    return f"{sum(not math.isfinite(x) for x in values)} of {len(values)} norms are not"


def _numbers(x: Array) -> list[float]:
    return [number for i in range(x.shape[0]) for number in _numbers(x[i, ...])] if x.ndim else [float(x)]


def _description(leaf: Array) -> str:
    return f"{dtype_name(leaf)}, shape {tuple(leaf.shape)}"

"""Progress on the terminal, where tqdm is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

try:
    from tqdm import tqdm as bar
except ImportError:  # the command says so at its end
    bar = None

T = TypeVar("T")

SHOWN = bar is not None


def steps(items: Iterable[T], title: str) -> Iterator[T]:
    """The items, one by one, under a bar that is gone when they are."""
    if bar is None:
        print(title, file=sys.stderr)
        yield from items
    else:
        yield from bar(items, desc=f"{title:<44}", leave=False, dynamic_ncols=True, mininterval=0.5)

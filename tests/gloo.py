"""A process group of `torch.distributed` on the CPU, for as long as a test wants it."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Seconds. torch 2.5 destroys a group with the interpreter locked, and waits for its threads. A thread that still holds
#: what a collective was given waits for the interpreter, and both wait for ever: so it was after one group in 250.
_UNTIL_ITS_THREADS_REST = 0.1


@contextmanager
def process_group(store: Path, rank: int = 0, size: int = 1) -> Iterator[None]:
    """Of so many processes, which meet at a file; this is the one of that rank."""
    import torch.distributed as dist

    patience = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=size, timeout=patience)
    try:
        yield
    finally:
        time.sleep(_UNTIL_ITS_THREADS_REST)
        dist.destroy_process_group()

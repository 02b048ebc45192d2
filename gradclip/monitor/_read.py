"""Reading a log back. The file is plain CSV: a header, and a line a step."""

from __future__ import annotations

import csv
import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

#: How every header begins. The norms of leaves follow, each named by its key path.
FIRST = ["step", "norm", "max_norm"]


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a `NormLog` wrote, as NumPy arrays by name; a line that a crash cut off is left out.

    Parameters
    ----------
    path : str or path-like
        The file. It may be one that is being written.

    Returns
    -------
    dict of str to numpy.ndarray
        ``"step"`` (int64, ascending), ``"norm"`` and ``"max_norm"``, then the norms of the leaves by key path, as
        ``"grads['w']"``: float64 of shape (steps,), NaN where nothing was logged. A step that was written twice, by a
        run that was started again from a checkpoint, comes once, as written last. Of float32 numbers there are as many
        digits as tell them apart: ``.astype("float32")`` gives them bit for bit.

    Raises
    ------
    OSError
        If there is no such file.
    ValueError
        If it is no log of norms, or something else changed it. The message names the line.

    Examples
    --------
    >>> import tempfile
    >>> from gradclip.monitor import NormLog
    >>> path = tempfile.mkdtemp() + "/norms.csv"
    >>> with NormLog(path) as log:
    ...     log.add(0, 2.5, max_norm=1.0)
    >>> read(path)
    {'step': array([0]), 'norm': array([2.5]), 'max_norm': array([1.])}
    """
    whole = Path(path).read_bytes()
    whole = whole[: whole.rfind(b"\n") + 1]
    names = header(path, whole)
    if names is None:
        names, body = FIRST, ""
    else:
        body = whole.decode().split("\n", 1)[1]
    table = _numbers(path, re.sub(r"(?<=,)(?=[,\n])", "nan", body), len(names)) if body else np.empty((0, len(names)))
    _, last = np.unique(table[::-1, 0], return_index=True)
    table = table[len(table) - 1 - last]
    columns = {name: table[:, i].copy() for i, name in enumerate(names)}
    return columns | {"step": columns["step"].astype(np.int64)}


def header(path: str | os.PathLike[str], whole: bytes) -> list[str] | None:
    """The names of the columns, from the whole lines of a file; None where there is no line yet."""
    if not whole:
        return None
    line = whole.split(b"\n", 1)[0].decode(errors="replace")
    names = next(csv.reader([line]), [])
    if names[: len(FIRST)] != FIRST:
        raise ValueError(
            f"{os.fspath(path)} is no log of norms: its first line should begin with {','.join(FIRST)}, "
            f"and is {line[:80]!r}"
        )
    return names


def _numbers(path: str | os.PathLike[str], body: str, columns: int) -> Any:
    try:
        table = np.loadtxt(io.StringIO(body), delimiter=",", ndmin=2, comments=None)
    except ValueError:
        table = None
    if table is None or table.shape[1] != columns:
        raise ValueError(f"{os.fspath(path)}, line {_bad_line(body, columns)}: delete or mend that line") from None
    return table


def _bad_line(body: str, columns: int) -> str:
    for i, line in enumerate(body.splitlines(), start=2):
        fields = line.split(",")
        if len(fields) != columns:
            return f"{i} has {len(fields)} fields, the header {columns}"
        for field in fields:
            try:
                float(field)
            except ValueError:
                return f"{i} has {field!r} where a number should be"
    return "2 cannot be read"

"""The log: rows are kept as they are, and fetched and written many at a time."""

from __future__ import annotations

import csv
import io
import os
import re
import threading
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from gradclip._tree import flatten
from gradclip._types import Scalar, Tree
from gradclip.monitor._numbers import fetched, is_deleted, kept, text
from gradclip.monitor._read import FIRST, header


class _Row(NamedTuple):
    step: int
    values: dict[str, Scalar]  # by column, without the step


class NormLog:
    """A CSV file of norms, bounds and per-leaf norms by step, which no step of training waits for.

    Numbers of a device are kept as they are. When `batch` steps are kept, the older half is fetched at once and written
    as whole lines: what is read was computed many steps ago.

    Parameters
    ----------
    path : str or path-like
        The file. One that is there is continued: a line that a crash cut off is removed first.
    every : int
        Steps that are no multiple of it are not logged.
    batch : int
        How many steps are kept at most, and so what a crash can lose. 1: each is written at once, and waited for.

    Raises
    ------
    ValueError
        If the file is there and is no log of norms, or `every` or `batch` is below 1.

    Notes
    -----
    JAX copies each number by itself, all of a fetch in flight together, and waits for no later step. CuPy's and torch's
    come as one array a dtype and device, by one copy, for which the host waits until the stream has done what it was
    given before: once in ``batch / 2`` steps. NumPy's numbers, and torch's of the host, are copied when they are added;
    arrays of a device must not be written to before they are fetched. Several threads may use one log; of several
    processes, one should log.

    Lines go to the system by one append each fetch: a process that is killed loses what it still kept. There is no
    `fsync`: a machine that loses power may lose more, and what is left ends in a line that is left out when read.

    Examples
    --------
    >>> import pathlib, tempfile, numpy as np
    >>> path = pathlib.Path(tempfile.mkdtemp(), "norms.csv")
    >>> with NormLog(path, every=10) as log:
    ...     for step in range(30):
    ...         log.add(step, np.float32(0.1 * step), max_norm=1.5)
    >>> print(path.read_text())
    step,norm,max_norm
    0,0.0,1.5
    10,1.0,1.5
    20,2.0,1.5
    <BLANKLINE>
    >>> log.scalars()
    {'grad_step': 20.0, 'grad_norm': 2.0, 'grad_max_norm': 1.5, 'grad_clipped': 1.0}
    """

    def __init__(self, path: str | os.PathLike[str], *, every: int = 1, batch: int = 256) -> None:
        for name, value in (("every", every), ("batch", batch)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        self._path, self._every, self._batch = Path(path), every, batch
        self._lock = threading.RLock()
        self._rows: list[_Row] = []
        self._newest: _Row | None = None
        self._columns = _reopened(self._path)
        self._is_new = self._columns is None
        self._file: io.FileIO | None = io.FileIO(self._path, "a")

    def add(self, step: int, norm: Scalar, *, max_norm: Scalar | None = None, per_leaf: Tree = None) -> None:
        """Log the numbers of one step. No array of a device is read.

        Parameters
        ----------
        step : int
            Its number. A step logged again replaces the one before, when the log is read.
        norm : number or 0-d array of any library
            The norm of all gradients, before the clip.
        max_norm : number or 0-d array, optional
            The bound that it was clipped to.
        per_leaf : tree of 0-d arrays, optional
            What ``gradclip.norms(grads)`` gave, or ``norms(grads, per=labels)``: a column for each key path. It may be
            left out at some steps, but the first row settles the columns.

        Raises
        ------
        TypeError
            For what is no real number, or a value that is being traced (inside `jax.jit`); for a step that is no int.
        ValueError
            For an array that is not 0-d or was deleted, leaves that the file has no column for, a log that is closed.
        """
        if isinstance(step, bool) or not isinstance(step, int | np.integer):
            raise TypeError(f"step must be an int, got {step!r} of type {type(step).__name__}: count in Python")
        if step % self._every:
            return
        values = {"norm": kept("norm", norm)}
        if max_norm is not None:
            values["max_norm"] = kept("max_norm", max_norm)
        if per_leaf is not None:
            flat = flatten(per_leaf)
            values |= {path: kept(f"per_leaf: {path}", x) for path, x in zip(flat.paths(), flat.values, strict=True)}
        with self._lock:
            if self._file is None:
                raise ValueError(f"the log {self._path} is closed: add inside the with block")
            self._place(values)
            self._rows.append(_Row(int(step), values))
            if len(self._rows) >= self._batch:
                self._write((self._batch + 1) // 2)

    def flush(self) -> None:
        """Fetch and write all that is kept. It waits for the steps that are still running."""
        with self._lock:
            self._write(len(self._rows))

    def close(self) -> None:
        """Flush, and close the file. A second call does nothing."""
        with self._lock:
            if self._file is not None:
                try:
                    self.flush()
                finally:
                    self._file.close()
                    self._file = None

    def __enter__(self) -> NormLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def scalars(self, prefix: str = "grad") -> dict[str, float]:
        """The numbers of the newest step that was fetched, by names that TensorBoard, W&B and MLflow take.

        It waits for nothing and reads nothing: the step is up to `batch` steps old.

        Parameters
        ----------
        prefix : str
            How each name begins: letters, digits, underscores and single slashes.

        Returns
        -------
        dict of str to float
            ``grad_step`` and ``grad_norm``, with a bound ``grad_max_norm`` and ``grad_clipped`` (1.0 or 0.0), and
            ``grad_leaf/encoder_3_weight`` for ``grads['encoder'][3].weight``. Empty before the first fetch.

        Raises
        ------
        ValueError
            If a name would not be legal with that prefix.

        Notes
        -----
        MLflow takes letters, digits and ``_-. /``, and keeps a name as a path, so that none may be another's folder.
        W&B can sort by names of letters, digits and underscores (its documentation: "Metric naming constraints").
        """
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*(/[A-Za-z0-9_]+)*", prefix):
            raise ValueError(f"prefix must be of letters, digits, underscores and single slashes, got {prefix!r}")
        row = self._newest
        if row is None:
            return {}
        numbers = {name: float(value) for name, value in row.values.items()}
        out = {f"{prefix}_step": float(row.step), f"{prefix}_norm": numbers.pop("norm")}
        if "max_norm" in numbers:
            bound = out[f"{prefix}_max_norm"] = numbers.pop("max_norm")
            out[f"{prefix}_clipped"] = float(row.values["norm"] > bound)
        for path, value in numbers.items():
            plain = re.sub(r"[^A-Za-z0-9_]+", "_", path.removeprefix("grads")).strip("_")[-150:] or "all"
            name, n = f"{prefix}_leaf/{plain}", 1
            while name in out:
                n += 1
                name = f"{prefix}_leaf/{plain}_{n}"
            out[name] = value
        return out

    def _place(self, values: dict[str, Scalar]) -> None:
        """Settle the columns at the first row; raise if a later one has others."""
        if self._columns is None:
            self._columns = [*FIRST, *(name for name in values if name not in FIRST)]
        new = sorted(values.keys() - self._columns)
        if new:
            raise ValueError(
                f"{self._path} has no column {new[0]} ({len(new)} are new; its own: {', '.join(self._columns[:6])}"
                f"{', ...' if len(self._columns) > 6 else ''}): pass per_leaf at the first step, or begin another file"
            )

    def _write(self, count: int) -> None:
        """Fetch the oldest rows and append them. Rows whose numbers are gone are told after the others are safe."""
        rows = self._rows[:count]
        lost = {row.step for row in rows if any(map(is_deleted, row.values.values()))}
        rows = [row for row in rows if row.step not in lost]
        numbers = iter(fetched([value for row in rows for value in row.values.values()]))
        rows = [_Row(row.step, {name: next(numbers) for name in row.values}) for row in rows]
        if rows:
            self._append(rows)
            self._newest = rows[-1]
        del self._rows[:count]
        if lost:
            raise RuntimeError(
                f"a number of step {min(lost)} was deleted before it was fetched ({len(lost)} steps are lost): do not "
                "donate norms to a jitted function (donate_argnums), or add a copy of them to the log"
            )

    def _append(self, rows: list[_Row]) -> None:
        assert self._columns is not None
        assert self._file is not None
        lines = io.StringIO()
        if self._is_new:
            csv.writer(lines, lineterminator="\n").writerow(self._columns)
        for row in rows:
            fields = (text(row.values[name]) if name in row.values else "" for name in self._columns[1:])
            lines.write(f"{row.step},{','.join(fields)}\n")
        data = lines.getvalue().encode()
        size = self._file.seek(0, os.SEEK_END)
        try:
            written = self._file.write(data)
            while written < len(data):
                written += self._file.write(data[written:])
        except OSError:  # the disk is full: the rows stay kept, and the file ends in a whole line
            self._file.truncate(size)
            raise
        self._is_new = False


def _reopened(path: Path) -> list[str] | None:
    """The columns of a log that is there, its half line at the end cut off; None for a new one."""
    if not path.exists():
        return None
    with open(path, "r+b") as file:
        first = file.readline()
        if not first.endswith(b"\n"):  # a header that was cut off, or another's file
            if not b"step,norm,max_norm".startswith(first[:18]):
                header(path, first)
            file.truncate(0)
            return None
        columns = header(path, first)
        end = file.seek(0, os.SEEK_END)
        while True:  # back to the last end of a line: there is one
            start = max(0, end - 65536)
            file.seek(start)
            at = file.read(end - start).rfind(b"\n")
            if at >= 0:
                file.truncate(start + at + 1)
                return columns
            end = start

"""What a measurement hands on: tables of times, findings that have a target, notes on what did not run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.targets import TARGETS, Target
from benchmarks.timing import Timings


@dataclass(frozen=True)
class Row:
    """One contender: microseconds per call, and its ratio to the table's reference, each with its quartiles."""

    name: str
    median_us: float
    low_us: float
    high_us: float
    ratio: float
    ratio_low: float
    ratio_high: float


@dataclass(frozen=True)
class Table:
    """One contest."""

    title: str
    tree: str
    dtype: str
    reference: str
    rounds: int
    rows: list[Row]

    @classmethod
    def of(
        cls,
        timings: Timings,
        reference: str,
        partners: Mapping[str, str] | None = None,
        /,
        *,
        title: str,
        tree: str,
        dtype: str,
    ) -> Table:
        """With `partners` each contender's ratio is to its own one, and `reference` says in words what these are."""
        rows = []
        for name in timings.samples:
            beside = reference if partners is None else partners.get(name, name)
            time, ratio = timings.spread(name), timings.ratio(name, beside)
            us = (1e6 * time.median, 1e6 * time.low, 1e6 * time.high)
            rows.append(Row(name, *us, ratio.median, ratio.low, ratio.high))
        return cls(title, tree, dtype, reference, timings.rounds, rows)


@dataclass(frozen=True)
class Finding:
    """One figure, beside its target."""

    target: Target
    tree: str
    dtype: str
    value: float
    low: float | None = None
    high: float | None = None

    @property
    def met(self) -> bool | None:
        return self.target.met(self.value)


@dataclass(frozen=True)
class Line:
    """Cost against size: the points, and the straight line through them."""

    name: str
    against: str
    sizes: list[int]
    us: list[float]
    fixed_us: float
    each_us: float
    worst: float  # the largest relative distance of a point from the line


@dataclass
class Section:
    """All that one subject has to say."""

    name: str
    tables: list[Table] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    evidence: dict[str, Any] = field(default_factory=dict)

    def compare(self, timings: Timings, where: Mapping[str, str], *rows: tuple[str, ...]) -> None:
        """Add a finding for each (target, contender, reference, ...), beside the fastest reference that took part."""
        for key, name, *references in rows:
            there = [reference for reference in references if reference in timings]
            if name in timings and there:
                ratio = timings.ratio(name, min(there, key=lambda reference: timings.spread(reference).median))
                figures = ratio.median, ratio.low, ratio.high
                self.findings.append(Finding(TARGETS[key], where["tree"], where["dtype"], *figures))

    def add(self, key: str, value: float, *, tree: str, dtype: str = "float32") -> None:
        self.findings.append(Finding(TARGETS[key], tree, dtype, value))

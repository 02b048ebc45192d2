"""The results on the terminal and in a JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.results import Finding, Section, Table


def as_data(machine: dict[str, Any], settings: dict[str, Any], sections: Sequence[Section]) -> dict[str, Any]:
    """All of a run, in what JSON can hold. The chart is drawn from this too."""
    data: dict[str, Any] = {"machine": machine, "settings": settings, "sections": {}}
    for section in sections:
        found = asdict(section)
        for finding, line in zip(section.findings, found["findings"], strict=True):
            line["met"] = finding.met
        data["sections"][section.name] = found
    return data


def write(data: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def duration(us: float) -> str:
    """Three digits, in the unit that suits."""
    for unit, size in (("s ", 1e6), ("ms", 1e3)):
        if us >= size:
            return f"{us / size:.3g} {unit}"
    return f"{us:.3g} us"


def table_text(table: Table) -> str:
    width = max(len(row.name) for row in table.rows)
    head = f"{table.title} (medians of {table.rounds} rounds; ratio to {table.reference!r}, its quartiles)"
    lines = [head]
    for row in table.rows:
        ratio = f"{row.ratio:7.2f} x  ({row.ratio_low:.2f} to {row.ratio_high:.2f})"
        lines.append(f"  {row.name:{width}}  {duration(row.median_us):>10}  {ratio}")
    return "\n".join(lines)


def value_text(finding: Finding) -> str:
    unit, value = finding.target.unit, finding.value
    text = f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    if finding.low is not None and finding.high is not None and finding.low != finding.high:
        text += f" ({finding.low:.2f} to {finding.high:.2f})"
    return f"{text} {unit}".strip()


def findings_text(sections: Sequence[Section]) -> str:
    """The table of targets: one line a finding, in the targets' order."""
    rows = [("", "figure", "gradients", "dtype", "measured", "target", "")]
    found = sorted((f for section in sections for f in section.findings), key=lambda f: f.target.order)
    for f in found:
        verdict = {True: "met", False: "NOT MET", None: ""}[f.met]
        order, target = str(f.target.order), f.target.stated()
        rows.append((order, f.target.what, f.tree, f.dtype, value_text(f), target, verdict))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    text = "\n".join("  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
    judged = [f.met for f in found if f.met is not None]
    return f"{text}\n\n{sum(judged)} of {len(judged)} figures with a target meet it"


def machine_text(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    threads = ", ".join(f"{name} {count}" for name, count in machine["threads"].items())
    memory = f"{machine['memory_GB']} GB" if machine["memory_GB"] else "unknown memory"
    return (
        f"{machine['date']}: {machine['processor']}, {machine['cores']} cores, {memory}, {machine['system']}\n"
        f"Python {machine['python']}, {versions}\n"
        f"threads: {threads}"
    )


def full_text(machine: dict[str, Any], sections: Sequence[Section]) -> str:
    parts = [machine_text(machine)]
    for section in sections:
        parts += [table_text(table) for table in section.tables]
    notes = [f"- {note}" for section in sections for note in section.notes]
    if notes:
        parts.append("\n".join(["Notes:", *notes]))
    parts.append(findings_text(sections))
    not_run = [f"- {reason}" for section in sections for reason in section.not_run]
    parts.append("\n".join(["Not run:", *(dict.fromkeys(not_run) or ["- nothing was left out"])]))
    return "\n\n".join(parts)

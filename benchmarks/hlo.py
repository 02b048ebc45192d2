"""Programs as XLA prints them, read line by line."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_INSTRUCTION = re.compile(r"^\s*(?P<root>ROOT )?%(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")


@dataclass(frozen=True)
class Instruction:
    """One line of HLO: its name, operation, operands by name, numbers of elements of its outputs, and their bytes."""

    name: str
    operation: str
    operands: list[str]
    sizes: list[int]
    bytes: int
    is_root: bool
    text: str


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"unbalanced: {text[start:]}")


def parsed(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(line)
    if found is None:
        return None
    rest = found["rest"]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, call = rest[:end], rest[end:].strip()
    opens = call.index("(")
    operands = re.findall(r"%([\w.\-]+)", call[opens : _closing(call, opens)])
    arrays = [(dtype, math.prod(map(int, filter(None, dims.split(","))))) for dtype, dims in _ARRAY.findall(kind)]
    sizes, total = [size for _, size in arrays], sum(_width(dtype) * size // 8 for dtype, size in arrays)
    return Instruction(found["name"], call[:opens], operands, sizes, total, found["root"] is not None, line)


def _width(dtype: str) -> int:
    """Bits of an element: `f32`, `bf16`, `c64`, `f8e4m3fn`; a bool takes a byte."""
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8


def computations(hlo: str) -> dict[str, list[Instruction]]:
    """The instructions by computation; the entry computation is called ENTRY."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in hlo.splitlines():
        header = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            current = found.setdefault("ENTRY" if header[1] else header[2], [])
        elif (instruction := parsed(line)) is not None:
            current.append(instruction)
    return found

"""Reads the machine code of an NVIDIA GPU as `nvdisasm -c` prints it: blocks, loops, and what one turn of a loop runs.

What a warp runs in a turn depends on its branches: the cheapest path through the loop's body, the dearest, or, where
its threads part at every branch, all of the body. A predicated instruction is issued whether its predicate holds or
not, so it is counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

#: The classes of instructions, by the first part of their names. What is not listed is a move, a branch or the like.
_CLASSES = {
    "fp64": r"DADD|DMUL|DFMA|DSETP|DMNMX|DSET",
    "convert": r"F2F|F2FP|F2I|I2F|I2FP|I2I|I2IP|F2IP|FRND",
    "fp32": r"FADD|FMUL|FFMA|FFMA2|FADD2|FMUL2|FADD32I|FMUL32I|FFMA32I|FSWZADD|H[A-Z]+2|HADD2_32I|HFMA2_MMA",
    "mad": r"IMAD|IMUL|IDP|IDP4A|IMAD32I",
    "alu": r"FSETP|FMNMX|FMNMX3|FSEL|FSET|FCHK|IADD|IADD3|IADD32I|IABS|ISETP|IMNMX|VIMNMX|VIADD|VIADDMNMX|LOP3|LOP|"
    r"PLOP3|LEA|SHF|SHL|SHR|SEL|PRMT|SGXT|BMSK|BREV|FLO|POPC|VABSDIFF|MOV|P2R|R2P|VOTE",
    "mufu": r"MUFU",
    "memory": r"LDG|LD|STG|ST|LDS|STS|LDL|STL|LDC|LDGSTS|ATOM|ATOMG|ATOMS|RED|SHFL|LDSM|MATCH|REDUX",
}
_CLASS_OF = {name: kind for kind, names in _CLASSES.items() for name in names.split("|")}
_HALVES = re.compile(_CLASSES["fp32"])
_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P[T\d]+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^\s*(\.L[\w.]*|[A-Za-z_$][\w$]*):\s*$")
_TARGET = re.compile(r"`\(([^)]+)\)")
_REGISTER = re.compile(r"(?<![\w.])R(\d+)")
_ENDS = ("EXIT", "RET", "BRX", "JMX", "BPT", "KILL", "JMP", "BRA")


class Instruction(NamedTuple):
    guard: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def kind(self) -> str:
        """A class above; `convert64` for conversions from and to 64-bit types, `other`."""
        name = self.name
        found = _CLASS_OF.get(name) or ("fp32" if _HALVES.fullmatch(name) else "other")
        return "convert64" if found == "convert" and "64" in self.opcode else found

    @property
    def width(self) -> int:
        """The bytes that a load or store moves."""
        sizes = [int(part.lstrip("US")) for part in self.opcode.split(".")[1:] if re.fullmatch(r"[US]?\d+", part)]
        return max(sizes, default=32) // 8

    @property
    def loaded(self) -> int:
        """The bytes read from global memory."""
        return self.width if self.name in ("LDG", "LD", "LDGSTS") else 0

    @property
    def target(self) -> str | None:
        """Where a branch goes. `BSSY` and calls name a place too, and do not go there for good."""
        found = _TARGET.search(self.operands) if self.name in ("BRA", "JMP") else None
        return found[1] if found else None

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow: a branch may have its condition before it, or as an operand."""
        if self.name not in _ENDS or (self.guard and self.guard != "@PT"):
            return True
        return self.name == "BRA" and not self.operands.startswith("`")

    def registers(self) -> set[int]:
        """Those named, with the second half of each pair in arithmetic of doubles."""
        found = {int(n) for n in _REGISTER.findall(self.operands)}
        return found | {n + 1 for n in found} if self.kind in ("fp64", "convert64") else found


class Block(NamedTuple):
    instructions: tuple[Instruction, ...]
    after: tuple[int, ...]

    @property
    def loaded(self) -> int:
        return sum(one.loaded for one in self.instructions)

    def named(self, pattern: str) -> int:
        """How many instructions, without their predicates, begin like this."""
        return sum(bool(re.match(pattern, f"{one.opcode} {one.operands}")) for one in self.instructions if pattern)


class Loop(NamedTuple):
    head: int
    body: frozenset[int]
    inner: frozenset[int]  # those blocks of the body that are in a loop inside

    def loads(self, blocks: Sequence[Block]) -> int:
        """Bytes that it loads itself, not by loops inside."""
        return sum(blocks[i].loaded for i in self.body - self.inner)

    def widest(self, blocks: Sequence[Block]) -> int:
        """The most bytes that one instruction of it loads."""
        return max(one.loaded for i in self.body for one in blocks[i].instructions)


def blocks_of(text: str, name: str) -> list[Block]:
    """The blocks of a function, the first one first."""
    label_at: dict[str, int] = {}
    code: list[Instruction] = []
    inside = False
    for line in text.splitlines():
        if re.match(r"\s*\.section\s", line):
            inside = f".text.{name}," in line
        if not inside:
            continue
        label = _LABEL.match(line)
        if label:
            label_at[label[1]] = len(code)
        for guard, opcode, operands in _LINE.findall(line):
            code.append(Instruction(guard, opcode, operands))
    starts = {0, *label_at.values()} | {i + 1 for i, one in enumerate(code) if one.name in _ENDS}
    edges = sorted(start for start in starts if start < len(code))
    number = {start: i for i, start in enumerate(edges)}
    blocks = []
    for start, end in zip(edges, [*edges[1:], len(code)], strict=True):
        last = code[end - 1]
        after = [number[label_at[last.target]]] if last.target in label_at else []
        if last.falls_through and end in number and number[end] not in after:
            after.append(number[end])
        blocks.append(Block(tuple(code[start:end]), tuple(after)))
    return blocks


def _upwards(blocks: Sequence[Block], start: int, allowed: Callable[[int, int], bool]) -> list[int]:
    """The blocks reached from `start` by allowed edges, each after those that it leads to, depth first."""
    order, seen, stack = [], {start}, [(start, iter(blocks[start].after))]
    while stack:
        i, rest = stack[-1]
        following = next((j for j in rest if j not in seen and allowed(i, j)), None)
        if following is None:
            order.append(i)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(blocks[following].after)))
    return order


def _dominators(blocks: Sequence[Block]) -> tuple[dict[int, int], list[list[int]]]:
    """Of each block that is reached, as bits, the blocks through which every way to it leads; and the blocks before."""
    order = _upwards(blocks, 0, lambda i, j: True)
    before: list[list[int]] = [[] for _ in blocks]
    for i in order:
        for j in blocks[i].after:
            before[j].append(i)
    full = (1 << len(blocks)) - 1
    found = dict.fromkeys(order, full) | {0: 1}
    changed = True
    while changed:
        changed = False
        for i in reversed(order[:-1]):
            bits = full
            for j in before[i]:
                bits &= found[j]
            bits |= 1 << i
            changed |= bits != found[i]
            found[i] = bits
    return found, before


def loops(blocks: Sequence[Block]) -> list[Loop]:
    """The natural loops, the smallest first."""
    over, before = _dominators(blocks)
    bodies: dict[int, set[int]] = {}
    for i in over:
        for head in blocks[i].after:
            if over[i] >> head & 1:  # an edge back to a block through which every way here leads
                body, stack = bodies.setdefault(head, {head}), [i]
                while stack:
                    j = stack.pop()
                    if j not in body:
                        body.add(j)
                        stack.extend(before[j])
    found: list[Loop] = []
    for head, body in sorted(bodies.items(), key=lambda item: len(item[1])):
        inner = frozenset().union(*(loop.body for loop in found if loop.body < body))
        found.append(Loop(head, frozenset(body), inner))
    return found


class Turn(NamedTuple):
    """What one turn of a loop runs, in this order."""

    instructions: tuple[Instruction, ...]
    loaded: int  # bytes, from global memory

    def counts(self) -> Counter[str]:
        return Counter(one.kind for one in self.instructions)

    def in_flight(self) -> tuple[int, int]:
        """How many loads at most, and bytes, wait at once, their registers not named yet: from one turn to the next."""
        waiting: list[tuple[set[int], int]] = []
        most = (0, 0)
        for one in self.instructions * 2:
            named = one.registers()
            if one.loaded and one.name != "LDGSTS":
                first = _REGISTER.search(one.operands)
                to = int(first[1]) if first else -1
                filled = set(range(to, to + max(1, one.width // 4)))
                named = (named - {to}) | filled
                waiting = [other for other in waiting if not other[0] & named]
                waiting.append((filled, one.width))
                most = max(most, (len(waiting), sum(width for _, width in waiting)))
            else:
                waiting = [other for other in waiting if not other[0] & named]
        return most


Cost = Callable[[Instruction], float]
Path = tuple[float, tuple[int, ...]]  # the cost and the blocks


def turns(blocks: Sequence[Block], loop: Loop, cost: Cost, work: str = "") -> dict[tuple[int, int], tuple[Turn, Turn]]:
    """The cheapest and the dearest paths through a loop's body; loops inside turn once.

    For each number of bytes that a path may load, and of instructions that the pattern `work` names: paths differ by
    what they do, and the cheapest may be one that does nothing.
    """
    over, before = _dominators(blocks)
    price = {i: sum(map(cost, blocks[i].instructions)) for i in loop.body}
    done = {i: (blocks[i].loaded, blocks[i].named(work)) for i in loop.body}
    ways: dict[int, dict[tuple[int, int], tuple[Path, Path]]] = {}
    ends: dict[tuple[int, int], list[Path]] = {}
    for i in _downwards(blocks, loop, over):
        found: dict[tuple[int, int], list[Path]] = {(0, 0): [(0.0, ())]} if i == loop.head else {}
        for j in before[i]:
            if i != loop.head and j in ways and not over[j] >> i & 1:
                for key, both in ways[j].items():
                    found.setdefault(key, []).extend(both)
        ways[i] = {}
        for (loaded, worked), several in found.items():
            now = [(price[i] + spent, (*path, i)) for spent, path in several]
            ways[i][loaded + done[i][0], worked + done[i][1]] = min(now), max(now)
        if loop.head in blocks[i].after:
            for key, both in ways[i].items():
                ends.setdefault(key, []).extend(both)

    def turn(path: tuple[int, ...], loaded: int) -> Turn:
        return Turn(tuple(one for i in path for one in blocks[i].instructions), loaded)

    return {key: (turn(min(found)[1], key[0]), turn(max(found)[1], key[0])) for key, found in ends.items()}


def _downwards(blocks: Sequence[Block], loop: Loop, over: dict[int, int]) -> Iterator[int]:
    """The blocks of a loop, each after those that lead to it, edges back left out."""
    return reversed(_upwards(blocks, loop.head, lambda i, j: j in loop.body and not over[i] >> j & 1))


def everything(blocks: Sequence[Block], loop: Loop, loaded: int) -> Turn:
    """All of a loop's body: what a warp runs whose threads part at every branch."""
    return Turn(tuple(one for i in sorted(loop.body) for one in blocks[i].instructions), loaded)

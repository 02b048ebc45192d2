"""CUDA C for norms, the policy and scaling, written from the laws and the policy themselves. Nothing here runs it.

A law is run once on symbols (see `expressions`) for each dtype, and a policy once for each form of its arguments; what
comes out is put into the fixed text of `cuda_text`. So every formula is written once, in `_norms` and `_numbers`, and
the policy once, in `_clip`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from gradclip._kernels.cuda_text import (
    ALIGNMENT,
    CHUNKS,
    IDENTITY,
    JOIN,
    JOINING,
    KINDS,
    LEAVES,
    MEASURE,
    MERGE,
    NUMBERS,
    SCALE,
    SETTLE,
    TABLE,
    TABLE_BYTES,
    THREADS,
)
from gradclip._kernels.expressions import Partial, Printed, Reduced, Symbols
from gradclip._kernels.generic import Kernels
from gradclip._law import Law
from gradclip._numbers import Measured
from gradclip._types import Call, Nonfinite


def _choice(kinds: tuple[str, ...], run: str) -> str:
    """A statement that runs `run` with the storage class of the leaf `low`. `{0}`: its name, `{1}`: the kind's."""
    order = list(KINDS)
    cases = [(order.index(kind), run.format(KINDS[kind].storage, kind)) for kind in kinds]
    tests = [f"if (low < t.until[{i}]) {{ {text} }}" for i, text in cases[:-1]]
    return " else ".join([*tests, f"{{ {cases[-1][1]} }}"])


def _head() -> str:
    return NUMBERS % {"threads": THREADS} + TABLE % {"leaves": LEAVES, "kinds": len(KINDS), "bytes": TABLE_BYTES}


def _joining(op: str, slots: int) -> str:
    return JOINING % {"merge": MERGE[op], "slots": slots}


@lru_cache(maxsize=256)
def measure(law: Law, step: int, kinds: tuple[str, ...]) -> str:
    """The kernel of one pass of a law over leaves of these kinds: it writes one partial for each block."""
    op, slots = law.ops[step], law.sizes[step]
    gather = "".join(_gather(law, step, kind) for kind in kinds)
    run = "gather_{1}((const {0}*)t.from[low] + skipped, n, s, c, seen);"
    chunks = CHUNKS % {"choice": _choice(kinds, run)}
    body = MEASURE % {"gather": gather, "slots": slots, "identity": IDENTITY[op], "chunks": chunks}
    return _head() + _joining(op, slots) + body


def _gather(law: Law, step: int, kind: str) -> str:
    """A function that adds the elements of one chunk to a partial, by the law's own formulas."""
    xp, wide = Symbols(), KINDS[kind].bits == 64
    pair = kind.startswith("complex")
    parts = tuple(xp.given(name, varies=True) for name in (("re", "im") if pair else ("re",)))
    # Passes after the first see what other leaves, or other shards, have measured: numbers that may be wide.
    narrow = not wide and step == 0
    seen = _seen(xp, law, step)
    # In double, what a plain sum of narrower elements loses cannot be seen in the result.
    partial: Partial = law.contribute(xp, parts, xp.total if wide else xp.sum, narrow, seen)
    assert len(partial) == law.sizes[step]
    printed, ends = Printed(), []
    for k, slot in enumerate(partial):
        if isinstance(slot, Reduced):
            assert slot.op == law.ops[step]
            x, exact = printed.name(slot.element), slot.exact
            to = f"add(s[{k}], c[{k}], {x});" if exact else f"add(s[{k}], {x});"
            ends.append(to if slot.op == "sum" else f"merge(s[{k}], c[{k}], {x}, 0.0);")
        else:
            assert slot.form == "0.0" == IDENTITY[law.ops[step]], "a constant slot that does not join without effect"
    storage = KINDS[kind].storage
    read = "const double re = widen(e.re), im = widen(e.im);" if pair else "const double re = widen(e);"
    lines = [*printed.once, f"visit(p, n, [&](const {storage}& e) {{", read, *printed.each, *ends, "});"]
    inside = "\n    ".join(lines)
    return f"""
__device__ __forceinline__ void gather_{kind}(
    const {storage}* p, unsigned n, double* s, double* c, const double* seen
) {{
    {inside}
}}
"""


def _seen(xp: Symbols, law: Law, step: int) -> tuple[Any, ...]:
    """The joined partials of the passes before `step`, one behind the other in C's array `seen`."""
    out, at = [], 0
    for size in law.sizes[:step]:
        out.append([xp.given(f"seen[{at + k}]") for k in range(size)])
        at += size
    return tuple(out)


def _join(law: Law, step: int) -> str:
    slots = law.sizes[step]
    return JOIN % {"slots": slots, "identity": IDENTITY[law.ops[step]]}


@lru_cache(maxsize=256)
def joined(law: Law, step: int) -> str:
    """The kernel that joins the partials of all blocks into one."""
    body = "\n    ".join(f"out[{k}] = whole(s[{k}], c[{k}]);" for k in range(law.sizes[step]))
    parameters = "double* out, const double* table, unsigned stride"
    settle = SETTLE % {"parameters": parameters, "join": _join(law, step), "body": body}
    return NUMBERS % {"threads": THREADS} + _joining(law.ops[step], law.sizes[step]) + settle


class Form(NamedTuple):
    """All that the program of a policy depends on, beside the policy itself."""

    law: Law
    nonfinite: Nonfinite
    narrow: bool  # every leaf is
    wide: bool  # the norm is reported in float64
    bounds: Any  # the bounds' own tuple, of "value", "array", or None where one is not given


class _Staging(Kernels):
    """The kernels as a policy sees them while it is written down."""

    def __init__(self, xp: Symbols, form: Form, joined: tuple[Any, ...]) -> None:
        super().__init__(xp)
        self.form, self.given = form, joined

    def accumulation(self, leaves: Any) -> Any:
        return self.xp.float64

    def reported(self, leaves: Any) -> Any:
        return self.xp.float64 if self.form.wide else self.xp.float32

    def devices(self, leaves: Any) -> list[Any]:
        return [None]

    def measure(self, leaves: Any, law: Law, acc: Any, all_reduce: Call | None) -> Measured:
        return law.finish(self.xp, self.given, self.form.narrow)


class Settled(NamedTuple):
    """A kernel that settles what is to be done."""

    source: str
    shifts: bool  # whether it gives a shift


@lru_cache(maxsize=256)
def settle(plan: Callable[..., Any], form: Form) -> Settled:
    """The kernel that joins the last pass's partials and runs the policy `plan` on them, in one thread.

    Its parameters: the output; the partials of the last pass as columns and how many there are, and the joined ones of
    the pass before it, all that unless the norm is given; the bounds. It puts out what the plan returns.
    """
    xp, law = Symbols(), form.law
    last, measured = len(law.ops) - 1, form.bounds.norm is None
    final = [xp.given(f"joined{k}") for k in range(law.sizes[last])]
    staging = _Staging(xp, form, (*_seen(xp, law, last), final))
    parameters, body, join, head = ["double* out"], Printed(), "", ""
    if measured:
        parameters += ["const double* table", "unsigned stride", *(["const double* seen"] if last else [])]
        head, join = _joining(law.ops[last], law.sizes[last]), _join(law, last)
        body.once += [f"const double joined{k} = whole(s[{k}], c[{k}]);" for k in range(law.sizes[last])]
    numbers = []
    for name, kind in form.bounds._asdict().items():
        star = "*" if kind == "array" else ""
        numbers.append(None if kind is None else Measured(xp.given(f"{star}{name}"), None))
        parameters += [] if kind is None else [f"const double{star} {name}"]
    bounds = form.bounds._make(numbers)
    norm, factor, shift, root, total = plan(staging, [], bounds, law=law, nonfinite=form.nonfinite, all_reduce=None)
    ends = [f"narrow({body.name(norm)}, *({'Double' if form.wide else 'Single'}*)out);"]
    for i, x in enumerate((factor, shift, root, total), start=1):
        ends += [] if x is None else [f"out[{i}] = {body.name(x)};"]
    text = SETTLE % {
        "parameters": ", ".join(parameters),
        "join": join,
        "body": "\n    ".join([*body.once, *ends]),
    }
    return Settled(NUMBERS % {"threads": THREADS} + head + text, shift is not None)


@lru_cache(maxsize=256)
def scale(kinds: tuple[str, ...]) -> str:
    """The kernel that writes `leaf * shift * factor * shift`; a complex leaf is twice as many real numbers to it."""
    run = "rewrite((const {0}*)t.from[low] + skipped, "
    run += f"(base ? ({{0}}*)(base + t.out[low] * {ALIGNMENT}ull) : ({{0}}*)t.from[low]) + skipped, "
    run += "n, factor, shift, keep);"
    return _head() + SCALE % {"chunks": CHUNKS % {"choice": _choice(kinds, run)}}

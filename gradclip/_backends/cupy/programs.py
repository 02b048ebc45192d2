"""CUDA C for norms, the policy and scaling, written from the norms and the policy themselves. Nothing here runs it.

A norm is run once on symbols (see `expressions`) for each dtype, and the policy once for each norm; what comes out is
put into the fixed text of `text`. So every formula is written once, in `_norms` and `_scaled`, and the policy once, in
`_decide`.

Few programs: one for each norm settles everything, whatever the bounds, the policy and the dtypes. Those are data:
every bound is a pointer or a value, `divide_by` is 1 where there is none, and a plain sum is the middle one of three
bins.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

from gradclip._backends.cupy import expressions as xp
from gradclip._backends.cupy import text
from gradclip._backends.cupy.expressions import Expression, Printed
from gradclip._backends.cupy.numbers import KINDS, NUMBERS, REAL
from gradclip._backends.cupy.text import ALIGNMENT, IDENTITY, LEAVES
from gradclip._decide import Bounds, decide
from gradclip._norms import Norm, Seen, Terms
from gradclip._parts import Parts
from gradclip._scaled import Scaled, quotient
from gradclip._types import Namespace, Nonfinite


class Census(Norm):
    """How many elements are NaN, and how many infinite: passed off as a norm, it is counted as fast as one."""

    slots = (2,)

    def terms(self, xp: Namespace, parts: Parts, seen: Seen) -> Terms:
        one, zero = xp.ones_like(parts[0]), xp.zeros_like(parts[0])
        nan, inf = xp.isnan(parts[0]), xp.isinf(parts[0])
        for part in parts[1:]:
            nan, inf = xp.logical_or(nan, xp.isnan(part)), xp.logical_or(inf, xp.isinf(part))
        return xp.where(nan, one, zero), xp.where(xp.logical_and(inf, xp.logical_not(nan)), one, zero)


_HEAD = NUMBERS % {"threads": text.THREADS}


def _table(grouped: bool) -> str:
    sizes = {"leaves": LEAVES[grouped], "kinds": len(KINDS), "bytes": text.TABLE_BYTES}
    return text.TABLE % {**sizes, "group": text.GROUP % sizes if grouped else ""}


def _joining(norm: Norm, step: int) -> dict[str, Any]:
    return {"merge": text.MERGE[norm.ops[step]], "slots": norm.slots[step], "identity": IDENTITY[norm.ops[step]]}


def _choice(kinds: tuple[str, ...], run: str) -> str:
    """A statement that runs `run` with the storage class of the leaf `low`. `{0}`: its name, `{1}`: the kind's."""
    order = list(KINDS)
    cases = [(order.index(kind), run.format(KINDS[kind].storage, kind)) for kind in kinds]
    tests = [f"if (low < t.until[{i}]) {{ {call} }}" for i, call in cases[:-1]]
    return " else ".join([*tests, f"{{ {cases[-1][1]} }}"])


@lru_cache(maxsize=256)
def measure(norm: Norm, step: int, kinds: tuple[str, ...]) -> str:
    """The kernel of one pass of a norm over leaves of these kinds: it writes partials as columns."""
    joining = _joining(norm, step)
    run = "gather_{1}((const {0}*)t.from[low] + skipped, n, s, c, seen + t.to[low] % groups, groups);"
    each = text.FLUSH % {**joining, "choice": _choice(kinds, run)}
    gather = "".join(_gather(norm, step, kind) for kind in kinds)
    body = text.MEASURE % {**joining, "gather": gather, "chunks": text.CHUNKS % {"each": each}}
    return _HEAD + _table(False) + text.VISIT + text.JOINING % joining + body


def _gather(norm: Norm, step: int, kind: str) -> str:
    """A function that adds the elements of one chunk to a partial, by the norm's own formulas."""
    wide, pair = KINDS[kind].bits == 64, kind.startswith("complex")
    names = ("re", "im") if pair else ("re",)
    full = replace(norm, binned=True)
    # Passes after the first see what other leaves, or other shards, have measured: numbers that may be wide.
    used = full if wide or step else full.plain
    terms = used.terms(xp, tuple(map(Expression, names)), _seen(norm, step, "groups", ""))
    assert len(terms) == norm.slots[step]
    printed, ends = Printed(*names), []
    for k, term in enumerate(terms):
        if term is None:
            continue
        x = printed.name(term)
        if norm.ops[step] == "sum":
            # In double, what a plain sum of narrower elements loses cannot be seen in the result.
            ends.append(f"add(s[{k}], c[{k}], {x});" if wide else f"add(s[{k}], {x});")
        else:
            ends.append(f"merge(s[{k}], c[{k}], {x}, 0.0);")
    storage = KINDS[kind].storage
    read = "const double re = widen(e.re), im = widen(e.im);" if pair else "const double re = widen(e);"
    head = f"visit<false>(p, ({storage}*)0, n, [&](const {storage}& e) {{"
    lines = [*printed.once, head, read, *printed.each, *ends, "});"]
    inside = "\n    ".join(lines)
    return f"""
__device__ __forceinline__ void gather_{kind}(
    const {storage}* p, unsigned n, double* s, double* c, const double* seen, unsigned groups
) {{
    {inside}
}}
"""


def _seen(norm: Norm, step: int, stride: str, group: str) -> tuple[Any, ...]:
    """The joined partials of the passes before `step`, row behind row in C's array `seen`."""
    out, at = [], 0
    for slots in norm.slots[:step]:
        out.append([Expression(f"seen[{at + k} * (u64){stride}{group}]") for k in range(slots)])
        at += slots
    return tuple(out)


@lru_cache(maxsize=256)
def joined(norm: Norm, step: int) -> str:
    """The kernel that joins the columns of every group into one."""
    joining = _joining(norm, step)
    body = text.JOINED % {**joining, "columns": text.COLUMNS, "join": text.JOIN % joining}
    return _HEAD + text.JOINING % joining + body


@lru_cache(maxsize=256)
def settle(norm: Norm | None) -> str:
    """The kernel that joins the last pass's columns of every group and decides on it, in one thread for each group.

    None: for norms that are given. Its parameters: the outputs; the flags of groups whose norm is float64, the first
    group of the launch, how many groups there are, and whether what is not finite becomes 0; each bound; then, unless
    norms are given, the columns, the flags of all shards, and the partials of the pass before.
    """
    body, head, join = Printed(), "", ""
    names = ["max_norm", "divide_by", *(["norm"] if norm is None else [])]
    parameters = [text.BOUND.format(name) for name in names]
    body.once += [text.READ.format(name) for name in names]
    norms = None
    if norm is not None:
        last = len(norm.ops) - 1
        joining = _joining(norm, last)
        parameters += [text.COLUMNS, "const double* widths", "const double* seen, unsigned known"]
        head, join = text.JOINING % joining, text.JOIN % joining
        body.once += [f"const double joined{k} = whole(s[{k}], c[{k}]);" for k in range(norm.slots[last])]
        final = [Expression(f"joined{k}") for k in range(norm.slots[last])]
        norms = replace(norm, binned=True).finish(xp, (*_seen(norm, last, "known", " + g"), final))
    given = {name: Scaled(Expression(name), None) for name in names}
    bounds = Bounds(given["max_norm"], given.get("norm"), given["divide_by"])
    wide = Expression("(widths ? widths[g] != 0 : doubled)" if norm else "doubled", dtype="bool")
    policies: tuple[Nonfinite, ...] = ("zero", "propagate")
    zero, other = (decide(xp, norms, bounds, wide, policy) for policy in policies)
    numerator = zero.numerator.where(xp, Expression("zeroes", dtype="bool"), other.numerator)
    factors = quotient(xp, numerator, other.denominator)
    shift = xp.number(1.0) if factors.shift is None else factors.shift
    found = {"norm": other.norm, "factor": factors.factor, "shift": shift}
    found |= {"finite": other.finite, "joined_finite": other.joined_finite}
    shown = {name: body.name(x) for name, x in found.items()}
    fixed = {"words": text.GROUPS // 32, "parameters": ", ".join(parameters), "join": join}
    return _HEAD + head + text.SETTLE % {**fixed, **shown, "body": "\n    ".join(body.once)}


@lru_cache(maxsize=8)
def row() -> str:
    """The kernel that puts single numbers, by value or from the device, into one row."""
    read = "if (row.kind[i] == {0}) {{ out[i] = widen(*(const {1}*)p); continue; }}"
    cases = "\n        ".join(read.format(i, KINDS[name].storage) for i, name in enumerate(REAL, start=1))
    return _HEAD + text.ROW % {"entries": text.ENTRIES, "cases": cases}


@lru_cache(maxsize=256)
def scale(kinds: tuple[str, ...], grouped: bool) -> str:
    """The kernel that writes `leaf * shift * factor * shift`; a complex leaf is twice as many real numbers to it.

    `grouped`: by the factors of the leaf's group; else all by one.
    """
    run = "visit<true>((const {0}*)t.from[low] + skipped, "
    run += f"(base ? ({{0}}*)(base + t.to[low] * {ALIGNMENT}ull) : ({{0}}*)t.from[low]) + skipped, n, "
    run += "[&]({0}& x) {{ if (!keep) narrow(factor == 0 ? 0.0 : widen(x) * shift * factor * shift, x); }});"
    each = _choice(kinds, run)
    once = text.FACTOR % {"group": "t.group[low]" if grouped else "0", "leave": "continue" if grouped else "return"}
    if grouped:
        each, once = once + each, ""
    return _HEAD + _table(grouped) + text.VISIT + text.SCALE % {"once": once, "chunks": text.CHUNKS % {"each": each}}

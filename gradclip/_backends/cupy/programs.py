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
from gradclip._backends.cupy.table import TABLE
from gradclip._backends.cupy.text import ALIGNMENT, LEAVES
from gradclip._decide import Bounds, decide
from gradclip._norms import Norm, Seen, Terms, identity
from gradclip._parts import Parts, longest_of
from gradclip._scaled import Scaled, quotient
from gradclip._types import Namespace


class Census(Norm):
    """How many elements are NaN, and how many infinite: passed off as a norm, it is counted as fast as one."""

    slots = (2,)

    def terms(self, xp: Namespace, parts: Parts, seen: Seen) -> Terms:
        longest = longest_of(xp, parts)  # NaN where one part is NaN
        one, zero = xp.ones_like(longest), xp.zeros_like(longest)
        return xp.where(xp.isnan(longest), one, zero), xp.where(xp.isinf(longest), one, zero)


_HEAD = NUMBERS % {"threads": text.THREADS}


def _table(grouped: bool) -> str:
    sizes = {"leaves": LEAVES[grouped], "kinds": len(KINDS), "bytes": TABLE[grouped].itemsize}
    return text.TABLE % {**sizes, "group": text.GROUP % sizes if grouped else ""}


def _joining(norm: Norm, step: int) -> dict[str, Any]:
    op = norm.ops[step]
    return {"merge": text.MERGE[op], "slots": norm.slots[step], "identity": xp.number(identity(op)).form}


def _choice(kinds: tuple[str, ...], run: str) -> str:
    """A statement that runs `run` with the storage class of the leaf `low`. `{0}`: its name, `{1}`: the kind's."""
    return " else ".join(
        f"if (low < t.until[{i}]) {{ {run.format(kind.storage, name)} }}"
        for i, (name, kind) in enumerate(KINDS.items())
        if name in kinds
    )


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
    storage, component = KINDS[kind]
    wide, names = component == "float64", ("re",) if kind == component else ("re", "im")
    # Passes after the first see what other leaves, or other shards, have measured: numbers that may be wide.
    used = replace(norm, binned=wide or step > 0)
    terms = used.terms(xp, tuple(map(Expression, names)), _seen(norm, step, ""))
    assert len(terms) == norm.slots[step]
    join = "merge(s[{0}], c[{0}], {1}, 0.0);"
    if norm.ops[step] == "sum":
        # In double, what a plain sum of narrower elements loses cannot be seen in the result.
        join = "add(s[{0}], c[{0}], {1});" if wide else "s[{0}] += {1};"
    printed = Printed(*names)
    ends = [join.format(k, printed.name(term)) for k, term in enumerate(terms) if term is not None]
    read = [f"const double {name} = widen(e{'' if kind == component else f'.{name}'});" for name in names]
    head = f"visit<false>(p, ({storage}*)0, n, [&](const {storage}& e) {{"
    inside = "\n    ".join([*printed.once, head, *read, *printed.each, *ends, "});"])
    return f"""
__device__ __forceinline__ void gather_{kind}(
    const {storage}* p, unsigned n, double* s, double* c, const double* seen, unsigned groups
) {{
    {inside}
}}
"""


def _seen(norm: Norm, step: int, group: str) -> tuple[Any, ...]:
    """The joined partial of the pass before `step`, of which there is one at most: in C the array `seen`, by rows."""
    assert step < 2
    return ([Expression(f"seen[{k} * (u64)groups{group}]") for k in range(norm.slots[0])],) if step else ()


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
    norms are given, the columns, the flags of all shards, and the partial of the pass before.
    """
    body, head, join = Printed(), "", ""
    names = ["max_norm", "divide_by", *(["norm"] if norm is None else [])]
    parameters = [text.BOUND.format(name) for name in names]
    norms = None
    if norm is not None:
        last = len(norm.ops) - 1
        joining = _joining(norm, last)
        parameters += [text.COLUMNS, "const double* widths", "const double* seen"]
        head, join = text.JOINING % joining, text.JOIN % joining
        final = [Expression(f"whole(s[{k}], {{}})", (Expression(f"c[{k}]"),)) for k in range(norm.slots[last])]
        norms = replace(norm, binned=True).finish(xp, (*_seen(norm, last, " + g"), final))
    bounds = Bounds(**{name: Scaled(Expression(text.READ, (Expression(name),)), None) for name in names})
    wide = Expression("(widths ? widths[g] != 0 : doubled)" if norm else "doubled", dtype="bool")
    zero = decide(xp, norms, bounds, wide, "zero")
    other = decide(xp, norms, bounds, wide, "propagate")
    numerator = zero.numerator.where(xp, Expression("zeroes", dtype="bool"), other.numerator)
    factors = quotient(xp, numerator, other.denominator)
    shift = xp.number(1.0) if factors.shift is None else factors.shift
    shown = {name: body.name(getattr(other, name)) for name in ("norm", "finite", "joined_finite")}
    shown |= {"factor": body.name(factors.factor), "shift": body.name(shift)}
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
    factor = text.FACTOR % {"group": "t.group[low]" if grouped else "0", "leave": "continue" if grouped else "return"}
    chunks = text.CHUNKS % {"each": factor + each if grouped else each}
    return _HEAD + _table(grouped) + text.VISIT + text.SCALE % {"once": "" if grouped else factor, "chunks": chunks}

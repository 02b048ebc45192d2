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
from gradclip._backends.cupy import sums, text
from gradclip._backends.cupy.expressions import Expression, Printed
from gradclip._backends.cupy.numbers import KINDS, NUMBERS, REAL
from gradclip._backends.cupy.table import TABLE
from gradclip._backends.cupy.text import ALIGNMENT, KEPT, LEAVES, ONE, WHOLE
from gradclip._backends.cupy.tiles import TILES
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


def _table(grouped: int) -> str:
    sizes = {"leaves": LEAVES[grouped], "kinds": len(KINDS), "bytes": TABLE[grouped].itemsize}
    group = text.GROUP if grouped else ""
    inner, length = (text.INNER, text.LENGTH) if grouped == KEPT else ("", "")
    index = "unsigned" if grouped == KEPT else "unsigned short"
    fields = {"inner": inner % sizes, "group": group % sizes + "\n    " + length % sizes, "index": index}
    return text.TABLE % {**sizes, **fields} + text.VISIT


def _chunks(each: str) -> str:
    return text.CHUNKS % {"find": text.FIND % {"piece": "chunk"}, "each": each}


def _joining(norm: Norm, step: int) -> dict[str, Any]:
    op = norm.ops[step]
    return {"merge": sums.MERGE[op], "slots": norm.slots[step], "identity": xp.number(identity(op)).form}


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
    run = "gather_{1}((const {0}*)t.from[low] + skipped, n, threadIdx.x ? 0.0 : n, s, c, "
    run += "seen + t.to[low] % groups, groups);"
    each = sums.FLUSH % {**joining, "choice": _choice(kinds, run)}
    gather = "".join(_gather(norm, step, kind) for kind in kinds)
    body = sums.MEASURE % {**joining, "gather": gather, "chunks": _chunks(each)}
    return _HEAD + _table(ONE) + sums.JOINING % joining + body


@lru_cache(maxsize=256)
def spread(norm: Norm, step: int, kinds: tuple[str, ...]) -> str:
    """The same over leaves of which an axis is kept."""
    joining = _joining(norm, step)
    run = "gather_{1}((const {0}*)t.from[low] + skipped, area, n, s, c, seen + key % groups, groups);"
    gather = "".join(_gather(norm, step, kind) for kind in kinds)
    sizes = {"leaves": text.TILED, "kinds": len(KINDS), "bytes": TILES.itemsize}
    body = {"gather": gather, "find": text.FIND % {"piece": "tile"}, "choice": _choice(kinds, run)}
    return _HEAD + sums.TILES % sizes + sums.JOINING % joining + sums.SPREAD % {**joining, **body}


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
    each = {k: term for k, term in enumerate(terms) if isinstance(term, Expression)}
    ends = [join.format(k, printed.name(term)) for k, term in each.items()]
    alike = {k: term for k, term in enumerate(terms) if k not in each and term}
    counts = [join.format(k, f"{xp.number(term).form} * elements") for k, term in alike.items()]
    read = [f"const double {name} = widen(e{'' if kind == component else f'.{name}'});" for name in names]
    head = f"each(p, n, [&](const {storage}& e, unsigned) {{"
    inside = "\n    ".join([*counts, *printed.once, head, *read, *printed.each, *ends, "});"])
    return f"""
template <class N> __device__ __forceinline__ void gather_{kind}(
    const {storage}* p, const N& n, double elements, double* s, double* c, const double* seen, unsigned groups
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
    body = sums.JOINED % {**joining, "columns": sums.COLUMNS}
    return _HEAD + sums.JOINING % joining + sums.JOIN % joining + body


@lru_cache(maxsize=256)
def settle(norm: Norm | None) -> str:
    """The kernel that joins the last pass's columns of every group and decides on it, in one thread for each group.

    None: for norms that are given. Its parameters: the outputs; where norms turn from float32 to float64 and back, the
    first group of the launch, how many groups there are, and whether what is not finite becomes 0; each bound; then,
    unless norms are given, the columns, the flags of all shards, the partial of the pass before, and whether bounds are
    relative to parameters, whose columns follow: what is not is relative to parameters of norm 0.
    """
    body, head, join = Printed(), "", ""
    names = ["max_norm", "divide_by", "unit", *(["norm"] if norm is None else [])]
    parameters = [text.BOUND.format(name) for name in names]
    norms = params = None
    if norm is not None:
        last = len(norm.ops) - 1
        joining = _joining(norm, last)
        parameters += [sums.COLUMNS, "const double* widths", "const double* seen", "bool relative"]
        head = sums.JOINING % joining + sums.JOIN % joining
        norms = _finished(norm, "s", "c", " + g")
        others, own = _finished(norm, "ps", "pc", " + count + g"), Printed()
        exponent = xp.number(0.0) if others.exponent is None else others.exponent
        shown = {"mantissa": own.name(others.mantissa), "exponent": own.name(exponent)}
        join = text.FOUND % joining + text.RELATIVE % {**shown, "body": "\n        ".join(own.once)}
        params = Scaled(Expression("params"), Expression("params_exponent"))
    bounds = Bounds(**{name: Scaled(Expression(text.READ, (Expression(name),)), None) for name in names})
    wide = Expression("(widths ? widths[g] != 0 : doubled)" if norm else "doubled", dtype="bool")
    zero = decide(xp, norms, bounds, wide, "zero", params)
    other = decide(xp, norms, bounds, wide, "propagate", params)
    numerator = zero.numerator.where(xp, Expression("zeroes", dtype="bool"), other.numerator)
    factors = quotient(xp, numerator, other.denominator)
    shift = xp.number(1.0) if factors.shift is None else factors.shift
    shown = {name: body.name(getattr(other, name)) for name in ("norm", "finite", "joined_finite")}
    shown |= {"factor": body.name(factors.factor), "shift": body.name(shift)}
    fixed = {"turns": text.TURNS, "parameters": ", ".join(parameters), "join": join}
    return _HEAD + head + text.SETTLE % {**fixed, **shown, "body": "\n    ".join(body.once)}


def _finished(norm: Norm, s: str, c: str, group: str) -> Scaled:
    """The norm of what has been joined in the arrays `s` and `c`."""
    last = len(norm.ops) - 1
    final = [Expression(f"whole({s}[{k}], {{}})", (Expression(f"{c}[{k}]"),)) for k in range(norm.slots[last])]
    return replace(norm, binned=True).finish(xp, (*_seen(norm, last, group), final))


@lru_cache(maxsize=8)
def row() -> str:
    """The kernel that puts numbers, by value or from the device, into one row."""
    read = "if (kind == {0}) {{ out[i] = widen(((const {1}*)p)[k]); continue; }}"
    cases = "\n        ".join(read.format(i, KINDS[name].storage) for i, name in enumerate(REAL, start=1))
    return _HEAD + text.ROW % {"entries": text.ENTRIES, "cases": cases}


@lru_cache(maxsize=256)
def scale(kinds: tuple[str, ...], grouped: int) -> str:
    """The kernel that writes `leaf * shift * factor * shift`; a complex leaf is twice as many real numbers to it.

    `grouped`: by the factors of the groups that the table tells; else all by one.
    """
    group = {ONE: "0", WHOLE: "t.group[low]", KEPT: text.IN_GROUP}[grouped]
    factor = text.FACTOR % {"group": group}
    run = "visit<true>((const {0}*)t.from[low] + skipped, "
    run += f"(base ? ({{0}}*)(base + t.to[low] * {ALIGNMENT}ull) : ({{0}}*)t.from[low]) + skipped, n, "
    run += f"[&]({{0}}& x, unsigned i) {{{{ {factor if grouped == KEPT else ''}"
    run += "if (!keep) narrow(factor == 0 ? 0.0 : widen(x) * shift * factor * shift, x); }});"
    before = {ONE: "", WHOLE: factor + text.UNCHANGED.format(leave="continue"), KEPT: text.PHASE}[grouped]
    once = factor + text.UNCHANGED.format(leave="return") if grouped == ONE else ""
    return _HEAD + _table(grouped) + text.SCALE % {"once": once, "chunks": _chunks(before + _choice(kinds, run))}


@lru_cache(maxsize=256)
def weighted(kinds: tuple[str, ...]) -> str:
    """The kernel that adds up runs, each times a factor, in float32 or float64."""
    run = "weigh((const {0}*)t.from[low], ({2}*)(base + t.to[low] * "
    run += f"{ALIGNMENT}ull), skipped, n, t.inner[low], t.length[low], factors, shifts);"
    each = " else ".join(
        _choice((kind,), run.replace("{2}", "Double" if kind == "float64" else "Single")) for kind in kinds
    )
    least = {"single": xp.number(2.0**-126).form, "double": xp.number(2.0**-1022).form}
    return _HEAD + _table(KEPT) + text.WEIGHTED % {**least, "chunks": _chunks(each)}

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
from gradclip._backends.cupy.text import KEPT, LEAVES, ONE, WHOLE
from gradclip._backends.cupy.tiles import AREA, TILES
from gradclip._decide import Bounds, decide
from gradclip._norms import Norm, Seen, SumNorm, Terms, identity
from gradclip._parts import Parts, longest_of
from gradclip._scaled import RANGES, Scaled, quotient
from gradclip._types import Namespace


class Census(Norm):
    """How many elements are NaN, and how many infinite: passed off as a norm, it is counted as fast as one."""

    slots = (2,)

    def terms(self, xp: Namespace, parts: Parts, seen: Seen) -> Terms:
        longest = longest_of(xp, parts)  # NaN where one part is NaN
        one, zero = xp.ones_like(longest), xp.zeros_like(longest)
        return xp.where(xp.isnan(longest), one, zero), xp.where(xp.isinf(longest), one, zero)


#: The sums of a few elements that are safe, by their precision: what is lost to underflow below the first number is too
#: little to see in a sum that is above it; and doubles that are in the middle bin have room for 2**48 of them.
_SAFE = {"float": (2.0**-96, RANGES["float32"].largest), "double": (2.0**-1002, RANGES["float64"].huge_sum)}
#: Factors that are quick: so far from the ends of float32 that both of their parts are normal numbers.
_QUICK = (2.0**-64, 2.0**64)

_HEAD = NUMBERS % {"threads": text.THREADS}


def _table(grouped: int) -> str:
    sizes = {"leaves": LEAVES[grouped], "kinds": len(KINDS), "bytes": TABLE[grouped].itemsize}
    return text.TABLE % {**sizes, "group": text.GROUP % sizes if grouped else ""} + text.VISIT


def _area() -> str:
    return text.VISIT + AREA % {"leaves": LEAVES[KEPT], "kinds": len(KINDS), "bytes": TILES.itemsize}


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
def measure(norm: Norm, step: int, kinds: tuple[str, ...], quick: bool = False) -> str:
    """The kernel of one pass of a norm over leaves of these kinds: it writes partials as columns.

    `quick`: a sum may be as exact as float32, not double: see `sums.CONTRIBUTE`.
    """
    run = (
        "const unsigned n = " + text.LENGTH + "; gather_{1}((const {0}*)source, n, threadIdx.x ? 0.0 : n, s, c, peak, "
    )
    run += "seen + t.to[low] % groups, groups);"
    flush = sums.FLUSH % {**_joining(norm, step), "choice": _choice(kinds, run), "peak": _peak(norm, step)}
    body = {"gather": _gathers(norm, step, kinds, quick), "chunks": _chunks(flush)}
    return _HEAD + _table(ONE) + _sums(norm, step) + sums.MEASURE % {**_joining(norm, step), **body}


@lru_cache(maxsize=256)
def spread(norm: Norm, step: int, kinds: tuple[str, ...], quick: bool = False) -> str:
    """The same over leaves of which an axis is kept."""
    run = "gather_{1}((const {0}*)t.from[low] + area.skipped, area, n, s, c, peak, seen + key % groups, groups);"
    body = {
        "gather": _gathers(norm, step, kinds, quick),
        "find": text.FIND % {"piece": "tile"},
        "peak": _peak(norm, step),
    }
    body |= {"choice": _choice(kinds, run)}
    return _HEAD + _area() + _sums(norm, step) + sums.SPREAD % {**_joining(norm, step), **body}


def _sums(norm: Norm, step: int) -> str:
    return sums.JOINING % _joining(norm, step)


def _gathers(norm: Norm, step: int, kinds: tuple[str, ...], quick: bool) -> str:
    """For each kind a function that adds the elements of one chunk, or of one tile, to a partial."""
    ways = {kind: _way(norm, step, kind, quick) for kind in kinds}
    before = _contribute(norm) if isinstance(norm, SumNorm) and not {"quick", "bins"}.isdisjoint(ways.values()) else ""
    before += sums.HIGHEST if "max" in ways.values() else ""
    return before + "".join(_gather(norm, step, kind, way) for kind, way in ways.items())


def _way(norm: Norm, step: int, kind: str, quick: bool) -> str:
    """How: a few numbers at a time, the largest magnitude first, or each element by the norm's formulas in double."""
    names, wide = _parts(kind), KINDS[kind].component == "float64"
    if isinstance(norm, SumNorm) and len(norm.apart(names)) == len(names) and (wide or quick):
        return "bins" if wide else "quick"
    if norm.ops[step] == "max" and len(names) == 1:
        return "max"
    return "plain" if isinstance(norm, SumNorm) else "each"


def _parts(kind: str) -> tuple[Expression, ...]:
    return tuple(map(Expression, ("re",) if KINDS[kind].component == kind else ("re", "im")))


def _contribute(norm: SumNorm) -> str:
    printed, parts = Printed("x", real="R"), (Expression("x"),)
    out = printed.name(norm.term(xp, parts))
    term = "\n    ".join([*printed.each, f"return {out};"])
    step = RANGES["float32"].step
    shown = {"term": term, "up": xp.number(step**norm.power).form, "down": xp.number(step**-norm.power).form}
    for real, dtype, end in (("float", "float32", "f"), ("double", "float64", "")):
        numbers = zip(("least", "most", "step"), (*_SAFE[real], RANGES[dtype].step), strict=True)
        shown |= {f"{name}_{real}": xp.number(x).form + end for name, x in numbers}
    return sums.CONTRIBUTE % shown


def _peak(norm: Norm, step: int) -> str:
    """What the largest magnitude of real elements contributes, once for all of them."""
    if norm.ops[step] != "max":
        return ""
    printed = Printed()
    terms: tuple[Any, ...] = norm.terms(xp, (Expression("peak"),), ())
    ends = [f"merge(s[{k}], c[{k}], {printed.name(term)}, 0.0);" for k, term in enumerate(terms)]
    return "\n        ".join([*printed.once, *ends])


def _gather(norm: Norm, step: int, kind: str, way: str) -> str:
    storage, parts = KINDS[kind].storage, _parts(kind)
    # Passes after the first see what other leaves, or other shards, have measured: numbers that may be wide.
    used = replace(norm, binned=KINDS[kind].component == "float64" or step > 0)
    terms = used.terms(xp, parts, _seen(norm, step, ""))
    assert len(terms) == norm.slots[step]
    printed = Printed(*(part.form for part in parts))
    each = {k: term for k, term in enumerate(terms) if isinstance(term, Expression)}
    alike = {k: term for k, term in enumerate(terms) if k not in each and term}
    lines = [f"merge(s[{k}], c[{k}], {xp.number(term).form} * elements, 0.0);" for k, term in alike.items()]
    if way in ("quick", "bins"):
        lines += ["each<4>(p, n, [&](const auto& x) { contribute(x, s, c); });"]
    elif way == "max":
        lines += ["peak = larger(peak, highest(p, n));"]
    else:
        names = ("",) if len(parts) == 1 else (".re", ".im")
        read = [f"const double {part.form} = widen(x.of[j]{name});" for part, name in zip(parts, names, strict=True)]
        join = "s[{0}] += {1};" if way == "plain" else "merge(s[{0}], c[{0}], {1}, 0.0);"
        ends = [join.format(k, printed.name(term)) for k, term in each.items()]
        batch = 4 if way == "plain" else 0  # a long formula is there once
        loop = [f"each<{batch}>(p, n, [&](const auto& x) {{", "#pragma unroll"]
        loop += ["for (unsigned j = 0; j < sizeof(x) / sizeof(*p); j++) {"]
        lines += [*printed.once, *loop, *read, *printed.each, *ends, "}});"]
    inside = "\n    ".join(lines)
    return f"""
template <class N> __device__ __forceinline__ void gather_{kind}(
    const {storage}* p, const N& n, double elements, double* s, double* c, double& peak, const double* seen,
    unsigned groups
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
    group = "t.group[low]" if grouped else "0"
    run = "scale((const {0}*)source, ({0}*)(output + skipped), " + text.LENGTH + ", factor);"
    each = [text.OUTPUT, text.GROUP_FACTOR.format(group=group), _choice(kinds, run)]
    return _HEAD + _table(grouped) + _factor() + text.SCALE % {"chunks": _chunks("\n        ".join(each))}


@lru_cache(maxsize=256)
def scale_spread(kinds: tuple[str, ...]) -> str:
    """The same for leaves of which an axis is kept."""
    run = "scale((const {0}*)t.from[low] + area.skipped, ({0}*)output + area.skipped, area, factor);"
    factor = text.GROUP_FACTOR.format(group="t.group[low] + area.group")
    body = {"find": text.FIND % {"piece": "tile"}, "output": text.OUTPUT, "factor": factor}
    return _HEAD + _area() + _factor() + text.SCALE_SPREAD % {**body, "choice": _choice(kinds, run)}


def _factor() -> str:
    up = 2.0**100
    numbers = {"up": up, "down": 1 / up, "normal": 2.0**-126 * up}
    numbers |= {"least": _QUICK[0], "most": _QUICK[1]}
    return text.FACTOR % {name: xp.number(x).form for name, x in numbers.items()}


@lru_cache(maxsize=256)
def clamp(kinds: tuple[str, ...]) -> str:
    """The kernel that limits every element: `Bounds` of all leaves, or one for each."""
    names = ("lower", "upper")
    bounds = [f"const double {name} = {text.READ.format(name).replace('[g *', '[t.group[low] *')};" for name in names]
    run = "clamp((const {0}*)source, ({0}*)(output + skipped), " + text.LENGTH + ", lower, upper);"
    chunks = _chunks("\n        ".join([text.OUTPUT, *bounds, _choice(kinds, run)]))
    parameters = ", ".join(text.BOUND.format(name) for name in names)
    return _HEAD + _table(WHOLE) + text.CLAMP % {"parameters": parameters, "chunks": chunks}


@lru_cache(maxsize=256)
def weighted(kinds: tuple[str, ...]) -> str:
    """The kernel that adds up runs, each times a factor, in float32 or float64."""
    run = "weigh((const {0}*)t.from[low], ({2}*)output, at, t.inner[low], t.length[low], "
    run += "factors + t.group[low], shifts ? shifts + t.group[low] : shifts);"
    each = " else ".join(
        _choice((kind,), run.replace("{2}", "Double" if kind == "float64" else "Single")) for kind in kinds
    )
    least = {"single": xp.number(2.0**-126).form, "double": xp.number(2.0**-1022).form}
    body = {"find": text.FIND % {"piece": "tile"}, "choice": f"{text.OUTPUT}\n        {each}"}
    return _HEAD + _area() + text.WEIGHTED % {**least, **body}

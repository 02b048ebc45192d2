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

from gradclip._backends import expressions as xp
from gradclip._backends.cupy import changing, gathers, sums, text
from gradclip._backends.cupy.numbers import KINDS, NUMBERS, REAL
from gradclip._backends.cupy.table import TABLE
from gradclip._backends.cupy.text import KEPT, LEAVES, ONE, WHOLE
from gradclip._backends.cupy.tiles import AREA, TILES
from gradclip._backends.expressions import Expression, Printed
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


def _resident(kinds: tuple[str, ...]) -> int:
    """Blocks that an SM is to hold: more hide more of what memory takes, but have less registers for wide numbers."""
    return 3 if any(KINDS[kind].component == "float64" for kind in kinds) else 4


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
    run = f"const unsigned n = {text.LENGTH}; "
    run += "gather_{1}((const {0}*)source, n, threadIdx.x ? 0.0 : n, s, c, peak, seen + t.to[low] % groups, groups);"
    joining, gather = _joining(norm, step), gathers.functions(norm, step, kinds, quick)
    flush = sums.FLUSH % {**joining, "choice": _choice(kinds, run), "peak": gathers.peak(norm, step)}
    body = sums.MEASURE % {**joining, "resident": _resident(kinds), "gather": gather, "chunks": _chunks(flush)}
    return _HEAD + _table(ONE) + sums.JOINING % joining + body


@lru_cache(maxsize=256)
def spread(norm: Norm, step: int, kinds: tuple[str, ...], quick: bool = False) -> str:
    """The same over leaves of which an axis is kept."""
    run = "gather_{1}((const {0}*)t.from[low] + area.skipped, area, n, s, c, peak, seen + key % groups, groups);"
    joining, gather = _joining(norm, step), gathers.functions(norm, step, kinds, quick)
    body: dict[str, Any] = {"gather": gather, "find": text.FIND % {"piece": "tile"}, "peak": gathers.peak(norm, step)}
    body |= {"choice": _choice(kinds, run), "resident": _resident(kinds)}
    return _HEAD + _area() + sums.JOINING % joining + sums.SPREAD % {**joining, **body}


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
    unless norms are given, the columns, the flags of all shards, the partial of the pass before, whether bounds are
    relative to parameters, whose columns follow (what is not is relative to parameters of norm 0), and whether norms
    are all that is asked for.
    """
    body, head, join = Printed(), "", ""
    names = ["max_norm", "divide_by", "unit", *(["norm"] if norm is None else [])]
    parameters = [text.BOUND.format(name) for name in names]
    norms = params = None
    if norm is not None:
        last = len(norm.ops) - 1
        joining = _joining(norm, last)
        parameters += [sums.COLUMNS, "const double* widths", "const double* seen", "bool relative", "bool measures"]
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
    denominator = other.denominator
    if norms is not None:
        measures = Expression("measures", dtype="bool")
        numerator = decide(xp, norms, Bounds(), wide, "propagate").numerator.where(xp, measures, numerator)
        denominator = Scaled(xp.number(1.0), None).where(xp, measures, denominator)
    factors = quotient(xp, numerator, denominator)
    shift = xp.number(1.0) if factors.shift is None else factors.shift
    shown = {name: body.name(getattr(other, name)) for name in ("norm", "finite", "joined_finite")}
    shown |= {"factor": body.name(factors.factor), "shift": body.name(shift)}
    fixed = {"turns": text.TURNS, "parameters": ", ".join(parameters), "join": join}
    return _HEAD + head + text.SETTLE % {**fixed, **shown, "body": "\n    ".join(body.once)}


def _finished(norm: Norm, s: str, c: str, group: str) -> Scaled:
    """The norm of what has been joined in the arrays `s` and `c`."""
    last = len(norm.ops) - 1
    final = [Expression(f"whole({s}[{k}], {{}})", (Expression(f"{c}[{k}]"),)) for k in range(norm.slots[last])]
    return replace(norm, binned=True).finish(xp, (*gathers.seen(norm, last, group), final))


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
    each = [changing.OUTPUT, changing.GROUP_FACTOR.format(group=group), _choice(kinds, run)]
    return _HEAD + _table(grouped) + _factor() + changing.SCALE % {"chunks": _chunks("\n        ".join(each))}


@lru_cache(maxsize=256)
def scale_spread(kinds: tuple[str, ...]) -> str:
    """The same for leaves of which an axis is kept."""
    run = "scale((const {0}*)t.from[low] + area.skipped, ({0}*)output + area.skipped, area, factor);"
    factor = changing.GROUP_FACTOR.format(group="t.group[low] + area.group")
    body = {"find": text.FIND % {"piece": "tile"}, "output": changing.OUTPUT, "factor": factor}
    return _HEAD + _area() + _factor() + changing.SCALE_SPREAD % {**body, "choice": _choice(kinds, run)}


def _factor() -> str:
    up = 2.0**100
    numbers = {"up": up, "down": 1 / up, "normal": 2.0**-126 * up}
    numbers |= {"least": _QUICK[0], "most": _QUICK[1]}
    return changing.FACTOR % {name: xp.number(x).form for name, x in numbers.items()}


@lru_cache(maxsize=256)
def clamp(kinds: tuple[str, ...]) -> str:
    """The kernel that limits every element: `Bounds` of all leaves, or one for each."""
    names = ("lower", "upper")
    bounds = [f"const double {name} = {text.READ.format(name).replace('[g *', '[t.group[low] *')};" for name in names]
    run = "clamp((const {0}*)source, ({0}*)(output + skipped), " + text.LENGTH + ", lower, upper);"
    chunks = _chunks("\n        ".join([changing.OUTPUT, *bounds, _choice(kinds, run)]))
    parameters = ", ".join(text.BOUND.format(name) for name in names)
    return _HEAD + _table(WHOLE) + changing.CLAMP % {"parameters": parameters, "chunks": chunks}


@lru_cache(maxsize=256)
def weighted(kinds: tuple[str, ...]) -> str:
    """The kernel that adds up runs, each times a factor, in float32 or float64."""
    run = "weigh((const {0}*)t.from[low], ({2}*)output, at, t.inner[low], t.length[low], "
    run += "factors + t.group[low], shifts ? shifts + t.group[low] : shifts);"
    each = " else ".join(
        _choice((kind,), run.replace("{2}", "Double" if kind == "float64" else "Single")) for kind in kinds
    )
    least = {"single": xp.number(2.0**-126).form, "double": xp.number(2.0**-1022).form}
    body = {"find": text.FIND % {"piece": "tile"}, "choice": f"{changing.OUTPUT}\n        {each}"}
    return _HEAD + _area() + changing.WEIGHTED % {**least, **body}

"""CUDA C that adds elements to a partial, written from the formulas of a norm: a function for each kind of leaves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gradclip._backends import expressions as xp
from gradclip._backends.cupy import sums
from gradclip._backends.cupy.numbers import KINDS
from gradclip._backends.expressions import Expression, Printed
from gradclip._norms import Norm, SumNorm
from gradclip._scaled import RANGES

#: The sums of a few elements that are safe, by their precision: what is lost to underflow below the first number is too
#: little to see in a sum that is above it; and doubles that are in the middle bin have room for 2**48 of them.
SAFE = {"float": (2.0**-96, RANGES["float32"].largest), "double": (2.0**-1002, RANGES["float64"].huge_sum)}


def functions(norm: Norm, step: int, kinds: tuple[str, ...], quick: bool) -> str:
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
        numbers = zip(("least", "most", "step"), (*SAFE[real], RANGES[dtype].step), strict=True)
        shown |= {f"{name}_{real}": xp.number(x).form + end for name, x in numbers}
    return sums.CONTRIBUTE % shown


def peak(norm: Norm, step: int) -> str:
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
    terms = used.terms(xp, parts, seen(norm, step, ""))
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


def seen(norm: Norm, step: int, group: str) -> tuple[Any, ...]:
    """The joined partial of the pass before `step`, of which there is one at most: in C the array `seen`, by rows."""
    assert step < 2
    return ([Expression(f"seen[{k} * (u64)groups{group}]") for k in range(norm.slots[0])],) if step else ()

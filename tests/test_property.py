"""Hypothesis: random trees in random groups, over the whole exponent range, against exact arithmetic."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, note
from hypothesis import strategies as st

import exact
from backends import Backend, leaves, np_dtype
from exact import mpmath
from gradclip import Units
from parts import norm_at, parts_of, pieces

#: Shapes and dtypes come from a list of layouts, so that compiling libraries compile each once.
LAYOUTS = [
    [((3,), "float32")],
    [((), "float32"), ((2, 4), "float32")],
    [((40,), "float32"), ((1,), "float32"), ((0, 3), "float32")],
    [((5,), "float16"), ((4,), "float16")],
    [((3,), "float16"), ((2,), "bfloat16"), ((4,), "float32")],
    [((6,), "bfloat16")],
    [((4,), "complex64"), ((2,), "float32")],
    [((5,), "float64")],
    [((3,), "float32"), ((2, 2), "float64"), ((1,), "float16")],
    [((3,), "complex128"), ((2,), "float64")],
    [((2, 3), "float32"), ((2,), "float16"), ((2, 2, 3), "float32")],
    [((4, 2), "bfloat16"), ((4, 1, 2), "complex64")],
    [((2, 3, 2), "float64"), ((2, 4), "float32")],
]

OTHER_P = ["rms", 1.0, math.inf, 0.0, 3.0, 0.5, -math.inf, -1.0, 1000.0, 0.05]


def norm_types(xp: Backend, layout: int) -> list[Any]:
    """p = 2 for every layout, and the others; where each layout and p is compiled, a third of the others in turn."""
    others = OTHER_P[layout % 3 :: 3] if xp.compiles else OTHER_P
    return [2.0] * (len(others) // 2) + others


@st.composite
def leaf_values(draw, shape, dtype):
    """Signed numbers m * 2**e: e from a window anywhere in the dtype's range, with zeros and extremes."""
    bits, lowest = exact.FORMATS[dtype]
    top, bottom = 1 - lowest, lowest - bits + 1
    centre = draw(st.integers(bottom, top))
    width = draw(st.sampled_from([0, 3, 30, 3000]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = int(np.prod(shape)) * (2 if dtype.startswith("complex") else 1)
    exponents = np.clip(centre + rng.integers(-width, width + 1, size), bottom, top)
    values = rng.choice([-1.0, 1.0], size) * (1 + rng.random(size)) * np.exp2(exponents.astype(float) - 1)
    kind = draw(st.sampled_from(["plain", "plain", "zeros", "largest", "smallest"]))
    if kind != "plain" and size:
        special = {"zeros": 0.0, "largest": float(exact.largest(dtype)), "smallest": 2.0**bottom}[kind]
        values[rng.random(size) < 0.4] = special
    limit = float(exact.largest(dtype))
    values = np.clip(values, -limit, limit)
    if dtype.startswith("complex"):
        half = size // 2
        return (values[:half] + 1j * values[half:]).astype(dtype).reshape(shape)
    with np.errstate(over="ignore"):
        return values.astype(np_dtype(dtype)).reshape(shape)


@st.composite
def problems(draw, xp):
    """A tree, p, the groups, and for each group its bound as a multiple of its norm."""
    layouts = [i for i, layout in enumerate(LAYOUTS) if xp.has(*(dtype for _, dtype in layout))]
    layout = draw(st.sampled_from(layouts))
    tree = [draw(leaf_values(shape, dtype)) for shape, dtype in LAYOUTS[layout]]
    p = draw(st.sampled_from(norm_types(xp, layout)))
    labels = [st.sampled_from(["first", "second", None]) for _ in tree]
    if xp.compiles:  # one labelling of each layout
        labels = [st.just(label) for label, _ in zip(["second", "first", None], tree, strict=False)]
    along = ["unit", Units(0), *["example"] * (layout >= 10)]
    if xp.compiles:
        along = [along[layout % len(along)]]
    along = along if all(shape for shape, _ in LAYOUTS[layout]) else ["unit"]
    if any(len(shape) > 1 for shape, _ in LAYOUTS[layout]):
        per = draw(st.sampled_from([None, "leaf", *along, *along]) | st.tuples(*labels).map(list))
    else:
        per = draw(st.sampled_from([None, None, "leaf"]) | st.tuples(*labels).map(list))
    ratios = st.sampled_from([0.0, 0.5, 0.9999, 1.0001, 3.0, 1e-3, 1e-9, math.inf]) | st.floats(0, 2)
    return tree, p, per, [draw(ratios) for _ in tree], draw(st.booleans())


def bound_of(xp: Backend, want: Any, ratio: float, dtype: str) -> float:
    bound = float(min(want * mpmath.mpf(ratio), mpmath.mpf(2) ** 1023)) if ratio < math.inf else math.inf
    return 0.0 if xp.flushes and 0 < bound < float(exact.smallest_normal(dtype)) else bound


def check(xp: Backend, tree: list[np.ndarray], p: float, per: Any, ratios: list[float], one_bound: bool) -> None:
    """Clip each group to its own ratio of its exact norm, and compare norms and every element with exact arithmetic."""
    groups = parts_of(tree, per)
    one_bound = one_bound or per in (None, "unit", "example") or isinstance(per, Units)
    # Where subnormals may count as zero, let them be zeros for both sides.
    known = [flush(x) for x in tree] if xp.flushes else tree
    wants = {g: exact.norm(pieces(known, parts), p) for g, parts in groups.items()}
    bounds = {g: bound_of(xp, wants[g], r, exact.norm_dtype(pieces(tree, groups[g])))
              for g, r in zip(groups, ratios, strict=False)}  # fmt: skip
    if one_bound:
        bounds = dict.fromkeys(groups, min(bounds.values(), default=1.0))
    grads = [xp.array(x) for x in tree]
    before = [xp.numpy(x).tobytes() for x in grads]
    argument: Any = {g: c for (g,), c in bounds.items()} if isinstance(per, list) else list(bounds.values())
    if one_bound:
        argument = min(bounds.values(), default=1.0)
    out, norms = xp.clip_grad_norm(grads, argument, p, **({} if per is None else {"per": per}))
    note(f"p={p} per={per} bounds={bounds} exactly {[mpmath.nstr(want, 20) for want in wants.values()]}")
    note(f"in {[x.tolist() for x in tree]} out {[xp.numpy(x).tolist() for x in out]}")

    assert [xp.numpy(x).tobytes() for x in grads] == before, "an input was written to"
    for new, was in zip(out, tree, strict=True):
        assert xp.owns(new)
        assert xp.numpy(new).dtype == was.dtype
        assert new.shape == was.shape
    for i in set(range(len(tree))).difference(i for parts in groups.values() for i, _ in parts):
        assert xp.numpy(out[i]).tobytes() == tree[i].tobytes(), "left alone"
    if isinstance(per, list):
        assert {(g,) for g in norms} == set(groups)
    got, norms = [xp.numpy(x) for x in out], xp.back(norms)
    for g, parts in groups.items():
        norm = np.asarray(norm_at(norms, g))
        check_group(xp, pieces(got, parts), pieces(tree, parts), p, norm, wants[g], bounds[g])


def check_group(
    xp: Backend,
    out: list[np.ndarray],
    given_tree: list[np.ndarray],
    p: float,
    norm: np.ndarray,
    want: Any,
    bound: float,
) -> None:
    """The norm of a group and its clipped leaves, as if it were alone."""
    normal = mpmath.mpf(2) ** -126
    tree = [flush(x) for x in given_tree] if xp.flushes else given_tree
    dtype = exact.norm_dtype(tree)
    assert norm.dtype.name == dtype
    assert norm.shape == ()
    reported = float(norm)
    if xp.flushes and p == 0 and want <= reported <= exact.norm(given_tree, 0):
        want = mpmath.mpf(reported)  # subnormals may count, or not
    ulps = 4 if p in ("rms", 0, 1, 2, math.inf, -math.inf) else max(8, abs(4 / p))
    floor = exact.smallest_normal(dtype)
    if xp.flushes and want < 2 * floor:
        assert reported <= 4 * floor
    else:
        exact.check_norm(reported, want, dtype, ulps)

    factor = mpmath.mpf(1)
    slack = 2 * ulps * exact.ulp(1, dtype)
    if want and mpmath.mpf(bound) < want and not reported <= bound:
        factor = mpmath.mpf(bound) / want
    for new, old, was in zip(out, tree, given_tree, strict=True):
        if reported <= bound:
            assert new.tobytes() == was.tobytes(), "not clipped, so not a bit may change"
            continue
        name = new.dtype.name
        for got, x in zip(exact.components(new), exact.components(old), strict=True):
            goal = mpmath.mpf(x) * factor
            assert math.isfinite(got), "finite gradients stay finite"
            near_bound = abs(want - mpmath.mpf(bound)) <= slack * want and got == x
            if xp.flushes and abs(goal) < 2 * max(normal if "64" not in name or name == "complex64" else 0, floor):
                assert abs(got) <= 4 * max(normal, floor)
                continue
            off = abs(got - goal)
            allowed = 0.501 * exact.ulp(goal, name) + slack * abs(goal) + exact.ulp(goal, name) / 2
            assert off <= allowed or near_bound, f"{got!r} for {mpmath.nstr(goal, 20)}"


def flush(x: np.ndarray) -> np.ndarray:
    """Components below the smallest normal number as zeros (float16 is computed in float32: it has none)."""
    if x.dtype.name == "float16":
        return x
    floor = float(exact.smallest_normal(x.dtype.name))
    if x.dtype.kind == "c":
        re, im = x.real.copy(), x.imag.copy()
        re[np.abs(re) < floor] = 0
        im[np.abs(im) < floor] = 0
        return (re + 1j * im).astype(x.dtype)
    out = x.copy()
    out[np.abs(x) < floor] = 0
    return out


def test_random_trees_against_exact_arithmetic(xp):
    @given(problems(xp))
    def run(problem):
        check(xp, *problem)

    run()


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_the_yardstick_itself(layout):
    """exact.norm agrees with math.hypot on numbers that float64 can handle."""
    rng = np.random.default_rng(0)
    tree = [rng.standard_normal(shape).astype(dtype) for shape, dtype in layout]
    assert math.isclose(exact.norm(tree), math.hypot(*(x for leaf in leaves(tree) for x in exact.components(leaf))))

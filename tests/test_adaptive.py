"""The five rules against their papers: sequences of norms, in exact arithmetic, over the whole range of the dtypes."""

from __future__ import annotations

import copy
import dataclasses
import math
import operator
import pickle
import re
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import array_api_compat.numpy as xp
import mpmath
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import exact
import gradclip
from gradclip.adaptive import AdaGC, AutoClip, NormGrowth, Number, QuantileBound, Rule, ZClip, minimum, where
from gradclip.adaptive._rows import Rows
from gradclip.adaptive._states import refuse_other

pytestmark = pytest.mark.library("numpy")

INF, NAN = math.inf, math.nan
mpf = mpmath.mpf

#: With settings under which a dozen steps show everything.
RULES: dict[str, Rule] = {
    "autoclip": AutoClip(quantile=0.3, history=5),
    "zclip": ZClip(threshold=1.5, decay=0.9, warmup=3),
    "zclip, with a bound": ZClip(threshold=1.5, decay=0.9, warmup=3, max_norm=2.0),
    "adagc": AdaGC(factor=1.1, decay=0.9, warmup=3, max_norm=1.5),
    "normgrowth": NormGrowth(limit=1.25),
    "quantile": QuantileBound(quantile=0.4, rate=0.3, max_norm=1.5),
}

# -- the papers, in exact arithmetic --------------------------------------------------------------------------------
#
# Each takes a rule's settings and gives a function from the norms of a step (one a group) to its bounds.

Steps = Callable[[list[Any]], list[Any]]


def alone(one: Callable[[Any], Callable[[Any], Any]]) -> Callable[[Any], Steps]:
    """For a rule whose groups know nothing of each other."""

    def rule(settings: Any) -> Steps:
        groups: list[Callable[[Any], Any]] = []

        def step(norms: list[Any]) -> list[Any]:
            groups.extend(one(settings) for _ in norms[len(groups) :])
            return [group(norm) for group, norm in zip(groups, norms, strict=True)]

        return step

    return rule


@alone
def autoclip(rule: AutoClip) -> Callable[[Any], Any]:
    """arXiv:2007.14469, section 2: the percentile of the history, this norm in it."""
    seen: list[Any] = []

    def step(norm: Any) -> Any:
        seen.append(norm)
        last = sorted(seen[-rule.history :])
        position = Fraction(rule.quantile) * (len(last) - 1)
        low = math.floor(position)
        part = position - low
        if not part:
            return last[low]
        return last[low] + (last[low + 1] - last[low]) * part.numerator / part.denominator

    return step


@alone
def zclip(rule: ZClip) -> Callable[[Any], Any]:
    """arXiv:2504.02507: z-scores; "reciprocal" clipping to mean + (z_thres**2 / z) std; running mean and variance."""
    begin: list[Any] = []
    mean = variance = mpf(0)

    def step(norm: Any) -> Any:
        nonlocal mean, variance
        bound, left = mpf(INF), norm
        if len(begin) < rule.warmup:
            begin.append(norm)
            mean = mpmath.fsum(begin) / len(begin)
            variance = mpmath.fsum((x - mean) ** 2 for x in begin) / len(begin)
        else:
            deviation = mpmath.sqrt(variance)
            if norm - mean > mpf(rule.threshold) * deviation:
                score = (norm - mean) / deviation if deviation else mpf(INF)
                left = bound = mean + mpf(rule.threshold) ** 2 / score * deviation
            keep = mpf(rule.decay)
            mean = keep * mean + (1 - keep) * left
            variance = keep * variance + (1 - keep) * (left - mean) ** 2
        return min(bound, mpf(rule.max_norm))

    return step


def adagc(rule: AdaGC) -> Steps:
    """arXiv:2502.11034, algorithm 1; a group that was 0 in all of the warm-up is clipped as in the warm-up."""
    means: dict[int, Any] = {}
    steps = 0

    def step(norms: list[Any]) -> list[Any]:
        nonlocal steps
        total = mpmath.sqrt(mpmath.fsum(x**2 for x in norms))
        bounds = []
        for i, norm in enumerate(norms):
            is_early = steps < rule.warmup or i not in means
            if is_early:
                bound = norm * mpf(rule.max_norm) / total if total > rule.max_norm else mpf(INF)
            else:
                bound = mpf(rule.factor) * means[i]
            left = min(norm, bound)
            if steps < rule.warmup or i not in means:
                if left > 0:
                    means[i] = min(means.get(i, left), left)
            else:
                means[i] = mpf(rule.decay) * means[i] + (1 - mpf(rule.decay)) * left
            bounds.append(bound)
        steps += 1
        return bounds

    return step


@alone
def normgrowth(rule: NormGrowth) -> Callable[[Any], Any]:
    """arXiv:2410.01623, equation 7; a norm of 0 is not remembered."""
    last = None

    def step(norm: Any) -> Any:
        nonlocal last
        bound = mpf(INF) if last is None else mpf(rule.limit) * last
        last = min(norm, bound) if norm > 0 else last
        return bound

    return step


def quantile(rule: QuantileBound) -> Steps:
    """arXiv:1905.03871, algorithm 1 without noise: the geometric update."""
    bound = mpf(rule.max_norm)

    def step(norms: list[Any]) -> list[Any]:
        nonlocal bound
        now = bound
        assume(all(norm == now or abs(norm - now) > now * 1e-5 for norm in norms))  # or one bit decides
        share = mpf(sum(norm <= now for norm in norms)) / len(norms)
        bound *= mpmath.exp(-mpf(rule.rate) * (share - mpf(rule.quantile)))
        return [now] * len(norms)

    return step


PAPERS: dict[type, Callable[[Any], Steps]] = {
    AutoClip: autoclip,
    ZClip: zclip,
    AdaGC: adagc,
    NormGrowth: normgrowth,
    QuantileBound: quantile,
}

# -- sequences of gradients ------------------------------------------------------------------------------------------

#: Leaves of four equal elements x: of norm 2 x, which may be beyond the dtype. Not in the order of their keys.
NAMES = ("c", "a", "b")


class Way(NamedTuple):
    """How three numbers become gradients, and their groups."""

    per: Any
    grads: Callable[[Any, Any], Any]  # of three numbers, and of a function that repeats one four times
    groups: tuple[tuple[int, ...], ...]  # of the three

    def numbers(self, grads: Any) -> np.ndarray:
        """The three numbers again."""
        if isinstance(grads, dict) and set(grads) == set(NAMES):
            return np.stack([np.asarray(grads[name])[..., 0] for name in NAMES], axis=-1)
        (leaf,) = grads
        leaf = np.asarray(leaf)
        return leaf[..., 0, :] if self.per == "unit" else leaf[..., 0]


def named(row: Any, four: Any) -> Any:
    return {name: four(row[i]) for i, name in enumerate(NAMES)}


WAYS = {
    "global": Way(None, named, ((0, 1, 2),)),
    "leaf": Way("leaf", named, ((0,), (1,), (2,))),
    "labels": Way({"c": "one", "a": "two", "b": "one"}, named, ((0, 2), (1,))),
    "example": Way("example", lambda row, four: [four(row).T], ((0,), (1,), (2,))),
    "unit": Way("unit", lambda row, four: [four(row)], ((0,), (1,), (2,))),
}


def four(x: Any) -> Any:
    return np.stack([x] * 4)


def clipped_rows(rule: Rule, way: Way, rows: np.ndarray) -> tuple[np.ndarray, list[Any], Any]:
    """Step by step, in NumPy: the clipped numbers, the bounds, and the last state."""
    state = rule.init(way.grads(rows[0], four), way.per)
    out, bounds = [], []
    for row in rows:
        grads, _, bound, state = rule.clip(way.grads(row, four), state, per=way.per)
        out.append(way.numbers(grads))
        bounds.append(bound)
    return np.stack(out), bounds, state


def check_rows(rule: Rule, way: Way, rows: np.ndarray, got: np.ndarray, ulps: Callable[[int], int], tiny: Any) -> None:
    """What is left of each number: the paper's within `ulps` units in step i; the same bits where nothing is clipped.

    `tiny`: what a number may lose at the bottom of the range.
    """
    paper = PAPERS[type(rule)](rule)
    eps = mpf(float(np.finfo(rows.dtype).eps))
    for i, (row, left) in enumerate(zip(rows, got, strict=True)):
        norms = [2 * mpmath.sqrt(mpmath.fsum(mpf(float(row[j])) ** 2 for j in group)) for group in way.groups]
        error = ulps(i) * eps
        for group, norm, bound in zip(way.groups, norms, paper(norms), strict=True):
            for j in group:
                if norm * (1 + error) < bound or norm == 0:
                    assert left[j].tobytes() == row[j].tobytes(), (i, j, "clipped, and should not be")
                else:
                    want = mpf(float(row[j])) * min(mpf(1), bound / norm)
                    assert abs(mpf(float(left[j])) - want) <= want * error + tiny, (i, j, float(left[j]), want)


def one_more_each_step(i: int) -> int:
    """Units in the last place: the norm is good to 4, and in each step a state is rounded, by a unit or less."""
    return 4 + i


SORTS = ("any", "any, and zeros", "near", "ordinary", "few", "equal", "spike", "huge spike")


def rows_of(dtype: type, low: int, high: int, sort: str, seed: int, steps: int = 10) -> np.ndarray:
    """Rows of three numbers from 2**low to 2**high: of any size, nearly equal, equal, with a spike, with zeros."""
    rng = np.random.default_rng(seed)
    shape = (steps, 3)
    if sort == "few":
        return rng.choice([0.0, 0.5, 0.75, 0.75, 1.0], shape).astype(dtype)
    exponent: Any = rng.integers(low, high, shape)
    if sort in ("ordinary", "spike"):
        exponent = rng.integers(-3, 3, shape)
    elif sort in ("near", "equal", "huge spike"):
        exponent = np.full(shape, rng.integers(low, high))
    rows = np.ldexp(np.full(shape, 1.5) if sort == "equal" else rng.uniform(1, 1.99, shape), exponent).astype(dtype)
    at = rng.integers(steps)
    if sort == "any, and zeros":
        rows[rng.random(shape) < 0.4] = 0
    elif sort == "spike":
        rows[at] *= dtype(rng.choice([1.5, 10, 1000]))
    elif sort == "huge spike":
        rows[at] = np.ldexp(dtype(1.5), high - 1)
    return rows


def sequences(dtype: type, low: int, high: int) -> st.SearchStrategy[np.ndarray]:
    return st.builds(rows_of, *map(st.just, (dtype, low, high)), st.sampled_from(SORTS), st.integers(0, 2**32))


#: Each sequence is of ten steps, and calculated again in exact arithmetic: as many for all rules and ways together as
#: other tests have examples.
shared = settings(max_examples=max(10, settings().max_examples // len(RULES) // len(WAYS)))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("per", WAYS)
@pytest.mark.parametrize("name", RULES)
@shared
@given(rows=sequences(np.float64, -1060, 1024))
def test_float64(name: str, per: str, rows: np.ndarray) -> None:
    """Norms up to 6e308, and below the smallest normal number."""
    got, _, _ = clipped_rows(RULES[name], WAYS[per], rows)
    check_rows(RULES[name], WAYS[per], rows, got, one_more_each_step, mpf(2) ** -1074)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("per", ["global", "leaf"])
@pytest.mark.parametrize("name", RULES)
@shared
@given(rows=sequences(np.float32, -140, 128))
def test_float32(name: str, per: str, rows: np.ndarray) -> None:
    """NumPy has float64 to calculate with: of what is left, the factor and the product are rounded to float32."""
    got, _, _ = clipped_rows(RULES[name], WAYS[per], rows)
    check_rows(RULES[name], WAYS[per], rows, got, lambda i: 2, mpf(2) ** -149)


def read(x: Any) -> list[Any]:
    """The numbers of a field of a state, exactly."""
    m, e = np.ravel(x.mantissa), x.exponent
    step = mpf(2) ** (90 if m.dtype == np.float32 else 600)
    exponents = np.zeros(m.shape) if e is None else np.ravel(e)
    return [mpf(float(a)) * step ** int(b) for a, b in zip(m, exponents, strict=True)]


# -- AutoClip ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantile", [0.0, 0.1, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("history", [1, 2, 5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_autoclip_is_a_quantile_of_a_ring(dtype: type, history: int, quantile: float) -> None:
    """Twelve steps round it, with norms that come twice; as `numpy.quantile`, and nothing of the ring is lost."""
    rule = AutoClip(quantile, history)
    rng = np.random.default_rng(history)
    norms = rng.choice([0.0, 1.0, 2.5, 2.5, 7.0, 100.0], 12) if history == 5 else rng.uniform(0.1, 9, 12)
    norms = np.asarray(norms, np.float32).astype(np.float64)
    state = rule.init([np.zeros(2, dtype)])
    for i, norm in enumerate(norms):
        bound, state = rule.update(state, dtype(norm))
        last = norms[: i + 1][-history:]
        np.testing.assert_allclose(bound, np.quantile(last, quantile), rtol=3e-16 if dtype is np.float64 else 1e-7)
        assert (bound.dtype, bound.shape, int(state.count)) == (dtype, (), i + 1)
        assert [float(x) for x in read(state.ordered)] == sorted(last) + [INF] * (history - len(last))
        places = {n % history: norms[n] for n in range(i + 1)}
        assert [float(x) for x in read(state.recent)] == [places.get(k, 0.0) for k in range(history)]


def test_the_first_norms_are_their_own_bound() -> None:
    """And so nothing is clipped, and NumPy's arrays come back themselves."""
    rng = np.random.default_rng(1)
    for dtype in (np.float16, np.float32, np.float64):
        for rule in (AutoClip(0.3), AutoClip(1.0, 1), ZClip(), NormGrowth(), AdaGC(max_norm=INF)):
            grads = {"w": rng.standard_normal((7, 3)).astype(dtype), "b": rng.standard_normal(5).astype(dtype)}
            for per in (None, "leaf", "unit"):
                clipped, norm, bound, _ = rule.clip(grads, rule.init(grads, per), per=per)
                assert all(clipped[name] is grads[name] for name in grads)
                if isinstance(rule, AutoClip):
                    assert np.array_equal(bound if per is None else bound["w"], norm if per is None else norm["w"])


# -- beyond the dtype --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "huge", "tiny"), [(np.float64, 1.5e308, 1e-310), (np.float32, 3e38, 1e-42)])
def test_huge_and_tiny_norms_in_one_history(dtype: type, huge: float, tiny: float) -> None:
    """A norm of 6e308 (6e38) is reported as inf, and remembered as it is; then a bound between it and a tiny one."""
    rule, four = AutoClip(0.5, 3), np.ones(4, dtype)
    state = rule.init([four])
    sizes = [dtype(x) for x in (huge, tiny, huge / 4)]
    for i, size in enumerate(sizes):
        (clipped,), norm, bound, state = rule.clip([size * four], state)
        assert math.isinf(norm) == math.isinf(bound) == (i == 0)
        middle = (mpf(float(huge)) + mpf(float(size))) if i == 1 else 2 * mpf(float(size))
        want = min(mpf(1), middle / (2 * mpf(float(size)))) * mpf(float(size))
        assert abs(mpf(float(clipped[0])) - want) <= 2 * exact.ulp(want, dtype.__name__)
    assert [x / 2 for x in read(state.recent)] == [mpf(float(x)) for x in sizes]


@pytest.mark.parametrize("divisor", [1e-3, 1e-40, 1e-310, 7.0, 1e40])
def test_divide_by_comes_first(divisor: float) -> None:
    """A norm is remembered as it is after the division, however small or large the divisor."""
    for dtype in (np.float32, np.float64):
        rule = NormGrowth(2.0)
        x = dtype(3e-30 if divisor < 1 else 3e30)
        state = rule.init([np.ones(4, dtype)])
        _, _, _, state = rule.clip([np.full(4, x)], state, divide_by=divisor)
        want = 2 * mpf(float(x)) / mpf(divisor)
        assert abs(read(state.last)[0] - want) <= 2 * mpf(2) ** -52 * want


# -- what is not finite ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("name", RULES)
def test_what_is_not_finite_is_not_learned_from(name: str, bad: float) -> None:
    """That group's state stays, its count too; the others go on as if it had no gradient. Policies answer."""
    rule = RULES[name]
    rng = np.random.default_rng(0)
    rows = [{"a": rng.uniform(1, 3, 4), "b": rng.uniform(1, 3, 3)} for _ in range(6)]
    state = rule.init(rows[0], "leaf")
    for row in rows[:5]:
        state = rule.clip(row, state, per="leaf").state
    spoiled = {**rows[5], "b": np.array([1.0, bad, 2.0])}
    absent = {**rows[5], "b": np.zeros(3)}
    out = rule.clip(spoiled, state, per="leaf")
    zeros = rule.clip(spoiled, state, per="leaf", nonfinite="zero")
    want = rule.clip(absent, state, per="leaf")
    assert np.isnan(out.grads["b"]).all()
    assert not zeros.grads["b"].any()
    if not rule.pooled:
        for got in (out, zeros):
            assert got.grads["a"].tobytes() == want.grads["a"].tobytes()
            assert got.max_norm["a"].tobytes() == want.max_norm["a"].tobytes()
            for old, new, other in zip(*map(fields, (state, got.state, want.state)), strict=True):
                assert new[..., 1].tobytes() == old[..., 1].tobytes()
                assert new[..., 0].tobytes() == other[..., 0].tobytes()
    with pytest.raises(gradclip.NonFiniteError, match=r"grads\['b'\] \(float64, shape \(3,\)\)"):
        rule.clip(spoiled, state, per="leaf", nonfinite="error")
    with pytest.raises(gradclip.NonFiniteError, match=r"grads\['b'\]"):
        rule.clip_(spoiled, state, per="leaf", nonfinite="error")
    assert spoiled["a"].tobytes() == rows[5]["a"].tobytes()
    everything = rule.clip({"a": spoiled["b"], "b": spoiled["b"]}, state, per="leaf").state
    assert [x.tobytes() for x in fields(everything)] == [x.tobytes() for x in fields(state)]


def fields(state: Any) -> list[np.ndarray]:
    """The arrays of a state."""
    return [
        np.asarray(x) for field in state for x in (field if isinstance(field, tuple) else (field,)) if x is not None
    ]


def test_only_finite_examples_are_counted() -> None:
    rule = QuantileBound(quantile=0.5, rate=1.0, max_norm=1.0)
    state = rule.init([np.ones((4, 1))], "example")
    grads = [np.array([[0.5], [2.0], [NAN], [INF]])]
    clipped, norm, bound, state = rule.clip(grads, state, per="example", nonfinite="zero")
    assert clipped[0].tolist() == [[0.5], [1.0], [0.0], [0.0]]
    assert (float(bound), int(state.count), read(state.max_norm)) == (1.0, 1, [1])  # one of two: no move
    assert norm.shape == (4,)


# -- QuantileBound -----------------------------------------------------------------------------------------------------


def test_noise_is_added_to_the_number_below() -> None:
    rule = QuantileBound(quantile=0.5, rate=0.2, max_norm=2.0)
    state = rule.init([np.ones((4, 1))], "example")
    norms = np.array([1.0, 2.0, 3.0, 4.0])  # two of four are at most 2
    for noise in (0.0, 1.5, -6.0, np.float64(0.25), np.array(3.0)):
        bound, after = rule.update(state, norms, noise=noise)
        want = 2 * math.exp(-0.2 * ((2 + float(noise)) / 4 - 0.5))
        assert float(bound) == 2.0
        np.testing.assert_allclose(float(read(after.max_norm)[0]), want, rtol=1e-15)


def test_no_examples_move_nothing() -> None:
    rule = QuantileBound()
    grads = [np.ones((0, 3))]
    state = rule.init(grads, "example")
    clipped, norm, bound, after = rule.clip(grads, state, per="example")
    assert (clipped[0].shape, norm.shape, float(bound), int(after.count)) == ((0, 3), (0,), 0.1, 0)
    assert read(after.max_norm) == read(state.max_norm)


# -- the order of groups -----------------------------------------------------------------------------------------------

TREES = [
    {"w10": 1.0, "w2": 2.0, "w01": 3.0, "w1": 4.0},
    {"b": [1.0, 2.0], "a": {"z": 3.0, "c": 4.0}},
    {3: 1.0, 12: 2.0, -1: 3.0},
]


def turned(tree: Any) -> Any:
    """The same with the keys of dicts in the other order."""
    if isinstance(tree, dict):
        return {key: turned(tree[key]) for key in reversed(tree)}
    return [turned(x) for x in tree] if isinstance(tree, list) else tree


def leaves_of(tree: Any, make: Callable[[float], Any]) -> Any:
    if isinstance(tree, dict):
        return {key: leaves_of(x, make) for key, x in tree.items()}
    return [leaves_of(x, make) for x in tree] if isinstance(tree, list) else make(tree)


@pytest.mark.parametrize("per", ["leaf", "unit", lambda path, leaf: f"{float(leaf[0, 0]) % 3} of them", "labels"])
@pytest.mark.parametrize("tree", TREES)
def test_the_order_of_keys_changes_nothing(tree: Any, per: Any) -> None:
    rule = NormGrowth(2.0)
    grads = leaves_of(tree, lambda x: np.full((2, 3), x))
    labels = leaves_of(tree, lambda x: f"label{x}") if per == "labels" else per
    others = leaves_of(turned(tree), lambda x: np.full((2, 3), x))
    other_labels = leaves_of(turned(tree), lambda x: f"label{x}") if per == "labels" else per
    state = rule.clip(grads, rule.init(grads, labels), per=labels).state
    again = rule.clip(others, rule.init(others, other_labels), per=other_labels).state
    assert [x.tobytes() for x in fields(again)] == [x.tobytes() for x in fields(state)]
    bounds = rule.clip(others, state, per=other_labels).max_norm
    assert bounds == rule.clip(grads, state, per=labels).max_norm if per != "unit" else True
    norms = gradclip.norms(others, per=other_labels)
    by_update, _ = rule.update(state, norms)
    for bound, norm, same in zip(*map(flat, (bounds, norms, by_update)), strict=True):
        assert np.array_equal(bound, 2 * norm)
        assert np.array_equal(bound, same)


def flat(tree: Any) -> Iterator[Any]:
    """The leaves, dicts in the order of their keys' names."""
    if isinstance(tree, dict):
        for key in sorted(tree, key=str):
            yield from flat(tree[key])
    elif isinstance(tree, list):
        for x in tree:
            yield from flat(x)
    else:
        yield tree


def test_no_two_names_are_in_doubt() -> None:
    """`w1` and `w01` are alike to one who reads numbers."""
    names = ["norm['w1']", "norm['w01']", "norm['w10']", "norm['w2']"]
    orders = [[names[::k][i] for i in Rows(names[::k], [()] * 4)._order] for k in (1, -1)]
    assert orders[0] == orders[1] == ["norm['w01']", "norm['w1']", "norm['w2']", "norm['w10']"]


# -- forms, copies, errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", WAYS)
@pytest.mark.parametrize("name", RULES)
def test_update_clip_and_clip_in_place_agree(name: str, per: str) -> None:
    """To the bit, for norms in the range of their dtype; and nothing that was handed in is changed."""
    rule, way = RULES[name], WAYS[per]
    for dtype in (np.float32, np.float64):
        rows = rows_of(dtype, -3, 3, "spike", 5)
        state = rule.init(way.grads(rows[0], four), way.per)
        for row in rows[:7]:
            grads, before = way.grads(row, four), [x.copy() for x in fields(state)]
            mine = copy.deepcopy(grads)
            norms = gradclip.norms(grads, per=way.per)
            bound, state_by_update = rule.update(state, norms)
            norm_in_place, bound_in_place, state_in_place = rule.clip_(mine, state, per=way.per)
            clipped, norm, max_norm, after = rule.clip(grads, state, per=way.per)
            for x, y in ((norm, norms), (norm_in_place, norms), (max_norm, bound_in_place)):
                assert [a.tobytes() for a in flat(x)] == [a.tobytes() for a in flat(y)]
            for a, b, n in zip(flat(max_norm), flat(bound), flat(norms), strict=False):
                assert (a.dtype, b.dtype) == (dtype, dtype)
                assert a.shape == (() if rule.pooled else n.shape)
                np.testing.assert_allclose(a, b, rtol=float(np.finfo(dtype).eps))
            assert way.numbers(mine).tobytes() == way.numbers(clipped).tobytes()
            assert way.numbers(grads).tobytes() == row.tobytes()
            assert [x.tobytes() for x in fields(state)] == [x.tobytes() for x in before]
            for one, other in ((after, state_in_place), (after, state_by_update), (after, state)):
                kinds = [[(x.dtype, x.shape) for x in fields(s)] for s in (one, other)]
                assert kinds[0] == kinds[1]
            assert [x.tobytes() for x in fields(state_in_place)] == [x.tobytes() for x in fields(after)]
            state = after


def test_rules_are_settings_and_states_are_plain() -> None:
    for rule in RULES.values():
        with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field"):
            rule.quantile = 0.5  # type: ignore[attr-defined]
        assert hash(rule) == hash(dataclasses.replace(rule))
        assert rule == dataclasses.replace(rule)
        grads = {"a": np.ones(3), "b": np.ones(2)}
        state = rule.clip(grads, rule.init(grads, "leaf"), per="leaf").state
        for again in (pickle.loads(pickle.dumps(state)), copy.deepcopy(state)):
            assert type(again) is type(state)
            one, other = (rule.clip(grads, s, per="leaf").state for s in (state, again))
            assert [x.tobytes() for x in fields(one)] == [x.tobytes() for x in fields(other)]
        assert pickle.loads(pickle.dumps(rule)) == rule


def test_nothing_to_clip() -> None:
    for rule in RULES.values():
        for grads, per in (({}, None), ({}, "leaf"), ([None, []], "leaf"), ([None], lambda path, leaf: "x")):
            clipped, norm, _, state = rule.clip(grads, rule.init(grads, per), per=per)
            assert clipped == grads
            assert norm == (0.0 if per is None else norm)
            assert state.count.dtype == np.int32


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (
            lambda: AutoClip(quantile=1.5),
            ValueError,
            r"AutoClip\(quantile=\.\.\.\) must be a number from 0 to 1, got 1.5",
        ),
        (lambda: AutoClip(quantile=NAN), ValueError, r"quantile=\.\.\.\) must be a number from 0 to 1, got nan"),
        (
            lambda: AutoClip(quantile="a lot"),
            TypeError,
            r"must be a number from 0 to 1, known before .* 'a lot' of type str",
        ),
        (lambda: AutoClip(quantile=True), TypeError, "got True of type bool"),
        (lambda: AutoClip(history=0), ValueError, r"AutoClip\(history=\.\.\.\) must be at least 1, got 0"),
        (lambda: AutoClip(history=2.0), TypeError, r"must be a whole number, got 2.0 of type float"),
        (lambda: AutoClip(history=True), TypeError, "must be a whole number, got True of type bool"),
        (
            lambda: ZClip(threshold=0.0),
            ValueError,
            r"ZClip\(threshold=\.\.\.\) must be a number between 0 and inf, got 0.0",
        ),
        (lambda: ZClip(decay=1), ValueError, r"ZClip\(decay=\.\.\.\) must be a number between 0 and 1, got 1"),
        (lambda: ZClip(warmup=0), ValueError, r"ZClip\(warmup=\.\.\.\) must be at least 1, got 0"),
        (lambda: ZClip(max_norm=-1), ValueError, r"ZClip\(max_norm=\.\.\.\) must be a number from 0 to inf, got -1"),
        (lambda: AdaGC(factor=INF), ValueError, r"AdaGC\(factor=\.\.\.\) must be a number between 0 and inf, got inf"),
        (lambda: AdaGC(decay=0.0), ValueError, r"AdaGC\(decay=\.\.\.\) must be a number between 0 and 1, got 0.0"),
        (lambda: AdaGC(warmup=-1), ValueError, r"AdaGC\(warmup=\.\.\.\) must be at least 0, got -1"),
        (
            lambda: NormGrowth(limit=0.99),
            ValueError,
            r"NormGrowth\(limit=\.\.\.\) must be a number from 1 to inf, got 0.99",
        ),
        (lambda: NormGrowth(limit=None), TypeError, "got None of type NoneType"),
        (
            lambda: QuantileBound(rate=0),
            ValueError,
            r"QuantileBound\(rate=\.\.\.\) must be a number between 0 and inf, got 0",
        ),
        (lambda: QuantileBound(max_norm=0), ValueError, r"max_norm=\.\.\.\) must be a number between 0 and inf, got 0"),
        (lambda: QuantileBound(quantile=-0.1), ValueError, r"quantile=\.\.\.\) must be a number from 0 to 1, got -0.1"),
    ],
)
def test_bad_settings(make: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def test_bad_states_and_norms() -> None:
    rule, grads = NormGrowth(), {"a": np.ones(2), "b": np.ones(3)}
    whole, leaf = rule.init(grads), rule.init(grads, "leaf")
    advice = r"make it by rule\.init\(grads, per\), with the same per"
    with pytest.raises(ValueError, match=f"the state is for one norm, and there is 2 norms: {advice}"):
        rule.clip(grads, whole, per="leaf")
    with pytest.raises(ValueError, match=f"the state is for 2 norms, and there is one norm: {advice}"):
        rule.clip(grads, leaf)
    with pytest.raises(ValueError, match=f"the state is for 2 norms, and there is 3 norms: {advice}"):
        rule.clip_({**grads, "c": np.ones(1)}, leaf, per="leaf")
    with pytest.raises(ValueError, match=f"the state is for 2 norms, and there is one norm: {advice}"):
        rule.update(leaf, 3.0)
    of_another = (
        r"^the state {}, where that of {} has count \(\), {} \(.*: pass what init or the last step of this rule"
    )
    for other, state, said, first in (
        (ZClip(), whole, r"has count \(\), last \(\)", "mean"),
        (AutoClip(), AutoClip(history=1).init(grads), r"has count \(\), recent \(1,\), ordered \(1,\)", "recent"),
        (rule, {"count": 0}, "is a dict", "last"),
        (rule, None, "is a NoneType", "last"),
        (rule, (), "is a tuple", "last"),
    ):
        match = of_another.format(said, re.escape(repr(other)), first)
        for call in (lambda o=other, s=state: o.clip(grads, s), lambda o=other, s=state: o.update(s, 1.0)):
            with pytest.raises(TypeError, match=match):
                call()
    with pytest.raises(
        TypeError, match=r"recent \(2, 2\), .* has count \(2,\), recent \(3, 2\), ordered \(3, 2\): pass"
    ):
        AutoClip(history=3).clip(grads, AutoClip(history=2).init(grads, "leaf"), per="leaf")
    with pytest.raises(ValueError, match="nonfinite must be one of"):
        rule.clip(grads, whole, nonfinite="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="divide_by must be a positive number"):
        rule.clip(grads, whole, divide_by=0.0)
    with pytest.raises(gradclip.LeafError, match=r"grads\['a'\]"):
        rule.init({"a": np.arange(3)})
    frozen = np.ones(2)
    frozen.flags.writeable = False
    for twice in (grads["a"] * 9, grads["a"]):
        with pytest.raises(gradclip.LeafError, match=r"grads\['b'\].*read-only"):
            rule.clip_({"a": twice, "b": frozen}, whole)
    assert grads["a"].tolist() == [1.0, 1.0]


# -- a rule of one's own -----------------------------------------------------------------------------------------------


class SinceState(NamedTuple):
    count: Any
    least: Any


@dataclass(frozen=True)
class LeastSoFar(Rule):
    """At most `factor` times the smallest norm so far."""

    factor: float = 3.0

    def start(self, count: Any, zero: Number) -> SinceState:
        return SinceState(count, zero + INF)

    def step(self, state: SinceState, norm: Number) -> tuple[Number, SinceState]:
        least = minimum(state.least, norm)
        return self.factor * least, state._replace(least=least)


def test_a_rule_of_ten_lines() -> None:
    """For one norm, and one a leaf; for norms beyond their dtype, too. Of no settings, and of no methods."""
    rule = LeastSoFar()
    for size in (1.0, 1e300, 1.5e308, 1e-300):
        state = rule.init([np.zeros(4)])
        for scale in (1.0, 0.5, 1.0, 0.25, 1.0):
            (clipped,), _, _, state = rule.clip([np.full(4, size * scale)], state)
        np.testing.assert_allclose(clipped, np.full(4, size * 0.75), rtol=1e-15)
    grads = {"a": np.full(4, 10.0), "b": np.ones(4)}
    state = rule.clip({"a": np.ones(4), "b": np.ones(4)}, rule.init(grads, "leaf"), per="leaf").state
    clipped = rule.clip(grads, state, per="leaf").grads
    assert (clipped["a"].tolist(), clipped["b"].tolist()) == ([3.0] * 4, [1.0] * 4)
    with pytest.raises(NotImplementedError, match=r"Rule must define start\(count, zero\)"):
        Rule().init(grads)

    class Unfinished(Rule):
        start = LeastSoFar.start  # type: ignore[assignment]

    with pytest.raises(NotImplementedError, match=r"Unfinished must define step\(state, norm\)"):
        Unfinished().update(Unfinished().init([np.zeros(4)]), np.array(1.0))


class ScaleState(NamedTuple):
    count: Any
    scale: Any


@dataclass
class TimesTwoAndMore(Rule):
    """Neither frozen nor hashable, with a field that starts as a Python number."""

    factor: float = 2.0

    def start(self, count: Any, zero: Number) -> ScaleState:
        return ScaleState(count, 1.0)

    def step(self, state: Any, norm: Number) -> tuple[Number, Any]:
        return norm * state.scale, state._replace(scale=self.factor * state.scale)


def test_a_rule_that_is_not_frozen() -> None:
    rule, state = TimesTwoAndMore(), TimesTwoAndMore().init([np.ones(4)])
    bounds = []
    for _ in range(3):
        _, _, bound, state = rule.clip([np.ones(4)], state)
        bounds.append(float(bound))
    assert bounds == [2.0, 4.0, 8.0]


def test_to_know_a_state_takes_no_memory() -> None:
    rule = AutoClip(history=1000)
    state = rule.init([np.ones((2, 500))], "unit")  # 8 MB
    tracemalloc.start()
    try:
        refuse_other(rule, state)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


# -- Number ------------------------------------------------------------------------------------------------------------

#: Numbers m * 2**e, far beyond either dtype, as far as products of four norms go.
parts = st.tuples(st.floats(-2, 2, width=32).filter(lambda m: m == 0 or abs(m) > 1e-3), st.integers(-250, 250))


def number_of(m: float, e: int, dtype: type) -> tuple[Number, Any]:
    """The same as a `Number` and as an exact one: e at 1/250 of a step beyond 2**(3 steps)."""
    bits = 90 if dtype is np.float32 else 600
    e = e * (bits // 90) if abs(e) < 240 else e
    step = round(e / bits)
    number = Number(xp, np.asarray(dtype(m)), np.asarray(dtype(0)))._ended()
    scale = Number(xp, np.asarray(dtype(math.ldexp(1.0, e - step * bits))), np.asarray(dtype(step)))
    return number * scale, mpf(m) * mpf(2) ** e


def value_of(x: Number) -> Any:
    if not np.isfinite(x.mantissa):
        return mpf(float(x.mantissa))
    return read(x)[0]


OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(one=parts, other=parts)
def test_numbers(dtype: type, one: tuple[float, int], other: tuple[float, int]) -> None:
    """Each operation within one unit in the last place, each comparison right."""
    (x, a), (y, b) = number_of(*one, dtype), number_of(*other, dtype)
    eps = mpf(float(np.finfo(dtype).eps))
    assert value_of(x) == a
    for name, operate in OPERATIONS.items():
        if name == "/" and b == 0:
            continue
        got, want = value_of(operate(x, y)), operate(a, b)
        assert abs(got - want) <= eps * abs(want), name
        size = abs(operate(x, y).mantissa)  # ready for the next one
        step = 2.0 ** (90 if dtype is np.float32 else 600)
        assert size == 0 or step**-0.5 <= size < step**0.5
    for compare in (operator.lt, operator.le, operator.gt, operator.ge):
        assert bool(compare(x, y)) is bool(compare(a, b)), compare
        assert bool(compare(x, x)) is bool(compare(a, a))
    assert value_of(minimum(x, y)) == min(a, b)
    assert value_of(where(np.asarray(True), x, y)) == a
    root = value_of((x * x).sqrt())
    assert abs(root - abs(a)) <= 2 * eps * abs(a)
    both = Number(xp, np.stack([x.mantissa, y.mantissa]), np.stack([x.exponent, y.exponent])).sum()
    assert both.mantissa.shape == (1,)
    assert abs(read(both)[0] - (a + b)) <= eps * abs(a + b)
    for c in (3, 0.25, -1e30, 0.0):
        for got, want in ((x * c, a * mpf(c)), (c * x, a * mpf(c)), (x + c, a + mpf(c)), (c - x, mpf(c) - a)):
            assert abs(value_of(got) - want) <= 2 * eps * (abs(a) + abs(mpf(c)) if want != a * mpf(c) else abs(want))
        assert bool(x < c) is bool(a < mpf(c))
        assert bool(x >= c) is bool(a >= mpf(c))


@pytest.mark.parametrize("wide", [True, False])
def test_numbers_that_are_no_size(wide: bool) -> None:
    """0 and inf are below and above all others, equal to themselves; and no comparison warns."""
    zero, huge, infinite, nothing = (Number.of(xp, np.asarray(x), wide) for x in (0.0, 1.5e308, INF, NAN))
    assert bool(zero < huge)
    assert bool(huge < infinite)
    assert not bool(infinite < infinite)
    assert bool(infinite >= infinite)
    assert not any(bool(f(nothing, huge)) for f in (operator.lt, operator.le, operator.gt, operator.ge))
    assert [bool(x.isfinite()) for x in (zero, huge, infinite, nothing)] == [True, True, False, False]
    assert float((huge + infinite).value()) == float((infinite * huge).value()) == INF
    assert float((-infinite).value()) == -INF
    assert float((huge * zero).value()) == 0.0
    assert not bool(zero > 0)
    assert bool(zero >= 0.0)
    assert float((zero.sqrt()).value()) == 0.0
    assert float(infinite.sqrt().value()) == INF
    assert float((huge / INF).value()) == 0.0
    assert float((1 / huge).value()) == 1 / 1.5e308

"""The family of clips on every backend: units, examples, root mean squares, AGC, the sum of clipped examples."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import array_api_compat
import numpy as np
import pytest

import exact
import gradclip
from backends import Backend, leaves, np_dtype
from exact import mpmath
from gradclip import Units
from parts import norm_at, norm_shape, parts_of, pieces

NAN, INF = math.nan, math.inf

UNITS = [
    np.float32([[3, -4, 0], [0.5, 0.25, 1]]),
    np.float32([[[1, 2], [3, 4], [0, 0]], [[-8, 0.5], [12, 0], [0, 0]]]),
    np.float32([3, 4]),
    np.float32(-7),
]
EXAMPLES = [
    np.float32([[[3, -4], [0.5, 0.25]], [[1, 2], [-8, 0]], [[0, 0], [0, 0]]]),
    np.float32([[12, 0, 5], [0.25, 1, 1], [0, 0, 0]]),
    np.float32([1, -2, 0]),
]

#: Each way to group, with a tree for it.
WAYS: dict[str, tuple[Any, list[np.ndarray]]] = {
    "last": ("unit", UNITS),
    "first": (Units(0), UNITS),
    "second": (Units(1), UNITS),
    "second to last": (Units(-2), UNITS),
    "example": ("example", EXAMPLES),
}
each_way = pytest.mark.parametrize("way", WAYS)
POLICIES = ("propagate", "zero")


def check(
    xp: Backend, tree: list[np.ndarray], out: Any, per: Any, bounds: Any, p: Any = 2.0, divided: float = 1
) -> None:
    """Every norm and every element of finite gradients against exact arithmetic, group by group.

    `bounds`: one, or a dict by group. `divided`: what `divide_by` was.
    """
    norms, got = xp.back(out.norm), [xp.numpy(x) for x in out.grads]
    for x, new, mine in zip(tree, got, out.grads, strict=True):
        assert xp.owns(mine)
        assert (new.dtype, new.shape) == (x.dtype, x.shape)
    if per != "example":
        for i, x in enumerate(tree):
            assert np.shape(norms[i]) == norm_shape(x, per)
    for key, parts in parts_of(tree, per).items():
        bound = bounds[key] if isinstance(bounds, dict) else bounds
        before = pieces(tree, parts)
        want, norm = exact.norm(before, p) / divided, norm_at(norms, key)
        assert norm.dtype == exact.norm_dtype(before if per != "example" else tree)
        exact.check_norm(norm, want, norm.dtype.name, 4 if p in ("rms", 0, 1, 2, INF) else 8)
        clips = float(norm) > bound
        factor = mpmath.mpf(bound) / want / divided if clips else 1 / mpmath.mpf(divided)
        for new, x in zip(pieces(got, parts), before, strict=True):
            if not clips and divided == 1:
                assert new.tobytes() == x.tobytes()
            for a, b in zip(exact.components(new), exact.components(x), strict=True):
                goal = mpmath.mpf(b) * factor
                if xp.flushes and abs(goal) < 2 * exact.smallest_normal("float32"):
                    assert abs(a) <= 4 * exact.smallest_normal("float32")
                    continue
                assert abs(a - goal) <= 8 * exact.ulp(goal, new.dtype.name), (key, a, goal)


@each_way
@pytest.mark.parametrize("p", [2.0, "rms", 1.0, INF, 3.0])
def test_each_group_against_exact_arithmetic(xp: Backend, way: str, p: Any) -> None:
    per, tree = WAYS[way]
    bound = 2.25 if p == "rms" else 6.5
    grads = xp.tree(tree)
    before = xp.back(grads)
    out = xp.clip_grad_norm(grads, bound, p, per=per)
    check(xp, tree, out, per, bound, p)
    np.testing.assert_equal(xp.back(grads), before)
    np.testing.assert_equal(xp.back(xp.norms(grads, p, per=per)), xp.back(out.norm))


@each_way
@pytest.mark.parametrize("extreme", [1e30, 3e38, 1e-30])
def test_extremes_in_one_group(xp: Backend, way: str, extreme: float) -> None:
    per, tree = WAYS[way]
    tree = [x.copy() for x in tree]
    tree[0][0, 1] = extreme
    check(xp, tree, xp.clip_grad_norm(xp.tree(tree), 0.75, per=per), per, 0.75)


@each_way
@pytest.mark.parametrize("nonfinite", POLICIES)
@pytest.mark.parametrize("bad", [NAN, -INF])
def test_a_bad_element_spoils_its_group_alone(xp: Backend, way: str, bad: float, nonfinite: Any) -> None:
    per, tree = WAYS[way]
    spoiled = [x.copy() for x in tree]
    spot = (1, 0, 1)[: spoiled[0].ndim]
    spoiled[0][spot] = bad
    out = xp.clip_grad_norm(xp.tree(spoiled), 2.0, per=per, nonfinite=nonfinite)
    good = xp.clip_grad_norm(xp.tree(tree), 2.0, per=per, nonfinite=nonfinite)
    got, right = ([xp.numpy(x) for x in clipped.grads] for clipped in (out, good))
    for key, parts in parts_of(spoiled, per).items():
        norm = float(norm_at(xp.back(out.norm), key))
        if all(np.isfinite(x).all() for x in pieces(spoiled, parts)):
            assert norm == float(norm_at(xp.back(good.norm), key))
            for x, y in zip(pieces(got, parts), pieces(right, parts), strict=True):
                assert x.tobytes() == y.tobytes()
        else:
            assert not math.isfinite(norm)
            for x in pieces(got, parts):
                assert not x.any() if nonfinite == "zero" else np.isnan(x).all()


@each_way
def test_error_names_the_leaf(xp: Backend, way: str) -> None:
    if not xp.eager:
        pytest.skip("traced: checkify, in test_jax.py")
    per, tree = WAYS[way]
    tree = [x.copy() for x in tree]
    tree[1].flat[2] = NAN
    with pytest.raises(gradclip.NonFiniteError, match=r"1 of \d+ norms are not\n") as caught:
        xp.clip_grad_norm(xp.tree(tree), 1.0, per=per, nonfinite="error")
    (culprit,) = caught.value.culprits
    assert (culprit.path, culprit.nans, culprit.infs) == ("grads[1]", 1, 0)


@each_way
def test_rows_of_the_table(xp: Backend, way: str) -> None:
    per, tree = WAYS[way]
    grads = xp.tree(tree)
    for bound in (INF, 1e30):
        check(xp, tree, xp.clip_grad_norm(grads, bound, per=per), per, bound)
    assert not any(xp.numpy(x).any() for x in xp.clip_grad_norm(grads, 0.0, per=per).grads)
    check(xp, tree, xp.clip_grad_norm(grads, 1.0, per=per, divide_by=4.0), per, 1.0, divided=4.0)
    # A bound equal to the norm that was reported clips nothing.
    same = xp.clip_grad_norm(grads, xp.norms(grads, per=per), per=per)
    for new, old in zip(same.grads, tree, strict=True):
        assert xp.numpy(new).tobytes() == old.tobytes()
    known = xp.clip_grad_norm(grads, 2.5, per=per, norm=xp.norms(grads, per=per))
    check(xp, tree, known, per, 2.5)


@each_way
def test_in_place(xp: Backend, way: str) -> None:
    if not xp.in_place:
        pytest.skip(f"{xp.name} arrays cannot be written to")
    per, tree = WAYS[way]
    grads = xp.tree(tree)
    norm = gradclip.clip_grad_norm_(grads, 2.5, per=per)
    check(xp, tree, gradclip.Clipped(grads, norm), per, 2.5)


def test_a_bound_for_each_unit(xp: Backend) -> None:
    grads = xp.tree(UNITS)
    row, number = xp.array(np.float32([1, INF, 0.25])), 2.0
    out = xp.clip_grad_norm(grads, [row, number, 3.0, 0.0], per="unit")
    groups = parts_of(UNITS, "unit")
    bounds = {key: [None, 2.0, 3.0, 0.0][key[0]] for key in groups}
    bounds |= {(0, 0, k): c for k, c in enumerate([1.0, INF, 0.25])}
    check(xp, UNITS, out, "unit", bounds)
    column = xp.clip_grad_norm(grads, [xp.array(np.float32([[1], [0.5]])), INF, INF, INF], per=Units(0))
    bounds = dict.fromkeys(parts_of(UNITS, Units(0)), INF) | {(0, 0, 0): 1.0, (0, 1, 0): 0.5}
    check(xp, UNITS, column, Units(0), bounds)


def test_a_bound_for_each_example(xp: Backend) -> None:
    out = xp.clip_grad_norm(xp.tree(EXAMPLES), xp.array(np.float32([1, INF, 3])), per="example")
    check(xp, EXAMPLES, out, "example", {(0,): 1.0, (1,): INF, (2,): 3.0})


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"])
def test_every_dtype_and_layout(xp: Backend, name: str, axis: int) -> None:
    if not xp.has(name):
        pytest.skip(f"{xp.name} has no {name}")
    rng = np.random.default_rng(axis)
    values = rng.standard_normal((3, 4, 6)) + (1j * rng.standard_normal((3, 4, 6)) if "complex" in name else 0)
    wide = values.astype(np_dtype(name))
    grads = xp.array(wide)
    lib = array_api_compat.array_namespace(grads)
    layouts = [
        (grads, wide),
        (grads[:, ::2, :], wide[:, ::2, :]),
        (grads[:, :, ::2], wide[:, :, ::2]),
        (lib.permute_dims(grads, (2, 0, 1)), wide.transpose(2, 0, 1)),
        (lib.permute_dims(grads, (1, 2, 0))[::2, :, :], wide.transpose(1, 2, 0)[::2]),
    ]
    layouts = layouts[: 1 if xp.compiles else None]  # what is compiled has layouts of its own
    for mine, theirs in layouts:
        tree = [np.ascontiguousarray(theirs)]
        check(xp, tree, xp.clip_grad_norm([mine], 1.5, per=Units(axis)), Units(axis), 1.5)
    tree = [np.ascontiguousarray(x) for _, x in layouts[:3]]
    check(xp, tree, xp.clip_grad_norm([x for x, _ in layouts[:3]], 4.0, per="example"), "example", 4.0)


def test_the_global_norm_beside_the_others(xp: Backend) -> None:
    """It is the norm of the norms: no second pass over the gradients."""
    grads = xp.tree(UNITS)
    each = leaves(xp.norms(grads, per="unit"))
    exact.check_norm(xp.numpy(xp.global_norm(each)), exact.norm(UNITS), "float32", 6)


def test_rms(xp: Backend) -> None:
    assert float(
        xp.numpy(xp.global_norm(xp.tree([np.float32([3, 4]), np.zeros((0, 2), np.float32)]), "rms"))
    ) == pytest.approx(math.sqrt(12.5), rel=1e-7)
    zeros = xp.tree([np.zeros(3, np.float32)])
    out = xp.clip_grad_norm(zeros, 0.0, "rms")  # optax's clip_by_block_rms gives NaN
    assert float(out.norm) == 0
    assert not xp.numpy(out.grads[0]).any()
    huge = np.full(1000, 1e38, np.float32)
    exact.check_norm(xp.numpy(xp.global_norm(xp.tree([huge]), "rms")), exact.norm([huge], "rms"), "float32")
    assert float(xp.numpy(xp.global_norm(xp.tree([np.zeros((0,), np.float32)]), "rms"))) == 0


def test_no_examples_and_no_units(xp: Backend) -> None:
    none = xp.tree([np.zeros((0, 3), np.float32), np.zeros((0,), np.float32)])
    out = xp.clip_grad_norm(none, 1.0, per="example")
    assert xp.numpy(out.norm).shape == (0,)
    assert [x.shape for x in out.grads] == [(0, 3), (0,)]
    total = xp.clipped_sum(none, 1.0)
    assert [xp.numpy(x).tolist() for x in total.sum] == [[0, 0, 0], 0.0]
    empty = xp.tree([np.zeros((2, 0), np.float32), np.zeros((0, 2), np.float32)])
    norms = [xp.numpy(x).tolist() for x in xp.norms(empty, per="unit")]
    assert norms == [[[]], [[0.0, 0.0]]]
    assert [xp.numpy(x).tolist() for x in xp.norms(empty, per=Units(0))] == [[[0.0], [0.0]], []]
    assert xp.numpy(xp.norms(xp.tree([np.zeros((2, 0), np.float32)]), per="example")).tolist() == [0, 0]
    assert gradclip.norms([], per="unit") == []
    assert gradclip.norms({}, per="example").shape == (0,)


# -- adaptive gradient clipping ------------------------------------------------------------------------------

PARAMS = [
    np.float32([[1, 0, 1e-5], [2, 0, 0]]),
    np.float32([[[1, 1], [1, 1], [1, 1]], [[0, 1], [2, 3], [0, 0]]]),
    np.float32([0, 0]),
    np.float32(10),
]


@pytest.mark.parametrize("per", [None, "leaf", "unit", Units(0), Units(1)], ids=str)
@pytest.mark.parametrize("p", [2.0, "rms", INF])
def test_agc_against_exact_arithmetic(xp: Backend, per: Any, p: Any) -> None:
    out = xp.clip_grad_agc(xp.tree(UNITS), xp.tree(PARAMS), 0.125, p, eps=0.0625, per=per)
    bounds = {
        key: 0.125 * max(float(exact.norm(pieces(PARAMS, parts), p)), 0.0625)
        for key, parts in parts_of(UNITS, per).items()
    }
    if per is None:
        exact.check_norm(xp.numpy(out.norm), exact.norm(UNITS, p), "float32")
        return
    check(xp, UNITS, out, per, bounds, p)


def test_agc_counts_norms_of_parameters_beyond_their_dtype(xp: Backend) -> None:
    huge = np.full(1000, 3e38, np.float32)  # norm 9.5e39
    grads, params = [np.full(1000, 1e36, np.float32)], [huge]
    out = xp.clip_grad_agc(xp.tree(grads), xp.tree(params), 1e-4, per="leaf")
    want = mpmath.mpf(1e-4) * exact.norm(params) / exact.norm(grads)
    got = xp.numpy(out.grads[0])
    np.testing.assert_allclose(got, float(want) * grads[0].astype(np.float64), rtol=4e-7)


def test_agc_of_parameters_that_are_not_finite(xp: Backend) -> None:
    params = [np.float32([[NAN, 1], [1, 1]]), np.float32([INF, 1])]
    grads = [np.float32([[1, 1], [1, 1]]), np.float32([5, 5])]
    out = [xp.numpy(x) for x in xp.clip_grad_agc(xp.tree(grads), xp.tree(params), 0.5).grads]
    assert np.isnan(out[0][:, 0]).all()
    np.testing.assert_allclose(out[0][:, 1], 0.5, rtol=1e-6)
    assert out[1].tolist() == [5, 5]


def test_agc_takes_parameters_of_other_dtypes_and_leaves_out_none(xp: Backend) -> None:
    wide = "float64" if xp.has("float64") else "float16"
    grads = {"a": xp.array(np.float32([[3, 4]])), "b": None, "c": xp.array(np.float32([0.5]))}
    params = {"a": xp.array(np.array([[30, 10]], wide)), "b": xp.array(np.float32([1])), "c": xp.array(np.float32([1]))}
    out = xp.clip_grad_agc(grads, params, 0.125, per="unit")
    np.testing.assert_allclose(xp.numpy(out.grads["a"]), [[3, 1.25]], rtol=1e-6)
    assert out.grads["b"] is None
    assert out.norm["b"] is None
    assert xp.dtype_of(out.norm["a"]) == "float32"
    np.testing.assert_allclose(xp.numpy(out.grads["c"]), [0.125], rtol=1e-6)


def test_agc_of_nothing(xp: Backend) -> None:
    for per in (None, "unit", "leaf"):
        out = xp.clip_grad_agc([None], [None], per=per)
        assert out.grads == [None]
        assert out.norm == [None] if per else float(out.norm) == 0


@pytest.mark.library("torch")
def test_agc_takes_torch_parameters() -> None:
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    out = gradclip.clip_grad_agc([torch.ones(2, 2)], [weight], 0.1, per=Units(0), eps=0.01)
    np.testing.assert_allclose(out.grads[0].numpy(), np.array([[0.5, 0.5], [0.001, 0.001]]) / 2**0.5, rtol=1e-6)
    assert not out.grads[0].requires_grad


# -- the sum of clipped examples -----------------------------------------------------------------------------


def example_bounds(values: list[np.ndarray], bound: float) -> list[Any]:
    return [
        min(mpmath.mpf(1), mpmath.mpf(bound) / (exact.norm([x[b] for x in values]) or 1)) for b in range(len(values[0]))
    ]


@pytest.mark.parametrize("bound", [0.5, 6.5, 1e4, 0.0, INF, 1e-30])
def test_the_sum_against_exact_arithmetic(xp: Backend, bound: float) -> None:
    out = xp.clipped_sum(xp.tree(EXAMPLES), bound)
    np.testing.assert_equal(xp.back(out.norm), xp.back(xp.norms(xp.tree(EXAMPLES), per="example")))
    if xp.flushes and bound == 1e-30:
        bound = float(np.float32(bound))
    factors = example_bounds(EXAMPLES, bound)
    for got, x in zip(out.sum, EXAMPLES, strict=True):
        assert xp.owns(got)
        assert xp.numpy(got).dtype == np.float32
        assert got.shape == x.shape[1:]
        terms = [np.array([float(f)] * x[b].size).reshape(x[b].shape) * x[b] for b, f in enumerate(factors)]
        want, size = sum(terms), sum(abs(t) for t in terms)
        assert (np.abs(xp.numpy(got) - want) <= 4e-6 * size).all()  # lower by 2**-19, and rounded


@pytest.mark.parametrize("nonfinite", ["zero", "propagate"])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_example_adds_nothing(xp: Backend, bad: float, nonfinite: Any) -> None:
    spoiled = [x.copy() for x in EXAMPLES]
    spoiled[1][0, 1] = bad
    out = xp.clipped_sum(xp.tree(spoiled), 2.0, nonfinite=nonfinite)
    rest = xp.clipped_sum(xp.tree([x[1:] for x in EXAMPLES]), 2.0)
    for got, want in zip(out.sum, rest.sum, strict=True):
        if nonfinite == "zero":
            np.testing.assert_allclose(xp.numpy(got), xp.numpy(want), rtol=1e-6)
        else:
            assert np.isnan(xp.numpy(got)).all()
    assert [math.isfinite(x) for x in xp.numpy(out.norm)] == [False, True, True]


def test_dtypes_of_the_sum(xp: Backend) -> None:
    want = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "complex64": "complex64"}
    want |= {"float64": "float64", "complex128": "complex128"}
    for name in xp.dtypes:
        x = np.array([[3, 4], [0, 1]]).astype(np_dtype(name))
        (total,) = xp.clipped_sum([xp.array(x)], 10.0).sum
        assert xp.numpy(total).dtype.name == want[name]
        np.testing.assert_allclose(xp.numpy(total), [3, 5], rtol=1e-6)


def exceeds(leaves: list[np.ndarray], bound: float) -> bool:
    """Whether the exact 2-norm is above the bound."""
    (limit, *rest), _ = exact.integers([bound, *(x for leaf in leaves for x in exact.components(leaf))])
    return sum(n * n for n in rest) > limit * limit


@cache
def random_examples(name: str, count: int, times: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """`times` such: `count` examples, and their bounds; the same for every library, made once."""
    rng = np.random.default_rng(0)
    return [some_examples(rng, name, count) for _ in range(times)]


def some_examples(rng: np.random.Generator, name: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Examples of 7 elements anywhere in the dtype's range, and a bound for each, most of them near its norm."""
    top, lowest = float(exact.largest(name)), exact.FORMATS[name][1]
    wide = rng.choice([0, 0, 4, 30], (count, 1))
    x = rng.standard_normal((count, 7)) * np.exp2(rng.uniform(-1, 1, (count, 7)) * wide)
    x = x * np.where(rng.random((count, 1)) < 0.3, np.exp2(rng.uniform(lowest // 2, -lowest // 2, (count, 1))), 1)
    x = np.clip(x, -top, top)
    x = x + 1j * x * rng.uniform(-1, 1, (count, 7)) if "complex" in name else x
    values = x.astype(np_dtype(name))
    norms = np.array([float(exact.norm([row])) for row in values])
    near = norms * rng.choice([1, 0.999, 1 - 2**-22, 1 + 2**-23, 0.3], count)
    bounds = np.where(rng.random(count) < 0.2, rng.choice([1.0, 0.1]), near)
    return values, bounds.astype(np.float64 if name in ("float64", "complex128") else np.float32)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"])
def test_an_example_never_adds_more_than_the_bound(xp: Backend, name: str, request: Any) -> None:
    """In exact arithmetic, rounding included: alone, and among others that have columns of their own.

    Opacus and jax_privacy are above the bound for about half of such examples.
    """
    if not xp.has(name):
        pytest.skip(f"{xp.name} has no {name}")
    together = 50
    for values, bounds in random_examples(name, together, 200 if request.config.getoption("--full") else 2):
        apart = np.zeros((together, 7 * together), values.dtype)
        for b, row in enumerate(values):
            apart[b, 7 * b : 7 * b + 7] = row
        (total,) = xp.clipped_sum([xp.array(apart)], xp.array(bounds)).sum
        for part, row, bound in zip(xp.numpy(total).reshape(together, 7), values, bounds, strict=True):
            assert not exceeds([part], float(bound)), (row, bound)
        first = values[:1]
        alone = xp.clipped_sum([xp.array(first[:, :4]), xp.array(first[:, 4:])], xp.array(bounds[0])).sum
        assert not exceeds([xp.numpy(t) for t in alone], float(bounds[0])), (first, bounds[0])


@pytest.mark.library("numpy")
def test_shards_of_several_dtypes_lower_the_bound_alike() -> None:
    """A shard of float64 leaves has the factor of those that hold float32: what is joined is no better than theirs."""
    joined = gradclip.clipped_sum([np.array([[3.0, 4.0]])], 1.0, all_reduce=lambda partial, op: partial)
    alone = gradclip.clipped_sum([np.array([[3.0, 4.0]])], 1.0)
    np.testing.assert_allclose(joined.sum[0], np.array([0.6, 0.8]) * (1 - 2.0**-19), rtol=1e-14)
    np.testing.assert_allclose(alone.sum[0], np.array([0.6, 0.8]) * (1 - 2.0**-42), rtol=1e-14)


@pytest.mark.parametrize("bound", [1e-44, 3e-39, 1e-38, 2.0**-126, 2.0**-149])
def test_not_even_where_numbers_are_subnormal(xp: Backend, bound: float) -> None:
    rng = np.random.default_rng(1)
    for scale in (1e-45, 1e-40, 1e-38, 1.0, 1e38):
        x = (rng.standard_normal((1, 9)) * scale).astype(np.float32)
        (total,) = xp.clipped_sum([xp.array(x)], bound).sum
        assert not exceeds([xp.numpy(total)], bound), (x, bound)


# -- what is refused -----------------------------------------------------------------------------------------

G = {"w": np.ones((2, 3), np.float32), "b": np.ones(3, np.float32)}
W = {"w": np.ones((2, 3), np.float32), "b": np.ones(3, np.float32)}
REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "lengths": (
        lambda: gradclip.norms(G, per="example"),
        ValueError,
        r"^grads\['b'\] has 3 examples along axis 0, and grads\['w'\] has 2: .* must have the same$",
    ),
    "0-d": (
        lambda: gradclip.clipped_sum([np.ones(2), np.float32(1)], 1.0),
        ValueError,
        r"^grads\[1\] is 0-d: with per='example' axis 0",
    ),
    "axis": (
        lambda: gradclip.norms(G, per=Units(2)),
        ValueError,
        r"^grads\['w'\] has 2 dimensions, so that Units\(2\) has no axis to keep there$",
    ),
    "no axis": (lambda: Units("last"), TypeError, r"^Units takes the axis to keep, an int, got 'last' of type str$"),
    "bool": (lambda: Units(True), TypeError, r"^Units takes the axis to keep, an int, got True"),
    "word": (
        lambda: gradclip.norms(G, per="units"),
        ValueError,
        r"^per must be None, 'leaf', 'unit', 'example', .*'units'",
    ),
    "bounds that do not broadcast": (
        lambda: gradclip.clip_grad_norm(G, {"w": np.ones(2), "b": 1.0}, per="unit"),
        ValueError,
        r"^max_norm\['w'\] has shape \(2,\), which does not broadcast to that of the norms, \(1, 3\)$",
    ),
    "a bad bound among others": (
        lambda: gradclip.clip_grad_norm(G, {"w": np.array([1, -1, 1]), "b": 1.0}, per="unit"),
        ValueError,
        r"^max_norm\['w'\] must be numbers >= 0, got -1\.0 among them$",
    ),
    "a NaN among bounds": (
        lambda: gradclip.clip_grad_norm([np.ones((2, 2))], np.array([1, NAN]), per="example"),
        ValueError,
        r"^max_norm must be numbers >= 0, got nan among them$",
    ),
    "bounds of another length": (
        lambda: gradclip.clip_grad_norm([np.ones((2, 2))], np.ones(3), per="example"),
        ValueError,
        r"^max_norm has shape \(3,\), which does not broadcast to that of the norms, \(2,\)$",
    ),
    "bounds that are no numbers": (
        lambda: gradclip.clip_grad_norm([np.ones((2, 2))], np.array([True, False]), per="example"),
        TypeError,
        r"^max_norm must be numbers >= 0, got array\(\[ True, False\]\)",
    ),
    "a tree for examples": (
        lambda: gradclip.clip_grad_norm([np.ones((2, 2))], [1.0], per="example"),
        TypeError,
        r"^max_norm must be a number >= 0 or a 0-d real array, got \[1\.0\]",
    ),
    "norm_type": (
        lambda: gradclip.clipped_sum([np.ones((2, 2))], 1.0, 0.5),
        ValueError,
        r"^clipped_sum takes a norm: norm_type must be at least 1, or 'rms', got 0\.5$",
    ),
    "another word": (
        lambda: gradclip.global_norm(G, "mean"),
        TypeError,
        r"^norm_type must be a real number .* or 'rms'$",
    ),
    "params without a key": (
        lambda: gradclip.clip_grad_agc(G, {"w": W["w"]}),
        ValueError,
        r"^params does not match the gradients there: it has \['w'\], they have \['w'\], \['b'\]$",
    ),
    "params with a key more": (
        lambda: gradclip.clip_grad_agc(G, {**W, "c": W["w"]}),
        ValueError,
        r"^params does not match the gradients there",
    ),
    "params of another shape": (
        lambda: gradclip.clip_grad_agc(G, {**W, "b": np.ones(4)}),
        ValueError,
        r"^params\['b'\] is an array of shape \(4,\), and its gradient has the shape \(3,\): they must be alike$",
    ),
    "one param for all": (
        lambda: gradclip.clip_grad_agc({"a": {"x": W["b"]}}, {"a": W["b"]}),
        ValueError,
        r"^params\['a'\] stands for grads\['a'\]\['x'\], and more: params must have an array for every gradient$",
    ),
    "no param": (
        lambda: gradclip.clip_grad_agc(G, {**W, "b": None}),
        ValueError,
        r"^params\['b'\] is None, and its gradient has the shape \(3,\)",
    ),
    "no params": (
        lambda: gradclip.clip_grad_agc([np.ones(3)], None),
        ValueError,
        r"^params stands for grads\[0\], and more: params must have an array for every gradient$",
    ),
    "the class of units": (
        lambda: gradclip.norms(G, per=Units),
        ValueError,
        r"^per must be None, .* got <class 'gradclip._groups.Units'>$",
    ),
    "integer params": (
        lambda: gradclip.clip_grad_agc(G, {**W, "b": np.ones(3, int)}),
        gradclip.LeafError,
        r"^params\['b'\] is an array of dtype int64",
    ),
    "clipping": (
        lambda: gradclip.clip_grad_agc(G, W, -0.1),
        ValueError,
        r"^clipping must be a number >= 0, got -0\.1$",
    ),
    "eps": (lambda: gradclip.clip_grad_agc(G, W, eps=0.0), ValueError, r"^eps must be a positive number, got 0\.0$"),
}


@pytest.mark.library("numpy")
@pytest.mark.parametrize(("call", "error", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()
    assert all((x == 1).all() for x in (*G.values(), *W.values()))

"""`per`: each group is clipped as if it were alone. On every backend, against exact arithmetic."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import exact
import gradclip
from backends import Backend, leaves
from exact import mpmath

NAN, INF = math.nan, math.inf

#: One tree for all tests, so that a library that compiles does so once for each way to group it.
VALUES: dict[str, Any] = {
    "enc": [np.float32([3, -4]), np.float32([[0.5, 0.25], [1, 2], [-8, 0]])],
    "dec": {"b": np.float32([12]), "w": np.float32([[5, 0, -3]])},
    "none": None,
    "out": np.float32(7),
}
PATHS = ["grads['dec']['b']", "grads['dec']['w']", "grads['enc'][0]", "grads['enc'][1]", "grads['out']"]
LABELS = {"enc": "body", "dec": {"b": "head", "w": "body"}, "none": "lost", "out": None}


def by_name(path: str, leaf: Any) -> Any:
    """What LABELS says, as a function."""
    return {"grads['dec']['b']": "head", "grads['out']": None}.get(path, "body")


#: name: what is passed, and which leaves, dicts by sorted keys, make each group.
GROUPINGS: dict[str, tuple[Any, dict[Any, list[int]]]] = {
    "none": (None, {None: [0, 1, 2, 3, 4]}),
    "leaf": ("leaf", {i: [i] for i in range(5)}),
    "labels": (LABELS, {"body": [1, 2, 3], "head": [0]}),
    "function": (by_name, {"body": [1, 2, 3], "head": [0]}),
    "one label": (0, {0: [0, 1, 2, 3, 4]}),
}
each_grouping = pytest.mark.parametrize("grouping", GROUPINGS)


def changed(place: int, values: Any) -> Any:
    """VALUES with other numbers in one leaf."""
    tree = {"enc": list(VALUES["enc"]), "dec": dict(VALUES["dec"]), "none": None, "out": VALUES["out"]}
    at = [(tree["dec"], "b"), (tree["dec"], "w"), (tree["enc"], 0), (tree["enc"], 1), (tree, "out")][place]
    at[0][at[1]] = np.broadcast_to(np.asarray(values, at[0][at[1]].dtype), at[0][at[1]].shape).copy()
    return tree


def norm_of(norm: Any, key: Any) -> Any:
    """The norm of one group, out of what came back."""
    if key is None:
        return norm
    return norm[key] if isinstance(norm, dict) and key in norm else leaves(norm)[key]


def check(xp: Backend, tree: Any, out: Any, grouping: str, bounds: dict[Any, float], p: float = 2.0) -> None:
    """Norms and every element of finite gradients against exact arithmetic, each group by itself."""
    before, after = leaves(tree), leaves(out.grads)
    groups = GROUPINGS[grouping][1]
    for key, places in groups.items():
        want = exact.norm([before[i] for i in places], p)
        norm = norm_of(out.norm, key)
        assert norm.shape == ()
        assert xp.dtype_of(norm) == exact.norm_dtype([before[i] for i in places])
        exact.check_norm(xp.numpy(norm), want, xp.dtype_of(norm), 4 if p in (0, 1, 2, INF) else 8)
        clips = float(xp.numpy(norm)) > bounds[key]
        factor = mpmath.mpf(bounds[key]) / want if clips else mpmath.mpf(1)
        for i in places:
            assert xp.owns(after[i])
            new = xp.numpy(after[i])
            assert (new.dtype, new.shape) == (before[i].dtype, before[i].shape)
            if not clips:
                assert new.tobytes() == before[i].tobytes()
            for got, x in zip(exact.components(new), exact.components(before[i]), strict=True):
                goal = mpmath.mpf(x) * factor
                if xp.flushes and clips and abs(goal) < 2 * exact.smallest_normal("float32"):
                    assert abs(got) <= 4 * exact.smallest_normal("float32")  # subnormals may count as zero
                    continue
                assert abs(got - goal) <= 8 * exact.ulp(goal, new.dtype.name), (key, got, goal)
    alone = set(range(len(before))).difference(*groups.values())
    for i in alone:
        assert xp.numpy(after[i]).tobytes() == before[i].tobytes()


@pytest.mark.parametrize("p", [2.0, 1.0, INF, 3.0])
@each_grouping
def test_each_group_against_exact_arithmetic(xp: Backend, grouping: str, p: float) -> None:
    per, groups = GROUPINGS[grouping]
    grads = xp.tree(VALUES)
    before = xp.back(grads)
    out = xp.clip_grad_norm(grads, 6.5, p, per=per)
    check(xp, VALUES, out, grouping, dict.fromkeys(groups, 6.5), p)
    np.testing.assert_equal(xp.back(grads), before)
    norms = xp.norms(grads, p, per=per)
    np.testing.assert_equal(xp.back(norms), xp.back(out.norm))
    if grouping == "leaf":
        assert set(norms) == set(VALUES)
        assert norms["none"] is None
    elif grouping != "none":
        assert set(norms) == set(groups)


@pytest.mark.parametrize("extreme", [1e30, 3e38, 1e-30])
@pytest.mark.parametrize("place", [0, 3])
@each_grouping
def test_extremes_in_one_group(xp: Backend, grouping: str, place: int, extreme: float) -> None:
    per, groups = GROUPINGS[grouping]
    tree = changed(place, extreme)
    out = xp.clip_grad_norm(xp.tree(tree), 0.75, per=per)
    check(xp, tree, out, grouping, dict.fromkeys(groups, 0.75))


@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@each_grouping
def test_a_bad_element_spoils_its_group_alone(xp: Backend, grouping: str, bad: float, nonfinite: Any) -> None:
    per, groups = GROUPINGS[grouping]
    place = 1
    grads = xp.tree(changed(place, [[1, bad, 2]]))
    out = xp.clip_grad_norm(grads, 2.0, per=per, nonfinite=nonfinite)
    good = xp.clip_grad_norm(xp.tree(VALUES), 2.0, per=per, nonfinite=nonfinite)
    after, others = leaves(out.grads), leaves(good.grads)
    for key, places in groups.items():
        spoiled = place in places
        norm = float(xp.numpy(norm_of(out.norm, key)))
        assert math.isfinite(norm) != spoiled
        if not spoiled:
            assert norm == float(xp.numpy(norm_of(good.norm, key)))
        for i in places:
            new = xp.numpy(after[i])
            if not spoiled:
                assert new.tobytes() == xp.numpy(others[i]).tobytes()
            elif nonfinite == "zero":
                assert not new.any()
            else:
                assert np.isnan(new).all()


@each_grouping
def test_error_names_the_bad_leaves(xp: Backend, grouping: str) -> None:
    if not xp.eager:
        pytest.skip("traced: checkify, in test_jax.py")
    per, _ = GROUPINGS[grouping]
    tree = changed(1, [[NAN, INF, 0]])
    grads = xp.tree(tree)
    with pytest.raises(
        gradclip.NonFiniteError,
        match=r"^the gradients are not finite: (their global norm is nan|1 of \d norms are not)\n",
    ) as caught:
        xp.clip_grad_norm(grads, 1.0, per=per, nonfinite="error")
    (culprit,) = caught.value.culprits
    assert culprit == gradclip.Culprit(PATHS[1], "float32, shape (1, 3)", 1, 1)
    np.testing.assert_equal(xp.back(grads), tree)
    fine = xp.clip_grad_norm(xp.tree(VALUES), 1.0, per=per, nonfinite="error")
    check(xp, VALUES, fine, grouping, dict.fromkeys(GROUPINGS[grouping][1], 1.0))


@each_grouping
def test_rows_of_the_table(xp: Backend, grouping: str) -> None:
    per, groups = GROUPINGS[grouping]
    grads = xp.tree(VALUES)
    for bound in (INF, 1e30):
        out = xp.clip_grad_norm(grads, bound, per=per)
        for new, old in zip(leaves(out.grads), leaves(VALUES), strict=True):
            assert xp.numpy(new).tobytes() == old.tobytes()
    out = xp.clip_grad_norm(grads, 0.0, per=per)
    in_groups = {i for places in groups.values() for i in places}
    for i, new in enumerate(leaves(out.grads)):
        assert xp.numpy(new).any() == (i not in in_groups)
    halved = xp.clip_grad_norm(grads, 1.0, per=per, divide_by=2.0)
    for key, places in groups.items():
        exact.check_norm(
            xp.numpy(norm_of(halved.norm, key)), exact.norm([leaves(VALUES)[i] for i in places]) / 2, "float32"
        )
        for i in places:
            whole = exact.norm([leaves(VALUES)[j] for j in places])
            want = leaves(VALUES)[i].astype(np.float64) * min(0.5, float(1 / whole))
            np.testing.assert_allclose(xp.numpy(leaves(halved.grads)[i]), want, rtol=5e-7)


def test_a_bound_for_each_group(xp: Backend) -> None:
    grads = xp.tree(VALUES)
    bounds = {"enc": 1.0, "dec": {"b": 2.0, "w": INF}, "none": 1.0, "out": 0.0}
    out = xp.clip_grad_norm(grads, bounds, per="leaf")
    check(xp, VALUES, out, "leaf", dict(enumerate([2.0, INF, 1.0, 1.0, 0.0])))
    out = xp.clip_grad_norm(grads, {"body": 3.0, "head": 20.0}, per=LABELS)
    check(xp, VALUES, out, "labels", {"body": 3.0, "head": 20.0})
    dtype = "float32"
    out = xp.clip_grad_norm(grads, {"body": xp.array(3.0, dtype), "head": 20.0}, per=LABELS)
    check(xp, VALUES, out, "labels", {"body": 3.0, "head": 20.0})


@each_grouping
def test_norms_that_are_known(xp: Backend, grouping: str) -> None:
    per, groups = GROUPINGS[grouping]
    grads = xp.tree(VALUES)
    norm = xp.norms(grads, per=per)
    known = xp.clip_grad_norm(grads, 2.5, per=per, norm=norm)
    check(xp, VALUES, known, grouping, dict.fromkeys(groups, 2.5))
    # A bound equal to the norm that was reported clips nothing.
    same = xp.clip_grad_norm(grads, norm, per=per)
    for new, old in zip(leaves(same.grads), leaves(VALUES), strict=True):
        assert xp.numpy(new).tobytes() == old.tobytes()


def test_a_group_alone_decides_on_its_dtype(xp: Backend) -> None:
    if not xp.has("float64", "float32"):
        pytest.skip(f"{xp.name} has no float64")
    tree = {"a": np.float32([1e30, 1e30]), "b": np.float64([1e200, 1e200]), "c": np.float64([3, 4])}
    grads = xp.tree(tree)
    out = xp.clip_grad_norm(grads, 1.0, per="leaf")
    assert [xp.dtype_of(x) for x in leaves(out.norm)] == ["float32", "float64", "float64"]
    for new, old, norm in zip(leaves(out.grads), leaves(tree), leaves(out.norm), strict=True):
        want = exact.norm([old])
        exact.check_norm(xp.numpy(norm), want, xp.dtype_of(norm))
        for got, x in zip(exact.components(xp.numpy(new)), exact.components(old), strict=True):
            goal = mpmath.mpf(x) / want
            assert abs(got - goal) <= 4 * exact.ulp(goal, old.dtype.name)
    labelled = xp.norms(grads, per={"a": "x", "b": "y", "c": "x"})
    assert {k: xp.dtype_of(v) for k, v in labelled.items()} == {"x": "float64", "y": "float64"}


def test_nothing_to_group(xp: Backend) -> None:
    assert xp.norms({}, per="leaf") == {}
    assert xp.norms([None], per="leaf") == [None]
    assert xp.norms({}, per=by_name) == {}
    assert xp.clip_grad_norm([], 1.0, per="leaf") == ([], [])
    empty = xp.tree([np.zeros((0, 3), np.float32), np.float32([3, 4])])
    norms = xp.norms(empty, per="leaf")
    assert [float(xp.numpy(x)) for x in norms] == [0.0, 5.0]
    out = xp.clip_grad_norm(empty, 1.0, per=[None, None])
    assert out.norm == {}
    assert xp.numpy(out.grads[1]).tolist() == [3, 4]


@each_grouping
def test_in_place(xp: Backend, grouping: str) -> None:
    if not xp.in_place:
        pytest.skip(f"{xp.name} arrays cannot be written to")
    per, groups = GROUPINGS[grouping]
    grads = xp.tree(VALUES)
    norm = gradclip.clip_grad_norm_(grads, 2.5, per=per)
    check(xp, VALUES, gradclip.Clipped(grads, norm), grouping, dict.fromkeys(groups, 2.5))


@pytest.mark.library("numpy")
def test_one_array_in_two_groups_is_scaled_once() -> None:
    x = np.array([3.0, 4.0])
    gradclip.clip_grad_norm_([x, x], 1.0, per="leaf")
    np.testing.assert_allclose(x, [0.6, 0.8], rtol=1e-15)


@pytest.mark.library("numpy")
def test_sizes_around_the_rows_of_one_pass() -> None:
    """Small leaves are strung together in whole rows: no element may count for its neighbour."""
    rng = np.random.default_rng(0)
    sizes = [1, 2, 511, 512, 513, 0, 1023, 1024, 1025, 8191, 8192, 8193, 3]
    for dtype in ("float32", "float64", "float16", "complex64", "complex128"):
        tree = [rng.standard_normal(n).astype(dtype) for n in sizes]
        tree[4][:] = 0
        tree[7][5] = 0 if dtype == "float16" else 1e-30
        for wide in ([], [np.ones(2)]):
            norms = gradclip.norms([*tree, *wide])
            for x, norm in zip(tree, norms, strict=False):
                exact.check_norm(norm, exact.norm([x]), exact.norm_dtype([x]))
    some = [rng.standard_normal(40).astype(np.float32) * 10.0 ** rng.integers(-38, 38) for _ in range(300)]
    for x, norm in zip(some, gradclip.norms(some), strict=True):
        exact.check_norm(norm, exact.norm([x]), "float32")


BAD: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "a word": (
        "layer",
        1.0,
        ValueError,
        r"per must be None, 'leaf', 'unit', 'example', gradclip.Units\(axis\), a tree of labels or .* got 'layer'",
    ),
    "a tree that does not fit": (
        {"enc": 1},
        1.0,
        ValueError,
        r"^per does not match the gradients there: it has \['enc'\], they have",
    ),
    "no hash": (lambda path, leaf: [path], 1.0, TypeError, r"per says .* of grads\['enc'\]\[0\]: a label must be hash"),
    "a label without a bound": (
        LABELS,
        {"body": 1.0},
        ValueError,
        r"^max_norm has no entry for 'head', a label of per",
    ),
    "a bound without a label": (
        LABELS,
        {"body": 1.0, "head": 1.0, "tail": 1.0},
        ValueError,
        r"^max_norm has an entry for 'tail', and no leaf has that label$",
    ),
    "a bad bound of a label": (
        LABELS,
        {"body": -1.0, "head": 1.0},
        ValueError,
        r"^max_norm\['body'\] must be a number",
    ),
    "a bad bound of a leaf": (
        "leaf",
        {"enc": [1.0, NAN], "dec": 1.0, "none": 1.0, "out": 1.0},
        ValueError,
        r"^max_norm\['enc'\]\[1\] must be a number >= 0, got nan$",
    ),
    "a bound of a wrong type": (
        "leaf",
        {"enc": "1", "dec": 1, "none": 1, "out": 1},
        TypeError,
        r"^max_norm\['enc'\] must",
    ),
    "an array of bounds": ("leaf", np.ones(5), ValueError, r"^max_norm must be a number >= 0 or a 0-d array"),
    "bounds that do not fit": ("leaf", [1.0], ValueError, r"^max_norm does not match the gradients there"),
    "bounds without groups": (None, {"enc": 1.0}, TypeError, r"^max_norm must be a number >= 0 or a 0-d real array"),
}


@pytest.mark.library("numpy")
@pytest.mark.parametrize(("per", "max_norm", "error", "match"), BAD.values(), ids=BAD.keys())
def test_what_does_not_fit_is_refused(per: Any, max_norm: Any, error: type[Exception], match: str) -> None:
    tree = changed(0, 12)
    with pytest.raises(error, match=match):
        gradclip.clip_grad_norm_(tree, max_norm, per=per)
    np.testing.assert_equal(tree, VALUES)


@pytest.mark.library("numpy")
def test_bounds_and_norms_that_can_be_read_once() -> None:
    grads = [np.float32([3, 4]), np.float32([12])]
    out = gradclip.clip_grad_norm(grads, (c for c in [1.0, 6.0]), per="leaf", norm=iter([10.0, 12.0]))
    np.testing.assert_allclose(np.concatenate(out.grads), [0.3, 0.4, 6.0], rtol=1e-6)
    out = gradclip.clip_grad_norm(grads, 1.0, per=(name for name in "uv"), norm={"u": 5.0, "v": 24.0})
    np.testing.assert_allclose(np.concatenate(out.grads), [0.6, 0.8, 0.5], rtol=1e-6)


@pytest.mark.library("numpy")
def test_norms_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"^norm has no entry for 'head', a label of per"):
        gradclip.clip_grad_norm(VALUES, 1.0, per=LABELS, norm={"body": 1.0})
    with pytest.raises(TypeError, match=r"^per says \[1\] of per\['out'\]|label must be hashable"):
        gradclip.norms(VALUES, per={**LABELS, "out": {1}})

"""`clip_grad_value` and `clip_grad_value_`: every element into its bounds, and nothing else touched."""

from __future__ import annotations

import copy
import math
import re
from typing import Any, NamedTuple

import numpy as np
import pytest

import gradclip
from backends import np_dtype


class Layer(NamedTuple):
    weight: Any
    bias: Any


def limited(x: np.ndarray, low: Any, high: Any) -> np.ndarray:
    """Element by element, in Python: the bounds as the dtype of `x` holds them."""
    with np.errstate(over="ignore"):  # a bound beyond the dtype is no bound
        low, high = (np.broadcast_to(np.asarray(b, np.float64).astype(x.dtype), x.shape) for b in (low, high))
    out = x.copy()
    for i in np.ndindex(x.shape):
        if not np.isnan(x[i]):
            out[i] = low[i] if x[i] < low[i] else high[i] if x[i] > high[i] else x[i]
    return out


def check(xp: Any, got: Any, want: np.ndarray, like: Any) -> None:
    """Value (to the bit, NaN and the sign of zero aside), dtype, shape, device and library."""
    assert xp.owns(got)
    assert xp.dtype_of(got) == xp.dtype_of(like)
    assert tuple(got.shape) == tuple(like.shape) == want.shape
    assert xp.device_of(got) == xp.device_of(like)
    got = xp.numpy(got)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    number, zero = ~np.isnan(want) & (want != 0), want == 0
    assert got[number].tobytes() == want[number].tobytes(), f"{got!r} is not {want!r}"
    assert (got[zero] == 0).all(), f"{got!r} is not {want!r}"


def real_dtypes(xp: Any) -> list[str]:
    return [name for name in xp.dtypes if not name.startswith("complex")]


VALUES = [[-5.0, -1.5, -1.0, -0.0], [0.0, 0.25, 1.5, 7.0]]
ODD = [math.inf, -math.inf, math.nan, 1.0]

BOUNDS = {
    "1.5": (1.5, -1.5, 1.5),
    "int": (1, -1, 1),
    "zero": (0, -0.0, 0.0),
    "inf": (math.inf, -math.inf, math.inf),
    "beyond-the-dtype": (1e300, -1e300, 1e300),
    "rounded-to-the-largest-float32": (3.40282355e38, -3.40282355e38, 3.40282355e38),
    "rounded-to-the-largest-float16": (65519.9, -65519.9, 65519.9),
    "rounded-to-inf-in-float16": (65520.0, -65520.0, 65520.0),
    "huge-int": (10**30, -(10**30), 10**30),
    "not-representable": (0.1, -0.1, 0.1),
    "numpy": (np.float32(1.25), -1.25, 1.25),
    "numpy-int": (np.int64(2), -2, 2),
    "numpy-uint8": (np.uint8(2), -2, 2),
    "numpy-0-d": (np.array(1.25), -1.25, 1.25),
    "pair": ((-1.25, 3.0), -1.25, 3.0),
    "pair-of-ints": ((-1, 3), -1, 3),
    "pair-above": ((0.5, 2.0), 0.5, 2.0),
    "pair-below": ((-2.0, -0.5), -2.0, -0.5),
    "pair-of-one": ((0.5, 0.5), 0.5, 0.5),
    "half-open": ((-math.inf, 0.5), -math.inf, 0.5),
    "half-open-up": ((-0.5, math.inf), -0.5, math.inf),
    "mixed-pair": ((np.float32(-1), np.array(2.0)), -1, 2),
}


@pytest.mark.parametrize(("bound", "low", "high"), BOUNDS.values(), ids=BOUNDS.keys())
def test_bounds_for_all_leaves(xp, bound, low, high):
    for dtype in real_dtypes(xp):
        tree = {"b": xp.array(VALUES, dtype), "a": [xp.array(ODD, dtype), xp.array(2.5, dtype)], "n": None}
        before = xp.back(tree)
        got = xp.clip_grad_value(tree, bound)
        if xp.eager:
            assert list(got) == list(tree)
        assert got["n"] is None
        check(xp, got["b"], limited(before["b"], low, high), tree["b"])
        check(xp, got["a"][0], limited(before["a"][0], low, high), tree["a"][0])
        check(xp, got["a"][1], limited(before["a"][1], low, high), tree["a"][1])
        assert [x.tobytes() for x in (xp.back(tree)["b"], *xp.back(tree)["a"])] == [
            x.tobytes() for x in (before["b"], *before["a"])
        ]


@pytest.mark.parametrize(("bound", "low", "high"), BOUNDS.values(), ids=BOUNDS.keys())
def test_in_place(xp, bound, low, high):
    for dtype in real_dtypes(xp):
        leaves = [xp.array(VALUES, dtype), xp.array(ODD, dtype), xp.array(2.5, dtype)]
        tree, before = {"b": leaves[0], "a": (leaves[1], None, leaves[2])}, xp.back(leaves)
        if not xp.in_place:
            with pytest.raises(TypeError, match=r"^grads\['b'\] .*use gradclip\.clip_grad_value,"):
                gradclip.clip_grad_value_(tree, bound)
            assert [x.tobytes() for x in xp.back(leaves)] == [x.tobytes() for x in before]
            continue
        assert gradclip.clip_grad_value_(tree, bound) is None
        assert tree["b"] is leaves[0]
        for x, was in zip(leaves, before, strict=True):
            check(xp, x, limited(was, low, high), x)


def test_in_place_twice_the_same_array(xp):
    x = xp.array([-5.0, 0.5, 5.0], "float32")
    if not xp.in_place:
        with pytest.raises(gradclip.LeafError, match=r"clip_grad_value\b"):
            gradclip.clip_grad_value_([x, x], 1.0)
        return
    assert gradclip.clip_grad_value_([x, {"again": x}], 1.0) is None
    check(xp, x, np.float32([-1.0, 0.5, 1.0]), x)


@pytest.mark.parametrize("bound", [0.0, 1.0, (-0.0, 0.0), (-1.0, 0.0)], ids=str)
def test_the_sign_of_a_zero_is_kept(xp, bound):
    for dtype in real_dtypes(xp):
        x = xp.array([-0.0, 0.0, -0.0], dtype)
        assert xp.numpy(xp.clip_grad_value(x, bound)).tobytes() == xp.numpy(x).tobytes()


def test_subnormals_inside_the_bounds_are_kept(xp):
    for dtype in real_dtypes(xp):
        tiny = np.finfo(np_dtype(dtype)) if dtype != "bfloat16" else None
        smallest = 2.0**-133 if tiny is None else float(tiny.smallest_subnormal)
        x = xp.array([smallest, -smallest, 3 * smallest, 0.0], dtype)
        for bound in (1.0, 2 * smallest):
            got = xp.clip_grad_value(x, bound)
            want = limited(xp.numpy(x), -bound, bound)
            if xp.flushes:  # subnormals may count as zero, in the gradients and in the bound
                numbers = xp.numpy(got).astype(np.float64)
                assert (np.abs(numbers) <= np.abs(xp.numpy(x).astype(np.float64))).all()
                assert (np.sign(numbers) * np.sign(want.astype(np.float64)) >= 0).all()
            else:
                check(xp, got, want, x)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (), (2, 1, 2)], ids=str)
def test_shapes(xp, shape):
    x = xp.array(np.full(shape, 3.0), "float32")
    check(xp, xp.clip_grad_value(x, 1.0), np.full(shape, 1.0, np.float32), x)
    check(xp, xp.clip_grad_value([x], (4.0, 5.0))[0], np.full(shape, 4.0, np.float32), x)


@pytest.mark.library("numpy")
@pytest.mark.parametrize("dtype", [">f2", ">f4", ">f8", "<f4"])
def test_byte_order_is_kept(dtype):
    x = np.array([-5.0, 0.5, math.nan, 5.0], dtype)
    got = gradclip.clip_grad_value([x], 1.0)[0]
    assert type(got) is np.ndarray
    np.testing.assert_array_equal(got, np.array([-1.0, 0.5, math.nan, 1.0]))
    assert got.dtype.str == x.dtype.str
    assert gradclip.clip_grad_value_([x], 1.0) is None
    np.testing.assert_array_equal(x, np.array([-1.0, 0.5, math.nan, 1.0]))


@pytest.mark.library("numpy")
def test_numpy_arrays_of_every_layout(tmp_path):
    base = np.arange(-6.0, 6.0, dtype=np.float32).reshape(3, 4)
    mapped = np.memmap(tmp_path / "x", dtype=np.float32, mode="w+", shape=(3, 4))
    mapped[...] = base
    for x in (base.T, base[:, ::2], base[::-1], np.asfortranarray(base), np.broadcast_to(base[0], (2, 4)), mapped):
        got = gradclip.clip_grad_value(x, 2.5)
        np.testing.assert_array_equal(got, np.minimum(np.maximum(np.array(x), -2.5), 2.5))
        assert got.dtype == np.float32
        got[...] = 0  # it is ours: nothing of the input is behind it
    np.testing.assert_array_equal(base.reshape(-1), np.arange(-6.0, 6.0))
    view = base[:, ::2]
    gradclip.clip_grad_value_([view, mapped], 2.5)
    assert base[0].tolist() == [-2.5, -5.0, -2.5, -3.0]
    assert mapped[0].tolist() == [-2.5, -2.5, -2.5, -2.5]
    with pytest.raises(gradclip.LeafError, match=r"^grads .*gradclip\.clip_grad_value,"):
        gradclip.clip_grad_value_(np.broadcast_to(np.float32([7.0]), (3,)), 1.0)


def test_a_numpy_scalar_leaf_keeps_its_type():
    tree = [np.float32(3), np.float16(-4)]
    for got, want in (
        (gradclip.clip_grad_value(tree, 2.0), [2.0, -2.0]),
        (gradclip.clip_grad_norm(tree, 2.5).grads, [1.5, -2.0]),
        (gradclip.clip_grad_norm(tree, 5.0).grads, [3.0, -4.0]),
    ):
        assert [type(x) for x in got] == [np.float32, np.float16]
        assert got == want


# -- array bounds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["library", "numpy", "numpy-float64", "numpy-int"])
def test_array_bounds_broadcast_to_the_leaf(xp, source):
    def bound(values: Any) -> Any:
        if source == "library":
            return xp.array(values, "float32")
        return np.array(values, {"numpy": "f4", "numpy-float64": "f8", "numpy-int": "i4"}[source])

    x = xp.array(VALUES, "float32")
    for values in ([[1.0], [3.0]], [0.0, 1.0, 2.0, 3.0], [[1.0, 2.0, 3.0, 4.0]], 2.0, [2.0]):
        got = xp.clip_grad_value([x], bound(values))[0]
        check(xp, got, limited(xp.numpy(x), -np.array(values), values), x)
    got = xp.clip_grad_value([x], (bound([[-3.0], [1.0]]), bound([1.0, 2.0, 3.0, 4.0])))[0]
    check(xp, got, limited(xp.numpy(x), [[-3.0], [1.0]], [1.0, 2.0, 3.0, 4.0]), x)
    got = xp.clip_grad_value([x], (-1, bound([1.0, 2.0, 3.0, 4.0])))[0]
    check(xp, got, limited(xp.numpy(x), -1, [1.0, 2.0, 3.0, 4.0]), x)


@pytest.mark.parametrize("source", ["library", "numpy"])
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_integer_array_bounds(xp, source, dtype):
    v = xp.array([1, 2], dtype) if source == "library" else np.array([1, 2], dtype)
    x = xp.array([-5.0, 5.0], "float32")
    check(xp, xp.clip_grad_value(x, v), np.float32([-1.0, 2.0]), x)
    x = xp.array([5.0, -5.0], "float32")
    check(xp, xp.clip_grad_value(x, v), np.float32([1.0, -2.0]), x)


@pytest.mark.parametrize(
    ("shape", "bound"),
    [
        ((3,), (2, 3)),
        ((1,), (3,)),
        ((), (1,)),
        ((), (3,)),
        ((2, 1), (2, 3)),
        ((3,), (2,)),
        ((2, 3), (3, 2)),
        ((0,), (3,)),
    ],
    ids=str,
)
def test_bounds_that_do_not_broadcast_to_the_leaf(xp, shape, bound):
    """A bound never changes the shape of a gradient, and no leaf is written before that is known."""
    first, x = xp.array([5.0, -5.0], "float32"), xp.array(np.full(shape, 5.0), "float32")
    shapes = "".join(f"(?=.*{re.escape(str(s))})" for s in (bound, shape))
    for v in (np.full(bound, 2.0, np.float32), xp.array(np.full(bound, 2.0), "float32")):
        with pytest.raises(ValueError, match=rf"^clip_value\['b'\]{shapes}"):
            xp.clip_grad_value({"a": first, "b": x}, {"a": 1.0, "b": v})
        if xp.in_place:
            with pytest.raises(ValueError, match=rf"^clip_value\['b'\]{shapes}"):
                gradclip.clip_grad_value_({"a": first, "b": x}, {"a": 1.0, "b": v})
        assert xp.numpy(first).tolist() == [5.0, -5.0]
        assert tuple(x.shape) == shape
        assert (xp.numpy(x) == 5.0).all()


# -- trees of bounds -----------------------------------------------------------------------------------------


def tree_of(xp: Any) -> Any:
    return {
        "enc": [xp.array([-5.0, 5.0], "float32"), xp.array([-5.0, 5.0], "float32")],
        "dec": Layer(xp.array([[-5.0, 5.0]], "float32"), None),
        "head": (xp.array([-5.0, 5.0], "float32"), xp.array([-5.0, 5.0], "float32")),
    }


TREES = {
    "exact": {"enc": [1, 2.0], "dec": Layer(3, None), "head": (4, 4.5)},
    "other-key-order": {"head": [4, 4.5], "dec": Layer(3.0, None), "enc": [1, 2]},
    "prefix": {"enc": 1, "dec": 3, "head": 4},
    "partly": {"enc": [1, 2], "dec": 3, "head": 4},
    "bound-where-there-is-none": {"enc": [1, 2], "dec": Layer(3, 7), "head": 4},
    "pairs": {"enc": [(-1, 2), (-3, 4)], "dec": (-2, 3), "head": 4},
    "pair-of-numbers": (-1, 2),
    "pair-of-trees": (
        {"enc": [-1, -2], "dec": -3, "head": (-4, -4)},
        {"enc": 2, "dec": Layer(1, None), "head": (3, 4)},
    ),
    "pair-tree-and-number": (-6, {"enc": 1, "dec": 2, "head": 3}),
    "arrays": {"enc": np.float32([1, 2]), "dec": np.array([[1], [2]])[:1], "head": 3},
    "pair-of-arrays-in-a-tree": {"enc": (np.array([-1, -2]), 3), "dec": 4, "head": 2},
}
WANTED = {
    "exact": [(-1, 1), (-2, 2), (-3, 3), (-4, 4), (-4.5, 4.5)],
    "other-key-order": [(-1, 1), (-2, 2), (-3, 3), (-4, 4), (-4.5, 4.5)],
    "prefix": [(-1, 1), (-1, 1), (-3, 3), (-4, 4), (-4, 4)],
    "partly": [(-1, 1), (-2, 2), (-3, 3), (-4, 4), (-4, 4)],
    "bound-where-there-is-none": [(-1, 1), (-2, 2), (-3, 3), (-4, 4), (-4, 4)],
    "pairs": [(-1, 2), (-3, 4), (-2, 3), (-4, 4), (-4, 4)],
    "pair-of-numbers": [(-1, 2)] * 5,
    "pair-of-trees": [(-1, 2), (-2, 2), (-3, 1), (-4, 3), (-4, 4)],
    "pair-tree-and-number": [(-5, 1), (-5, 1), (-5, 2), (-5, 3), (-5, 3)],
    "arrays": [(-1, 2), (-1, 2), (-1, 1), (-3, 3), (-3, 3)],
    "pair-of-arrays-in-a-tree": [(-1, 3), (-1, 3), (-4, 4), (-2, 2), (-2, 2)],
}


def flat(tree: Any) -> list[Any]:
    return [*tree["enc"], tree["dec"].weight, *tree["head"]]


# A tuple of two where the gradients hold a tuple of two is a pair: (4, 4.5) in "exact" stands for lo and hi.
WANTED["exact"][3:] = [(4, 4.5), (4, 4.5)]


@pytest.mark.parametrize("name", TREES)
def test_trees_of_bounds(xp, name):
    tree = tree_of(xp)
    got = xp.clip_grad_value(tree, TREES[name])
    assert type(got["dec"]) is Layer
    assert got["dec"].bias is None
    assert type(got["head"]) is tuple
    for g, x, want in zip(flat(got), flat(tree), WANTED[name], strict=True):
        check(xp, g, np.float32(want).reshape(x.shape), x)
    if xp.in_place:
        assert gradclip.clip_grad_value_(tree, TREES[name]) is None
        for x, want in zip(flat(tree), WANTED[name], strict=True):
            check(xp, x, np.float32(want).reshape(x.shape), x)


def test_bounds_in_a_tree_of_the_librarys_own_scalars(xp):
    tree = {"a": xp.array([-5.0, 5.0], "float32"), "b": [xp.array([-5.0, 5.0], "float32")]}
    one, two = xp.array(1.0, "float32"), xp.array(2.0, "float32")
    got = xp.clip_grad_value(tree, {"a": one, "b": two})
    check(xp, got["a"], np.float32([-1, 1]), tree["a"])
    check(xp, got["b"][0], np.float32([-2, 2]), tree["b"][0])
    got = xp.clip_grad_value(tree, (-two, {"a": one, "b": [two]}))
    check(xp, got["a"], np.float32([-2, 1]), tree["a"])
    check(xp, got["b"][0], np.float32([-2, 2]), tree["b"][0])


ONE_SHOT = {
    "generator": (lambda: (v for v in [1.0, 2.0]), [(-1, 1), (-2, 2)]),
    "of-pairs": (lambda: iter([(-1.0, 2.0), 3.0]), [(-1, 2), (-3, 3)]),
    "values-of-a-dict": (lambda: {"one": 1.0, "two": 2.0}.values(), [(-1, 1), (-2, 2)]),
    "in-a-pair": (lambda: (iter([-1.0, -2.0]), iter([3.0, 4.0])), [(-1, 3), (-2, 4)]),
    "low-of-a-pair": (lambda: (iter([-1.0, -2.0]), 3.0), [(-1, 3), (-2, 3)]),
    "high-of-a-pair": (lambda: (-1.0, iter([3.0, 4.0])), [(-1, 3), (-1, 4)]),
}


@pytest.mark.parametrize(("make", "want"), ONE_SHOT.values(), ids=ONE_SHOT.keys())
def test_one_shot_bounds_are_read_once(xp, make, want):
    tree = [xp.array([-5.0, 5.0], "float32"), xp.array([-5.0, 5.0], "float32")]
    for got, x, pair in zip(xp.clip_grad_value(tree, make()), tree, want, strict=True):
        check(xp, got, np.float32(pair), x)
    within = {"a": tree, "b": tree[0]}
    got = xp.clip_grad_value(within, {"a": iter([1.0, 2.0]), "b": 3.0})
    for leaf, high in zip((*got["a"], got["b"]), (1, 2, 3), strict=True):
        check(xp, leaf, np.float32([-high, high]), tree[0])
    if xp.in_place:
        assert gradclip.clip_grad_value_(tree, make()) is None
        for x, pair in zip(tree, want, strict=True):
            check(xp, x, np.float32(pair), x)


MISMATCHES = {
    "list-for-array": ([1.0, 2.0], {"w": 0}, r"^clip_value\b.*"),
    "missing-key": ({"w": 1.0}, {"w": 0, "b": 0}, r"^clip_value .*\['w'\].*\['b'\]"),
    "extra-key": ({"w": 1.0, "b": 2.0}, {"w": 0}, r"^clip_value .*\['b'\].*\['w'\]"),
    "deep-missing": ({"enc": [1.0]}, {"enc": [0, 0]}, r"^clip_value\['enc'\] "),
    "deep-container": (
        {"enc": [1.0, {"x": 1.0}]},
        {"enc": [0, 0]},
        r"^clip_value\['enc'\]\[1\] is a container \(dict\)",
    ),
    "empty": ({}, {"w": 0}, r"^clip_value .*nothing.*\['w'\]"),
    "list-for-dict": ({"m": [1.0]}, {"m": {"w": 0}}, r"^clip_value\['m'\] "),
    "low-of-a-pair": (({"w": -1.0}, 1.0), {"b": 0}, r"^(clip_value\[0\]|lo) "),
    "high-of-a-pair": ((-1.0, {"m": [1.0]}), {"m": [0, 0]}, r"^(clip_value\[1\]|hi)\['m'\] "),
    "triple": ((1.0, 2.0, 3.0), [0, 0], r"^clip_value "),
    "short-iterator": (iter([1.0]), [0, 0], r"^clip_value .*it has \[0\], they have \[0\], \[1\]$"),
    "six-of-seven": ([1.0] * 6, [0] * 7, r"it has \[0\], .*\[5\], they have \[0\], .*\[5\], \.\.\.$"),
    "triple-for-array": ((1.0, 2.0, 3.0), 0, r"^clip_value is a container \(tuple\)"),
}


@pytest.mark.parametrize(("bounds", "places", "match"), MISMATCHES.values(), ids=MISMATCHES.keys())
def test_trees_that_do_not_match(bounds, places, match):
    made: list[np.ndarray] = []

    def fill(place: Any) -> Any:
        if isinstance(place, dict):
            return {k: fill(v) for k, v in place.items()}
        if isinstance(place, list):
            return [fill(v) for v in place]
        made.append(np.float32([-5.0, 5.0]))
        return made[-1]

    tree = fill(places)
    for verb in (gradclip.clip_grad_value, gradclip.clip_grad_value_):
        with pytest.raises(ValueError, match=match):
            verb(tree, copy.copy(bounds))  # an iterator's copy stands where the iterator stands
    assert all(x.tolist() == [-5.0, 5.0] for x in made)


# -- bounds that are refused ---------------------------------------------------------------------------------

BAD = {
    "negative": (-1.0, ValueError),
    "negative-int": (-1, ValueError),
    "negative-tiny": (-5e-324, ValueError),
    "negative-inf": (-math.inf, ValueError),
    "nan": (math.nan, ValueError),
    "numpy-negative": (np.float32(-1), ValueError),
    "numpy-nan": (np.array(math.nan), ValueError),
    "bfloat16-negative": (np_dtype("bfloat16").type(-1), ValueError),
    "array-one-negative": (np.array([1.0, -1.0]), ValueError),
    "array-one-nan": (np.array([1.0, math.nan]), ValueError),
    "pair-swapped": ((1.0, -1.0), ValueError),
    "pair-swapped-ints": ((2, 1), ValueError),
    "pair-nan-low": ((math.nan, 1.0), ValueError),
    "pair-nan-high": ((-1.0, math.nan), ValueError),
    "pair-both-nan": ((math.nan, math.nan), ValueError),
    "pair-array-crossing": ((np.array([-1.0, 2.0]), 1.0), ValueError),
    "pair-one-device-nan": ((math.nan, np.array([1.0, 2.0])), ValueError),
    "inside-a-list": ([1.0, -1.0], ValueError),
    "pair-inside-a-list": ([1.0, (2.0, 1.0)], ValueError),
    "none": (None, TypeError),
    "bool": (True, TypeError),
    "numpy-bool": (np.True_, TypeError),
    "bool-array": (np.array([True, False]), TypeError),
    "str": ("1.0", TypeError),
    "str-array": (np.array("1.0"), TypeError),
    "complex": (1j, TypeError),
    "complex-array": (np.array([1j, 1]), TypeError),
    "object": (object(), TypeError),
    "object-array": (np.array(None), TypeError),
    "datetime": (np.datetime64("2020-01-01"), TypeError),
    "set": ({1.0}, TypeError),
    "pair-of-nones": ((None, None), TypeError),
    "pair-none-low": ((None, 1.0), TypeError),
    "pair-none-high": ((-1.0, None), TypeError),
    "pair-bool": ((False, True), TypeError),
    "pair-str": (("0", "1"), TypeError),
    "pair-same-object": ((object,) * 2, TypeError),
    "none-inside-a-list": ([1.0, None], TypeError),
    "str-inside-a-list": ([1.0, "x"], TypeError),
}


@pytest.mark.parametrize("verb", [gradclip.clip_grad_value, gradclip.clip_grad_value_])
@pytest.mark.parametrize(("bound", "error"), BAD.values(), ids=BAD.keys())
def test_a_bad_bound(verb, bound, error):
    tree = [np.float32([-5.0, 5.0]), np.float32([-5.0, 5.0])]
    with pytest.raises(error, match=r"^(clip_value|lo|hi)\b.*must be ") as caught:
        verb(tree, bound)
    assert not isinstance(caught.value, gradclip.LeafError)
    assert [x.tolist() for x in tree] == [[-5.0, 5.0]] * 2


KIND = "must be a real number or array, a pair (lo, hi), or a tree of these, got "
SIGN = "must be >= 0 and not nan, got "
ORDER = "must be a pair with lo <= hi and no nan, got "

PLACES = {
    "str": ({"a": 1.0, "b": "x"}, f"clip_value['b'] {KIND}'x' of type str"),
    "none": ({"a": 1.0, "b": None}, f"clip_value['b'] {KIND}None of type NoneType"),
    "negative": ({"a": 1.0, "b": -1.0}, f"clip_value['b'] {SIGN}-1.0; a pair (lo, hi) may be negative"),
    "nan": ({"a": 1.0, "b": math.nan}, f"clip_value['b'] {SIGN}nan; a pair (lo, hi) may be negative"),
    "pair-swapped": ({"a": 1.0, "b": (2.0, 1.0)}, f"clip_value['b'] {ORDER}lo=2.0, hi=1.0"),
    "pair-nan": ({"a": 1.0, "b": (math.nan, 1)}, f"clip_value['b'] {ORDER}lo=nan, hi=1.0"),
    "pair-none-low": ({"a": 1.0, "b": (None, 1.0)}, f"clip_value['b'] {KIND}None of type NoneType"),
    "deep": ({"a": [1.0, "x"], "b": 1.0}, f"clip_value['a'][1] {KIND}'x' of type str"),
    "prefix": ({"a": -1.0, "b": 1.0}, f"clip_value['a'] {SIGN}-1.0; a pair (lo, hi) may be negative"),
    "low-side": (({"a": -1.0, "b": "x"}, 1.0), f"lo['b'] {KIND}'x' of type str"),
    "high-side": ((-1.0, {"a": [1.0, None], "b": 1.0}), f"hi['a'][1] {KIND}None of type NoneType"),
    "sides-crossing": (({"a": -1.0, "b": 2.0}, 1.0), f"lo['b'] and hi {ORDER}lo=2.0, hi=1.0"),
    "plain-str": ("x", f"clip_value {KIND}'x' of type str"),
    "plain-negative": (-1.0, f"clip_value {SIGN}-1.0; a pair (lo, hi) may be negative"),
    "plain-nan": (math.nan, f"clip_value {SIGN}nan; a pair (lo, hi) may be negative"),
    "plain-pair": ((2.0, 1.0), f"clip_value {ORDER}lo=2.0, hi=1.0"),
    "plain-pair-none-low": ((None, 1.0), f"clip_value {KIND}None of type NoneType"),
    "plain-pair-str": ((-1.0, "x"), f"clip_value {KIND}'x' of type str"),
}


@pytest.mark.parametrize("verb", [gradclip.clip_grad_value, gradclip.clip_grad_value_])
@pytest.mark.parametrize(("bound", "said"), PLACES.values(), ids=PLACES.keys())
def test_a_bad_bound_is_named_by_its_place(verb, bound, said):
    x = np.float32([-5.0, 5.0])
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(said)}$"):
        verb({"a": [x, x], "b": x}, bound)
    assert x.tolist() == [-5.0, 5.0]


@pytest.mark.parametrize("bound", [-1.0, (1.0, -1.0), math.nan, "x", True], ids=repr)
def test_a_bad_bound_on_every_backend(xp, bound):
    x = xp.array([-5.0, 5.0], "float32")
    with pytest.raises((ValueError, TypeError), match=r"^clip_value must be "):
        xp.clip_grad_value([x], bound)
    assert xp.numpy(x).tolist() == [-5.0, 5.0]


@pytest.mark.parametrize("dtype", ["bool", "complex64"])
def test_bounds_of_the_library_that_are_not_real(xp, dtype):
    x = xp.array([-5.0, 5.0], "float32")
    for bound in (xp.array(1, dtype), (-1.0, xp.array([1, 1], dtype))):
        with pytest.raises(TypeError, match=r"^clip_value must be a real number or array"):
            gradclip.clip_grad_value([x], bound)


def test_bounds_on_a_device_that_make_no_sense(xp):
    """Unseen by the host, the documented formula holds: min(max(g, lo), hi), where NaN gives NaN."""
    x = xp.array([-5.0, 0.0, 5.0], "float32")
    v, nan = xp.array(-1.0, "float32"), xp.array(math.nan, "float32")
    if xp.module == "numpy":
        for bound in (v, nan, (-v, v)):
            with pytest.raises(ValueError, match=r"^clip_value must be "):
                gradclip.clip_grad_value(x, bound)
        return
    check(xp, xp.clip_grad_value(x, (-v, v)), np.float32([-1.0, -1.0, -1.0]), x)
    check(xp, xp.clip_grad_value(x, nan), np.float32([math.nan] * 3), x)


# -- leaves that are refused ---------------------------------------------------------------------------------


def test_complex_leaves_are_refused(xp):
    if not xp.has("complex64"):
        assert "complex64" not in xp.dtypes
        return
    first, x = xp.array([-5.0, 5.0], "float32"), xp.array([1 + 2j, 3.0], "complex64")
    with pytest.raises(gradclip.LeafError, match=r"^grads\['b'\]\[0\] is complex \(complex64\).*clip_grad_norm"):
        xp.clip_grad_value({"a": first, "b": [x]}, 1.0)
    if xp.in_place:
        with pytest.raises(gradclip.LeafError, match=r"^grads\['b'\]\[0\] is complex \(complex64\)"):
            gradclip.clip_grad_value_({"a": first, "b": [x]}, 1.0)
    assert xp.numpy(first).tolist() == [-5.0, 5.0]
    assert xp.numpy(x).tolist() == [1 + 2j, 3.0]


def test_nothing_is_written_when_one_leaf_cannot_be():
    a, b = np.float32([-5.0, 5.0]), np.float32([-5.0, 5.0])
    b.flags.writeable = False
    with pytest.raises(TypeError, match=r"^grads\['b'\] is a read-only .*gradclip\.clip_grad_value,"):
        gradclip.clip_grad_value_({"a": a, "b": b}, 1.0)
    assert a.tolist() == b.tolist() == [-5.0, 5.0]


@pytest.mark.library("jax")
def test_in_place_on_jax_names_the_functional_form():
    jnp = pytest.importorskip("jax.numpy")
    with pytest.raises(TypeError, match=r"^grads\['w'\] is a JAX array.*use gradclip\.clip_grad_value,"):
        gradclip.clip_grad_value_({"w": jnp.ones(2)}, 1.0)


# -- iterators -----------------------------------------------------------------------------------------------


def test_a_generator_as_tree(xp):
    leaves = [xp.array([-5.0, 5.0], "float32"), xp.array([[0.5]], "float32")]
    got = gradclip.clip_grad_value((x for x in leaves), [1.0, 0.25])
    assert type(got) is list
    check(xp, got[0], np.float32([-1.0, 1.0]), leaves[0])
    check(xp, got[1], np.float32([[0.25]]), leaves[1])
    got = gradclip.clip_grad_value({"x": iter(leaves)}, (-2.0, 1.0))
    check(xp, got["x"][0], np.float32([-2.0, 1.0]), leaves[0])
    if xp.in_place:
        assert gradclip.clip_grad_value_((x for x in leaves), 0.25) is None
        check(xp, leaves[0], np.float32([-0.25, 0.25]), leaves[0])
        check(xp, leaves[1], np.float32([[0.25]]), leaves[1])


# -- torch and JAX -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("v", [1.0, 0.1, 0.0, 3])
def test_equal_to_torch(dtype, v):
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(3).normal(size=(3, 5)) * 2
    values[0, :3] = [math.nan, math.inf, -math.inf]
    param = torch.zeros(3, 5, dtype=getattr(torch, dtype), requires_grad=True)
    param.grad = torch.asarray(values).to(param.dtype)
    ours = gradclip.clip_grad_value([param.grad], v)[0]
    inside = param.grad.clone()
    assert gradclip.clip_grad_value_([inside], v) is None
    torch.nn.utils.clip_grad_value_([param], v)
    for got in (ours, inside):
        assert got.dtype == param.grad.dtype
        assert torch.equal(torch.isnan(got), torch.isnan(param.grad))
        assert torch.equal(torch.nan_to_num(got), torch.nan_to_num(param.grad))


@pytest.mark.library("jax")
@pytest.mark.parametrize("jitted", [False, True])
def test_the_derivative_is_one_inside_and_zero_outside(jitted):
    jax = pytest.importorskip("jax")
    x = {"a": jax.numpy.asarray([-5.0, -0.5, 0.0, 0.99, 1.01]), "b": jax.numpy.asarray([math.inf, 0.1])}

    def total(t: Any) -> Any:
        out = gradclip.clip_grad_value(t, (-1.0, 1.0))
        return sum(jax.numpy.sum(leaf) for leaf in jax.tree.leaves(out))

    slope = (jax.jit(jax.grad(total)) if jitted else jax.grad(total))(x)
    assert slope["a"].tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    assert slope["b"].tolist() == [0.0, 1.0]
    ones = jax.tree.map(jax.numpy.ones_like, x)
    _, forward = jax.jvp(lambda t: gradclip.clip_grad_value(t, 1.0), (x,), (ones,))
    assert forward["a"].tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    assert forward["b"].tolist() == [0.0, 1.0]


@pytest.mark.library("jax")
def test_traced_bounds():
    jax = pytest.importorskip("jax")
    x = jax.numpy.asarray([-5.0, 0.5, 5.0])
    clip = jax.jit(gradclip.clip_grad_value)
    assert clip([x], 1.0)[0].tolist() == [-1.0, 0.5, 1.0]
    assert clip([x], (-2.0, 1.0))[0].tolist() == [-2.0, 0.5, 1.0]
    assert clip({"x": x}, {"x": 2})["x"].tolist() == [-2.0, 0.5, 2.0]
    constant = jax.jit(lambda v: gradclip.clip_grad_value({"w": np.float32([-5.0, 0.5])}, v))
    assert constant(1.0)["w"].tolist() == [-1.0, 0.5]


@pytest.mark.library("numpy")
def test_a_list_of_two_is_told_that_a_pair_is_a_tuple() -> None:
    x = np.float32([3.0, 4.0])
    match = r"^clip_value is a container \(list\), but its .* single array; a pair of bounds is a tuple, \(lo, hi\)$"
    for verb in (gradclip.clip_grad_value, gradclip.clip_grad_value_):
        with pytest.raises(ValueError, match=match):
            verb(x, [-0.5, 0.5])
        with pytest.raises(ValueError, match=r"it has \[0\], \[1\], they have \[0\]; a pair of bounds is a tuple"):
            verb([x], [-0.5, 0.5])
    assert x.tolist() == [3.0, 4.0]

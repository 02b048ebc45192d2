"""Containers come out as they went in, and an error says where in the tree it was found."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import warnings
import weakref
from collections import OrderedDict, defaultdict, namedtuple
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import exact
import gradclip
from gloo import process_group


class Layer(NamedTuple):
    weight: Any
    bias: Any


Old = namedtuple("Old", ["kernel"])


class MyDict(dict):
    """A dict with an attribute, whose constructor wants something else than a dict."""

    def __init__(self, tag: str, **items: Any) -> None:
        super().__init__(**items)
        self.tag = tag

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MyDict) and self.tag == other.tag and dict.__eq__(self, other)

    __hash__ = None


class MyList(list):
    pass


class MyTuple(tuple):
    pass


class Couple(tuple):
    """A tuple that is not made from one iterable."""

    def __new__(cls, one: Any, two: Any) -> Couple:
        return super().__new__(cls, (one, two))


def factory() -> list[Any]:
    return []


def default(**items: Any) -> Any:
    return defaultdict(factory, items)


#: What goes in, made of two leaves; and what comes out, where that is of another type.
CONTAINERS = {
    "list": lambda a, b: [a, b],
    "tuple": lambda a, b: (a, b),
    "dict": lambda a, b: {"z": a, "a": b},
    "dict-of-odd-keys": lambda a, b: {3: a, "x": None, (1, "y"): b, None: []},
    "dict-of-mixed-order": lambda a, b: {"b": a, 1: b},
    "nested": lambda a, b: {"z": [(a,), {"k": {}}], "a": [[], (), None, [b]]},
    "named-tuple": lambda a, b: Layer(a, b),
    "collections-namedtuple": lambda a, b: [Old(a), Old(b)],
    "ordered-dict": lambda a, b: OrderedDict([("z", a), ("a", b)]),
    "defaultdict": lambda a, b: default(z=a, a=b),
    "dict-subclass": lambda a, b: MyDict("tag", z=a, a=b),
    "list-subclass": lambda a, b: MyList([a, MyList([b])]),
    "tuple-subclass": lambda a, b: MyTuple((a, MyTuple((b,)))),
    "tuple-subclass-with-its-own-new": lambda a, b: Couple(a, b),
    "none": lambda a, b: [None, a, {"n": None}, b],
}
ONE_SHOT = {
    "generator": lambda a, b: (x for x in (a, b)),
    "iterator": lambda a, b: iter([a, b]),
    "map": lambda a, b: map(lambda x: x, [a, b]),  # noqa: C417
    "reversed": lambda a, b: reversed([b, a]),
    "dict-values": lambda a, b: {"x": a, "y": b}.values(),
}
EMPTY = {
    "list": [],
    "tuple": (),
    "dict": {},
    "none": None,
    "nested": {"a": [], "b": (None, {})},
    "defaultdict": defaultdict(list),
    "ordered-dict": OrderedDict(),
}


def same_shape(got: Any, like: Any) -> list[tuple[Any, Any]]:
    """Assert that two trees are built alike; their leaves, in pairs."""
    assert type(got) is type(like)
    if isinstance(like, dict):
        assert list(got) == list(like)
        assert got is not like
        if isinstance(like, defaultdict):
            assert got.default_factory is like.default_factory
        assert getattr(got, "__dict__", None) == getattr(like, "__dict__", None)
        return [pair for k in like for pair in same_shape(got[k], like[k])]
    if isinstance(like, list | tuple):
        assert len(got) == len(like)
        return [pair for g, x in zip(got, like, strict=True) for pair in same_shape(g, x)]
    if like is None:
        assert got is None
        return []
    return [(got, like)]


def check(xp: Any, got: Any, values: Any, like: Any) -> None:
    """Value (2 units in the last place), dtype, shape, device and library of one array."""
    assert xp.owns(got)
    assert xp.dtype_of(got) == xp.dtype_of(like)
    assert tuple(got.shape) == tuple(like.shape)
    assert xp.device_of(got) == xp.device_of(like)
    np.testing.assert_allclose(xp.numpy(got), np.asarray(values, np.float32), rtol=2.5e-7, atol=0)


def two_leaves(xp: Any) -> tuple[Any, Any]:
    """Leaves whose norm is 13."""
    return xp.array([3.0, 4.0], "float32"), xp.array([[12.0]], "float32")


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS.keys())
def test_containers_come_out_as_they_went_in(xp, make):
    tree = make(*two_leaves(xp))
    got, norm = gradclip.clip_grad_norm(tree, 6.5)
    (a, a_in), (b, b_in) = same_shape(got, tree)
    check(xp, a, [1.5, 2.0], a_in)
    check(xp, b, [[6.0]], b_in)
    assert float(norm) == 13.0

    (a, a_in), (b, b_in) = same_shape(gradclip.clip_grad_value(tree, 3.5), tree)
    check(xp, a, [3.0, 3.5], a_in)
    check(xp, b, [[3.5]], b_in)

    kept = same_shape(gradclip.clip_grad_norm(tree, 13.0).grads, tree)
    assert [xp.numpy(g).tobytes() for g, _ in kept] == [xp.numpy(x).tobytes() for _, x in kept]
    assert float(gradclip.global_norm(tree)) == 13.0


def test_containers_that_come_out_are_new(xp):
    a, b = two_leaves(xp)
    tree = {"layers": [a, {"b": b}]}
    for bound in (1.0, 100.0):
        got = gradclip.clip_grad_norm(tree, bound).grads
        assert got is not tree
        assert got["layers"] is not tree["layers"]
        assert got["layers"][1] is not tree["layers"][1]
    assert tree["layers"][0] is a
    assert tree["layers"][1]["b"] is b


@pytest.mark.parametrize("make", ONE_SHOT.values(), ids=ONE_SHOT.keys())
def test_one_shot_iterators_come_back_as_lists(xp, make):
    a, b = two_leaves(xp)
    got, norm = gradclip.clip_grad_norm({"deep": make(a, b)}, 6.5)
    assert type(got["deep"]) is list
    check(xp, got["deep"][0], [1.5, 2.0], a)
    check(xp, got["deep"][1], [[6.0]], b)
    assert float(norm) == 13.0
    assert float(gradclip.global_norm(make(a, b))) == 13.0
    limited = gradclip.clip_grad_value(make(a, b), 3.5)
    assert type(limited) is list
    check(xp, limited[0], [3.0, 3.5], a)
    check(xp, limited[1], [[3.5]], b)


@pytest.mark.parametrize("make", ONE_SHOT.values(), ids=ONE_SHOT.keys())
def test_one_shot_iterators_in_place(xp, make):
    if not xp.in_place:
        with pytest.raises(gradclip.LeafError, match=r"^grads\[0\] .*gradclip\.clip_grad_norm\b"):
            gradclip.clip_grad_norm_(make(*two_leaves(xp)), 6.5)
        return
    a, b = two_leaves(xp)
    assert float(gradclip.clip_grad_norm_(make(a, b), 6.5)) == 13.0
    check(xp, a, [1.5, 2.0], a)
    check(xp, b, [[6.0]], b)


def test_a_path_through_an_iterator_has_an_index(xp):
    with pytest.raises(gradclip.LeafError, match=r"^grads\['x'\]\[1\] is the Python number 2"):
        gradclip.global_norm({"x": iter([two_leaves(xp)[0], 2])})


@pytest.mark.parametrize("tree", EMPTY.values(), ids=EMPTY.keys())
def test_empty_trees(tree):
    got, norm = gradclip.clip_grad_norm(tree, 1.0)
    assert same_shape(got, tree) == []
    assert float(norm) == 0.0
    assert norm.shape == ()
    assert same_shape(gradclip.clip_grad_value(tree, 1.0), tree) == []
    assert float(gradclip.clip_grad_norm_(tree, 0.0)) == 0.0
    assert gradclip.clip_grad_value_(tree, 0.0) is None


@pytest.mark.parametrize("p", [0, 0.5, 1, 2, 3, -1, float("inf"), float("-inf")])
def test_the_norm_of_nothing_is_zero(p):
    assert float(gradclip.global_norm([], p)) == 0.0
    got, norm = gradclip.clip_grad_norm({"a": None}, 0.0, p)
    assert got == {"a": None}
    assert float(norm) == 0.0


def test_a_single_array_is_a_tree(xp):
    x = xp.array([[3.0], [4.0]], "float32")
    got, norm = xp.clip_grad_norm(x, 2.5)
    check(xp, got, [[1.5], [2.0]], x)
    assert xp.dtype_of(norm) == "float32"
    assert float(norm) == 5.0
    check(xp, xp.clip_grad_value(x, 3.5), [[3.0], [3.5]], x)
    assert float(xp.global_norm(x)) == 5.0


def test_a_single_array_in_place(xp):
    x = xp.array([3.0, 4.0], "float32")
    if not xp.in_place:
        with pytest.raises(TypeError, match=r"^grads is .*gradclip\.clip_grad_norm\b"):
            gradclip.clip_grad_norm_(x, 2.5)
        check(xp, x, [3.0, 4.0], x)
        return
    assert float(gradclip.clip_grad_norm_(x, 2.5)) == 5.0
    check(xp, x, [1.5, 2.0], x)


def test_an_array_twice_counts_twice(xp):
    x, y = xp.array([1.0, 2.0, 4.0], "float32"), xp.array([2.0], "float32")
    tree = [x, {"again": x}, y]  # 2 * 21 + 4
    got, norm = xp.clip_grad_norm(tree, 1.0)
    exact.check_norm(norm, exact.norm(xp.back([x, x, y])), "float32")
    factor = float(1 / exact.norm(xp.back([x, x, y])))
    for leaf in (got[0], got[1]["again"]):
        check(xp, leaf, [factor, 2 * factor, 4 * factor], x)


def test_an_array_twice_is_scaled_once_in_place(xp):
    x, y = xp.array([3.0, 4.0], "float32"), xp.array([4.0, 0.0], "float32")
    if not xp.in_place:
        with pytest.raises(gradclip.LeafError, match=r"^grads\[0\] "):
            gradclip.clip_grad_norm_([x, x, y, x], 1.0)
        return
    norm = gradclip.clip_grad_norm_([x, {"x": x}, y], 1.0)  # 25 + 25 + 16
    factor = float(1 / exact.norm([np.float32([3, 4, 3, 4, 4])]))
    exact.check_norm(float(norm), exact.norm([np.float32([3, 4, 3, 4, 4])]), "float32")
    check(xp, x, [3 * factor, 4 * factor], x)
    check(xp, y, [4 * factor, 0.0], y)


@pytest.mark.parametrize("library", ["numpy", pytest.param("torch", marks=pytest.mark.full)])
def test_ten_thousand_leaves(library):
    module = pytest.importorskip(library)
    tree = {f"layer{i}": [module.ones((2, 2), dtype=module.float32)] for i in range(10_000)}
    got, norm = gradclip.clip_grad_norm(tree, 100.0)
    assert float(norm) == 200.0
    assert list(got) == list(tree)
    assert all(float(x.min()) == float(x.max()) == 0.5 for (x,) in got.values())
    got = gradclip.clip_grad_value(tree, 0.25)
    assert all(float(x.min()) == float(x.max()) == 0.25 for (x,) in got.values())
    assert float(gradclip.clip_grad_norm_(tree, 100.0)) == 200.0
    assert all(float(x.min()) == float(x.max()) == 0.5 for (x,) in tree.values())


def test_two_hundred_levels(xp):
    tree = leaf = xp.array([3.0, 4.0], "float32")
    for i in range(200):
        tree = [{"k": tree}, (tree,), [tree], Layer(tree, None)][i % 4]
    got, norm = gradclip.clip_grad_norm(tree, 2.5)
    assert float(norm) == 5.0
    ((out, _),) = same_shape(got, tree)
    check(xp, out, [1.5, 2.0], leaf)
    ((out, _),) = same_shape(gradclip.clip_grad_value(tree, 3.5), tree)
    check(xp, out, [3.0, 3.5], leaf)


@pytest.mark.library("numpy")
@pytest.mark.parametrize(
    "verb", [gradclip.norms, lambda g: gradclip.clip_grad_norm(g, 1.0), lambda g: gradclip.clip_grad_value(g, 1.0)]
)
def test_what_is_nested_too_deeply_is_told(verb):
    tree = np.ones(2)
    for _ in range(2 * sys.getrecursionlimit()):
        tree = [tree]
    with pytest.raises(ValueError, match=r"^grads is nested too deeply for Python's recursion limit: take some"):
        verb(tree)


def self_list(x: Any) -> Any:
    tree = [x]
    tree.append(tree)
    return tree


def self_dict(x: Any) -> Any:
    tree = {"x": x, "in": ({},)}
    tree["in"][0]["tree"] = tree
    return tree


def self_object(x: Any) -> Any:
    tree = OrderedDict(a=MyList([x]))
    tree["a"].append(tree)
    return tree


VERBS = {
    "global_norm": lambda tree: gradclip.global_norm(tree),
    "clip_grad_norm": lambda tree: gradclip.clip_grad_norm(tree, 1.0),
    "clip_grad_norm_": lambda tree: gradclip.clip_grad_norm_(tree, 1.0),
    "clip_grad_value": lambda tree: gradclip.clip_grad_value(tree, 1.0),
    "clip_grad_value_": lambda tree: gradclip.clip_grad_value_(tree, 1.0),
}
each_verb = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS.keys())


@each_verb
@pytest.mark.parametrize(
    ("make", "path"),
    [(self_list, "grads[1]"), (self_dict, "grads['in'][0]['tree']"), (self_object, "grads['a'][1]")],
)
def test_a_tree_that_contains_itself(verb, make, path):
    x = np.float32([3.0, 4.0])
    with pytest.raises(ValueError, match=f"^{re.escape(path)} contains itself"):
        verb(make(x))
    assert x.tolist() == [3.0, 4.0]


def test_a_container_in_two_places_is_no_cycle(xp):
    shared = [xp.array([3.0, 4.0], "float32")]
    got, norm = gradclip.clip_grad_norm({"a": shared, "b": [shared]}, 1.0)
    exact.check_norm(float(norm), exact.norm([np.float32([3, 4, 3, 4])]), "float32")
    assert xp.numpy(got["a"][0]).tolist() == xp.numpy(got["b"][0][0]).tolist()


# -- classes that JAX knows ----------------------------------------------------------------------------------


@pytest.mark.library("jax")
@pytest.mark.parametrize("leaves", ["numpy", "jax.numpy"])
def test_a_float0_leaf_counts_as_nothing_and_stays(leaves):
    jax = pytest.importorskip("jax")
    zero = np.zeros((2, 3), jax.dtypes.float0)
    x = pytest.importorskip(leaves).asarray(np.float32([3.0, 4.0]))
    tree = {"step": zero, "w": [x, zero]}
    got, norm = gradclip.clip_grad_norm(tree, 2.5)
    assert float(norm) == 5.0
    assert float(gradclip.global_norm(tree, 0)) == 2.0
    assert got["step"] is zero
    assert got["w"][1] is zero
    assert type(got["w"][0]) is type(x)
    assert np.asarray(got["w"][0]).tolist() == [1.5, 2.0]
    got, norm = gradclip.clip_grad_norm({"step": zero}, 1.0, nonfinite="error")
    assert got["step"] is zero
    assert float(norm) == 0.0


@pytest.mark.library("jax")
@pytest.mark.parametrize(
    "bound",
    [3.5, (-3.5, 3.5), {"step": 1.0, "w": 3.5}, {"step": None, "w": 3.5}],
    ids=["v", "pair", "tree", "none"],
)
@pytest.mark.parametrize("leaves", ["numpy", "jax.numpy"])
def test_a_float0_leaf_stays_in_clip_grad_value(leaves, bound):
    jax = pytest.importorskip("jax")
    zero = np.zeros((2, 3), jax.dtypes.float0)
    x = pytest.importorskip(leaves).asarray(np.float32([3.0, 4.0]))
    got = gradclip.clip_grad_value({"step": zero, "w": x}, bound)
    assert got["step"] is zero
    assert type(got["w"]) is type(x)
    assert np.asarray(got["w"]).tolist() == [3.0, 3.5]
    if leaves == "numpy":
        assert gradclip.clip_grad_value_({"step": zero, "w": x}, bound) is None
        assert x.tolist() == [3.0, 3.5]


@pytest.mark.library("jax")
def test_float0_gradients_from_jax():
    jax = pytest.importorskip("jax")
    tree = {"w": jax.numpy.asarray([3.0, 4.0]), "n": jax.numpy.asarray(2)}
    grads = jax.grad(lambda t: (t["w"] ** 2).sum() / 2, allow_int=True)(tree)
    got, norm = gradclip.clip_grad_norm(grads, 1.0)
    assert float(norm) == 5.0
    assert got["n"].dtype == jax.dtypes.float0
    assert isinstance(got["w"], jax.Array)
    np.testing.assert_allclose(np.asarray(got["w"]), np.float32([0.6, 0.8]), rtol=2.5e-7)


def dataclass_tree(jax: Any) -> Any:
    import dataclasses

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Params:
        weight: Any
        bias: Any
        rate: float = dataclasses.field(default=0.1, metadata={"static": True})

    return lambda a, b: Params(weight=a, bias=[b], rate=0.7), ".bias[0]"


def node_tree(jax: Any) -> Any:
    @jax.tree_util.register_pytree_node_class
    class Pair:
        def __init__(self, one: Any, two: Any, tag: str) -> None:
            self.one, self.two, self.tag = one, two, tag

        def tree_flatten(self) -> Any:
            return (self.one, self.two), self.tag

        @classmethod
        def tree_unflatten(cls, tag: str, children: Any) -> Pair:
            return cls(*children, tag)

    return lambda a, b: Pair(a, {"b": b}, "tag"), "[1]['b']"


def keyed_tree(jax: Any) -> Any:
    @jax.tree_util.register_pytree_with_keys_class
    class Box:
        def __init__(self, lid: Any, body: Any) -> None:
            self.lid, self.body = lid, body

        def tree_flatten_with_keys(self) -> Any:
            key = jax.tree_util.GetAttrKey
            return ((key("lid"), self.lid), (key("body"), self.body)), None

        @classmethod
        def tree_unflatten(cls, aux: None, children: Any) -> Box:
            return cls(*children)

    return lambda a, b: Box((a, None), Box(None, b)), ".body.body"


def lazy_array_tree(jax: Any) -> Any:
    """A container that also behaves like an array, as `flax.nnx.Param` does."""

    @jax.tree_util.register_pytree_node_class
    class Wrapped:
        def __init__(self, value: Any) -> None:
            self.value = value

        dtype = property(lambda self: self.value.dtype)
        shape = property(lambda self: self.value.shape)

        def __array__(self, *args: Any, **kwargs: Any) -> Any:
            return np.asarray(self.value)

        def __jax_array__(self) -> Any:
            return jax.numpy.asarray(self.value)

        def tree_flatten(self) -> Any:
            return (self.value,), None

        @classmethod
        def tree_unflatten(cls, aux: None, children: Any) -> Wrapped:
            return cls(*children)

    return lambda a, b: [Wrapped(a), Wrapped(b)], "[1][0]"


@pytest.mark.library("jax")
@pytest.mark.parametrize("leaves", ["numpy", "jax.numpy"])
@pytest.mark.parametrize("kind", [dataclass_tree, node_tree, keyed_tree, lazy_array_tree])
def test_registered_classes(kind, leaves):
    jax = pytest.importorskip("jax")
    make, path = kind(jax)
    lib = pytest.importorskip(leaves)
    tree = make(lib.asarray(np.float32([3.0, 4.0])), lib.asarray(np.float32([[12.0]])))
    flat, structure = jax.tree.flatten(tree)

    got, norm = gradclip.clip_grad_norm(tree, 6.5)
    out, out_structure = jax.tree.flatten(got)
    assert type(got) is type(tree)
    assert out_structure == structure
    assert float(norm) == 13.0
    assert [x.tolist() for x in out] == [[1.5, 2.0], [[6.0]]]
    assert [type(x) for x in out] == [type(x) for x in flat]
    assert [x.dtype for x in out] == [np.float32] * 2

    out, out_structure = jax.tree.flatten(gradclip.clip_grad_value(tree, 3.5))
    assert out_structure == structure
    assert [x.tolist() for x in out] == [[3.0, 3.5], [[3.5]]]

    if leaves == "numpy":
        gradclip.clip_grad_norm_(tree, 6.5)
        assert [x.tolist() for x in jax.tree.leaves(tree)] == [[1.5, 2.0], [[6.0]]]

    with pytest.raises(gradclip.LeafError, match=f"^{re.escape('grads' + path)} is an array of dtype int32"):
        gradclip.global_norm(make(lib.asarray(np.float32([1.0])), lib.asarray(np.int32([1]))))


@pytest.mark.library("jax")
def test_a_class_that_nobody_knows():
    pytest.importorskip("jax")

    class Unknown:
        pass

    with pytest.raises(gradclip.LeafError, match=r"^grads\['m'\] is a .*Unknown.*register"):
        gradclip.clip_grad_norm({"m": Unknown()}, 1.0)


@pytest.mark.library("jax")
def test_equinox_gradients():
    jax = pytest.importorskip("jax")
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
    grads = eqx.filter_grad(lambda m, x: (m(x) ** 2).sum())(model, jax.numpy.ones(2))
    want = exact.norm([np.asarray(x) for x in jax.tree.leaves(grads)])
    got, norm = gradclip.clip_grad_norm(grads, float(want) / 2)
    assert type(got) is eqx.nn.MLP
    assert jax.tree.structure(got) == jax.tree.structure(grads)
    exact.check_norm(float(norm), want, "float32")
    for g, x in zip(jax.tree.leaves(got), jax.tree.leaves(grads), strict=True):
        assert isinstance(g, jax.Array)
        assert (g.dtype, g.shape, g.sharding) == (x.dtype, x.shape, x.sharding)
        np.testing.assert_allclose(np.asarray(g), np.asarray(x) / 2, rtol=1e-6)
    updated = eqx.apply_updates(model, got)
    assert jax.tree.structure(updated) == jax.tree.structure(model)

    bad = eqx.tree_at(lambda m: m.layers[1].weight, grads, jax.numpy.ones((2, 4), int))
    with pytest.raises(gradclip.LeafError, match=r"^grads\.layers\[1\]\.weight is an array of dtype int32"):
        gradclip.clip_grad_value(bad, 1.0)


@pytest.mark.library("jax")
@pytest.mark.parametrize("frozen", [False, True])
def test_flax_linen_parameters(frozen):
    jax = pytest.importorskip("jax")
    linen = pytest.importorskip("flax.linen")
    core = pytest.importorskip("flax.core")
    model = linen.Dense(3)
    params = model.init(jax.random.key(0), jax.numpy.ones(2))
    grads = jax.grad(lambda p: (model.apply(p, jax.numpy.ones(2)) ** 2).sum())(params)
    grads = core.freeze(grads) if frozen else grads
    want = exact.norm([np.asarray(x) for x in jax.tree.leaves(grads)])
    got, norm = gradclip.clip_grad_norm(grads, float(want) / 4)
    assert type(got) is type(grads)
    assert jax.tree.structure(got) == jax.tree.structure(grads)
    assert list(got["params"]) == list(grads["params"])
    exact.check_norm(float(norm), want, "float32")
    for g, x in zip(jax.tree.leaves(got), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(np.asarray(g), np.asarray(x) / 4, rtol=1e-6)


@pytest.mark.library("jax")
@pytest.mark.parametrize("jitted", [False, True])
def test_flax_nnx_gradients(jitted):
    jax = pytest.importorskip("jax")
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.one = nnx.Linear(2, 2, rngs=rngs)
            self.two = nnx.Linear(2, 1, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.two(self.one(x))

    model = Model(nnx.Rngs(0))
    grads = nnx.grad(lambda m: (m(jax.numpy.ones(2)) ** 2).sum())(model)
    want = exact.norm([np.asarray(x) for x in jax.tree.leaves(grads)])
    clip = jax.jit(gradclip.clip_grad_norm) if jitted else gradclip.clip_grad_norm
    got, norm = clip(grads, float(want) / 2)
    exact.check_norm(float(norm), want, "float32")
    assert type(got) is type(grads) is nnx.State
    assert isinstance(got["one"]["kernel"], nnx.Param)
    assert jax.tree.structure(got) == jax.tree.structure(grads)
    for g, x in zip(jax.tree.leaves(got), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(np.asarray(g), np.asarray(x) / 2, rtol=1e-6)
    nnx.update(model, got)
    limited = gradclip.clip_grad_value(grads, 0.0)
    assert jax.tree.structure(limited) == jax.tree.structure(grads)
    assert all(not np.asarray(x).any() for x in jax.tree.leaves(limited))


@pytest.mark.library("jax")
def test_jax_registry_does_not_sort_a_plain_dict():
    jnp = pytest.importorskip("jax.numpy")
    tree = {"z": jnp.ones(2), "a": {"y": jnp.ones(1), "b": jnp.ones(1)}}
    got = gradclip.clip_grad_norm(tree, 1.0).grads
    assert list(got) == ["z", "a"]
    assert list(got["a"]) == ["y", "b"]


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds the same gradclip."""
    path = os.pathsep.join([str(Path(gradclip.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": path, **env},
    )


def test_a_process_with_numpy_alone_never_imports_another_library():
    code = """
import collections, sys, numpy as np, gradclip
Layer = collections.namedtuple("Layer", "w")
g = {"a": [Layer(np.ones(4)), None], "b": (np.ones(2, "f4"), np.ones(1, "c8"))}
gradclip.clip_grad_norm(g, 1.0, nonfinite="error"); gradclip.clip_grad_norm_(g, 0.5, 3.0)
del g["b"]
gradclip.clip_grad_value(g, 0.1); gradclip.clip_grad_value_(g, (-1, 1)); gradclip.global_norm(g, 1)
class Unknown: pass
for bad in (Unknown(), 1, "x", np.arange(3)):
    try:
        gradclip.clip_grad_norm([bad], 1.0)
    except gradclip.LeafError:
        pass
    else:
        raise SystemExit(f"{bad!r} was let in")
print(sorted({"jax", "cupy", "torch", "dask", "array_api_strict"} & set(sys.modules)))
"""
    done = run_python(code)
    assert (done.stdout, done.stderr) == ("[]\n", "")


# -- errors say where ----------------------------------------------------------------------------------------


@each_verb
@pytest.mark.parametrize(
    ("make", "path"),
    [
        (lambda x, bad: bad, "grads"),
        (lambda x, bad: [x, bad], "grads[1]"),
        (lambda x, bad: {"encoder": [x, x, None, Layer(bad, x)]}, "grads['encoder'][3].weight"),
        (lambda x, bad: {("a", 1): {2: Old((x, bad))}}, "grads[('a', 1)][2].kernel[1]"),
        (lambda x, bad: default(z=MyList([bad])), "grads['z'][0]"),
        (lambda x, bad: MyDict("tag", it=OrderedDict(k=bad)), "grads['it']['k']"),
    ],
    ids=["root", "list", "nested", "odd-keys", "default", "subclass"],
)
def test_key_paths_read_like_python(verb, make, path):
    x = np.float32([3.0, 4.0])
    with pytest.raises(gradclip.LeafError, match=f"^{re.escape(path)} is the Python number 7: ") as caught:
        verb(make(x, 7))
    assert isinstance(caught.value, TypeError)
    assert x.tolist() == [3.0, 4.0]


def scipy_sparse(kind: str) -> Any:
    return getattr(pytest.importorskip("scipy.sparse"), kind)(np.eye(3))


def torch_leaf(make: Any) -> Any:
    return make(pytest.importorskip("torch"))


def jax_leaf(make: Any) -> Any:
    return make(pytest.importorskip("jax"))


def bcoo(jax: Any) -> Any:
    return pytest.importorskip("jax.experimental.sparse").BCOO.fromdense(jax.numpy.eye(3))


def nested(torch: Any, **layout: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it is a prototype
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], **layout)


def jagged(torch: Any) -> Any:
    return nested(torch, layout=torch.jagged)


def masked(torch: Any) -> Any:
    module = pytest.importorskip("torch.masked")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, too
        return module.masked_tensor(torch.ones(2), torch.tensor([True, False]))


def box() -> Any:
    """What HIPS autograd hands to a function whose gradient it takes."""
    boxes: list[Any] = []
    pytest.importorskip("autograd").grad(lambda x: boxes.append(x) or x.sum())(np.ones(2))
    return boxes[0]


class Odd:
    """An array of a library that has a namespace and little else, as MLX's and autograd's boxes are."""

    shape, ndim, size, dtype = (2,), 1, 2, np.dtype("float32")

    def __array_namespace__(self, api_version: Any = None) -> Any:
        return math


class OddWithoutNamespace(Odd):
    def __array_namespace__(self, api_version: Any = None) -> Any:
        raise NotImplementedError


class OddOnDevice(Odd):
    device = "cpu"


#: a leaf, what the error calls it, and a word of the repair
BAD_LEAVES = {
    "bool": (lambda: True, "the Python number True", "asarray"),
    "int": (lambda: 3, "the Python number 3", "asarray"),
    "float": (lambda: 1.5, r"the Python number 1\.5", "asarray"),
    "complex": (lambda: 2j, "the Python number 2j", "asarray"),
    "str": (lambda: "w", "the str 'w'", "None"),
    "bytes": (lambda: b"w", "the bytes b'w'", "None"),
    "object": (object, r"a builtins\.object", "register"),
    "class": (lambda: int, r"the class builtins\.int", "not its class"),
    "numpy-class": (lambda: np.float64, r"the class numpy\.float64", "not its class"),
    "array-class": (lambda: np.ndarray, r"the class numpy\.ndarray", "not its class"),
    "torch-class": (lambda: torch_leaf(lambda t: t.nn.Parameter), r"the class torch\..*Parameter", "not its class"),
    "jax-class": (lambda: jax_leaf(lambda j: j.numpy.float32), r"the class jax\..*float32", "not its class"),
    "set": (lambda: {1.0}, r"a builtins\.set", "lists"),
    "range": (lambda: range(3), r"a builtins\.range", "lists"),
    "function": (lambda: len, "a builtins.*function", "lists"),
    "dtype": (lambda: np.dtype("f4"), "a numpy.*", "lists"),
    "int-array": (lambda: np.arange(3), "an array of dtype int64", "cast"),
    "uint8-array": (lambda: np.zeros(3, np.uint8), "an array of dtype uint8", "cast"),
    "bool-array": (lambda: np.zeros(3, bool), "an array of dtype bool", "cast"),
    "numpy-int": (lambda: np.int32(3), "an array of dtype int32", "cast"),
    "numpy-bool": (lambda: np.True_, "an array of dtype bool", "cast"),
    "object-array": (lambda: np.array([1.0, None]), "an array of dtype object", "cast"),
    "string-array": (lambda: np.array(["a", "b"]), "an array of dtype str", "None"),
    "datetime-array": (lambda: np.zeros(2, "M8[s]"), "an array of dtype datetime64", "None"),
    "structured-array": (lambda: np.zeros(2, "f4,f4"), "an array of dtype void", "None"),
    "empty-int-array": (lambda: np.zeros(0, int), "an array of dtype int64", "cast"),
    "masked": (lambda: np.ma.array([1.0, 2.0], mask=[0, 1]), "a masked array", "filled"),
    "masked-constant": (lambda: np.ma.masked, "a masked array", "filled"),
    "matrix": (lambda: np.ones((2, 2)).view(np.matrix), r"a numpy\.matrix", r"numpy\.asarray\(x\)"),
    "csr_array": (lambda: scipy_sparse("csr_array"), "a sparse array", "dense"),
    "csr_matrix": (lambda: scipy_sparse("csr_matrix"), "a sparse array", "dense"),
    "coo_array": (lambda: scipy_sparse("coo_array"), "a sparse array", "dense"),
    "torch-sparse": (lambda: torch_leaf(lambda t: t.eye(3).to_sparse()), "a sparse array", "dense"),
    "torch-nested": (
        lambda: torch_leaf(nested),
        r"a tensor \(torch\.Tensor\) of layout torch\.strided, nested",
        "unbind",
    ),
    "torch-jagged": (lambda: torch_leaf(jagged), r"a tensor .* of layout torch\.jagged, nested", "unbind"),
    "torch-mkldnn": (
        lambda: torch_leaf(lambda t: t.ones(3).to_mkldnn()),
        "a tensor .* of layout torch._mkldnn",
        "dense",
    ),
    "no-device": (Odd, r"of type test_tree\.Odd, which does not speak .* has no attribute 'device'", "convert"),
    "no-namespace": (
        OddWithoutNamespace,
        r"of type .*Namespace, which does not speak .*\(NotImplementedError",
        "NumPy",
    ),
    "no-functions": (OddOnDevice, r"of type .*OddOnDevice, which does not speak .*astype, where", "convert"),
    "torch-masked": (lambda: torch_leaf(masked), "a masked array", r"to_tensor\(0\)"),
    "mlx": (
        lambda: pytest.importorskip("mlx.core").ones(2),
        r"of type mlx\.core\.array, which does not speak",
        "NumPy",
    ),
    "autograd": (box, r"of type autograd\.numpy\.numpy_boxes\.ArrayBox, which does not speak", "NumPy"),
    "torch-parameter": (
        lambda: torch_leaf(lambda t: t.nn.Parameter(t.ones(3))),
        "a torch Parameter",
        r"\.grad",
    ),
    "torch-int": (lambda: torch_leaf(lambda t: t.arange(3)), "an array of dtype int64", "cast"),
    "torch-bool": (lambda: torch_leaf(lambda t: t.zeros(3, dtype=t.bool)), "an array of dtype bool", "cast"),
    "torch-module": (lambda: torch_leaf(lambda t: t.nn.Linear(2, 2)), "a torch.*Linear", "arrays"),
    "jax-int": (lambda: jax_leaf(lambda j: j.numpy.arange(3)), "an array of dtype int32", "cast"),
    "jax-bool": (lambda: jax_leaf(lambda j: j.numpy.zeros(3, bool)), "an array of dtype bool", "cast"),
    "jax-key": (lambda: jax_leaf(lambda j: j.random.key(0)), "an array of dtype key", "None"),
    "jax-shape": (lambda: jax_leaf(lambda j: j.ShapeDtypeStruct((3,), "float32")), "a jax.*Struct", "arrays"),
    "jax-sparse": (lambda: jax_leaf(bcoo), "a sparse array", "dense"),
}


@each_verb
@pytest.mark.parametrize(("make", "what", "repair"), BAD_LEAVES.values(), ids=BAD_LEAVES.keys())
def test_a_leaf_that_is_no_gradient(verb, make, what, repair):
    bad, x = make(), np.float32([3.0, 4.0])
    with pytest.raises(gradclip.LeafError, match=rf"^grads\['encoder'\]\[3\]\.weight is {what}.*: .*{repair}"):
        verb({"encoder": [x, None, x, Layer(weight=bad, bias=x)]})
    assert x.tolist() == [3.0, 4.0]


@each_verb
def test_a_matrix_is_refused_beside_arrays_of_its_dtype(verb):
    """Kinds of leaves that are good are remembered: a matrix is not, whatever was seen before it."""
    x = np.full((2, 2), 0.125)
    for _ in range(2):
        verb([x, x.copy()])
        with pytest.raises(gradclip.LeafError, match=r"^grads\[1\] is a numpy\.matrix: .*numpy\.asarray"):
            verb([x, x.view(np.matrix)])
        with pytest.raises(gradclip.LeafError, match=r"^grads\[0\] is a numpy\.matrix: .*numpy\.asarray"):
            verb([x.view(np.matrix)])
    assert x.tolist() == [[0.125] * 2] * 2


def test_a_clipped_is_no_gradient():
    """Its norm would count as a leaf: the norm of what was clipped to 1 came out as 50.01."""
    x = np.float32([30.0, 40.0])
    done = gradclip.clip_grad_norm([x], 1.0)
    match = r"is a Clipped, what a clip has returned, .*: unpack it: grads, norm = \.\.\.$"
    for verb in (
        gradclip.global_norm,
        gradclip.norms,
        lambda t: gradclip.clip_grad_norm(t, 1.0),
        lambda t: gradclip.clip_grad_norm_(t, 1.0),
        lambda t: gradclip.clip_grad_value(t, 0.1),
        lambda t: gradclip.clip_grad_value_(t, 0.1),
    ):
        with pytest.raises(gradclip.LeafError, match=rf"^grads {match}"):
            verb(done)
        with pytest.raises(gradclip.LeafError, match=rf"^grads\['step'\]\[0\] {match}"):
            verb({"step": [done]})
    grads, norm = done
    assert float(norm) == 50.0
    np.testing.assert_allclose(grads[0], [0.6, 0.8], rtol=1e-6)


def test_errors_survive_pickle_and_copy():
    """Also on the way out of a process."""
    with pytest.raises(
        gradclip.NonFiniteError, match=r"grads\['w'\] \(float64, shape \(3,\)\): 1 NaN, 1 inf"
    ) as caught:
        fails(None)
    error = caught.value
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        from_afar = pool.submit(fails, None).exception(timeout=120)
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error), from_afar):
        assert type(other) is gradclip.NonFiniteError
        assert str(other) == str(error)
        assert other.culprits == error.culprits == (gradclip.Culprit("grads['w']", "float64, shape (3,)", 1, 1),)
    with pytest.raises(gradclip.LeafError, match="the Python number 3") as caught:
        gradclip.global_norm([3])
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def fails(_: None) -> Any:
    return gradclip.clip_grad_norm({"w": np.array([math.nan, math.inf, 1.0])}, 1.0, nonfinite="error")


EXHAUSTED = {
    "iterator": lambda: iter([]),
    "generator": lambda: (x for x in ()),
    "map": lambda: map(abs, []),
}


@pytest.mark.parametrize("make", EXHAUSTED.values(), ids=EXHAUSTED.keys())
def test_an_iterator_that_gives_nothing_warns(make):
    for verb in (gradclip.global_norm, lambda g: gradclip.clip_grad_norm(g, 1.0).norm):
        with pytest.warns(UserWarning, match="an iterator that gives nothing, .*: was it read before"):
            assert float(verb(make())) == 0.0
    with pytest.warns(UserWarning, match="an iterator that gives nothing"):
        gradclip.clip_grad_norm({"a": make(), "b": np.ones(2)}, 1.0)
    for nested in (make(), [{"a": make()}]):  # the warning shows the caller's line, however deep it arose
        with pytest.warns(UserWarning, match="an iterator that gives nothing") as caught:
            gradclip.clip_grad_norm_(nested, 1.0)
        assert [warning.filename for warning in caught] == [__file__]
    for empty in ([], {}, {}.values(), {}.keys(), ()):  # nothing was lost here
        assert float(gradclip.global_norm(empty)) == 0.0


@pytest.mark.library("torch")
@pytest.mark.parametrize("verb", [gradclip.clip_grad_norm_, gradclip.clip_grad_value_])
def test_tensors_that_torch_writes_to_no_more(verb):
    """Nothing is written to the others."""
    torch = pytest.importorskip("torch")
    with torch.inference_mode():
        old = torch.full((2,), 3.0)
        verb([old.clone()], 1.0)
    weights = torch.full((3,), 3.0, requires_grad=True)
    for tensor, what in ((old, "is a tensor of torch's inference mode"), (weights[:2], "is a variable .*view of one")):
        first = torch.full((2,), 3.0)
        with pytest.raises(gradclip.LeafError, match=rf"^grads\[1\] {what}.*cannot be clipped in place"):
            verb([first, tensor], 1.0)
        assert first.tolist() == [3.0, 3.0]
    verb([weights.detach()[:2], (2 * weights)[:2]], 1.0)
    assert weights[0] < 1.01 < weights[2]


@pytest.mark.full
def test_sharded_tensors_beside_plain_ones_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    distributed = pytest.importorskip("torch.distributed.tensor")
    with process_group(tmp_path / "store"):
        mesh = distributed.DeviceMesh("cpu", [0])
        sharded = distributed.distribute_tensor(torch.full((4,), 2.0), mesh, [distributed.Shard(0)])
        with pytest.raises(
            gradclip.LeafError, match=r"^grads\[0\] is a torch DTensor array and grads\[1\] a torch array"
        ):
            gradclip.clip_grad_norm([sharded, torch.ones(2)], 1.0)
        grads, norm = gradclip.clip_grad_norm([sharded], 1.0)
        assert float(norm.full_tensor()) == 4.0
        assert grads[0].full_tensor().tolist() == [0.5] * 4


def test_a_class_is_no_bound():
    for wrong in (np.float64, float, np.ndarray):
        with pytest.raises(TypeError, match=r"^max_norm must be a number >= 0 or a 0-d real array, got <class '"):
            gradclip.clip_grad_norm([np.ones(2)], wrong)
        with pytest.raises(TypeError, match=r"^clip_value must be a real number or array, .*, got <class '"):
            gradclip.clip_grad_value([np.ones(2)], wrong)


def test_the_parameters_of_a_torch_module_are_refused():
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(2, 2)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(gradclip.LeafError, match=r"^grads\[0\] is a torch Parameter: .*p\.grad"):
        gradclip.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(gradclip.LeafError, match=r"^grads\['weight'\] is a torch Parameter: .*p\.grad"):
        gradclip.clip_grad_value_(dict(model.named_parameters()), 1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    model(torch.ones(2)).sum().backward()
    norm = gradclip.clip_grad_norm_((p.grad for p in model.parameters()), 1.0)
    exact.check_norm(float(norm), exact.norm([np.ones(6, np.float32)]), "float32")


def mixed(one: str, two: str) -> Any:
    return [pytest.importorskip(name).asarray(np.float32([3.0, 4.0])) for name in (one, two)]


@each_verb
@pytest.mark.parametrize(
    ("one", "two"),
    [("numpy", "torch"), ("torch", "jax.numpy"), ("numpy", "array_api_strict"), ("jax.numpy", "torch")],
)
def test_libraries_that_cannot_mix(verb, one, two):
    a, b = mixed(one, two)
    names = [name.removesuffix(".numpy") for name in (one, two)]
    match = rf"^grads\['a'\] is a {names[0]} array and grads\['b'\]\[0\] a {names[1]} array.*[Cc]onvert"
    with pytest.raises(gradclip.LeafError, match=match):
        verb({"a": a, "b": [b], "c": a})
    assert np.from_dlpack(a).tolist() == np.from_dlpack(b).tolist() == [3.0, 4.0]


@pytest.mark.library("jax")
def test_numpy_beside_jax_is_jax():
    jax = pytest.importorskip("jax")
    for tree in (mixed("numpy", "jax.numpy"), mixed("jax.numpy", "numpy")):
        got, norm = gradclip.clip_grad_norm(tree, 1.0)
        assert all(isinstance(x, jax.Array) for x in (*got, norm))
        exact.check_norm(float(norm), exact.norm([np.float32([3, 4, 3, 4])]), "float32")
        assert [x.dtype for x in got] == [np.float32] * 2
        kept = gradclip.clip_grad_norm(tree, 100.0).grads
        assert all(isinstance(x, jax.Array) for x in kept)
        assert [x.tolist() for x in kept] == [[3.0, 4.0]] * 2
        limited = gradclip.clip_grad_value(tree, 3.5)
        assert all(isinstance(x, jax.Array) for x in limited)
        assert [x.tolist() for x in limited] == [[3.0, 3.5]] * 2
        with pytest.raises(gradclip.LeafError, match=r"JAX.*clip_grad_norm\b"):
            gradclip.clip_grad_norm_(tree, 1.0)


@pytest.mark.library("jax")
@pytest.mark.parametrize("x64", [False, True])
def test_numpy_float64_beside_jax_is_what_jax_makes_of_it(x64):
    jax = pytest.importorskip("jax")
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", x64)
    try:
        tree = [np.array([3.0, 4.0]), jax.numpy.float32([0.0])]
        for bound in (1.0, 10.0):
            got, norm = gradclip.clip_grad_norm(tree, bound)
            assert [x.dtype for x in got] == [np.float64 if x64 else np.float32, np.float32]
            assert got[0].dtype == jax.numpy.asarray(tree[0]).dtype == norm.dtype
            np.testing.assert_allclose(got[0], [0.6, 0.8] if bound == 1.0 else [3.0, 4.0], rtol=1e-6)
    finally:
        jax.config.update("jax_enable_x64", before)


def test_a_memory_mapped_leaf_comes_back_itself(tmp_path):
    x = np.memmap(tmp_path / "x", dtype=np.float32, mode="w+", shape=(4,))
    x[:] = [3.0, 4.0, 0.0, 0.0]
    got, norm = gradclip.clip_grad_norm([x], 5.0)
    assert float(norm) == 5.0
    assert got[0] is x
    assert gradclip.clip_grad_norm([x], 2.5).grads[0].tolist() == [1.5, 2.0, 0.0, 0.0]
    gradclip.clip_grad_norm_([x], 2.5)
    assert x.tolist() == [1.5, 2.0, 0.0, 0.0]


def refused(call):
    """The call, which must raise; the error, whose traceback would hold the gradients, is let go."""

    def attempt(tree):
        with contextlib.suppress(gradclip.LeafError, gradclip.NonFiniteError):
            call(tree)
            raise AssertionError("not refused")

    return attempt


@pytest.mark.parametrize(
    "call",
    [
        gradclip.global_norm,
        lambda tree: gradclip.clip_grad_norm(tree, 0.5),
        lambda tree: gradclip.clip_grad_norm_(tree, 0.5),
        lambda tree: gradclip.clip_grad_norm(tree, 0.5, 3, all_reduce=lambda partial, op: partial),
        lambda tree: gradclip.clip_grad_value(tree, {"a": (-0.5, 1.0)}),
        lambda tree: gradclip.clip_grad_value_(tree, 0.5),
        refused(lambda tree: gradclip.global_norm([tree, 1])),
        refused(lambda tree: gradclip.clip_grad_norm(tree, 1.0, norm=float("inf"), nonfinite="error")),
    ],
)
def test_gradients_are_let_go_without_the_garbage_collector(call):
    """Nothing that a call leaves behind is in a cycle with the gradients: their memory is free when the caller's is."""
    gc.disable()
    try:
        x = np.ones(3)
        gone = weakref.ref(x)
        call({"a": [x, (x, None)]})
        del x
        assert gone() is None
    finally:
        gc.enable()

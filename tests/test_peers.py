"""What the tests of other libraries ask of their clips, as tables of inputs and expected values, on every backend.

Read in optax 0.2.8 (transforms/_clipping_test.py), and in Keras (src/optimizers/optimizer_test.py), TensorFlow
(kernel_tests/math_ops/clip_ops_test.py) and jax_privacy (tests/clipping_test.py) as of 2026, and written anew. Where
gradclip differs, the test says how. Not asked here: IndexedSlices and integers (TensorFlow); gradclip refuses both.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import exact
from backends import Backend, leaves, np_dtype
from gradclip import Units

INF, NAN = math.inf, math.nan
ROOT = math.sqrt(0.5)


def f32(*values: Any) -> np.ndarray:
    return np.array(values, np.float32)


X = f32([-3, 0, 0], [4, 0, 0])
Y = f32([-3, 0, 0], [4, 0, 3])
PAIR = [f32([-2, 0, 0], [4, 0, 0]), f32(1, -2)]

#: name: the gradients, the bound, how, what comes back, and the norm.
CLIPS: dict[str, tuple[list[Any], Any, dict[str, Any], list[Any], Any]] = {
    "TF clip_by_norm": ([X], 4.0, {"per": "leaf"}, [[[-2.4, 0, 0], [3.2, 0, 0]]], [5]),
    "TF clip_by_norm, not clipped": ([X], 6.0, {"per": "leaf"}, [X], [5]),
    "TF clip_by_norm, zeros": ([0 * X], 6.0, {"per": "leaf"}, [0 * X], [0]),
    "TF clip_by_norm, axes [0]": ([Y], 4.0, {"per": "unit"}, [[[-2.4, 0, 0], [3.2, 0, 3]]], [[[5, 0, 3]]]),
    "TF clip_by_norm, axes [1]": ([Y], 4.0, {"per": Units(0)}, [[[-3, 0, 0], [3.2, 0, 2.4]]], [[[3], [5]]]),
    "TF clip_by_norm, axes [1], not clipped": ([Y], 6.0, {"per": Units(0)}, [Y], [[[3], [5]]]),
    "TF clip_by_global_norm": (PAIR, 4.0, {}, [[[-1.6, 0, 0], [3.2, 0, 0]], [0.8, -1.6]], 5),
    "TF clip_by_global_norm, not clipped": (PAIR, 6.0, {}, PAIR, 5),
    "TF clip_by_global_norm, zeros": ([0 * X, f32(0, 0)], 6.0, {}, [0 * X, f32(0, 0)], 0),
    "TF clip_by_global_norm, inf": ([f32(1, INF), f32(1)], 6.0, {}, [[NAN, NAN], [NAN]], INF),
    "Keras clipnorm": ([f32(100, 100)], 1.0, {"per": "leaf"}, [[ROOT, ROOT]], [100 / ROOT]),
    "Keras global_clipnorm": ([f32(50, 100)], 1.0, {}, [[0.2**0.5, 0.8**0.5]], 12500**0.5),
}


@pytest.mark.parametrize("name", CLIPS)
def test_clips(xp: Backend, name: str) -> None:
    grads, bound, how, want, norm = CLIPS[name]
    out = xp.clip_grad_norm(xp.tree(grads), bound, **how)
    for got, right in zip(out.grads, want, strict=True):
        np.testing.assert_allclose(xp.numpy(got), right, rtol=1e-6)
    for got, right in zip(leaves(out.norm), norm if isinstance(norm, list) else [norm], strict=True):
        np.testing.assert_allclose(xp.numpy(got), right, rtol=1e-6)


def test_none_among_the_gradients(xp: Backend) -> None:
    """TensorFlow's clip_by_global_norm supports None."""
    out = xp.clip_grad_norm([xp.array(PAIR[0]), None, xp.array(PAIR[1]), None], 4.0)
    assert out.grads[1] is out.grads[3] is None
    np.testing.assert_allclose(xp.numpy(out.grads[2]), [0.8, -1.6], rtol=1e-6)


#: name: the gradients, the bounds, what comes back.
VALUES: dict[str, tuple[Any, Any, Any]] = {
    "TF": (f32([-5, 2, 3], [4, 5, 6]), 4.4, [[-4.4, 2, 3], [4, 4.4, 4.4]]),
    "TF, numbers": (f32([1, 2, 3], [4, 5, 6]), (2.0, 4.0), [[2, 2, 3], [4, 4, 4]]),
    "TF, array and number": (f32([1, 2, 3], [4, 5, 6]), (f32([2, 2, 2], [3, 3, 3]), 4.0), [[2, 2, 3], [4, 4, 4]]),
    "TF, number and array": (f32([1, 2, 3], [4, 5, 6]), (4.0, f32([6, 6, 6], [6, 6, 6])), [[4, 4, 4], [4, 5, 6]]),
    "TF, arrays": (
        f32([1, 2, 3], [4, 5, 6]),
        (f32([2, 2, 2], [5, 5, 5]), f32([5, 5, 5], [7, 7, 7])),
        [[2, 2, 3], [5, 5, 6]],
    ),
    "TF, not finite": (f32(NAN, INF, -INF), 4.0, [NAN, 4, -4]),
    "Keras clipvalue": (f32(100, 100), 1.0, [1, 1]),
    "optax clip": (f32(500, 5), 1.0, [1, 1]),
    "optax clip, wide": (f32(500, 5), 1e6, [500, 5]),
}


@pytest.mark.parametrize("name", VALUES)
def test_values(xp: Backend, name: str) -> None:
    x, bounds, want = VALUES[name]
    bounds = tuple(xp.array(b) if isinstance(b, np.ndarray) else b for b in bounds) if type(bounds) is tuple else bounds
    (out,) = xp.clip_grad_value([xp.array(x)], bounds)
    np.testing.assert_allclose(xp.numpy(out), want, rtol=1e-7)


@pytest.mark.library("numpy")
def test_bounds_of_a_nonsensical_shape() -> None:
    import gradclip

    x = f32(-3, 0, 0, 4, 0, 0).reshape(2, 3, 1)
    with pytest.raises(
        ValueError, match=r"^max_norm must be a number >= 0 or a 0-d array, got an array of shape \(2,\)"
    ):
        gradclip.clip_grad_norm([x], f32(1, 2), per="leaf")
    with pytest.raises(ValueError, match=r"does not broadcast to the gradient's shape \(2, 3, 1\)$"):
        gradclip.clip_grad_value([x], (1.0, f32(1, 2)))


# -- optax -------------------------------------------------------------------------------------------------------

UPDATES, PARAMS = [f32(500, 5), f32(300, 3)], [f32(1, 2), f32(3, 4)]


def rms(x: np.ndarray) -> float:
    return float(exact.norm([x], "rms"))


def norms_of(updates: list[np.ndarray], p: Any) -> list[float]:
    """What optax bounds: the root mean square of each leaf, or the global norm."""
    return [rms(x) for x in updates] if p == "rms" else [float(exact.norm(updates))]


@pytest.mark.parametrize(("p", "per"), [("rms", "leaf"), (2.0, None)], ids=["block rms", "global norm"])
def test_clipped_again_and_again(xp: Backend, p: Any, per: Any) -> None:
    """To falling bounds: at the bound each time, and as if clipped to the last one at once."""
    updates = xp.tree(UPDATES)
    for i in (*range(1, 6), 50):
        updates = xp.clip_grad_norm(updates, 1 / i, p, per=per).grads
        for got in norms_of([xp.numpy(x) for x in updates], p):
            assert got == pytest.approx(1 / i, rel=2e-7)
        for again, once in zip(updates, xp.clip_grad_norm(xp.tree(UPDATES), 1 / i, p, per=per).grads, strict=True):
            np.testing.assert_allclose(xp.numpy(again), xp.numpy(once), rtol=1e-6)


def test_adaptive_grad_clip(xp: Backend) -> None:
    """optax's axes: all of a leaf of 1 dimension, all but the last of one of 2, 4 and 5 (of 3: only the first)."""
    updates = xp.tree(UPDATES)
    for i in (*range(1, 6), 50):
        updates = xp.clip_grad_agc(updates, xp.tree(PARAMS), 1 / i).grads
        for u, w, whole in zip(updates, PARAMS, UPDATES, strict=True):
            bound = float(exact.norm([w])) / i
            np.testing.assert_allclose(xp.numpy(u), whole * (bound / float(exact.norm([whole]))), rtol=1e-6)
    grads, ones = f32([1, 2], [3, 4]), np.ones((2, 2), np.float32)
    (out,) = xp.clip_grad_agc([xp.array(grads)], [xp.array(ones)], 1.0).grads
    np.testing.assert_allclose(xp.numpy(out), grads * np.sqrt([2 / 10, 2 / 20]), rtol=1e-6)


def test_adaptive_grad_clip_of_kernels(xp: Backend) -> None:
    """A norm for each pair of input and output channels (optax's axis=(0, 1, 2)) is not to be had: one axis is kept."""
    for shape in ((2, 2, 2, 3, 4), (5, 6), (1, 2, 1, 2, 1, 2)):
        ones = np.ones(shape, np.float32)
        (out,) = xp.clip_grad_agc([xp.array(2 * ones)], [xp.array(ones)], 0.5).grads
        np.testing.assert_allclose(xp.numpy(out), 0.5 * ones, rtol=1e-6)
        (same,) = xp.clip_grad_agc([xp.array(ones / 10)], [xp.array(ones)], 2.0).grads
        assert xp.numpy(same).tobytes() == (ones / 10).tobytes()


EXAMPLES = [f32([0, -0.5], [3, 4], [5, 6], [0, 0]), f32([0], [5], [-3], [0])]
LAYERS = [f32([0.5], [1.5], [-2], [3]), np.ones((4, 3, 3, 2), np.float32)]


def test_per_example_global_norm_clip(xp: Backend) -> None:
    """optax counts the clipped examples; the norms tell that, too."""
    total, norm = xp.clipped_sum(xp.tree(EXAMPLES), 1.0)
    want = np.array([0, -0.5]) + np.array([3, 4]) / 50**0.5 + np.array([5, 6]) / 70**0.5
    np.testing.assert_allclose(xp.numpy(total[0]), want, atol=4e-6)
    np.testing.assert_allclose(xp.numpy(total[1]), [5 / 50**0.5 - 3 / 70**0.5], atol=4e-6)
    assert int((xp.numpy(norm) > 1).sum()) == 2


@pytest.mark.parametrize(("bounds", "first", "second", "counts"), [
    ([1.0, 1.0], 1.5, 4 / 18**0.5, [3, 4]),
    ([1.0, 18**0.5], 1.5, 4.0, [3, 0]),
], ids=["uniform", "scaled"])  # fmt: skip
def test_per_example_layer_norm_clip(
    xp: Backend, bounds: list[float], first: float, second: float, counts: list[int]
) -> None:
    """A sum for each layer, with a bound of its own: optax takes the parts of one global bound."""
    for x, bound, want, count in zip(LAYERS, bounds, [first, second], counts, strict=True):
        (total,), norm = xp.clipped_sum([xp.array(x)], bound)
        np.testing.assert_allclose(xp.numpy(total), np.full(x.shape[1:], want), rtol=4e-6)
        assert int((xp.numpy(norm) > np.float32(bound)).sum()) == count


# -- jax_privacy -------------------------------------------------------------------------------------------------


def grid(xp: Backend, like: float | None = None) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    dtypes = ["float16", "float32", "bfloat16" if xp.has("bfloat16") else "float32"]
    dtypes = [d if xp.has(d) else "float32" for d in dtypes]
    shapes = [(10,), (5, 5), ()]
    mixed = {k: rng.standard_normal(s).astype(np_dtype(d)) for k, s, d in zip("abc", shapes, dtypes, strict=True)}
    trees = [{"x": rng.standard_normal((5, 5)).astype(np.float32)}, mixed]
    return trees if like is None else [{k: np.full_like(x, like) for k, x in tree.items()} for tree in trees]


@pytest.mark.parametrize("bound", [0.0, 1.0, 2.0, INF])
def test_the_clip_grid(xp: Backend, bound: float) -> None:
    """dtypes stay, the norm is bounded, zeros stay zeros. Theirs may end above the bound, by rounding."""
    for tree in (*grid(xp), *grid(xp, 0.0)):
        out = xp.clip_grad_norm(xp.tree(tree), bound)
        got = {k: xp.numpy(x) for k, x in out.grads.items()}
        assert {k: (x.dtype, x.shape) for k, x in got.items()} == {k: (x.dtype, x.shape) for k, x in tree.items()}
        exact.check_norm(xp.numpy(out.norm), exact.norm(tree.values()), "float32")
        eps = max(2.0 ** -exact.FORMATS[x.dtype.name][0] for x in tree.values())
        assert exact.norm(got.values()) <= bound * (1 + 2 * eps)
        alone = {k: np.asarray(x)[None] for k, x in tree.items()}
        total = [xp.numpy(x) for x in xp.clipped_sum(xp.tree(alone), bound).sum.values()]
        assert exact.norm(total) <= bound


def test_a_large_bound_changes_nothing(xp: Backend) -> None:
    for tree in grid(xp):
        out = xp.clip_grad_norm(xp.tree(tree), float(exact.norm(tree.values())) * 1.5)
        assert {k: xp.numpy(x).tobytes() for k, x in out.grads.items()} == {k: x.tobytes() for k, x in tree.items()}


@pytest.mark.parametrize("bad", [[NAN], [INF, -INF]])
@pytest.mark.parametrize("bound", [0.0, 1.0, 2.0, INF])
def test_what_is_not_finite(xp: Backend, bound: float, bad: list[float]) -> None:
    """jax_privacy puts 0 in the place of such an element, and clips the rest: here the whole example adds nothing."""
    x = f32(3, 0, *bad, 2)
    out = xp.clip_grad_norm([xp.array(x)], bound, nonfinite="zero")
    assert not xp.numpy(out.grads[0]).any()
    assert not xp.numpy(xp.clipped_sum([xp.array(x[None])], bound).sum[0]).any()


def test_sensitivity(xp: Backend) -> None:
    """One example more, less, or another one, moves the sum by at most c, c and 2 c, beside the rounding of the sum."""
    rng = np.random.default_rng(0)
    data = rng.standard_normal((15, 4)).astype(np.float32)
    neighbour = data.copy()
    neighbour[3] = [-10, 10, 20, 20]
    absent = data.copy()
    absent[3] = NAN  # adds zeros: a padding example
    whole, other, less = (xp.numpy(xp.clipped_sum([xp.array(x)], 1.0).sum[0]) for x in (data, neighbour, absent))
    fewer = xp.numpy(xp.clipped_sum([xp.array(np.delete(data, 3, axis=0))], 1.0).sum[0])
    rounding = 15 * 4 * 2.0**-24
    assert exact.norm([whole - other]) <= 2 + rounding
    assert exact.norm([whole - less]) <= 1 + rounding
    assert exact.norm([whole - fewer]) <= 1 + rounding


def test_norms_beside_the_sum(xp: Backend) -> None:
    total, norm = xp.clipped_sum([xp.array(f32([1], [4], [9]))], INF)
    assert xp.numpy(total[0]).tolist() == [14]
    assert xp.numpy(norm).tolist() == [1, 4, 9]


# -- the functions themselves, where they are installed ----------------------------------------------------------


def moderate_tree() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    rng = np.random.default_rng(5)
    shapes = {"dense": (7, 5), "conv": (3, 3, 4, 6), "bias": (6,)}
    grads = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    return grads, {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}


@pytest.mark.library("jax")
@pytest.mark.parametrize("clipping", [0.01, 0.5, 2.0])
def test_agc_beside_optax(clipping: float) -> None:
    optax = pytest.importorskip("optax")
    import gradclip

    grads, params = moderate_tree()
    theirs, _ = optax.adaptive_grad_clip(clipping).update(grads, optax.EmptyState(), params)
    ours = gradclip.clip_grad_agc(grads, params, clipping).grads
    for name in grads:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-6)


@pytest.mark.parametrize("clipping", [0.01, 0.5, 2.0])
def test_agc_as_timm_has_it(xp: Backend, clipping: float) -> None:
    """The formula of timm's adaptive_clip_grad: a norm over all axes but the first, of a vector over all."""
    grads, params = moderate_tree()
    out = xp.clip_grad_agc(xp.tree(grads), xp.tree(params), clipping, per=Units(0)).grads
    for name, g in grads.items():
        axes = tuple(range(1, g.ndim)) if g.ndim > 1 else None
        norm, weight = (np.sqrt((x.astype(np.float64) ** 2).sum(axis=axes, keepdims=True)) for x in (g, params[name]))
        most = np.maximum(weight, 1e-3) * clipping
        want = np.where(norm < most, g, g * (most / np.maximum(norm, 1e-6)))
        np.testing.assert_allclose(xp.numpy(out[name]), want, rtol=2e-6)


@pytest.mark.library("jax")
def test_the_sum_beside_optax() -> None:
    optax = pytest.importorskip("optax")
    import gradclip

    rng = np.random.default_rng(6)
    grads = [rng.standard_normal((9, 4, 3)).astype(np.float32), rng.standard_normal((9, 5)).astype(np.float32)]
    theirs, clipped = optax.per_example_global_norm_clip(grads, 3.0)
    ours, norm = gradclip.clipped_sum(grads, 3.0)
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    assert int((norm > 3).sum()) == int(clipped)

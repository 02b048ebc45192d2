"""README's table "What happens in every case": one row, one test, on every backend where the row makes sense."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import exact
import gradclip
from backends import Backend, leaves

INF, NAN = math.inf, math.nan


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def check_same(xp: Backend, got, given, *, bits: bool = True) -> None:
    """Library, dtype, shape and device of every leaf are as they were, and (`bits`) every bit of the value."""
    got, given = leaves(got), leaves(given)
    assert len(got) == len(given)
    for new, old in zip(got, given, strict=True):
        assert xp.owns(new), type(new)
        assert xp.dtype_of(new) == xp.dtype_of(old)
        assert tuple(new.shape) == tuple(old.shape)
        assert xp.device_of(new) == xp.device_of(old)
        if bits:
            assert xp.numpy(new).tobytes() == xp.numpy(old).tobytes()


def check_values(xp: Backend, got, want) -> None:
    """Values to 2 units in the last place of the leaf's dtype (6 where the norm is summed in that dtype)."""
    got, want = leaves(got), leaves(want)
    assert len(got) == len(want)
    for new, values in zip(got, want, strict=True):
        new = xp.numpy(new)
        name = new.dtype.name
        ulps = 2 if xp.accumulates_wide and "64" not in name else 6
        for a, b in zip(exact.components(new), exact.components(values), strict=True):
            if math.isnan(b):
                assert math.isnan(a), (a, b)
            else:
                assert abs(a - b) <= ulps * exact.ulp(b, name), (new, values)


def unchanged(xp: Backend, grads, before) -> None:
    for old, bits in zip(leaves(grads), before, strict=True):
        assert xp.numpy(old).tobytes() == bits, "an input was written to"


def clip(xp: Backend, tree, max_norm, norm_type=2.0, **kw):
    """Clip, and check what holds in every row: the inputs untouched, the leaves' kind kept, a 0-d norm."""
    grads = xp.tree(tree)
    before = [xp.numpy(x).tobytes() for x in leaves(grads)]
    out, norm = xp.clip_grad_norm(grads, max_norm, norm_type, **kw)
    unchanged(xp, grads, before)
    check_same(xp, out, grads, bits=False)
    assert tuple(norm.shape) == ()
    if leaves(grads):
        assert xp.owns(norm)
        assert xp.dtype_of(norm) == exact.norm_dtype([np.asarray(x) for x in leaves(tree)])
    return grads, out, norm


# -- norm <= max_norm: every leaf bit for bit as it came --------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "max_norm"),
    [
        pytest.param([f32(3, -4)], 5.5, id="below"),
        pytest.param([f32(3, -4)], 5.0, id="equal"),
        pytest.param([f32(0, -0.0)], 0.0, id="all zeros at max_norm 0"),
        pytest.param([f32(0, 0), f32(0)], 1.0, id="all zeros"),
        pytest.param([f32(3e38, -3e38)], INF, id="max_norm inf"),
        pytest.param([f32(3e38, -3e38)], 1e39, id="norm and bound beyond float32"),
        pytest.param([f32(1e-40, 0.1, 1e-45)], 1.0, id="with subnormals"),
        pytest.param([f32(0.1, 0.7), np.float16([0.3, 1e-7]).astype(np.float32)], 1.0, id="odd bits"),
    ],
)
def test_not_clipped_is_bit_for_bit(xp, tree, max_norm):
    grads, out, norm = clip(xp, tree, max_norm)
    check_same(xp, out, grads)
    exact.check_norm(xp.numpy(norm), exact.norm(tree), "float32")
    if xp.name.startswith("numpy"):
        assert all(new is old for new, old in zip(out, grads, strict=True)), "NumPy: the very same arrays"


@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, 0.5, INF, -INF, 0.0, -1.0])
@pytest.mark.parametrize("seed", range(6))
def test_max_norm_equal_to_the_reported_norm_clips_nothing(xp, p, seed):
    rng = np.random.default_rng(seed)
    grads = xp.tree([rng.standard_normal(7).astype(np.float32), rng.standard_normal((2, 3)).astype(np.float32)])
    norm = xp.global_norm(grads, p)
    for bound in (norm, float(xp.numpy(norm))):
        out, again = xp.clip_grad_norm(grads, bound, p)
        check_same(xp, out, grads)
        assert float(xp.numpy(again)) == float(xp.numpy(norm))


def test_just_above_the_reported_norm_clips(xp):
    grads = xp.tree([f32(3, -4, 0.1)])
    norm = float(xp.numpy(xp.global_norm(grads)))
    out, _ = xp.clip_grad_norm(grads, float(np.nextafter(np.float32(norm), np.float32(0))))
    assert xp.numpy(out[0]).tobytes() != xp.numpy(grads[0]).tobytes()


# -- norm > max_norm ----------------------------------------------------------------------------------------


def test_clipped_is_scaled_by_one_factor(xp):
    tree = {"w": f32(3, -4), "b": [f32(12), None]}
    _, out, norm = clip(xp, tree, 6.5)
    check_values(xp, out, {"w": f32(1.5, -2), "b": [f32(6), None]})
    assert float(xp.numpy(norm)) == 13.0
    assert out["b"][1] is None


def test_product_is_rounded_once(xp):
    """A float16 leaf: formed in the accumulation dtype, so at most half a unit off, whatever the factor."""
    if not xp.has("float16"):
        pytest.skip(f"{xp.name} has no float16")
    values = np.random.default_rng(0).standard_normal(200).astype(np.float16)
    _, out, _ = clip(xp, [values], 0.7)
    factor = exact.mpmath.mpf(0.7) / exact.norm([values])
    for got, x in zip(exact.components(xp.numpy(out[0])), exact.components(values), strict=True):
        want = x * factor
        assert abs(got - want) <= 0.501 * exact.ulp(want, "float16")


def test_max_norm_zero_gives_zeros(xp):
    _, out, norm = clip(xp, [f32(3, -4), f32(1e-30)], 0.0)
    assert all((xp.numpy(x) == 0).all() for x in out)
    assert float(xp.numpy(norm)) == 5.0


def test_device_bound_negative_acts_as_zero_and_nan_gives_nan(xp):
    if xp.name.startswith("numpy"):
        with pytest.raises(ValueError, match="max_norm must be a number >= 0"):
            xp.clip_grad_norm(xp.tree([f32(3, 4)]), xp.array(f32(-1)[0]))
        return
    grads = xp.tree([f32(3, 4)])
    out, norm = xp.clip_grad_norm(grads, xp.array(np.float32(-1)))
    assert (xp.numpy(out[0]) == 0).all()
    assert float(xp.numpy(norm)) == 5.0
    out, norm = xp.clip_grad_norm(grads, xp.array(np.float32(NAN)))
    assert np.isnan(xp.numpy(out[0])).all()
    assert float(xp.numpy(norm)) == 5.0


# -- inf and NaN --------------------------------------------------------------------------------------------

BAD = {
    "one NaN": [f32(1, NAN, 0), f32(2, 0)],
    "one inf": [f32(1, 0), f32(INF, 2)],
    "inf and -inf": [f32(INF, -INF), f32(0)],
    "NaN and inf": [f32(NAN), f32(INF)],
}
ALL_P = [2.0, 1.0, 3.0, 0.5, INF, -INF, 0.0, -2.0]


@pytest.mark.parametrize("p", ALL_P)
@pytest.mark.parametrize("name", BAD)
def test_nonfinite_propagates(xp, name, p):
    for max_norm in (1.0, 0.0, 1e30, INF):
        _, out, norm = clip(xp, BAD[name], max_norm, p)
        assert all(np.isnan(xp.numpy(x)).all() for x in out)
        np.testing.assert_equal(float(xp.numpy(norm)), NAN if "NaN" in name else INF)


@pytest.mark.parametrize("p", ALL_P)
@pytest.mark.parametrize("name", BAD)
def test_nonfinite_zero(xp, name, p):
    for max_norm in (1.0, 0.0, INF):
        _, out, norm = clip(xp, BAD[name], max_norm, p, nonfinite="zero")
        assert all((xp.numpy(x) == 0).all() for x in out)
        np.testing.assert_equal(float(xp.numpy(norm)), NAN if "NaN" in name else INF)


def test_nonfinite_policies_leave_finite_gradients_alone(xp):
    for policy in ("propagate", "zero", "error"):
        if policy == "error" and not xp.eager:
            continue  # under jit this needs checkify: tests/test_jax.py
        _, out, _ = clip(xp, [f32(3, -4)], 2.5, nonfinite=policy)
        check_values(xp, out, [f32(1.5, -2)])


@pytest.mark.parametrize("p", ALL_P)
def test_nonfinite_error_names_the_culprits(xp, p):
    if not xp.eager:
        pytest.skip("under jit this needs checkify: tests/test_jax.py")
    grads = xp.tree({"encoder": [f32(1, 2), f32(NAN, INF, NAN, -INF, -INF)], "head": f32(INF), "ok": f32(1)})
    before = [xp.numpy(x).tobytes() for x in leaves(grads)]
    with pytest.raises(gradclip.NonFiniteError, match=r"grads\['encoder'\]\[1\].*2 NaN, 3 inf") as caught:
        xp.clip_grad_norm(grads, 1.0, p, nonfinite="error")
    unchanged(xp, grads, before)
    assert [(c.path, c.nans, c.infs) for c in caught.value.culprits] == [
        ("grads['encoder'][1]", 2, 3),
        ("grads['head']", 0, 1),
    ]
    assert isinstance(caught.value, RuntimeError), "what PyTorch raises"
    assert "float32, shape (5,)" in str(caught.value)


def test_error_if_nonfinite_in_place(xp):
    if not xp.in_place:
        pytest.skip(f"{xp.name} arrays cannot be written to")
    grads = xp.tree([f32(3, 4), f32(NAN)])
    before = [xp.numpy(x).tobytes() for x in grads]
    with pytest.raises(gradclip.NonFiniteError, match=r"grads\[1\].*1 NaN, 0 inf"):
        gradclip.clip_grad_norm_(grads, 1.0, 2.0, True)
    unchanged(xp, grads, before)


def test_finite_gradients_whose_norm_is_beyond_the_dtype(xp):
    """The norm is inf, the clip is right, and no policy fires."""
    for policy in ("propagate", "zero", "error"):
        if policy == "error" and not xp.eager:
            continue
        _, out, norm = clip(xp, [f32(3e38, 3e38), f32(-3e38)], 3.0, nonfinite=policy)
        third = 3 / math.sqrt(3)
        check_values(xp, out, [f32(third, third), f32(-third)])
        assert float(xp.numpy(norm)) == INF
    if xp.has("float64"):
        _, out, norm = clip(xp, [np.array([1.7e308, 1.7e308])], 1.0, nonfinite="zero")
        check_values(xp, out, [np.array([math.sqrt(0.5)] * 2)])
        assert float(xp.numpy(norm)) == INF


# -- shapes, places, kinds of leaves --------------------------------------------------------------------------


@pytest.mark.parametrize("tree", [[], {}, (), None, [None, {"a": None}]])
def test_no_leaves(xp, tree):
    out, norm = xp.clip_grad_norm(tree, 1.0)
    assert out == tree
    assert tuple(norm.shape) == ()
    assert float(norm) == 0.0
    assert float(xp.global_norm(tree)) == 0.0


@pytest.mark.parametrize("p", ALL_P)
def test_empty_leaves_count_as_nothing(xp, p):
    _, out, norm = clip(xp, [np.zeros((0, 3), np.float32), f32(3, 4), np.zeros((2, 0), np.float32)], INF, p)
    exact.check_norm(xp.numpy(norm), exact.norm([f32(3, 4)], p), "float32", 8)
    assert tuple(out[0].shape) == (0, 3)
    _, out, norm = clip(xp, [np.zeros((0, 3), np.float32)], 1.0, p)
    assert float(xp.numpy(norm)) == 0.0


def test_0d_leaf(xp):
    _, out, norm = clip(xp, [np.array(-8, np.float32), f32(6)], 5.0)
    check_values(xp, out, [np.array(-4, np.float32), f32(3)])
    assert float(xp.numpy(norm)) == 10.0


def test_none_counts_as_nothing(xp):
    _, out, norm = clip(xp, {"a": None, "b": f32(3, 4), "c": (None,)}, 1.0)
    assert out["a"] is None
    assert out["c"] == (None,)
    assert float(xp.numpy(norm)) == 5.0


def test_iterator_is_read_once_and_comes_back_as_a_list(xp):
    arrays = xp.tree([f32(3), f32(4)])
    out, norm = gradclip.clip_grad_norm(iter(arrays), 1.0)
    assert type(out) is list
    check_values(xp, out, [f32(0.6), f32(0.8)])
    assert float(xp.numpy(norm)) == 5.0


def test_same_array_twice_counts_twice_and_is_scaled_once_in_place(xp):
    x = xp.array(f32(3, 4))
    out, norm = xp.clip_grad_norm([x, x], 1.0)
    exact.check_norm(xp.numpy(norm), exact.norm([f32(3, 4), f32(3, 4)]), "float32")
    want = f32(3, 4) / np.float64(50) ** 0.5
    check_values(xp, out, [want.astype(np.float32)] * 2)
    if xp.in_place:
        gradclip.clip_grad_norm_([x, {"again": x}], 1.0)
        check_values(xp, [x], [want.astype(np.float32)])


@pytest.mark.parametrize(
    ("leaf", "kind"),
    [
        pytest.param(np.array([1, 2]), "dtype int64|dtype int32", id="integer"),
        pytest.param(np.array([True]), "dtype bool", id="bool"),
    ],
)
def test_leaf_of_another_dtype_is_an_error(xp, leaf, kind):
    with pytest.raises(gradclip.LeafError, match=rf"grads\['w'\]\[1\] is an array of ({kind}).*cast it"):
        xp.clip_grad_norm({"w": [xp.array(f32(1)), xp.array(leaf)]}, 1.0)


def test_python_number_leaf_is_an_error(xp):
    if not xp.eager:
        pytest.skip("jax.jit turns Python numbers into arrays before gradclip sees them")
    with pytest.raises(gradclip.LeafError, match=r"grads\[1\] is the Python number 2.0: make it an array"):
        xp.clip_grad_norm([xp.array(f32(1)), 2.0], 1.0)


def test_complex_leaf(xp):
    tree = [np.array([3 + 4j, 0], np.complex64), f32(12)]
    _, out, norm = clip(xp, tree, 6.5)
    assert float(xp.numpy(norm)) == 13.0
    check_values(xp, out, [np.array([1.5 + 2j, 0], np.complex64), f32(6)])
    with pytest.raises(gradclip.LeafError, match=r"grads\[0\] is complex"):
        xp.clip_grad_value(xp.tree(tree), 1.0)


def test_leaves_of_several_dtypes_keep_their_own(xp):
    names = [d for d in ("float16", "bfloat16", "float32", "float64", "complex64") if xp.has(d)]
    grads = [xp.array([3.0], d) for d in names]
    out, norm = xp.clip_grad_norm(grads, 1.0)
    check_same(xp, out, grads, bits=False)
    assert xp.dtype_of(norm) == ("float64" if "float64" in names else "float32")
    for x in out:
        got = xp.numpy(x)
        want = 1 / math.sqrt(len(names))
        assert abs(complex(got[0]) - want) <= 2 * exact.ulp(want, got.dtype.name)


# -- the norms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "want"),
    [
        (2, 13.0),
        (1, 19.0),
        (INF, 12.0),
        (-INF, 0.0),
        (0, 3.0),
        (1000, 12.0),
        (3, (27 + 64 + 1728) ** (1 / 3)),
        (0.5, (3**0.5 + 2 + 12**0.5) ** 2),
        (-1, 0.0),
    ],
)
def test_norm_types(xp, p, want):
    tree = [f32(3, -4), {"b": f32(0, 12)}]
    norm = xp.global_norm(xp.tree(tree), p)
    assert abs(float(xp.numpy(norm)) - want) <= 8 * float(exact.ulp(want, "float32"))
    assert xp.dtype_of(norm) == "float32"
    assert xp.owns(norm)
    assert tuple(norm.shape) == ()


@pytest.mark.parametrize("p", [-1.0, -2.0, -0.5, -INF])
def test_negative_p_is_as_in_numpy(xp, p):
    values = f32(3, -4, 0.5)
    want = np.linalg.norm(values.astype(np.float64), p)
    got = float(xp.numpy(xp.global_norm([xp.array(values)], p)))
    assert abs(got - want) <= 8 * float(exact.ulp(want, "float32"))


@pytest.mark.parametrize("p", [-0.1, -0.12])
def test_a_norm_below_its_dtype_clips_nothing(xp, p):
    """For p < 0 only: 100 elements of 1e-30 have a norm of 1e-50 (p = -0.1), which float32 cannot tell from 0."""
    grads, out, norm = clip(xp, [np.full(100, 1e-30, np.float32)], 0.0, p)
    assert float(xp.numpy(norm)) == 0.0
    check_same(xp, out, grads, bits=True)


def test_divide_by_is_folded_in(xp):
    _, out, norm = clip(xp, [f32(6, 8)], 100.0, divide_by=2.0)
    check_values(xp, out, [f32(3, 4)])
    assert float(xp.numpy(norm)) == 5.0
    _, out, norm = clip(xp, [f32(6, 8)], 1.0, divide_by=2)
    check_values(xp, out, [f32(0.6, 0.8)])
    assert float(xp.numpy(norm)) == 5.0
    _, out, norm = clip(xp, [f32(6, 8)], 1.0, divide_by=xp.array(np.float32(2)))
    check_values(xp, out, [f32(0.6, 0.8)])


def test_norm_given_is_trusted_and_met_by_the_policy(xp):
    _, out, norm = clip(xp, [f32(6, 8)], 5.0, norm=20.0)
    check_values(xp, out, [f32(1.5, 2)])
    assert float(xp.numpy(norm)) == 20.0
    _, out, norm = clip(xp, [f32(6, 8)], 5.0, norm=xp.array(np.float32(5.0)), divide_by=2.0)
    check_values(xp, out, [f32(3, 4)])
    assert float(xp.numpy(norm)) == 5.0
    for bad in (INF, NAN):
        _, out, _ = clip(xp, [f32(6, 8)], 5.0, norm=bad)
        assert np.isnan(xp.numpy(out[0])).all()
        _, out, _ = clip(xp, [f32(6, 8)], 5.0, norm=bad, nonfinite="zero")
        assert (xp.numpy(out[0]) == 0).all()
    if xp.eager:
        with pytest.raises(gradclip.NonFiniteError, match="Every leaf here is finite: look at norm="):
            xp.clip_grad_norm(xp.tree([f32(6, 8)]), 5.0, norm=INF, nonfinite="error")


def test_norm_and_divide_by_whose_product_is_beyond_the_dtype(xp):
    """The norm that gradclip itself reported for these gradients and this divisor."""
    for dtype, value in (("float32", 3e38), ("float64", 1.5e308)):
        if not xp.has(dtype):
            continue
        grads = [xp.array([value, value], dtype)]
        norm = xp.clip_grad_norm(grads, 1.0, divide_by=10.0).norm
        assert math.isfinite(float(xp.numpy(norm)))
        out, _ = xp.clip_grad_norm(grads, 1.0, norm=norm, divide_by=10.0)
        np.testing.assert_allclose(xp.numpy(out[0]), math.sqrt(0.5), rtol=1e-6)


@pytest.mark.parametrize("bad", [-2.0, 0.0, INF, NAN])
@pytest.mark.parametrize("max_norm", [1.0, 100.0])
def test_device_divide_by_that_is_not_positive_and_finite_gives_nan(xp, bad, max_norm):
    grads = xp.tree([f32(3, 4)])
    if xp.name.startswith("numpy"):
        with pytest.raises(ValueError, match="divide_by must be a positive number"):
            xp.clip_grad_norm(grads, max_norm, divide_by=xp.array(np.float32(bad)))
        return
    out, norm = xp.clip_grad_norm(grads, max_norm, divide_by=xp.array(np.float32(bad)))
    assert np.isnan(xp.numpy(out[0])).all()
    assert np.isnan(xp.numpy(norm))
    out, _ = xp.clip_grad_norm(grads, max_norm, divide_by=xp.array(np.float32(bad)), nonfinite="zero")
    assert (xp.numpy(out[0]) == 0).all()


# -- in place ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, INF])
def test_in_place_agrees_with_the_functional_form(xp, p):
    if not xp.in_place:
        with pytest.raises(gradclip.LeafError, match=r"use gradclip\.clip_grad_norm\b"):
            gradclip.clip_grad_norm_(xp.tree([f32(3, 4)]), 1.0)
        return
    for name in xp.dtypes:
        tree = [np.array([[3, -4], [0.5, 1]]), np.array(2.0)]
        given = [xp.array(x, name) for x in tree]
        want, norm = xp.clip_grad_norm(given, 1.5, p)
        grads = [xp.array(x, name) for x in tree]
        before = list(grads)
        got = gradclip.clip_grad_norm_(grads, 1.5, p)
        assert float(xp.numpy(got)) == float(xp.numpy(norm))
        assert all(a is b for a, b in zip(grads, before, strict=True))
        check_same(xp, grads, want)


def test_in_place_writes_nothing_when_nothing_is_clipped(xp):
    if not xp.in_place:
        pytest.skip(f"{xp.name} arrays cannot be written to")
    grads = xp.tree([f32(3, 4, 1e-42)])
    before = [xp.numpy(x).tobytes() for x in grads]
    assert float(xp.numpy(gradclip.clip_grad_norm_(grads, 5.0 + 1e-6))) == 5.0
    unchanged(xp, grads, before)


# -- shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, 0.5, INF, -INF, 0.0, -2.0])
def test_shards_join_into_one_norm(xp, p):
    """Three shards, one of them without leaves: the same norm and the same factor everywhere."""
    if not xp.eager:
        pytest.skip("an all_reduce over a Python list cannot be traced")
    rng = np.random.default_rng(1)
    whole = [rng.standard_normal(5).astype(np.float32) for _ in range(4)]
    shards = [xp.tree(whole[:1]), xp.tree(whole[1:]), []]
    want, norm = xp.clip_grad_norm(xp.tree(whole), 0.25, p)

    barrier = threading.Barrier(len(shards), timeout=60)
    slots: list = [None] * len(shards)
    calls: list[list[str]] = [[] for _ in shards]

    def all_reduce_of(rank):
        def all_reduce(partial, op):
            assert partial.ndim == 2
            assert partial.shape[0] <= 4
            calls[rank].append(op)
            slots[rank] = np.asarray(partial if rank == 2 else xp.numpy(partial))
            barrier.wait()
            table = np.stack([slot.astype(slots[0].dtype) for slot in slots])
            joined = {"sum": np.sum, "max": np.max, "min": np.min}[op](table, axis=0)
            barrier.wait()
            return joined if rank == 2 else xp.array(joined)

        return all_reduce

    with ThreadPoolExecutor(len(shards)) as pool:
        jobs = [
            pool.submit(gradclip.clip_grad_norm, shard, 0.25, p, all_reduce=all_reduce_of(rank))
            for rank, shard in enumerate(shards)
        ]
        results = [job.result(timeout=120) for job in jobs]

    assert calls[0] == calls[1] == calls[2], "every shard asks for the same, also the empty one"
    assert len(calls[0]) == (1 if p in (2.0, 1.0, INF, -INF, 0.0) else 2), "collectives"
    for rank, result in enumerate(results):
        exact.check_norm(result.norm if rank == 2 else xp.numpy(result.norm), exact.norm(whole, p), "float32", 8)
    check_values(xp, [*results[0].grads, *results[1].grads], xp.back(want))
    assert results[2].grads == []
    assert xp.dtype_of(norm) == "float32"

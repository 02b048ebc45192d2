"""Units, examples, rms, AGC and the clipped sum in CuPy: what NumPy gives, in a few launches, each group by itself."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import numpy as np
import pytest
from test_cupy import counter, host, two_devices  # noqa: F401
from test_cupy_groups import SPOILS
from test_cupy_kernels import DTYPES, INF, backend, check_right, compiler, cupy, drawn, laid, laid_out, marks, table

import exact
import gradclip
from gradclip import Units

pytestmark = marks
if backend is not None:
    from gradclip._backends.cupy import tiles

#: Norms of every kind: with bins, with a count of elements, of two passes, no sum.
NORMS: list[Any] = [2.0, "rms", 3.0, INF]
#: Each dtype has a leaf of units, and one that is one group: so few programs serve all tests.
SHAPES: list[Any] = [(5, 7), (300, 2), (2, 300), (3, 4, 5), (17, 9), (6,), (), (40,), (1, 5), (7, 1)]
EMPTY: list[Any] = [(0, 3), (0,)]


def values_of(rng: np.random.Generator, shapes: Any, low: int = -3, high: int = 3) -> list[np.ndarray]:
    return [drawn(rng, shape, DTYPES[i % 5], low, high) for i, shape in enumerate(shapes)]


def placed(rng: np.random.Generator, values: list[np.ndarray], devices: int = 1) -> list[Any]:
    return [laid_out(rng, x, int(rng.integers(devices))) for x in values]


def copied(x: Any) -> Any:
    """Where it is, and as the kernels would have it."""
    with x.device:
        return x.copy(order="K" if laid.is_dense(x) else "C")


def check_same(got: Any, want: Any, what: Any = None) -> None:
    """Equal to NumPy's, but for the rounding of a factor: of arrays, and of trees of them."""
    for a, b in zip(*(x if isinstance(x, list | tuple) else [x] for x in (got, want)), strict=True):
        x = host(a)
        assert (x.dtype, x.shape) == (b.dtype, b.shape), what
        kind = {"complex64": "float32", "complex128": "float64"}.get(b.dtype.name, b.dtype.name)
        info = np.finfo(kind)
        np.testing.assert_allclose(
            x, b, rtol=4 * float(info.eps), atol=2 * float(info.smallest_subnormal), err_msg=str(what)
        )


# -- what NumPy gives ------------------------------------------------------------------------------------------------


def check_units(leaves: list[Any], values: list[np.ndarray], per: Any, p: Any) -> None:
    out = gradclip.clip_grad_norm(leaves, 0.9, p, per=per, divide_by=1.5)
    want = gradclip.clip_grad_norm(values, 0.9, p, per=per, divide_by=1.5)
    check_same(out.norm, want.norm, (per, p))
    check_same(out.grads, want.grads, (per, p))
    assert [x.device for x in out.grads] == [x.device for x in leaves]
    check_same(gradclip.norms(leaves, p, per=per), gradclip.norms(values, p, per=per))
    mine = [copied(x) for x in leaves]
    gradclip.clip_grad_norm_(mine, 0.9, p, per=per, divide_by=1.5)
    same = gradclip.clip_grad_norm(leaves, INF, p, per=per).grads
    for a, b, c, x in zip(mine, out.grads, same, values, strict=True):
        assert host(a).tobytes() == host(b).tobytes()
        assert host(c).tobytes() == x.tobytes()


@pytest.mark.sampled(5)
@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("per", ["unit", Units(0)], ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_units_of_random_trees(seed: int, per: Any, p: Any) -> None:
    rng = np.random.default_rng(seed)
    values = values_of(rng, [*SHAPES, *EMPTY])
    check_units(placed(rng, values), values, per, p)


@pytest.mark.parametrize("p", [2.0, 3.0])
def test_units_on_two_devices(two_devices: None, p: float) -> None:  # noqa: F811
    rng = np.random.default_rng(1)
    values = values_of(rng, SHAPES)
    check_units(placed(rng, values, devices=2), values, "unit", p)


GEOMETRIES: list[tuple[int, ...]] = [
    *((90, 3), (3, 700), (9, 255), (2, 256), (257, 2)),
    *((3, 5, 130), (2, 128, 3), (3, 2, 300), (60, 5, 2)),
]


#: Elements of a tile, tiles of a leaf, rows of a line.
CUTS = [
    (2**14, 1024, 2**31),
    (200, 7, 20),
    *(pytest.param(x, marks=pytest.mark.full) for x in [(64, 1024, 2**31), (1, 999, 3)]),
]


@pytest.mark.parametrize("cuts", CUTS)
def test_every_geometry_has_every_element_once(monkeypatch: pytest.MonkeyPatch, cuts: tuple[int, int, int]) -> None:
    """Tiles of many sizes, in memory order of every kind; each element is a number that no other one can stand for."""
    for name, cut in zip(("_TILE", "_MOST", "_ROWS"), cuts, strict=True):
        monkeypatch.setattr(tiles, name, cut)
    for axis in (0, 1, -1):
        values = [1.0 + np.arange(math.prod(shape), dtype=np.float64).reshape(shape) for shape in GEOMETRIES]
        leaves = [cupy.array(x, order="CF"[i % 2]) for i, x in enumerate(values)]
        got = gradclip.norms(leaves, 1.0, per=Units(axis))
        for x, norm in zip(values, got, strict=True):
            other = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
            np.testing.assert_array_equal(norm.get(), x.sum(axis=other, keepdims=True))  # whole numbers: exact
        bounds = [x.get() / 2 for x in got]
        out = gradclip.clip_grad_norm(leaves, bounds, 1.0, per=Units(axis)).grads
        for x, y in zip(values, out, strict=True):
            np.testing.assert_allclose(y.get(), x / 2, rtol=1e-15)


@pytest.mark.parametrize("blocks", [1, 3])
def test_few_blocks_for_many_tiles(monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
    monkeypatch.setattr(compiler.Kernel, "blocks", lambda self, pieces: min(int(pieces), blocks))
    monkeypatch.setattr(tiles, "_TILE", 64)
    rng = np.random.default_rng(2)
    values = values_of(rng, SHAPES)
    check_units(placed(rng, values), values, "unit", 2.0)
    check_examples(*examples(3, 6), 2.0)


def test_lines_longer_than_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole leaves are cut; those of which an axis is kept are not, nor are the sums of examples."""
    monkeypatch.setattr(table, "LONGEST", 512)
    rng = np.random.default_rng(2)
    values = values_of(rng, [(70, 30), (40, 2), (2, 300), (3, 4, 5), (17, 9), (3000,), (), (1300,), (700,), (2000,)])
    check_units(placed(rng, values), values, "unit", 2.0)
    check_examples(*examples(4, 1, 900), 2.0)


def test_a_tree_of_many_leaves_of_units() -> None:
    rng = np.random.default_rng(3)
    values = values_of(rng, [(2 + i % 3, 1 + i % 4) for i in range(300)])
    check_units(placed(rng, values), values, "unit", 2.0)


# -- examples --------------------------------------------------------------------------------------------------------


def examples(seed: int, n: int, size: int = 300, devices: int = 1) -> tuple[list[Any], list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    shapes = [(), (3,), (size,), (5, 2), (2, 3, 40), (0,), (1, 6)]
    values = values_of(rng, [(n, *shape) for shape in shapes])
    return placed(rng, values, devices), values


def check_examples(leaves: list[Any], values: list[np.ndarray], p: Any) -> None:
    check_units(leaves, values, "example", p)
    for nonfinite in ("zero", "propagate"):
        total, norm = gradclip.clipped_sum(leaves, 2.0, p, nonfinite=nonfinite)
        want = gradclip.clipped_sum(values, 2.0, p, nonfinite=nonfinite)
        check_same(norm, want.norm)
        for a, b, leaf, x in zip(total, want.sum, leaves, values, strict=True):
            assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, leaf.device)
            eps = float(np.finfo(b.dtype).eps)
            bound = np.abs(x.astype(np.complex128)).sum(axis=0)  # what is added may cancel
            assert (np.abs(host(a) - b) <= 8 * eps * bound + 1e-300).all()


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("n", [0, 1, 2, 37])
def test_examples(n: int, p: Any) -> None:
    leaves, values = examples(n, n)
    check_examples(leaves, values, p)


def test_examples_on_two_devices(two_devices: None) -> None:  # noqa: F811
    leaves, values = examples(5, 6, devices=2)
    check_examples(leaves, values, 2.0)


def test_a_sum_of_examples_against_exact_arithmetic() -> None:
    """Products are rounded once, after they have been added up."""
    rng = np.random.default_rng(6)
    values = [drawn(rng, (5, 4), name, -3, 3) for name in DTYPES]
    norms = [exact.norm([x[b] for x in values]) for b in range(5)]
    limit = float(sorted(norms)[2])
    total, norm = gradclip.clipped_sum([cupy.array(x) for x in values], limit)
    bound = mpmath.mpf(limit) * (1 - mpmath.mpf(2) ** -19)
    factors = [min(mpmath.mpf(1), bound / w) for w in norms]
    for b, w in enumerate(norms):
        exact.check_norm(norm[b], w, "float64")
    assert any(f == 1 for f in factors)
    assert any(f < 1 for f in factors)
    for got, x in zip(total, values, strict=True):
        assert got.dtype.name == (x.dtype.name if x.dtype.char in "dFD" else "float32")
        each = [exact.components(row) for row in x]
        for i, a in enumerate(exact.components(got.get())):
            want = sum(f * mpmath.mpf(row[i]) for f, row in zip(factors, each, strict=True))
            size = sum(abs(row[i]) for row in each)
            assert abs(mpmath.mpf(a) - want) <= 0.51 * exact.ulp(want, got.dtype.name) + size * 2.0**-49


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4])
def test_one_example_adds_no_more_than_its_bound(name: str, scale: float) -> None:
    """In exact arithmetic, rounding included: differential privacy rests on it."""
    rng = np.random.default_rng(7)
    for low, high in ((-3, 3), (-14, -8)):
        x = drawn(rng, (1, 200), name, low, high)
        bound = float(exact.norm([x])) / 3 * scale
        (total,), _ = gradclip.clipped_sum([cupy.array(x)], bound)
        assert exact.norm([total.get()]) <= mpmath.mpf(bound)


def test_an_example_with_factor_zero_is_not_looked_at(counter: Any) -> None:  # noqa: F811
    x = np.ones((3, 300), np.float32)
    x[1, 7], x[1, 8] = math.nan, INF
    total, norm = gradclip.clipped_sum([cupy.array(x)], 1e6)
    assert total[0].get().tolist() == [2.0] * 300
    assert np.isnan(norm.get()[1])
    assert np.isfinite(norm.get()[[0, 2]]).all()
    (total,), _ = gradclip.clipped_sum([cupy.array(x)], 0.0)
    assert total.get().tolist() == [0.0] * 300
    (total,), _ = gradclip.clipped_sum([cupy.array(x)], 1e6, nonfinite="propagate")
    assert np.isnan(total.get()).all()


def test_a_sum_below_the_normal_numbers_is_zero() -> None:
    x = np.float32([[1.0, 2.0**-126, 2.0**-127, -(2.0**-149)], [0.0, 0.0, 2.0**-128, 0.0]])
    y = np.float64([[2.0**-1022, 2.0**-1023], [0.0, 0.0]])
    total, _ = gradclip.clipped_sum([cupy.array(x), cupy.array(y)], 10.0)
    assert total[0].get().tolist() == [1.0, 2.0**-126, 0.0, 0.0]
    assert total[1].get().tolist() == [2.0**-1022, 0.0]


@pytest.mark.parametrize("order", ["C", "F"])
def test_sums_lie_as_the_leaves_do(order: Any) -> None:
    x = np.arange(24, dtype=np.float16).reshape(2, 3, 4)
    (total,), _ = gradclip.clipped_sum([cupy.array(x, order=order)], INF)
    assert total.dtype == np.float32
    assert total.flags[f"{order}_CONTIGUOUS"]
    assert total.get().tolist() == x.sum(axis=0).tolist()
    total[...] = 0  # it is the caller's
    assert not total.get().any()


# -- bounds that are relative to parameters ----------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["unit", None, "leaf"])
@pytest.mark.parametrize("p", NORMS)
def test_agc(per: Any, p: Any) -> None:
    rng = np.random.default_rng(8)
    values, others = values_of(rng, SHAPES), values_of(rng, SHAPES[::-1])[::-1]
    others[0][:, 0], others[1][:, 1] = 0, math.nan  # eps counts; NaN spoils its group
    leaves, params = placed(rng, values), placed(rng, others)
    for eps in (1e-3, 30.0, cupy.array(0.5)):
        out = gradclip.clip_grad_agc(leaves, params, 0.02, p, eps=eps, per=per)
        plain = eps if isinstance(eps, float) else float(eps)
        want = gradclip.clip_grad_agc(values, others, 0.02, p, eps=plain, per=per)
        check_same(out.norm, want.norm, (p, eps))
        check_same(out.grads, want.grads, (p, eps))


def test_agc_with_parameters_on_another_device_and_beyond_float32(two_devices: None) -> None:  # noqa: F811
    grad, param = np.full((4, 2), 3e38, np.float32), np.full((4, 2), 3e38, np.float32)
    param[:, 1] = 1.0
    with cupy.cuda.Device(1):
        params = [cupy.array(param)]
    out = gradclip.clip_grad_agc([cupy.array(grad)], params, 0.25, per="unit")
    assert out.norm[0].get().tolist() == [[INF, INF]]
    np.testing.assert_allclose(out.grads[0].get(), np.float32([[0.75e38, 0.25]] * 4), rtol=1e-6)


# -- a group alone decides ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("per", ["unit", Units(0), "example"], ids=str)
@pytest.mark.sampled(3)
@pytest.mark.parametrize("p", [2.0, 3.0])
def test_what_is_in_one_group_changes_no_other(p: float, per: Any, spoil: str, nonfinite: Any) -> None:
    rng = np.random.default_rng(0)
    values = [drawn(rng, shape, name, -3, 3) for shape, name in (((9, 6), "float32"), ((9, 4), "float16"))]
    axis = 0 if per in (Units(0), "example") else 1
    spoiled = [x.copy() for x in values]
    unit = np.moveaxis(spoiled[0], axis, 0)[2]
    unit[:] = SPOILS[spoil] if spoil == "small" else unit
    unit[1] = SPOILS[spoil]

    def clip(values: list[np.ndarray], in_place: bool) -> tuple[list[np.ndarray], Any]:
        leaves = [cupy.array(x) for x in values]
        if in_place:
            norm = gradclip.clip_grad_norm_(leaves, 0.75, p, per=per, nonfinite=nonfinite)
        else:
            leaves, norm = gradclip.clip_grad_norm(leaves, 0.75, p, per=per, nonfinite=nonfinite)
        return [x.get() for x in leaves], [x.get().ravel() for x in (norm if isinstance(norm, list) else [norm])]

    for in_place in (False, True):
        (clean, norms), (got, bad) = clip(values, in_place), clip(spoiled, in_place)
        others = np.arange(values[0].shape[axis]) != 2
        assert norms[0][others].tobytes() == bad[0][others].tobytes()
        parts = [(x, y, v) for x, y, v in zip(clean, got, spoiled, strict=True)][: 2 if per == "example" else 1]
        for x, y, v in parts:
            x, y, v = (np.moveaxis(a, axis, 0) for a in (x, y, v))
            assert x[others].tobytes() == y[others].tobytes()
            if not math.isfinite(SPOILS[spoil]):
                assert np.isnan(y[2]).all() if nonfinite == "propagate" else (y[2] == 0).all()
                assert not math.isfinite(bad[0][2])
                continue
            own = [np.moveaxis(a, axis, 0)[2] for _, _, a in parts]
            want = exact.norm(own, p)
            exact.check_norm(bad[0][2], want, "float32", 8)
            check_right(y[2], v[2], min(mpmath.mpf(1), mpmath.mpf(0.75) / want))
        if per != "example":
            assert clean[1].tobytes() == got[1].tobytes()
            assert norms[1].tobytes() == bad[1].tobytes()


def test_the_error_names_the_leaf_of_the_bad_unit() -> None:
    bad = np.ones((3, 4), np.float32)
    bad[1, 2], bad[0, 2] = math.nan, INF
    leaves = {"a": cupy.ones((2, 3), cupy.float32), "b": cupy.array(bad)}
    with pytest.raises(gradclip.NonFiniteError, match=r"1 of 7 norms are not\n.*grads\['b'\].*1 NaN, 1 inf"):
        gradclip.clip_grad_norm_(leaves, 0.1, per="unit", nonfinite="error")
    assert leaves["a"].get().tolist() == [[1.0] * 3] * 2


# -- bounds ------------------------------------------------------------------------------------------------------------


def test_bounds_of_units_of_every_form(counter: Any) -> None:  # noqa: F811
    """Numbers, arrays on the host and on the device, of one and of several units: one launch makes a row of them."""
    rng = np.random.default_rng(9)
    shapes = [(5, 7), (300, 2), (2, 300), (3, 4, 5), (6,), (8, 9)]
    values = [drawn(rng, shape, "float32", -3, 3) for shape in shapes]
    leaves = [cupy.array(x) for x in values]
    row = rng.uniform(0.1, 2, (1, 300)).astype(np.float32)
    own = [0.5, cupy.array(np.float16([[0.25, 1.5]])), cupy.array(row), np.float64([[[1, 2, 3, 4, 5.5]]])]
    own += [cupy.array(0.75), cupy.array(2, cupy.int32)]
    plain = [0.5, np.float16([[0.25, 1.5]]), row, own[3], 0.75, 2.0]
    for _ in range(2):
        out = gradclip.clip_grad_norm(leaves, own, per="unit")
    want = gradclip.clip_grad_norm(values, plain, per="unit")
    check_same(out.grads, want.grads)
    again = gradclip.clip_grad_norm(leaves, out.norm, per="unit")
    assert all(host(a).tobytes() == x.tobytes() for a, x in zip(again.grads, values, strict=True))
    known = gradclip.clip_grad_norm(leaves, 0.9, per="unit", norm=out.norm)
    check_same(known.grads, gradclip.clip_grad_norm(values, 0.9, per="unit").grads)
    if counter is not None:
        with counter.record() as r:
            gradclip.clip_grad_norm(leaves, [*own[:5], 2.0], per="unit")
        assert r["kernel"] == 2 + 1 + 1 + 1, r
        assert r.synced == r["h2d"] == r["d2h"] == r["d2d"] == 0, r.events


def test_bounds_of_examples() -> None:
    x = np.float32([[3, 4], [6, 8], [0.3, 0.4]])
    for bound in (np.float64([1, 2, 3]), np.float16([1, 2, 3]), np.int32([1, 2, 3])):
        device = cupy.array(np.stack([bound, 0 * bound], axis=1))[:, 0]  # a row that is not in one piece
        out = gradclip.clip_grad_norm([cupy.array(x)], device, per="example")
        np.testing.assert_allclose(out.grads[0].get(), [[0.6, 0.8], [1.2, 1.6], [0.3, 0.4]], rtol=1e-6)
        total, _ = gradclip.clipped_sum([cupy.array(x)], device)
        np.testing.assert_allclose(total[0].get(), [2.1, 2.8], rtol=4e-6)
    one = gradclip.clip_grad_norm([cupy.array(x[:1])], cupy.array([2.0]), per="example")
    np.testing.assert_allclose(one.grads[0].get(), [[1.2, 1.6]], rtol=1e-6)


# -- launches ----------------------------------------------------------------------------------------------------------


def recorded(counter: Any, call: Any) -> int:  # noqa: F811
    """How many launches a call takes the second time, when nothing is allocated; that it waits and copies nothing."""
    call()
    with counter.record() as r:
        call()
    assert r.synced == 0, r.events
    for kind in ("d2h", "h2d", "d2d", "memset", "compile", "module_load", "malloc"):
        assert r[kind] == 0, (kind, r)
    return int(r["kernel"])


#: Leaves, and units or examples.
MANY = [(1, 3), (30, 3), (1, 400), (300, 2), pytest.param(1, 5000, marks=pytest.mark.full)]


@pytest.mark.parametrize(("n", "size"), MANY)
@pytest.mark.parametrize("per", ["unit", *(pytest.param(Units(k), marks=pytest.mark.full) for k in (0, 1))], ids=str)
def test_launches_for_units(counter: Any, per: Any, n: int, size: int) -> None:  # noqa: F811
    """One that measures for every 88 leaves, one that settles, one that scales for every 88; whatever their units."""
    if counter is None:
        pytest.skip("a GPU does not count launches")
    shape = {"unit": (2, size), Units(0): (size, 2), Units(1): (2, size, 3)}[per]
    leaves = [cupy.ones(shape) for _ in range(n)]
    measure = scale = math.ceil(n / 88)
    assert recorded(counter, lambda: gradclip.clip_grad_norm(leaves, 1.0, per=per)) == measure + 1 + scale


@pytest.mark.parametrize("per", ["unit", Units(0), Units(1)], ids=str)
@pytest.mark.parametrize("n", [1, 30])
def test_launches_for_units_in_other_ways(counter: Any, n: int, per: Any) -> None:  # noqa: F811
    if counter is None:
        pytest.skip("a GPU does not count launches")
    leaves = [cupy.ones((2, 3, 2)) for _ in range(n)]
    for p, passes in ((2.0, 1), ("rms", 1), (3.0, 2)):  # the first of two passes is joined, the last one settled
        assert recorded(counter, lambda p=p: gradclip.norms(leaves, p, per=per)) == 2 * passes
        assert recorded(counter, lambda p=p: gradclip.clip_grad_norm(leaves, 1.0, p, per=per)) == 2 * passes + 1
        assert recorded(counter, lambda p=p: gradclip.clip_grad_agc(leaves, leaves, 0.1, p, per=per)) == 2 * passes + 1
    assert recorded(counter, lambda: gradclip.clip_grad_norm_(leaves, 1.0, per=per)) == 3
    twice: Any = lambda partial, op: partial + partial  # noqa: E731
    # Measured, joined, a row of flags made and put below (one launch each, and one for what is above), doubled.
    assert (
        recorded(counter, lambda: gradclip.clip_grad_norm(leaves, 1.0, per=per, all_reduce=twice)) == 1 + 1 + 3 + 1 + 2
    )


@pytest.mark.parametrize(("n", "size"), MANY)
def test_launches_for_examples(counter: Any, n: int, size: int) -> None:  # noqa: F811
    if counter is None:
        pytest.skip("a GPU does not count launches")
    leaves = [cupy.ones((size, 2), DTYPES[i % 5]) for i in range(n)]
    measure = scale = math.ceil(n / 88)
    bounds = cupy.ones(size)
    assert recorded(counter, lambda: gradclip.norms(leaves, per="example")) == measure + 1
    assert recorded(counter, lambda: gradclip.clip_grad_norm(leaves, 1.0, per="example")) == measure + 1 + scale
    assert recorded(counter, lambda: gradclip.clipped_sum(leaves, bounds)) == measure + 1 + scale


def test_launches_for_whole_leaves(counter: Any) -> None:  # noqa: F811
    """rms and AGC take no more than the 2-norm."""
    if counter is None:
        pytest.skip("a GPU does not count launches")
    leaves = [cupy.ones(3, cupy.float32) for _ in range(201)]
    assert recorded(counter, lambda: gradclip.clip_grad_norm(leaves, 1.0, "rms")) == 3
    assert recorded(counter, lambda: gradclip.clip_grad_norm(leaves, 1.0, "rms", per="leaf")) == 2 + 2
    assert recorded(counter, lambda: gradclip.clip_grad_agc(leaves, leaves, per=None)) == 2 + 1 + 1
    assert recorded(counter, lambda: gradclip.clip_grad_agc(leaves, leaves, per="leaf")) == 2 + 1 + 2


# -- graphs, compilers, shards -----------------------------------------------------------------------------------------


def graph_calls() -> dict[str, Any]:
    return {
        "unit": lambda x, c: gradclip.clip_grad_norm(x, c, per="unit"),
        "example": lambda x, c: gradclip.clip_grad_norm(x, c, "rms", per="example"),
        "agc": lambda x, c: gradclip.clip_grad_agc(x, x, c, per=Units(0)),
        "sum": gradclip.clipped_sum,
    }


@pytest.mark.parametrize("call", graph_calls())
@pytest.mark.parametrize("kept", ["grads", "norm"])
def test_a_graph(call: str, kept: str) -> None:
    """Launched on other numbers; and what it writes to is given to nobody else as long as one result is there."""
    verb, stream, pool = graph_calls()[call], cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
    rng = np.random.default_rng(0)
    with cupy.cuda.using_allocator(pool.malloc), stream:
        leaves = [cupy.ones((6, n), cupy.float32) for n in (5, 300)]
        bound = cupy.array(1.0)
        verb(leaves, bound)
        stream.synchronize()
        stream.begin_capture()
        out = verb(leaves, bound)
        graph = stream.end_capture()
        got = out[0] if kept == "grads" else out[1]
        del out
        others = [cupy.full(n, 7.0, cupy.float64) for n in (1, 2, 3, 64, 65, 512, 1024) for _ in range(20)]
        for factor in (1.0, 100.0):
            values = [(rng.normal(size=x.shape) * factor).astype(np.float32) for x in leaves]
            for leaf, x in zip(leaves, values, strict=True):
                leaf.set(x, stream=stream)
            bound.set(np.array(0.5 * factor), stream=stream)
            graph.launch(stream)
            want = verb(values, 0.5 * factor)[0 if kept == "grads" else 1]
            for a, b in zip(*(x if isinstance(x, list) else [x] for x in (got, want)), strict=True):
                np.testing.assert_allclose(a.get(stream=stream), b, rtol=2e-6, atol=1e-5 * factor)
        assert all((x.get(stream=stream) == 7.0).all() for x in others)
        stream.synchronize()


@pytest.mark.parametrize("which", ["settle", "measure", "spread", "join", "scale", "weighted", "row", "all"])
def test_where_kernels_do_not_compile(monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    monkeypatch.setattr(compiler, "_failures", ["warned already"])
    real = compiler.compiled

    def compiled(source: str, name: str, *options: str) -> Any:
        if which in ("all", name.removeprefix("gradclip_")):
            raise compiler.NotCompiled
        return real(source, name, *options)

    monkeypatch.setattr(compiler, "compiled", compiled)
    rng = np.random.default_rng(1)
    shapes = [(5, 7), (6,)]
    values = values_of(rng, shapes)
    leaves = placed(rng, values)
    check_units(leaves, values, "unit", "rms")
    bounds = [cupy.array(rng.uniform(0.5, 2, (1, 7))), 0.5]
    plain = [bounds[0].get(), 0.5]
    check_same(
        gradclip.clip_grad_norm(leaves, bounds, 3.0, per="unit").grads,
        gradclip.clip_grad_norm(values, plain, 3.0, per="unit").grads,
    )
    out, want = gradclip.clip_grad_agc(leaves, leaves[::1], 0.5), gradclip.clip_grad_agc(values, values, 0.5)
    check_same(out.grads, want.grads)
    check_same(out.norm, want.norm)
    check_examples(*examples(1, 3), 2.0)


@pytest.mark.parametrize("p", [2.0, 3.0])
@pytest.mark.parametrize("call", ["unit", "example", "agc", "sum"])
def test_nothing_is_compiled_after_a_collective(monkeypatch: pytest.MonkeyPatch, call: str, p: float) -> None:
    asked: list[Any] = []
    real = compiler.compiled

    def logged(source: str, name: str, *options: str) -> Any:
        asked.append((source, name, options))
        return real(source, name, *options)

    def twice(partial: Any, op: str) -> Any:
        asked.append(op)
        return partial * 2 if op == "sum" else partial

    monkeypatch.setattr(compiler, "compiled", logged)
    values = [np.float32([[3, 4], [1, 2]]), np.float16([[1.0], [0.5]]), np.complex128([2j, 1])]
    verbs: dict[str, Any] = {
        "unit": lambda x, f: gradclip.clip_grad_norm(x, 1.0, p, per="unit", all_reduce=f),
        "example": lambda x, f: gradclip.clip_grad_norm(x, 1.0, p, per="example", all_reduce=f),
        "agc": lambda x, f: gradclip.clip_grad_agc(x, x, 0.5, p, all_reduce=f),
        "sum": lambda x, f: gradclip.clipped_sum(x, 1.0, p, all_reduce=f),
    }
    out = verbs[call]([cupy.array(x) for x in values], twice)
    want = verbs[call](values, lambda partial, op: partial * 2 if op == "sum" else partial)
    check_same(out[1], want[1])
    check_same(out[0], want[0])
    ops = [i for i, x in enumerate(asked) if isinstance(x, str)]
    assert len(ops) == (1 if p == 2 else 2)
    assert {x for x in asked[ops[0] :] if not isinstance(x, str)} <= set(asked[: ops[0]])

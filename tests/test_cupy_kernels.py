"""The CUDA kernels: equal to the generic ones, exact, few, and right about memory, streams, graphs and compilers."""

from __future__ import annotations

import gc
import importlib
import math
import threading
from itertools import pairwise
from typing import Any

import mpmath
import numpy as np
import pytest
from test_cupy import counter, two_devices  # noqa: F401

import exact
import gradclip
from backends import MISSING, np_dtype
from devices import host, on
from gradclip._backends.generic import Backend
from gradclip._groups import Groups
from gradclip._scaled import Factors

marks = [
    pytest.mark.library("cupy"),
    pytest.mark.skipif("cupy" in MISSING, reason=f"cupy: {MISSING.get('cupy')}"),
]
pytestmark = marks
here = "cupy" not in MISSING
cupy: Any = importlib.import_module("cupy") if here else None
backend: Any = importlib.import_module("gradclip._backends.cupy") if here else None
columns: Any = importlib.import_module("gradclip._backends.cupy.columns") if here else None
compiler: Any = importlib.import_module("gradclip._backends.cupy.compiler") if here else None
laid: Any = importlib.import_module("gradclip._backends.cupy.laid") if here else None
table: Any = importlib.import_module("gradclip._backends.cupy.table") if here else None
programs: Any = importlib.import_module("gradclip._backends.cupy.programs") if here else None
text: Any = importlib.import_module("gradclip._backends.cupy.text") if here else None

INF = math.inf
NORMS = [2.0, 1.0, 0.0, 3.0, 0.5, INF, -INF, -1.0, 1000.0]
DTYPES = ["float16", "float32", "float64", "complex64", "complex128"]
BITS = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53, "complex64": 24, "complex128": 53}


# -- equal to the oracle, and to exact arithmetic --------------------------------------------------------------


def drawn(rng: np.random.Generator, shape: Any, dtype: str, low: int, high: int) -> np.ndarray:
    """Values of both signs with magnitudes from 2**low to 2**high, some of them 0."""

    def part() -> np.ndarray:
        x = rng.uniform(1, 2, shape) * 2.0 ** rng.integers(low, high, shape) * rng.choice([-1.0, 1.0, 1.0, 0.0], shape)
        return np.asarray(x)

    x = part() + 1j * part() if dtype.startswith("complex") else part()
    return x.astype(dtype)


def laid_out(rng: np.random.Generator, x: np.ndarray, device: int = 0) -> Any:
    """The values on a device, at any alignment and in any layout."""
    with cupy.cuda.Device(device):
        way = rng.integers(6)
        if way == 1 and x.ndim == 1:  # not where an allocation starts
            k = int(rng.integers(1, 5))
            room = cupy.zeros(x.size + k, x.dtype)
            room[k:] = cupy.array(x)
            return room[k:]
        if way == 2:
            return cupy.array(x, order="F")
        if way == 3 and x.ndim == 2:
            return cupy.array(x.T.copy()).T
        if way == 4 and x.ndim:
            room = cupy.full((*x.shape[:-1], 2 * x.shape[-1]), np.nan, x.dtype)
            room[..., ::2] = cupy.array(x)
            return room[..., ::2]
        if way == 5 and x.ndim:
            return cupy.array(x[::-1].copy())[::-1]
        return cupy.array(x)


SHAPES: list[Any] = [(), (0, 3), (1,), (7,), (33,), (300,), (5, 4), (16, 9), (2, 3, 4)]


def random_tree(seed: int, names: list[str], devices: int = 1) -> tuple[list[Any], list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    low, high = [(-3, 3), (-14, 10), (-24, -10), (5, 15)][seed % 4]
    values = []
    for _ in range(9):
        name = str(rng.choice(names))
        stretch = 1 if name == "float16" else 8 if seed % 3 else 1
        if name in ("float64", "complex128") and seed % 5 == 0:
            stretch = 60
        shape = SHAPES[int(rng.integers(len(SHAPES)))]
        values.append(drawn(rng, shape, name, low * stretch, high * stretch))
    return [laid_out(rng, x, int(rng.integers(devices))) for x in values], values


def as_oracle(patch: pytest.MonkeyPatch) -> None:
    """From here on, CuPy arrays are clipped by the generic backend."""
    for name in ("_number", "partials", "partial", "decide", "scale", "weighted_sum"):
        patch.setattr(backend.CupyBackend, name, getattr(Backend, name))


def scaled(leaf: Any, factor: Any, shift: Any) -> Any:
    (out,) = backend.CupyBackend().scale(
        [leaf], Factors(factor, shift), Groups((0,), (None,), ((),), (False,)), in_place=False
    )
    return out


def check_near(got: np.ndarray, want: np.ndarray) -> None:
    """Equal but for roundings: of the leaf's dtype, and of the factor in float64. NaN equals NaN."""
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    for a, b in zip(exact.components(got), exact.components(want), strict=True):
        if math.isfinite(b):
            assert abs(mpmath.mpf(a) - mpmath.mpf(b)) <= exact.ulp(b, got.dtype.name) + abs(mpmath.mpf(b)) * 2.0**-49, (
                a,
                b,
            )
        else:
            assert a == b or (math.isnan(a) and math.isnan(b)), (a, b)


def check_right(got: np.ndarray, x: np.ndarray, factor: Any) -> None:
    """`x * factor`, rounded to its dtype; the factor itself may be off by some units of float64, or of the norm."""
    assert (got.dtype, got.shape) == (x.dtype, x.shape)
    for a, b in zip(exact.components(got), exact.components(x), strict=True):
        want = mpmath.mpf(b) * factor
        assert abs(mpmath.mpf(a) - want) <= exact.ulp(want, x.dtype.name) * 0.51 + abs(want) * 2.0**-49, (a, want)


def check_tree(leaves: list[Any], values: list[np.ndarray], p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    want = exact.norm(values, p)
    empty = not any(x.size for x in values)
    bound = 1.0 if want == 0 else float(want / 3)
    out = gradclip.clip_grad_norm(leaves, bound, p)
    mine = [x.copy() for x in leaves]
    norm = gradclip.clip_grad_norm_(mine, bound, p)
    for x in (out.norm, norm, gradclip.global_norm(leaves, p)):
        exact.check_norm(host(x), mpmath.mpf(0) if empty else want, exact.norm_dtype(values), 8)
        assert (x.dtype, x.shape) == (exact.norm_dtype(values), ())
    same = gradclip.clip_grad_norm(leaves, INF, p).grads
    with monkeypatch.context() as patch:
        as_oracle(patch)
        oracle = gradclip.clip_grad_norm(leaves, bound, p)
    check_near(host(out.norm), host(oracle.norm)) if p in (2, 1, 0, INF, -INF) else None
    factor = mpmath.mpf(1) if want <= bound or want == 0 else mpmath.mpf(bound) / want
    for got, again, kept, other, leaf, x in zip(out.grads, mine, same, oracle.grads, leaves, values, strict=True):
        assert got.device == leaf.device
        check_right(host(got), x, factor)
        check_near(host(got), host(other))
        assert host(again).tobytes() == host(got).tobytes()
        assert host(kept).tobytes() == x.tobytes() == host(leaf).tobytes()


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("seed", range(8))
def test_random_trees(seed: int, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [DTYPES, ["float32"], ["float16", "float32", "complex64"], ["float64", "complex128"]][seed // 2]
    leaves, values = random_tree(seed, names)
    check_tree(leaves, values, p, monkeypatch)


@pytest.mark.parametrize("p", [2.0, 3.0, -INF])
@pytest.mark.parametrize("seed", [1, 2])
def test_random_trees_on_two_devices(two_devices: None, seed: int, p: float, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    leaves, values = random_tree(seed, DTYPES, devices=2)
    check_tree(leaves, values, p, monkeypatch)


@pytest.mark.parametrize("p", [2.0, 1.0, 0.5, INF])
@pytest.mark.parametrize("name", DTYPES)
def test_a_thousand_leaves(name: str, p: float) -> None:
    rng = np.random.default_rng(3)
    values = [drawn(rng, (int(n),), name, -3, 3) for n in rng.integers(0, 20, 1000)]
    leaves = [cupy.array(x) for x in values]
    want = exact.norm([np.concatenate(values)], p)
    out = gradclip.clip_grad_norm(leaves, 0.25, p)
    exact.check_norm(host(out.norm), want, exact.norm_dtype(values), 8)
    gradclip.clip_grad_norm_(leaves, 0.25, p)
    for got, again, x in zip(out.grads, leaves, values, strict=True):
        check_right(host(got), x, mpmath.mpf(0.25) / want)
        assert host(again).tobytes() == host(got).tobytes()


@pytest.mark.parametrize("name", ["float16", "float32", "float64"])
@pytest.mark.parametrize("p", [2.0, 1.0, 3.0])
def test_equal_elements_do_not_pile_up_rounding_errors(name: str, p: float) -> None:
    for n in (4097, 100_000):
        x = np.full(n, 0.1, name)
        want = abs(mpmath.mpf(float(x[0]))) * mpmath.mpf(n) ** (1 / mpmath.mpf(p))
        exact.check_norm(host(gradclip.global_norm([cupy.array(x)], p)), want, exact.norm_dtype([x]), 2)


@pytest.mark.parametrize("p", [2.0, 0.0, INF])
def test_a_leaf_of_more_chunks_than_blocks(p: float) -> None:
    n = 2**22 + 2**13 + 77
    x = np.full(n, 0.5, np.float16)
    x[-1], x[2**22 - 1] = 3.0, -4.0
    want = mpmath.sqrt(mpmath.mpf(n - 2) / 4 + 25) if p == 2 else mpmath.mpf(n if p == 0 else 4)
    leaf = cupy.array(x)
    out = gradclip.clip_grad_norm([leaf], float(want / 2), p)
    exact.check_norm(host(out.norm), want, "float32")
    factor = np.float64(float(np.float64(want / 2) / want))
    assert np.array_equal(host(out.grads[0]), (x.astype(np.float64) * factor).astype(np.float16))


def test_bins_join_across_leaves_of_all_dtypes() -> None:
    """Small, middle and big ones; a float32 leaf must not be lost beside a float64 one, nor the reverse."""
    values = [np.array([1e-300, 3e-200]), np.float32([3.0, 1e-40]), np.float16([6e-8]), np.array([1e200, 2e-5])]
    for chosen in ([0], [0, 2], [1, 2], [0, 1, 2], [0, 1, 2, 3], [3]):
        part = [values[i] for i in chosen]
        for p in (2.0, 1.0, 3.0, 0.01, INF, -INF, -2.0):
            norm = gradclip.global_norm([cupy.array(x) for x in part], p)
            exact.check_norm(host(norm), exact.norm(part, p), exact.norm_dtype(part), 400 if p == 0.01 else 8)


@pytest.mark.parametrize("p", [0.02, 3.0, -2.0])
def test_the_second_pass_knows_that_the_first_saw_wider_leaves(p: float) -> None:
    values = [np.full(1000, 1e38, np.float32), np.array([1e300 if p > 0 else 1e-300])]
    norm = gradclip.global_norm([cupy.array(x) for x in values], p)
    exact.check_norm(host(norm), exact.norm(values, p), "float64", 200 if p == 0.02 else 8)


# -- numbers: read, scaled and rounded ---------------------------------------------------------------------------


def nearest(x: np.ndarray, name: str) -> np.ndarray:
    """float64 numbers rounded to a format, ties to even, as float64. Only scaling by powers of two and rint."""
    bits, lowest = BITS[name], exact.FORMATS[name][1]
    with np.errstate(all="ignore"):
        exponent = np.frexp(x)[1] - 1
        unit = np.ldexp(1.0, np.maximum(exponent, lowest) - bits + 1)
        out = np.where(np.isfinite(x) & (x != 0), np.rint(x / unit) * unit, x)
        return np.where(np.abs(out) > float(exact.largest(name)), np.copysign(np.inf, out), out)


def every(name: str) -> np.ndarray:
    """Every 16-bit number; for float32 many, and all kinds."""
    if name != "float32":
        return np.arange(2**16, dtype=np.uint16).view(np_dtype(name))
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 2**32, 60_000, dtype=np.uint32)
    kinds[:20_000] &= 0x807FFFFF  # subnormal
    kinds[20_000:30_000] |= 0x7F000000  # near the largest, inf, NaN
    edges = np.uint32([0, 1, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7F800001])
    return np.concatenate([kinds, edges, edges | 0x80000000]).view(np.float32)


FACTORS = [(1 / 3, None), (0.999999, None), (2.0**-10, 1.0), (3.7, None), (2.0**-133 * 1.3, 1.0), (0.75, 2.0**-30)]


@pytest.mark.parametrize(("factor", "shift"), FACTORS)
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_numbers_are_read_exactly_and_rounded_once(name: str, factor: float, shift: float | None) -> None:
    x = every(name)
    try:
        leaf = cupy.array(x)
    except (TypeError, ValueError):
        pytest.skip(f"this CuPy has no {name}")
    got = scaled(leaf, cupy.array(factor), None if shift is None else cupy.array(shift))
    assert got.dtype == x.dtype
    with np.errstate(all="ignore"):
        want = nearest(x.astype(np.float64) * (1.0 if shift is None else shift**2) * factor, name)
        got_wide = host(got).astype(np.float64)
    np.testing.assert_array_equal(got_wide, want)
    finite = ~np.isnan(want)
    assert np.array_equal(np.signbit(got_wide[finite]), np.signbit(want[finite]))


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64", "complex64"])
def test_factors_that_are_no_products(name: str) -> None:
    """1 keeps every bit, payloads of NaN too; 0 gives zeros whatever there is; NaN makes all NaN."""
    x = every("float32" if name in ("float64", "complex64") else name)
    x = np.repeat(x, 2).view(name) if name in ("float64", "complex64") else x
    try:
        leaf = cupy.array(x)
    except (TypeError, ValueError):
        pytest.skip(f"this CuPy has no {name}")
    one = cupy.array(1.0)
    for shift in (None, one):
        assert host(scaled(leaf, one, shift)).tobytes() == x.tobytes()
    assert host(scaled(leaf, cupy.array(0.0), one)).tobytes() == bytes(x.nbytes)
    assert np.isnan(host(scaled(leaf, cupy.array(np.nan), None)).astype(np.complex128)).all()


@pytest.mark.skipif(not here, reason="cupy is not here")
@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, INF, -INF])
def test_subnormals_count(p: float) -> None:
    for name, tiny in (("float16", 2.0**-24), ("float32", 2.0**-149), ("float64", 2.0**-1074)):
        x = (np.arange(1, 100) * tiny).astype(name)
        want = exact.norm([x], p)
        out = gradclip.clip_grad_norm([cupy.array(x)], float(want / 2), p)
        exact.check_norm(host(out.norm), want, exact.norm_dtype([x]), 8)
        if exact.norm_dtype([x]) == "float64" or name == "float16":
            check_right(host(out.grads[0]), x, mpmath.mpf(float(want / 2)) / want)


def test_bfloat16() -> None:
    x = np.array([3.0, -4.0, 0.0, 1e30], np_dtype("bfloat16"))
    try:
        leaf = cupy.array(x)
    except (TypeError, ValueError):
        pytest.skip("this CuPy has no bfloat16")
    for p in (2.0, 3.0, 0.0):
        want = exact.norm([x.astype(np.float64)], p)
        out = gradclip.clip_grad_norm([leaf], 1.0, p)
        exact.check_norm(host(out.norm), want, "float32", 8)
        assert out.grads[0].dtype == x.dtype
        factor = np.float64(mpmath.mpf(1) / want)
        want_leaf = nearest(x.astype(np.float64) * factor, "bfloat16")
        assert np.array_equal(host(out.grads[0]).astype(np.float64), want_leaf)


# -- how many launches, and what else ----------------------------------------------------------------------------


LAUNCHES = {
    # A launch for every 250 leaves in each pass, one to join a pass, one to settle.
    ("norm", 2.0): 4 + 1,
    ("functional", 2.0): 4 + 1 + 4,
    ("in place", 2.0): 4 + 1 + 4,
    ("unclipped", INF): 4 + 1 + 4,
    ("functional", 3.0): 4 + 1 + 4 + 1 + 4,
    ("divide_by", 2.0): 4 + 1 + 4,
    ("norm given", 2.0): 1 + 1 + 4,  # the norm becomes float64
}


@pytest.mark.parametrize(("call", "p"), LAUNCHES)
@pytest.mark.parametrize("mixed", [False, True])
def test_launches_for_a_thousand_leaves(counter: Any, call: str, p: float, mixed: bool) -> None:  # noqa: F811
    if counter is None:
        pytest.skip("a GPU does not count launches")
    names = ["float32", "float16", "complex64"] if mixed else ["float32"]
    leaves = [cupy.ones(64, names[i % len(names)]) for i in range(1000)]
    known = cupy.full((), 99.0, cupy.float32)
    verbs = {
        "norm": lambda c: gradclip.global_norm(leaves, p),
        "functional": lambda c: gradclip.clip_grad_norm(leaves, c, p),
        "in place": lambda c: gradclip.clip_grad_norm_(leaves, c * 1e30, p),
        "unclipped": lambda c: gradclip.clip_grad_norm(leaves, c * 1e30, p),
        "divide_by": lambda c: gradclip.clip_grad_norm(leaves, c, p, divide_by=c + 4),
        "norm given": lambda c: gradclip.clip_grad_norm(leaves, c, p, norm=known),
    }
    verbs[call](1.0)
    verbs[call](1.0)  # the memory pool has what is needed
    with counter.record() as r:
        verbs[call](2.0)  # another bound: nothing is compiled, nothing is loaded
    assert r["kernel"] == LAUNCHES[call, p], r
    if p in (2.0, INF):
        assert r["kernel"] <= 4 + math.ceil(1000 / 200)
    assert r.synced == 0, r.events
    for kind in ("d2h", "h2d", "d2d", "memset", "compile", "module_load", "malloc"):
        assert r[kind] == 0, (kind, r)


@pytest.mark.parametrize("n", [1, 249, 250, 251, 500, 501])
def test_launches_grow_by_one_for_every_250_leaves(counter: Any, n: int) -> None:  # noqa: F811
    leaves = [cupy.full(3, float(i % 7), cupy.float32) for i in range(n)]
    want = mpmath.sqrt(sum(3 * (i % 7) ** 2 for i in range(n)))
    exact.check_norm(host(gradclip.global_norm(leaves)), want, "float32")
    if counter is not None:
        with counter.record() as r:
            gradclip.global_norm(leaves)
        assert r["kernel"] == math.ceil(n / 250) + 1, r


@pytest.mark.parametrize("form", ["value", "array"])
def test_a_changed_bound_compiles_nothing(counter: Any, form: str) -> None:  # noqa: F811
    if counter is None:
        pytest.skip("a GPU does not count compilations")
    leaf = cupy.array(np.float32([3.0, 4.0]))
    make = float if form == "value" else cupy.array
    bounds = [make(c) for c in (2.0, 1.0, 0.0, INF, 1e-40, 1e300)]
    gradclip.clip_grad_norm([leaf], bounds[0])
    with counter.record() as r:
        outs = [gradclip.clip_grad_norm([leaf], c).grads[0] for c in bounds]
    assert r["compile"] == 0, r
    for out, factor in zip(outs, (0.4, 0.2, 0.0, 1.0, 2e-41, 1.0), strict=True):
        want = np.float32([3.0, 4.0]).astype(np.float64) * factor
        np.testing.assert_allclose(host(out), want, rtol=1e-6, atol=2e-45)


def test_all_reduce_gets_one_partial_of_few_launches(counter: Any) -> None:  # noqa: F811
    leaves = [cupy.full(5, 2.0, cupy.float32) for _ in range(1000)]
    seen = []

    def twice(partial: Any, op: str) -> Any:
        seen.append((partial.shape, op))
        return partial * 2 if op == "sum" else partial

    # After the last pass, one row more tells whose norms are float64.
    for p, shapes in ((2.0, [((4, 1), "sum")]), (3.0, [((3, 1), "max"), ((2, 1), "sum")])):
        seen.clear()
        norm = gradclip.global_norm(leaves, p, all_reduce=twice)
        assert seen == shapes
        exact.check_norm(host(norm), 2 * mpmath.mpf(10_000) ** (1 / mpmath.mpf(p)), "float32", 8)
    out = gradclip.clip_grad_norm(leaves, 1.0, all_reduce=twice)
    np.testing.assert_allclose(host(out.grads[999]), np.full(5, 0.01), rtol=1e-6)
    if counter is not None:
        with counter.record() as r:
            gradclip.clip_grad_norm(leaves, 1.0, all_reduce=twice)
        # Measured, joined, a row of flags made and put below (one launch each, and one for what is above), doubled,
        # settled, scaled.
        assert r["kernel"] == 4 + 1 + 3 + 1 + 1 + 4, r
        assert r.synced == 0, r
        assert r["h2d"] == r["d2h"] == 0, r


# -- memory --------------------------------------------------------------------------------------------------------


def test_outputs_share_one_aligned_allocation_and_keep_their_layout() -> None:
    rng = np.random.default_rng(0)
    leaves = [cupy.array(rng.normal(size=(i % 5 + 1, 7)).astype(DTYPES[i % 3])) for i in range(40)]
    leaves += [
        cupy.array(rng.normal(size=(6, 7)), order="F"),
        cupy.array(rng.normal(size=(2, 3, 4))).transpose(1, 2, 0),
    ]
    strided = cupy.array(rng.normal(size=(6, 8)))[:, ::2]
    out = gradclip.clip_grad_norm([*leaves, strided], 1.0).grads
    assert len({x.data.mem.ptr for x in out[:-1]}) == 1
    assert all(x.data.ptr % text.ALIGNMENT == 0 for x in out)
    spans = sorted((x.data.ptr, x.data.ptr + x.nbytes) for x in out)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    assert [x.strides for x in out[:-1]] == [x.strides for x in leaves]
    assert out[-1].flags.c_contiguous
    for x in out:  # they can be written to, each by itself
        x[...] = 0
    assert all((x.get() == 0).all() for x in out)


def test_in_place_and_not_clipping_no_leaf_is_touched(counter: Any) -> None:  # noqa: F811
    if counter is None:
        pytest.skip("on a GPU a wrong address would end all other tests")
    nowhere = cupy.cuda.UnownedMemory(2**46, 4096, None, 0)
    leaf = cupy.ndarray((1000,), cupy.float32, cupy.cuda.MemoryPointer(nowhere, 0))
    for _ in range(2):
        with counter.record() as r:
            norm = gradclip.clip_grad_norm_([leaf], 1.0, norm=0.5)
        assert host(norm) == 0.5
    assert r["kernel"] == 2, r


def test_leaves_that_overlap_are_scaled_once() -> None:
    values = np.arange(1, 401, dtype=np.float32)
    a = cupy.array(values)
    want = exact.norm([values[:300], values[100:]])
    gradclip.clip_grad_norm_([a[:300], a[100:]], 1.0)
    check_right(host(a), values, 1 / want)
    b = cupy.array(values)
    want = exact.norm([values, values[::2]])
    gradclip.clip_grad_norm_([b, b[::2]], 1.0)
    check_right(host(b), values, 1 / want)


@pytest.mark.parametrize("p", [2.0, 3.0])
def test_leaves_longer_than_an_entry(monkeypatch: pytest.MonkeyPatch, p: float) -> None:
    monkeypatch.setattr(table, "LONGEST", 512)
    rng = np.random.default_rng(0)
    values = [drawn(rng, (n,), name, -3, 3) for n, name in ((3000, "float32"), (512, "float16"), (1025, "complex128"))]
    leaves = [cupy.array(x) for x in values]
    want = exact.norm(values, p)
    out = gradclip.clip_grad_norm(leaves, 1.0, p)
    exact.check_norm(host(out.norm), want, "float64", 8)
    gradclip.clip_grad_norm_(leaves, 1.0, p)
    for got, again, x in zip(out.grads, leaves, values, strict=True):
        check_right(host(got), x, 1 / want)
        assert host(again).tobytes() == host(got).tobytes()


# -- streams and graphs ----------------------------------------------------------------------------------------------


def test_a_stream_of_its_own_many_leaves() -> None:
    values = [np.full(40, i % 5 - 2, np.float32) for i in range(300)]
    want = exact.norm([np.concatenate(values)])
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        leaves = []
        for x in values:
            raw = cupy.empty(40, cupy.float32)
            raw.set(x, stream=stream)
            leaves.append(raw + cupy.float32(0))
        out = gradclip.clip_grad_norm(leaves, 1.0)
        later = [x * cupy.float32(1) for x in out.grads]
        got, norm = [x.get(stream=stream) for x in later], out.norm.get(stream=stream)
    stream.synchronize()
    exact.check_norm(norm, want, "float32")
    for x, value in zip(got, values, strict=True):
        check_right(x, value, 1 / want)


@pytest.mark.parametrize("p", [2.0, 3.0])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_device_waits_for_what_others_measure(two_devices: None, in_place: bool, p: float) -> None:  # noqa: F811
    """The other device is read first: where work is put off, nothing has been done yet that it does not wait for."""
    values = [np.float32([3.0, -4.0] * 40), np.float32([1.0, 0.5] * 30)]
    want = exact.norm(values, p)
    leaves = [on(device, x) for device, x in enumerate(values)]
    for leaf in leaves:
        leaf.device.synchronize()
    if in_place:
        gradclip.clip_grad_norm_(leaves, 1.0, p)
        out = leaves
    else:
        out = gradclip.clip_grad_norm(leaves, 1.0, p).grads
    check_right(host(out[1]), values[1], 1 / want)
    check_right(host(out[0]), values[0], 1 / want)


@pytest.mark.parametrize("p", [2.0, 3.0])
@pytest.mark.parametrize("kept", ["grads and norm", "norm", "grads"])
def test_a_graph(kept: str, p: float) -> None:
    """Captured once, launched on other numbers; and what the graph writes to in between is not given to others.

    In place, the norm is what keeps that memory. Else either result does.
    """
    stream = cupy.cuda.Stream(non_blocking=True)
    rng = np.random.default_rng(0)
    with stream:
        leaves = [cupy.ones(n, cupy.float32) for n in (5, 300, 4)]
        bound = cupy.array(1.0)

        def clip() -> Any:
            if kept == "norm":
                return leaves, gradclip.clip_grad_norm_(leaves, bound, p)
            return gradclip.clip_grad_norm(leaves, bound, p)

        for _ in range(2):
            clip()
        stream.begin_capture()
        out, norm = clip()
        graph = stream.end_capture()
        if kept == "grads":
            norm = None
        others = [cupy.full(n, 7.0, cupy.float64) for n in (1, 1, 2, 3, 4, 4, 64, 64, 65, 128) for _ in range(20)]
        for factor in (1.0, 100.0):
            values = [(rng.normal(size=x.size) * factor).astype(np.float32) for x in leaves]
            for leaf, x in zip(leaves, values, strict=True):
                leaf.set(x, stream=stream)
            bound.set(np.array(0.5 * factor), stream=stream)
            graph.launch(stream)
            want = exact.norm(values, p)
            if norm is not None:
                exact.check_norm(norm.get(stream=stream), want, "float32", 8)
            for got, x in zip(out, values, strict=True):
                check_right(got.get(stream=stream), x, 0.5 * factor / want)
        assert all((x.get(stream=stream) == 7.0).all() for x in others)
    stream.synchronize()


LAYOUTS: dict[str, Any] = {
    "large": lambda x: [x],
    "small": lambda x: [x[:7], x[7:400], x[400:404]],
    "strided": lambda x: [x[:4000].reshape(50, 80)[:, :40], x[4000::2], x[::-1]],
    "overlapping": lambda x: [x[:600], x[400:]],
}

#: What comes back: the gradients, and the norm.
VERBS: dict[str, Any] = {
    "norm": lambda leaves, c, d, p: ([], gradclip.global_norm(leaves, p)),
    "functional": lambda leaves, c, d, p: gradclip.clip_grad_norm(leaves, c, p, divide_by=d),
    "in place": lambda leaves, c, d, p: (leaves, gradclip.clip_grad_norm_(leaves, c, p, divide_by=d)),
    "value": lambda leaves, c, d, p: (gradclip.clip_grad_value(leaves, c), None),
    "value in place": lambda leaves, c, d, p: (leaves, gradclip.clip_grad_value_(leaves, c)),
}

CAPTURED = [
    *(("norm", "large", p, "all") for p in (2.0, 3.0, 0.5, -1.0, INF)),
    *(("norm", "strided", p, "all") for p in (2.0, 3.0, 0.0, INF)),
    *((verb, "large", p, "all") for verb in ("functional", "in place") for p in (3.0, 0.5, -1.0)),
    *((verb, "strided", p, "all") for verb in ("functional", "in place") for p in (2.0, 0.0, INF, 3.0)),
    *(("in place", "overlapping", p, "all") for p in (2.0, 3.0)),
    *(("functional", layout, 3.0, kept) for layout in ("small", "strided") for kept in ("grads", "norm")),
    *(("in place", layout, 3.0, "grads") for layout in ("large", "small", "strided", "overlapping")),
    *((verb, layout, 2.0, "grads") for verb in ("value", "value in place") for layout in ("small", "strided")),
]


def filled(pool: Any) -> list[Any]:
    """Arrays that take all the memory that a pool has free, in pieces of many sizes."""
    found = []
    for n in (2**17, 2**14, 2**11, 2**8, 64):
        size = pool.total_bytes()
        while pool.total_bytes() == size:
            found.append(cupy.full(n, 7.0))
    assert pool.free_bytes() == 0
    return found


def norm_in_float64(values: list[np.ndarray], p: float) -> float:
    x = np.abs(np.concatenate([v.ravel() for v in values]).astype(np.float64))
    if p in (0, INF):
        return float(np.count_nonzero(x) if p == 0 else x.max())
    return float(np.sum(x**p) ** (1 / p))


@pytest.mark.parametrize("compiles", [True, False])
@pytest.mark.parametrize(("verb", "layout", "p", "kept"), CAPTURED)
def test_what_a_graph_writes_to_is_given_to_nobody_else(
    monkeypatch: pytest.MonkeyPatch, verb: str, layout: str, p: float, kept: str, compiles: bool
) -> None:
    """After the capture, arrays that have nothing to do with it take all free memory: no launch changes them.

    The leaves are kept, and the results named by `kept`: in place, "grads" is nothing else.
    """

    def refused(*args: Any) -> Any:
        raise compiler.NotCompiled

    def check() -> None:
        rng = np.random.default_rng(0)
        clip, laid = VERBS[verb], LAYOUTS[layout]
        base = cupy.ones(120_000 if layout == "large" else 10_000, cupy.float32)
        leaves = laid(base)
        bound, divisor = cupy.array(1.0, cupy.float32), cupy.array(2.0, cupy.float32)
        clip(laid(base.copy()), bound, divisor, p)
        stream.synchronize()
        stream.begin_capture()
        out, norm = clip(leaves, bound, divisor, p)
        graph = stream.end_capture()
        out = [] if kept == "norm" else out
        norm = None if kept == "grads" else norm
        others = filled(pool)
        for scale in (1.0, 30.0):
            x = (rng.normal(size=base.size) * scale).astype(np.float32)
            if p >= 0:
                x[rng.integers(0, x.size, 99)] = 0
            values = [v.copy() for v in laid(x)]
            want = norm_in_float64(values, p)
            c, d = np.float32(want / 5), np.float32(1.0 if verb == "norm" else 1.5 + scale)
            if verb.startswith("value"):
                c, d = np.float32(scale), np.float32(1.0)
            base.set(x, stream=stream)
            bound.set(np.array(c), stream=stream)
            divisor.set(np.array(d), stream=stream)
            graph.launch(stream)
            if norm is not None:
                np.testing.assert_allclose(norm.get(stream=stream), want / d, rtol=1e-6)
            for got, v in zip(out, values, strict=True) if out else ():
                right = np.clip(v, -c, c) if verb.startswith("value") else v * (min(c * d / want, 1.0) / d)
                np.testing.assert_allclose(got.get(stream=stream), right, rtol=1e-6)
        assert all((other.get(stream=stream) == 7.0).all() for other in others)

    if not compiles:
        monkeypatch.setattr(compiler, "compiled", refused)
    pool, stream = cupy.cuda.MemoryPool(), cupy.cuda.Stream(non_blocking=True)
    with cupy.cuda.using_allocator(pool.malloc), stream:
        check()
        stream.synchronize()
        gc.collect()
        assert pool.used_bytes() == 0, "memory that nobody gives back"


@pytest.mark.parametrize("p", [2.0, 3.0])
def test_a_graph_over_two_devices(two_devices: None, p: float) -> None:  # noqa: F811
    """What is moved between devices, and what other devices measure, stays the graph's own as well."""
    pool = cupy.cuda.MemoryPool()
    values = [np.arange(1, 5001, dtype=np.float32), np.arange(1, 7001, dtype=np.float32)]
    with cupy.cuda.Device(1):
        second = cupy.cuda.Stream(non_blocking=True)
    with cupy.cuda.Device(0):
        first = cupy.cuda.Stream(non_blocking=True)
    with cupy.cuda.using_allocator(pool.malloc), cupy.cuda.Device(1), second, cupy.cuda.Device(0), first:
        leaves = [on(device, x) for device, x in enumerate(values)]

        def clip() -> Any:
            out = gradclip.clip_grad_norm([leaves[0][::2], leaves[1][::3]], 1.0, p)
            with cupy.cuda.Device(1):
                first.wait_event(second.record())
            return out

        clip()
        for stream in (first, second):
            stream.synchronize()
        first.begin_capture()
        out = clip()
        graph = first.end_capture()
        others = []
        for device in (0, 1):
            with cupy.cuda.Device(device):
                others += filled(pool)
        graph.launch(first)
        first.synchronize()
        parts = [values[0][::2], values[1][::3]]
        want = norm_in_float64(parts, p)
        np.testing.assert_allclose(host(out.norm), want, rtol=1e-6)
        for got, x in zip(out.grads, parts, strict=True):
            np.testing.assert_allclose(host(got), x / want, rtol=1e-6)
        assert all((host(other) == 7.0).all() for other in others)
        gc.collect()  # now, and not in the middle of another capture: freeing memory would break that


def test_threads_that_share_the_kernels() -> None:
    errors: list[Any] = []

    def work(i: int) -> None:
        try:
            with cupy.cuda.Stream(non_blocking=True) as stream:
                for p in (2.0, 1.5 + i % 2, INF):
                    x = cupy.full(100, float(i + 1), cupy.float32)
                    out = gradclip.clip_grad_norm([x], 1.0, p)
                    want = mpmath.mpf(i + 1) * (1 if p == INF else mpmath.mpf(100) ** (1 / mpmath.mpf(p)))
                    exact.check_norm(out.norm.get(stream=stream), want, "float32", 8)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


# -- compilers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [2.0, 3.0])
@pytest.mark.parametrize("which", ["measure", "joined", "settle", "scale", "all"])
def test_a_kernel_that_does_not_compile_is_replaced_with_one_warning(
    monkeypatch: pytest.MonkeyPatch,
    which: str,
    p: float,
) -> None:
    """The broken kernels are new ones for the compiler: each test breaks them in words of its own."""
    wrong = f"#error {which} {p} is broken on purpose\n"
    monkeypatch.setattr(compiler, "_failures", [])
    for name in ("measure", "joined", "settle", "scale") if which == "all" else (which,):
        monkeypatch.setattr(programs, name, lambda *args, broken=wrong + name: broken)
    values = [np.float32([3.0, -4.0, 1.0]), np.float16([0.5]), np.array(2.0)]
    want = exact.norm(values, p)

    def clip() -> None:
        leaves = [cupy.array(x) for x in values]
        out = gradclip.clip_grad_norm(leaves, 1.0, p, divide_by=2.0)
        norm = gradclip.clip_grad_norm_(leaves, cupy.array(0.5), p)
        exact.check_norm(host(out.norm), want / 2, "float64", 8)
        exact.check_norm(host(norm), want, "float64", 8)
        for got, mine, x in zip(out.grads, leaves, values, strict=True):
            check_right(host(got), x, 1 / want)
            check_right(host(mine), x, 0.5 / want)

    if which == "joined" and p == 2:  # a norm of one pass on one device has nothing to join
        clip()
    else:
        with pytest.warns(RuntimeWarning, match=f"could not be compiled.*{which if which != 'all' else ''}") as caught:
            clip()
        assert len(caught) == 1
    clip()  # and never again: warnings are errors here


@pytest.mark.parametrize("which", ["measure", "joined", "settle"])
def test_other_shards_are_called_once_even_if_a_kernel_does_not_compile(
    monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """A second call would wait for ever for shards that have gone on."""
    monkeypatch.setattr(compiler, "_failures", ["warned already"])
    real, ops = getattr(programs, which), []

    def broken(*args: Any) -> Any:
        if which == "settle":
            return "#error settle is broken on purpose"
        return real(*args) if args[1] == 0 else f"#error {which} is broken in the second pass"

    def all_reduce(partial: Any, op: str) -> Any:
        ops.append(op)
        return partial

    monkeypatch.setattr(programs, which, broken)
    values = [np.float32([3.0, -4.0]), np.array([1.0, 2.0])]
    out = gradclip.clip_grad_norm([cupy.array(x) for x in values], 1.0, 3.0, all_reduce=all_reduce)
    assert ops == ["max", "sum"]
    exact.check_norm(host(out.norm), exact.norm(values, 3.0), "float64", 8)

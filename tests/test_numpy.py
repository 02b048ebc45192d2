"""NumPy's own kernels: exact for every float16, whatever the number of threads, within a few MB of memory."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import tracemalloc
import warnings
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import exact
import gradclip
from backends import np_dtype
from exact import mpmath
from gradclip import _threads as threads
from gradclip._backends.numpy import NumpyBackend, scaling, sixteen, tables
from gradclip._backends.numpy import loops as blocks
from gradclip._decide import Bounds
from gradclip._groups import Groups
from gradclip._norms import norm_for

pytestmark = pytest.mark.library("numpy")


@pytest.fixture
def limit() -> Iterator[None]:
    yield
    gradclip.set_num_threads(None)


def every_float16() -> np.ndarray:
    x = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    return x[np.isfinite(x)]


def test_every_float16_is_widened_exactly():
    x = every_float16()
    for start in range(0, x.size, sixteen.CHUNK):
        piece = x[start : start + sixteen.CHUNK]
        assert (sixteen.as_single(piece) == np.abs(piece.astype(np.float64))).all()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_float16_that_is_not_finite_is_seen(bad):
    x = np.full(1000, 0.5, np.float16)
    x[777] = bad
    assert math.isnan(blocks.squares(x, False))
    assert not math.isfinite(gradclip.global_norm([x]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_products_of_16_bits_are_rounded_to_nearest(dtype):
    """All finite numbers with many factors, against products in float64: those have 35 bits at most, and are exact."""
    x = np.arange(1 << 16, dtype=np.uint16).view(np_dtype(dtype))
    x = x[np.isfinite(x.astype(np.float32))]
    rng = np.random.default_rng(0)
    factors = [
        1.0,
        0.5,
        1 - 2**-24,
        1 / 3,
        2.0**-14,
        2.0**-24,
        2.0**-25,
        1e-6,
        *rng.random(40),
        *np.exp2(-40 * rng.random(20)),
    ]
    bits, lowest = exact.FORMATS[dtype]
    for factor in np.float32(factors):
        out = np.empty_like(x)
        blocks.multiplied(x, out, [float(factor)], False)
        for few in (slice(i, i + 9999) for i in range(0, x.size, 9999)):  # which goes another way
            some = x[few].copy()
            blocks.multiplied(some, some, [float(factor)], False)
            assert some.tobytes() == out[few].tobytes()
        want = x.astype(np.float64) * np.float64(factor)
        _, exponent = np.frexp(want)
        unit = np.exp2(np.maximum(exponent - 1, lowest).astype(np.float64) - (bits - 1))
        assert (np.abs(out.astype(np.float64) - want) <= 0.5001 * unit).all(), factor
        assert (np.signbit(out) == np.signbit(x)).all()


EVERY = np.arange(1 << 16, dtype=np.uint16).view(np.float16)


@pytest.mark.parametrize("factor", [0.5, 1 / 3, 1 - 2**-11, 1e-3, 2.0**-14, 2.0**-25, 2.0**-126, 1.5, 3e4])
def test_the_table_of_products_is_exact(factor):
    """Of all 65,536 numbers: formed in float32 (by more than 1, in float64), where 35 bits of the product are not lost
    twice; float64 holds it exactly.
    """
    factor, out = float(np.float32(factor)), EVERY.copy()
    with np.errstate(all="ignore"):  # as in a session
        table = tables.tables_for([np.tile(EVERY, 2)], [0], [scaling.steps_of(factor, 1.0)], [False])[0]
        tables.look_up(out, out, table)
        exactly = EVERY.astype(np.float64) * factor
        want = (exactly if factor > 1 else exactly.astype(np.float32)).astype(np.float16)
    assert (np.isnan(out) == np.isnan(EVERY)).all()
    assert (np.signbit(out) == np.signbit(EVERY)).all()
    finite = ~np.isnan(EVERY)
    assert out[finite].tobytes() == want[finite].tobytes()


def test_which_products_are_looked_up():
    x, small = np.ones(1 << 17, np.float16), np.ones(100, np.float16)
    leaves, wide = [x, small, small, x, x, x, x.astype(np.float32)], [False] * 6
    steps = [(0.5,), (0.5,), (), (0.0,), (1.0, math.nan, 1.0), (0.25,)]
    with np.errstate(all="ignore"):
        found = tables.tables_for(leaves, [0, 0, 1, 2, 3, 4, 5], steps, wide)
        many = tables.tables_for([small] * 1311, [5] * 1311, steps, wide)
    assert list(found) == [0]
    assert list(many) == [5]
    assert many[5].view(np.float16)[np.float16(-3).view(np.uint16)] == -0.75


@pytest.mark.parametrize("order", ["C", "F", "strided"])
# The quick size has each dtype and each order once at the largest.
@pytest.mark.parametrize("size", [6, 20_000, pytest.param(300_000, marks=pytest.mark.sampled(4))])
@pytest.mark.parametrize("dtype", ["<f2", ">f2", "bfloat16"])
def test_what_is_not_finite_stays_so_where_the_norm_is_told(dtype, size, order):
    """With `norm` nothing is measured: a leaf may hold inf and NaN, and only its other elements are known."""
    x = np.random.default_rng(5).standard_normal(2 * size).reshape(2, -1)
    x[0, 1:4] = math.inf, -math.inf, math.nan
    x = x.astype(np_dtype(dtype) if dtype == "bfloat16" else dtype)
    x = {"C": x, "F": np.asfortranarray(x), "strided": np.repeat(x, 2, 1)[:, ::2]}[order]
    want = (x.astype(np.float64) * float(np.float32(1 / 3))).astype(np.float32).astype(x.dtype)
    for per, bounds, norm in ((None, 1.0, 3.0), ("unit", [np.ones((1, size))], [np.full((1, size), 3.0)])):
        got = gradclip.clip_grad_norm([x], bounds, per=per, norm=norm).grads[0]
        np.testing.assert_array_equal(got.astype(np.float64), want.astype(np.float64))
        inside = x.copy(order="K")
        gradclip.clip_grad_norm_([inside], bounds, per=per, norm=norm)
        np.testing.assert_array_equal(inside.astype(np.float64), want.astype(np.float64))


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_rows_of_equal_elements(kind):
    """The worst case of a sum in the dtype itself: all errors have one sign. Promised are 4 units, 2 to 4 eps."""
    row = blocks.row(kind)
    assert row in (512, 256, 128, 64, 0)
    for value in np.random.default_rng(1).uniform(1, 2, 300).astype(kind):
        got = mpmath.sqrt(mpmath.mpf(blocks._dot_rows(np.full(10 * max(row, 1), value))))
        want = mpmath.mpf(float(value)) * mpmath.sqrt(10 * max(row, 1))
        assert abs(got / want - 1) < (1 if kind is np.float32 else 1.5) * np.finfo(kind).eps


def test_a_library_that_adds_in_one_row_is_not_trusted(monkeypatch):
    """Rows are as long as the BLAS at hand is exact: one that rounds after every element gets none."""

    def in_one_row(a, b):
        out = np.zeros(a.shape[0], a.dtype)
        for i in range(a.shape[1]):
            out += a[:, i] * b[:, i]
        return out

    monkeypatch.setattr(np, "vecdot", in_one_row)
    assert blocks.row.__wrapped__(np.float32) < 256
    monkeypatch.setattr(blocks, "row", lambda kind: 0)
    x = np.full(1000, 0.1, np.float32)
    exact.check_norm(gradclip.global_norm([x]), exact.norm([x]), "float32", ulps=1)


@pytest.mark.slow
@pytest.mark.parametrize("value", [0.01, 1 / 3, 0.7, 1.9999])
def test_1e8_equal_elements_are_within_1e_7(value):
    x = np.full(10**8, value, np.float32)
    assert abs(float(gradclip.global_norm([x])) / (float(x[0]) * 1e4) - 1) < 1e-7


SHAPES = [(3,), (40, 50), (1 << 18,), (700, 1000), (1 << 20,), (), (0, 4), (5000,)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64"])
def test_the_number_of_threads_changes_no_bit(dtype, limit):
    rng = np.random.default_rng(2)
    tree = [np.asarray(rng.standard_normal(shape) * 10.0**-n).astype(np_dtype(dtype)) for n, shape in enumerate(SHAPES)]
    results = []
    for n in (1, 2, 7):
        gradclip.set_num_threads(n)
        for _ in range(3):
            grads, norm = gradclip.clip_grad_norm(tree, 0.25)
            inside = [x.copy() for x in tree]
            assert float(gradclip.clip_grad_norm_(inside, 0.25)) == float(norm)
            results.append([norm.tobytes(), *(x.tobytes() for x in grads)])
            assert [x.tobytes() for x in inside] == results[-1][1:]
    assert all(result == results[0] for result in results)


def test_threads_keep_the_callers_error_state(limit):
    """NumPy warns in a thread of its own state: here float32 squares overflow in blocks that other threads take."""
    gradclip.set_num_threads(4)
    tree = [np.full(1 << 20, 3e38, np.float32) for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grads, norm = gradclip.clip_grad_norm(tree, 1.0)
    assert float(norm) == math.inf
    assert abs(float(grads[2][7]) * math.sqrt(3 * 2**20) - 1) < 1e-6


def test_many_callers_at_once(limit):
    gradclip.set_num_threads(2)
    trees = [[np.full(1 << 20, i + 1.0, np.float32), np.full(3, i + 1.0, np.float32)] for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        norms = list(pool.map(lambda tree: float(gradclip.clip_grad_norm(tree, 1.0).norm), trees * 4))
    for i, norm in enumerate(norms):
        assert norm == pytest.approx((i % 6 + 1) * math.sqrt(2**20 + 3), rel=1e-6)


def test_jobs_run_once_each_and_errors_arrive(limit):
    gradclip.set_num_threads(3)
    assert threads.each(lambda x: x * x, range(100), 3) == [x * x for x in range(100)]
    assert threads.each(lambda x: x, [], 3) == []

    def fail(x):
        raise LookupError(f"job {x}")

    with pytest.raises(LookupError, match=r"^job \d"):
        threads.each(fail, range(10), 3)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_a_bad_limit(value, error):
    with pytest.raises(error, match=r"^limit must be "):
        gradclip.set_num_threads(value)


def run(code: str, **environment: str) -> str:
    env = {**os.environ, **environment}
    env["PYTHONPATH"] = os.pathsep.join(
        p for p in (os.path.dirname(os.path.dirname(gradclip.__file__)), env.get("PYTHONPATH")) if p
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


COUNT = "from gradclip import _threads as threads; print(threads.num_threads())"


def test_the_environment_and_the_affinity_mask_limit_the_threads():
    assert run(COUNT, GRADCLIP_NUM_THREADS="3") == "3"
    if hasattr(os, "sched_setaffinity"):
        one = min(os.sched_getaffinity(0))
        assert run(f"import os; os.sched_setaffinity(0, {{{one}}}); {COUNT}", GRADCLIP_NUM_THREADS="") == "1"
        assert int(run(COUNT, GRADCLIP_NUM_THREADS="")) == min(len(os.sched_getaffinity(0)), 8)


def test_a_bad_environment_variable_is_named():
    code = """
import numpy as np, gradclip
try:
    gradclip.global_norm([np.ones(1 << 21, np.float32)])
except ValueError as error:
    print(error)
"""
    assert "GRADCLIP_NUM_THREADS must be a number >= 1, got 'many'" in run(code, GRADCLIP_NUM_THREADS="many")


def test_one_core_starts_no_thread():
    code = """
import threading, numpy as np, gradclip
gradclip.clip_grad_norm_([np.ones(1 << 22, np.float32)], 1.0)
print(threading.active_count())
"""
    assert run(code, GRADCLIP_NUM_THREADS="1") == "1"
    assert run(code, GRADCLIP_NUM_THREADS="2") == "2"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_has_threads_of_its_own():
    code = """
import os, warnings, numpy as np, gradclip
warnings.simplefilter("ignore")
x = [np.ones(1 << 21, np.float32)]
before = float(gradclip.global_norm(x))
pid = os.fork()
if pid == 0:
    os._exit(0 if float(gradclip.global_norm(x)) == before else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert run(code, GRADCLIP_NUM_THREADS="4") == "0"


def test_a_call_while_the_interpreter_ends():
    code = """
import atexit, numpy as np, gradclip
x = [np.ones(1 << 22, np.float32)]
gradclip.global_norm(x)
atexit.register(lambda: print(float(gradclip.global_norm(x))))
"""
    assert run(code, GRADCLIP_NUM_THREADS="4") == "2048.0"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_in_place_takes_under_4_mb(dtype, limit):
    """124 million elements would take as much: blocks are of one size, whatever the leaf's."""
    gradclip.set_num_threads(2)
    tree = [np.ones(6_000_000, np_dtype(dtype)), *(np.ones(1000, np_dtype(dtype)) for _ in range(500))]
    gradclip.clip_grad_norm_(tree, 1.0)
    tracemalloc.start()
    try:
        gradclip.clip_grad_norm_(tree, 0.5)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4e6


@pytest.mark.sampled(5)
@pytest.mark.parametrize("order", ["C", "F", "strided", "transposed", "rows", "broadcast"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64", ">f4", ">f2", ">f8"])
def test_layouts_larger_than_a_block(order, dtype):
    rng = np.random.default_rng(3)
    base = rng.standard_normal((700, 800)).astype(dtype if dtype.startswith(">") else np_dtype(dtype))
    x = {
        "C": base,
        "F": np.asfortranarray(base),
        "strided": base[::2, ::3],
        "transposed": base.T[3:],
        "rows": base[:, :799],
        "broadcast": np.broadcast_to(base[:1], base.shape),
    }[order]
    wide = x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)
    norm = math.sqrt(math.fsum((wide.real**2 + wide.imag**2).ravel()))
    grads, got = gradclip.clip_grad_norm([x], 1.0)
    assert float(got) == pytest.approx(norm, rel=5e-7)
    assert grads[0].dtype == x.dtype
    eps = {"bfloat16": 2.0**-8, "float16": 2.0**-11}.get(x.dtype.name, 2.0**-23)
    np.testing.assert_allclose(grads[0].astype(wide.dtype), wide / norm, rtol=2 * eps, atol=2.0**-25)
    if x.flags.writeable:
        mine = x.copy(order="K")
        gradclip.clip_grad_norm_([mine], 1.0)
        assert mine.tobytes() == grads[0].tobytes()


@pytest.mark.parametrize("size", [3, 1100])
@pytest.mark.parametrize(
    "views", [lambda x: [x, x.T], lambda x: [x, x[::-1]], lambda x: [x[:2], x[1:]], lambda x: [x.T[None], x.T]]
)
def test_what_leaves_share_is_scaled_once(size, views, limit):
    gradclip.set_num_threads(2)
    x = np.random.default_rng(4).standard_normal((size, size))
    tree, before = views(x), x.copy()
    norm = exact.norm(tree) if size < 10 else mpmath.mpf(float(gradclip.global_norm([v.copy() for v in tree])))
    reported = gradclip.clip_grad_norm_(tree, 0.5)
    exact.check_norm(reported, norm, "float64", ulps=4)
    np.testing.assert_allclose(x, before * (0.5 / float(norm)), rtol=1e-15)


@pytest.mark.parametrize("size", [20, 2_100_000])
def test_a_leaf_whose_own_elements_share_memory_is_scaled_once(size, limit):
    gradclip.set_num_threads(2)
    x = np.random.default_rng(4).standard_normal(size)
    before, window = x.copy(), np.lib.stride_tricks.sliding_window_view(x, 2, writeable=True)
    norm = float(gradclip.clip_grad_norm_([window], 0.5))
    assert math.isclose(norm, math.sqrt(2 * math.fsum(before**2) - before[0] ** 2 - before[-1] ** 2), rel_tol=1e-15)
    np.testing.assert_allclose(x, before * (0.5 / norm), rtol=1e-15)


def test_the_same_list_may_have_changed_since_the_last_call():
    tree = [np.full(4, 3, np.float32), np.full(4, 4, np.float32)]
    assert float(gradclip.clip_grad_norm_(tree, 1.0)) == 10
    tree[1].flags.writeable = False
    before = [x.copy() for x in tree]
    with pytest.raises(gradclip.LeafError, match=r"grads\[1\] is a read-only array"):
        gradclip.clip_grad_norm_(tree, 0.5)
    assert [x.tobytes() for x in tree] == [x.tobytes() for x in before]
    tree[1] = np.full((2, 2), 4.0)
    norm = gradclip.global_norm(tree)
    assert norm.dtype == np.float64
    exact.check_norm(norm, exact.norm(tree), "float64")
    tree[1] = np.full(8, 1, np.int32)
    with pytest.raises(gradclip.LeafError, match=r"grads\[1\] is an array of dtype int32"):
        gradclip.global_norm(tree)


def test_the_variable_may_change_between_two_calls(monkeypatch, limit):
    gradclip.set_num_threads(None)
    tree = [np.ones(1 << 20, np.float32)] * 4
    for told in (1, 4, 2):
        monkeypatch.setenv("GRADCLIP_NUM_THREADS", str(told))
        assert threads.num_threads() == told
        assert float(gradclip.global_norm(tree)) == 2048
    monkeypatch.setenv("GRADCLIP_NUM_THREADS", "few")
    with pytest.raises(ValueError, match="GRADCLIP_NUM_THREADS must be a number >= 1, got 'few'"):
        gradclip.global_norm(tree)


@pytest.mark.parametrize("shape", [(8,), (1024,), (300, 512)])
def test_no_array_is_kept_alive(shape):
    tree = [np.ones(shape, np.float32) for _ in range(3)]
    dead = [weakref.ref(x) for x in tree]
    gradclip.clip_grad_norm_(tree, 1.0)
    gradclip.global_norm(tree)
    del tree
    assert [x() for x in dead] == [None] * 3


EDGES = [0.0, 5e-324, 1e-310, 1e-160, 0.3, 1.0, 3.5, 1e20, 1e160, 1.7e308, math.inf, math.nan]


NORMS = [(2.0, False), (2.0, True), (1.0, True), (math.inf, True), (3.0, True), ("rms", False)]


@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
@pytest.mark.parametrize("given", [(), ("divide_by",), ("unit",), ("norm",), ("norm", "divide_by")])
@pytest.mark.parametrize(("p", "binned"), NORMS)
def test_the_policy_of_one_group_is_that_of_many(p, binned, given, nonfinite):
    """What is read off as a function of Python, beside the same steps on rows of two equal numbers."""
    draw, backend, norm = random.Random(str((p, given))), NumpyBackend(), norm_for(p, binned)
    one, two = Groups((0,), (None,), ((),), (False,)), Groups((0, 1), (None, None), ((), ()), (False, False))
    for _ in range(40):
        numbers = {name: draw.choice(EDGES) for name in ("max_norm", *given)}
        bounds = backend.bounds(Bounds(**numbers), [])
        slots = [np.array([[draw.choice(EDGES)] for _ in range(n)]) for n in norm.slots]
        for x in slots:
            x[:1], x[2:] = 0.0, np.where(x[2:] < 4, np.floor(x[2:]), 0.0)  # a middle bin, counts and flags
        seen = () if "norm" in given else tuple(slots)
        with np.errstate(all="ignore"):
            got = backend.decide(norm, seen, bounds, one, nonfinite)
            want = backend.decide(norm, tuple(np.repeat(x, 2, axis=1) for x in seen), bounds, two, nonfinite)
        rows = [
            [np.broadcast_to(1.0 if x is None else x, 2)[0] for x in (*v.factors, v.finite, v.joined_finite)]
            for v in (got, want)
        ]
        np.testing.assert_array_equal(got.norms[0], want.norms[0], str(numbers))
        np.testing.assert_array_equal(*rows, str(numbers))


def test_which_arrays_are_folded():
    def folded(x):
        return scaling.folds(x.strides, x.shape, x.itemsize)

    x = np.zeros((8, 9, 10))
    whole = [x, x.T, x[::2, 1:, ::-3], x[..., None], x[:, :1], x.transpose(1, 0, 2)[3:5], x[::-1].real]
    assert not any(map(folded, whole))
    windows = np.lib.stride_tricks.sliding_window_view(x, (2, 2), axis=(0, 1))
    assert folded(windows)
    assert not folded(windows[::2, ::2])
    assert folded(np.lib.stride_tricks.as_strided(x, (5, 5), (8, 16)))

"""`clip_grad_value` on CuPy: as NumPy's, in one launch for all leaves whose bounds are numbers, and without copies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_cupy import counter  # noqa: F401
from test_cupy_kernels import INF, compiler, cupy, drawn, every, laid_out, marks, table
from test_cupy_memory import counted

import gradclip
from devices import host

pytestmark = marks

BOUNDS: list[Any] = [1.0, (-0.5, 2.0), (0.0, INF), (-INF, 0.25), (2.0**-149, 2.0**-130), (1e300, 1e301), (0.1, 0.1)]


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("name", ["float16", "float32", "float64"])
def test_every_number_is_limited_as_on_the_host(name: str, bounds: Any) -> None:
    """Bit by bit, whatever lies where: subnormal numbers, zeros of both signs, infinities, NaN with its payload."""
    x = every("float32" if name == "float64" else name)
    x = np.repeat(x, 2).view(name) if name == "float64" else x
    rng = np.random.default_rng(1)
    values = [x, *(drawn(rng, shape, name, -9, 9) for shape in ((), (1,), (0, 3), (300,), (5, 4), (16, 9)))]
    leaves = [laid_out(rng, y) for y in values]
    with np.errstate(all="ignore"):
        want = gradclip.clip_grad_value(values, bounds)
    for got, right in zip(gradclip.clip_grad_value(leaves, bounds), want, strict=True):
        assert host(got).tobytes() == right.tobytes()
    gradclip.clip_grad_value_(leaves, bounds)
    for got, right in zip(leaves, want, strict=True):
        assert host(got).tobytes() == right.tobytes()


def test_bfloat16_is_limited_as_on_the_host() -> None:
    x = every("bfloat16")
    try:
        leaf = cupy.array(x)
    except (TypeError, ValueError):
        pytest.skip("this CuPy has no bfloat16")
    for bounds in BOUNDS:
        with np.errstate(all="ignore"):
            want = gradclip.clip_grad_value([x], bounds)[0]
        assert host(gradclip.clip_grad_value([leaf], bounds)[0]).tobytes() == want.tobytes()


def test_each_leaf_has_its_own_bounds() -> None:
    """Numbers on the host and on the device, some for several leaves, and arrays that broadcast."""
    rng = np.random.default_rng(2)
    values = [drawn(rng, (5, 4), "float32", -3, 3) for _ in range(7)]
    leaves = [cupy.array(x) for x in values]
    one, row = np.float32(0.75), np.linspace(0.1, 2, 4, dtype=np.float32)
    bounds = [1.0, one, (-0.5, 0.25), one, row, (-row, 1.0), np.full(1, 0.5, np.float32)]

    def there(x: Any) -> Any:
        return tuple(map(there, x)) if isinstance(x, tuple) else x if isinstance(x, float) else cupy.array(x)

    for mine in (bounds, [there(x) for x in bounds]):
        want = gradclip.clip_grad_value(values, bounds)
        for got, right in zip(gradclip.clip_grad_value(leaves, mine), want, strict=True):
            np.testing.assert_array_equal(host(got), right)


def test_bounds_on_the_device_may_be_anything() -> None:
    """NaN gives NaN, and a lower bound above the upper one what the formula says: nothing is read to know."""
    x = np.array([-3.0, 0.5, np.nan, 7.0], np.float32)
    leaves = [cupy.array(x)]
    nan, two = cupy.array(np.nan), cupy.array(2.0)
    for bounds in (nan, (nan, 2.0), (-1.0, nan)):
        assert np.isnan(host(gradclip.clip_grad_value(leaves, bounds)[0])).all()
    for bounds, want in (((two, 1.0), [1.0, 1.0, np.nan, 1.0]), (cupy.array(-1.0), [-1.0, -1.0, np.nan, -1.0])):
        np.testing.assert_array_equal(host(gradclip.clip_grad_value(leaves, bounds)[0]), np.float32(want))


def test_launches(counter: Any) -> None:  # noqa: F811
    """One for each table; bounds that differ, and such on the device, take a few more for all leaves. No waiting."""
    if counter is None:
        pytest.skip("launches are counted on emulated devices")
    leaves = [cupy.ones(n % 50 + 1, "f4") for n in range(2 * table.LEAVES[table.WHOLE])]
    c = cupy.array(0.5)
    cases = [(0.5, 2), ((-1.0, c), 2), ((c, 1.0), 2), (c, 3), ([0.5 + i for i in range(len(leaves))], 2 + 2 * 2)]
    for bounds, launches in cases:
        for verb in (gradclip.clip_grad_value, gradclip.clip_grad_value_):
            verb(leaves, bounds)  # compiles
            with counter.record() as r:
                verb(leaves, bounds)
            assert r["kernel"] == launches, (bounds, r.kernels)
            assert (r.synced, r["d2h"]) == (0, 0), r.events


@pytest.mark.parametrize("how", ["apart", "the same", "overlapping", "strided"])
def test_in_place_nothing_is_copied_but_what_must_be(how: str) -> None:
    n = 2**14
    room = cupy.array((np.arange(8 * n) % 251 - 125).astype(np.float32))
    alone = [room[i * n : (i + 1) * n] for i in range(4)]
    last = {"apart": room[4 * n :], "the same": alone[0], "overlapping": room[n // 2 : n], "strided": room[4 * n :: 2]}
    leaves = [*alone, last[how]]
    want = [np.clip(host(x), -3, 3) for x in leaves]
    gradclip.clip_grad_value_([cupy.ones(3, "f4")], 1.0)  # compiles
    _, counts = counted(lambda: gradclip.clip_grad_value_(leaves, 3.0))
    for got, right in zip(leaves, want, strict=True):
        np.testing.assert_array_equal(host(got), right)
    copied = {"overlapping": 4 * (n // 2), "strided": 4 * last[how].size}.get(how, 0)
    assert counts.total <= copied + 2**12


def test_where_the_kernel_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.linspace(-2, 2, 99, dtype=np.float32)

    def never(*_: Any) -> Any:
        raise compiler.NotCompiled

    monkeypatch.setattr(compiler, "compiled", never)
    leaf = cupy.array(x)
    np.testing.assert_array_equal(host(gradclip.clip_grad_value([leaf], 1.5)[0]), np.clip(x, -1.5, 1.5))
    gradclip.clip_grad_value_([leaf], 0.5)
    np.testing.assert_array_equal(host(leaf), np.clip(x, -0.5, 0.5))

"""The rules in CuPy: NumPy's results, and steps that never wait, copy nothing, and launch as many kernels each time."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
from test_adaptive import RULES, WAYS, clipped_rows, rows_of
from test_cupy import counter, two_devices  # noqa: F401

from backends import MISSING
from devices import host, on
from gradclip.adaptive import AutoClip, NormGrowth

pytestmark = [
    pytest.mark.library("cupy"),
    pytest.mark.skipif("cupy" in MISSING, reason=f"cupy: {MISSING.get('cupy')}"),
]
here = "cupy" not in MISSING
cupy: Any = importlib.import_module("cupy") if here else None

#: How many kernels a step launches at most: for float32 leaves, whose norms float64 holds, and for float64 leaves, the
#: norms of which may be beyond it. The clip's own five, and one for each operation of the rule.
LAUNCHES = {
    ("autoclip", None): (68, 494),
    ("autoclip", "leaf"): (74, 501),
    ("zclip", None): (64, 942),
    ("zclip", "leaf"): (70, 949),
    ("zclip, with a bound", None): (64, 942),
    ("zclip, with a bound", "leaf"): (70, 949),
    ("adagc", None): (53, 594),
    ("adagc", "leaf"): (60, 632),
    ("normgrowth", None): (25, 323),
    ("normgrowth", "leaf"): (31, 330),
    ("quantile", None): (29, 321),
    ("quantile", "leaf"): (33, 325),
}


def arrays(state: Any) -> list[Any]:
    out = [x for field in state for x in (field if isinstance(field, tuple) else (field,))]
    return [x for x in out if x is not None]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("per", ["leaf", "global", "example"])
@pytest.mark.parametrize("name", RULES)
def test_same_as_numpy(name: str, per: str, dtype: type) -> None:
    """Of any size, and with a spike: huge and tiny norms in one history."""
    rule, way = RULES[name], WAYS[per]
    for sort in ("any", "spike"):
        rows = rows_of(dtype, *((-1020, 1024) if dtype is np.float64 else (-120, 128)), sort, 7, steps=6)
        want, bounds, _ = clipped_rows(rule, way, rows)

        def four(x: Any) -> Any:
            return cupy.stack([cupy.asarray(x)] * 4)

        state = first = rule.init(way.grads(rows[0], four), way.per)
        for row, left, bound in zip(rows, want, bounds, strict=True):
            grads, _, max_norm, state = rule.clip(way.grads(row, four), state, per=way.per)
            got = {k: host(x) for k, x in grads.items()} if isinstance(grads, dict) else [host(x) for x in grads]
            np.testing.assert_allclose(way.numbers(got), left, rtol=8 * float(np.finfo(dtype).eps))
            one, other = (x["a"] if isinstance(x, dict) else x for x in (max_norm, bound))
            np.testing.assert_allclose(host(one), other, rtol=8 * float(np.finfo(dtype).eps))
        assert [(x.dtype, x.shape) for x in arrays(state)] == [(x.dtype, x.shape) for x in arrays(first)]
        assert all(type(x) is cupy.ndarray for x in arrays(state))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("per", [None, "leaf"])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_no_step_waits(counter: Any, name: str, in_place: bool, per: Any, dtype: type) -> None:  # noqa: F811
    """Nothing is read, written or copied by the host, and the number of launches is fixed, whatever the norms are."""
    if counter is None:
        pytest.skip("a GPU does not count launches")
    rule = RULES[name]
    steps = [{k: cupy.full(n, x, dtype) for k, n in (("w", 5), ("b", 3))} for x in (1, 2, 0, 1, 100, 1, 1e30, 1e-30)]
    state = rule.init(steps[0], per)
    clip = rule.clip_ if in_place else rule.clip
    for grads in steps[:3]:
        state = clip(grads, state, per=per)[-1]
    counts = []
    for grads in steps[3:]:
        with counter.record() as r:
            out = clip(grads, state, per=per)
        state = out[-1]
        counts.append(r["kernel"])
        assert r.synced == 0, r.events
        for kind in ("d2h", "h2d", "compile", "module_load"):
            assert r[kind] == 0, (kind, r)
    assert len(set(counts)) == 1, counts
    assert 5 < counts[0] <= LAUNCHES[name, per][dtype is np.float64], counts


@pytest.mark.parametrize("name", RULES)
def test_update_does_not_wait(counter: Any, name: str) -> None:  # noqa: F811
    if counter is None:
        pytest.skip("a GPU does not count launches")
    rule = RULES[name]
    state = rule.init([cupy.zeros(3)])
    norms = [cupy.asarray(x) for x in (1.0, 2.0, 0.0, 5.0, 1.0, 9.0)]
    for norm in norms[:3]:
        state = rule.update(state, norm)[1]
    for norm in norms[3:]:
        with counter.record() as r:
            state = rule.update(state, norm)[1]
        assert (r["d2h"], r["h2d"], r.synced) == (0, 0, 0), r.events


def test_what_is_not_finite_is_not_learned_from() -> None:
    rule = AutoClip(0.5, 3)
    grads = {"a": cupy.ones(3), "b": cupy.ones(2)}
    state = rule.clip(grads, rule.init(grads, "leaf"), per="leaf").state
    bad = {"a": cupy.asarray([1.0, np.nan, 2.0]), "b": cupy.ones(2) * 2}
    out = rule.clip(bad, state, per="leaf", nonfinite="zero")
    assert host(out.grads["a"]).tolist() == [0.0, 0.0, 0.0]
    assert host(out.state.count).tolist() == [1, 2]
    np.testing.assert_allclose(host(out.max_norm["b"]), 1.5 * 2**0.5, rtol=1e-15)


def test_states_live_where_the_leaves_do(two_devices: None) -> None:  # noqa: F811
    """On a device that is not the current one, and for leaves on two."""
    rule = NormGrowth(2.0)
    there = {"a": on(1, np.float32([3.0, 4.0])), "b": on(1, np.float32([12.0]))}
    state = rule.init(there)
    assert {x.device.id for x in arrays(state)} == {1}
    for scale in (1.0, 10.0):
        grads = {k: on(1, scale * host(x)) for k, x in there.items()}
        clipped, norm, bound, state = rule.clip(grads, state)
        assert {x.device.id for x in (*clipped.values(), norm, bound, *arrays(state))} == {1}
    np.testing.assert_allclose(host(clipped["b"]), [24.0], rtol=1e-6)
    both = {"a": on(0, np.float32([3.0, 4.0])), "b": on(1, np.float32([12.0]))}
    for per in (None, "leaf"):
        state = rule.clip(both, rule.init(both, per), per=per).state
        clipped = rule.clip({k: on(x.device.id, 10 * host(x)) for k, x in both.items()}, state, per=per).grads
        assert [x.device.id for x in clipped.values()] == [0, 1]
        np.testing.assert_allclose(host(clipped["b"]), [24.0], rtol=1e-6)
        np.testing.assert_allclose(host(clipped["a"]), [6.0, 8.0], rtol=1e-6)

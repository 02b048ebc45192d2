"""What CuPy's calls allocate: outputs in pieces, and copies of those leaves only that need one, some at a time."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import mpmath
import numpy as np
import pytest
from test_cupy_kernels import DTYPES, check_right, check_tree, cupy, laid, marks, random_tree

import exact
import gradclip
from devices import host

pytestmark = marks

#: What a call takes beside: factors, norms, columns of one launch.
FEW = 2**13


@pytest.fixture(autouse=True)
def no_pool_is_left() -> Iterator[None]:
    """A pool that is freed later, in the middle of another test, would make that wait for the device."""
    yield
    gc.collect()


class Counted:
    """An allocator, and what was asked of it: each size, the total, and the most that was held at once."""

    def __init__(self) -> None:
        self.pool, self.sizes, self.most = cupy.cuda.MemoryPool(), [], 0

    def __call__(self, size: int) -> Any:
        out = self.pool.malloc(size)
        self.sizes.append(size)
        self.most = max(self.most, self.pool.used_bytes())
        return out

    @property
    def total(self) -> int:
        return sum(self.sizes)


def counted(call: Callable[[], Any]) -> tuple[Any, Counted]:
    counts = Counted()
    with cupy.cuda.using_allocator(counts):
        return call(), counts


def ramp(n: int, name: str = "float32") -> np.ndarray:
    return (np.arange(n) % 251 - 125).astype(name)


MANY = 2**14  # elements of a leaf that must not be copied: 64 KiB of float32


@pytest.mark.parametrize("per", [None, "leaf"])
def test_outputs_come_in_pieces(monkeypatch: pytest.MonkeyPatch, per: Any) -> None:
    monkeypatch.setattr(laid, "PIECE", 2**14)
    values = [ramp(n) for n in (1000, 2000, 1000, 300, 9000, 5, 0, 7, 4000, 96, 1)]
    leaves = [cupy.array(x) for x in values]
    (out, _), counts = counted(lambda: gradclip.clip_grad_norm(leaves, 2.0, per=per))
    rooms: dict[int, list[int]] = {}
    for i, x in enumerate(out):
        if x.size:
            rooms.setdefault(x.data.mem.ptr, []).append(i)
    assert list(rooms.values()) == [[0, 1, 2], [3], [4], [5, 7], [8], [9, 10]]
    # In whole units of 256 bytes, those of 1,000, 2,000 and 1,000 elements fill a piece; 9,000 have one of their own.
    assert sorted(counts.sizes)[-3:] == [16_128, 2**14, 36_096]
    wants = [exact.norm(values)] * len(values) if per is None else [exact.norm([x]) for x in values]
    for got, x, want in zip(out, values, wants, strict=True):
        check_right(host(got), x, 2 / want if want > 2 else mpmath.mpf(1))


def test_one_strided_leaf_is_the_only_one_that_is_copied() -> None:
    values = [ramp(MANY), ramp(3000), ramp(MANY)]
    large, room, other = cupy.array(values[0]), cupy.zeros(6000, cupy.float32), cupy.array(values[2])
    room[::2] = cupy.array(values[1])
    leaves, want = [large, room[::2], other], exact.norm(values)
    norm, counts = counted(lambda: gradclip.global_norm(leaves))
    exact.check_norm(host(norm), want, "float32")
    assert 12_000 <= counts.total <= 12_000 + FEW
    norms, counts = counted(lambda: gradclip.norms(leaves, per="leaf"))
    exact.check_norm(host(norms[1]), exact.norm([values[1]]), "float32")
    assert 12_000 <= counts.total <= 12_000 + FEW
    out, counts = counted(lambda: gradclip.clip_grad_norm(leaves, 1.0, norm=cupy.array(float(want))))
    assert counts.total <= sum(x.nbytes for x in values) + 3 * 256 + FEW  # its output is its copy
    _, counts = counted(lambda: gradclip.clip_grad_norm_(leaves, 1.0, norm=cupy.array(float(want))))
    assert 12_000 <= counts.total <= 12_000 + FEW
    for got, mine, x in zip(out.grads, leaves, values, strict=True):
        check_right(host(got), x, 1 / want)
        assert host(mine).tobytes() == host(got).tobytes()
    assert not host(room)[1::2].any()


@pytest.mark.parametrize("per", [None, "leaf", "unit"])
def test_strided_leaves_are_copied_one_after_the_other(monkeypatch: pytest.MonkeyPatch, per: Any) -> None:
    monkeypatch.setattr(laid, "HELD", 2**10)  # each is more than that
    values = [ramp(MANY).reshape(-1, 64) for _ in range(8)]
    one = values[0].nbytes
    few = one if per == "unit" else FEW  # norms of 512 units, and their partials
    leaves = []
    for x in values:
        leaves.append(cupy.zeros((len(x), 128), cupy.float32)[:, ::2])
        leaves[-1][...] = cupy.array(x)
    norm, counts = counted(lambda: gradclip.norms(leaves, per=per))
    assert counts.total >= 8 * one
    assert counts.most <= one + few
    want = gradclip.norms(values, per=per)
    for got, right in zip([norm] if per is None else norm, [want] if per is None else want, strict=True):
        np.testing.assert_allclose(host(got), right, rtol=1e-6)
    _, counts = counted(lambda: gradclip.clip_grad_norm_(leaves, 1.0, per=per))
    assert counts.total >= 16 * one
    assert counts.most <= one + few
    for got, x in zip(leaves, gradclip.clip_grad_norm(values, 1.0, per=per).grads, strict=True):
        np.testing.assert_allclose(host(got), x, rtol=1e-6)


def test_examples_of_strided_leaves_are_copied_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laid, "HELD", 2**10)
    monkeypatch.setattr(laid, "PIECE", 2**9)
    values = [ramp(MANY).reshape(64, -1) for _ in range(6)]
    one = values[0].nbytes
    leaves = []
    for x in values:
        leaves.append(cupy.zeros((64, 512), cupy.float32)[:, ::2])
        leaves[-1][...] = cupy.array(x)
    (sums, norm), counts = counted(lambda: gradclip.clipped_sum(leaves, 1.0))
    assert counts.total >= 12 * one  # measured, and added up
    assert counts.most <= one + 3 * FEW
    want = gradclip.clipped_sum(values, 1.0)
    np.testing.assert_allclose(host(norm), want.norm, rtol=1e-6)
    for got, x in zip(sums, want.sum, strict=True):
        np.testing.assert_allclose(host(got), x, rtol=1e-5, atol=1e-5)
    assert len({x.data.mem.ptr for x in sums}) == 6


def test_two_leaves_that_overlap_are_scaled_as_one() -> None:
    values, apart = ramp(2 * MANY), ramp(MANY)
    whole, other = cupy.array(values), cupy.array(apart)
    leaves = [whole[: MANY + 50], other, whole[MANY - 50 :], other]
    want = exact.norm([values[: MANY + 50], apart, values[MANY - 50 :], apart])
    _, counts = counted(lambda: gradclip.clip_grad_norm_(leaves, 1.0))
    assert counts.total <= 2 * FEW  # no leaf is copied
    check_right(host(whole), values, 1 / want)
    check_right(host(other), apart, 1 / want)


@pytest.mark.parametrize("how", ["of another dtype", "by leaf", "reversed"])
def test_of_leaves_that_overlap_one_is_copied(how: str) -> None:
    values, apart = ramp(MANY), ramp(MANY)
    whole, other = cupy.array(values), cupy.array(apart)
    second = {"of another dtype": whole.view(cupy.complex64)[-500:], "by leaf": whole[-1000:]}.get(
        how, whole[-1:-1001:-1]
    )
    per = "leaf" if how == "by leaf" else None
    leaves = [whole, other, second]
    (norm, counts) = counted(lambda: gradclip.clip_grad_norm_(leaves, 1.0, per=per))
    assert 4000 <= counts.total <= 4000 + FEW + (2 * FEW if how == "reversed" else 0)
    if how == "by leaf":  # what they share is scaled once: from what it was, and by the last one's factor
        check_right(host(whole[:-1000]), values[:-1000], 1 / exact.norm([values]))
        check_right(host(second), values[-1000:], 1 / exact.norm([values[-1000:]]))
        return
    want = exact.norm([values, apart, values[-1000:]])
    exact.check_norm(host(norm), want, "float32")
    check_right(host(whole), values, 1 / want)
    check_right(host(other), apart, 1 / want)


def test_pairs_that_overlap_are_copied_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laid, "HELD", 2**10)
    values = ramp(MANY)
    rooms = [cupy.array(values) for _ in range(6)]
    leaves = [x for room in rooms for x in (room[: MANY // 2], room[MANY // 4 :])]
    (_, counts) = counted(lambda: gradclip.clip_grad_norm_(leaves, 1.0, per="leaf"))
    one = 4 * MANY * 3 // 4
    assert 6 * one <= counts.total <= 6 * one + 6 * FEW
    assert counts.most <= one + 2 * FEW
    for room in rooms:
        check_right(host(room[: MANY // 4]), values[: MANY // 4], 1 / exact.norm([values[: MANY // 2]]))
        check_right(host(room[MANY // 4 :]), values[MANY // 4 :], 1 / exact.norm([values[MANY // 4 :]]))


@pytest.mark.parametrize("p", [2.0, 3.0, -2.0])
@pytest.mark.parametrize("seed", range(4))
def test_random_trees_in_small_parts(seed: int, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `test_random_trees`, where every part has one leaf or two."""
    monkeypatch.setattr(laid, "HELD", 64)
    monkeypatch.setattr(laid, "PIECE", 128)
    leaves, values = random_tree(seed, DTYPES)
    check_tree(leaves, values, p, monkeypatch)


@pytest.mark.parametrize("seed", range(30))
def test_leaves_that_overlap_anyhow(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of one array, of any length and step, some of them twice: each element is scaled once."""
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(laid, "HELD", int(rng.integers(1, 2000)))
    values = ramp(600)
    whole = cupy.array(values)
    slices = []
    for _ in range(rng.integers(2, 8)):
        a, b = sorted(rng.integers(0, 601, 2))
        slices.append(slice(int(a), int(b), int(rng.integers(1, 3))))
    slices += slices[:1]
    leaves, touched = [whole[s] for s in slices], np.zeros(600, bool)
    for s in slices:
        touched[s] = True
    want = exact.norm([values[s] for s in slices])
    gradclip.clip_grad_norm_(leaves, 1.0)
    got = host(whole)
    check_right(got[touched], values[touched], 1 / want if want > 1 else mpmath.mpf(1))
    assert np.array_equal(got[~touched], values[~touched])


def test_of_many_leaves_the_one_whose_elements_share_memory_is_named() -> None:
    x = cupy.zeros((4, 6), cupy.float32)
    leaves = [x, x.T, x[:, ::2], x[0], cupy.zeros((0, 3)), cupy.zeros(()), cupy.broadcast_to(x[:1, :1], (1, 1))]
    gradclip.clip_grad_norm_(leaves, 1.0)
    with pytest.raises(gradclip.LeafError, match=r"grads\[7\] has elements that share memory \(a stride of 0\)"):
        gradclip.clip_grad_norm_([*leaves, cupy.broadcast_to(x[:1], (4, 6))], 1.0)


def test_nothing_of_a_call_waits_for_the_collector() -> None:
    """Reference cycles would keep gradients and outputs alive until Python looks for cycles."""
    gradclip.clip_grad_norm([cupy.ones(100)], 1.0)
    gc.collect()
    gc.disable()
    try:
        leaves = [cupy.ones(100, cupy.float32), cupy.ones((4, 6), cupy.float32)[:, ::2]]
        out = gradclip.clip_grad_norm({"w": leaves[0], "b": [leaves[1]]}, 1.0, per="unit").grads
        gradclip.clip_grad_norm_(leaves, 0.5)
        watched = [weakref.ref(x) for x in (*leaves, out["w"], out["b"][0])]
        del leaves, out
        assert [ref() for ref in watched] == [None] * 4
    finally:
        gc.enable()

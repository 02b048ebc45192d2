"""torch's tensors: as its own functions have them, in every layout, traced, or plain on the memory they have."""

from __future__ import annotations

import math
import tracemalloc
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import pytest

import exact
import gradclip
from backends import np_dtype
from gradclip._libraries import backend_of

INF = math.inf


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


torch_only = pytest.mark.library("torch")


@torch_only
@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, 0.5, INF])
@pytest.mark.parametrize("bound", [0.1, 1.0, 1e4])
def test_torch_agrees_with_its_own_function(torch: Any, p: float, bound: float) -> None:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (5,), ())]
    for q in params:
        q.grad = torch.randn_like(q)
    mine = [q.grad.clone() for q in params]
    kept = [g.clone() for g in mine]

    grads, norm = gradclip.clip_grad_norm(mine, bound, p)
    theirs = torch.nn.utils.clip_grad_norm_(params, bound, p)
    torch.testing.assert_close(norm, theirs, rtol=1e-5, atol=0)
    for got, q, g, before in zip(grads, params, mine, kept, strict=True):
        torch.testing.assert_close(got, q.grad, rtol=1e-5, atol=0)  # dtype, device and shape too
        assert torch.equal(g, before)
    in_place = gradclip.clip_grad_norm_(mine, bound, p)
    assert torch.equal(in_place, norm)
    for got, g in zip(grads, mine, strict=True):
        assert torch.equal(got, g)


@torch_only
def test_torch_agrees_with_its_own_value_function(torch: Any) -> None:
    q = torch.nn.Parameter(torch.zeros(6))
    q.grad = torch.tensor([-3.0, -0.5, 0.0, 0.5, 3.0, math.nan])
    got = gradclip.clip_grad_value([q.grad], 1.0)[0]
    mine = q.grad.clone()
    gradclip.clip_grad_value_([mine], 1.0)
    torch.nn.utils.clip_grad_value_([q], 1.0)
    torch.testing.assert_close(got, q.grad, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(mine, q.grad, rtol=0, atol=0, equal_nan=True)


@torch_only
def test_torch_gradients_of_a_model_in_place(torch: Any) -> None:
    model = torch.nn.Linear(3, 2)
    model(torch.full((4, 3), 100.0)).sum().backward()
    grads = [q.grad for q in model.parameters()]
    versions = [g._version for g in grads]
    want = float(exact.norm([g.numpy() for g in grads]))
    norm = gradclip.clip_grad_norm_((q.grad for q in model.parameters()), 1.0)
    exact.check_norm(norm, mpmath.mpf(want), "float32")
    for q, g, version in zip(model.parameters(), grads, versions, strict=True):
        assert q.grad is g
        assert g._version > version  # autograd knows that it was written
        assert not g.requires_grad
    np.testing.assert_allclose(float(exact.norm([g.numpy() for g in grads])), 1.0, rtol=1e-6)


@torch_only
def test_torch_functional_is_differentiable(torch: Any) -> None:
    """d(c g / N) = (c / N) (I - g g^T / N^2), the identity where nothing is clipped."""
    g = torch.tensor([3.0, 4.0], requires_grad=True)

    def jacobian(bound: float) -> Any:
        return torch.autograd.functional.jacobian(lambda x: gradclip.clip_grad_norm([x], bound).grads[0], g)

    want = (np.eye(2) - np.outer([0.6, 0.8], [0.6, 0.8])) / 5
    np.testing.assert_allclose(jacobian(1.0).numpy(), want, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(jacobian(10.0).numpy(), np.eye(2))
    out = gradclip.clip_grad_norm([g], 1.0)
    np.testing.assert_allclose(out.grads[0].detach().numpy(), [0.6, 0.8], rtol=1e-6)
    assert g.detach().tolist() == [3, 4]


@torch_only
def test_torch_gradients_with_a_graph(torch: Any) -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    (g,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
    out = gradclip.clip_grad_norm([g], 1.0)
    np.testing.assert_allclose(out.grads[0].detach().numpy(), np.array([3, 12]) / math.sqrt(153), rtol=1e-6)
    (second,) = torch.autograd.grad(out.norm, x)
    np.testing.assert_allclose(second.numpy(), np.array([3 * 6, 12 * 12]) / math.sqrt(153), rtol=1e-6)
    norm = gradclip.clip_grad_norm_([g], 1.0)
    np.testing.assert_allclose(float(norm.detach()), math.sqrt(153), rtol=1e-6)
    np.testing.assert_allclose(g.detach().numpy(), np.array([3, 12]) / math.sqrt(153), rtol=1e-6)


@torch_only
@pytest.mark.parametrize(
    "verb",
    [
        lambda t: gradclip.global_norm(t),
        lambda t: gradclip.clip_grad_norm(t, 1.0),
        lambda t: gradclip.clip_grad_norm_(t, 1.0),
        lambda t: gradclip.clip_grad_value(t, 1.0),
        lambda t: gradclip.clip_grad_value_(t, 1.0),
    ],
)
def test_torch_parameters_are_refused(torch: Any, verb: Any) -> None:
    weights = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    with pytest.raises(gradclip.LeafError, match=r"grads\['w'\] is a torch Parameter: pass its gradient \(p\.grad\)"):
        verb({"g": torch.ones(2), "w": weights})
    assert weights.tolist() == [3, 4]


@torch_only
def test_torch_layouts(torch: Any) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    for make in (
        lambda: base.clone().transpose(0, 2),
        lambda: base.clone()[:, ::2, 1:],
        lambda: base.clone().to(memory_format=torch.contiguous_format).permute(1, 2, 0),
    ):
        leaf = make()
        want = float(exact.norm([leaf.numpy()]))
        grads, norm = gradclip.clip_grad_norm([leaf], 1.0)
        exact.check_norm(norm, mpmath.mpf(want), "float32")
        np.testing.assert_allclose(grads[0].numpy(), leaf.numpy() / want, rtol=1e-6)
        kept = leaf.clone()
        gradclip.clip_grad_norm_([leaf], 1.0)
        np.testing.assert_allclose(leaf.numpy(), kept.numpy() / want, rtol=1e-6)


@torch_only
def test_torch_expanded_leaf_is_refused_before_anything_is_written(torch: Any) -> None:
    first, shared = torch.tensor([3.0, 4.0]), torch.tensor([5.0]).expand(3)
    np.testing.assert_allclose(float(gradclip.global_norm([shared])), math.sqrt(75), rtol=1e-6)
    with pytest.raises(gradclip.LeafError, match=r"grads\[1\].*in place"):
        gradclip.clip_grad_norm_([first, shared], 1.0)
    assert first.tolist() == [3, 4]


@torch_only
def test_torch_weights_that_are_no_parameter_are_not_written(torch: Any) -> None:
    """torch itself refuses to write to a leaf of its graph; the leaves before it stay as they were."""
    first, weights = torch.tensor([3.0, 4.0]), torch.tensor([5.0], requires_grad=True)
    with pytest.raises((gradclip.LeafError, RuntimeError), match=r"in.place"):
        gradclip.clip_grad_norm_([first, weights], 1.0)
    assert weights.tolist() == [5]
    assert first.tolist() == [3, 4]


@torch_only
def test_torch_aliases_are_scaled_once(torch: Any) -> None:
    g = torch.tensor([3.0, 4.0])
    norm = gradclip.clip_grad_norm_([g, {"again": g}], 1.0)
    np.testing.assert_allclose(float(norm), math.sqrt(50), rtol=1e-6)
    np.testing.assert_allclose(g.numpy(), np.array([3, 4]) / math.sqrt(50), rtol=1e-6)


@torch_only
@pytest.mark.parametrize("kind", ["float32", "float64", "bfloat16", "int64"])
def test_torch_bounds_of_torch(torch: Any, kind: str) -> None:
    g = torch.tensor([3.0, 4.0])

    def clip(c: float) -> Any:
        return gradclip.clip_grad_norm([g], torch.tensor(c, dtype=getattr(torch, kind))).grads[0]

    torch.testing.assert_close(clip(1), torch.tensor([0.6, 0.8]), rtol=1e-6, atol=0)
    assert torch.equal(clip(5), g)
    assert torch.equal(clip(-1), torch.zeros(2))
    if kind != "int64":
        assert clip(math.nan).isnan().all()
        assert torch.equal(clip(INF), g)


@torch_only
def test_torch_bfloat16_is_rounded_once(torch: Any) -> None:
    g = torch.full((1000,), 0.01, dtype=torch.bfloat16)
    grads, norm = gradclip.clip_grad_norm([g] * 3, 0.125)
    value = float(g[0])
    exact.check_norm(norm, mpmath.mpf(value) * mpmath.sqrt(3000), "float32")
    assert norm.dtype == torch.float32
    assert grads[0].dtype == torch.bfloat16
    want = torch.tensor(0.125 / math.sqrt(3000), dtype=torch.float64).to(torch.bfloat16)
    assert torch.equal(grads[0], want.expand(1000))


@torch_only
def test_torch_on_the_meta_device(torch: Any) -> None:
    """Shapes without values: proof that the default path reads no number."""
    g = torch.empty((2, 3), device="meta", dtype=torch.float16)
    grads, norm = gradclip.clip_grad_norm({"w": g}, 1.0)
    assert (grads["w"].shape, grads["w"].dtype, grads["w"].device.type) == ((2, 3), torch.float16, "meta")
    assert (norm.shape, norm.dtype, norm.device.type) == ((), torch.float32, "meta")
    for p in (1.0, 3.0, INF):
        assert gradclip.global_norm([g], p).device.type == "meta"
    assert gradclip.clip_grad_value([g], 1.0)[0].device.type == "meta"


@torch_only
def test_torch_beside_numpy_is_refused(torch: Any) -> None:
    with pytest.raises(gradclip.LeafError, match=r"grads\[0\] is a torch array and grads\[1\] a numpy array"):
        gradclip.clip_grad_norm([torch.ones(2), np.ones(2)], 1.0)


@pytest.mark.full  # the profiler takes 10 seconds to begin
@torch_only
@pytest.mark.parametrize("shape", [(5_000_000,), (1, 5_000_000), (2, 1, 2_500_000)], ids=str)
def test_torch_counts_what_is_not_finite_in_pieces(torch: Any, shape: tuple[int, ...]) -> None:
    """What is allocated at once, as torch's profiler tells it."""
    x = torch.ones(shape)
    x.view(-1)[123_456], x.view(-1)[-1] = math.nan, -INF
    backend = backend_of({"torch": x})
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        assert backend.count_nonfinite([x], torch.tensor([False]), str) == [(1, 1)]
    allocated = [event.cpu_memory_usage for event in profile.events()]
    assert 0 < max(allocated) < 1e6, "beside 20 MB of gradients; each piece is let go before the next"


@torch_only
@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, 0.5, INF, -INF, 0.0])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64"])
def test_torch_derivatives_at_zero_are_zero(torch: Any, dtype: str, p: float) -> None:
    """Not NaN, as the square root of 0 alone would have it; and that of the clip is 1 there."""
    for per in (None, "leaf"):
        x = torch.zeros(3, dtype=getattr(torch, dtype), requires_grad=True)
        y = torch.full((2,), 3.0, dtype=getattr(torch, dtype), requires_grad=True)
        for leaves_of, wanted in (([x], 0.0), ([x, y], None)):
            norm = gradclip.norms(leaves_of, p, per=per)
            norm = norm[0] if per else norm
            (slope,) = torch.autograd.grad(norm, [x], allow_unused=True, materialize_grads=True)
            assert torch.isfinite(torch.view_as_real(slope) if slope.is_complex() else slope).all()
            if wanted is not None:
                assert not slope.any()
        out = gradclip.clip_grad_norm([x], 1.0, p, per=per).grads[0]
        (slope,) = torch.autograd.grad(out.real.sum(), x)
        assert slope.tolist() == [1] * 3


# -- plain tensors, on the memory that they have -----------------------------------------------------------


def taken_by(torch: Any, leaves: list[Any], bounds: tuple[Any, ...] = ()) -> str:
    backend, adopted = backend_of({"torch": torch.ones(1)}).adopt(leaves, bounds)
    assert all(a is b for a, b in zip(adopted, leaves, strict=True))
    return type(backend).__name__


@torch_only
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"])
def test_plain_tensors_are_worked_on_where_they_are(torch: Any, dtype: str) -> None:
    x = torch.ones(3, 4, dtype=getattr(torch, dtype))
    for leaf in (x, x.T, x[:, ::2], x[0, 0], x[:0]):
        assert taken_by(torch, [leaf, x]) == "HostBackend"
        backend, adopted = backend_of({"torch": x}).adopt([leaf])
        arrays = backend.arrays(adopted)
        assert arrays[0].ctypes.data == leaf.data_ptr() or leaf.numel() == 0
        assert arrays[0].shape == leaf.shape


@torch_only
def test_what_torch_must_see_is_left_to_the_reference(torch: Any) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Looking(TorchDispatchMode):
        def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return f(*args, **(kwargs or {}))

    class Special(torch.Tensor):
        pass

    x = torch.ones(2)
    found = [
        taken_by(torch, [x, torch.ones(2, requires_grad=True)]),
        taken_by(torch, [x], (torch.ones((), requires_grad=True),)),
        taken_by(torch, [x], (torch.ones((), device="meta"),)),
        taken_by(torch, [torch.ones(2, device="meta")]),
        taken_by(torch, [x.as_subclass(Special)]),
        taken_by(torch, [torch.ones(2, dtype=torch.complex64).conj()]),
    ]
    with Looking():
        found.append(taken_by(torch, [x]))
    with FakeTensorMode() as mode:
        assert taken_by(torch, [mode.from_tensor(x)]) == "TracedBackend"
    with torch.autograd.forward_ad.dual_level():
        found.append(taken_by(torch, [x]))
    torch.func.vmap(lambda row: found.append(taken_by(torch, [row])) or row)(torch.ones(2, 3))
    torch.func.grad(lambda row: found.append(taken_by(torch, [row])) or row.sum())(x)
    assert found == ["TorchBackend"] * len(found)
    with torch.no_grad():
        backend, leaves = backend_of({"torch": x}).adopt([torch.ones(2, requires_grad=True)])
    assert (type(backend).__name__, leaves[0].requires_grad) == ("HostBackend", False)


CALLS: dict[str, dict[str, Any]] = {
    "global": {"max_norm": 1.0},
    "leaf": {"max_norm": 1.0, "per": "leaf"},
    "unit": {"max_norm": 1.0, "per": "unit"},
    "first": {"max_norm": 1.0, "per": gradclip.Units(0)},
    "zero": {"max_norm": 0.0},
    "tiny": {"max_norm": 1e-30, "divide_by": 1e12},
    "divided": {"max_norm": 1e9, "divide_by": 3.0},
    "rms": {"max_norm": 0.1, "norm_type": "rms"},
    "three": {"max_norm": 1.0, "norm_type": 3.0},
    "bound of torch": {"max_norm": None},
}


@torch_only
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"])
def test_plain_tensors_come_out_as_the_reference_has_them(torch: Any, dtype: str, call: str) -> None:
    """But for norms that differ in their last place; in place bit for bit so; and autograd is told what was written."""
    options = CALLS[call] | ({"max_norm": torch.tensor(1.0)} if call == "bound of torch" else {})
    generator = torch.Generator().manual_seed(7)
    kind = getattr(torch, dtype)
    shapes = [(5, 7), (4097,), (3, 2, 9), (), (0, 3)]
    leaves = [
        3 * torch.randn(s, dtype=kind if kind.is_complex else torch.float64, generator=generator).to(kind)
        for s in shapes
    ]
    leaves[0] = leaves[0].T
    backend = backend_of({"torch": leaves[0]})
    want, norm = gradclip.clip_grad_norm(leaves, **options)
    real = torch.float64 if kind in (torch.float64, torch.complex128) else torch.float32
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(backend), "adopt", lambda self, leaves, bounds=(): (self, leaves))
        reference, other_norm = gradclip.clip_grad_norm(leaves, **options)
    eps = torch.finfo(kind).eps
    for x, y, given in zip(want, reference, leaves, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape) == (given.dtype, given.shape)
        torch.testing.assert_close(x, y, rtol=8 * torch.finfo(real).eps + (2 * eps if eps > 1e-3 else 0), atol=0)
    both = ([norm], [other_norm]) if torch.is_tensor(norm) else (norm, other_norm)
    for x, y in zip(*both, strict=True):
        torch.testing.assert_close(x, y, rtol=8 * torch.finfo(real).eps, atol=0)
    written = [x.clone() for x in leaves]
    versions = [x._version for x in written]
    gradclip.clip_grad_norm_(written, options.pop("max_norm"), **options)
    for x, y, given, version in zip(written, want, leaves, versions, strict=True):
        assert torch.equal(x, y)
        if x.numel():
            assert (x._version > version) == (not torch.equal(x, given))


@torch_only
def test_leaves_of_two_widths_in_one_group(torch: Any) -> None:
    """The norm is float64, and so are the products, rounded once to the leaf's dtype."""
    leaves = [torch.full((3,), 0.3, dtype=getattr(torch, d)) for d in ("float64", "float32", "bfloat16", "complex64")]
    grads, norm = gradclip.clip_grad_norm(leaves, 0.125)
    assert norm.dtype == torch.float64
    for got, x in zip(grads, leaves, strict=True):
        product = x.to(torch.complex128 if x.is_complex() else torch.float64) * (0.125 / float(norm))
        assert torch.equal(got, product.to(x.dtype))


@torch_only
@pytest.mark.parametrize(("n", "start"), [(1, 0), (2, 1), (511, 0), (1025, 1), (131072 + 3, 1)])
def test_bfloat16_is_read_by_its_bits(torch: Any, n: int, start: int) -> None:
    """Two at once, wherever they begin; NaN, infinities and numbers whose squares leave float32 among them."""
    host = np.random.default_rng(n).normal(size=n + start).astype(np_dtype("bfloat16"))
    x = torch.from_numpy(host.astype(np.float32)).to(torch.bfloat16)[start:]
    exact.check_norm(gradclip.global_norm([x]), exact.norm([host[start:]]), "float32")
    exact.check_norm(gradclip.norms([x, x])[1], exact.norm([host[start:]]), "float32")
    x[-1] = 1e30
    host[-1] = 1e30
    exact.check_norm(gradclip.global_norm([x]), exact.norm([host[start:]]), "float32")
    x[-1] = INF
    assert gradclip.global_norm([x]) == INF
    x[0] = math.nan
    assert gradclip.global_norm([x]).isnan()
    zeros = gradclip.clip_grad_norm([x], 1.0, nonfinite="zero").grads[0]
    assert not zeros.view(torch.int16).any()


@torch_only
def test_views_of_one_tensor_are_scaled_as_they_were(torch: Any) -> None:
    """What two leaves share: from what it was, by the last of them; disjoint views of one buffer each by themselves."""
    base = torch.arange(1.0, 7.0)
    factor = 1 / float(exact.norm([base.numpy()[:4], base.numpy()[2:]]))
    want = base * factor
    gradclip.clip_grad_norm_([base[:4], base[2:]], 1.0)
    torch.testing.assert_close(base, want, rtol=1e-6, atol=0)
    bucket = torch.arange(1.0, 7.0)
    want = bucket / float(exact.norm([bucket.numpy()]))
    gradclip.clip_grad_norm_([bucket[:2], bucket[2:].view(2, 2)], 1.0)
    torch.testing.assert_close(bucket, want, rtol=1e-6, atol=0)


@torch_only
def test_a_dense_tensor_does_not_admit_a_sparse_one(torch: Any) -> None:
    """They have one type and one dtype."""
    x = torch.ones(3)
    gradclip.global_norm([x])
    for leaves in ([x.to_sparse()], [x, x.to_sparse()], [torch.nested.nested_tensor([x, x], layout=torch.jagged)]):
        with pytest.raises(gradclip.LeafError, match=r"grads\[\d\] is a (sparse array|tensor).*(make it dense|nested)"):
            gradclip.clip_grad_norm(leaves, 1.0)


@torch_only
def test_an_engine_gets_tensors(torch: Any) -> None:
    seen = []

    def all_reduce(partial: Any, op: str) -> Any:
        seen.append((type(partial), partial.dtype, tuple(partial.shape), op))
        return partial

    norm = gradclip.global_norm([torch.tensor([3.0, 4.0])], all_reduce=all_reduce)
    assert norm == 5
    assert seen == [(torch.Tensor, torch.float64, (4, 1), "sum")]


@torch_only
def test_inference_mode_and_no_grad(torch: Any) -> None:
    with torch.inference_mode():
        x = torch.tensor([3.0, 4.0])
        assert gradclip.clip_grad_norm_([x], 1.0) == 5
        torch.testing.assert_close(x, torch.tensor([0.6, 0.8]))
    with pytest.raises(gradclip.LeafError, match=r"inference mode, and that is over"):
        gradclip.clip_grad_norm_([x], 0.5)
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    (g,) = torch.autograd.grad((w**3).sum(), w, create_graph=True)
    with torch.no_grad():
        norm = gradclip.clip_grad_norm_([g], 1.0)
    assert not norm.requires_grad
    np.testing.assert_allclose(g.detach().numpy(), np.array([3, 12]) / math.sqrt(153), rtol=1e-6)


@torch_only
def test_the_result_does_not_depend_on_the_number_of_threads(torch: Any) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            gradclip.set_num_threads(n)
            torch.manual_seed(0)
            leaves = [torch.randn(1_500_000, dtype=torch.float32).to(d) for d in (torch.float32, torch.bfloat16)]
            results.append((gradclip.clip_grad_norm_(leaves, 1.0), *leaves))
    finally:
        torch.set_num_threads(before)
        gradclip.set_num_threads(None)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@torch_only
@pytest.mark.full  # the profiler takes 10 seconds to begin
def test_in_place_nothing_as_large_as_a_leaf_is_allocated(torch: Any) -> None:
    """By torch or NumPy: beside leaves of 16 MB, no more than a norm's work on one chunk of them."""
    calls: list[dict[str, Any]] = [options for name, options in CALLS.items() if name != "bound of torch"]
    calls.append({"max_norm": 1.0, "nonfinite": "zero", "norm": INF})
    trees = {
        dtype: [torch.ones(n, 2000, dtype=getattr(torch, dtype)), torch.ones(9)]
        for dtype, n in (("bfloat16", 4000), ("float32", 2000))
    }
    peaks = {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for dtype, leaves in trees.items():
            for options in calls:
                gradclip.clip_grad_norm_(leaves, **options)  # what is kept the first time is not counted
                leaves[0].fill_(3)
                tracemalloc.start()
                gradclip.clip_grad_norm_(leaves, **options)
                peaks[dtype, str(options)] = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
                assert leaves[0][0, 0] != 3
            leaves[0].fill_(3)
            gradclip.clip_grad_value_(leaves, 1.0)
            assert leaves[0][0, 0] == leaves[0][-1, -1] == 1
    names = {event.name: event.cpu_memory_usage for event in profile.events() if event.cpu_memory_usage > 3e6}
    assert names == {}
    assert max(peaks.values()) < 16e6, max(peaks, key=peaks.__getitem__)


@torch_only
def test_a_tensor_can_be_resized_after_a_clip(torch: Any) -> None:
    """FSDP frees its storages so; after `Tensor.numpy()` torch refuses it."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.tensor([3.0, 4.0], dtype=dtype)
        assert gradclip.clip_grad_norm_([x], 1.0) == 5
        assert x.resize_(3).shape == (3,)
        x.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=r"shape \(3,\) has no memory: its storage was freed"):
            gradclip.clip_grad_norm_([x], 1.0)


def _two_norm(host: np.ndarray) -> Any:
    """That of numbers of which there are few different ones."""
    values, counts = np.unique(host, return_counts=True)
    squares = sum(Fraction(v) ** 2 * n for v, n in zip(values.tolist(), counts.tolist(), strict=True))
    return mpmath.sqrt(mpmath.mpf(squares.numerator) / squares.denominator)


@torch_only
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_long_rows_of_16_bits_are_exact(torch: Any, dtype: str) -> None:
    """Whatever repeats in them: equal elements, a far mean, changing signs, a large one among tiny ones."""
    kind = getattr(torch, dtype)
    n = 70_000
    ramp = torch.arange(n) % 1021
    for x in (
        torch.full((n,), 1.2890625),
        1000 + ramp / 64,
        torch.where(ramp % 2 == 0, 100.0, -100.0) + ramp / 1024,
        torch.where(ramp == 7, 200.0, 2.0**-9),
    ):
        x = x.to(kind)
        host = x.to(torch.float64).numpy()
        want = _two_norm(host)
        exact.check_norm(gradclip.global_norm([x]), want, "float32")
        exact.check_norm(gradclip.global_norm([x.view(-1, 7).T]), want, "float32")
    x[-1] = INF
    assert gradclip.global_norm([x]) == INF
    x[5] = math.nan
    assert gradclip.global_norm([x]).isnan()


@torch_only
def test_little_leaves_are_strung_together(torch: Any) -> None:
    """In any layout, more than are strung at once, some of no elements, beside a large one."""
    leaves = [torch.full((n % 97, 2), 1.0 + n % 3).T for n in range(3000)] + [torch.full((9000,), 2.0)]
    want = mpmath.sqrt(sum(2 * (n % 97) * (1 + n % 3) ** 2 for n in range(3000)) + 4 * 9000)
    exact.check_norm(gradclip.global_norm(leaves), want, "float32")
    assert gradclip.global_norm(leaves, INF) == 3


@torch_only
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "complex64"])
def test_the_default_device_is_not_that_of_the_gradients(torch: Any, dtype: str) -> None:
    """Where another one is the default, numbers that a clip needs are made where the gradients are."""
    x = torch.tensor([3.0, 4.0], dtype=getattr(torch, dtype), device="cpu")
    with torch.device("meta"):
        for per in (None, "leaf"):
            grads, norm = gradclip.clip_grad_norm([x], 1.0, per=per)
            assert (grads[0].device.type, (norm[0] if per else norm).device.type) == ("cpu", "cpu")
            gradclip.clip_grad_norm_([x], 2.5, per=per)
        assert gradclip.clip_grad_norm_([x], 1.0, 3.0).device.type == "cpu"
        if not x.is_complex():
            gradclip.clip_grad_value_([x], 0.5)
            assert x.tolist()[1] == 0.5

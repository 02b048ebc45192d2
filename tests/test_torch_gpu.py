"""torch's tensors on GPUs, without one: what torch alone does there, on the CPU and on shapes without values; and
CuPy's kernels on emulated devices, on memory that torch's tensors share.

There the tensors are the CPU's, on memory of a device, and torch's streams and allocator are CuPy's.
"""

from __future__ import annotations

import ctypes
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from test_torch import CALLS

import gradclip
from backends import MISSING
from gradclip._libraries import backend_of

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.library("torch")

INF = math.inf
DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64"]
SHAPES = [(5, 7), (4097,), (3, 2, 9), (), (0, 3), (1,)]


def random_leaves(dtype: str, shapes: Any = SHAPES) -> list[Any]:
    generator = torch.Generator().manual_seed(11)
    kind = getattr(torch, dtype)
    drawn = kind if kind.is_complex else torch.float64
    return [3 * torch.randn(shape, dtype=drawn, generator=generator).to(kind) for shape in shapes]


def give_all_to(patch: Any, backend: Any) -> None:
    """Give all tensors to one backend; None: to the generic one."""

    def adopt(self: Any, leaves: Any, bounds: Any = ()) -> Any:
        return (self, leaves) if backend is None else (backend, backend.tensors(leaves))

    patch.setattr(type(backend_of({"torch": torch.ones(1)})), "adopt", adopt)


def flat(norms: Any) -> list[Any]:
    return list(norms.values()) if isinstance(norms, dict) else norms if isinstance(norms, list) else [norms]


def check_alike(found: Any, wanted: Any, leaves: list[Any]) -> None:
    """Within a few units of the last place of the norm, and of each leaf one more where it is rounded."""
    for x, y in zip(flat(found.norm), flat(wanted.norm), strict=True):
        torch.testing.assert_close(x, y, rtol=8 * torch.finfo(y.dtype).eps, atol=0)
    for x, y, given in zip(found.grads, wanted.grads, leaves, strict=True):
        eps = torch.finfo(given.dtype).eps
        assert (x.dtype, x.shape) == (given.dtype, given.shape)
        torch.testing.assert_close(x, y, rtol=8 * torch.finfo(torch.float32).eps + 2 * eps, atol=0)


def check_in_place(
    leaves: list[Any], options: dict[str, Any], wanted: list[Any], wait: Callable[[], None] = lambda: None
) -> None:
    versions = [x._version for x in leaves]
    rest = {name: value for name, value in options.items() if name != "max_norm"}
    gradclip.clip_grad_norm_(leaves, options["max_norm"], **rest)
    wait()
    for x, y, version in zip(leaves, wanted, versions, strict=True):
        assert torch.equal(x, y)
        assert x._version > version


def options_of(call: str) -> dict[str, Any]:
    return CALLS[call] | ({"max_norm": torch.tensor(1.0)} if call == "bound of torch" else {})


# -- by torch alone ------------------------------------------------------------------------------------------


@pytest.fixture
def foreach(monkeypatch: pytest.MonkeyPatch) -> Any:
    from gradclip._backends.torch.foreach import ForeachBackend

    give_all_to(monkeypatch, ForeachBackend())


@pytest.mark.usefixtures("foreach")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_alone_gives_what_the_reference_gives(dtype: str, call: str) -> None:
    options = options_of(call)
    for leaves in (random_leaves(dtype), random_leaves(dtype, SHAPES[:3])):
        found = gradclip.clip_grad_norm(leaves, **options)
        with pytest.MonkeyPatch.context() as patch:
            give_all_to(patch, None)
            wanted = gradclip.clip_grad_norm(leaves, **options)
        check_alike(found, wanted, leaves)
        check_in_place([x.clone() for x in leaves], options, found.grads)


@pytest.mark.usefixtures("foreach")
@pytest.mark.parametrize("p", [2.0, 1.0, INF, -INF, 0.0, 3.0, "rms"])
@pytest.mark.parametrize("per", [None, "leaf", "labels"])
def test_norms_by_torch_alone(p: Any, per: Any) -> None:
    labels = ["a", "b", "a", "b"] if per == "labels" else per
    for bad in (None, INF, math.nan):
        leaves = random_leaves("float32", [(5, 7), (4097,), (9,), (2, 2)])
        if bad is not None:
            leaves[1][5] = bad
        found = flat(gradclip.norms(leaves, p, per=labels))
        with pytest.MonkeyPatch.context() as patch:
            give_all_to(patch, None)
            wanted = flat(gradclip.norms(leaves, p, per=labels))
        for x, y in zip(found, wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.usefixtures("foreach")
def test_zeros_where_an_element_is_not_finite() -> None:
    leaves = [torch.tensor([3.0, math.nan, INF]), torch.tensor([3.0, 4.0])]
    assert not any(x.any() for x in gradclip.clip_grad_norm(leaves, 1.0, nonfinite="zero").grads)
    each = gradclip.clip_grad_norm(leaves, 1.0, nonfinite="zero", per="leaf").grads
    torch.testing.assert_close(each, [torch.zeros(3), torch.tensor([0.6, 0.8])])
    assert not any(x.any() for x in gradclip.clip_grad_norm(leaves, 0.0, norm=5.0).grads)
    assert all(x.isnan().all() for x in gradclip.clip_grad_norm(leaves, 0.0).grads)


@pytest.mark.usefixtures("foreach")
def test_nothing_waits_for_shapes_without_values() -> None:
    """On the `meta` device nothing can be read: whoever did would get an error."""
    leaves = [torch.empty(s, device="meta", dtype=torch.bfloat16) for s in ((2, 3), (7,), (4, 5))]
    for options in [*CALLS.values(), {"max_norm": 1.0, "nonfinite": "zero"}]:
        bound = torch.empty((), device="meta") if options["max_norm"] is None else options["max_norm"]
        rest = {name: value for name, value in options.items() if name != "max_norm"}
        grads, norm = gradclip.clip_grad_norm(leaves, bound, **rest)
        assert all(x.device.type == "meta" and x.dtype == torch.bfloat16 for x in grads)
        assert all(x.device.type == "meta" and x.dtype == torch.float32 for x in flat(norm))
        assert gradclip.clip_grad_norm_(leaves, bound, **rest) is not None
    assert gradclip.clip_grad_value(leaves, 1.0)[0].device.type == "meta"
    assert gradclip.clip_grad_value(leaves, torch.empty((), device="meta"))[0].device.type == "meta"


@pytest.mark.usefixtures("foreach")
def test_a_norm_is_a_few_operations_and_a_product_one_a_leaf() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    counts: Counter[str] = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counts[str(f)] += str(f) != "aten.view.default"  # launches nothing
            return f(*args, **(kwargs or {}))

    seen = {}
    for n in (10, 110):
        leaves = [torch.ones(8) for _ in range(n)]
        counts.clear()
        with Counting():
            gradclip.clip_grad_norm_(leaves, 1.0)
        seen[n] = Counter(counts)
    assert seen[110]["aten.mul.out"] == 110
    assert seen[110]["aten._foreach_norm.Scalar"] == 1
    assert seen[110].total() - seen[10].total() == 100, "beside the products, no operation a leaf"


# -- by CuPy's kernels ---------------------------------------------------------------------------------------

cupys = pytest.mark.library("cupy")


class Posing:
    """CPU tensors on memory of emulated devices, and what torch would say of them on a GPU."""

    def __init__(self, cupy: Any) -> None:
        self.cupy = cupy
        self.devices: dict[int, int] = {}  # by address
        self.hurries = False  # whether a tensor has its values as soon as it is there
        self.streams = []
        for device in (0, 1):
            with cupy.cuda.Device(device):
                self.streams.append(cupy.cuda.Stream(non_blocking=True))

    def tensor(self, x: Any) -> Any:
        """A CuPy array as a tensor on the same memory."""
        if self.hurries:
            self.wait()
        if not x.size:
            return torch.from_numpy(np.empty(x.shape, x.dtype))
        reach = sum((n - 1) * stride for n, stride in zip(x.shape, x.strides, strict=True))
        buffer = (ctypes.c_char * (reach + x.itemsize)).from_address(x.data.ptr)
        buffer.owner = x
        self.devices[x.data.ptr] = x.device.id
        return torch.from_numpy(np.ndarray(x.shape, x.dtype, buffer, 0, x.strides))

    def put(self, x: Any, device: int = 0) -> Any:
        """A copy of a tensor that poses as one on a device."""
        narrow = x.dtype is torch.bfloat16
        with self.cupy.cuda.Device(device):
            out = self.tensor(self.cupy.asarray((x.view(torch.int16) if narrow else x).numpy()))
            self.cupy.cuda.Device().synchronize()
        return out.view(torch.bfloat16) if narrow else out

    def stream(self, device: int) -> int:
        return self.streams[device].ptr

    def device(self, x: Any) -> int:
        return self.devices.get(x.data_ptr(), -1) if x.numel() else 0

    def wait(self) -> None:
        for device in (0, 1):
            self.cupy.cuda.Device(device).synchronize()


@pytest.fixture
def posing(monkeypatch: pytest.MonkeyPatch) -> Posing:
    if "cupy" in MISSING:
        pytest.skip(f"CuPy's kernels on torch's tensors: {MISSING['cupy']}")
    import cupy

    emulated = pytest.importorskip("cupycpu", reason="CuPy's kernels on torch's tensors: no emulated devices")
    if not emulated.available():
        pytest.skip("CuPy's kernels on torch's tensors: no emulated devices")
    from gradclip._backends.torch import cuda

    pose = Posing(cupy)
    monkeypatch.setattr(cuda, "_device", pose.device)
    monkeypatch.setattr(cuda, "_imported", pose.tensor)
    monkeypatch.setattr(cuda, "_stream", pose.stream)
    monkeypatch.setattr(cuda, "_allocator", cupy.get_default_memory_pool)
    give_all_to(monkeypatch, cuda.CudaBackend())
    return pose


@cupys
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cupys_kernels_on_torchs_memory(dtype: str, call: str, posing: Posing) -> None:
    options = options_of(call)
    host = random_leaves(dtype)
    host[0] = host[0].T
    leaves = [posing.put(x) for x in host]
    found = gradclip.clip_grad_norm(leaves, **options)
    posing.wait()
    with pytest.MonkeyPatch.context() as patch:
        give_all_to(patch, None)
        wanted = gradclip.clip_grad_norm(host, **options)
    check_alike(found, wanted, host)
    check_in_place(leaves, options, found.grads, posing.wait)


@cupys
def test_two_devices_labels_shards_bounds_and_sums(posing: Posing) -> None:
    a, b = posing.put(torch.tensor([3.0]), 0), posing.put(torch.tensor([4.0]), 1)
    seen = []

    def all_reduce(partial: Any, op: str) -> Any:
        seen.append((type(partial), op))
        joined = posing.tensor(posing.cupy.asarray(2 * partial.numpy()))
        posing.wait()
        return joined

    grads, norm = gradclip.clip_grad_norm([a, b], 1.0)
    posing.hurries = True  # what joins shards is torch's work, which here knows no stream
    joined = gradclip.global_norm([a, b], all_reduce=all_reduce)
    posing.hurries = False
    by_label = gradclip.norms([a, b], per=["x", "y"])
    limited = gradclip.clip_grad_value([a, b], (posing.put(torch.tensor(0.0)), 3.5))
    total, each = gradclip.clipped_sum([posing.put(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))], 1.0)
    posing.wait()
    assert (float(norm), float(joined), float(by_label["y"])) == (5, pytest.approx(math.sqrt(50)), 4)
    assert seen == [(torch.Tensor, "sum")]
    torch.testing.assert_close(grads, [torch.tensor([0.6]), torch.tensor([0.8])])
    torch.testing.assert_close(limited, [torch.tensor([3.0]), torch.tensor([3.5])])
    torch.testing.assert_close(total, [torch.tensor([0.9, 1.2])], rtol=1e-5, atol=0)
    torch.testing.assert_close(each, torch.tensor([5.0, 0.5]))
    bad = [posing.put(torch.tensor([1.0, math.nan, INF]))]
    with pytest.raises(gradclip.NonFiniteError, match=r"grads\[0\] \(float32, shape \(3,\)\): 1 NaN, 1 inf"):
        gradclip.clip_grad_norm(bad, 1.0, nonfinite="error")


@cupys
def test_what_the_kernels_make_belongs_to_the_streams_allocator(
    posing: Posing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call's own memory, results among it, comes from the allocator that is torch's on a GPU."""
    from gradclip._backends.torch import cuda

    class Counted:
        def __init__(self, pool: Any) -> None:
            self.pool, self.sizes = pool, []

        def malloc(self, size: int) -> Any:
            self.sizes.append(size)
            return self.pool.malloc(size)

    counted = Counted(posing.cupy.cuda.MemoryPool())
    monkeypatch.setattr(cuda, "_allocator", lambda: counted)
    leaves = [posing.put(torch.ones(100_000)), posing.put(torch.ones(3))]
    gradclip.clip_grad_norm_(leaves, 1.0)
    in_place, counted.sizes = counted.sizes, []
    gradclip.clip_grad_norm(leaves, 0.5)
    posing.wait()
    assert in_place
    assert sum(in_place) < 100_000
    assert sum(counted.sizes) >= 400_012

"""What ranks of `torch.distributed` do together, with gloo: `torch_gloo.py RANK SIZE FOLDER CASE...`.

tests/test_torch_distributed.py starts it once for each rank. In the folder the ranks meet, and find the recipes of
docs/sharding.md. A case raises where it is not so; else every rank prints "rank R: CASE is so".
"""

from __future__ import annotations

import math
import re
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import exact
import gradclip
from gloo import process_group
from gradclip._types import Call
from gradclip.distributed import torch as over

INF = math.inf
ORDERS = (2.0, 1.0, 3.0, 0.5, INF, -INF, 0.0, -2.0, "rms")
rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
calls: list[str] = []


@contextmanager
def counted() -> Any:
    """`calls` remembers the collectives that gradclip starts."""
    plain = {name: getattr(dist, name) for name in ("all_reduce", "all_gather", "all_gather_object")}

    def counting(name: str) -> Any:
        def call(*args: Any, **kw: Any) -> Any:
            calls.append(name)
            return plain[name](*args, **kw)

        return call

    calls.clear()
    for name in plain:
        setattr(dist, name, counting(name))
    try:
        yield
    finally:
        for name, call in plain.items():
            setattr(dist, name, call)


def everyones(x: Any) -> list[Any]:
    """What each rank holds, by a way that gradclip does not take."""
    out: list[Any] = [None] * size
    dist.all_gather_object(out, x)
    return out


def message_of(error: type[Exception], call: Any, *args: Any, **kw: Any) -> str:
    try:
        call(*args, **kw)
    except error as raised:
        return str(raised)
    raise AssertionError(f"rank {rank}: no {error.__name__}")


def recipe(name: str, **names: Any) -> dict[str, Any]:
    """The names after a recipe has run."""
    names["gradclip"] = gradclip
    exec((folder / f"{name}.py").read_text(encoding="utf-8"), names)
    return names


# -- the cases -------------------------------------------------------------------------------------------------


def family() -> None:
    """Parts beside copies, on one rank more leaves than on the other: the norm of the whole, one collective a pass."""
    rng = np.random.default_rng(3)
    parts = [rng.standard_normal(n).astype(np.float32) for n in (7, 300)]
    shared = rng.standard_normal(11).astype(np.float32)
    for p in ORDERS:
        want = exact.norm([*parts, shared], p)
        tree: dict[str, Any] = {"shared": torch.tensor(shared), "own": torch.tensor(parts[rank])}
        if rank:
            tree["more"] = [torch.zeros(0), None]
        with counted():
            joined = over(replicated={key: key == "shared" for key in tree})
            out = gradclip.clip_grad_norm(tree, 0.25, p, all_reduce=joined)
        assert calls == ["all_gather"] * (2 if p in (3.0, 0.5, -2.0) else 1), calls
        exact.check_norm(out.norm, want, "float32", 8)
        factor = min(1.0, float(0.25 / want))
        for key, whole in (("shared", shared), ("own", parts[rank])):
            np.testing.assert_allclose(out.grads[key], whole.astype(np.float64) * factor, rtol=2**-22)
            assert tree[key].tolist() == whole.tolist(), "the inputs are as they were"
        assert len({float(x).hex() for x in everyones(out.norm)}) == 1
        norm = gradclip.clip_grad_norm_(tree, 0.25, p, all_reduce=joined)
        assert float(norm) == float(out.norm)
        assert torch.equal(tree["own"], out.grads["own"])


def no_leaves() -> None:
    """A rank without leaves has a partial of NumPy; it may also hold NumPy's gradients, and the other torch's."""
    for dtype in ("float32", "float64"):
        whole = np.array([3.0, 4.0], dtype)
        for held in (torch.tensor(whole), whole):
            mine = [] if rank else [held]
            for p in ORDERS:
                found = gradclip.global_norm(mine, p, all_reduce=over())
                assert isinstance(found, torch.Tensor) == (rank == 0 and held is not whole)
                exact.check_norm(found, exact.norm([whole], p), dtype, 8)
            grads, norm = gradclip.clip_grad_norm(mine, 1.0, all_reduce=over())
            assert float(norm) == 5.0
            assert len(grads) == len(mine)
            for x in grads:
                np.testing.assert_allclose(x, [0.6, 0.8], rtol=1e-7)
    mixed = [np.float32([3.0])] if rank else [torch.tensor([4.0])]
    out = gradclip.clip_grad_norm(mixed, 1.0, all_reduce=over())
    assert isinstance(out.grads[0], type(mixed[0]))
    assert isinstance(out.norm, torch.Tensor) == (rank == 0)
    assert float(out.norm) == 5.0


def dtypes() -> None:
    """Each rank keeps its dtypes; all decide in float64 if a leaf is float64 on any. The norm may be beyond float32."""
    for name in ("bfloat16", "float16", "float32"):
        dtype = getattr(torch, name)
        leaf = torch.tensor([300.0 + 100 * rank], dtype=dtype)
        out = gradclip.clip_grad_norm([leaf], 1.0, all_reduce=over())
        assert (out.norm.dtype, float(out.norm)) == (torch.float32, 500.0)
        assert out.grads[0].dtype == dtype
        assert torch.equal(out.grads[0], torch.tensor([0.6 + 0.2 * rank], dtype=torch.float64).to(dtype))
    mine = torch.tensor([1.0 + 1e-9], dtype=torch.float64) if rank == 0 else torch.zeros(2)
    out = gradclip.clip_grad_norm([mine], 1.0, all_reduce=over())
    assert float(out.norm) == 1.0 + 1e-9 or (rank and out.norm.dtype == torch.float32)
    assert float(out.grads[0][0]) == (1.0 if rank == 0 else 0.0)
    beyond = gradclip.clip_grad_norm([torch.tensor([3e38])], 1.0, all_reduce=over())
    np.testing.assert_allclose(beyond.grads[0], [math.sqrt(0.5)], rtol=1e-6)
    assert float(beyond.norm) == INF


def groups() -> None:
    """Every rank holds its part of each group: one norm for each, and all_reduce where they are many."""
    rng = np.random.default_rng(7)
    whole = {"w": rng.standard_normal((size, 5)), "v": 1e30 * rng.standard_normal((size, 3)), "b": np.float64([[3, 4]])}
    whole = {name: x.astype(np.float32) for name, x in whole.items()}
    copies = {"w": False, "v": False, "b": True}
    for per, members in (("leaf", {"w": "w", "v": "v", "b": "b"}), ({"w": 0, "v": 1, "b": 0}, {0: "wb", 1: "v"})):
        for p in (2.0, 3.0, INF, -INF, "rms"):
            mine = {name: torch.tensor(x[0] if copies[name] else x[rank]) for name, x in whole.items()}
            with counted():
                grads, norm = gradclip.clip_grad_norm(mine, 0.5, p, per=per, all_reduce=over(replicated=copies))
            assert calls == ["all_gather"] * (2 if p == 3 else 1), calls
            for key, names in members.items():
                want = exact.norm([whole[name] for name in names], p)
                exact.check_norm(norm[key], want, "float32", 8)
                for name in names:
                    scaled = mine[name].numpy().astype(np.float64) * min(1.0, float(0.5 / want))
                    np.testing.assert_allclose(grads[name], scaled, rtol=2**-22)
    for count in (203, 204):
        many = [torch.tensor([3.0 if rank else 4.0]) * (i + 1) for i in range(count)]
        with counted():
            norms = gradclip.norms(many, "rms", all_reduce=over())
        assert calls == ["all_gather"] + ["all_reduce"] * (count > 203), calls
        for i, norm in enumerate(norms):
            exact.check_norm(norm, 5 * (i + 1) / mpmath.sqrt(2), "float32")
    units = gradclip.norms([torch.tensor([[3.0, 5.0] if rank else [4.0, 12.0]])], per="unit", all_reduce=over())
    assert units[0].tolist() == [[5.0, 13.0]]


def policies() -> None:
    """A NaN on rank 0, an inf on rank 1: every policy does the same everywhere; "error" names both on all ranks."""
    bad = {"w": torch.tensor([1.0, 2.0 if rank else math.nan]), "v": [torch.tensor([INF if rank else 1.0])]}
    before = [bad["w"].tolist(), bad["v"][0].tolist()]
    for p in (2.0, 3.0, INF, -INF):
        zero = gradclip.clip_grad_norm(bad, 1.0, p, nonfinite="zero", all_reduce=over()).grads
        assert not zero["w"].any()
        assert not zero["v"][0].any()
        assert gradclip.clip_grad_norm(bad, 1.0, p, all_reduce=over()).grads["w"].isnan().all()
        for verb in (gradclip.clip_grad_norm, gradclip.clip_grad_norm_):
            with counted():
                text = message_of(gradclip.NonFiniteError, verb, bad, 1.0, p, nonfinite="error", all_reduce=over())
            assert re.search(
                r"rank 0 of 2:\n +grads\['w'\] \(float32, shape \(2,\)\): 1 NaN, 0 inf\n"
                r" +rank 1 of 2:\n +grads\['v'\]\[0\] \(float32, shape \(1,\)\): 0 NaN, 1 inf\b",
                text,
            ), text
            assert len(set(everyones(text))) == 1, "all ranks say the same"
            assert calls.count("all_gather_object") == 1
    assert repr(before) == repr([bad["w"].tolist(), bad["v"][0].tolist()]), "nothing was changed"
    with counted():
        gradclip.clip_grad_norm([torch.ones(1)], 1.0, nonfinite="error", all_reduce=over())
    assert calls == ["all_gather"], "no word is gathered where all is finite"


def disagreement() -> None:
    """Ranks that mean different things: an error on all of them, nothing written, and the next call is right."""
    grads = [torch.tensor([3.0, 4.0])]
    for mine, others in ((2.0, 1.0), (2.0, INF), (3.0, INF), (-INF, INF), (3.0, 2.5), (0.0, -1.0), ("rms", 2.0)):
        p = mine if rank else others
        text = message_of(ValueError, gradclip.clip_grad_norm_, grads, 1.0, p, all_reduce=over())
        assert re.match(r"the ranks do not agree on norm_type\b.*, and nothing was clipped: rank 0: ", text), text
        assert f"rank 0: {others}".removesuffix(".0") in text, text
        assert f"rank 1: {mine}".removesuffix(".0") in text, text
    policy = "zero" if rank else "error"
    text = message_of(ValueError, gradclip.clip_grad_norm_, grads, 1.0, nonfinite=policy, all_reduce=over())
    assert "agree on nonfinite, and nothing was clipped: rank 0: 'error'; rank 1: another policy" in text, text
    labels = ["a", "b"] if rank else ["b", "a"]
    text = message_of(ValueError, gradclip.norms, grads * 2, per=labels, all_reduce=over())
    assert "agree on groups, and nothing was clipped: rank 0: labels 'b', 'a'; rank 1: labels 'a', 'b'" in text, text
    for count in (1, 250):  # a message with a partial, beside one without; then two without
        text = message_of(ValueError, gradclip.norms, grads * (300 if rank else count), all_reduce=over())
        assert f"rank 0: {count} leaves; rank 1: 300 leaves" in text, text
    text = message_of(ValueError, gradclip.norms, grads if rank else [], all_reduce=over())
    assert "rank 0: 0 leaves; rank 1: 1 leaves" in text, text
    text = message_of(ValueError, over(), torch.zeros(3 + rank, 1), "sum")
    assert "agree on groups, and nothing was clipped" in text, text
    text = message_of(ValueError, over(), torch.zeros(3, 1, dtype=torch.float64), "sum" if rank else "max")
    assert "agree on operation, and nothing was clipped: rank 0: max; rank 1: sum" in text, text
    text = message_of(ValueError, over(), torch.zeros(3, 1, dtype=torch.float64 if rank else torch.float32), "sum")
    assert "agree on bits of the accumulation, and nothing was clipped: rank 0: 32; rank 1: 64" in text, text
    assert grads[0].tolist() == [3.0, 4.0]
    np.testing.assert_allclose(gradclip.global_norm(grads, all_reduce=over()), math.sqrt(50), rtol=1e-7)


def communicators() -> None:
    """The norm is that of the group's ranks; what is no group of this rank is refused at once."""
    alone = [dist.new_group([r]) for r in range(size)]  # all ranks must make all groups
    mine, whole = [torch.tensor([3.0 if rank else 4.0])], init_device_mesh("cpu", (size,), mesh_dim_names=("all",))
    square = init_device_mesh("cpu", (1, size), mesh_dim_names=("one", "all"))
    for group, want in [
        (None, 5.0),
        (dist.group.WORLD, 5.0),
        (whole, 5.0),
        (square["all"], 5.0),
        (square["one"], float(mine[0])),
        (alone[rank], float(mine[0])),
    ]:
        assert float(gradclip.global_norm(mine, all_reduce=over(group))) == want
        exact.check_norm(
            gradclip.global_norm(mine, all_reduce=over(group, True)), float(mine[0]) if want < 5 else 4, "float32"
        )
    assert "this rank is not in" in message_of(ValueError, over, alone[1 - rank])
    assert over(alone[rank]).gather("word") == ["word"]
    many = gradclip.norms(mine * 300, all_reduce=over(alone[rank]))
    assert [float(x) for x in many] == [float(mine[0])] * 300
    first = DeviceMesh("cpu", [0])
    if rank:
        assert "this rank is not in" in message_of(ValueError, over, first)
    else:
        assert float(gradclip.global_norm(mine, all_reduce=over(first))) == 4.0
    assert "a mesh of one dimension" in message_of(TypeError, over, square)
    for other in ("gloo", 0, dist):
        assert "takes a torch.distributed.ProcessGroup" in message_of(TypeError, over, other)
    for group in (dist.group.WORLD, whole, dist.all_reduce):
        text = message_of(TypeError, gradclip.global_norm, mine, all_reduce=group)
        assert text.endswith(": pass gradclip.distributed.torch(group)"), text
    text = message_of(TypeError, gradclip.global_norm, {"w": mine[0]}, all_reduce=over(replicated={"w": "yes"}))
    assert "replicated says 'yes' of grads['w']" in text, text
    text = message_of(TypeError, gradclip.global_norm, [mine[0].requires_grad_() * 2], all_reduce=over())
    assert "without their derivatives: detach the gradients" in text, text
    assert "of builtins" in message_of(TypeError, over(), [1.0], "sum")


def partials() -> None:
    """What is handed over is not written to, comes back as its like, and may be read-only, or no block of memory."""
    for rows in (3, 600):  # with the message, and after it
        whole = np.arange(2.0 * rows).reshape(rows, 2)
        for op, want in (("sum", 3 * whole), ("max", 2 * whole), ("min", whole)):
            fixed = whole * (rank + 1)
            fixed.flags.writeable = False
            strided = torch.tensor(fixed.T.copy()).T if rank else torch.tensor(fixed)  # in another order on rank 1
            for given in (fixed, fixed.astype(np.float32), strided, strided.float()):
                joined = over()(given, op)
                assert type(joined) is type(given)
                assert joined.dtype == given.dtype
                np.testing.assert_array_equal(joined, want)
                np.testing.assert_array_equal(given, fixed)
    for length in (1019, 1020):
        with counted():
            assert (over()(np.ones((length, 1)), "sum") == 2).all()
        assert calls == ["all_gather"] + ["all_reduce"] * (length > 1019), calls
    nan = over()(torch.tensor([[math.nan if rank else 1.0, -INF if rank else INF, INF]]), "sum")
    np.testing.assert_array_equal(nan, [[math.nan, math.nan, INF]])


def on_devices() -> None:
    """Where the host should not wait: the ranks are asked once for each kind of call, of each group. Played by gloo."""

    def engine() -> Any:
        made = over()
        assert not made.asks_once
        made.asks_once = True
        return made

    mine = [torch.tensor([3.0])] if rank else [torch.tensor([4.0])]
    for p, passes in ((2.0, 1), (3.0, 2)):
        for asked in (passes, 0, 0):
            with counted():
                exact.check_norm(
                    gradclip.global_norm(mine, p, all_reduce=engine()), exact.norm([np.float64([3, 4])], p), "float32"
                )
            assert calls == ["all_gather"] * asked + ["all_reduce"] * (passes - asked), calls
    for p, op in ((2.0, "sum"), (2.0, "max"), (1.0, "max")):  # other calls than those before
        with counted():
            assert (engine().join(np.ones((7, 1)), op, Call(p)) == (2 if op == "sum" else 1)).all()
        assert calls == ["all_gather"], calls
    for count in (2, 300):
        many = mine * (count if rank else count + 1)
        text = message_of(ValueError, gradclip.clip_grad_norm_, many, 1.0, per="leaf", all_reduce=engine())
        assert f"agree on groups, and nothing was clipped: rank 0: {count + 1} leaves; rank 1: {count} leaves" in text
        assert float(mine[0]) == (3.0 if rank else 4.0)
    with counted():
        assert [float(x) for x in gradclip.norms(mine * 300, all_reduce=engine())] == [5.0] * 300
        gradclip.norms(mine * 300, all_reduce=engine())
    assert calls == ["all_gather", "all_reduce", "all_reduce"], calls
    assert float(gradclip.global_norm(mine if rank else [], all_reduce=engine())) == 3.0
    elsewhere = over()
    elsewhere.device = "meta"
    assert [elsewhere._moved(x).device.type for x in (np.ones((3, 1)), torch.ones(3, 1))] == ["meta", "meta"]


def layers() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 1))


def fsdp1() -> None:
    """FSDP1's local parts, by the recipe: the norm and the clipped gradients of the whole model."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    x = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.25, -1.0]])
    plain = layers()
    plain(x).sum().backward()
    whole = [p.grad.numpy() for p in plain.parameters()]
    want = exact.norm(whole)
    clipped = torch.cat([torch.tensor(g).reshape(-1) for g in whole]) / float(want)
    for original in (True, False):
        fsdp = FullyShardedDataParallel(layers(), use_orig_params=original, device_id=torch.device("cpu"))
        fsdp(x).sum().backward()
        out = recipe("fsdp1", fsdp=fsdp)
        exact.check_norm(out["norm"], want, "float32")
        apart = everyones(torch.cat([g.reshape(-1) for g in out["shards"]]))
        together = torch.cat(apart)[: clipped.numel()]  # the rest is padding
        torch.testing.assert_close(together, clipped)
        local = float(gradclip.global_norm(out["shards"]))
        assert local < 0.999, "one rank's part is not the whole"
    fsdp = FullyShardedDataParallel(layers(), use_orig_params=True, device_id=torch.device("cpu"))
    fsdp(x).sum().backward()
    norms = gradclip.norms(
        [torch.zeros(0) if p.grad is None else p.grad for p in fsdp.parameters()], all_reduce=over(fsdp.process_group)
    )
    for norm, g in zip(norms, whole, strict=True):
        exact.check_norm(norm, exact.norm([g]), "float32")
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # its end is near
        copied = FullyShardedDataParallel(
            layers(),
            use_orig_params=True,
            device_id=torch.device("cpu"),
            sharding_strategy=ShardingStrategy.NO_SHARD,
        )
    copied(x).sum().backward()
    grads = [p.grad for p in copied.parameters()]
    exact.check_norm(gradclip.global_norm(grads, all_reduce=over(copied.process_group, True)), want, "float32")


def fsdp2() -> None:
    """DTensors' local parts, by the recipe: rank 1 has a row of the weight, and nothing of the bias."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (size,))
    weight = torch.nn.Parameter(distribute_tensor(torch.zeros(3, 2), mesh, [Shard(0)]))
    bias = torch.nn.Parameter(distribute_tensor(torch.zeros(1), mesh, [Shard(0)]))
    weight.grad = distribute_tensor(torch.full((3, 2), 2.0), mesh, [Shard(0)])
    bias.grad = distribute_tensor(torch.ones(1), mesh, [Shard(0)])
    norms = gradclip.norms([x.grad.to_local() for x in (weight, bias)], all_reduce=over(mesh))
    assert [float(x) for x in norms] == [float(np.float32(24**0.5)), 1.0], norms

    class Model:
        def parameters(self) -> list[Any]:
            return [weight, bias]

    assert float(recipe("fsdp2", model=Model(), mesh=mesh)["norm"]) == 5.0
    torch.testing.assert_close(weight.grad.full_tensor(), torch.full((3, 2), 0.4))
    torch.testing.assert_close(bias.grad.full_tensor(), torch.tensor([0.2]))
    if torch.__version__ >= "2.13":  # 2.5 runs it on GPUs only
        from torch.distributed.fsdp import fully_shard

        x, plain, model = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.25, -1.0]]), layers(), layers()
        fully_shard(model, mesh=mesh)
        for each in (plain, model):
            each(x).sum().backward()
        want = exact.norm([p.grad.numpy() for p in plain.parameters()])
        exact.check_norm(recipe("fsdp2", model=model, mesh=mesh)["norm"], want, "float32")
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad / float(want))


def dtensors() -> None:
    """Evenly split DTensors as they are: joined by torch, where it can, and refused beside an engine."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (size,))
    grads = [
        distribute_tensor(torch.full((4, 2), 2.0), mesh, [Shard(0)]),
        distribute_tensor(torch.full((4,), 1.0), mesh, [Replicate()]),
    ]
    try:
        out = gradclip.clip_grad_norm(grads, 3.0)
    except NotImplementedError:
        assert torch.__version__ < "2.13"
    else:
        assert float(out.norm.full_tensor()) == 6.0
        assert [x.placements for x in out.grads] == [x.placements for x in grads]
        torch.testing.assert_close(out.grads[0].full_tensor(), torch.ones(4, 2))
    text = message_of(TypeError, gradclip.clip_grad_norm_, grads, 1.0, all_reduce=over(mesh))
    assert "pass x.to_local() of each, or no all_reduce" in text, text
    assert grads[0].full_tensor().tolist() == [[2.0, 2.0]] * 4


def hybrid() -> None:
    """Four ranks, two copies of the model, each in two parts: the group that shards gives the norm of the model."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    part = mesh.get_local_rank("shard")
    grads = [torch.tensor([3.0, 0.0] if part else [4.0, 12.0])]
    for p in ORDERS:
        want = exact.norm([np.float64([3, 0, 4, 12])], p)
        exact.check_norm(gradclip.global_norm(grads, p, all_reduce=over(mesh["shard"])), want, "float32", 8)
    assert gradclip.clip_grad_norm(grads, 6.5, all_reduce=over(mesh["shard"])).grads[0].tolist() == [
        x / 2 for x in grads[0].tolist()
    ]
    exact.check_norm(gradclip.global_norm(grads, all_reduce=over()), exact.norm([np.float64([13, 13])]), "float32")
    text = message_of(ValueError, gradclip.global_norm, grads, 1.0 if rank == 3 else 2.0, all_reduce=over())
    assert text.endswith("rank 0: 2; rank 1: 2; rank 2: 2; rank 3: 1"), text


if __name__ == "__main__":
    with process_group(folder / "store", rank, size):
        for case in sys.argv[4:]:
            globals()[case]()
            sys.stdout.write(f"rank {rank}: {case} is so\n")  # in one piece, or ranks write into each other's lines
            sys.stdout.flush()
        dist.barrier()

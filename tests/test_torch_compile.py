"""The verbs inside `torch.compile(fullgraph=True)`: no graph break, no warning, and the same results."""

from __future__ import annotations

import importlib
import math
import shutil
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import mpmath
import numpy as np
import pytest

import exact
import gradclip

torch = pytest.importorskip("torch")
dynamo = pytest.importorskip("torch._dynamo")
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402

from gradclip._backends.generic import Backend  # noqa: E402
from gradclip._backends.torch import traced  # noqa: E402

pytestmark = pytest.mark.library("torch")

TORCH = tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2])

inductor = pytest.param(
    "inductor",
    marks=[
        pytest.mark.full,
        pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler, and g++ is not here"),
    ],
)
each_compiler = pytest.mark.parametrize(
    "compiler", [pytest.param("eager", marks=pytest.mark.full), "aot_eager", inductor]
)
Pair = namedtuple("Pair", ["first", "second"])


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No program from another test, for another bound would make torch's numbers of this one dynamic."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module", autouse=True)
def imported(request: pytest.FixtureRequest) -> None:
    """Inductor's own modules use what torch calls deprecated: they are imported before warnings are errors."""
    if request.config.getoption("--full"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            importlib.import_module("torch._inductor.compile_fx")


def compiled(run: Callable[..., Any], compiler: str = "aot_eager", **options: Any) -> Callable[..., Any]:
    return torch.compile(run, fullgraph=True, backend=compiler, **options)  # type: ignore[no-any-return]


def tensors(x: Any) -> list[Any]:
    """Those of a tree, in order."""
    if isinstance(x, torch.Tensor):
        return [x]
    return [] if x is None else [t for child in (x.values() if isinstance(x, dict) else x) for t in tensors(child)]


def assert_same(got: Any, want: Any, ulps: float = 2) -> None:
    """Two trees of one form, their tensors within some units in the last place."""
    assert type(got) is type(want)
    if isinstance(want, dict):
        assert list(got) == list(want)
    if want is not None and not isinstance(want, torch.Tensor):
        for mine, its in zip(*(x.values() if isinstance(x, dict) else x for x in (got, want)), strict=True):
            assert_same(mine, its, ulps)
    elif want is not None:
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        rtol = ulps * torch.finfo(want.dtype).eps
        torch.testing.assert_close(got, want, rtol=rtol, atol=float(torch.finfo(want.dtype).tiny), equal_nan=True)


def tree(dtype: Any = torch.float32, scale: float = 1.0, seed: int = 0) -> dict[str, Any]:
    made = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Any:
        return (torch.randn(shape, generator=made, dtype=torch.float64) * scale).to(dtype)

    return {"w": leaf(4, 6), "rest": [leaf(5), None, (leaf(), leaf(4, 3, 2), leaf(0, 2))]}


# -- the verbs ---------------------------------------------------------------------------------------------------------

VERBS: dict[str, Callable[[Any], Any]] = {
    "global_norm": lambda g: gradclip.global_norm(g),
    "global_norm p=inf": lambda g: gradclip.global_norm(g, math.inf),
    "norms": lambda g: gradclip.norms(g),
    "norms of all": lambda g: gradclip.norms(g, per=None),
    "norms of units": lambda g: gradclip.norms(g, 3.0, per=gradclip.Units(0)),
    "clip": lambda g: gradclip.clip_grad_norm(g, 1.0),
    "clip rms": lambda g: gradclip.clip_grad_norm(g, 0.1, "rms"),
    "clip by leaf": lambda g: gradclip.clip_grad_norm(g, {"w": 1.0, "rest": 0.5}, per="leaf"),
    "clip by label": lambda g: gradclip.clip_grad_norm(
        g, {"a": 1.0, "b": 0.5}, per={"w": "a", "rest": ["b", None, "a"]}
    ),
    "clip but one": lambda g: gradclip.clip_grad_norm(g, 1.0, per={"w": None, "rest": "b"}),
    "clip divided": lambda g: gradclip.clip_grad_norm(g, 1.0, divide_by=8),
    "clip by a norm that is known": lambda g: gradclip.clip_grad_norm(g, 1.0, norm=torch.tensor(20.0)),
    "clip to a tensor": lambda g: gradclip.clip_grad_norm(g, g["w"].sum().abs()),
    "agc": lambda g: gradclip.clip_grad_agc(g, g),
    "value": lambda g: gradclip.clip_grad_value(g, (-0.5, 0.25)),
}
QUICK = ("clip", "agc")


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in VERBS]
)
def test_a_verb_is_one_graph_and_gives_what_it_gives_outside(name: str, compiler: str) -> None:
    counted = CompileCounterWithBackend(compiler)
    assert_same(compiled(VERBS[name], counted)(tree()), VERBS[name](tree()))
    assert counted.frame_count == 1
    assert sum(node.op == "call_function" and "_run" in str(node.target) for node in counted.graphs[0].graph.nodes) == 1


@pytest.mark.full
def test_the_sum_of_clipped_examples() -> None:
    g = [torch.tensor([[3.0, 4.0], [0.3, 0.4], [math.nan, 1.0]])]
    assert_same(compiled(lambda g: gradclip.clipped_sum(g, 1.0))(g), gradclip.clipped_sum(g, 1.0))


@each_compiler
def test_in_place_it_writes_to_the_very_leaves(compiler: str) -> None:
    def step(g: Any) -> Any:
        norm = gradclip.clip_grad_norm_([g["w"], g["b"], g["w"]], 1.0)
        gradclip.clip_grad_value_(g["b"], 0.1)
        return norm

    g = {"w": torch.tensor([3.0, 4.0]), "b": torch.tensor([[5.0, 5.0], [5.0, 5.0]])[:, 1]}
    norm = compiled(step, compiler)(g)
    assert float(norm) == 10.0  # w counts twice, and is scaled once: 2 * 25 + 50 = 100
    assert torch.allclose(g["w"], torch.tensor([0.3, 0.4]), rtol=1e-6)
    assert g["b"].tolist() == [np.float32(0.1)] * 2


def test_in_place_a_leaf_without_a_label_is_not_written_to() -> None:
    g = {"w": torch.tensor([3.0, 4.0]), "b": torch.ones(1).expand(3)}  # torch refuses to write to that
    norm = compiled(lambda g: gradclip.clip_grad_norm_(g, 2.5, per={"w": "a", "b": None}))(g)
    assert float(norm["a"]) == 5.0
    assert g["w"].tolist() == [1.5, 2.0]


def test_containers_come_back_as_they_were() -> None:
    x = torch.tensor([3.0, 4.0])
    half = torch.tensor([0.3, 0.4]) * 5
    for given, wanted in (
        (OrderedDict(b=x, a=None), OrderedDict(b=half, a=None)),
        (Pair(x, {1: None, ("k", 2): []}), Pair(half, {1: None, ("k", 2): []})),
    ):
        assert_same(compiled(lambda g: gradclip.clip_grad_norm(g, 2.5).grads)(given), wanted)


@pytest.mark.full
def test_iterators_are_read_and_come_as_lists() -> None:
    def run(g: Any) -> Any:
        return (
            gradclip.clip_grad_norm((x for x in g.values()), 2.5).grads,
            gradclip.clip_grad_norm(g.values(), 2.5).grads,
            gradclip.clip_grad_norm(zip(g.values(), g.values(), strict=True), 2.5).grads,
        )

    half = torch.tensor([1.5, 2.0])
    assert_same(compiled(run)({"a": torch.tensor([3.0, 4.0])}), ([half], [half], [(half / 2**0.5, half / 2**0.5)]))


def biases_apart(path: str, leaf: Any) -> Any:
    return ("b", 0) if path.endswith("['b']") and leaf.ndim == 1 else None


@pytest.mark.full
def test_labels_of_a_function_and_of_any_kind() -> None:
    g = {"w": torch.tensor([3.0, 4.0]), "deep": {"b": torch.tensor([6.0, 8.0])}}

    def run(g: Any) -> Any:
        return gradclip.clip_grad_norm(g, {("b", 0): 5.0}, per=biases_apart)

    grads, norm = compiled(run)(g)
    assert grads["w"].tolist() == [3.0, 4.0]
    assert grads["deep"]["b"].tolist() == [3.0, 4.0]
    assert {label: float(x) for label, x in norm.items()} == {("b", 0): 10.0}


def test_an_empty_tree_has_a_norm() -> None:
    grads, norm = compiled(lambda: gradclip.clip_grad_norm({"a": [None]}, 1.0))()
    assert grads == {"a": [None]}
    assert isinstance(norm, torch.Tensor)
    assert float(norm) == 0.0


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", ["clip_grad_norm_", "clip_grads_with_norm_", "clip_grad_value_", "get_total_norm"])
def test_torchs_names_given_parameters(name: str) -> None:
    module = importlib.import_module("gradclip.torch")
    given = {"clip_grad_norm_": (2.5,), "clip_grads_with_norm_": (2.5, torch.tensor(5.0)), "clip_grad_value_": (2.0,)}
    model = torch.nn.Linear(2, 1)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0, 4.0]]), None

    def run() -> Any:
        parameters = model.parameters()
        parts = [p.grad for p in parameters] if name == "get_total_norm" else parameters
        return getattr(module, name)(parts, *given.get(name, ()))

    norm = compiled(run)()
    assert norm is None or float(norm) == 5.0
    left = {"clip_grad_value_": [[2.0, 2.0]], "get_total_norm": [[3.0, 4.0]]}
    assert model.weight.grad.tolist() == left.get(name, [[1.5, 2.0]])


# -- how exact it is ---------------------------------------------------------------------------------------------------


def wanted(leaves: list[Any], bound: Any) -> tuple[Any, list[Any]]:
    """The norm, and every element clipped, as mpmath numbers."""
    norm = exact.norm([x.double().numpy() for x in leaves])
    factor = min(mpmath.mpf(1), mpmath.mpf(bound) / norm)
    return norm, [factor * mpmath.mpf(x) for leaf in leaves for x in leaf.double().reshape(-1).tolist()]


EDGES = (
    ([1e20, 1e20], 1.0),
    ([3e38, 3e38, 1.0], 1e38),
    ([3e38, -3e38], 1e-10),  # by a factor that float32 does not hold
    ([1e-30, 2e-30], 1e-32),
    ([3.0, 4.0], 5.0),
)


@each_compiler
def test_float32_is_exact_to_its_edges(compiler: str) -> None:
    edges = EDGES[:3] if compiler == "inductor" else EDGES  # a third of a minute for all
    trees = [[torch.tensor([x]) for x in values] for values, _ in edges]
    bounds = [bound for _, bound in edges]
    run = compiled(lambda trees: [gradclip.clip_grad_norm(*each) for each in zip(trees, bounds, strict=True)], compiler)
    for (grads, norm), leaves, bound in zip(run(trees), trees, bounds, strict=True):
        true_norm, true = wanted(leaves, bound)
        exact.check_norm(norm, true_norm, "float32", ulps=1)
        for got, want in zip(grads, true, strict=True):
            assert abs(mpmath.mpf(float(got)) - want) <= 1.5 * exact.ulp(want, "float32")


@pytest.mark.full
@each_compiler
def test_float64_is_exact_in_long_rows_and_beyond_squares(compiler: str) -> None:
    run = compiled(lambda g: [[gradclip.global_norm(x, p) for p in (2.0, 1.0)] for x in g], compiler)
    rows = [
        torch.full((4097,), 0.1),
        torch.full((100_000,), 1 / 3),
        torch.tensor([3e200, 4e200]),
        torch.tensor([1e-300]),
    ]
    rows = [torch.full((4097,), 0.1, dtype=torch.float64), torch.full((100_000,), 1 / 3, dtype=torch.float64)]
    rows += [torch.tensor([3e200, 4e200], dtype=torch.float64), torch.tensor([3e-300, 4e-300], dtype=torch.float64)]
    for row, (two, one) in zip(rows, run(rows), strict=True):
        x, n = mpmath.mpf(float(row[0])), len(row)
        exact.check_norm(two, mpmath.sqrt(n) * x if n > 2 else exact.norm([row.numpy()]), "float64")
        exact.check_norm(one, n * x if n > 2 else exact.norm([row.numpy()], 1.0), "float64")


@each_compiler
def test_what_is_not_finite_is_answered_by_the_policy(compiler: str) -> None:
    def run(g: Any) -> Any:
        return gradclip.clip_grad_norm(g, 1.0), gradclip.clip_grad_norm(g, 1.0, nonfinite="zero")

    answered = compiled(run, compiler)
    for bad in (math.nan, math.inf):
        (spoiled, norm), (zeros, _) = answered([torch.tensor([bad, 1.0]), torch.tensor([2.0])])
        assert all(torch.isnan(x).all() for x in spoiled)
        assert not math.isfinite(float(norm))
        assert [x.tolist() for x in zeros] == [[0.0, 0.0], [0.0]]
    kept, _ = compiled(lambda g: gradclip.clip_grad_norm(g, math.inf), compiler)([torch.tensor([-0.0, 1e-45, 3e38])])
    assert np.array_equal(kept[0].numpy().view(np.int32), np.float32([-0.0, 1e-45, 3e38]).view(np.int32))


@pytest.mark.full
@pytest.mark.parametrize("fused", [("cpu",), pytest.param((), marks=pytest.mark.full)])
@each_compiler
def test_the_derivative_is_exact(compiler: str, fused: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sum w * clip(g), c / ||g|| * (w - g <g, w> / ||g||^2); of the norm, g / ||g||, and 0 at 0."""
    monkeypatch.setattr(traced, "_FUSED", fused)
    g = torch.tensor([3.0, 4.0], requires_grad=True)
    still = torch.zeros(2, requires_grad=True)
    w = torch.tensor([1.0, -2.0])

    def loss(g: Any, still: Any) -> Any:
        return (gradclip.clip_grad_norm([g], 2.0).grads[0] * w).sum() + gradclip.global_norm([still])

    compiled(loss, compiler)(g, still).backward()
    torch.testing.assert_close(g.grad, torch.tensor([0.64, -0.48]), rtol=1e-6, atol=1e-7)
    assert still.grad.tolist() == [0.0, 0.0]


DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")


@pytest.mark.sampled(11)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, math.inf, -math.inf, 0.0, "rms"])
def test_the_backend_for_traced_leaves_equals_the_reference(p: Any, dtype: str, monkeypatch: Any) -> None:
    """Run on tensors that hold something."""
    import array_api_compat.torch as xp

    def all_of(backend: Backend, grads: Any) -> list[Any]:
        monkeypatch.setattr(gradclip._leaves, "backend_of", lambda names: backend)
        out: list[Any] = []
        for per in (None, "leaf", "unit", {"w": "a", "rest": "b"}):
            for more in ({}, {"divide_by": 1e-3}, {"nonfinite": "zero"}):
                for bound in (0.7, 0.0, torch.tensor(1e-3), 1e-45) if per is None else (0.7, 1e-45):
                    out.append(gradclip.clip_grad_norm(grads, bound, p, per=per, **more))
        out.append(gradclip.clip_grad_norm(grads["w"], 0.1, p, per="example"))
        return out

    for scale in (1.0, math.nan):
        g = tree(getattr(torch, dtype), scale)
        g["w"] = torch.nan_to_num(g["w"])
        its = all_of(Backend(xp), g)
        for fused in (("cpu",), ())[: 2 if p in (2.0, "rms") else 1]:  # (): as on GPUs
            monkeypatch.setattr(traced, "_FUSED", fused)
            mine = all_of(traced.TracedBackend(), g)
            assert len(mine) == len(its) == 31
            for one, other in zip(mine, its, strict=True):
                assert_same(one, other, ulps=2)


# -- bounds and shapes that change -------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("compiler", [pytest.param("eager", marks=pytest.mark.full), "aot_eager"])
def test_another_bound_is_right_and_compiles_little(compiler: str) -> None:
    counted = CompileCounterWithBackend(compiler)
    run = compiled(lambda g, c: gradclip.clip_grad_norm(g, c).grads, counted)
    for bound in (1.0, 2.0, 3.5, 100.0, 0.25):
        (got,) = run([torch.tensor([30.0, 40.0])], bound)
        torch.testing.assert_close(got, torch.tensor([0.6, 0.8]) * min(bound, 50.0), rtol=3e-7, atol=0)
    if TORCH >= (2, 7):  # before, a float is part of a program
        assert counted.frame_count <= 2
    for bound in (1.0, 7.0, math.nan, -1.0):
        (got,) = run([torch.tensor([30.0, 40.0])], torch.tensor(bound))
        torch.testing.assert_close(got, torch.tensor([0.6, 0.8]) * max(bound, 0.0 * bound), equal_nan=True)


@pytest.mark.full
@pytest.mark.parametrize(
    "p", [2.0, pytest.param("rms", marks=pytest.mark.full), pytest.param(3.0, marks=pytest.mark.full)]
)
def test_shapes_may_be_dynamic(p: Any) -> None:
    counted = CompileCounterWithBackend("aot_eager")
    run = compiled(lambda x: gradclip.clip_grad_norm([x], 1.0, p), counted)
    for shape in ((3, 4), (5, 4), (300, 4), (7, 9)):
        x = torch.ones(shape)
        assert_same(run(x), gradclip.clip_grad_norm([x], 1.0, p))
    assert counted.frame_count <= 3  # no number, then one unknown, then two


@pytest.mark.full
def test_another_number_of_groups_is_another_program() -> None:
    run = compiled(lambda x: gradclip.clipped_sum([x], 1.0))
    for n in (2, 3):
        x = torch.arange(2.0 * n).reshape(n, 2)
        assert_same(run(x), gradclip.clipped_sum([x], 1.0))


# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "error": (lambda x: gradclip.clip_grad_norm([x], 1.0, nonfinite="error"), "nonfinite='error' lets the host wait"),
    "error in place": (lambda x: gradclip.clip_grad_norm_([x], 1.0, error_if_nonfinite=True), "lets the host wait"),
    "shards": (lambda x: gradclip.clip_grad_norm([x], 1.0, all_reduce=len), "all_reduce: shards cannot join"),
    "bound": (lambda x: gradclip.clip_grad_norm([x], -1.0), "max_norm must be a number >= 0, got -1.0"),
    "dtype": (lambda x: gradclip.clip_grad_norm({"a": x.int()}, 1.0), r"grads\['a'\] is an array of dtype int32"),
    "number": (lambda x: gradclip.clip_grad_norm([x, 3.0], 1.0), r"grads\[1\] is the Python number 3.0"),
    "labels": (lambda x: gradclip.norms([x], per={"a": "b"}), "per: the tree of labels does not match the gradients"),
    "arguments": (lambda x: gradclip.clip_grad_norm([x], 1.0, 2.0, 3), "unexpected keyword argument 'argument_3'"),
    "Clipped": (lambda x: gradclip.global_norm(gradclip.clip_grad_norm(x, 1.0)), "grads is a Clipped"),
    "NumPy": (lambda x: gradclip.global_norm(np.ones(3)), "an object of type ndarray, which a program"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why(name: str) -> None:
    run, message = REFUSED[name]
    with pytest.raises((dynamo.exc.Unsupported, dynamo.exc.TorchRuntimeError), match=message):
        compiled(run, "eager")(torch.ones(2))


def test_outside_of_a_program_a_verb_is_what_it_was() -> None:
    assert gradclip.clip_grad_norm.__wrapped__.__doc__ == gradclip.clip_grad_norm.__doc__
    with pytest.raises(gradclip.NonFiniteError, match="not finite"):
        gradclip.clip_grad_norm([torch.tensor([math.nan])], 1.0, nonfinite="error")


# -- what it costs -----------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_a_leaf_adds_few_operations_to_the_program() -> None:
    counts = []
    for n in (2, 6):
        nodes: list[int] = []

        def count(graph: Any, inputs: Any, nodes: list[int] = nodes) -> Any:
            nodes.append(sum(node.op == "call_function" for node in graph.graph.nodes))
            return graph.forward

        from torch._dynamo.backends.common import aot_autograd

        compiled(lambda g: gradclip.clip_grad_norm_(g, 1.0), aot_autograd(fw_compiler=count))([torch.ones(3, 3)] * n)
        counts += nodes
        torch.compiler.reset()
    assert (counts[1] - counts[0]) / 4 <= 8
    assert counts[0] <= 100


@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler, and g++ is not here")
def test_in_place_a_compiled_clip_makes_no_copy_of_a_leaf() -> None:
    from torch._inductor.utils import run_and_get_code

    _, (code,) = run_and_get_code(
        compiled(lambda g: gradclip.clip_grad_norm_(g, 1.0), "inductor"), [torch.ones(64, 65)]
    )
    assert "empty_strided_cpu((), ()" in code
    assert "empty_strided_cpu((64, 65" not in code
    assert "empty_strided_cpu((4160" not in code

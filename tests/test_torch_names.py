"""`gradclip.torch`: PyTorch's names and signatures, given parameters."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import exact
import gradclip
from gloo import process_group
from gradclip import LeafError, NonFiniteError, Units

pytestmark = pytest.mark.library("torch")
torch = pytest.importorskip("torch")
names = importlib.import_module("gradclip.torch")

WORKER = Path(__file__).parent / "ranks" / "torch_names.py"
INF, NAN = math.inf, math.nan
nn = torch.nn

#: PyTorch's parameters and defaults, then gradclip's own.
SIGNATURES = {
    "clip_grad_norm_": (
        {"parameters": ..., "max_norm": ..., "norm_type": 2.0, "error_if_nonfinite": False, "foreach": None},
        {"per": None, "nonfinite": "propagate", "norm": None, "divide_by": None, "all_reduce": None},
    ),
    "clip_grad_value_": ({"parameters": ..., "clip_value": ..., "foreach": None}, {}),
    "get_total_norm": (
        {"tensors": ..., "norm_type": 2.0, "error_if_nonfinite": False, "foreach": None},
        {"all_reduce": None},
    ),
    "clip_grads_with_norm_": (
        {"parameters": ..., "max_norm": ..., "total_norm": ..., "foreach": None},
        {"per": None, "nonfinite": "propagate", "divide_by": None},
    ),
}

#: Each of those that take parameters, as a function of them.
CLIPS = {
    "clip_grad_norm_": lambda parameters: names.clip_grad_norm_(parameters, 1.0),
    "clip_grad_value_": lambda parameters: names.clip_grad_value_(parameters, 1.0),
    "clip_grads_with_norm_": lambda parameters: names.clip_grads_with_norm_(parameters, 1.0, 5.0),
}
each_clip = pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)


def parameter(grad: Any = None, dtype: str = "float32", **kw: Any) -> Any:
    """A parameter with this gradient."""
    grad = None if grad is None else torch.tensor(grad, dtype=getattr(torch, dtype))
    out = nn.Parameter(torch.ones(2, 2) if grad is None else torch.ones_like(grad), **kw)
    out.grad = grad
    return out


def gradients(parameters: Any) -> list[Any]:
    return [None if p.grad is None else p.grad.tolist() for p in parameters]


def model(seed: int = 0) -> Any:
    """A network after a backward pass: its first layer is frozen, and its last one has not been used."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Linear(2, 2))
    net[0].requires_grad_(False)
    net[:3](torch.randn(8, 3)).square().sum().backward()
    return net


# -- names and signatures ----------------------------------------------------------------------------------------------


def test_the_names():
    assert set(names.__all__) == set(SIGNATURES)
    assert {name for name in vars(names) if name.startswith(("clip", "get"))} == set(SIGNATURES)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_torch(name):
    theirs, own = SIGNATURES[name]
    parameters = inspect.signature(getattr(names, name)).parameters.values()
    found = [(p.name, ... if p.default is p.empty else p.default) for p in parameters]
    assert found == [*theirs.items(), *own.items()]
    kinds = [inspect.Parameter.POSITIONAL_OR_KEYWORD] * len(theirs) + [inspect.Parameter.KEYWORD_ONLY] * len(own)
    assert [p.kind for p in parameters] == kinds
    original = getattr(nn.utils, name, None)  # torch 2.5 lacks two of them
    assert original is not None or not hasattr(nn.utils, "get_total_norm")
    if original is not None:
        parameters = inspect.signature(original).parameters.values()
        assert {p.name: ... if p.default is p.empty else p.default for p in parameters} == theirs
        assert [p.kind for p in parameters] == kinds[: len(theirs)]


@pytest.mark.parametrize("name", SIGNATURES)
def test_docstrings_are_whole(name):
    function = getattr(names, name)
    doc = inspect.getdoc(function)
    sections = set(re.findall(r"^(\w+)\n-+$", doc, re.MULTILINE))
    assert {"Parameters", "Raises", "Examples"} <= sections
    assert ".. math::" in doc
    assert f"torch.nn.utils.{name}`" in doc
    signature = inspect.signature(function)
    lists = doc.split("Parameters\n----------\n")[1].split("\n\n")[0]
    described = {word for line in re.findall(r"^(\w[^:\n]*)", lists, re.M) for word in line.strip().split(", ")}
    assert set(signature.parameters) == described
    assert all(p.annotation is not p.empty for p in signature.parameters.values())


@pytest.mark.parametrize("foreach", [None, True, False])
def test_foreach_chooses_nothing(foreach):
    p = parameter([3.0, 4.0])
    assert float(names.get_total_norm([p.grad], foreach=foreach)) == 5.0
    assert float(names.clip_grad_norm_([p], 2.5, 2.0, False, foreach)) == 5.0
    names.clip_grads_with_norm_([p], 1.0, 2.0, foreach)
    assert p.grad.tolist() == [0.75, 1.0]
    names.clip_grad_value_([p], 0.875, foreach)
    assert p.grad.tolist() == [0.75, 0.875]


@pytest.mark.parametrize(
    "call",
    [
        lambda p: names.clip_grad_norm_([p], 1.0, 2.0, False, "leaf"),
        lambda p: names.clip_grad_value_([p], 1.0, 2.0),
        lambda p: names.get_total_norm([p.grad], 2.0, False, "inf"),
        lambda p: names.clip_grads_with_norm_([p], 1.0, 5.0, "zero"),
    ],
)
def test_foreach_is_no_place_for_an_option(call):
    p = parameter([3.0, 4.0])
    with pytest.raises(TypeError, match=r"^foreach must be True or False, got"):
        call(p)
    assert p.grad.tolist() == [3.0, 4.0]


# -- what parameters come as -------------------------------------------------------------------------------------------

CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "generator": lambda ps: (p for p in ps),
    "values": lambda ps: dict(enumerate(ps)).values(),
    "iterator": iter,
    "set": set,
    "ParameterList": nn.ParameterList,
    "parameters()": lambda ps: nn.ParameterList(ps).parameters(),
    "filter": lambda ps: filter(lambda p: p.grad is not None, ps),
}
each_container = pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)


@each_container
def test_any_iterable_of_parameters(container):
    ps = [parameter([3.0]), parameter(), parameter([[0.0, 4.0]])]
    kept = [p.grad for p in ps]
    norm = names.clip_grad_norm_(container(ps), 2.5)
    assert torch.equal(norm, torch.tensor(5.0))
    assert gradients(ps) == [[1.5], None, [[0.0, 2.0]]]
    names.clip_grads_with_norm_(container(ps), 1.0, 2.0)
    assert gradients(ps) == [[0.75], None, [[0.0, 1.0]]]
    names.clip_grad_value_(container(ps), 0.875)
    assert gradients(ps) == [[0.75], None, [[0.0, 0.875]]]
    assert all(p.grad is g for p, g in zip(ps, kept, strict=True))
    assert all(bool((p == 1).all()) for p in ps), "the weights"


def test_one_tensor():
    p = parameter([3.0, 4.0])
    assert float(names.clip_grad_norm_(p, 2.5)) == 5.0
    names.clip_grads_with_norm_(p, 1.0, 2.0)
    assert p.grad.tolist() == [0.75, 1.0]
    names.clip_grad_value_(p, 0.875)
    assert p.grad.tolist() == [0.75, 0.875]
    assert float(names.get_total_norm(torch.tensor([3.0, 4.0]))) == 5.0


def test_none_among_parameters_counts_as_nothing():
    """As `layer.bias` is of a layer without."""
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    assert float(names.clip_grad_norm_([layer.bias, layer.weight], 1.0)) == 5.0


@pytest.mark.parametrize("dtypes", [("float16", "bfloat16"), ("bfloat16", "float64"), ("float32", "complex64")])
def test_mixed_dtypes_keep_their_own(dtypes):
    ps = [parameter([3.0, 0.0], dtypes[0]), parameter([[4.0]], dtypes[1])]
    norm = names.clip_grad_norm_(ps, 2.5)
    assert [str(p.grad.dtype) for p in ps] == [f"torch.{name}" for name in dtypes]
    assert gradients(ps) == [[1.5, 0.0], [[2.0]]]
    assert (float(norm), norm.dtype) == (5.0, torch.float64 if "float64" in dtypes else torch.float32)


def test_what_is_not_clipped_is_not_written():
    p = parameter([3.0, 4.0])
    for call in (
        lambda: names.clip_grad_norm_(p, 5.0),
        lambda: names.clip_grad_norm_(p, INF),
        lambda: names.clip_grads_with_norm_(p, 5.0, names.get_total_norm(p.grad)),
    ):
        call()
        assert p.grad.tolist() == [3.0, 4.0], "no 1e-6 is added to the norm"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_real_network(memory_format):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    net.to(memory_format=memory_format)
    net(torch.randn(5, 3, 4, 4).to(memory_format=memory_format)).square().sum().backward()
    arrays = [p.grad.numpy().copy() for p in net.parameters()]
    norm = names.clip_grad_norm_(net.parameters(), 0.125)
    exact.check_norm(norm, exact.norm(arrays), "float32")
    for p, array in zip(net.parameters(), arrays, strict=True):
        np.testing.assert_allclose(p.grad.numpy(), array * (0.125 / float(exact.norm(arrays))), rtol=3e-7)
    exact.check_norm(names.get_total_norm([p.grad for p in net.parameters()]), 0.125, "float32", 8)


def test_gradients_that_share_memory_with_each_other():
    """Of tied weights that come twice: the norm counts them twice, and they are scaled once."""
    p = parameter([3.0, 4.0])
    assert float(names.clip_grad_norm_([p, p], 1.0)) == float(np.float32(50**0.5))
    exact.check_norm(names.get_total_norm(p.grad), 0.5**0.5, "float32", 8)
    bucket = torch.tensor([3.0, 4.0])  # as of DDP's gradient_as_bucket_view
    views = [parameter([0.0]), parameter([0.0])]
    views[0].grad, views[1].grad = bucket[:1], bucket[1:]
    assert float(names.clip_grad_norm_(views, 2.5)) == 5.0
    assert bucket.tolist() == [1.5, 2.0]


# -- no gradients ------------------------------------------------------------------------------------------------------

FOUND: dict[str, Callable[[], Any]] = {
    "no parameters": list,
    "no backward yet": lambda: nn.Linear(2, 2).parameters(),
    "a frozen model": lambda: nn.Linear(2, 2).requires_grad_(False).parameters(),
    "a frozen parameter beside a buffer": lambda: [parameter(requires_grad=False), torch.ones(2)],
    "a tensor that asks for a gradient": lambda: torch.ones(2, requires_grad=True),
    "None": lambda: [None],
}


@pytest.mark.parametrize("make", FOUND.values(), ids=FOUND)
def test_without_gradients(make):
    for norm in (names.clip_grad_norm_(make(), 1.0), names.clip_grad_norm_(make(), 1.0, 3.0, True)):
        assert torch.equal(norm, torch.tensor(0.0))
    assert names.clip_grad_norm_(make(), 1.0, per=lambda path, x: "all") == {}
    assert set(names.clip_grad_norm_(make(), 1.0, per="leaf")) <= {None}
    assert names.clip_grad_value_(make(), 1.0) is None
    assert names.clip_grads_with_norm_(make(), 1.0, torch.tensor(7.0)) is None
    assert torch.equal(names.get_total_norm([]), torch.tensor(0.0))
    assert torch.equal(names.get_total_norm([None]), torch.tensor(0.0))


def test_frozen_parts_are_left_alone():
    net = model()
    arrays = [p.grad.numpy().copy() for p in net.parameters() if p.grad is not None]
    assert [p.grad is None for p in net.parameters()] == [True, True, False, False, True, True]
    exact.check_norm(names.clip_grad_norm_(net.parameters(), 0.5), exact.norm(arrays), "float32")
    exact.check_norm(names.get_total_norm([p.grad for p in net.parameters()]), 0.5, "float32", 8)


def test_a_tensor_that_is_no_parameter_but_has_a_gradient():
    x = torch.zeros(2)
    x.grad = torch.tensor([3.0, 4.0])
    assert float(names.clip_grad_norm_([x], 2.5)) == 5.0
    y = torch.zeros(2, requires_grad=True)
    inner = y * 1
    inner.retain_grad()
    (inner * torch.tensor([3.0, 4.0])).sum().backward()
    assert float(names.clip_grad_norm_([inner], 2.5)) == 5.0
    assert inner.grad.tolist() == x.grad.tolist() == [1.5, 2.0]


@pytest.mark.parametrize("call", [*CLIPS.values(), names.get_total_norm], ids=[*CLIPS, "get_total_norm"])
def test_a_generator_that_was_read_before_warns_here(call):
    parameters = nn.Linear(2, 2).parameters()
    list(parameters)
    with pytest.warns(UserWarning, match=r"an iterator of \w+ that gives nothing, .*: was it read before") as caught:
        call(parameters)
    (warning,) = caught
    assert warning.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call([])


# -- what is refused ---------------------------------------------------------------------------------------------------

PASS = r": pass the parameters, for example model\.parameters\(\)"
NONE_OF_THEM = (
    r"^parameters are tensors of which none is a torch Parameter, has a gradient or requires one.*\.grad\. If"
)
REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "module": (lambda net: net, r"^parameters is a module \(torch\..*Sequential\)" + PASS),
    "module in a list": (lambda net: list(net), r"^parameters\[0\] is a module \(torch\..*Linear\)" + PASS),
    "ParameterDict": (lambda net: nn.ParameterDict({"w": net[2].weight}), r"^parameters is a module \(.*Dict\)" + PASS),
    "state_dict": (lambda net: net.state_dict(), r"^parameters is a mapping \(collections\.OrderedDict\)" + PASS),
    "dict": (lambda net: dict(net.named_parameters()), r"^parameters is a mapping \(builtins\.dict\)" + PASS),
    "named_parameters": (
        lambda net: net.named_parameters(),
        r"^parameters\[0\] is a pair of a name \('0\.weight'\) and a value, as of named_parameters\(\)" + PASS,
    ),
    "values of a state_dict": (lambda net: net.state_dict().values(), NONE_OF_THEM),
    "data": (lambda net: [p.data for p in net.parameters()], NONE_OF_THEM),
    "one tensor of data": (lambda net: net[2].weight.data, NONE_OF_THEM),
    "gradients": (
        lambda net: [p.grad for p in net.parameters()],
        NONE_OF_THEM + r" these are the gradients themselves: gradclip\.clip_grad_norm_ and gradclip\.clip_grad_value_",
    ),
    "one gradient": (lambda net: net[2].weight.grad, NONE_OF_THEM),
    "gradients with a graph": (lambda net: [(net[2].weight ** 2).sum()], NONE_OF_THEM),
    "param_groups": (
        lambda net: torch.optim.SGD(net.parameters()).param_groups,
        r"^parameters\[0\] is a parameter group of an optimizer, whose parameters are its \['params'\]" + PASS,
    ),
    "optimizer": (
        lambda net: torch.optim.SGD(net.parameters()),
        r"^parameters is a torch\.optim.*SGD, and no tensor" + PASS,
    ),
    "method": (lambda net: net.parameters, r"^parameters is a builtins\.method, and no tensor" + PASS),
    "names": (lambda net: net.state_dict().keys(), r"^parameters\[0\] is a builtins\.str, and no tensor" + PASS),
    "text": (lambda net: "weights", r"^parameters is a builtins\.str, and no tensor" + PASS),
    "nested": (
        lambda net: [*net.parameters(), [net[2].bias]],
        r"^parameters\[6\] is a builtins\.list, and no tensor" + PASS,
    ),
    "NumPy": (lambda net: [np.ones(2)], r"^parameters\[0\] is a numpy\.ndarray, and no tensor" + PASS),
    "None": (lambda net: None, r"^parameters is a builtins\.NoneType, and no tensor" + PASS),
    "number": (lambda net: 1.0, r"^parameters is a builtins\.float, and no tensor" + PASS),
}


@each_clip
@pytest.mark.parametrize(("wrong", "match"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_parameters_is_refused(clip, wrong, match):
    net = model()
    before = {name: x.clone() for name, x in net.state_dict().items()}, gradients(net.parameters())
    with pytest.raises(LeafError, match=match):
        clip(wrong(net))
    assert all(torch.equal(x, before[0][name]) for name, x in net.state_dict().items())
    assert gradients(net.parameters()) == before[1]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda net: net, r"^tensors is a module \(.*\): pass tensors, for example \[p\.grad for p in"),
        (lambda net: net.state_dict(), r"^tensors is a mapping \(.*\): pass tensors"),
        (lambda net: [net[2].bias, np.ones(2)], r"^tensors\[1\] is a numpy\.ndarray, and no tensor: pass tensors"),
        (lambda net: [torch.ones(2), torch.arange(2)], r"^grads\[1\] is an array of dtype int64"),
    ],
)
def test_what_is_no_tensors_is_refused(wrong, match):
    with pytest.raises(LeafError, match=match):
        names.get_total_norm(wrong(model()))


@each_clip
def test_a_gradient_that_cannot_be_clipped_is_named(clip):
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1, 1])).sum().backward()
    first = parameter([3.0, 4.0])
    with pytest.raises(LeafError, match=r"^grads\[2\] is a sparse array .*: make it dense first"):
        clip([first, parameter(), embedding.weight])
    assert first.grad.tolist() == [3.0, 4.0]


@each_clip
def test_a_gradient_that_is_a_variable_of_its_own_is_not_written(clip):
    p = parameter([3.0, 4.0])
    p.grad.requires_grad_()
    with pytest.raises(LeafError, match=r"^grads\[0\] is a variable that a gradient is taken for"):
        clip([p])
    assert p.grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("max_norm", [-1.0, NAN])
def test_bad_bounds(max_norm):
    p = parameter([3.0, 4.0])
    for call in (names.clip_grad_norm_, lambda p, c: names.clip_grads_with_norm_(p, c, 5.0)):
        with pytest.raises(ValueError, match=r"^max_norm must be a number >= 0"):
            call(p, max_norm)
    with pytest.raises(ValueError, match=r"^clip_value must be >= 0"):
        names.clip_grad_value_(p, max_norm)
    with pytest.raises(TypeError, match=r"^total_norm must be a number or a 0-d tensor, got None: get_total_norm"):
        names.clip_grads_with_norm_(p, 1.0, None)
    assert p.grad.tolist() == [3.0, 4.0]


# -- elements that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_error_if_nonfinite(bad):
    ps = [parameter([1.0]), parameter(), parameter([3.0, bad])]
    before = repr(gradients(ps))
    with pytest.raises(
        RuntimeError, match=r"not finite(.|\n)*grads\[2\] \(float32, shape \(2,\)\): [01] NaN, [01] inf"
    ) as e:
        names.clip_grad_norm_(ps, 1.0, 2.0, True)
    assert [culprit.path for culprit in e.value.culprits] == ["grads[2]"]
    with pytest.raises(NonFiniteError, match=r"grads\[2\]"):
        names.get_total_norm([p.grad for p in ps], error_if_nonfinite=True)
    with pytest.raises(NonFiniteError, match="their global norm is nan"):
        names.clip_grads_with_norm_(ps, 1.0, torch.tensor(NAN), nonfinite="error")
    with pytest.raises(ValueError, match="contradicts nonfinite='zero'"):
        names.clip_grad_norm_(ps, 1.0, error_if_nonfinite=True, nonfinite="zero")
    assert repr(gradients(ps)) == before
    assert not math.isfinite(names.get_total_norm(ps[2].grad))
    names.clip_grad_norm_(ps, 1.0, nonfinite="zero")
    assert gradients(ps) == [[0.0], None, [0.0, 0.0]]


def test_inf_makes_everything_nan():
    ps = [parameter([1.0]), parameter([INF, 0.0])]
    assert float(names.clip_grad_norm_(ps, 1.0)) == INF
    assert repr(gradients(ps)) == "[[nan], [nan, nan]]"


def test_finite_gradients_are_no_error_whatever_their_norm():
    p = parameter([3e38, 3e38])
    assert float(names.get_total_norm(p.grad, error_if_nonfinite=True)) == INF
    assert float(names.clip_grad_norm_(p, 1.0, error_if_nonfinite=True)) == INF
    np.testing.assert_allclose(p.grad.numpy(), 0.5**0.5, rtol=1e-6)


# -- gradclip's own options --------------------------------------------------------------------------------------------


def test_per_leaf():
    ps = [parameter([3.0, 4.0]), parameter(), parameter([[6.0], [8.0]])]
    norms = names.clip_grad_norm_(ps, [2.5, 1.0, INF], per="leaf")
    assert [None if x is None else float(x) for x in norms] == [5.0, None, 10.0]
    assert gradients(ps) == [[1.5, 2.0], None, [[6.0], [8.0]]]
    names.clip_grads_with_norm_(ps, 5.0, norms, per="leaf")
    assert gradients(ps) == [[1.5, 2.0], None, [[3.0], [4.0]]]


def test_per_unit():
    p = parameter([[3.0, 4.0], [0.0, 1.0]])
    (norms,) = names.clip_grad_norm_(p, 2.5, per=Units(0))
    assert norms.tolist() == [[5.0], [1.0]]
    assert p.grad.tolist() == [[1.5, 2.0], [0.0, 1.0]]


@pytest.mark.parametrize("form", ["list", "function"])
def test_per_labels(form):
    ps = [parameter([3.0]), parameter(), parameter([4.0]), parameter([7.0]), parameter([9.0])]
    labels = ["body", "body", "body", "head", None]
    seen = []

    def label(path, leaf):
        seen.append((path, leaf.tolist()))
        return labels[int(path.removeprefix("grads[").removesuffix("]"))]

    norms = names.clip_grad_norm_(ps, {"body": 2.5, "head": INF}, per=labels if form == "list" else label)
    assert {key: float(norm) for key, norm in norms.items()} == {"body": 5.0, "head": 7.0}
    assert gradients(ps) == [[1.5], None, [2.0], [7.0], [9.0]]
    if form == "function":
        assert seen == [("grads[0]", [3.0]), ("grads[2]", [4.0]), ("grads[3]", [7.0]), ("grads[4]", [9.0])]


def test_divide_by_and_norm():
    p = parameter([48.0, 64.0])
    assert float(names.clip_grad_norm_(p, 2.5, divide_by=16)) == 5.0
    assert p.grad.tolist() == [1.5, 2.0]
    names.clip_grads_with_norm_(p, 1.0, 1.25, divide_by=torch.tensor(2.0))
    np.testing.assert_allclose(p.grad.numpy(), [0.6, 0.8], rtol=1e-6)
    assert float(names.clip_grad_norm_(p, 1.0, norm=torch.tensor(4.0))) == 4.0
    np.testing.assert_allclose(p.grad.numpy(), [0.15, 0.2], rtol=1e-6)


@pytest.mark.parametrize("grads", [[], [None], [[3.0, 4.0]]])
def test_all_reduce_joins_those_of_another_shard(grads):
    """Here, or where there are none: then the partial is NumPy's, and the norm a tensor."""
    others = []
    names.get_total_norm([torch.tensor([12.0])], all_reduce=lambda partial, op: others.append(partial) or partial)

    def all_reduce(partial, op):
        assert op == "sum"
        joined = torch.as_tensor(partial) + others[0]
        return joined if isinstance(partial, torch.Tensor) else joined.numpy()

    ps = [parameter(g) for g in grads]
    norm = names.clip_grad_norm_(ps, 6.5, all_reduce=all_reduce)
    assert torch.equal(norm, torch.tensor(13.0 if grads == [[3.0, 4.0]] else 12.0))
    assert gradients(ps) == [g and [1.5, 2.0] for g in grads]
    total = names.get_total_norm([p.grad for p in ps], all_reduce=all_reduce)
    exact.check_norm(
        total, exact.norm([np.float32(12.0), *(p.grad.numpy() for p in ps if p.grad is not None)]), "float32"
    )


# -- beside PyTorch's own ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.5, 1, 2.0, 3.5, "inf", INF, -INF, -1.0])
@pytest.mark.parametrize("bound", [0.125, 1, 1e4, torch.tensor(0.25)], ids=str)
def test_agrees_with_torch(p, bound):
    ours, theirs = model(), model()
    norm = names.clip_grad_norm_(ours.parameters(), bound, p)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs.parameters(), bound, p), rtol=1e-5, atol=0)
    for x, y in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (x.grad is None) == (y.grad is None)
        if x.grad is not None:
            torch.testing.assert_close(x.grad, y.grad, rtol=2e-5, atol=0)  # theirs adds 1e-6 to the norm
    apart = model()
    total = names.get_total_norm([x.grad for x in apart.parameters() if x.grad is not None], p)
    names.clip_grads_with_norm_(apart.parameters(), bound, total)
    assert torch.equal(total, norm)
    for x, y in zip(ours.parameters(), apart.parameters(), strict=True):
        assert (x.grad is None) == (y.grad is None)
        if x.grad is not None:
            torch.testing.assert_close(x.grad, y.grad, rtol=3e-7, atol=0)  # by the norm as it was reported


def test_values_agree_with_torch():
    ours, theirs = model(), model()
    names.clip_grad_value_(ours.parameters(), 0.25)
    nn.utils.clip_grad_value_(theirs.parameters(), 0.25)
    assert gradients(ours.parameters()) == gradients(theirs.parameters())
    assert max(float(x.grad.abs().max()) for x in ours.parameters() if x.grad is not None) == 0.25


def test_values_between_bounds_of_their_own():
    ps = [parameter([-3.0, 3.0]), parameter(), parameter([-3.0, 3.0])]
    names.clip_grad_value_(ps, (-1.0, 2.0))
    assert gradients(ps) == [[-1.0, 2.0], None, [-1.0, 2.0]]
    names.clip_grad_value_(ps, [0.5, 9.0, torch.tensor([0.25, 1.0])])
    assert gradients(ps) == [[-0.5, 0.5], None, [-0.25, 1.0]]
    with pytest.raises(LeafError, match=r"^grads\[0\] is complex"):
        names.clip_grad_value_(parameter([1j], "complex64"), 1.0)


def test_total_norm_of_weights_and_of_several_models():
    net = model()
    exact.check_norm(
        names.get_total_norm(net.parameters()), exact.norm([p.detach().numpy() for p in net.parameters()]), "float32"
    )
    one, other = parameter([3.0]), parameter([4.0])
    total = names.get_total_norm(p.grad for p in (one, other))
    for p in (one, other):
        names.clip_grads_with_norm_(p, 2.5, total)
    assert (gradients([one, other]), float(total)) == ([[1.5], [2.0]], 5.0)


# -- in a training loop ------------------------------------------------------------------------------------------------


def test_nothing_is_recorded():
    x = torch.tensor([3.0, 4.0], requires_grad=True)
    (grad,) = torch.autograd.grad((x**2).sum() / 2, x, create_graph=True)
    p = parameter([0.0, 0.0])
    p.grad, graph = grad, grad.grad_fn
    for norm in (
        names.get_total_norm([x]),
        names.get_total_norm([grad]),
        names.clip_grad_norm_([p], 2.5),
        names.clip_grad_norm_([p], 1.0, norm=names.get_total_norm(grad)),
    ):
        assert not norm.requires_grad
    names.clip_grads_with_norm_([p], 0.5, 1.0)
    names.clip_grad_value_([p], 0.375)
    assert p.grad is grad
    np.testing.assert_allclose(p.grad.detach().numpy(), [0.3, 0.375], rtol=1e-6)
    assert grad.grad_fn is graph
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_with_a_grad_scaler(max_norm):
    """`unscale_` first, then as ever; and a clip that divides by the scale itself, for a step without the scaler."""
    weights = []
    for way in ("plain", "unscale_", "divide_by"):
        torch.manual_seed(0)
        net = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.25)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=way != "plain")
        scaler.scale(net(torch.ones(4, 3)).square().sum()).backward()
        if way == "unscale_":
            scaler.unscale_(optimizer)
        names.clip_grad_norm_(net.parameters(), max_norm, divide_by=scaler.get_scale() if way == "divide_by" else None)
        if way == "divide_by":
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        weights.append(nn.utils.parameters_to_vector(net.parameters()).tolist())
    np.testing.assert_allclose(weights[1], weights[0], rtol=1e-6)
    np.testing.assert_allclose(weights[2], weights[0], rtol=1e-6)


def test_a_scaler_skips_the_step_of_an_infinite_gradient():
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((p * torch.tensor([3e38, 1.0])).sum()).backward()
    scaler.unscale_(optimizer)
    names.clip_grad_norm_([p], 1.0)
    scaler.step(optimizer)
    scaler.update()
    assert (p.tolist(), scaler.get_scale()) == ([1.0, 1.0], 512.0)


# -- several ranks -----------------------------------------------------------------------------------------------------


#: torch 2.5's own, of the CPU.
on_a_mesh = pytest.mark.filterwarnings("ignore:DTensor random operators may not:UserWarning")


@pytest.fixture
def mesh(tmp_path):
    """Of one rank, this one."""
    tensor = pytest.importorskip("torch.distributed.tensor")
    with process_group(tmp_path / "store"):
        yield tensor, torch.distributed.device_mesh.init_device_mesh("cpu", (1,))


@on_a_mesh
def test_dtensors(mesh):
    tensor, one = mesh
    ps = [parameter([3.0]), parameter(), parameter([4.0])]
    for p, placement in ((ps[0], tensor.Shard(0)), (ps[2], tensor.Replicate())):
        p.grad = tensor.distribute_tensor(p.grad, one, [placement])
    for norm, want in (
        (names.clip_grad_norm_(ps, 2.5), 5.0),
        (names.get_total_norm([p.grad for p in ps]), 2.5),
        (names.clip_grad_norm_(ps, INF, per="leaf")[2], 2.0),
        (names.clip_grad_norm_(ps, {"a": INF}, per=["a", "b", None])["a"], 1.5),
    ):
        assert isinstance(norm, tensor.DTensor)
        assert norm.full_tensor().tolist() == want
    names.clip_grads_with_norm_(ps, 1.0, names.clip_grad_norm_(ps, INF, per="leaf"), per="leaf")
    names.clip_grad_value_(ps, 0.75)
    assert [p.grad if p.grad is None else p.grad.full_tensor().tolist() for p in ps] == [[0.75], None, [0.75]]
    assert all(isinstance(p.grad, tensor.DTensor) for p in ps[::2])


@on_a_mesh
@pytest.mark.skipif(torch.__version__.startswith("2.5."), reason="torch 2.5 cannot index a DTensor")
def test_dtensors_that_torch_must_join_itself(mesh, monkeypatch):
    """Sums that are yet to be made, whose parts have other norms; and groups along an axis."""
    tensor, one = mesh
    p = parameter([3.0, 4.0])
    p.grad = tensor.DTensor.from_local(p.grad, one, [tensor.Partial()])
    assert names.clip_grad_norm_(p, 2.5).full_tensor().tolist() == 5.0
    assert p.grad.full_tensor().tolist() == [1.5, 2.0]
    p.grad = tensor.distribute_tensor(p.grad.full_tensor(), one, [tensor.Shard(0)])
    asked = []
    monkeypatch.setattr(
        importlib.import_module("gradclip.torch._dtensors"), "parts", lambda x: asked.append(x) or (x, None)
    )
    for per in (Units(0), "unit"):
        assert names.clip_grad_norm_(p, INF, per=per)[0].full_tensor().tolist() == 2.5
    assert names.clip_grad_norm_(p, INF, per="example").full_tensor().tolist() == [1.5, 2.0]
    assert asked == []
    for per in (None, "leaf", ["all"]):
        names.clip_grad_norm_(p, INF, per=per)
    assert len(asked) == 3, "all others by parts"


@on_a_mesh
def test_dtensors_beside_plain_tensors_are_refused(mesh):
    tensor, one = mesh
    ps = [parameter([3.0]), parameter([4.0])]
    ps[0].grad = tensor.distribute_tensor(ps[0].grad, one, [tensor.Shard(0)])
    with pytest.raises(LeafError, match=r"^grads\[0\] is a torch DTensor array and grads\[1\] a torch array"):
        names.clip_grad_norm_(ps, 1.0)
    assert (ps[0].grad.full_tensor().tolist(), ps[1].grad.tolist()) == ([3.0], [4.0])


@pytest.mark.full
def test_with_two_processes(tmp_path):
    """Under DDP, DTensors on meshes of one and two axes, and FSDP2 where this torch has it by that name."""
    here = str(Path(gradclip.__file__).parents[1])
    path = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, WORKER, str(tmp_path / "store")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        encoding="utf-8",
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    has_fsdp2 = hasattr(importlib.import_module("torch.distributed.fsdp"), "fully_shard")
    assert done.stdout == ("DDP, FSDP2\n" if has_fsdp2 else "DDP\n")

"""What may be passed beside the gradients, and that a bad argument is refused before any work is done."""

from __future__ import annotations

import inspect
import math
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import pytest

import exact
import gradclip
from backends import np_dtype

#: The gradients of most tests here: their norm is 13.
VALUES = [[3.0, -4.0], [[12.0]]]


class Spy:
    """An `all_reduce` that remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, partial: Any, op: str) -> Any:
        self.calls.append(op)
        return partial


def make(xp: Any) -> list[Any]:
    return [xp.array(v, "float32") for v in VALUES]


def verbs_with(name: str) -> tuple[str, ...]:
    """The verbs that take this argument."""
    if name == "norm_type":
        return "global_norm", "clip_grad_norm", "clip_grad_norm_"
    if name == "error_if_nonfinite":
        return ("clip_grad_norm_",)
    return "clip_grad_norm", "clip_grad_norm_"


def check_refused(grads: Any, error: Any, match: str, *, verbs: Any = None, **kw: Any) -> None:
    """Assert that every verb refuses the argument, with nothing written and no shard waited for."""
    before = [bytes(memoryview(np.asarray(x)).cast("B")) for x in grads] if verbs is None else None
    (name, *_) = kw
    for verb in verbs or verbs_with(name):
        spy = Spy()
        args = kw if verb == "global_norm" else {"max_norm": 1.0, **kw}
        with pytest.raises(error, match=match) as caught:
            getattr(gradclip, verb)(grads, all_reduce=spy, **args)
        assert not isinstance(caught.value, gradclip.LeafError)
        assert spy.calls == []
    if before is not None:
        assert [bytes(memoryview(np.asarray(x)).cast("B")) for x in grads] == before


def numpy_grads() -> list[Any]:
    return [np.array(v, np.float32) for v in VALUES]


#: value -> the error for each scalar argument that refuses it
NOT_SCALARS = {
    "true": (lambda: True, TypeError),
    "false": (lambda: False, TypeError),
    "numpy-bool": (lambda: np.True_, TypeError),
    "bool-array": (lambda: np.array(True), TypeError),
    "str": (lambda: "1.0", TypeError),
    "bytes": (lambda: b"1", TypeError),
    "str-array": (lambda: np.array("1.0"), TypeError),
    "numpy-str": (lambda: np.str_("1.0"), TypeError),
    "complex": (lambda: 1j, TypeError),
    "complex-without-imaginary-part": (lambda: 1 + 0j, TypeError),
    "numpy-complex": (lambda: np.complex64(1), TypeError),
    "object-array": (lambda: np.array(None), TypeError),
    "object-array-of-a-number": (lambda: np.array(1.0, object), TypeError),
    "datetime": (lambda: np.datetime64("2020-01-01"), TypeError),
    "structured": (lambda: np.zeros((), "f4,f4"), TypeError),
    "list": (lambda: [1.0], TypeError),
    "tuple": (lambda: (1.0,), TypeError),
    "dict": (dict, TypeError),
    "object": (object, TypeError),
    "function": (lambda: abs, TypeError),
    "1-d": (lambda: np.array([1.0]), (ValueError, TypeError)),
    "1-d-int": (lambda: np.array([1]), (ValueError, TypeError)),
    "empty": (lambda: np.zeros(0), (ValueError, TypeError)),
    "2-d": (lambda: np.ones((1, 1), np.float32), (ValueError, TypeError)),
}
BELOW_ZERO = {
    "-1": -1,
    "-1.0": -1.0,
    "-tiny": -5e-324,
    "-inf": -math.inf,
    "numpy-float32": np.float32(-1),
    "numpy-int64": np.int64(-3),
    "numpy-0-d": np.array(-1.0),
    "numpy-0-d-int8": np.array(-1, np.int8),
    "bfloat16": np_dtype("bfloat16").type(-1),
    "bfloat16-0-d": np.array(-1, np_dtype("bfloat16")),
    "-huge": -(10**30),
}
NANS = {
    "nan": math.nan,
    "numpy-nan": np.float32("nan"),
    "numpy-0-d-nan": np.array(np.nan),
    "bfloat16-nan": np_dtype("bfloat16").type("nan"),
}
each_scalar = pytest.mark.parametrize("name", ["max_norm", "norm", "divide_by"])


@each_scalar
@pytest.mark.parametrize(("value", "error"), NOT_SCALARS.values(), ids=NOT_SCALARS.keys())
def test_a_scalar_that_is_no_real_number(name, value, error):
    check_refused(numpy_grads(), error, f"^{name} must be ", **{name: value()})


@pytest.mark.parametrize("verb", ["clip_grad_norm", "clip_grad_norm_"])
def test_max_norm_is_needed(verb):
    grads = numpy_grads()
    with pytest.raises(TypeError, match=r"^max_norm must be a number >= 0.*None"):
        getattr(gradclip, verb)(grads, None)
    assert [g.tolist() for g in grads] == VALUES


@each_scalar
@pytest.mark.parametrize("value", BELOW_ZERO.values(), ids=BELOW_ZERO.keys())
def test_a_scalar_below_zero(name, value):
    check_refused(numpy_grads(), ValueError, f"^{name} must be ", **{name: value})


@pytest.mark.parametrize("name", ["max_norm", "divide_by"])
@pytest.mark.parametrize("value", NANS.values(), ids=NANS.keys())
def test_a_scalar_that_is_nan(name, value):
    check_refused(numpy_grads(), ValueError, f"^{name} must be .*nan", **{name: value})


@pytest.mark.parametrize(
    "value",
    [0, 0.0, -0.0, math.inf, np.float32(0), np.array(0), np.array(np.inf), np_dtype("bfloat16").type(0)],
    ids=str,
)
def test_divide_by_is_positive_and_finite(value):
    check_refused(numpy_grads(), ValueError, "^divide_by must be a positive number", divide_by=value)


@each_scalar
@pytest.mark.parametrize("shape", [(1,), (1, 1), (0,), (2,)], ids=str)
def test_an_array_that_is_not_0_d(xp, name, shape):
    grads = make(xp)
    value = xp.array(np.ones(shape), "float32")
    check_refused(
        grads,
        (ValueError, TypeError),
        rf"^{name} must be .*\b0-d",
        verbs=("clip_grad_norm",),
        **{name: value},
    )
    if xp.in_place:
        check_refused(
            grads,
            (ValueError, TypeError),
            rf"^{name} must be .*\b0-d",
            verbs=("clip_grad_norm_",),
            **{name: value},
        )
    assert [g.tolist() for g in xp.back(grads)] == VALUES


@each_scalar
@pytest.mark.parametrize("dtype", ["bool", "complex64"])
def test_a_0_d_array_that_is_not_real(xp, name, dtype):
    grads = make(xp)
    check_refused(grads, TypeError, f"^{name} must be .*real", verbs=("clip_grad_norm",), **{name: xp.array(1, dtype)})
    assert [g.tolist() for g in xp.back(grads)] == VALUES


BAD_NORM_TYPES = {
    "str": ("2", TypeError),
    "fro": ("fro", TypeError),
    "Inf": ("Inf", TypeError),
    "none": (None, TypeError),
    "bool": (True, TypeError),
    "numpy-bool": (np.True_, TypeError),
    "complex": (2 + 0j, TypeError),
    "list": ([2.0], TypeError),
    "1-d": (np.array([2.0]), TypeError),
    "object": (object(), TypeError),
    "nan": (math.nan, ValueError),
    "numpy-nan": (np.float32("nan"), ValueError),
}


@pytest.mark.parametrize(("value", "error"), BAD_NORM_TYPES.values(), ids=BAD_NORM_TYPES.keys())
def test_a_bad_norm_type(value, error):
    check_refused(numpy_grads(), error, "^norm_type must be ", norm_type=value)


def test_a_norm_type_that_lives_on_a_device(xp):
    p = xp.array(2.0, "float32")
    if xp.module == "numpy":  # the host sees it
        assert float(gradclip.global_norm(make(xp), p)) == 13.0
    else:
        check_refused(
            make(xp),
            TypeError,
            "^norm_type must be .*known before",
            verbs=("global_norm", "clip_grad_norm"),
            norm_type=p,
        )


@pytest.mark.library("jax")
def test_a_traced_norm_type():
    jax = pytest.importorskip("jax")
    with pytest.raises(TypeError, match=r"^norm_type must be .*known before tracing"):
        jax.jit(gradclip.global_norm)(numpy_grads(), 3.0)


@pytest.mark.parametrize(
    ("p", "want"),
    [
        (2, 13.0),
        (2.0, 13.0),
        (np.float32(2), 13.0),
        (np.int64(2), 13.0),
        (np.array(2), 13.0),
        (1, 19.0),
        ("inf", 12.0),
        (math.inf, 12.0),
        ("-inf", 3.0),
        (np.float64("-inf"), 3.0),
        (0, 3.0),
        (-0.0, 3.0),
        (3, float(exact.norm(numpy_grads(), 3))),
        (np.float32(-1), float(exact.norm(numpy_grads(), -1))),
    ],
    ids=repr,
)
def test_good_norm_types(p, want):
    grads = numpy_grads()
    exact.check_norm(gradclip.global_norm(grads, p), mpmath.mpf(want), "float32", ulps=8)
    exact.check_norm(gradclip.clip_grad_norm(grads, 1.0, norm_type=p).norm, mpmath.mpf(want), "float32", ulps=8)
    exact.check_norm(gradclip.clip_grad_norm_(grads, 1.0, p), mpmath.mpf(want), "float32", ulps=8)


BAD_POLICIES = {
    "raise": "raise",
    "empty": "",
    "upper": "ZERO",
    "none": None,
    "true": True,
    "0": 0,
    "bytes": b"zero",
    "list": ["zero"],
    "1-array": np.array(["zero"]),
    "2-array": np.array(["zero", "error"]),
}


@pytest.mark.parametrize("value", BAD_POLICIES.values(), ids=BAD_POLICIES.keys())
def test_a_bad_policy(value):
    match = "^nonfinite must be one of 'propagate', 'zero', 'error', got "
    check_refused(numpy_grads(), (ValueError, TypeError), match, nonfinite=value)


@pytest.mark.parametrize("bad", [False, True], ids=["finite", "nan"])
def test_error_if_nonfinite_contradicts_zero(bad):
    grads = numpy_grads()
    if bad:
        grads[0][1] = np.nan
    before = [g.tobytes() for g in grads]
    spy = Spy()
    with pytest.raises(ValueError, match=r"^error_if_nonfinite=True contradicts nonfinite='zero'"):
        gradclip.clip_grad_norm_(grads, 1.0, error_if_nonfinite=True, nonfinite="zero", all_reduce=spy)
    assert spy.calls == []
    assert [g.tobytes() for g in grads] == before


@pytest.mark.parametrize("value", ["zero", "propagate", "False", np.zeros(2), [False]], ids=repr)
def test_error_if_nonfinite_is_a_bool(value):
    """`clip_grad_norm_(g, 1.0, 2.0, "zero")` puts a policy in PyTorch's slot; it must not pass for True."""
    check_refused(numpy_grads(), (TypeError, ValueError), "^error_if_nonfinite must be ", error_if_nonfinite=value)


@pytest.mark.parametrize("yes", [True, np.True_, 1])
@pytest.mark.parametrize("nonfinite", ["propagate", "error"])
def test_error_if_nonfinite_raises_and_writes_nothing(yes, nonfinite):
    grads = numpy_grads()
    grads[0][1] = np.inf
    before = [g.tobytes() for g in grads]
    with pytest.raises(gradclip.NonFiniteError, match=r"grads\[0\] .*: 0 NaN, 1 inf") as caught:
        gradclip.clip_grad_norm_(grads, 1.0, 2.0, yes, nonfinite=nonfinite)
    assert isinstance(caught.value, RuntimeError)
    assert [g.tobytes() for g in grads] == before


@pytest.mark.parametrize("no", [False, np.False_, 0])
def test_error_if_nonfinite_false(no):
    grads = numpy_grads()
    grads[0][1] = np.inf
    assert float(gradclip.clip_grad_norm_(grads, 1.0, 2.0, no)) == math.inf
    assert all(np.isnan(g).all() for g in grads)
    grads = numpy_grads()
    assert float(gradclip.clip_grad_norm_(grads, 6.5, 2.0, no)) == 13.0
    assert [g.tolist() for g in grads] == [[1.5, -2.0], [[6.0]]]


def test_arguments_are_checked_before_the_leaves_are_measured():
    """The bad leaf comes later in the tree than the bad bound: either error will do, a result will not."""
    spy = Spy()
    with pytest.raises((ValueError, TypeError), match=r"max_norm|grads"):
        gradclip.clip_grad_norm([np.ones(2), "x"], -1.0, all_reduce=spy)
    assert spy.calls == []


@pytest.mark.parametrize("tree", [[], None, {"a": None}], ids=repr)
def test_an_empty_tree_does_not_hide_a_bad_argument(tree):
    for kw in ({"max_norm": -1.0}, {"nonfinite": "no"}, {"norm_type": "2"}, {"divide_by": 0}, {"norm": "1"}):
        (name,) = kw
        with pytest.raises((ValueError, TypeError), match=f"^{name} must be "):
            gradclip.clip_grad_norm(tree, **{"max_norm": 1.0, **kw})
    for value in (-1.0, math.nan, (2.0, 1.0), True, "x"):
        with pytest.raises((ValueError, TypeError), match=r"^clip_value\b"):
            gradclip.clip_grad_value(tree, value)


def test_positions_are_those_of_torch():
    torch = pytest.importorskip("torch")
    theirs = list(inspect.signature(torch.nn.utils.clip_grad_norm_).parameters.values())[1:4]
    ours = list(inspect.signature(gradclip.clip_grad_norm_).parameters.values())
    assert [p.name for p in ours[1:4]] == [p.name for p in theirs] == ["max_norm", "norm_type", "error_if_nonfinite"]
    assert [p.default for p in ours[1:4]] == [p.default for p in theirs]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in ours[:4])
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[4:])
    assert {p.name for p in ours[4:]} == {"per", "nonfinite", "norm", "divide_by", "all_reduce"}
    grads = numpy_grads()
    assert float(gradclip.clip_grad_norm_(grads, 6.0, math.inf, False)) == 12.0
    assert [g.tolist() for g in grads] == [[1.5, -2.0], [[6.0]]]


@pytest.mark.parametrize(
    ("verb", "names"),
    [
        ("global_norm", ["grads", "norm_type", "all_reduce"]),
        ("norms", ["grads", "norm_type", "per", "all_reduce"]),
        (
            "clip_grad_norm",
            ["grads", "max_norm", "norm_type", "per", "nonfinite", "norm", "divide_by", "all_reduce"],
        ),
        ("clip_grad_value", ["grads", "clip_value"]),
        ("clip_grad_value_", ["grads", "clip_value"]),
    ],
)
def test_signatures(verb, names):
    parameters = inspect.signature(getattr(gradclip, verb)).parameters
    assert list(parameters) == names
    keywords = {"per", "nonfinite", "norm", "divide_by", "all_reduce"}
    assert {n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY} == keywords & set(names)
    if "norm_type" in names:
        assert parameters["norm_type"].default == 2.0
    if "nonfinite" in names:
        assert parameters["nonfinite"].default == "propagate"


# -- good values ---------------------------------------------------------------------------------------------


def close(got: Any, want: Any, dtype: str, ulps: float = 2) -> None:
    """Every element of a NumPy array within `ulps` of exact numbers."""
    assert got.size == len(want)
    for g, w in zip(got.reshape(-1).tolist(), want, strict=True):
        assert abs(mpmath.mpf(g) - w) <= ulps * exact.ulp(w, dtype), f"{g!r}, exactly {mpmath.nstr(w, 20)}"


def check(xp: Any, got: Any, grads: list[Any], wants: list[Any], ulps: float = 2) -> None:
    """Exact values, leaf by leaf; dtype, shape, device and library as they went in."""
    assert len(got) == len(grads) == len(wants)
    for g, x, want in zip(got, grads, wants, strict=True):
        assert xp.owns(g)
        assert xp.dtype_of(g) == xp.dtype_of(x)
        assert tuple(g.shape) == tuple(x.shape)
        assert xp.device_of(g) == xp.device_of(x)
        close(xp.numpy(g), want, xp.dtype_of(x), ulps)


def check_scaled(xp: Any, got: Any, grads: list[Any], factor: Any) -> None:
    exact_leaves = [[mpmath.mpf(x) * factor for x in np.ravel(xp.numpy(g)).tolist()] for g in grads]
    check(xp, got, grads, exact_leaves)


def check_norm_array(xp: Any, norm: Any, dtype: str = "float32") -> None:
    assert norm.shape == ()
    assert xp.dtype_of(norm) == dtype
    assert xp.owns(norm)


HOST_BOUNDS = {
    "int": 2,
    "float": 2.0,
    "float16": np.float16(2),
    "float32": np.float32(2),
    "float64": np.float64(2),
    "int64": np.int64(2),
    "uint8": np.uint8(2),
    "0-d": np.array(2.0),
    "0-d-int": np.array(2),
    "0-d-big-endian": np.array(2.0, ">f4"),
    "bfloat16": np_dtype("bfloat16").type(2),
}


@pytest.mark.parametrize("bound", HOST_BOUNDS.values(), ids=HOST_BOUNDS.keys())
def test_bounds_that_the_host_sees(xp, bound):
    grads = make(xp)
    got, norm = gradclip.clip_grad_norm(grads, bound)
    check_scaled(xp, got, grads, mpmath.mpf(2) / 13)
    check_norm_array(xp, norm)
    assert float(norm) == 13.0
    assert [g.tolist() for g in xp.back(grads)] == VALUES


@pytest.mark.parametrize(
    "bound",
    [2**70, 10**30, 10**39, 10**400, 1e300, 3e38, math.inf, np.float64("inf")],
    ids=["2**70", "10**30", "10**39", "10**400", "1e300", "3e38", "inf", "numpy-inf"],
)
def test_huge_bounds_clip_nothing(xp, bound):
    grads = make(xp)
    got, norm = gradclip.clip_grad_norm(grads, bound)
    assert [g.tobytes() for g in xp.back(got)] == [g.tobytes() for g in xp.back(grads)]
    assert float(norm) == 13.0
    limited = gradclip.clip_grad_value(grads, bound)
    assert [g.tobytes() for g in xp.back(limited)] == [g.tobytes() for g in xp.back(grads)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int32"])
def test_0_d_bounds_of_the_library(xp, dtype):
    if not (xp.has(dtype) or dtype == "int32"):
        assert xp.name in ("array-api-strict", "jax", "jax-jit", "cupy")
        return
    grads = make(xp)
    bound, norm, divisor = (xp.array(x, dtype) for x in (2, 13, 4))
    got, reported = xp.clip_grad_norm(grads, bound, divide_by=divisor)
    check_scaled(xp, got, grads, mpmath.mpf(2) / 13)
    check_norm_array(xp, reported)
    assert float(reported) == 3.25
    if dtype == "float32":  # once is enough: compilation takes its time
        got, reported = xp.clip_grad_norm(grads, bound, norm=norm)
        check_scaled(xp, got, grads, mpmath.mpf(2) / 13)
        check_norm_array(xp, reported)
        assert float(reported) == 13.0


@pytest.mark.parametrize("values", [[3.0, -4.0], [0.0, 0.0]], ids=["some", "zeros"])
@pytest.mark.parametrize("bound", [-1.0, -math.inf, -0.0], ids=repr)
def test_a_negative_bound_on_a_device_acts_as_zero(xp, values, bound):
    grads, c = [xp.array(values, "float32")], xp.array(bound, "float32")
    if xp.module == "numpy" and bound < 0:
        check_refused(grads, ValueError, "^max_norm must be a number >= 0", max_norm=c)
        return
    got, norm = xp.clip_grad_norm(grads, c)
    check(xp, got, grads, [[0.0, 0.0]], ulps=0)
    assert float(norm) == math.hypot(*values)


@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
@pytest.mark.parametrize("values", [[3.0, -4.0], [0.0, 0.0]], ids=["some", "zeros"])
def test_a_nan_bound_on_a_device_gives_nan(xp, values, nonfinite):
    grads, c = [xp.array(values, "float32")], xp.array(math.nan, "float32")
    if xp.module == "numpy":
        check_refused(grads, ValueError, "^max_norm must be a number >= 0", max_norm=c)
        return
    got, norm = xp.clip_grad_norm(grads, c, nonfinite=nonfinite)
    assert np.isnan(xp.numpy(got[0])).all()
    assert xp.owns(got[0])
    assert xp.dtype_of(got[0]) == "float32"
    assert float(norm) == math.hypot(*values)


@pytest.mark.library("jax")
def test_numpy_gradients_in_place_with_a_bound_on_a_device():
    """The gradients can be written to, whatever the bound is: a number from a schedule, say."""
    jnp = pytest.importorskip("jax.numpy")
    grads = numpy_grads()
    norm = gradclip.clip_grad_norm_(grads, jnp.asarray(6.5, "float32"))
    assert float(norm) == 13.0
    assert [g.tolist() for g in grads] == [[1.5, -2.0], [[6.0]]]


# -- norm= ---------------------------------------------------------------------------------------------------


def test_the_norm_that_is_given_is_trusted(xp):
    grads = make(xp)
    got, norm = xp.clip_grad_norm(grads, 2.0, norm=20.0)  # not the true one
    check_scaled(xp, got, grads, mpmath.mpf(1) / 10)
    check_norm_array(xp, norm)
    assert float(norm) == 20.0
    got, norm = xp.clip_grad_norm(grads, 2.0, norm=1.0)
    assert [g.tolist() for g in xp.back(got)] == VALUES
    assert float(norm) == 1.0


def test_a_given_norm_needs_no_collective():
    """Nothing is computed twice: no shard is asked for what is known."""
    spy = Spy()
    got, norm = gradclip.clip_grad_norm(numpy_grads(), 6.5, norm=13.0, all_reduce=spy)
    assert spy.calls == []
    assert [g.tolist() for g in got] == [[1.5, -2.0], [[6.0]]]
    assert float(norm) == 13.0


def test_the_reported_norm_given_back_changes_nothing(xp):
    grads = [xp.array([1.1, -0.7], "float32"), xp.array([[1 / 3]], "float32")]
    norm = xp.global_norm(grads)
    for bound in (0.5, 3.0):
        one, two = xp.clip_grad_norm(grads, bound), xp.clip_grad_norm(grads, bound, norm=norm)
        assert xp.numpy(one.norm).tobytes() == xp.numpy(two.norm).tobytes()
        for a, b in zip(xp.back(one.grads), xp.back(two.grads), strict=True):
            np.testing.assert_allclose(a, b, rtol=5e-7, atol=0)
    for kw in ({}, {"norm": norm}):
        got = xp.clip_grad_norm(grads, norm, **kw).grads
        assert [g.tobytes() for g in xp.back(got)] == [g.tobytes() for g in xp.back(grads)]


@pytest.mark.parametrize("device", [False, True], ids=["host", "array"])
@pytest.mark.parametrize("value", [math.inf, math.nan], ids=repr)
def test_a_given_norm_that_is_not_finite(xp, value, device):
    grads = make(xp)
    norm = xp.array(value, "float32") if device else value
    for bound in (1.0, 100.0, math.inf, 0.0):
        got, reported = xp.clip_grad_norm(grads, bound, norm=norm)
        assert all(np.isnan(g).all() for g in xp.back(got))
        assert np.array_equal(float(reported), value, equal_nan=True)
        got, reported = xp.clip_grad_norm(grads, bound, norm=norm, nonfinite="zero")
        assert [g.tolist() for g in xp.back(got)] == [[0.0, 0.0], [[0.0]]]
        assert np.array_equal(float(reported), value, equal_nan=True)
    with pytest.raises(gradclip.NonFiniteError, match=f"global norm is {value}(.|\n)*norm="):
        gradclip.clip_grad_norm(grads, 1.0, norm=norm, nonfinite="error")
    assert [g.tolist() for g in xp.back(grads)] == VALUES
    if xp.in_place:
        with pytest.raises(gradclip.NonFiniteError, match=f"global norm is {value}"):
            gradclip.clip_grad_norm_(grads, 1.0, 2.0, True, norm=norm)
        assert [g.tolist() for g in xp.back(grads)] == VALUES
        gradclip.clip_grad_norm_(grads, 1.0, norm=norm, nonfinite="zero")
        assert [g.tolist() for g in xp.back(grads)] == [[0.0, 0.0], [[0.0]]]


def test_a_given_norm_of_zero(xp):
    grads = [xp.array([0.0, -0.0], "float32")]
    got, norm = xp.clip_grad_norm(grads, 0.0, norm=0.0)
    assert xp.numpy(got[0]).tobytes() == np.float32([0.0, -0.0]).tobytes()
    assert float(norm) == 0.0


# -- divide_by -----------------------------------------------------------------------------------------------

HARD = [([1.1, -3.3e-3], [[123456.79]]), ([7.0e8, 1e-12], [[-2.5]])]


@pytest.mark.parametrize(
    "divisor", [1, 2, 3, 7.0, 0.1, 65536.0, 1000, 1e-3, 2**70, np.float32(3), np.int64(10)], ids=repr
)
@pytest.mark.parametrize(("values", "bound"), [(HARD[0], math.inf), (HARD[1], 1e30)], ids=["inf", "1e30"])
def test_divide_by_alone(xp, divisor, values, bound):
    grads = [xp.array(v, "float32") for v in values]
    d = Fraction(divisor if isinstance(divisor, int | float) else divisor.item())
    got, norm = gradclip.clip_grad_norm(grads, bound, divide_by=divisor)
    wants = [[Fraction(x) / d for x in np.ravel(g).tolist()] for g in xp.back(grads)]
    wants = [[mpmath.mpf(w.numerator) / w.denominator for w in row] for row in wants]
    # A power of two divides without rounding; else the reciprocal is rounded, and the product.
    check(xp, got, grads, wants, ulps=0 if d.numerator & (d.numerator - 1) == 0 and d.denominator == 1 else 2)
    want = exact.norm(xp.back(grads)) * d.denominator / d.numerator
    exact.check_norm(float(norm), want, "float32")
    check_norm_array(xp, norm)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "complex64"])
@pytest.mark.parametrize("divisor", [8.0, 3.0])
def test_divide_by_in_other_dtypes(xp, dtype, divisor):
    if not xp.has(dtype):
        assert dtype not in xp.dtypes
        return
    x = xp.array([1.5, -300.0], dtype)
    got, norm = xp.clip_grad_norm([x], math.inf, divide_by=divisor)
    assert xp.owns(got[0])
    assert xp.dtype_of(got[0]) == dtype
    assert xp.device_of(got[0]) == xp.device_of(x)
    wants = [mpmath.mpf(v) / divisor for v in (1.5, -300.0)]
    close(xp.numpy(got[0]).astype(np.complex128).real, wants, dtype, ulps=0 if divisor == 8 else 2)
    exact.check_norm(float(norm), exact.norm(xp.back([x])) / divisor, "float64" if dtype == "float64" else "float32")


def test_factors_that_are_a_shift_and_nothing_else(xp):
    """The square of the shift: 1 in the dtype of the sums, and yet not a factor of 1."""
    dtype, power = ("float64", 1024) if xp.has("float64") else ("float32", 128)
    x = xp.array([2.0**-power * 2.0**30, 0.0], dtype)
    got, _ = gradclip.clip_grad_norm([x], math.inf, divide_by=2.0**-power)
    assert xp.numpy(got[0]).tolist() == [2.0**30, 0.0]
    x = xp.array([2.0**30, -0.0], dtype)
    got, _ = gradclip.clip_grad_norm([x], 2.0 ** (30 - power))
    assert xp.numpy(got[0]).tolist() == [2.0 ** (30 - power), 0.0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_divide_by_makes_16_bit_gradients_grow(xp, dtype):
    """To inf from where the product rounds to it, and else right to half a unit in the last place."""
    if not xp.has(dtype):
        assert dtype not in xp.dtypes
        return
    top = float(exact.largest(dtype))
    values = [1.5, -300.0, 0.0, top, -top, top / 2, 2.0**-14]
    got = xp.numpy(xp.clip_grad_norm([xp.array(values, dtype)], math.inf, divide_by=0.75).grads[0])
    for g, v in zip(got.astype(np.float64).tolist(), values, strict=True):
        want = mpmath.mpf(v) / 0.75
        if abs(want) > top:
            assert g == math.copysign(math.inf, v)
        else:
            assert abs(g - want) <= 0.501 * exact.ulp(want, dtype)


@pytest.mark.parametrize("known", [False, True], ids=["measured", "norm-given"])
@pytest.mark.parametrize("divisor", [None, 4.0, 3.0, 0.5])
@pytest.mark.parametrize("share", [0.25, 0.999, 1.001, 4.0])
def test_bound_norm_and_divisor_together(xp, share, divisor, known):
    grads = [xp.array(v, "float32") for v in HARD[0]]
    d = mpmath.mpf(divisor or 1)
    true = exact.norm(xp.back(grads)) / d
    bound = float(np.float32(float(true) * share))
    kw = {} if divisor is None else {"divide_by": divisor}
    if known:
        kw["norm"] = float(np.float32(float(true)))
    got, norm = xp.clip_grad_norm(grads, bound, **kw)
    exact.check_norm(float(norm), true, "float32")
    check_norm_array(xp, norm)
    factor = 1 / d if share > 1 else bound / (kw["norm"] if known else true) / d
    leaves = [[mpmath.mpf(x) * factor for x in np.ravel(xp.numpy(g)).tolist()] for g in grads]
    # In float32 throughout (JAX) the norm's own error (4) comes on top of the factor's and the product's.
    check(xp, got, grads, leaves, ulps=2 if share > 1 or xp.accumulates_wide else 6)
    if divisor is None and share > 1:
        assert [g.tobytes() for g in xp.back(got)] == [g.tobytes() for g in xp.back(grads)]


@pytest.mark.parametrize("divisor", [3.0, 2.0**20])
def test_divide_by_in_place(xp, divisor):
    if not xp.in_place:
        with pytest.raises(gradclip.LeafError, match=r"^grads\[0\] .*gradclip\.clip_grad_norm\b"):
            gradclip.clip_grad_norm_(make(xp), 1.0, divide_by=divisor)
        return
    for bound in (1e-7, 1e9):
        inside, outside = make(xp), make(xp)
        got, norm = gradclip.clip_grad_norm(outside, bound, divide_by=divisor)
        reported = gradclip.clip_grad_norm_(inside, bound, divide_by=divisor)
        assert [g.tobytes() for g in xp.back(inside)] == [g.tobytes() for g in xp.back(got)]
        assert float(reported) == float(norm)


def test_divide_by_brings_the_norm_into_range(xp):
    """The norm of the gradients is beyond float32; after the division it is not."""
    grads = [xp.array([3e38, -3e38], "float32")]
    got, norm = xp.clip_grad_norm(grads, 1.0, divide_by=1024.0)
    exact.check_norm(float(norm), exact.norm(xp.back(grads)) / 1024, "float32")
    half = mpmath.sqrt(0.5)
    check(xp, got, grads, [[half, -half]], ulps=2 if xp.accumulates_wide else 6)
    got, norm = xp.clip_grad_norm(grads, math.inf, divide_by=1024.0)
    check(xp, got, grads, [[mpmath.mpf(x) / 1024 for x in xp.numpy(grads[0]).tolist()]])


@pytest.mark.parametrize(("value", "divisor"), [(1e38, 1e39), (2e-20, 1e-39), (1e30, 1e42)])
def test_a_divisor_beyond_float32(xp, value, divisor):
    """Gradients, divisor and quotient are finite: so is the result."""
    grads = [xp.array([value, -value], "float32")]
    got, norm = gradclip.clip_grad_norm(grads, 1e37, divide_by=divisor)
    wants = [mpmath.mpf(x) / mpmath.mpf(divisor) for x in xp.numpy(grads[0]).tolist()]
    check(xp, got, grads, [wants])
    exact.check_norm(float(norm), exact.norm(xp.back(grads)) / mpmath.mpf(divisor), "float32")


@pytest.mark.parametrize("bound", [4e38, 5e38, 7e38, 1e300])
@pytest.mark.parametrize("given", [None, 6e38])
@pytest.mark.parametrize("divisor", [None, 2.0**-20, 2.0**20, 1e45])
def test_a_max_norm_beyond_float32(xp, bound, given, divisor):
    """A norm of 6e38, say, cannot be reported in float32; whether it is clipped is decided all the same."""
    value = np.float32(3e38) if divisor is None else np.float32(min(3e38, 3e38 * divisor))
    grads = [xp.array([[value, -value], [value, value]], "float32")]
    kw = {} if divisor is None else {"divide_by": divisor}
    true = exact.norm(xp.back(grads)) / mpmath.mpf(divisor or 1)
    if given is not None:
        kw["norm"] = float(true)
    got, norm = gradclip.clip_grad_norm(grads, bound, **kw)
    exact.check_norm(float(norm), true, "float32")
    factor = min(mpmath.mpf(1), bound / true) / mpmath.mpf(divisor or 1)
    signs = [[1, -1], [1, 1]]
    check(xp, got, grads, [[mpmath.mpf(float(value)) * sign * factor for row in signs for sign in row]], ulps=3)


@pytest.mark.parametrize("divisor", [5e-324, 1e-310, 1e-300, 1e-39])
def test_a_divisor_whose_reciprocal_overflows(xp, divisor):
    """0 / divisor is 0, and what is beyond the dtype is inf: nothing is NaN."""
    for dtype in xp.dtypes:
        got, norm = gradclip.clip_grad_norm([xp.array([0, 0], dtype)], 1.0, divide_by=divisor)
        assert xp.numpy(got[0]).tolist() == [0, 0], dtype
        assert float(norm) == 0
        if dtype in ("float32", "float64"):
            got, _ = gradclip.clip_grad_norm([xp.array([0, 3], "float32")], math.inf, divide_by=divisor)
            assert xp.numpy(got[0]).tolist() == [0, math.inf]
            got, _ = gradclip.clip_grad_norm([xp.array([0, 3], dtype)], 2.0, divide_by=divisor)
            assert xp.numpy(got[0]).tolist() == [0, pytest.approx(2, rel=3e-7)]


@pytest.mark.library("jax")
def test_float64_bounds_of_float32_gradients_in_jax():
    """Traced as float64, they are split there: as a float32 each of these is inf or 0."""
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        clip = jax.jit(lambda g, c, d: gradclip.clip_grad_norm(g, c, divide_by=d))
        leaf = jax.numpy.full(4, 3e38, "float32")
        for c, d, want in [(5e38, 1.0, 2.5e38), (7e38, 1.0, 3e38), (1e300, 1e45, 3e-7), (1e-50, 1e-45, 0.0)]:
            got, _ = clip([leaf], np.float64(c), np.float64(d))
            assert got[0].dtype == np.float32
            assert float(got[0][2]) == pytest.approx(want, rel=3e-7)


def test_divide_by_does_not_hide_a_bad_element(xp):
    grads = [xp.array([1.0, math.inf], "float32"), xp.array([[2.0]], "float32")]
    got, norm = xp.clip_grad_norm(grads, 1.0, divide_by=4.0)
    assert all(np.isnan(g).all() for g in xp.back(got))
    assert float(norm) == math.inf
    got, norm = xp.clip_grad_norm(grads, 1.0, divide_by=4.0, nonfinite="zero")
    assert [g.tolist() for g in xp.back(got)] == [[0.0, 0.0], [[0.0]]]

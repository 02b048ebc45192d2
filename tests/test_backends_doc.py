"""The backend that docs/backends.md shows: two methods, and it clips as NumPy's own does."""

from __future__ import annotations

import inspect
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import array_api_compat
import numpy as np
import pytest
from test_docs import blocks

import gradclip
from gradclip import _libraries
from gradclip._backends.generic import Backend

PAGE = Path(__file__).parents[1] / "docs" / "backends.md"
LABELS = {"a": "low", "b": "high", "c": "low", "d": None}


@pytest.fixture
def toy(monkeypatch):
    """NumPy's arrays belong to the backend of the page."""
    module = ModuleType("gradclip._backends.toy")
    (block,) = (b for b in blocks(PAGE.read_text(encoding="utf-8")) if b.language == "python")
    exec(compile("\n" * block.line + block.body, "docs/backends.md", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    # Still called "numpy" where it is asked for: on_host knows it by that name.
    own = _libraries._own
    calls = []

    def replaced(name):
        calls.append(name)
        return module.ToyBackend() if name == "numpy" else own(name)

    monkeypatch.setattr(_libraries, "_own", replaced)
    yield module.ToyBackend
    assert calls, "it was not asked"


def grads():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((5, 7)).astype(np.float32)
    b = np.array([3e200, -1e-300, 4.0])
    c = (rng.standard_normal(6) + 1j * rng.standard_normal(6)).astype(np.complex64)
    return {"a": a, "b": b, "c": c, "d": np.array([0.5, 300.0], np.float16)}


def flat(x):
    return [np.asarray(leaf) for leaf in (x.values() if isinstance(x, dict) else [x])]


def same(mine, right):
    for x, y in zip(flat(mine), flat(right), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        eps = float(np.finfo(y.real.dtype).eps)
        np.testing.assert_allclose(x, y, rtol=8 * eps, atol=0)


def test_it_is_written_with_two_methods(toy):
    own = {name for name in vars(toy) if not name.startswith("_")}
    assert own == {"partial", "scale"}
    assert issubclass(toy, Backend)
    gradclip.global_norm([np.ones(2)])


def test_the_page_names_every_method_of_the_interface():
    rows = re.findall(r"^\| (`.*?) \|", PAGE.read_text(encoding="utf-8"), re.M)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == {name for name, _ in inspect.getmembers(Backend, callable) if not name.startswith("_")}


@pytest.mark.parametrize(
    "per", [None, "leaf", "unit", gradclip.Units(0), LABELS], ids=["all", "leaf", "unit", "first", "labels"]
)
@pytest.mark.parametrize("p", [2.0, "rms", 1.0, 0.0, math.inf, -math.inf, 3.0, -1.0])
def test_it_clips_as_numpys_own(p, per, request):
    bound = {"low": 0.5, "high": 1e3} if isinstance(per, dict) else 0.5
    right = gradclip.clip_grad_norm(grads(), bound, p, per=per)
    toy = request.getfixturevalue("toy")
    assert type(_libraries.backend_of({"numpy": np.zeros(())})) is toy
    mine = gradclip.clip_grad_norm(grads(), bound, p, per=per)
    same(mine.norm, right.norm)
    same(mine.grads, right.grads)
    written = grads()
    same(gradclip.clip_grad_norm_(written, bound, p, per=per), right.norm)
    same(written, right.grads)


def test_it_adds_up_examples(request):
    grads = {"w": np.arange(12.0).reshape(3, 4) - 5, "b": np.array([1.0, -2.0, np.nan])}
    right = gradclip.clipped_sum(grads, 2.0)
    request.getfixturevalue("toy")
    mine = gradclip.clipped_sum(grads, 2.0)
    same(mine.norm, right.norm)
    same(mine.sum, right.sum)
    out = gradclip.clip_grad_norm(grads, 2.0, per="example", nonfinite="zero")
    np.testing.assert_allclose(mine.sum["w"], out.grads["w"].sum(axis=0), rtol=1e-5)


@pytest.mark.parametrize("policy", ["propagate", "zero"])
def test_it_keeps_the_policy(policy, toy):
    bad, small, twice = np.array([np.nan, 1.0]), np.array([0.1]), np.array([8.0])
    out = gradclip.clip_grad_norm([bad, small, twice, twice], 4.0, per="leaf", nonfinite=policy)
    np.testing.assert_array_equal(out.grads[0], [0.0, 0.0] if policy == "zero" else [np.nan, np.nan])
    assert out.grads[1].tolist() == [0.1]
    gradclip.clip_grad_norm_([twice, twice], 4.0, per="leaf")
    assert twice.tolist() == [4.0]


def test_what_is_not_clipped_stays_bit_for_bit(toy):
    zeros = np.array([complex(-0.0, -0.0), 1j])  # a product with 1 would change a sign
    assert gradclip.clip_grad_norm([zeros], 5.0).grads[0].tobytes() == zeros.tobytes()


def test_it_joins_with_other_shards(toy):
    """As many columns as groups, so that the joins of shards fit."""
    out = gradclip.norms([np.array([3.0]), np.array([5.0])], all_reduce=lambda partial, op: partial * 4)
    assert [float(x) for x in out] == [6.0, 10.0]
    assert array_api_compat.is_numpy_array(out[0])

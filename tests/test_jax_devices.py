"""What XLA makes of a clip for GPUs and TPUs that are not here, by counting. In processes of their own: the compilers
and their settings stay there. Skipped where the extra `devices` is not installed.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("benchmarks.hlo", reason="benchmarks/ is not beside these tests")

from benchmarks.hlo import computations

pytestmark = [pytest.mark.library("jax"), pytest.mark.full]

#: What each compiler comes in.
PACKAGES = {"H100": ("jax-cuda12-plugin", "jax-cuda12-pjrt"), "A100": ("jax-cuda12-plugin", "jax-cuda12-pjrt")}
PACKAGES["TPU v5e"] = ("libtpu",)

SHAPES = [(256, 784), (256,), (128, 256), (128,), (10, 128), (10,)]

PROGRAM = """
import json, sys
from benchmarks.devices_report import CLIPS, alone, in_a_step
from dataclasses import asdict
device, shapes = sys.argv[1], [tuple(x) for x in json.loads(sys.argv[2])]
lines = []
for dtype in ("float32", "bfloat16"):
    lines += alone(device, "tree", dtype, shapes, list(CLIPS)) + in_a_step(device, dtype, 4)
lines += alone(device, "many", "float32", [(1024,)] * 200, [""])
print(json.dumps([asdict(x) for x in lines]))
"""


def counted(device: str) -> list[dict[str, Any]]:
    for package in PACKAGES[device]:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed: nothing compiles for {device}")
    pytest.importorskip("optax")
    outer = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, device, json.dumps(SHAPES)],
        capture_output=True,
        text=True,
        env=outer,
        cwd=Path(__file__).parent.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("device", ["H100", "A100"])
def test_gpus(device: str) -> None:
    """A read for the norm, a read and a write to scale: no copies, no memory, a kernel more than optax or two."""
    lines = counted(device)
    theirs = {(x["what"].split(",")[0], x["dtype"]): x for x in lines if x["who"] == "optax"}
    ours = [x for x in lines if x["who"] == "gradclip"]
    assert len(ours) == 15
    for x in ours:
        beside = theirs[x["what"].split(",")[0], x["dtype"]]
        assert x["kernels"] <= max(1.1 * beside["kernels"], beside["kernels"] + 2), x
        assert x["traffic"] <= beside["traffic"] + 0.1, x
        assert x["temporary"] <= 0.01 or x["what"].startswith("step"), x
    assert all(x["traffic"] <= 3.1 for x in ours if not x["what"].startswith("step"))
    for bare in (x for x in lines if x["who"] == "no clip"):
        step = next(x for x in ours if (x["what"], x["dtype"]) == (bare["what"], bare["dtype"]))
        assert step["traffic"] - bare["traffic"] <= 1.05  # the gradients are read once more, and nothing is written


def test_a_tpu() -> None:
    lines = counted("TPU v5e")
    theirs = {(x["what"].split(",")[0], x["dtype"]): x for x in lines if x["who"] == "optax"}
    ours = [x for x in lines if x["who"] == "gradclip"]
    assert len(ours) == 15
    for x in ours:
        beside = theirs[x["what"].split(",")[0], x["dtype"]]
        if x["what"].startswith("step"):
            assert x["traffic"] <= 1.01 * beside["traffic"], x
            assert x["kernels"] <= beside["kernels"] + 16, x
        elif x["what"] == "many":  # strung together
            assert x["kernels"] < 0.8 * beside["kernels"], x
            assert x["temporary"] < beside["temporary"], x
        elif x["what"] == "tree":  # 0.9 MB, of which norms and bounds are a part that is seen
            assert x["traffic"] <= 1.05 * beside["traffic"], x
            assert x["kernels"] <= beside["kernels"] + 16, x


def test_what_the_reader_counts() -> None:
    """On a program written out: a fusion that cuts a piece from an operand reads the piece; one branch is taken."""
    pytest.importorskip("jax")
    program = """
%cut (p: f32[100], q: f32[8]) -> f32[8] {
  %p = f32[100]{0} parameter(0)
  %q = f32[8]{0} parameter(1)
  %s = f32[1]{0} slice(%p), slice={[3:4]}
  ROOT %m = f32[8]{0} multiply(%q, %s)
}

%dear (a: f32[100]) -> f32[100] {
  %a = f32[100]{0} parameter(0)
  ROOT %n = f32[100]{0} negate(%a)
}

%cheap (b: f32[100]) -> f32[100] {
  ROOT %b = f32[100]{0} parameter(0)
}

ENTRY %main (x: f32[100], y: f32[8], i: pred[]) -> f32[8] {
  %x = f32[100]{0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %i = pred[] parameter(2)
  %c = f32[100]{0} conditional(%i, %x, %x), true_computation=%cheap, false_computation=%dear
  %t = bf16[8]{0} convert(%y)
  ROOT %f = f32[8]{0} fusion(%c, %y), kind=kLoop, calls=%cut
}
"""
    read = """
import json, sys
from benchmarks.compiled import branches, kernels, traffic
from benchmarks.hlo import computations
program = computations(sys.stdin.read())
print(json.dumps([kernels(program["ENTRY"]), traffic(program, "ENTRY"), branches(program)]))
"""
    done = subprocess.run(
        [sys.executable, "-c", read],
        input=program,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        check=True,
    )
    assert [x.bytes for x in computations(program)["ENTRY"]] == [400, 32, 1, 400, 16, 32]
    # the conversion: 32 read, 16 written; the fusion: 4 and 32 read, 32 written; the branch taken: nothing
    assert json.loads(done.stdout) == [3, 48 + 68, [[0, 800]]]

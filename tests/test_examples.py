"""The scripts in examples/ and `python -m gradclip`, each run as a user would run it, in a process of its own."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gradclip
import launch
from gradclip.monitor import read

pytestmark = pytest.mark.full

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TESTED = {
    "compare.py",
    "cupy_pipeline.py",
    "flax_optax.py",
    "jax_adaptive.py",
    "jax_private_train.py",
    "jax_sharded_train.py",
    "jax_train_step.py",
    "mpi_numpy.py",
    "numpy_agc.py",
    "numpy_char_rnn.py",
    "torch_loop.py",
}

#: Runs a script as `python script` does, after a line of preparation.
RUNNER = "import runpy, sys; {preparation}; sys.argv = [{path!r}]; runpy.run_path({path!r}, run_name='__main__')"


def python(*args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run this Python on `args` in `cwd`, with the gradclip that these tests import."""
    here = str(Path(gradclip.__file__).resolve().parent.parent)
    path = os.pathsep.join(p for p in (here, os.environ.get("PYTHONPATH")) if p)
    env = {"JAX_PLATFORMS": "cpu", **os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, encoding="utf-8", timeout=900)


def needs(*modules: str) -> None:
    """Skip the test, by name, where a library that the script imports is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def numbers(pattern: str, text: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, text)]


def test_every_example_is_tested():
    assert {script.name for script in EXAMPLES.glob("*.py")} == TESTED


@pytest.mark.library("numpy")
def test_demo(tmp_path):
    done = python("-m", "gradclip", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^verdict: (?!NOT SHOWN)", done.stdout, re.MULTILINE), done.stdout
    assert gradclip.__version__ in done.stdout
    assert not list(tmp_path.iterdir())  # leaves nothing behind


@pytest.mark.library("numpy")
def test_numpy_char_rnn(tmp_path):
    needs("matplotlib", "tqdm")
    plot = tmp_path / "tmp.png"
    done = python(EXAMPLES / "numpy_char_rnn.py", "--steps", "60", "--out", plot, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, last = map(float, re.search(r"^clipped at \S+ +loss (\S+) -> (\S+),", done.stdout, re.M).groups())
    assert last < first - 0.3
    assert re.search(r"^no clipping +loss ", done.stdout, re.MULTILINE), done.stdout
    data = plot.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(data) > 10_000
    assert plot.parent == tmp_path
    assert [entry.name for entry in tmp_path.iterdir()] == [plot.name]


@pytest.mark.library("numpy")
def test_numpy_agc(tmp_path):
    needs("sklearn", "matplotlib")
    plot = tmp_path / "tmp.png"
    done = python(EXAMPLES / "numpy_agc.py", "--plot", plot, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    without, clipped = numbers(r"loss \S+ -> (\S+),", done.stdout)
    assert not without < 2
    assert clipped < 0.3
    guessed, learnt = numbers(r"test accuracy (\S+),", done.stdout)
    assert guessed < 0.2
    assert learnt > 0.9
    assert done.stdout.rstrip().endswith("the claim held")
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [entry.name for entry in tmp_path.iterdir()] == [plot.name]


@pytest.mark.library("numpy")
def test_numpy_agc_at_a_rate_that_needs_no_clipping(tmp_path):
    """The status is 1 where the claim did not hold, and no plot is drawn unless asked for."""
    needs("sklearn")
    done = python(EXAMPLES / "numpy_agc.py", "--rate", "0.03", "--steps", "150", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stdout.rstrip().endswith("the claim did not hold")
    assert not list(tmp_path.iterdir())


@pytest.mark.library("jax")
def test_jax_adaptive(tmp_path):
    needs("jax", "optax", "matplotlib")
    plot = tmp_path / "tmp.png"
    done = python(EXAMPLES / "jax_adaptive.py", "--steps", "300", "--out", plot, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {
        name: numbers(r"(?<= )[\d.]+(?= )|inf", row)
        for name, row in re.findall(r"^(\w+(?: bound)?) ( .*)%$", done.stdout, re.M)
    }
    assert rows.keys() == {"no bound", "fixed bound", "AutoClip", "ZClip"}
    for name, (before, after, end, norm, bound) in rows.items():
        assert norm > 500
        if name == "no bound":
            assert bound == math.inf
            assert after > 10 * before
        else:
            assert bound < 3
            assert max(after, end) < before + 0.1
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [entry.name for entry in tmp_path.iterdir()] == [plot.name]


@pytest.mark.library("jax")
def test_jax_private_train(tmp_path):
    needs("jax", "optax", "sklearn", "dp_accounting")
    done = python(EXAMPLES / "jax_private_train.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    quiet, noisy = numbers(r"test (\d\.\d+);", done.stdout)
    assert quiet > noisy > 0.8
    epsilon, delta = map(float, re.search(r"^epsilon (\S+) at delta (\S+):", done.stdout, re.M).groups())
    assert 1 < epsilon < 8
    assert delta == 1e-4
    (overflow,) = numbers(r"counted into delta: (\S+)", done.stdout)
    assert overflow < 1e-12


@pytest.mark.library("jax")
def test_jax_private_train_refuses_batches_that_may_not_fit(tmp_path):
    needs("jax", "optax", "sklearn", "dp_accounting")
    done = python(EXAMPLES / "jax_private_train.py", "--batch", "230", cwd=tmp_path)
    assert done.returncode == 2
    assert "too large a batch: a draw may not fit into 256 slots" in done.stderr
    assert done.stdout == ""


@pytest.mark.library("jax")
def test_jax_private_train_without_the_accountant(tmp_path):
    needs("jax", "optax", "sklearn")
    path = str(EXAMPLES / "jax_private_train.py")
    done = python("-c", RUNNER.format(preparation="sys.modules['dp_accounting'] = None", path=path), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "needs dp-accounting: pip install" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.library("numpy")
def test_the_picture_of_which_clip(tmp_path):
    needs("matplotlib")
    plot = tmp_path / "tmp.png"
    done = python(EXAMPLES.parent / "docs" / "which_clip.py", plot, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [entry.name for entry in tmp_path.iterdir()] == [plot.name]


@pytest.mark.library("jax")
def test_jax_train_step(tmp_path):
    needs("jax", "optax", "sklearn")
    script = EXAMPLES / "jax_train_step.py"
    done = python(script, "--epochs", "4", "--max-norm", "1.0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    losses = numbers(r"loss (\S+)", done.stdout)
    assert len(losses) == 4
    assert losses[-1] < losses[0] / 2
    bounds = numbers(r"bound (\S+)", done.stdout)
    assert len(set(bounds)) == 4, "the bound is meant to change, so that a retrace would show"
    assert re.search(r"^the jit cache of the step holds 1 entry$", done.stdout, re.MULTILINE), done.stdout
    assert min(numbers(r"(?:train|test) (\d\.\d+)", done.stdout)) > 0.8
    broken, whole = done.stdout.split("Now a batch with one infinite pixel:\n")[1].splitlines()
    assert "not finite" in broken
    assert re.search(r"\['layer\d'\]\['[wb]'\] \(float32, .*holds \d+ NaN, \d+ inf", broken), broken
    assert whole.endswith("no error")


@pytest.mark.library("jax")
def test_flax_optax(tmp_path):
    needs("jax", "flax", "optax", "sklearn")
    done = python(EXAMPLES / "flax_optax.py", "--epochs", "4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    losses, norms = numbers(r"loss (\S+)", done.stdout), numbers(r"gradient norm (\S+)", done.stdout)
    assert len(losses) == len(norms) == 4
    assert losses[-1] < losses[0] / 2
    assert numbers(r"bound (\S+)", done.stdout)[1:] == [0.489, 0.5, 0.5], "the schedule ends after two epochs"
    shares = numbers(r"clipped +(\d+)%", done.stdout)
    clipped, steps = map(int, re.search(r"^clipped in (\d+) of (\d+) steps$", done.stdout, re.M).groups())
    assert abs(clipped / steps - sum(shares) / 400) < 0.006, "counted in the state, and from the norms"
    assert min(numbers(r"(?:train|test) (\d\.\d+)", done.stdout)) > 0.8
    assert [entry.name for entry in tmp_path.iterdir()] == ["norms.csv"]
    log = read(tmp_path / "norms.csv")
    assert log["step"].tolist() == list(range(steps))
    assert clipped == np.sum(log["norm"] > log["max_norm"])


@pytest.mark.library("jax")
def test_jax_sharded_train(tmp_path):
    needs("jax")
    done = python(EXAMPLES / "jax_sharded_train.py", "--steps", "12", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    runs = re.findall(
        r"^(one device|jit over shards|shard_map) +loss (\S+) -> (\S+), .*clipped (\d+) of 12", done.stdout, re.M
    )
    assert [name for name, *_ in runs] == ["one device", "jit over shards", "shard_map"], done.stdout
    for _, first, last, clipped in runs:
        assert float(last) < float(first) - 1
        assert int(clipped) > 6
    off = re.findall(r"off by: losses (\S+), norms (\S+), weights (\S+)$", done.stdout, re.M)
    assert len(off) == 2
    assert max(float(x) for row in off for x in row) <= 1e-5, done.stdout


@pytest.mark.library("numpy")
def test_mpi_numpy(tmp_path):
    needs("sklearn")
    if launch.MISSING:
        pytest.skip(f"MPI: not installed: {', '.join(launch.MISSING)}")
    done = launch.ranks(4, "-m", "mpi4py", str(EXAMPLES / "mpi_numpy.py"))
    assert done.returncode == 0, done.stderr
    for first, last in (("step 0", "step 59"), ("step 59", "after 60")):
        block = done.stdout.split(first)[1].split(last)[0]
        (whole,) = numbers(r"^: loss \S+, norm (\S+),", block)
        (bias,) = numbers(r"bias's part (\S+)", block)
        parts, joined = numbers(r"norm of its part (\S+),", block), numbers(r"joined (\S+)", block)
        assert joined == [whole] * 4
        assert abs(sum(x * x for x in [*parts, bias]) ** 0.5 - whole) < 1e-10, "the bias counts once"
    assert re.search(r"the same on all 4 ranks, bit for bit: True$", done.stdout, re.M)


def test_mpi_numpy_without_mpi(tmp_path):
    path = str(EXAMPLES / "mpi_numpy.py")
    done = python("-c", RUNNER.format(preparation="sys.modules['mpi4py'] = None", path=path), cwd=tmp_path)
    assert done.returncode == 1
    assert "needs mpi4py and an MPI: pip install" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.library("cupy")
def test_cupy_pipeline(tmp_path):
    needs("sklearn")
    done = python("-c", "import cupy, sys; sys.exit(not cupy.cuda.is_available())", cwd=tmp_path)
    device = done.returncode == 0
    script = EXAMPLES / "cupy_pipeline.py"
    done = python(script, "--epochs", "3", "--limit", "400", cwd=tmp_path)
    if not device:
        assert done.returncode == 2
        assert re.search(r"needs (CuPy|a GPU)", done.stderr), done.stderr
        assert done.stdout == ""
        return
    assert done.returncode == 0, done.stderr
    losses, norms = numbers(r"loss (\S+)", done.stdout), numbers(r"gradient norm (\S+)", done.stdout)
    assert len(losses) == len(norms) == 3
    assert losses[-1] < 0.75 * losses[0]
    assert all(0 < norm < 10 for norm in norms)
    assert numbers(r"train (\d\.\d+)", done.stdout)[0] > 0.5


def test_cupy_pipeline_without_cupy(tmp_path):
    needs("sklearn")
    path = str(EXAMPLES / "cupy_pipeline.py")
    done = python("-c", RUNNER.format(preparation="sys.modules['cupy'] = None", path=path), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "needs CuPy: pip install" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.library("torch")
def test_torch_loop(tmp_path):
    needs("torch")
    done = python(EXAMPLES / "torch_loop.py", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (guessing,) = numbers(r"a uniform guess loses (\S+)", done.stdout)
    rows = [list(map(float, row.split())) for row in re.findall(r"^ +\d+ +\d.*", done.stdout, re.MULTILINE)]
    assert [epoch for epoch, *_ in rows] == [1, 2, 3]
    assert not rows[-1][1] < guessing
    assert rows[-1][4] < min(rows[0][4], guessing / 2)
    assert all(largest >= norm > 0.25 for *_, norm, largest in rows), "the norms are those before clipping"
    assert done.stdout.rstrip().endswith("fails without clipping, and with it learns: the claim held")
    assert not list(tmp_path.iterdir())


@pytest.mark.library("torch")
def test_torch_loop_at_a_rate_that_needs_no_clipping(tmp_path):
    needs("torch")
    done = python(EXAMPLES / "torch_loop.py", "--rate", "1", "--epochs", "1", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "the network does not fail without clipping" in done.stdout
    assert done.stdout.rstrip().endswith("the claim did not hold")


@pytest.mark.library("torch")
def test_torch_loop_without_torch(tmp_path):
    path = str(EXAMPLES / "torch_loop.py")
    done = python("-c", RUNNER.format(preparation="sys.modules['torch'] = None", path=path), cwd=tmp_path)
    assert done.returncode == 1
    assert "needs PyTorch: pip install" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.library("numpy")
def test_compare(tmp_path):
    needs("mpmath", "ml_dtypes")
    done = python(EXAMPLES / "compare.py", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, last = done.stdout.splitlines()
    right, rows = map(int, re.fullmatch(r"gradclip: (\d+) of (\d+) right", last).groups())
    assert right == rows
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    assert f"`compare.py`, which puts {rows} nasty inputs through gradclip" in readme
    assert lines.index("") == rows + 1, "one line of column names, and one line for each input"
    for name, column in [("jax", "gradclip jax"), ("torch", "gradclip torch"), ("optax", "optax")]:
        if importlib.util.find_spec(name):
            assert column in lines[0], done.stdout


@pytest.mark.library("numpy")
@pytest.mark.parametrize(
    ("name", "answer", "row"),
    [
        ("clip_grad_norm", "Clipped([x * (1 + 1e-5) for x in out[0]], out.norm)", r"float16 \[300, 400\]  +ok$"),
        ("clip_grad_norm", "Clipped([x * (1 + 1e-5) for x in out[0]], out.norm)", r"\[1e20, 1e20\] +wrong values$"),
        ("clip_grad_norm", "Clipped(out[0], out.norm * (1 + 1e-5))", r"0-d leaf 5 +norm 0.001% high$"),
        ("clip_grad_norm", "Clipped([x * 0 for x in out[0]], out.norm)", r"\[1e20, 1e20\] +zeros$"),
        ("clip_grad_norm", "1 / 0", r"leaf: \[1e20, 1e20\], .* error$"),
        ("clip_grad_norm", "right(*args)", r"leaf: \[1e20, 1e20\], .* norms misshapen$"),
        ("clip_grad_norm", "right(args[0], args[1], 2, per='leaf')", r"rms: float16 .* norm 41% high$"),
        ("clip_grad_agc", "Clipped([x * (1 + 1e-5) for x in out[0]], out.norm)", r"agc: \[1e20, .* wrong values$"),
        ("clip_grad_agc", "right(*args, per='leaf')", r"agc: one NaN: .* norms misshapen$"),
        ("clip_grad_agc", "Clipped([x[:, ::-1] for x in out[0]], out.norm)", r"agc: one NaN: .* finite left$"),
        ("clipped_sum", "Clipped([x * (1 + 1e-5) for x in out[0]], out.norm)", r"example: \[1e20, .* wrong values$"),
        (
            "clipped_sum",
            "Clipped([x * (1 + 3e-6) for x in out[0]], out.norm)",
            r"example: one alone: .* over the bound$",
        ),
        ("clipped_sum", "right(*args, nonfinite='propagate')", r"example: one NaN: .* nan$"),
    ],
)
def test_compare_tells_a_wrong_answer(tmp_path, name, answer, row):
    """The yardstick itself: a gradclip made wrong on purpose, alone in the table, is found out."""
    needs("mpmath", "ml_dtypes")
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import sys, gradclip\n"
        "from gradclip import Clipped\n"
        "class Absent:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name in ('jax', 'torch', 'optax', 'tensorflow', 'keras', 'mlx'):\n"
        "            raise ImportError(f'{name} is not there')\n"
        "sys.meta_path.insert(0, Absent)\n"
        f"right = gradclip.{name}\n"
        "def wrong(*args, **options):\n"
        "    out = right(*args, **options)\n"
        f"    return {answer}\n"
        f"gradclip.{name} = wrong\n"
    )
    preparation = "sys.path.insert(0, '.'); import wrong"
    path = str(EXAMPLES / "compare.py")
    done = python("-c", RUNNER.format(preparation=preparation, path=path), cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    table, footer = done.stdout.split("\n\n", 1)
    assert table.splitlines()[0].split() == ["gradclip", "numpy"]
    assert re.search(f"^{row}", table, re.MULTILINE), table
    assert re.search(r"Not compared: .*torch \(ImportError: torch is not there\)", footer), footer
    right, rows = map(int, re.search(r"gradclip: (\d+) of (\d+) right$", footer.strip()).groups())
    assert right < rows

"""The log of norms: what is on disk, what is waited for, what comes back, and the pictures of it."""

from __future__ import annotations

import importlib
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

import gradclip
from backends import MISSING
from gradclip.monitor import NormLog, read
from gradclip.monitor.__main__ import main

LEAVES = {"body": [3.0, 4.0], "head": [12.0]}  # norms 5 and 12, of all 13


@pytest.fixture
def path(tmp_path):
    return tmp_path / "norms.csv"


def filled(path, steps, **options):
    """A log of norms 0.5, 1.5, ... whose bound is 1."""
    with NormLog(path, **options) as log:
        for step in steps:
            log.add(step, step + 0.5, max_norm=1.0)
    return path


# -- what comes back ---------------------------------------------------------------------------------------------------


def test_each_librarys_norms_come_back(xp, path):
    dtype = "float32"
    grads = {name: xp.array(values, dtype) for name, values in LEAVES.items()}
    bound = xp.array(2.5, dtype)
    with NormLog(path, batch=4) as log:
        for step in range(7):
            log.add(step, xp.global_norm(grads), max_norm=bound, per_leaf=xp.norms(grads))
    back = read(path)
    assert list(back) == ["step", "norm", "max_norm", "grads['body']", "grads['head']"]
    for name, value in zip(back, (np.arange(7), 13.0, 2.5, 5.0, 12.0), strict=True):
        assert back[name].dtype == (np.int64 if name == "step" else np.float64)
        np.testing.assert_array_equal(back[name], np.broadcast_to(value, 7))


@pytest.mark.parametrize("kind", ["float32", "float16", "float64"])
def test_numbers_come_back_bit_for_bit(path, kind):
    dtype = np.dtype(kind)
    bits = np.random.default_rng(0).integers(0, 2 ** (8 * dtype.itemsize) - 1, 500, dtype=f"u{dtype.itemsize}")
    tiny, info = np.nextafter(dtype.type(0), dtype.type(1)), np.finfo(dtype)
    numbers = np.abs(np.concatenate([bits.view(dtype), np.array([0, tiny, info.max, np.inf, np.nan, 0.1], dtype)]))
    with NormLog(path) as log:
        for step, number in enumerate(numbers):
            log.add(step, number)
    np.testing.assert_array_equal(read(path)["norm"].astype(dtype), numbers)


def test_few_digits_are_written(path):
    with NormLog(path) as log:
        log.add(0, np.float32(0.1), max_norm=np.array(0.1, np.float16))
        log.add(1, 0.1, max_norm=3)
    assert path.read_text() == "step,norm,max_norm\n0,0.1,0.1\n1,0.1,3.0\n"


def test_torchs_16_bits(path):
    torch = pytest.importorskip("torch", reason="torch's bfloat16 needs torch")
    with NormLog(path) as log:
        log.add(0, torch.tensor(0.1, dtype=torch.bfloat16), max_norm=torch.tensor(0.1, dtype=torch.float16))
    # 0.1 in 8 bits of mantissa is 205 / 2048
    assert path.read_text().splitlines()[1] == "0,0.10009765625,0.1"


def test_labels_one_array_and_nothing(path, tmp_path):
    grads = {"w": np.array([3.0, 4.0]), "b": np.array([12.0])}
    with NormLog(path) as log:
        log.add(0, 13.0, per_leaf=gradclip.norms(grads, per={"w": "body", "b": "head"}))
        log.add(1, 13.0)
        log.add(2, 13.0, per_leaf={"head": 1.0})
    back = read(path)
    np.testing.assert_array_equal(back["grads['body']"], [5.0, np.nan, np.nan])
    np.testing.assert_array_equal(back["grads['head']"], [12.0, np.nan, 1.0])
    assert np.isnan(back["max_norm"]).all()
    with NormLog(tmp_path / "one.csv") as log:
        log.add(0, 5.0, per_leaf=gradclip.norms(grads["w"]))
    assert read(tmp_path / "one.csv")["grads"].tolist() == [5.0]


def test_names_with_commas_and_quotes_come_back(path):
    names = ["a,b", 'say "x"', "ü", "a\nb", ""]
    with NormLog(path) as log:
        log.add(0, 1.0, per_leaf={name: float(i) for i, name in enumerate(names)})
    back = read(path)
    assert [back[f"grads[{name!r}]"].tolist() for name in names] == [[0.0], [1.0], [2.0], [3.0], [4.0]]


def test_leaves_in_another_order_go_to_their_columns(path):
    with NormLog(path) as log:
        log.add(0, 1.0, per_leaf={"w": 1.0, "b": 2.0})
        log.add(1, 1.0, per_leaf={"b": 2.0, "w": 1.0})
    assert read(path)["grads['w']"].tolist() == [1.0, 1.0]


def test_every(path):
    assert read(filled(path, range(10), every=4))["step"].tolist() == [0, 4, 8]


def test_a_step_written_twice_comes_once_as_written_last(path):
    filled(path, range(6))
    with NormLog(path) as log:
        for step in (3, 4):
            log.add(step, 100.0)
    back = read(path)
    assert back["step"].tolist() == [0, 1, 2, 3, 4, 5]
    assert back["norm"].tolist() == [0.5, 1.5, 2.5, 100.0, 100.0, 5.5]


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"norm": "1"}, TypeError, r"norm must be a number or a 0-d real array, got '1' of type str"),
        ({"norm": True}, TypeError, "norm must be a number"),
        ({"norm": np.array(1 + 2j)}, TypeError, "norm must be a number"),
        ({"norm": np.ones(3)}, ValueError, r"norm has shape \(3,\), and one number is logged"),
        ({"max_norm": [1.0]}, TypeError, "max_norm must be a number"),
        ({"per_leaf": {"a": [np.ones((1, 2))]}}, ValueError, r"per_leaf: grads\['a'\]\[0\] has shape \(1, 2\)"),
        ({"per_leaf": gradclip.Clipped({}, 1.0)}, TypeError, "per_leaf: grads must be a number"),
        ({"step": 1.0}, TypeError, "step must be an int, got 1.0 of type float"),
        ({"step": True}, TypeError, "step must be an int"),
    ],
)
def test_what_is_no_number_is_refused(path, arguments, error, match):
    with NormLog(path) as log, pytest.raises(error, match=match):
        log.add(**{"step": 0, "norm": 1.0} | arguments)
    assert path.read_bytes() == b""


def test_new_leaves_are_refused(path):
    with NormLog(path) as log:
        log.add(0, 1.0)
        with pytest.raises(ValueError, match=r"no column grads\['w'\] \(1 are new; its own: step, norm, max_norm\)"):
            log.add(1, 1.0, per_leaf={"w": 1.0})
    assert read(path)["step"].tolist() == [0]


def test_a_closed_log(path):
    log = NormLog(path)
    log.add(0, 1.0)
    log.close()
    log.close()
    with pytest.raises(ValueError, match="is closed: add inside the with block"):
        log.add(1, 1.0)
    assert read(path)["norm"].tolist() == [1.0]


@pytest.mark.parametrize("options", [{"every": 0}, {"batch": 0}, {"batch": 1.5}, {"every": True}])
def test_options(path, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be an int of at least 1"):
        NormLog(path, **options)
    assert not path.exists()


@pytest.mark.library("jax")
@pytest.mark.parametrize("transform", ["jit", "vmap", "grad"])
def test_traced_values_are_refused(path, transform):
    jax = pytest.importorskip("jax", reason="tracing needs jax")
    with NormLog(path) as log:

        def step(x):
            log.add(0, x)
            return x

        with pytest.raises(TypeError, match="norm has no value yet, for it is being traced: return it from the jitted"):
            getattr(jax, transform)(step)(jax.numpy.ones(3) if transform == "vmap" else 1.0)


@pytest.mark.library("jax")
def test_the_way_out_of_a_traced_loop(path):
    """The repair that the error names."""
    jax = pytest.importorskip("jax", reason="tracing needs jax")

    def body(x, step):
        jax.debug.callback(lambda step, norm: log.add(int(step), norm), step, x)
        return 2 * x, None

    with NormLog(path) as log:
        jax.jit(lambda x: jax.lax.scan(body, x, jax.numpy.arange(4)))(1.0)
        jax.effects_barrier()
    assert read(path)["norm"].tolist() == [1.0, 2.0, 4.0, 8.0]


@pytest.mark.library("jax")
def test_deleted_values_are_told_and_the_others_written(path):
    jnp = pytest.importorskip("jax.numpy", reason="deleting needs jax")
    gone = jnp.asarray(2.0) + 1
    log = NormLog(path)
    log.add(0, jnp.asarray(1.0))
    log.add(1, gone)
    log.add(2, jnp.asarray(3.0))
    gone.delete()
    with pytest.raises(ValueError, match="max_norm was deleted: add it before"):
        log.add(3, 1.0, max_norm=gone)
    with pytest.raises(RuntimeError, match=r"a number of step 1 was deleted .* \(1 steps are lost\): do not donate"):
        log.close()
    assert read(path)["step"].tolist() == [0, 2]


# -- a crash -----------------------------------------------------------------------------------------------------------


def test_a_line_cut_off_anywhere_is_left_out_and_mended(path):
    filled(path, range(3))
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        kept = [i for i in range(3) if length >= sum(map(len, lines[: i + 2]))]
        assert read(path)["step"].tolist() == kept
        filled(path, [7])
        assert read(path)["step"].tolist() == [*kept, 7]
        assert path.read_bytes() == lines[0] + b"".join(lines[i + 1] for i in kept) + b"7,7.5,1.0\n"


def test_a_long_line_cut_off(path):
    filled(path, range(3))
    whole = path.read_bytes()
    path.write_bytes(whole + b"3," + b"1" * 200_000)
    assert read(path)["step"].tolist() == [0, 1, 2]
    NormLog(path).close()
    assert path.read_bytes() == whole


ENDLESS = """
import itertools, sys
from gradclip.monitor import NormLog
log = NormLog(sys.argv[1], batch=8)
for step in itertools.count():
    log.add(step, 0.5 + step, per_leaf={"w": 1.0})
    print(step, flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_killed_process_loses_the_last_batch_at_most(path):
    env = {**os.environ, "PYTHONPATH": str(Path(gradclip.__file__).parents[1])}
    command = [sys.executable, "-c", ENDLESS, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        for line in itertools.islice(process.stdout, 100):
            said = int(line)
        process.kill()
        said = max([said, *(int(line) for line in process.stdout.read().split("\n")[:-1])])
    back = read(path)
    assert len(back["step"]) >= said + 1 - 8
    assert back["step"].tolist() == list(range(len(back["step"])))
    np.testing.assert_array_equal(back["norm"], back["step"] + 0.5)


def test_a_crash_inside_the_with_block_loses_nothing(path):
    def train():
        with NormLog(path) as log:
            log.add(0, 1.0)
            raise ZeroDivisionError("in training")

    with pytest.raises(ZeroDivisionError, match="in training"):
        train()
    assert read(path)["norm"].tolist() == [1.0]


def test_a_full_disk_leaves_whole_lines_and_the_rows(path):
    log = NormLog(path, batch=100)
    log.add(0, 1.0)
    log.flush()
    log.add(1, 2.0)
    real = log._file

    class Full:
        """Takes three bytes, then none."""

        def __init__(self):
            self.taken = 0

        def write(self, data):
            if self.taken:
                raise OSError(28, "No space left on device")
            self.taken = real.write(data[:3])
            return self.taken

        def __getattr__(self, name):
            return getattr(real, name)

    log._file = Full()
    with pytest.raises(OSError, match="No space left"):
        log.flush()
    assert path.read_text() == "step,norm,max_norm\n0,1.0,\n"
    log._file = real
    log.close()
    assert read(path)["norm"].tolist() == [1.0, 2.0]


def test_an_open_log_can_be_read(path):
    log = NormLog(path, batch=1)
    log.add(0, 1.0)
    log.add(1, 2.0)
    assert read(path)["norm"].tolist() == [1.0, 2.0]
    log.close()


# -- continuing, and files of others -----------------------------------------------------------------------------------


def test_a_log_is_continued(path):
    filled(path, range(3))
    filled(path, range(3, 5))
    assert path.read_text().count("step") == 1
    assert read(path)["step"].tolist() == [0, 1, 2, 3, 4]


def test_other_leaves_do_not_continue_a_log(path):
    with NormLog(path) as log:
        log.add(0, 1.0, per_leaf={"w": 1.0})
    with NormLog(path) as log:
        with pytest.raises(ValueError, match=r"no column grads\['b'\] \(1 are new"):
            log.add(1, 1.0, per_leaf={"b": 1.0})
        log.add(1, 1.0, per_leaf={"w": 2.0})
    assert read(path)["grads['w']"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("content", ["epoch,loss\n1,2\n", "a letter to my mother", "step,norm\n1,2\n", "\n", "\xff\n"])
def test_other_files_are_left_alone(path, content):
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match="is no log of norms: its first line should begin with step,norm,max_norm"):
        NormLog(path)
    assert path.read_text(encoding="latin-1") == content
    if "\n" in content:
        with pytest.raises(ValueError, match="is no log of norms"):
            read(path)


@pytest.mark.parametrize(
    ("line", "match"),
    [("2,1.0", "line 3 has 2 fields, the header 3"), ("2,x,1.0", "line 3 has 'x' where a number should be")],
)
def test_a_line_that_something_else_wrote(path, line, match):
    path.write_text(f"step,norm,max_norm\n1,1.0,\n{line}\n3,1.0,\n")
    with pytest.raises(ValueError, match=f"{match}: delete or mend that line"):
        read(path)


# -- who waits ---------------------------------------------------------------------------------------------------------


@pytest.mark.library("jax")
def test_adding_does_not_wait_for_jax(path):
    """Beside a computation that takes a good second, though the batch is full and its older half is written."""
    jax = pytest.importorskip("jax", reason="asynchronous dispatch needs jax")
    jnp = jax.numpy

    @jax.jit
    def slow(x, times):
        return jax.lax.fori_loop(0, times, lambda i, a: a @ a * 0 + 1.0, x)[0, 0]

    ones, done = jnp.ones((256, 256), "float32"), [jax.block_until_ready(jnp.float32(i)) for i in range(3)]
    jax.block_until_ready(slow(ones, 1))
    with NormLog(path, batch=4) as log:
        for step, norm in enumerate(done):
            log.add(step, norm)
        running = slow(ones, 3000)
        if running.is_ready():
            pytest.skip("this JAX runs it at once")
        log.add(3, running, max_norm=running, per_leaf=None)
        assert not running.is_ready()
        assert read(path)["step"].tolist() == [0, 1]
    assert read(path)["norm"].tolist() == [0.0, 1.0, 2.0, 1.0]


class Device:
    """A made-up library of a device: 0-d arrays, and rows of them, that count what is done to them."""

    def __init__(self):
        self.stacks, self.transfers = [], 0
        self.xp = types.ModuleType("madeup")
        self.xp.stack = self.stack

    def number(self, value, dtype="float32", device="chip:0"):
        return _OnDevice(self, value, (), dtype, device)

    def stack(self, arrays):
        self.stacks.append(len(arrays))
        assert len({(x.dtype, x.device) for x in arrays}) == 1
        values = [x.value for x in arrays]
        return _OnDevice(self, values, (len(values),), arrays[0].dtype, arrays[0].device)


class _OnDevice:
    def __init__(self, library, value, shape, dtype, device):
        self.library, self.value, self.shape, self.ndim, self.dtype = library, value, shape, len(shape), dtype
        self.device = device

    def __array_namespace__(self, api_version=None):
        return self.library.xp

    def tolist(self):
        self.library.transfers += 1
        return self.value

    def __float__(self):
        raise AssertionError("read alone")

    __bool__ = __array__ = __int__ = __float__


def test_one_transfer_a_batch(path):
    device = Device()
    with NormLog(path, batch=10) as log:
        for step in range(9):
            leaves = {"w": device.number(2.0), "b": device.number(3.0)}
            log.add(step, device.number(1.0), max_norm=device.number(4.0), per_leaf=leaves)
        assert (device.stacks, device.transfers) == ([], 0)
        log.add(9, device.number(1.0), max_norm=5.0)
        assert (device.stacks, device.transfers) == ([5 * 4], 1)
    assert device.transfers == 2
    back = read(path)
    assert back["norm"].tolist() == [1.0] * 10
    assert back["max_norm"].tolist() == [4.0] * 9 + [5.0]


def test_one_transfer_for_each_dtype_and_device(path):
    device = Device()
    with NormLog(path) as log:
        for step in range(4):
            leaves = {"w": device.number(2.0, "float64"), "b": device.number(3.0, device="chip:1")}
            log.add(step, device.number(1.0), per_leaf=leaves)
    assert (device.stacks, device.transfers) == ([4, 4, 4], 3)
    assert read(path)["grads['b']"].tolist() == [3.0] * 4


class _Copying(_OnDevice):
    """As JAX's arrays of a device: each is copied by itself, and while it is not asked for."""

    copies: ClassVar = []
    is_ready = True

    def copy_to_host_async(self):
        self.copies.append("start")

    def __array__(self, dtype=None, copy=None):
        self.copies.append("read")
        return np.array(self.value, self.dtype)


def test_all_copies_start_before_one_is_read(path):
    device = Device()
    with NormLog(path, batch=8) as log:
        for step in range(8):
            assert _Copying.copies == []
            log.add(step, _Copying(device, step / 2, (), "float32", "chip:0"), max_norm=1.0)
        assert _Copying.copies == ["start"] * 4 + ["read"] * 4
    assert read(path)["norm"].tolist() == [step / 2 for step in range(8)]


@pytest.mark.library("cupy")
@pytest.mark.skipif("cupy" in MISSING, reason=f"cupy: {MISSING.get('cupy')}")
def test_cupy_is_read_once_a_batch_on_its_own_device(path):
    cupy = importlib.import_module("cupy")
    cupycpu = pytest.importorskip("cupycpu", reason="what CuPy does is counted on emulated devices")
    if not cupycpu.available():
        pytest.skip("no emulated devices")
    with cupy.cuda.Device(1):
        norms = [cupy.asarray(i + 0.5, dtype="f4") for i in range(8)]
    with NormLog(path, batch=8) as log:
        for step in range(8):
            log.add(step, norms[step], per_leaf={"w": norms[step]})  # once before: the pool and the kernel are there
    with NormLog(path, batch=8) as log:
        with cupycpu.record() as r:
            for step in range(8, 15):
                log.add(step, norms[step - 8], max_norm=1.0, per_leaf={"w": norms[step - 8]})
        assert (r["kernel"], r["d2h"], r.synced) == (0, 0, 0), r.events
        with cupycpu.record() as r:
            log.add(15, norms[7], max_norm=1.0, per_leaf={"w": norms[7]})
        assert r["d2h"] == 1, r.events
    assert read(path)["norm"].tolist() == [i % 8 + 0.5 for i in range(16)]
    assert cupy.cuda.runtime.getDevice() == 0


def test_steps_between_are_not_looked_at(path):
    with NormLog(path, every=2) as log:
        log.add(1, object())
    assert path.read_bytes() == b""


def test_arrays_of_the_host_may_be_written_to_afterwards(path):
    norm, leaf = np.array(1.0), np.array(2.0, np.float32)
    with NormLog(path) as log:
        log.add(0, norm, max_norm=norm, per_leaf=[leaf])
        norm[...], leaf[...] = 9.0, 9.0
    assert path.read_text().splitlines()[1] == "0,1.0,1.0,2.0"


def test_torchs_arrays_of_the_host_too_and_no_graph_is_kept(path):
    torch = pytest.importorskip("torch", reason="torch's tensors need torch")
    norm = torch.tensor(1.0)
    with NormLog(path) as log:
        log.add(0, norm, max_norm=torch.tensor(2.0, requires_grad=True) * 1)
        norm += 8
    assert path.read_text().splitlines()[1] == "0,1.0,2.0"


def test_dask_is_computed_when_it_is_fetched(path):
    da = pytest.importorskip("dask.array", reason="lazy arrays need dask")
    from dask import delayed

    computed = []
    lazy = da.from_delayed(delayed(lambda: computed.append(1) or np.array(3.0))(), (), np.float64)
    with NormLog(path) as log:
        log.add(0, lazy)
        assert computed == []
    assert read(path)["norm"].tolist() == [3.0]


def test_threads_do_not_tear_lines(path):
    with NormLog(path, batch=3) as log:

        def some(first):
            for step in range(first, 400, 4):
                log.add(step, float(step), per_leaf={"w": float(step), "b": float(step)})
                log.flush() if step % 3 == 0 else None

        threads = [threading.Thread(target=some, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(path.read_text().splitlines()) == 401
    back = read(path)
    for name in ("step", "norm", "grads['w']", "grads['b']"):
        assert back[name].tolist() == list(range(400))


def test_rows_that_one_thread_fetches_are_not_fetched_by_another(path):
    device, go, reading = Device(), threading.Event(), threading.Event()

    class Slow(_OnDevice):
        def tolist(self):
            reading.set()
            assert go.wait(60)
            return super().tolist()

    device.xp.stack = lambda arrays: Slow(device, [x.value for x in arrays], (len(arrays),), "float32", "chip:0")
    log = NormLog(path)
    log.add(0, device.number(1.0))
    threads = [threading.Thread(target=log.flush) for _ in range(2)]
    threads[0].start()
    assert reading.wait(60)
    threads[1].start()
    threads[1].join(0.2)
    assert threads[1].is_alive()
    go.set()
    for thread in threads:
        thread.join()
    log.close()
    assert device.transfers == 1
    assert path.read_text() == "step,norm,max_norm\n0,1.0,\n"


# -- dicts for trackers ------------------------------------------------------------------------------------------------


def test_scalars(path):
    with NormLog(path, batch=4) as log:
        for step in range(3):
            log.add(step, np.float32(0.5 + step), max_norm=1, per_leaf={"enc": [np.float32(2.0)]})
        assert log.scalars() == {}
        log.add(3, 3.5)
        assert log.scalars() == {
            "grad_step": 1.0,
            "grad_norm": 1.5,
            "grad_max_norm": 1.0,
            "grad_clipped": 1.0,
            "grad_leaf/enc_0": 2.0,
        }
        log.flush()
        assert log.scalars("train/g") == {"train/g_step": 3.0, "train/g_norm": 3.5}
        assert all(type(x) is float for x in log.scalars().values())
        log.add(4, math.nan, max_norm=1.0)
        log.flush()
        assert log.scalars()["grad_clipped"] == 0.0
        log.add(5, 1.0, max_norm=1.0)
        log.flush()
        assert log.scalars()["grad_clipped"] == 0.0


def test_names_are_legal_in_each_tracker(path):
    odd = ["a/b", "a b", "a_b", "ü", "'", "", "x" * 300, "..", "a.b"]
    leaves = dict.fromkeys(odd, 1.0)
    with NormLog(path) as log:
        log.add(0, 1.0, max_norm=1.0, per_leaf={"layers": leaves, "w": 1.0})
    names = list(log.scalars())
    assert len(names) == 4 + len(odd) + 1
    for name in names:
        assert re.fullmatch(r"[/A-Za-z0-9_.\- ]{1,250}", name)  # MLflow
        assert os.path.normpath(name) == name  # MLflow: it is a path
        assert all(re.fullmatch("[_a-zA-Z0-9]+", part) for part in name.split("/"))  # W&B
        assert not any(other.startswith(f"{name}/") for other in names)  # MLflow's folders


@pytest.mark.parametrize("prefix", ["", "a b", "/a", "a/", "1a", "a//b"])
def test_bad_prefixes(path, prefix):
    with NormLog(path) as log, pytest.raises(ValueError, match="prefix must be of letters, digits, underscores"):
        log.scalars(prefix)


# -- the program and its pictures --------------------------------------------------------------------------------------


def numbers(n, seed=0):
    return np.exp(np.random.default_rng(seed).normal(0, 0.5, n))


def log_of(n, leaves=(), bound=1.5, norm=None):
    norm = numbers(n) if norm is None else norm
    log = {"step": np.arange(n), "norm": norm, "max_norm": np.full(n, np.nan if bound is None else bound)}
    return log | {f"grads{name}": numbers(n, i) * 0.1 * (i % 7 + 1) for i, name in enumerate(leaves)}


def bad():
    log = log_of(200, ["['w']", "['b']", "['c']"])
    log["norm"][[50, 51, 100]] = [np.nan, np.inf, 0]
    log["grads['w']"][[50, 51, 100]] = [np.nan, np.inf, 0]
    log["grads['b']"][::2] = np.nan
    return log


MANY = [f"['layers'][{i}]['attention']['kernel_{i % 3}']" for i in range(300)]
CASES = {
    "usual": lambda: log_of(500, [f"['encoder'][{i}].weight" for i in range(12)]),
    "not finite": bad,
    "a million": lambda: log_of(1_000_000),
    "rarely clipped": lambda: log_of(20_000, ["['w']"], 5.0),
    "no bound": lambda: log_of(300, ["['w']"], None),
    "no leaves": lambda: log_of(300),
    "one step": lambda: log_of(1, ["['w']", "['b']"]),
    "two steps": lambda: log_of(2, ["['w']"]),
    "constant": lambda: log_of(50, ["['w']"], 1.0, np.ones(50)),
    "all nan": lambda: log_of(20, ["['w']"], 1.0, np.full(20, np.nan)),
    "all zero": lambda: log_of(20, [], 1.0, np.zeros(20)),
    "hundreds of leaves": lambda: log_of(600, MANY),
    "the whole range": lambda: log_of(50, [], 1e150, np.geomspace(1e-300, 1e300, 50)),
    "subnormal": lambda: log_of(50, [], 1e-310, np.geomspace(5e-324, 1e-305, 50)),
    "narrow": lambda: log_of(40, [], 1.2, np.linspace(1.1, 1.3, 40)),
    "odd names": lambda: log_of(30, ["['$x^2$']", "['漢字']", f"['{'a' * 100}']", ""]),
}
QUICK = {"not finite", "a million"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.full]) for name in CASES]
)
def test_pictures_are_legible(name, tmp_path):
    """Whole, without a warning, no label on another, in letters of 8 points at least."""
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    from matplotlib.text import Text

    from gradclip.monitor._pictures import draw, figure

    log = CASES[name]()
    picture = figure(log)
    picture.savefig(tmp_path / "drawn.png", dpi=100)
    assert picture.get_figwidth() <= 8
    labels = {}  # of ticks, and whether each is drawn
    for axes in picture.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                labels |= dict.fromkeys([tick.label1, tick.label2], axes.axison and low <= tick.get_loc() <= high)
            labels |= {} if axes.axison else {axis.label: False}
    texts = [t for t in picture.findobj(Text) if t.get_visible() and t.get_text().strip() and labels.get(t, True)]
    page, boxes = picture.bbox.padded(1), [(text, text.get_window_extent().padded(-0.5)) for text in texts]
    assert len(boxes) > 5
    for text, box in boxes:
        assert text.get_fontsize() >= 8, text
        assert page.contains(box.x0, box.y0), text
        assert page.contains(box.x1, box.y1), text
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        assert not a.overlaps(b), (one, other)
    draw(log, tmp_path / "norms.png")
    assert (tmp_path / "norms.png").stat().st_size > 10_000


def test_the_program(path, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    filled(path, range(100))
    assert main([str(path), "-o", str(tmp_path / "norms.png")]) == 0
    said = capsys.readouterr().out
    assert said.startswith(
        "norms.csv: 100 steps, 0 to 99\nnorm: 0.5 to 99.5, median 50\nclipped: 99.0 % of the steps\n"
    )
    assert re.search(r"a bound of 90 +would have clipped +10.0 % of the steps\n", said)
    assert (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_counts():
    from gradclip.monitor._bounds import clipped_share, percent, would_clip

    norm = np.array([*range(1, 1001), np.nan, np.inf], float)
    rows = dict(would_clip(norm))
    assert rows == {500.0: 0.5, 750.0: 0.25, 900.0: 0.1, 950.0: 0.05, 980.0: 0.02, 990.0: 0.01, 1000.0: 0.0}
    assert would_clip(np.array([np.nan])) == []
    bound = np.array([10.0] * 1000 + [10.0, 10.0])
    assert clipped_share({"norm": norm, "max_norm": bound}) == 0.99
    assert clipped_share({"norm": norm, "max_norm": bound * np.nan}) is None
    assert [percent(x) for x in (0.0, 1e-6, 0.123, 0.99999, 1.0)] == [
        "0.0 %",
        "< 0.1 %",
        "12.3 %",
        "> 99.9 %",
        "100.0 %",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "norms.csv is not there: pass the path that NormLog was given"),
        ("", "norms.csv holds no step yet: a NormLog writes when its batch is full"),
        ("step,norm,max_norm\n", "norms.csv holds no step yet"),
        ("epoch,loss\n1,2\n", "is no log of norms: its first line should begin with step,norm,max_norm"),
        ("step,norm,max_norm\n1,x,\n", "line 2 has 'x' where a number should be: delete or mend that line"),
    ],
)
def test_the_program_says_how_to_repair_it(path, capsys, content, message):
    if content is not None:
        path.write_text(content)
    assert main([str(path)]) == 1
    out = capsys.readouterr()
    assert out.out == ""
    assert message in out.err


def test_the_program_and_where_it_writes(path, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    filled(path, range(3))
    assert main([str(path), "-o", str(tmp_path / "nowhere" / "a.png")]) == 1
    assert "is not there" in capsys.readouterr().err
    assert main([str(path), "-o", str(tmp_path / "a.docx")]) == 1
    assert "Format 'docx' is not supported" in capsys.readouterr().err


def test_without_matplotlib_the_table_is_there(path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    filled(path, range(3))
    assert main([str(path), "-o", "a.png"]) == 1
    out = capsys.readouterr()
    assert "a bound of" in out.out
    assert "the picture needs matplotlib: pip install matplotlib" in out.err


def test_importing_and_logging_imports_no_library(path):
    code = (
        "import sys; from gradclip.monitor import NormLog, read\n"
        f"with NormLog({str(path)!r}) as log: log.add(0, 1.0, per_leaf=[1.0])\n"
        f"read({str(path)!r}); print(sorted({{'jax', 'torch', 'cupy', 'dask', 'matplotlib'}} & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(gradclip.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.full
def test_the_picture_of_the_documentation(tmp_path):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    script = Path(__file__).parents[1] / "docs" / "norms.py"
    if not script.is_file():
        pytest.skip("docs/ is not beside the tests")
    env = {**os.environ, "PYTHONPATH": str(Path(gradclip.__file__).parents[1])}
    command = [sys.executable, "-W", "error", script, tmp_path / "norms.png"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert done.stdout.startswith("norms.csv: 500 steps, 0 to 499\n")  # the text that it reads is Python's own
    assert (tmp_path / "norms.png").stat().st_size < 150_000

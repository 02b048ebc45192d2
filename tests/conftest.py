"""Which tests run: on every array library that is here, in one of two sizes.

The `xp` fixture runs a test on every library; `--backend NAME` narrows it. `pytest` alone is the quick size: every row
of every table, on every library, in the time of a coffee. `pytest --full` is everything: the function `quick` says what
the quick size leaves out.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
import zlib
from collections import Counter

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

from datetime import timedelta

import hypothesis
import pytest

from backends import BACKENDS, MISSING, Backend

#: Compiles JAX's programs in 40 % of the time; they run slower.
_FEWER_PASSES = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)

_SETTINGS = {
    "deadline": timedelta(seconds=60),
    "derandomize": True,
    "print_blob": True,
    "suppress_health_check": list(hypothesis.HealthCheck),
}
hypothesis.settings.register_profile("full", max_examples=2000, **_SETTINGS)
hypothesis.settings.register_profile("some", max_examples=200, **_SETTINGS)
hypothesis.settings.register_profile("quick", max_examples=25, **_SETTINGS)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="every test: by default, those that take minutes are left out")
    parser.addoption(
        "--backend",
        action="append",
        choices=[backend.name for backend in BACKENDS],
        help="run the tests of one backend only, and fail if it cannot run; may be repeated",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The quick size, when all of it is asked for, runs on several cores by whole files, if pytest-xdist is there."""
    here = not hasattr(config, "workerinput")  # a worker has its part of it
    whole = here and config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.getoption("--full")
    if whole and getattr(config.option, "numprocesses", 0) is None and not config.option.collectonly:
        config.option.numprocesses, config.option.dist = min(4, os.cpu_count() or 1), "loadfile"


def pytest_configure(config: pytest.Config) -> None:
    for name in config.getoption("--backend") or ():
        if name in MISSING:
            raise pytest.UsageError(f"--backend {name}: {MISSING[name]}")
    if not config.getoption("--hypothesis-profile"):
        hypothesis.settings.load_profile("full" if config.getoption("--full") else "quick")
    if not config.getoption("--full"):
        compile_with_fewer_passes()


def compile_with_fewer_passes() -> None:
    """Set `_FEWER_PASSES`, where this JAX knows them all: it ends the process for a flag that it does not know."""
    if _FEWER_PASSES in os.environ["XLA_FLAGS"]:
        return  # a worker has them from the process that started it
    if importlib.util.find_spec("jax") is not None:
        flags = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {_FEWER_PASSES}"}
        probe = [sys.executable, "-c", "import jax; jax.devices()"]
        if subprocess.run(probe, env=os.environ | flags, capture_output=True, check=False).returncode == 0:
            os.environ.update(flags)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "xp" not in metafunc.fixturenames:
        return
    only = metafunc.config.getoption("--backend")
    cases = []
    for backend in BACKENDS:
        if only is None or backend.name in only:
            reason = MISSING.get(backend.name)
            marks = [pytest.mark.skip(reason=f"backend {backend.name}: {reason}")] if reason else []
            cases.append(pytest.param(backend, id=backend.name, marks=marks))
    metafunc.parametrize("xp", cases, indirect=True)


@pytest.fixture
def xp(request: pytest.FixtureRequest):
    """A backend: how to make arrays, how to read them, and the functions of gradclip as it calls them."""
    backend: Backend = request.param
    with backend.active():
        yield backend


#: Where the quick size runs JAX in all its ways, but for norms other than p = 2.
ROWS = ("test_cases.py",)

#: What the quick size has of p where a test is JAX's alone: a sum, an extreme, and a norm of two passes.
EACH_SORT_OF_NORM = (2.0, math.inf, 3.0)


def quick(items: list[pytest.Item]) -> list[pytest.Item]:
    """What the quick size has of these tests.

    It leaves out what is marked `full` or `slow`; of a test marked `sampled(n)` it has every n-th set of parameters.
    And JAX compiles a program for each p and each list of shapes: what three backends are (without jit, under jit,
    with 64-bit numbers), one of them runs: that with 64-bit numbers where a parameter asks for these, else one that
    the test's name chooses; and of a test's sets of parameters, every second. The table of cases runs on all of them,
    but for norms other than p = 2; and of tests of JAX alone, each runs for one norm of each sort.
    """
    ways = [b.name for b in BACKENDS if b.compiles]
    seen: Counter[str] = Counter()
    kept = []
    for item in items:
        if item.get_closest_marker("full") or item.get_closest_marker("slow"):
            continue
        parameters = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        backend = parameters.pop("xp", None)
        function = item.nodeid.partition("[")[0]
        sampled = item.get_closest_marker("sampled")
        if sampled:
            seen[f"{function} {backend}"] += 1
            if seen[f"{function} {backend}"] % sampled.args[0] != 1:
                continue
        library = item.get_closest_marker("library")
        if library and library.args == ("jax",) and parameters.get("p", 2.0) not in EACH_SORT_OF_NORM:
            continue
        if backend is not None and backend.compiles:
            test = item.nodeid.replace(f"[{backend.name}", "[").replace(f"-{backend.name}", "")
            way = ways[zlib.crc32(test.encode()) % len(ways)]
            if {"float64", "complex128"} & set(map(str, parameters.values())):
                way = "jax-x64"
            if item.path.name not in ROWS or parameters.get("p", 2.0) != 2.0:
                if backend.name != way:
                    continue
                seen[f"{function} on JAX"] += 1
                if seen[f"{function} on JAX"] % 2 == 0:
                    continue
        kept.append(item)
    return kept


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The size; and with --backend, tests of another library only are left out, unless they need no library at all."""
    only = config.getoption("--backend")
    kept = []
    for item in items if config.getoption("--full") else quick(items):
        marker = item.get_closest_marker("library")
        if only is None or marker is None or any(name.startswith(marker.args[0]) for name in only):
            kept.append(item)
    chosen = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = kept


def pytest_report_header(config: pytest.Config) -> list[str]:
    here = ", ".join(b.described() for b in BACKENDS if b.name not in MISSING)
    gone = "; ".join(f"{name} ({reason})" for name, reason in MISSING.items())
    if config.getoption("--full"):
        size = "size: full"
    else:
        size = (
            "size: quick; `--full` adds the examples, the benchmarks, several processes, every CUDA kernel compiled, "
            "JAX in each of its ways beyond the table of cases, XLA's optimizations, and random trees by the thousand"
        )
    return [size, f"backends: {here}", f"backends that cannot run: {gone or 'none'}"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, reason in MISSING.items():
        terminalreporter.write_line(f"backend {name} was not run: {reason}")

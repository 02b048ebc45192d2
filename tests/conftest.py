"""The `xp` fixture runs a test on every array library that is here; `--backend NAME` narrows it to one."""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

from datetime import timedelta

import hypothesis
import pytest

from backends import BACKENDS, MISSING, Backend

_SETTINGS = {
    "deadline": timedelta(seconds=60),
    "derandomize": True,
    "print_blob": True,
    "suppress_health_check": list(hypothesis.HealthCheck),
}
hypothesis.settings.register_profile("ci", max_examples=2000, **_SETTINGS)
hypothesis.settings.register_profile("quick", max_examples=200, **_SETTINGS)
hypothesis.settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        choices=[backend.name for backend in BACKENDS],
        help="run the tests of one backend only, and fail if it cannot run",
    )


def pytest_configure(config: pytest.Config) -> None:
    name = config.getoption("--backend")
    if name in MISSING:
        raise pytest.UsageError(f"--backend {name}: {MISSING[name]}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "xp" not in metafunc.fixturenames:
        return
    only = metafunc.config.getoption("--backend")
    cases = []
    for backend in BACKENDS:
        if only in (None, backend.name):
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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --backend, tests of another library only are left out, unless they need no library at all."""
    only = config.getoption("--backend")
    if only is None:
        return
    kept, dropped = [], []
    for item in items:
        marker = item.get_closest_marker("library")
        (kept if marker is None or only.startswith(marker.args[0]) else dropped).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


def pytest_report_header(config: pytest.Config) -> list[str]:
    here = ", ".join(b.described() for b in BACKENDS if b.name not in MISSING)
    gone = "; ".join(f"{name} ({reason})" for name, reason in MISSING.items())
    return [f"backends: {here}", f"backends that cannot run: {gone or 'none'}"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, reason in MISSING.items():
        terminalreporter.write_line(f"backend {name} was not run: {reason}")

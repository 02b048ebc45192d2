"""Which machine, which versions, which day: what a reader needs to know beside a number. No names, no paths."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

from benchmarks.pinning import VARIABLE, WAITING, available

PACKAGES = ("gradclip", "numpy", "ml_dtypes", "torch", "jax", "jaxlib", "optax", "cupy")


def _proc(path: str, pattern: str) -> str | None:
    try:
        found = re.search(pattern, Path(path).read_text(), re.MULTILINE)
    except OSError:
        return None
    return found[1].strip() if found else None


def available_memory() -> int:
    """Bytes that can be taken now without swapping; as much as anybody wants where the system does not say."""
    kilobytes = _proc("/proc/meminfo", r"^MemAvailable:\s+(\d+) kB")
    return 1024 * int(kilobytes) if kilobytes else 1 << 62


def processor() -> str:
    return _proc("/proc/cpuinfo", r"^model name\s*:\s*(.+)$") or platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        for distribution in (name, f"{name}-cuda12x", f"{name}-cuda13x"):
            try:
                found[name] = importlib.metadata.version(distribution)
                break
            except importlib.metadata.PackageNotFoundError:
                continue
    return found


def described(threads: int) -> dict[str, Any]:
    kilobytes = _proc("/proc/meminfo", r"^MemTotal:\s+(\d+) kB")
    return {
        "processor": processor(),
        "cores": available(),
        "memory_GB": round(1024 * int(kilobytes) / 1e9, 1) if kilobytes else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(),
        "threads": {
            "floors (OpenBLAS)": os.environ.get("OPENBLAS_NUM_THREADS", "not limited"),
            "torch": f"{threads} and 1 ({WAITING} {os.environ.get(WAITING, 'not set')})" if threads > 1 else 1,
            f"gradclip ({VARIABLE})": os.environ.get(VARIABLE, "not limited"),
            "JAX": "its own",
        },
        "date": datetime.date.today().isoformat(),
    }

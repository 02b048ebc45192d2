"""How tests start MPI ranks, where there is an MPI: that of the wheels mpi4py and mpich, or the system's."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gradclip

MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
MISSING = [name for name in ("mpi4py", "mpmath") if importlib.util.find_spec(name) is None]
if MPIEXEC is None:
    MISSING.append("mpiexec (of an MPI, for example the package mpich)")


def environment() -> dict[str, str]:
    """For several ranks on few cores, as root too; MPICH needs none of it, Open MPI does."""
    here = str(Path(gradclip.__file__).resolve().parents[1])
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in (here, os.environ.get("PYTHONPATH")) if p),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "JAX_PLATFORMS": "cpu",
    }


def ranks(n: int, *args: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """`mpiexec -n N python ARGS`, warnings as errors."""
    command = [str(MPIEXEC), "-n", str(n), sys.executable, "-W", "error", *args]
    process = subprocess.Popen(
        command,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:  # ranks that wait for each other hold the pipes open: all of them must go
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)

"""NVIDIA's compiler without a GPU: NVRTC as PyPI has it (`nvidia-cuda-nvrtc-cu12`), reached through ctypes.

Whoever imports this can import what writes CUDA C, with or without CuPy.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import gradclip

#: What CuPy gives to NVRTC for every kernel of ours.
CUPY = ("-ftz=true", "--device-as-default-execution-space")
NOT_INSTALLED = "NVRTC is not installed: pip install 'gradclip[nvrtc]'"


if importlib.util.find_spec("cupy") is None:
    # The package itself imports CuPy; what writes and lays out text for it does not, and is here without it.
    package = ModuleType("gradclip._backends.cupy")
    package.__path__ = [str(Path(str(gradclip.__file__)).parent / "_backends" / "cupy")]
    sys.modules.setdefault(package.__name__, package)


@cache
def library() -> Any:
    """NVRTC: its path is among the distribution's files. Where there is none, a text that says why."""
    if "cupycpu" in os.environ.get("LD_PRELOAD", ""):
        return "emulated devices stand in for NVIDIA's libraries: run this without them"
    for name in ("nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc"):
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            if re.fullmatch(r"libnvrtc\.so\.\d+|nvrtc64_\d+_0\.dll", file.name):
                return ctypes.CDLL(str(file.locate()))
    return NOT_INSTALLED


def version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _done(library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


def architectures() -> list[int]:
    """Those that this NVRTC compiles for: 80 stands for sm_80."""
    n = ctypes.c_int()
    _done(library().nvrtcGetNumSupportedArchs(ctypes.byref(n)))
    found = (ctypes.c_int * n.value)()
    _done(library().nvrtcGetSupportedArchs(found))
    return list(found)


def compiled(source: str, arch: str, *options: str) -> tuple[bytes, str]:
    """The machine code (PTX for a virtual architecture; empty if it fails) and the log. CuPy's options are given."""
    nvrtc, program, size = library(), ctypes.c_void_p(), ctypes.c_size_t()
    given = [f"-arch={arch}", *CUPY, *options]
    _done(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None))
    status = nvrtc.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*map(str.encode, given)))
    kind = "ProgramLog", "PTX" if arch.startswith("compute") else "CUBIN"
    texts = []
    for what in kind if status == 0 else kind[:1]:
        _done(getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        room = ctypes.create_string_buffer(size.value)
        _done(getattr(nvrtc, f"nvrtcGet{what}")(program, room))
        texts.append(room.raw)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return texts[1] if status == 0 else b"", texts[0].decode().strip("\0")


def _done(status: int) -> None:
    if status:
        raise RuntimeError(f"NVRTC says {status}")

"""Compiling CUDA kernels for CuPy; and what happens on a machine where that fails."""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import cupy

_failures: list[str] = []


class NotCompiled(Exception):
    """A kernel that cannot be had on this machine."""


def compiled(source: str, name: str, *options: str) -> Any:
    """A kernel for the current device. Raises NotCompiled."""
    kernel = _loaded(source, name, options, cupy.cuda.runtime.getDevice())
    if kernel is None:
        raise NotCompiled
    return kernel


@lru_cache(maxsize=1024)
def _loaded(source: str, name: str, options: tuple[str, ...], device: int) -> Any:
    """The kernel, loaded on a device; None if that cannot be."""
    kernel = cupy.RawKernel(source, name, options=options)
    try:
        kernel.compile()
    except (cupy.cuda.compiler.CompileException, cupy.cuda.driver.CUDADriverError) as error:
        _failures.append(str(error).strip())
        if len(_failures) == 1:
            warnings.warn(
                "gradclip: a CUDA kernel could not be compiled, so slower ones do its work, with the same results. "
                f"Please report this: {_failures[0][:2000]}",
                RuntimeWarning,
                stacklevel=2,
            )
        return None
    return kernel

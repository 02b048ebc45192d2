"""Compiling CUDA kernels for CuPy; and what happens on a machine where that fails."""

from __future__ import annotations

import warnings
from functools import cached_property, lru_cache
from typing import Any

import cupy

from gradclip._backends.cupy.text import THREADS

_failures: list[str] = []


class NotCompiled(Exception):
    """A kernel that cannot be had on this machine."""


class Kernel:
    """A kernel on one device. Called with the number of blocks, its arguments, and the threads of a block."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __call__(self, blocks: int, arguments: tuple[Any, ...], threads: int = THREADS) -> None:
        self._kernel((blocks,), (threads,), arguments)

    def blocks(self, pieces: Any) -> int:
        """The blocks of a launch over so many pieces of work: no more than the device holds at once."""
        return min(int(pieces), self._resident)

    @cached_property
    def _resident(self) -> int:
        each = cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(self._kernel.kernel.ptr, THREADS, 0)
        return max(1, each * cupy.cuda.Device().attributes["MultiProcessorCount"])


def compiled(source: str, name: str, *options: str) -> Kernel:
    """A kernel for the current device. Raises NotCompiled."""
    kernel = _loaded(source, name, options, cupy.cuda.runtime.getDevice())
    if kernel is None:
        raise NotCompiled
    return kernel


@lru_cache(maxsize=1024)
def _loaded(source: str, name: str, options: tuple[str, ...], device: int) -> Kernel | None:
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
    return Kernel(kernel)

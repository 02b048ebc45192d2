"""What the answers should be, from exact arithmetic: integers, and mpmath with 60 digits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from typing import Any

import mpmath
import numpy as np

mpmath.mp.dps = 60

#: name -> (bits of the significand, exponent of the smallest normal number)
FORMATS = {
    "float16": (11, -14),
    "bfloat16": (8, -126),
    "float32": (24, -126),
    "float64": (53, -1022),
    "complex64": (24, -126),
    "complex128": (53, -1022),
}


def components(leaf: np.ndarray) -> list[float]:
    """All real components of a leaf as Python floats, which hold every supported dtype exactly."""
    leaf = np.asarray(leaf)
    if leaf.dtype.kind == "c":
        wide = leaf.astype(np.complex128).reshape(-1)
        return [*wide.real.tolist(), *wide.imag.tolist()]
    return leaf.astype(np.float64).reshape(-1).tolist()


def integers(numbers: Iterable[float]) -> tuple[list[int], int]:
    """The numbers, exactly, as integers times one power of two, and its exponent: they add up faster than fractions."""
    parts = [math.frexp(x) for x in numbers]
    lowest = min((e for _, e in parts), default=0)
    return [int(m * 2**53) << (e - lowest) for m, e in parts], lowest - 53


def magnitudes(leaf: np.ndarray) -> list[Any]:
    """|x| of every element, as mpmath numbers."""
    leaf = np.asarray(leaf)
    if leaf.dtype.kind == "c":
        wide = leaf.astype(np.complex128).reshape(-1).tolist()
        return [mpmath.sqrt(mpmath.mpf(z.real) ** 2 + mpmath.mpf(z.imag) ** 2) for z in wide]
    return [abs(mpmath.mpf(x)) for x in components(leaf)]


def norm(leaves: Iterable[np.ndarray], p: float | str = 2.0) -> Any:
    """The p-norm of finite leaves, or their root mean square ("rms"), as an mpmath number with 60 digits."""
    leaves = list(leaves)
    if p == "rms":
        return norm(leaves) / mpmath.sqrt(max(1, sum(np.size(leaf) for leaf in leaves)))
    if p == 2:
        numbers, exponent = integers(x for leaf in leaves for x in components(leaf))
        return mpmath.sqrt(mpmath.ldexp(sum(n * n for n in numbers), 2 * exponent))
    sizes = [m for leaf in leaves for m in magnitudes(leaf)]
    if not sizes:
        return mpmath.mpf(0)
    if p == 0:
        return mpmath.mpf(sum(m != 0 for m in sizes))
    if math.isinf(p):
        return max(sizes) if p > 0 else min(sizes)
    if p < 0 and min(sizes) == 0:
        return mpmath.mpf(0)
    total = mpmath.fsum(m ** mpmath.mpf(p) for m in sizes if m)
    return total ** (1 / mpmath.mpf(p)) if total else mpmath.mpf(0)


def ulp(x: Any, dtype: str) -> Any:
    """The unit in the last place of `dtype` at x."""
    bits, lowest = FORMATS[dtype]
    exponent = lowest if x == 0 else max(mpmath.frexp(x)[1] - 1, lowest)
    return mpmath.mpf(2) ** (exponent - bits + 1)


@cache
def largest(dtype: str) -> Any:
    """The largest finite number of a dtype's components."""
    bits, lowest = FORMATS[dtype]
    return (2 - mpmath.mpf(2) ** (1 - bits)) * mpmath.mpf(2) ** (1 - lowest)


@cache
def smallest_normal(dtype: str) -> Any:
    return mpmath.mpf(2) ** FORMATS[dtype][1]


def norm_dtype(leaves: Iterable[np.ndarray]) -> str:
    """float64 if any leaf has 64-bit components, else float32."""
    return "float64" if any(np.asarray(x).dtype.name in ("float64", "complex128") for x in leaves) else "float32"


def check_norm(got: Any, want: Any, dtype: str, ulps: float = 4) -> None:
    """Assert that a reported norm is within `ulps` of the exact one; inf where that is beyond the dtype."""
    got = float(got)
    if want > largest(dtype) + ulps * ulp(largest(dtype), dtype):
        assert got == math.inf, f"norm {got}, exactly {mpmath.nstr(want, 20)}, is beyond {dtype}"
        return
    got_mp = largest(dtype) + ulp(largest(dtype), dtype) if math.isinf(got) else mpmath.mpf(got)
    off = abs(got_mp - want) / ulp(want, dtype)
    assert off <= ulps, f"norm {got!r}, exactly {mpmath.nstr(want, 20)}: {mpmath.nstr(off, 5)} ulp of {dtype}"

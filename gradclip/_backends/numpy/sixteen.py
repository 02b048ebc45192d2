"""16-bit numbers as float32 and back.

Measured on 2 cores (AMD EPYC, AVX-512), in ns an element of float16: NumPy's casts 2.1 there and 4.3 back, the bit
operations below 0.4 and 1.1.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from gradclip._dtypes import dtype_name
from gradclip._types import Array

#: Elements of a narrow dtype that are widened at once: the wide copy stays in cache.
CHUNK = 1 << 17

#: bfloat16 by its bits, of which a float32 number has 16 more: what another library has, where NumPy has no such dtype.
BITS = np.dtype(np.uint16)

#: The dtypes that are worked on in many short steps.
NARROW = ("float16", "bfloat16", BITS.name)


class _Scratch(threading.local):
    """Each thread's own memory for one chunk; what is not written to takes none."""

    def __init__(self) -> None:
        self.wide: Array = np.empty(CHUNK, np.float32)
        self.other: Array = np.empty(CHUNK, np.float32)
        self.bits: Array = np.empty(CHUNK, np.uint16)
        self.strung: Array = np.empty(CHUNK, np.complex128)


scratch = _Scratch()


def room(shape: tuple[int, ...], dtype: Any) -> Array:
    """An array to write to: for up to a chunk of float32 numbers the thread's own, and no memory that must be found."""
    n = math.prod(shape)
    return scratch.other[:n].reshape(shape) if dtype == np.float32 and n <= CHUNK else np.empty(shape, dtype)


def plain(numbers: Array) -> Array:
    """Bits as float32 numbers, all others as they are."""
    return (numbers.astype(np.uint32) << 16).view(np.float32) if numbers.dtype == BITS else numbers


def is_bfloat16(numbers: Array) -> bool:
    return numbers.dtype == BITS or dtype_name(numbers) == "bfloat16"


def bfloat16_as_single(numbers: Array) -> Array:
    """The numbers of a row as float32, in any order, in memory of the thread's own: at most a chunk of them.

    Two at once: in 0.2 ns a number, where a cast takes 0.4.
    """
    half, odd = divmod(numbers.size, 2)
    bits, x = numbers.view(np.uint16), scratch.wide[: numbers.size]
    u = x.view(np.uint32)
    both = bits[: 2 * half].view(np.uint32)
    np.left_shift(both, 16, out=u[:half])
    np.bitwise_and(both, np.uint32(0xFFFF0000), out=u[half : 2 * half])
    if odd:
        u[-1] = np.uint32(bits[-1]) << 16
    return x


def as_single(numbers: Array) -> Array:
    """The numbers as float32, of float16 the magnitudes, in memory of the thread's own: at most a chunk of them."""
    return _WIDEN[dtype_name(numbers)](numbers.reshape(-1), scratch.wide).reshape(numbers.shape)


def through_single(block: Array, out: Array, change: Callable[[Array], Any]) -> None:
    """`out = block` with what `change` makes of it in float32, for a chunk of 16-bit numbers in one piece.

    Of finite float16 numbers it sees magnitudes: signs are kept.
    """
    kind, flat = dtype_name(block), block.reshape(-1)
    if kind == "float16" and flat.size and _magnitudes(flat).max() >= _INF:
        x = block.astype(np.float32)
        change(x)
        np.copyto(out, x, casting="same_kind")
        return
    x = _WIDEN[kind](flat, scratch.wide)
    change(x.reshape(block.shape))
    _NARROW[kind](x, flat, out.reshape(-1))


def _from_bfloat16(block: Array, wide: Array) -> Array:
    x = wide[: block.size]
    np.left_shift(block.view(np.uint16), 16, out=x.view(np.uint32), dtype=np.uint32)
    return x


def _to_bfloat16(x: Array, like: Array, out: Array) -> None:
    np.copyto(out, x, casting="unsafe")


#: The smallest normal float16, 2**-14; and the bits of inf.
_FIRST, _INF = np.float32(2.0**-14), 0x7C00


@lru_cache
def _constant(value: np.float32) -> Array:
    """A chunk of one number: the maximum of two arrays takes a third of the time of that of an array and a number."""
    return np.full(CHUNK, value)


def _from_float16(block: Array, wide: Array) -> Array:
    """|x| as float32; inf where x is inf or NaN.

    The bits of a float16 at their places in a float32 are 2**-112 times the number, a subnormal's as well.
    """
    x = wide[: block.size]
    if _flushes():
        return np.abs(block, out=x, dtype=np.float32)
    bits, u = _magnitudes(block), x.view(np.uint32)
    np.copyto(u, bits)
    np.left_shift(u, 13, out=u)
    np.multiply(x, np.float32(2.0**112), out=x)
    if bits.size and bits.max() >= _INF:
        x[bits >= _INF] = math.inf
    return x


def _magnitudes(block: Array) -> Array:
    """The bits of |x|."""
    return np.bitwise_and(block.view(np.uint16), np.uint16(0x7FFF), out=scratch.bits[: block.size])


def _flushes() -> bool:
    """Whether this thread's processor takes subnormals for 0, as some libraries make it do."""
    return bool(np.float32(2.0**-130) * np.float32(2.0**112) == 0)


def _to_float16(x: Array, like: Array, out: Array) -> None:
    """Round x >= 0 to float16, to nearest, ties to even; with the signs of `like`.

    Adding 2**(e + 13) to a number of exponent e makes float32 round it where float16 does; the bits of the sum, less
    those of 2**(e + 13), count units in the last place of float16.
    """
    magic = scratch.other[: x.size]
    m, u = magic.view(np.uint32), x.view(np.uint32)
    np.maximum(x, _constant(_FIRST)[: x.size], out=magic)
    np.bitwise_and(m, np.uint32(0x7F800000), out=m)
    np.add(m, np.uint32(13 << 23), out=m)
    np.add(x, magic, out=x)
    np.subtract(u, m, out=u)
    np.right_shift(m, 13, out=m)
    np.add(u, m, out=u)
    np.subtract(u, np.uint32((113 + 13) << 10), out=u)
    sign = scratch.bits[: x.size]
    np.bitwise_and(like.view(np.uint16), np.uint16(0x8000), out=sign)
    np.bitwise_or(u, sign, out=u)
    np.copyto(out.view(np.uint16), u, casting="unsafe")


_WIDEN: dict[str, Callable[[Array, Array], Array]] = {
    "float16": _from_float16,
    "bfloat16": _from_bfloat16,
    BITS.name: _from_bfloat16,
}
_NARROW: dict[str, Callable[[Array, Array, Array], None]] = {"float16": _to_float16, "bfloat16": _to_bfloat16}

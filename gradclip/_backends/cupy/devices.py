"""Several devices: small arrays that travel."""

from __future__ import annotations

from typing import Any

import cupy

from gradclip._types import Array


def move(x: Array, device: Any) -> Array:
    """A small array on another device. Events order the streams of the two; the host does not wait."""
    source, device = x.device, cupy.cuda.Device(device)
    if source == device:
        return x
    with source:
        x = x if x.flags.c_contiguous else x.copy(order="C")  # CuPy copies no other between devices
        made = cupy.cuda.get_current_stream().record()
    with device:
        stream = cupy.cuda.get_current_stream()
        stream.wait_event(made)
        out = cupy.array(x)
        copied = stream.record()
    with source:  # or x may be freed, and its memory used again, before it is read
        cupy.cuda.get_current_stream().wait_event(copied)
    return out

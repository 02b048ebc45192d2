"""JAX as the tests of it want it: strict, and with several devices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def strict_jax() -> Iterator[None]:
    """Strict dtype promotion, and no 64-bit numbers unless a test asks for them."""
    import jax

    before = jax.config.jax_enable_x64, jax.config.jax_numpy_dtype_promotion
    jax.config.update("jax_enable_x64", False)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    yield
    jax.config.update("jax_enable_x64", before[0])
    jax.config.update("jax_numpy_dtype_promotion", before[1])


def mesh_of(*axes: tuple[str, int]) -> Any:
    """A mesh of the first devices, by the names and lengths of its axes."""
    import jax

    names, shape = zip(*axes, strict=True)
    n = math.prod(shape)
    if len(jax.devices()) < n:
        pytest.skip(f"needs {n} devices")
    return jax.sharding.Mesh(np.array(jax.devices()[:n]).reshape(shape), names)

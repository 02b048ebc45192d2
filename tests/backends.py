"""The array libraries that the tests run on, each with what a test must know about it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

import gradclip

#: The names of the dtypes that gradclip supports, as NumPy (with ml_dtypes) knows them.
ALL_DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")


def np_dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        return np.dtype(importlib.import_module("ml_dtypes").bfloat16)
    return np.dtype(name)


def map_tree(f: Callable[[Any], Any], tree: Any) -> Any:
    """`f` on every leaf of lists, tuples and dicts; None stays."""
    if tree is None:
        return None
    if isinstance(tree, dict):
        return {k: map_tree(f, v) for k, v in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tree(f, v) for v in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(map_tree(f, v) for v in tree)
    return f(tree)


def leaves(tree: Any) -> list[Any]:
    """The leaves, dicts by sorted keys: `jax.jit` sorts them."""
    if tree is None:
        return []
    if isinstance(tree, dict):
        return [x for key in sorted(tree) for x in leaves(tree[key])]
    if isinstance(tree, list | tuple):
        return [x for child in tree for x in leaves(child)]
    return [tree]


class Backend:
    """One library. `dtypes`: what it has; `in_place`: whether its arrays can be written to."""

    name = ""
    module = ""
    dtypes: tuple[str, ...] = ALL_DTYPES
    in_place = True
    flushes = False  # subnormals may count as zero
    compiles = False  # a program for each p and each list of shapes and dtypes
    accumulates_wide = True  # norms of 32-bit leaves are summed in float64
    eager = True  # the host may look at values

    def missing(self) -> str:
        """Why it cannot run here; empty if it can."""
        return "" if importlib.util.find_spec(self.module) else f"{self.module} is not installed"

    def described(self) -> str:
        return f"{self.name} {importlib.import_module(self.module).__version__}"

    @contextmanager
    def active(self) -> Iterator[None]:
        yield

    def array(self, x: Any, dtype: str | None = None) -> Any:
        """An array of this library with the values of `x`."""
        raise NotImplementedError

    def numpy(self, x: Any) -> np.ndarray:
        """Its values, exactly."""
        raise NotImplementedError

    def tree(self, tree: Any) -> Any:
        return map_tree(self.array, tree)

    def back(self, tree: Any) -> Any:
        return map_tree(self.numpy, tree)

    def dtype_of(self, x: Any) -> str:
        return str(x.dtype).rsplit(".", maxsplit=1)[-1]

    def device_of(self, x: Any) -> Any:
        return x.device

    def owns(self, x: Any) -> bool:
        """Whether `x` is an array of this library, as the caller handed it in."""
        raise NotImplementedError

    def has(self, *dtypes: str) -> bool:
        return all(d in self.dtypes for d in dtypes)

    # The functions under test, as a user of this library calls them.

    def global_norm(self, grads: Any, *args: Any, **kw: Any) -> Any:
        return gradclip.global_norm(grads, *args, **kw)

    def norms(self, grads: Any, norm_type: float = 2.0, **kw: Any) -> Any:
        return gradclip.norms(grads, norm_type, **kw)

    def clip_grad_norm(self, grads: Any, max_norm: Any, norm_type: float = 2.0, **kw: Any) -> Any:
        return gradclip.clip_grad_norm(grads, max_norm, norm_type, **kw)

    def clip_grad_value(self, grads: Any, clip_value: Any) -> Any:
        return gradclip.clip_grad_value(grads, clip_value)

    def clip_grad_agc(self, grads: Any, params: Any, clipping: Any = 0.01, norm_type: Any = 2.0, **kw: Any) -> Any:
        return gradclip.clip_grad_agc(grads, params, clipping, norm_type, **kw)

    def clipped_sum(self, grads: Any, max_norm: Any, norm_type: Any = 2.0, **kw: Any) -> Any:
        return gradclip.clipped_sum(grads, max_norm, norm_type, **kw)


class Numpy(Backend):
    name = module = "numpy"
    writeable = True

    def array(self, x: Any, dtype: str | None = None) -> Any:
        out = np.array(x, dtype=None if dtype is None else np_dtype(dtype))
        out.flags.writeable = self.writeable
        return out

    def numpy(self, x: Any) -> np.ndarray:
        return np.array(x)

    def device_of(self, x: Any) -> Any:
        return "cpu"

    def owns(self, x: Any) -> bool:
        return type(x) is np.ndarray


class ReadOnlyNumpy(Numpy):
    """Read-only arrays: a write where none belongs raises."""

    name = "numpy-readonly"
    writeable = False
    in_place = False


class Strict(Backend):
    """The neutral library with its strictest flags, on a device that is not the default."""

    name = "array-api-strict"
    module = "array_api_strict"
    dtypes = ("float32", "float64", "complex64", "complex128")

    @contextmanager
    def active(self) -> Iterator[None]:
        with self.lib.ArrayAPIStrictFlags(
            api_version=os.environ.get("GRADCLIP_STRICT_API", "2024.12"),
            boolean_indexing=False,
            data_dependent_shapes=False,
            enabled_extensions=(),
        ):
            yield

    @property
    def lib(self) -> Any:
        return importlib.import_module(self.module)

    def array(self, x: Any, dtype: str | None = None) -> Any:
        x = np.array(x, dtype=dtype)
        return self.lib.asarray(x, device=self.lib.Device("device1"))

    def numpy(self, x: Any) -> np.ndarray:
        return np.array(np.from_dlpack(x.to_device(self.lib.Device("CPU_DEVICE"))))

    def owns(self, x: Any) -> bool:
        return type(x).__module__.startswith("array_api_strict")


class Jax(Backend):
    """JAX without 64-bit numbers, called as a user calls it who has not heard of jit."""

    name = module = "jax"
    dtypes = ("float16", "bfloat16", "float32", "complex64")
    in_place = False
    flushes = True
    compiles = True
    accumulates_wide = False
    x64 = False
    jit = False

    @contextmanager
    def active(self) -> Iterator[None]:
        jax = importlib.import_module("jax")
        before = jax.config.jax_enable_x64, jax.config.jax_numpy_dtype_promotion
        jax.config.update("jax_enable_x64", self.x64)
        jax.config.update("jax_numpy_dtype_promotion", "strict")
        try:
            yield
        finally:
            jax.config.update("jax_enable_x64", before[0])
            jax.config.update("jax_numpy_dtype_promotion", before[1])

    def array(self, x: Any, dtype: str | None = None) -> Any:
        jnp = importlib.import_module("jax.numpy")
        x = np.array(x, dtype=None if dtype is None else np_dtype(dtype))
        return jnp.asarray(x.astype(x.dtype.newbyteorder("=")))

    def numpy(self, x: Any) -> np.ndarray:
        return np.array(x)

    def device_of(self, x: Any) -> Any:
        return x.sharding

    def owns(self, x: Any) -> bool:
        return isinstance(x, importlib.import_module("jax").Array)


class JaxJit(Jax):
    """The same under `jax.jit`, bounds traced."""

    name = "jax-jit"
    eager = False

    def __init__(self) -> None:
        self._cache: dict[Any, Any] = {}

    def _jitted(self, key: Any, f: Callable[..., Any]) -> Any:
        key = (key, self.x64)
        if key not in self._cache:
            self._cache[key] = importlib.import_module("jax").jit(f)
        return self._cache[key]

    def global_norm(self, grads: Any, norm_type: float = 2.0, **kw: Any) -> Any:
        def f(g: Any) -> Any:
            return gradclip.global_norm(g, norm_type, **kw)

        return self._jitted(("norm", norm_type), f)(grads) if not kw else f(grads)

    def clip_grad_norm(self, grads: Any, max_norm: Any, norm_type: float = 2.0, **kw: Any) -> Any:
        static = {k: v for k, v in kw.items() if k in ("nonfinite", "all_reduce", "per")}
        traced = {k: v for k, v in kw.items() if k not in static}
        if not self.x64 and any(isinstance(c, float) and 3.4e38 < c < np.inf for c in leaves(max_norm)):
            static["max_norm"] = max_norm  # jax.jit itself would make inf of it
        else:
            traced["max_norm"] = max_norm

        def f(g: Any, t: Any) -> Any:
            return gradclip.clip_grad_norm(g, norm_type=norm_type, **static, **t)

        # A tree of labels or bounds has no hash.
        key = tuple((k, repr(v) if isinstance(v, list | dict) else v) for k, v in static.items())
        return self._jitted(("clip", norm_type, key), f)(grads, traced)

    def norms(self, grads: Any, norm_type: float = 2.0, **kw: Any) -> Any:
        return importlib.import_module("jax").jit(lambda g: gradclip.norms(g, norm_type, **kw))(grads)

    def clip_grad_value(self, grads: Any, clip_value: Any) -> Any:
        return importlib.import_module("jax").jit(lambda g: gradclip.clip_grad_value(g, clip_value))(grads)

    def clip_grad_agc(self, grads: Any, params: Any, clipping: Any = 0.01, norm_type: Any = 2.0, **kw: Any) -> Any:
        def f(g: Any, w: Any, c: Any) -> Any:
            return gradclip.clip_grad_agc(g, w, c, norm_type, **kw)

        return self._jitted(("agc", norm_type, tuple(kw.items())), f)(grads, params, clipping)

    def clipped_sum(self, grads: Any, max_norm: Any, norm_type: Any = 2.0, **kw: Any) -> Any:
        def f(g: Any, c: Any) -> Any:
            return gradclip.clipped_sum(g, c, norm_type, **kw)

        return self._jitted(("sum", norm_type, tuple(kw.items())), f)(grads, max_norm)


class JaxX64(JaxJit):
    """Under `jax.jit`, with 64-bit numbers enabled."""

    name = "jax-x64"
    dtypes = ALL_DTYPES
    x64 = True


class Torch(Backend):
    name = module = "torch"

    def array(self, x: Any, dtype: str | None = None) -> Any:
        x = np.array(x, dtype=None if dtype is None else np_dtype(dtype))
        if x.dtype.name == "bfloat16":
            torch = importlib.import_module("torch")
            return torch.asarray(x.astype(np.float32)).to(torch.bfloat16)
        return importlib.import_module("torch").asarray(x.astype(x.dtype.newbyteorder("=")))

    def numpy(self, x: Any) -> np.ndarray:
        if self.dtype_of(x) == "bfloat16":
            return x.float().numpy().astype(np_dtype("bfloat16"))
        return np.array(x.numpy())

    def owns(self, x: Any) -> bool:
        return type(x) is importlib.import_module("torch").Tensor


class Cupy(Backend):
    """CuPy on a GPU, or the real CuPy on emulated devices: `described` says which."""

    name = module = "cupy"
    dtypes = ("float16", "float32", "float64", "complex64", "complex128")

    def missing(self) -> str:
        reason = super().missing()
        if reason:
            return reason
        try:
            count = importlib.import_module("cupy").cuda.runtime.getDeviceCount()
        except Exception as error:  # CuPy raises its own classes, and ImportError for lack of a driver
            return f"CuPy finds no device ({type(error).__name__}: {str(error)[:80]})"
        return "" if count else "CuPy finds no device"

    def described(self) -> str:
        cupy = importlib.import_module("cupy")
        return f"{super().described()} on {os.fsdecode(cupy.cuda.runtime.getDeviceProperties(0)['name'])}"

    def array(self, x: Any, dtype: str | None = None) -> Any:
        return importlib.import_module("cupy").array(np.array(x, dtype=dtype))

    def numpy(self, x: Any) -> np.ndarray:
        return x.get()

    def owns(self, x: Any) -> bool:
        return type(x) is importlib.import_module("cupy").ndarray


BACKENDS: tuple[Backend, ...] = (
    Numpy(),
    ReadOnlyNumpy(),
    Strict(),
    Jax(),
    JaxJit(),
    JaxX64(),
    Cupy(),
    Torch(),
)

MISSING = {backend.name: reason for backend in BACKENDS if (reason := backend.missing())}

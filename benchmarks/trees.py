"""The gradients that are clipped: parameter shapes of known models, made from their architecture and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

Shapes = dict[str, tuple[int, ...]]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Model:
    """A tree of shapes by name, with the numbers of leaves and parameters that it must have."""

    name: str
    shapes: Shapes
    leaves: int
    parameters: int

    def __post_init__(self) -> None:
        counted = len(self.shapes), sum(math.prod(shape) for shape in self.shapes.values())
        if counted != (self.leaves, self.parameters):
            raise ValueError(f"{self.name}: {counted} leaves and parameters, not {(self.leaves, self.parameters)}")

    def described(self, bytes_each: int = 4) -> str:
        return f"{self.name}: {self.leaves:,} leaves, {self.parameters * bytes_each / 1e6:,.1f} MB"


def _mlp(widths: tuple[int, ...]) -> Shapes:
    shapes: Shapes = {}
    for i, (wide, out) in enumerate(pairwise(widths)):
        shapes |= {f"{i}.weight": (out, wide), f"{i}.bias": (out,)}
    return shapes


def _normalised_conv(shapes: Shapes, name: str, out: int, wide: int, kernel: int) -> None:
    """A convolution without bias, and the scale and shift of the batch normalisation behind it."""
    shapes |= {f"{name}.conv": (out, wide, kernel, kernel), f"{name}.scale": (out,), f"{name}.shift": (out,)}


def _resnet50() -> Shapes:
    """He et al., CVPR 2016, table 1: bottleneck blocks 3, 4, 6, 3, the last of each at four times its width."""
    shapes: Shapes = {}
    _normalised_conv(shapes, "stem", 64, 3, 7)
    wide = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(blocks):
            name = f"stage{stage + 1}.{block}"
            _normalised_conv(shapes, f"{name}.1", width, wide, 1)
            _normalised_conv(shapes, f"{name}.2", width, width, 3)
            _normalised_conv(shapes, f"{name}.3", 4 * width, width, 1)
            if block == 0:
                _normalised_conv(shapes, f"{name}.shortcut", 4 * width, wide, 1)
            wide = 4 * width
    return shapes | {"head.weight": (1000, wide), "head.bias": (1000,)}


def _block(width: int) -> Shapes:
    """A transformer block of GPT-2 (Radford et al., 2019)."""
    return {
        "ln_1.scale": (width,),
        "ln_1.shift": (width,),
        "attention.weight": (width, 3 * width),
        "attention.bias": (3 * width,),
        "projection.weight": (width, width),
        "projection.bias": (width,),
        "ln_2.scale": (width,),
        "ln_2.shift": (width,),
        "mlp.up.weight": (width, 4 * width),
        "mlp.up.bias": (4 * width,),
        "mlp.down.weight": (4 * width, width),
        "mlp.down.bias": (width,),
    }


def _gpt2(blocks: int, width: int, vocabulary: int, context: int) -> Shapes:
    shapes: Shapes = {"wte": (vocabulary, width), "wpe": (context, width)}
    for i in range(blocks):
        shapes |= {f"h{i}.{name}": shape for name, shape in _block(width).items()}
    return shapes | {"ln_f.scale": (width,), "ln_f.shift": (width,)}


MODELS: dict[str, Model] = {
    "mlp": Model("MLP 784-256-128-10", _mlp((784, 256, 128, 10)), 6, 235_146),
    "small": Model("1,000 leaves of 1,024", {f"leaf{i}": (1024,) for i in range(1000)}, 1000, 1_024_000),
    "resnet50": Model("ResNet-50", _resnet50(), 161, 25_557_032),
    "gpt2": Model("GPT-2 small", _gpt2(12, 768, 50_257, 1024), 148, 124_439_808),
}

#: Between the MLP and the 1,000 leaves: what a call costs and what its leaves cost weigh alike.
LEAVES_64 = Model("50 leaves of 64 x 64", {f"leaf{i}": (64, 64) for i in range(50)}, 50, 204_800)

#: For questions about compiled code, where twelve times the same answers nothing more.
GPT2_BLOCK = Model("one block of GPT-2 small", _block(768), 12, 7_087_872)


def gradients(shapes: Mapping[str, tuple[int, ...]], dtype: Any = np.float32, seed: int = 0) -> dict[str, Array]:
    """Standard normal numbers: far from what overflows, and from the subnormals that slow a processor down."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32).astype(dtype, copy=False) for name, shape in shapes.items()}

"""What XLA makes of a whole training step, clip + Adam, read from the compiled program's text.

A training step needs the clipped gradients only inside the optimiser's update, so a compiler that fuses well never
writes them to memory: it multiplies each gradient by the factor where the moments are formed. Two things are counted.

*Clipped gradients written out*: arrays as large as a leaf that an instruction of the entry computation writes, that
depend on the norm or on the bound (so they are a scaled gradient, or follow from one), and that the program does not
return (so they are no parameter and no moment). An instruction inside a fusion writes nothing; one in the entry
computation does. Such arrays that depend on neither are listed apart: they were written on the way to the norm.

*Reductions*: `reduce` and `reduce-window` instructions, in any computation, whose operand is as large as a leaf. XLA's
CPU compiler splits a long reduction into two, the second over few numbers, which is not counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import optax

from benchmarks.hlo import computations
from benchmarks.on_jax import devices, optax_clip, our_clip
from benchmarks.results import Section
from benchmarks.settings import Settings
from benchmarks.trees import GPT2_BLOCK, Shapes

#: These hand on what is in memory already.
_WRITES_NOTHING = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "copy-start", "copy-done"}


def reductions(hlo: str, least: int) -> int:
    """Reductions of at least `least` elements, in any computation."""
    count = 0
    for body in computations(hlo).values():
        sizes = {instruction.name: instruction.sizes for instruction in body}
        for instruction in body:
            if instruction.operation in ("reduce", "reduce-window"):
                count += max(sizes.get(instruction.operands[0], [0])) >= least
    return count


class Written(NamedTuple):
    """Leaf-sized arrays that a program writes and does not return: those scaled by norm or bound, and the others."""

    clipped: list[str]
    other: list[str]


def written_out(hlo: str, leaf_sizes: set[int]) -> Written:
    """Outputs of entry instructions, by name and index. The step's parameters are called `grads` and `max_norm`."""
    entry = computations(hlo)["ENTRY"]
    by_name = {instruction.name: instruction for instruction in entry}
    returned: set[tuple[str, int]] = set()

    def give_back(name: str, element: int = 0) -> None:
        instruction = by_name[name]
        if instruction.operation == "get-tuple-element":
            index = re.search(r"index=(\d+)", instruction.text)
            give_back(instruction.operands[0], int(index[1]) if index else 0)
        elif instruction.operation in ("bitcast", "copy") and instruction.operands:
            returned.add((name, 0))
            give_back(instruction.operands[0])
        else:
            returned.add((name, element))

    (root,) = (instruction for instruction in entry if instruction.is_root)
    if root.operation == "tuple":
        for name in root.operands:
            give_back(name)
    else:
        returned |= {(root.name, i) for i in range(len(root.sizes))}

    from_grads: set[str] = set()
    scaled: set[str] = set()  # by the norm or the bound
    written = Written([], [])
    for instruction in entry:
        operands, named = set(instruction.operands), re.search(r'op_name="(\w+)', instruction.text)
        parameter = named[1] if named and instruction.operation == "parameter" else ""
        if parameter == "grads" or operands & from_grads:
            from_grads.add(instruction.name)
        # A few numbers made from the gradients are their norm, or on the way to it.
        is_norm = instruction.name in from_grads and max(instruction.sizes, default=0) < min(leaf_sizes)
        if parameter == "max_norm" or is_norm or operands & scaled:
            scaled.add(instruction.name)
        if instruction.operation in _WRITES_NOTHING:
            continue
        for i, size in enumerate(instruction.sizes):
            if size in leaf_sizes and (instruction.name, i) not in returned:
                (written.clipped if instruction.name in scaled else written.other).append(f"{instruction.name}[{i}]")
    return written


def compiled_step(clip: Callable[..., Any] | None, shapes: Mapping[str, tuple[int, ...]], device: Any) -> str:
    """The compiled HLO text of one step: clip, Adam, apply. Without a clip, the step that it is compared with."""
    optimiser = optax.adam(1e-3)

    def step(params: Any, state: Any, grads: Any, max_norm: Any) -> Any:
        norm = jnp.zeros(())
        if clip is not None:
            grads, norm = clip(grads, max_norm)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state, norm

    sharding = jax.sharding.SingleDeviceSharding(device)
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding) for name, shape in shapes.items()}
    state = jax.eval_shape(optimiser.init, params)
    return str(jax.jit(step).lower(params, state, params, 1.0).compile().as_text())


@contextmanager
def accelerator_form() -> Any:
    """Trace what a GPU or TPU gets, on any machine: of code that depends on the platform, the default branch."""

    def default_branch(*args: Any, default: Callable[..., Any], **platforms: Any) -> Any:
        return default(*args)

    jax.clear_caches()
    with mock.patch.object(jax.lax, "platform_dependent", default_branch):
        yield
    jax.clear_caches()


def evidence(clip: Callable[..., Any] | None, shapes: Shapes, device: Any) -> dict[str, Any]:
    hlo = compiled_step(clip, shapes, device)
    sizes = {math.prod(shape) for shape in shapes.values()}
    return {
        "reductions": reductions(hlo, min(sizes)),
        "leaves": len(shapes),
        **written_out(hlo, sizes)._asdict(),
        "conditionals": len(re.findall(r" conditional\(", hlo)),
    }


def run(settings: Settings) -> Section:
    section = Section("training step")
    shapes, name = GPT2_BLOCK.shapes, GPT2_BLOCK.name
    for device in devices():
        place = f"on {device.device_kind}"
        with jax.default_device(device), accelerator_form():
            section.evidence[f"gradclip, form for GPU and TPU, compiled {place}"] = evidence(our_clip, shapes, device)
        section.evidence[f"gradclip, compiled {place}"] = evidence(our_clip, shapes, device)
        section.evidence[f"optax, compiled {place}"] = evidence(optax_clip, shapes, device)
        section.evidence[f"no clip, compiled {place}"] = evidence(None, shapes, device)
    for case, found in section.evidence.items():
        written, other, count = len(found["clipped"]), len(found["other"]), found["reductions"]
        section.notes.append(
            f"{case}: {count} reductions for {found['leaves']} leaves, {written} clipped gradients written out, "
            f"{other} other arrays of a leaf's size, {found['conditionals']} conditionals"
        )
        if case.startswith("gradclip"):
            tree = f"{name} ({case.removeprefix('gradclip, ')})"
            section.add("written", written, tree=tree)
            section.add("reductions", count / found["leaves"], tree=tree)
    return section

"""What is to be reached, in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A limit on one figure. Ratios are of times in the same run.

    `order` says where the report lists the figure: by rising numbers, which figures on one subject share.
    """

    order: int
    what: str
    limit: float | None
    unit: str = "x"
    at_least: bool = False

    def met(self, value: float) -> bool | None:
        if self.limit is None:
            return None
        return value >= self.limit if self.at_least else value <= self.limit

    def stated(self) -> str:
        if self.limit is None:
            return "-"
        return f"{'>=' if self.at_least else '<='} {self.limit:g} {self.unit}"


TARGETS: dict[str, Target] = {
    "norm": Target(1, "global_norm / one read", 1.10),
    "norm error": Target(1, "global_norm, relative error", 1e-7, ""),
    "in place": Target(2, "clip_grad_norm_ / (read + in-place multiply)", 1.05),
    "threads": Target(2, "the same, aim with threads", 0.8),
    "functional": Target(2, "clip_grad_norm / (read + fresh product)", 1.10),
    "idle": Target(3, "nothing to clip / one read", 1.10),
    "idle, torch": Target(3, "nothing to clip, NumPy arrays / torch, tensors", 0.60),
    "small": Target(4, "clip_grad_norm_ of NumPy arrays / torch, of tensors", 0.30),
    "mlp": Target(4, "clip_grad_norm_ of NumPy arrays / torch, of tensors", 0.50),
    "per leaf": Target(4, "clip_grad_norm_ per leaf / of all", 1.15),
    "per leaf, small": Target(4, "clip_grad_norm_ per leaf / of all", 1.5),
    "per unit": Target(4, "clip_grad_norm_ per unit / of all", 1.5),
    "rms": Target(4, "clip_grad_norm_ of the root mean square / 2-norm", 1.0),
    "clipped sum": Target(4, "clipped_sum / two reads", 1.15),
    "clipped sum, memory": Target(4, "clipped_sum, peak extra memory / input", 0.05),
    "clipped sum, optax": Target(7, "clipped_sum / optax per_example_global_norm_clip", 1.0),
    "compile, clipped sum": Target(7, "lower + compile, clipped_sum / optax per_example_global_norm_clip", None),
    "narrow norm": Target(5, "global_norm", 1.5, "G elements/s", at_least=True),
    "narrow clip": Target(5, "clip_grad_norm_ / naive in-place multiply", 1.0),
    "narrow clip, torch": Target(5, "clip_grad_norm_ of NumPy arrays / torch, of tensors", 1.5),
    "scaling": Target(6, "clip_grad_norm_, N threads / one thread", None),
    "jit run": Target(7, "jitted / optax + its norm", 1.0),
    "jit run, bfloat16, cpu": Target(7, "jitted / optax + its norm", 0.5),
    "jit donated": Target(7, "jitted, donated / optax + its norm, donated", 1.0),
    "jit donated, bfloat16, cpu": Target(7, "jitted, donated / optax + its norm, donated", 0.5),
    "compile": Target(7, "lower + compile / optax + its norm", 1.0),
    "jit run, per leaf": Target(7, "jitted, per leaf / optax's clip and norm of each leaf", 1.0),
    "compile, per leaf": Target(7, "lower + compile, per leaf / optax's clip and norm of each leaf", 0.5),
    "written": Target(7, "clipped gradients written out between clip and update", 0, ""),
    "reductions": Target(7, "reductions of gradients, per leaf", 1.0, ""),
    "eager": Target(8, "not jitted / optax, not jitted", 0.15),
    "first call": Target(8, "first call on a new tree, not jitted", 2.0, "s"),
    "retraces": Target(9, "retraces for the same shapes", 0, ""),
    "retraces, bound": Target(9, "retraces for a changed bound", 0, ""),
    "compilations": Target(9, "compilations not jitted: same shapes, changed bound", 0, ""),
    "gpu norm": Target(10, "global_norm / a copy on the device", None),
    "gpu in place": Target(10, "clip_grad_norm_ / a copy on the device", None),
    "gpu functional": Target(10, "clip_grad_norm / a copy on the device", None),
    "gpu idle": Target(10, "nothing to clip / a copy on the device", None),
    "devices, kernels": Target(11, "as compiled: kernels / optax's clip and norm", 1.1),
    "devices, traffic": Target(11, "as compiled: bytes read and written / optax's clip and norm", 1.03),
    "devices, compile": Target(11, "as compiled: trace, lower, compile / optax's clip and norm", 1.2),
    "per call": Target(12, "fixed cost per call", None, "us"),
    "for each leaf": Target(12, "cost per leaf", None, "us"),
    "per element": Target(12, "cost per million elements", None, "us"),
    "in-place memory": Target(13, "clip_grad_norm_, peak extra memory", 4.0, "MB"),
    "functional memory": Target(13, "clip_grad_norm, peak extra memory beyond its output", 4.0, "MB"),
    "tensors": Target(14, "clip_grad_norm_ of tensors / torch", 1.0),
    "tensors, float16": Target(14, "clip_grad_norm_ of tensors / torch", 1.5),
    "tensors, 50 leaves": Target(14, "clip_grad_norm_ of tensors / torch", 1.5),
    "tensors, no aim": Target(14, "clip_grad_norm_ of tensors / torch", None),
    "tensors, compiled": Target(14, "clip_grad_norm_ of tensors, compiled / torch, compiled", None),
    "tensors, compilation": Target(14, "clip_grad_norm_ of tensors, compilation / torch", None),
}

"""What the command line settles for every section."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.timing import Effort
from benchmarks.trees import MODELS, Model


@dataclass(frozen=True)
class Settings:
    """`short` leaves out what takes long, and says so; `threads` is the limit for gradclip and torch."""

    short: bool = False
    threads: int = 1
    trees: tuple[str, ...] = tuple(MODELS)
    effort: Effort = field(default_factory=Effort)

    @property
    def models(self) -> list[Model]:
        return [MODELS[name] for name in self.trees]

"""The instrument: all contenders in turn, round after round, and ratios within a round.

On a machine that others use too, a time says little and the ratio of two times taken far apart hardly more. So each
round runs every contender once, in a new random order, and a ratio is the median over the rounds of the ratios within
one round: what slows the machine down for a while slows both sides of it.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.progress import steps

Call = Callable[[], object]

#: Runs a call so many times, and returns the seconds that all of them took.
Stopwatch = Callable[[Call, int], float]


def host_stopwatch(clock: Callable[[], float] = time.perf_counter) -> Stopwatch:
    def run(call: Call, repeats: int) -> float:
        start = clock()
        for _ in range(repeats):
            call()
        return clock() - start

    return run


@dataclass(frozen=True)
class Spread:
    """The median over the rounds, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Timings:
    """Seconds per call by contender, one number for each round."""

    samples: dict[str, list[float]]

    def spread(self, name: str) -> Spread:
        return Spread.of(self.samples[name])

    def ratio(self, name: str, reference: str) -> Spread:
        pairs = zip(self.samples[name], self.samples[reference], strict=True)
        return Spread.of([a / b for a, b in pairs])

    def __contains__(self, name: str) -> bool:
        return name in self.samples

    @property
    def rounds(self) -> int:
        return min(map(len, self.samples.values()))


@dataclass(frozen=True)
class Effort:
    """How long one contest may take in seconds, within how many rounds."""

    seconds: float = 8.0
    least_rounds: int = 7
    most_rounds: int = 101


def calibrated(call: Call, stopwatch: Stopwatch, prepare: Call = lambda: None, least: float = 1e-3) -> int:
    """How many calls in a row take at least `least` seconds. Warms the call up."""
    prepare()
    stopwatch(call, 1)
    repeats = 1
    while True:
        prepare()
        took = stopwatch(call, repeats)
        if took >= least:
            return repeats
        # Ten times at most: the first calls may have been slow for reasons that do not return.
        repeats = min(10 * repeats, max(repeats + 1, math.ceil(1.2 * repeats * least / max(took, 1e-9))))


def compete(
    title: str,
    contenders: Mapping[str, Call],
    effort: Effort,
    *,
    prepare: Callable[[str], object] = lambda name: None,
    stopwatch: Stopwatch | None = None,
    least: float = 1e-3,
    cold: bool = False,
    seed: int = 0,
) -> Timings:
    """Time the contenders against each other.

    `prepare`, given the contender's name, runs before each of its samples, off the clock: it puts back what the last
    contender has written in place. Calls shorter than `least` seconds are timed several in a row, after a warm-up;
    `cold` times single calls without one, in the least number of rounds. The garbage collector is off.
    """
    stopwatch = stopwatch or host_stopwatch()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        repeats, rounds = dict.fromkeys(contenders, 1), effort.least_rounds
        if not cold:
            begun = time.perf_counter()
            for name, call in contenders.items():
                repeats[name] = calibrated(call, stopwatch, partial(prepare, name), least)
            # That took about as long as two rounds: each call was warmed up, and timed at least once.
            a_round = max((time.perf_counter() - begun) / 2, 1e-9)
            rounds = max(rounds, min(effort.most_rounds, int(effort.seconds / a_round)))
        timings = Timings({name: [] for name in contenders})
        order, shuffled = list(contenders), random.Random(seed)
        for _ in steps(range(rounds), title):
            shuffled.shuffle(order)
            for name in order:
                prepare(name)
                timings.samples[name].append(stopwatch(contenders[name], repeats[name]) / repeats[name])
    finally:
        if collecting:
            gc.enable()
    return timings

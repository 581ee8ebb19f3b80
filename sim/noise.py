"""What the step-time form leaves over: noise from step to step, and the slow drift of the machine.

The noise of a step depends on the seed and the step's number only (a counter-based generator), never on how the steps
were grouped into events: a simulator that jumps and one that walks see the same machine. The drift is constant over
short cells of time, for the same reason.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from sim import calibration

Floats = NDArray[np.float64]


class Noise:
    """The noise of one run: `law` is the calibration's, `seed` the run's."""

    BLOCK = 4096
    CELLS = 8  # of drift per correlation time: within one, the factor moves by a few percent of its deviation

    def __init__(self, law: calibration.Noise, seed: int):
        self._key = seed
        self._blocks: dict[int, Floats] = {}
        self._memory = law.memory
        self._forget = math.exp(-1 / law.memory_steps)
        self._laws = {"prefill": np.asarray(law.prefill or [1.0]), "decode": np.asarray(law.decode or [1.0])}
        rng = np.random.default_rng([seed, 1])
        self._level = math.exp(law.between * rng.standard_normal() - law.between**2 / 2)
        self._rng, self._sd = rng, law.drift
        self._cell = law.drift_seconds / self.CELLS if law.drift else math.inf
        self._keep = math.exp(-1 / self.CELLS)
        self._walk: list[float] = []

    def factor(self, kind: str, number: int) -> float:
        """The factor of step `number`."""
        return float(self.factors(kind, number, 1)[0])

    def factors(self, kind: str, number: int, count: int) -> Floats:
        """The factors of `count` steps from `number` on, shape (count,)."""
        law = self._laws[kind]
        if len(law) == 1:
            return np.full(count, law[0])
        parts = []
        while count > 0:
            block, at = divmod(number, self.BLOCK)
            u = self._ranks(kind, block)[at : at + count]
            parts.append(u)
            number += len(u)
            count -= len(u)
        u = parts[0] if len(parts) == 1 else np.concatenate(parts)
        spread: Floats = np.interp(u * (len(law) - 1), np.arange(len(law)), law)
        return spread

    def drift(self, time: float) -> tuple[float, float]:
        """The machine's factor at `time`, and the time until which it holds, s."""
        if self._sd == 0.0:
            return self._level, math.inf
        cell = int(time / self._cell)
        if (cell + 1) * self._cell <= time:  # the division rounded down across the edge
            cell += 1
        while cell >= len(self._walk):
            step = self._sd * self._rng.standard_normal()
            fresh = math.sqrt(1 - self._keep**2)
            self._walk.append(step if not self._walk else self._keep * self._walk[-1] + fresh * step)
        return self._level * math.exp(self._walk[cell] - self._sd**2 / 2), (cell + 1) * self._cell

    def _ranks(self, kind: str, block: int) -> Floats:
        """The ranks, in (0, 1), of a block of steps; those of decode steps remember their predecessors in the block."""
        remember = self._memory > 0.0 and kind == "decode"
        at = 2 * block + remember
        if at not in self._blocks:
            if len(self._blocks) > 8:
                self._blocks.pop(next(iter(self._blocks)))
            rng = np.random.Generator(np.random.Philox(key=self._key, counter=[0, 0, 0, at]))
            self._blocks[at] = self._remembering(rng) if remember else rng.random(self.BLOCK)
        return self._blocks[at]

    def _remembering(self, rng: np.random.Generator) -> Floats:
        from scipy.signal import lfilter  # half a second to import, and only some machines need it
        from scipy.special import ndtr

        fresh, kept = rng.standard_normal((2, self.BLOCK))
        kept[1:] *= math.sqrt(1 - self._forget**2)
        slow = lfilter([1.0], [1.0, -self._forget], kept)
        ranks: Floats = ndtr(math.sqrt(1 - self._memory) * fresh + math.sqrt(self._memory) * slow)
        return ranks


class NoisyDecodeRun:
    """`DecodeRun` with noise: the ends of all its steps, up to the next that ends a request, laid out once."""

    __slots__ = ("_ends", "start")

    def __init__(self, start: float, first: float, growth: float, extra: float, steps: int, number: int, noise: Noise):
        self.start = start
        j = np.arange(steps, dtype=np.float64)
        work = first + growth * j
        work[0] += extra
        work *= noise.factors("decode", number, steps)
        factor, until = noise.drift(start)
        ends = start + np.cumsum(work * factor)
        done = 0
        while True:  # a step belongs to the cell of drift in which it begins
            done += 1 + int(np.searchsorted(ends[done:], until, side="left"))
            if done >= steps:
                break
            factor, until = noise.drift(float(ends[done - 1]))
            ends[done:] = ends[done - 1] + np.cumsum(work[done:] * factor)
        self._ends = ends

    def end(self, steps: int) -> float:
        """When `steps` steps are done, s."""
        return float(self._ends[steps - 1]) if steps > 0 else self.start

    def steps_by(self, time: float) -> int:
        """The least number of steps whose end is not before `time`."""
        if time <= self.start:
            return 0
        return int(np.searchsorted(self._ends, time, side="left")) + 1

    def ends(self, steps: int) -> Floats:
        """The ends of the first `steps` steps, s."""
        return self._ends[:steps]

"""Steps of one shape on the clock: when each ends, and how many end by a time.

The time of step j (from 0) of a segment is a line in j, `first + growth · j`, and `once` more for the first: every
context grows by one token a step, so any form that is affine in the contexts, whatever it does with the batch size,
has its boundaries in closed form. A boundary is always start + the sum from the first step on, never a sum of parts.
"""

from __future__ import annotations

import math
from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray

from sim.steptime.noise import Noise

Floats = NDArray[np.float64]
_RAMP = np.arange(4096, dtype=np.float64)
_FEW = 24  # steps that a loop lays out faster than arrays do


class Segment:
    """Steps without noise; it goes on for ever. Times in s."""

    __slots__ = ("first", "growth", "once", "start")

    def __init__(self, start: float, first: float, growth: float, once: float = 0.0):
        self.start, self.first, self.growth, self.once = start, first, growth, once

    def extend(self, steps: int) -> None:
        """Go on to `steps` steps in all."""

    def end(self, steps: int) -> float:
        """When `steps` steps are done."""
        if steps <= 0:
            return self.start
        return self.start + (self.once + steps * self.first + self.growth * (steps * (steps - 1) / 2))

    def steps_by(self, time: float) -> int:
        """The least number of steps whose end is not before `time`: the boundary that sees an arrival at `time`."""
        if time <= self.start:
            return 0
        t = time - self.start - self.once
        if t <= self.first:
            k = 1
        elif self.growth <= 0.0:
            k = math.ceil(t / self.first)
        else:  # growth/2 k² + (first - growth/2) k - t = 0, in the form that does not cancel
            b = self.first - self.growth / 2
            k = math.ceil(2 * t / (b + math.sqrt(b * b + 2 * self.growth * t)))
        # One ulp in the inverse moves an admission by a whole step: settle it by the forward formula.
        while k > 0 and self.end(k - 1) >= time:
            k -= 1
        while self.end(k) < time:
            k += 1
        return k

    def ends(self, steps: int, after: int = 0) -> Floats:
        """The ends of the steps from `after` to `steps`."""
        k = np.arange(after + 1, steps + 1, dtype=np.float64)
        return self.start + (self.once + k * self.first + self.growth * (k * (k - 1) / 2))


class NoisySegment:
    """Steps with noise, of a `kind` that the noise knows; `number` is that of the first among all steps of a run.

    The ends of all its steps are laid out at once.
    """

    __slots__ = ("_ends", "_first", "_growth", "_kind", "_noise", "_number", "_once", "start")

    def __init__(
        self, start: float, first: float, growth: float, once: float, steps: int, number: int, noise: Noise, kind: str
    ):
        self.start, self._first, self._growth, self._once = start, first, growth, once
        self._number, self._noise, self._kind = number, noise, kind
        self._ends = self._laid_out(steps)

    def extend(self, steps: int) -> None:
        """Go on to `steps` steps in all."""
        if steps > len(self._ends):  # rare, so from the beginning: that gives the same floats
            self._ends = self._laid_out(steps)

    def _laid_out(self, steps: int) -> Floats | list[float]:
        noise, kind, start, first, growth = self._noise, self._kind, self.start, self._first, self._growth
        factors = noise.factors(kind, self._number, steps)
        factor, until = noise.drift_of(kind, start)
        if steps <= _FEW:  # the same sums, without arrays
            few, before, total, work = [], start, 0.0, first + self._once
            for step, scale in enumerate(factors.tolist(), 1):
                total += work * scale * factor
                end = total + before
                few.append(end)
                work = step * growth + first
                if end >= until:
                    before, total = end, 0.0
                    factor, until = noise.drift_of(kind, end)
            return few
        works = (_RAMP[:steps] if steps <= len(_RAMP) else np.arange(steps, dtype=np.float64)) * growth
        works += first
        works[0] += self._once
        works *= factors
        ends = (works * factor).cumsum()
        ends += start
        done = bisect_left(ends, until) + 1
        while done < steps:  # a step belongs to the cell of drift in which it begins
            before = float(ends[done - 1])
            factor, until = noise.drift_of(kind, before)
            ends[done:] = (works[done:] * factor).cumsum()
            ends[done:] += before
            done = bisect_left(ends, until, done) + 1
        return ends

    def end(self, steps: int) -> float:
        """When `steps` steps are done."""
        return float(self._ends[steps - 1]) if steps > 0 else self.start

    def steps_by(self, time: float) -> int:
        """The least number of steps whose end is not before `time`."""
        if time <= self.start:
            return 0
        return bisect_left(self._ends, time) + 1

    def ends(self, steps: int, after: int = 0) -> Floats:
        """The ends of the steps from `after` to `steps`, an array of its own."""
        return np.array(self._ends[after:steps])

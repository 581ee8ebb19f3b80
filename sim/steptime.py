"""How long one forward pass takes, and how many fit into a time.

A step-time form answers four questions about the batch it is given. The time of the next decode steps of an unchanged
batch is a *line* in the step's number, `first + growth * j`: every context grows by one token a step, so any form that
is affine in the contexts, whatever it does with the batch size, can be jumped over in closed form (`DecodeRun`).
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class StepTime(Protocol):
    """The time of every kind of work a server does, in seconds.

    `sequences` is the number of requests in the batch; `context` their summed contexts (prompts plus tokens received);
    `longest` the longest of them.
    """

    def prefill(self, sequences: int, tokens: int, tokens_sq: int, longest: int) -> float:
        """One prefill of `sequences` prompts of `tokens` in all; `tokens_sq` is the sum of their squares."""

    def decode(self, sequences: int, context: int, longest: int) -> tuple[float, float]:
        """The first decode step of this batch, and by how much each following one is longer."""

    def concat(self, old: int, new: int, longest: int) -> float:
        """What joining `new` prefilled requests to `old` running ones adds to the next decode step."""

    def filter(self, kept: int, finished: int, longest: int) -> float:
        """What dropping `finished` requests costs before the next step; `longest` is of the `kept`."""


class DecodeRun:
    """A run of decode steps of one unchanged batch, without noise: step j (from 0) takes `first + growth * j`."""

    __slots__ = ("extra", "first", "growth", "start")

    def __init__(self, start: float, first: float, growth: float, extra: float = 0.0):
        self.start, self.first, self.growth, self.extra = start, first, growth, extra

    def end(self, steps: int) -> float:
        """When `steps` steps are done, s; the cost of a concatenation (`extra`) lies in the first."""
        if steps <= 0:
            return self.start
        return self.start + (self.extra + steps * self.first + self.growth * (steps * (steps - 1) / 2))

    def steps_by(self, time: float) -> int:
        """The least number of steps whose end is not before `time`: the boundary that sees an arrival at `time`."""
        if time <= self.start:
            return 0
        t = time - self.start - self.extra
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

    def ends(self, steps: int) -> NDArray[np.float64]:
        """The ends of the first `steps` steps, s."""
        k = np.arange(1, steps + 1, dtype=np.float64)
        return self.start + (self.extra + k * self.first + self.growth * (k * (k - 1) / 2))

"""Random effects: how a machine's speed varies between seconds, rungs and runs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class RandomEffects(NamedTuple):
    """Relative standard deviations of a machine's speed.

    `drift` is a stationary process with correlation time `seconds`; `rung` and `run` are effects of a whole rung and a
    whole run. All are those of decode steps; a prefill takes the share `prefill` of them. `skew` is the skewness of the
    logarithm of the drift.
    """

    drift: float = 0.0
    seconds: float = 20.0
    rung: float = 0.0
    run: float = 0.0
    prefill: float = 1.0
    skew: float = 0.0

    @property
    def between(self) -> float:
        """Standard deviation of another run's window besides the drift."""
        return float(np.hypot(self.rung, self.run))

    def block_sd(self, seconds: float) -> float:
        """Standard deviation of the mean over so many seconds of the drift alone."""
        turns = self.seconds / seconds
        return float(self.drift * np.sqrt(2 * turns * (1 - turns * -np.expm1(-1 / turns))))

    def rung_sd(self, seconds: float, blocks: float) -> float:
        """Standard deviation of the mean over a rung of so many seconds, beyond what the drift would leave if its
        `blocks` were independent."""
        beyond = self.block_sd(seconds) ** 2 - self.block_sd(seconds / blocks) ** 2 / blocks
        return float(np.sqrt(self.rung**2 + max(beyond, 0.0)))


NO_EFFECTS = RandomEffects()  # a machine of constant speed

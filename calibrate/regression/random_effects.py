"""How far a machine is from itself: from one stretch of seconds to the next, from load to load, from day to day."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class RandomEffects(NamedTuple):
    """Relative standard deviations of a machine's speed: `drift`, which forgets itself within `seconds`, and what a
    whole rung or a whole run keeps. All are those of decode steps; a prefill feels the share `prefill` of them.
    `skew` is the skewness of the drift."""

    drift: float = 0.0
    seconds: float = 20.0
    rung: float = 0.0
    run: float = 0.0
    prefill: float = 1.0
    skew: float = 0.0

    @property
    def between(self) -> float:
        """Of what another run's window has as a whole, besides the drift."""
        return float(np.hypot(self.rung, self.run))

    def block_sd(self, seconds: float) -> float:
        """Of the mean over so many seconds of the drift alone."""
        turns = self.seconds / seconds
        return float(self.drift * np.sqrt(2 * turns * (1 - turns * -np.expm1(-1 / turns))))

    def rung_sd(self, seconds: float, blocks: float) -> float:
        """Of the mean over a rung of so many seconds, beyond what its blocks would leave of the drift, were they
        independent."""
        beyond = self.block_sd(seconds) ** 2 - self.block_sd(seconds / blocks) ** 2 / blocks
        return float(np.sqrt(self.rung**2 + max(beyond, 0.0)))


NO_EFFECTS = RandomEffects()  # a machine that is always itself

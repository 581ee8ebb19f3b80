"""What the step-time form leaves over: noise from step to step, and the slow drift of the machine.

The noise of a step depends on the seed and the step's number only (a counter-based generator), never on how the steps
were grouped into events: a simulator that jumps and one that walks see the same machine. The drift is constant over
short cells of time, for the same reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sim.randomness import BLOCK, Kind, Randomness
from sim.steptime import noise_parameters

Floats = NDArray[np.float64]
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(32)  # the mean of anything of a standard normal score
_WEIGHTS /= _WEIGHTS.sum()


class Noise:
    """The noise of one replica in a run: `law` is the calibration's, `seed` the run's."""

    BLOCK = 4096
    CELLS = 8  # of drift per correlation time: within one, the factor moves by a few percent of its deviation

    def __init__(self, law: noise_parameters.Noise, seed: int | Sequence[int], replica: int = 0):
        self._random, self._replica = Randomness(seed), replica
        self._blocks: dict[tuple[str, int], Floats] = {}
        self._memory, self._returned = law.memory, law.returned
        self._forget = math.exp(-1 / law.memory_steps)
        level = float(self._random.block(Kind.RUN_EFFECT, replica).standard_normal(2)[1])
        self._laws = {"prefill": np.asarray(law.prefill or [1.0]), "decode": np.asarray(law.decode or [1.0])}
        self._level = math.exp(law.between * level - law.between**2 / 2)
        self._sd, self._skew = law.drift, law.drift_skew
        self._cell = max(law.drift_seconds, 0.01) / self.CELLS if law.drift else math.inf  # or it would fill the memory
        self._keep = math.exp(-1 / self.CELLS)
        self._score = 0.0  # of the last cell's factor
        self._fresh: list[float] = []  # what is new in each cell of a block
        self._drifts: list[float] = []
        self._share = law.prefill_share
        self._mean = self._log_mean(1.0)
        of_level = self._share * (1 - self._share) * law.between**2 / 2
        self._prefill = math.exp(of_level + self._share * self._mean - self._log_mean(self._share))  # the mean stays 1

    def factor(self, kind: str, number: int) -> float:
        """The factor of step `number`."""
        block, at = divmod(number, self.BLOCK)
        return float(self._factors(kind, block)[at])

    def factors(self, kind: str, number: int, count: int) -> Floats:
        """The factors of `count` steps from `number` on, shape (count,), to be read only."""
        block, at = divmod(number, self.BLOCK)
        here = self._factors(kind, block)[at : at + count]
        if len(here) == count:
            return here
        return np.concatenate([here, self.factors(kind, number + len(here), count - len(here))])

    def drift(self, time: float) -> tuple[float, float]:
        """The machine's factor for all but prefills at `time`, and the time until which it holds, s."""
        if self._sd == 0.0:
            return self._level, math.inf
        cell = int(time / self._cell)
        if (cell + 1) * self._cell <= time:  # the division rounded across the edge
            cell += 1
        elif cell * self._cell > time:
            cell -= 1
        while cell >= len(self._drifts):
            number, at = divmod(len(self._drifts), BLOCK)
            if at == 0:
                self._fresh = self._random.block(Kind.DRIFT, self._replica, number).standard_normal(BLOCK).tolist()
            fresh = self._fresh[at]
            self._score = self._keep * self._score + math.sqrt(1 - self._keep**2) * fresh if self._drifts else fresh
            self._drifts.append(self._level * math.exp(self._sd * _skewed(self._score, self._skew) - self._mean))
        return self._drifts[cell], (cell + 1) * self._cell

    def drift_of(self, kind: str, time: float) -> tuple[float, float]:
        """The machine's factor for a step of that kind that begins at `time`, and the time until which it holds, s."""
        factor, until = self.drift(time)
        if kind == "prefill" and self._share != 1.0:
            factor = self._prefill * factor**self._share
        return factor, until

    def _log_mean(self, share: float) -> float:
        """The logarithm of the mean of the drift to that power, before it is divided by it."""
        if not self._skew:
            return (share * self._sd) ** 2 / 2
        logs = share * self._sd * np.array([_skewed(score, self._skew) for score in _NODES])
        return float(np.log(np.exp(logs) @ _WEIGHTS))

    def _factors(self, kind: str, block: int) -> Floats:
        """The factors of a block of steps; decode steps remember their predecessors in the block, and give back."""
        if (kind, block) not in self._blocks:
            if len(self._blocks) > 8:
                self._blocks.pop(next(iter(self._blocks)))
            remember = self._memory + self._returned > 0.0 and kind == "decode"
            rng = self._random.block(Kind.CORRELATED_STEP if remember else Kind.STEP, self._replica, block)
            ranks = self._remembering(rng) if remember else rng.random(self.BLOCK)
            law = self._laws[kind]
            self._blocks[kind, block] = np.interp(ranks * (len(law) - 1), np.arange(len(law)), law)
        return self._blocks[kind, block]

    def _remembering(self, rng: np.random.Generator) -> Floats:
        from scipy.linalg.blas import dtbsv  # scipy takes half a second to import, and only some machines need it
        from scipy.special import ndtr

        fresh, kept = rng.standard_normal((2, self.BLOCK))
        kept[1:] *= math.sqrt(1 - self._forget**2)
        # slow[i] = kept[i] + forget · slow[i - 1], a banded triangular system; scipy.signal imports for a second longer
        slow = dtbsv(1, np.array([np.ones(self.BLOCK), np.full(self.BLOCK, -self._forget)], order="F"), kept, lower=1)
        score = math.sqrt(max(1 - self._memory - self._returned, 0.0)) * fresh + math.sqrt(self._memory) * slow
        if self._returned:
            score += math.sqrt(self._returned / 2) * np.diff(rng.standard_normal(self.BLOCK + 1))
        ranks: Floats = ndtr(score)
        return ranks


def _skewed(score: float, skewness: float) -> float:
    """The value of mean 0, variance 1 and that skewness at a standard normal score (Wilson and Hilferty 1931).

    Beyond four deviations it stays where it is: the exponential of a cube would have no mean.
    """
    if not skewness:
        return score
    score = min(max(score, -4.0), 4.0)
    return 2 / skewness * ((1 + skewness * score / 6 - skewness**2 / 36) ** 3 - 1)

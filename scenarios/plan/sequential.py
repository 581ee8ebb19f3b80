"""Is an SLO kept with the wanted probability? Wald's sequential probability ratio test of a share of draws.

A. Wald, Sequential tests of statistical hypotheses, Annals of Mathematical Statistics 16 (1945), 117-186. With odds of
the goal o = p / (1 - p), the hypotheses are "the odds are 2 o" (kept) and "the odds are o / 2" (not kept). After each
batch of draws the log likelihood ratio is compared with ±log((1 - ERROR) / ERROR). Shares beyond either hypothesis are
judged wrongly with a probability of at most about `ERROR`; between them, either answer is right to within a factor of
two in the odds.
"""

from __future__ import annotations

import math
from typing import NamedTuple

BATCH = 8  # draws between two decisions: fixed, so that a decision does not depend on which process ends first
ERROR = 0.05
ODDS = 2.0  # at a goal of 90 % the hypotheses are 95 % and 82 %
MOST = 256  # draws; without a decision by then, the share is within a few percent of the goal


class SequentialTest(NamedTuple):
    """How many of the draws made so far keep every SLO; `goal` is the wanted probability."""

    goal: float
    kept: int = 0
    draws: int = 0

    def after(self, kept: int, draws: int) -> SequentialTest:
        """The test with a batch more."""
        return SequentialTest(self.goal, self.kept + kept, self.draws + draws)

    @property
    def decision(self) -> bool | None:
        """Whether the SLOs are kept with the goal's probability; None while that is not clear."""
        if abs(self.evidence) < math.log((1.0 - ERROR) / ERROR):
            return None
        return self.evidence > 0

    @property
    def over(self) -> bool:
        """Whether no more draws are wanted."""
        return self.decision is not None or self.draws >= MOST

    @property
    def evidence(self) -> float:
        """The log likelihood ratio of kept against not kept."""
        odds = self.goal / (1.0 - self.goal)
        good, bad = (times * odds / (1.0 + times * odds) for times in (ODDS, 1.0 / ODDS))
        return self.kept * math.log(good / bad) + (self.draws - self.kept) * math.log((1.0 - good) / (1.0 - bad))

    @property
    def share(self) -> float:
        """The probability that is left to believe: the mean of its posterior under Jeffreys' prior."""
        return (self.kept + 0.5) / (self.draws + 1.0)

    @property
    def stderr(self) -> float:
        """The standard deviation of that posterior."""
        return math.sqrt(self.share * (1.0 - self.share) / (self.draws + 2.0))

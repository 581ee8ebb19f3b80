"""The parameters of what a step-time form leaves over."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

MOST_SKEWED = 2.0  # a drift can be: an exponential distribution is

Factor = Annotated[float, Meta(gt=0, le=1e6)]  # of one step
Share = Annotated[float, Meta(ge=0, le=1)]
Deviation = Annotated[float, Meta(ge=0, le=3)]  # of the logarithm of a factor: times twenty either way


class Noise(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the step-time form leaves over, as factors of mean 1.

    `prefill` and `decode` are quantiles, at evenly spaced probabilities from 0 to 1, of a single step's factor (empty:
    none). Successive decode steps resemble each other: the normal score of a step's rank is `sqrt(memory)` times an
    autoregressive part, which forgets itself over `memory_steps` steps, plus a fresh one. Of its variance the next step
    gives back the share `returned`: a token seen late makes one step long and the next one short, and no answer longer.
    The slow drift of the machine is a factor whose logarithm has standard deviation `drift` and skewness `drift_skew`
    (a neighbour on the same machine slows it much now and then, and does not quicken it) and forgets itself over
    `drift_seconds`; `between` is the standard deviation of a factor that one whole run keeps. A prefill feels both to
    the power of `prefill_share`: what computes is slowed by other things than what waits for memory.
    """

    prefill: list[Factor] = []
    decode: list[Factor] = []
    memory: Share = 0.0
    memory_steps: Annotated[float, Meta(gt=0)] = 1.0
    returned: Share = 0.0
    drift: Deviation = 0.0
    drift_seconds: Annotated[float, Meta(gt=0)] = 20.0
    drift_skew: Annotated[float, Meta(ge=-MOST_SKEWED, le=MOST_SKEWED)] = 0.0
    between: Deviation = 0.0
    prefill_share: Annotated[float, Meta(ge=0, le=3)] = 1.0

    @property
    def silent(self) -> bool:
        """Whether there is no noise at all."""
        return not (self.prefill or self.decode or self.drift or self.between)

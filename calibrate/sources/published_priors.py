"""Prior distributions of a machine's parameters for published figures.

They are for Llama-2-70B on four A100s behind a server of 2023, each wider than the tables in `data/` spread; comments
name these. Times in the tables are of other engines, most without TGI's overhead of launching kernels one by one, which
made its decode step 40 to 70 ms where theirs took 30 to 45. Each distribution maps a standard normal score to a value,
so that a machine is a point in a space whose directions are alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.special import ndtr, ndtri

from calibrate.arrays import Floats
from sim.model.scenario import Hardware
from sim.results.curve import TAKEOFF_FACTOR


class Distribution(Protocol):
    """A distribution of one parameter."""

    def at(self, score: Floats) -> Floats:
        """The values at these standard normal scores."""

    def density(self, value: Floats) -> Floats:
        """The density at these values, 0 outside the support."""


@dataclass(frozen=True)
class LogNormal:
    """Median `median`, standard deviation `sigma` of the logarithm."""

    median: float
    sigma: float

    def at(self, score: Floats) -> Floats:
        """See `Distribution`."""
        return np.asarray(self.median * np.exp(self.sigma * score))

    def density(self, value: Floats) -> Floats:
        """See `Distribution`."""
        x = np.maximum(value, 1e-300)
        score = np.log(x / self.median) / self.sigma
        return np.where(value > 0, np.exp(-(score**2) / 2) / (x * self.sigma * np.sqrt(2 * np.pi)), 0.0)


@dataclass(frozen=True)
class HalfNormal:
    """The absolute value of a normal distribution with standard deviation `scale`."""

    scale: float

    def at(self, score: Floats) -> Floats:
        """See `Distribution`."""
        return np.asarray(self.scale * ndtri((1 + ndtr(score)) / 2))

    def density(self, value: Floats) -> Floats:
        """See `Distribution`."""
        bell = np.exp(-((value / self.scale) ** 2) / 2) * np.sqrt(2 / np.pi) / self.scale
        return np.where(value >= 0, bell, 0.0)


@dataclass(frozen=True)
class Uniform:
    """Uniform from `low` to `high`."""

    low: float
    high: float

    def at(self, score: Floats) -> Floats:
        """See `Distribution`."""
        return np.asarray(self.low + (self.high - self.low) * ndtr(score))

    def density(self, value: Floats) -> Floats:
        """See `Distribution`."""
        return np.where((value >= self.low) & (value <= self.high), 1 / (self.high - self.low), 0.0)


KIND = "Llama-2-70B on four A100s"


def of_the_kind(machine: Hardware) -> bool:
    """Whether nothing known of a machine makes it another than `KIND`."""
    plain = "".join(c for c in (machine.model or "").lower() if c.isalnum())
    return (not plain or "llama270b" in plain) and "A100" in (machine.gpu or "A100") and (machine.gpus or 4) == 4


STEP_TIMES: Mapping[str, Distribution] = {
    "a0": LogNormal(30e-3, 0.6),  # LMDeploy 35 ms; Splitwise's 128 tokens take 38 ms more than its rate says
    "a1": LogNormal(0.26e-3, 0.4),  # LMDeploy 0.16, Splitwise 0.18 ms; links of PCIe 0.36; Argonne's DeepSpeed 0.46
    "a2": HalfNormal(2.4e-8),  # Splitwise 2.2e-8, from prompts of up to 8192 tokens
    "a3": LogNormal(2e-3, 1.3),  # LMDeploy 2 ms, and a share of Splitwise's 41 ms
    "b0": LogNormal(50e-3, 0.35),  # tables 29 to 43 ms; launching 80 layers in TGI of that age about 41 ms
    "b1": LogNormal(0.35e-3, 0.9),  # LMDeploy 0.11, Argonne 0.2 to 0.5 ms; the host's work alone 0.04 to 0.25 ms
    "b2": LogNormal(0.2e-6, 0.9),  # LMDeploy 0.09, Splitwise 0.67 µs; 0.06 µs a read, and each head reads again
    "b3": HalfNormal(3.5e-6),  # LMDeploy 0.8, DeepSpeed 1.5 µs; one block walked each context alone
}
# sd of the log of the factor by which another machine is slower, around `constrained_prior.rough_scale`: within half or
# double with two thirds, since that estimate knows of no queue
SCALE_SIGMA = 0.7
TOKEN_BUDGET = Uniform(
    25_000, 50_000
)  # tokens that the weights leave room for on boards of 40 GB (2 to 4 GiB each), estimated
OUTPUT_ATTAINED = Uniform(0.8, 1.0)  # an end-of-sequence token could not be ignored
TAKEOFF = Uniform(*TAKEOFF_FACTOR)

MEANING = {
    "max_batch_total_tokens": ("tokens", "what the server's warm-up finds free for KV cache"),
    "output_attained": ("1", "share of the asked output tokens that came back"),
    "takeoff_factor": ("1", "how many times the one-user latency the authors called a deterioration"),
}

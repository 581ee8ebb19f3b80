"""Which of many possible machines show the figures: importance sampling, guided by what was seen so far.

Running a machine through the simulator costs a tenth of a second, and of those that can be, one in a hundred shows all
figures. So after each round a quadratic of everything simulated foretells what any machine would show, and the next
round is chosen by that. The emulator only decides where to look: the weights come from real simulations, with the
chances of all rounds together as denominator (deterministic mixture: Cornuet et al., Adaptive Multiple Importance
Sampling, 2012).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

Floats = NDArray[np.float64]

ROUNDS = (0.25, 0.2, 0.25, 0.3)  # shares of the budget
POOL = 20_000  # machines to choose a round from
ANYWHERE = 0.1  # share of every round that is chosen without the emulator: nothing is ruled out by its mistakes
WIDTH = 200  # effective machines of the pool that a round is chosen among, at least
RIDGE = 1e-3
FAR = 100.0  # log-likelihood at which a machine counts half


@dataclass(frozen=True)
class Sample:
    """Simulated machines: `scores` (n, d), what they `shown`, (n, figures, factors), and `weights` that sum to 1.

    `likelihood_power` is the power of the likelihood in the weights: below 1, hardly any machine showed the figures.
    """

    scores: Floats
    shown: Floats
    weights: Floats
    likelihood_power: float

    @property
    def effective(self) -> float:
        """The number of equally weighted machines that would say as much."""
        return float(1 / (self.weights**2).sum())


class Emulator:
    """A ridge regression of the logarithm of what is shown on a quadratic in the scores, of rows with `weights`."""

    def __init__(self, scores: Floats, shown: Floats, weights: Floats):
        features = _features(scores)
        logs = np.log(np.maximum(np.nan_to_num(shown, nan=1e-9), 1e-9))
        target = logs.reshape(len(scores), -1)
        weighted = features * weights[:, None]
        inverse = np.linalg.inv(features.T @ weighted + RIDGE * weights.sum() * np.eye(features.shape[1]))
        self._coefficients = inverse @ (weighted.T @ target)
        own = np.einsum("ij,jk,ik->i", weighted, inverse, features)  # leverage: what a point says of itself
        missed = (target - features @ self._coefficients) / (1 - own)[:, None]
        self._shape = shown.shape[1:]
        self.spread: Floats = np.sqrt(np.average(missed**2, axis=0, weights=weights)).reshape(self._shape)

    def __call__(self, scores: Floats) -> Floats:
        """What these machines would show, (n, figures, factors)."""
        logs = _features(scores) @ self._coefficients
        return np.exp(np.clip(logs, -20.0, 20.0)).reshape(len(scores), *self._shape)


def sample(
    draw: Callable[[np.random.Generator, int], Floats],
    simulate: Callable[[Floats, int], Floats],
    log_likelihood: Callable[[Floats, Floats | float], Floats],
    rng: np.random.Generator,
    budget: int,
    least_effective: float,
) -> Sample:
    """Simulate `budget` machines, and weigh them.

    `draw(rng, n)` gives the scores of n machines as they can be; `simulate(scores, first)` what they show, numbered
    from `first`; `log_likelihood(shown, spread)` its log-likelihood for each factor. Where fewer than `least_effective`
    machines would remain, the likelihood is likelihood_power until they do.
    """
    sizes = [int(n) for n in np.diff(np.rint(np.cumsum((0.0, *ROUNDS)) * budget)) if n > 0]
    chances: list[Callable[[Floats], Floats]] = []  # of each round, relative to `draw`
    simulated: list[Floats] = []
    results: list[Floats] = []
    for i, size in enumerate(sizes):
        pool = draw(rng, POOL)
        chance: Callable[[Floats], Floats] = _anywhere
        if i > 0:
            shown = np.concatenate(results)
            emulator = Emulator(np.concatenate(simulated), shown, _near(log_likelihood(shown, 0.0)))
            chance = _chance(emulator, log_likelihood, pool)
        probable = chance(pool)
        chosen = pool[rng.choice(POOL, size, p=probable / probable.sum())]
        results.append(simulate(chosen, sum(sizes[:i])))
        simulated.append(chosen)
        chances.append(chance)
    scores, shown = np.concatenate(simulated), np.concatenate(results)
    mixture = sum(size * chance(scores) for size, chance in zip(sizes, chances, strict=True))
    fit = _mean_likelihood(log_likelihood(shown, 0.0))
    power = _power(lambda power: power * fit - np.log(mixture), least_effective)
    return Sample(scores, shown, _normal(power * fit - np.log(mixture)), power)


def _chance(
    emulator: Emulator, log_likelihood: Callable[[Floats, Floats | float], Floats], pool: Floats
) -> Callable[[Floats], Floats]:
    """How much more probable than `draw` this round chooses a machine, as a function of its scores."""

    def foretold(scores: Floats) -> Floats:
        return _mean_likelihood(log_likelihood(emulator(scores), emulator.spread))

    fit = foretold(pool)
    power = _power(lambda power: power * fit, WIDTH)
    level = logsumexp(power * fit) - np.log(len(fit))

    def chance(scores: Floats) -> Floats:
        return np.asarray(ANYWHERE + (1 - ANYWHERE) * np.exp(power * foretold(scores) - level))

    return chance


def _near(by_factor: Floats) -> Floats:
    """How much a simulated machine says of those that show the figures: little, if it is far from showing them."""
    return np.asarray(1 / (1 - by_factor.max(axis=-1) / FAR))


def _anywhere(scores: Floats) -> Floats:
    return np.ones(len(scores))


def _mean_likelihood(by_factor: Floats) -> Floats:
    """Log of the likelihood, the latency onset factor averaged out."""
    return np.asarray(logsumexp(by_factor, axis=-1) - np.log(by_factor.shape[-1]))


def _normal(logs: Floats) -> Floats:
    weights = np.exp(logs - logs.max())
    return np.asarray(weights / weights.sum())


def _power(logs: Callable[[float], Floats], effective: float) -> float:
    """The largest power up to 1 of the likelihood that leaves `effective` machines; 0 if none does."""

    def enough(power: float) -> bool:
        return bool(1 / (_normal(logs(power)) ** 2).sum() >= effective)

    if enough(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return low


def _features(scores: Floats) -> Floats:
    i, j = np.triu_indices(scores.shape[1])
    return np.concatenate([np.ones((len(scores), 1)), scores, scores[:, i] * scores[:, j]], axis=1)

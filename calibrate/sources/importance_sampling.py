"""Adaptive importance sampling of machines that show published figures.

A simulation of a machine takes a tenth of a second, and about one in a hundred from the prior shows all figures. So
after each round a quadratic regression on all simulations so far, the emulator, predicts what any machine would show,
and the next round is drawn by that. The emulator only proposes: weights come from simulations, with the proposal
densities of all rounds in the denominator (deterministic mixture: Cornuet et al., Adaptive Multiple Importance
Sampling, 2012).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp

from calibrate.arrays import Floats

ROUNDS = (0.25, 0.2, 0.25, 0.3)  # shares of the budget of simulations
POOL = 20_000  # machines that a round is drawn from
PRIOR_SHARE = 0.1  # share of every round drawn from the prior, so that an error of the emulator excludes nothing
POOL_SIZE = 200  # least effective size of the pool under a proposal
RIDGE = 1e-3
FAR = 100.0  # −log-likelihood at which a machine has half its weight in the emulator


@dataclass(frozen=True)
class Sample:
    """Simulated machines: `scores` (n, d), what they `shown`, (n, figures, factors), and `weights` that sum to 1.

    `likelihood_power` is the exponent of the likelihood in the weights: below 1, hardly any machine showed the figures.
    """

    scores: Floats
    shown: Floats
    weights: Floats
    likelihood_power: float

    @property
    def effective(self) -> float:
        """The effective sample size of the weights (Kish)."""
        return float(1 / (self.weights**2).sum())

    @property
    def spread(self) -> Floats:
        """The weighted standard deviation of each score, (d,)."""
        return np.asarray(np.sqrt(self.weights @ (self.scores - self.weights @ self.scores) ** 2))


class Emulator:
    """A ridge regression of the log of what is shown on a quadratic of the scores, with `weights`; `spread` is its
    leave-one-out error."""

    def __init__(self, scores: Floats, shown: Floats, weights: Floats):
        features = _features(scores)
        logs = np.log(np.maximum(np.nan_to_num(shown, nan=1e-9), 1e-9))
        target = logs.reshape(len(scores), -1)
        weighted = features * weights[:, None]
        inverse = np.linalg.inv(features.T @ weighted + RIDGE * weights.sum() * np.eye(features.shape[1]))
        self._coefficients = inverse @ (weighted.T @ target)
        own = np.einsum("ij,jk,ik->i", weighted, inverse, features)  # leverage of each point
        errors = (target - features @ self._coefficients) / (1 - own)[:, None]
        self._shape = shown.shape[1:]
        self.spread: Floats = np.sqrt(np.average(errors**2, axis=0, weights=weights)).reshape(self._shape)

    def __call__(self, scores: Floats) -> Floats:
        """Predictions for these machines, (n, figures, factors)."""
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
    """Simulate `budget` machines in rounds, and weight them.

    `draw(rng, n)` gives scores from the prior, (n, d); `simulate(scores, first)` what they show, numbered from `first`;
    `log_likelihood(shown, spread)` its log-likelihood for each factor. Where the effective sample size would be below
    `least_effective`, the likelihood is raised to a power below 1.
    """
    sizes = [int(n) for n in np.diff(np.rint(np.cumsum((0.0, *ROUNDS)) * budget)) if n > 0]
    proposals: list[Callable[[Floats], Floats]] = []  # of each round, relative to the prior
    simulated: list[Floats] = []
    results: list[Floats] = []
    for i, size in enumerate(sizes):
        pool = draw(rng, POOL)
        proposal: Callable[[Floats], Floats] = _prior
        if i > 0:
            shown = np.concatenate(results)
            emulator = Emulator(np.concatenate(simulated), shown, _emulator_weights(log_likelihood(shown, 0.0)))
            proposal = _proposal(emulator, log_likelihood, pool)
        probable = proposal(pool)
        chosen = pool[rng.choice(POOL, size, p=probable / probable.sum())]
        results.append(simulate(chosen, sum(sizes[:i])))
        simulated.append(chosen)
        proposals.append(proposal)
    scores, shown = np.concatenate(simulated), np.concatenate(results)
    mixture = sum(size * proposal(scores) for size, proposal in zip(sizes, proposals, strict=True))
    fit = _mean_likelihood(log_likelihood(shown, 0.0))
    power = _power(lambda power: power * fit - np.log(mixture), least_effective)
    return Sample(scores, shown, _normalised(power * fit - np.log(mixture)), power)


def _proposal(
    emulator: Emulator, log_likelihood: Callable[[Floats, Floats | float], Floats], pool: Floats
) -> Callable[[Floats], Floats]:
    """The proposal of a round, as a density relative to the prior, of scores."""

    def predicted(scores: Floats) -> Floats:
        return _mean_likelihood(log_likelihood(emulator(scores), emulator.spread))

    fit = predicted(pool)
    power = _power(lambda power: power * fit, POOL_SIZE)
    level = logsumexp(power * fit) - np.log(len(fit))

    def proposal(scores: Floats) -> Floats:
        return np.asarray(PRIOR_SHARE + (1 - PRIOR_SHARE) * np.exp(power * predicted(scores) - level))

    return proposal


def _emulator_weights(by_factor: Floats) -> Floats:
    """Weights of simulated machines in the emulator: small for machines far from the figures."""
    return np.asarray(1 / (1 - by_factor.max(axis=-1) / FAR))


def _prior(scores: Floats) -> Floats:
    return np.ones(len(scores))


def _mean_likelihood(by_factor: Floats) -> Floats:
    """Log of the likelihood, averaged over the onset factor."""
    return np.asarray(logsumexp(by_factor, axis=-1) - np.log(by_factor.shape[-1]))


def _normalised(logs: Floats) -> Floats:
    weights = np.exp(logs - logs.max())
    return np.asarray(weights / weights.sum())


def _power(logs: Callable[[float], Floats], effective: float) -> float:
    """The largest exponent of the likelihood, up to 1, that leaves an effective sample size of `effective`; 0 if none
    does."""

    def enough(power: float) -> bool:
        return bool(1 / (_normalised(logs(power)) ** 2).sum() >= effective)

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

"""The prior of a machine given the published latencies of a single user, in standard normal coordinates.

The latency of a single user is linear in the step-time coefficients, and its rounding is tiny beside the prior:
rejection sampling would waste nearly every draw. So all coefficients but one per such figure are drawn, and the rest
are solved for; their own priors enter as weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from calibrate.arrays import Floats
from calibrate.sources import published_priors
from calibrate.sources.figures import is_single_user, profile, single_user_terms, title
from calibrate.sources.published_priors import Distribution
from calibrate.sources.static_batch import DECODE_TERMS, batch_terms
from sim.engines.tgi_0_9_4 import Flags
from sim.model.errors import BadInput
from sim.model.scenario import Figure, Hardware
from sim.model.server import Bounds

LEAST_SHARE = 1e-3  # share of drawn machines that must be able to have the single-user latencies
SOLVED = ("b0", "b3")  # determined by the first and the second single-user latency, given all else


def rough_scale(figures: Sequence[Figure]) -> float:
    """By what factor the figures' machine is slower than the median of the priors: the median over figures of a number
    of users, as if all users were one static batch."""
    ratios = []
    for figure in figures:
        of, users = profile(figure), figure.users
        what = figure.metric.partition("_")[0]
        if users is None or what not in ("e2e", "tpot", "rps", "output", "input"):
            continue
        middle = {
            name: float(distribution.at(np.zeros(1))[0]) for name, distribution in published_priors.STEP_TIMES.items()
        }
        terms = batch_terms(users, of.prompt_tokens, of.output_tokens)
        times = {name: float(x) * middle[name] for name, x in terms.items()}
        decode = sum(times[name] for name in DECODE_TERMS)
        answer = {"rps": 1.0, "output": float(of.output_tokens), "input": float(of.prompt_tokens)}
        if what == "tpot" and of.output_tokens > 1:
            ratios.append(figure.value * (of.output_tokens - 1) / decode)
        elif what == "e2e":
            ratios.append(figure.value / sum(times.values()))
        elif what in answer:
            ratios.append(users * answer[what] / figure.value / sum(times.values()))
    return float(np.median(ratios)) if ratios else 1.0


@dataclass(frozen=True)
class ConstrainedPrior:
    """Machines with the given single-user latencies, as points of standard normal scores.

    Each `free` parameter has a dimension of its own, mapped by its distribution, and so has the position of each
    single-user latency within its rounding. The `solved` coefficients follow; `fixed` parameters are known.
    """

    free: dict[str, Distribution]
    solved: tuple[str, ...]
    single: tuple[Figure, ...]
    fixed: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def of(figures: Sequence[Figure], server: Flags, machine: Hardware | None = None) -> ConstrainedPrior:
        """The prior for some figures on a server: single-user latencies of two profiles at most, others are left to
        sampling.

        A `machine` of another kind than the priors' is like them but for a common factor, `scale`.
        """
        single = list({profile(figure): figure for figure in figures if is_single_user(figure)}.values())[: len(SOLVED)]
        solved = SOLVED[: len(single)]
        free = {name: distribution for name, distribution in published_priors.STEP_TIMES.items() if name not in solved}
        if any(profile(figure).limit for figure in figures):
            free["output_attained"] = published_priors.OUTPUT_ATTAINED
        if machine is not None and not published_priors.of_the_kind(machine):
            free["scale"] = published_priors.LogNormal(rough_scale(figures), published_priors.SCALE_SIGMA)
        budget = server.max_batch_total_tokens
        fixed = {}
        if isinstance(budget, int):
            fixed["max_batch_total_tokens"] = float(budget)
        else:
            free["max_batch_total_tokens"] = (
                published_priors.Uniform(budget.low, budget.high)
                if isinstance(budget, Bounds)
                else published_priors.TOKEN_BUDGET
            )
        return ConstrainedPrior(free, solved, tuple(single), fixed)

    @property
    def dimensions(self) -> int:
        """The number of scores of a machine."""
        return len(self.free) + len(self.single)

    def draw(self, rng: np.random.Generator, n: int) -> Floats:
        """Scores of `n` machines, (n, dimensions), from the prior given the single-user latencies."""
        kept: list[Floats] = []
        while sum(map(len, kept)) < n:
            scores = rng.standard_normal((max(2 * n, 1000), self.dimensions))
            density = self._solve(scores)[1]
            kept.append(scores[rng.random(len(scores)) * self._densest < density])
        return np.concatenate(kept)[:n]

    def values(self, scores: Floats) -> dict[str, Floats]:
        """Every parameter of these machines, (n,) each."""
        return self._solve(scores)[0]

    def machines(self, scores: Floats) -> list[dict[str, float]]:
        """The same, one mapping for each machine."""
        values = self.values(scores)
        return [{name: float(column[i]) for name, column in values.items()} for i in range(len(scores))]

    def latencies(self, scores: Floats) -> Floats:
        """The single-user latencies of these machines, s, (figures, n)."""
        positions = published_priors.Uniform(-1.0, 1.0).at(scores[:, len(self.free) :])
        shown = [f.value + f.rounding * positions[:, i] for i, f in enumerate(self.single)]
        return np.array(shown).reshape(len(self.single), len(scores))

    @cached_property
    def _densest(self) -> float:
        """An upper bound of the density of the solved coefficients; `BadInput` where almost no machine is possible."""
        probe = self._solve(np.random.default_rng(0).standard_normal((20_000, self.dimensions)))[1]
        if np.count_nonzero(probe) < LEAST_SHARE * len(probe) or probe.mean() < LEAST_SHARE * probe.max():
            said = " and ".join(f"{title(figure)} of {figure.value:g} s" for figure in self.single)
            raise BadInput(f"no machine like {published_priors.KIND} shows {said}", key="published")
        return 1.2 * float(probe.max())

    def _solve(self, scores: Floats) -> tuple[dict[str, Floats], Floats]:
        """Parameters, and the density of the solved ones under their priors per second of latency."""
        values = {name: distribution.at(scores[:, i]) for i, (name, distribution) in enumerate(self.free.items())}
        values |= {name: np.full(len(scores), value) for name, value in self.fixed.items()}
        scale = values.pop("scale", np.ones(len(scores)))
        for name in published_priors.STEP_TIMES:
            if name in values:
                values[name] = values[name] * scale
        if not self.single:
            return values, np.ones(len(scores))
        attained = values.get("output_attained", np.ones(len(scores)))
        matrix = np.empty((len(scores), len(self.single), len(self.single)))
        left = self.latencies(scores).T.copy()
        for i, figure in enumerate(self.single):
            terms, clocks = single_user_terms(profile(figure), attained)
            left[:, i] -= clocks + sum(values[name] * terms[name] for name in terms if name in values)
            matrix[:, i] = np.array([terms[name] for name in self.solved]).T
        density = 1 / np.abs(np.linalg.det(matrix))
        for name, column in zip(self.solved, np.linalg.solve(matrix, left[..., None])[..., 0].T, strict=True):
            values[name] = column
            density = density * published_priors.STEP_TIMES[name].density(column / scale) / scale
        return values, density

"""Coverage study of the published source: made-up articles whose truth is known.

A machine is drawn from the priors; its four figures are simulated, rounded as an article rounds, and fitted. Then the
plateau of a third profile, which no figure mentions, is forecast from the draws. The true plateau should lie in the 90
% band in nine of ten trials.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from calibrate.sources import published_priors
from calibrate.sources.figures import FigureSimulator, Profile, single_user_terms
from calibrate.sources.published import calibrate_published
from sim.engines.tgi_0_9_4 import Flags
from sim.executors import Tell, silent
from sim.model.scenario import Figure, Scenario
from sim.results import rates
from sim.results.curve import Band, band, latency_onset, plateau

LONG_PROMPTS, LONG_ANSWERS, THIRD = (
    Profile(1500, 100, limit=True),
    Profile(50, 500, limit=True),
    Profile(300, 100, limit=True),
)
SERVER = Flags(max_batch_prefill_tokens=14_000, max_input_length=3_000, max_total_tokens=3_600)
TOP = (64, 128)  # the rungs among which the plateau is looked for
FORECASTS = 99


@dataclass(frozen=True)
class Trial:
    """One made-up article: the true plateau of the third profile, requests/s, and its forecast."""

    truth: float
    forecast: Band

    @property
    def inside(self) -> bool:
        """Whether the truth lies in the 90 % band."""
        return self.forecast.low <= self.truth <= self.forecast.high

    @property
    def width(self) -> float:
        """The band's width, relative to the truth."""
        return (self.forecast.high - self.forecast.low) / self.truth


def trial(number: int, tell: Tell = silent, *, seed: int, simulations: int, forecasts: int = FORECASTS) -> Trial:
    """Make up an article, fit it, and forecast the third profile from `forecasts` draws; reproducible by its
    numbers."""
    rng = np.random.default_rng([seed, number])
    machine, factor = draw_machine(rng)
    figures = article(machine, factor, (seed, number))
    scenario = Scenario(name="made-up", server=SERVER, published=figures)
    fitted = calibrate_published(scenario, seed + number, simulations=simulations, draws=forecasts)
    simulator = FigureSimulator((), SERVER, {})

    def reached(one: dict[str, float]) -> float:
        return plateau(rates.table(simulator.task(one, THIRD, TOP, (seed, number, 1)).run())).rps

    drawn = [{name: column[i] for name, column in fitted.draws.items()} for i in range(fitted.n_draws)]
    return Trial(reached(machine), band([reached(one) for one in drawn]))


def draw_machine(rng: np.random.Generator) -> tuple[dict[str, float], float]:
    """A machine from the priors, and the factor at which its authors see the latency onset."""
    prior = {
        **published_priors.STEP_TIMES,
        "output_attained": published_priors.OUTPUT_ATTAINED,
        "max_batch_total_tokens": published_priors.TOKEN_BUDGET,
    }
    machine = {name: float(distribution.at(rng.standard_normal(1))[0]) for name, distribution in prior.items()}
    return machine, float(published_priors.TAKEOFF.at(rng.standard_normal(1))[0])


def article(machine: dict[str, float], factor: float, seed: tuple[int, ...]) -> list[Figure]:
    """The four figures that an article would print of this machine, rounded as that article rounds."""
    figures = []
    for of, decimals in ((LONG_PROMPTS, 1), (LONG_ANSWERS, 0)):
        terms, clocks = single_user_terms(of, np.array([machine["output_attained"]]))
        latency = clocks + sum(machine[name] * float(times[0]) for name, times in terms.items())
        figures.append(_printed(of, "e2e_mean", latency, decimals, users=1))
    simulator = FigureSimulator(
        tuple(_printed(of, "rps_takeoff", 1.0, 1) for of in (LONG_PROMPTS, LONG_ANSWERS)), SERVER, {}
    )
    for of, users in simulator.ladders.items():
        table = rates.table(simulator.task(machine, of, users, (*seed, 0)).run())
        figures.append(_printed(of, "rps_takeoff", latency_onset(table, factor).rps, 1))
    return figures


def _printed(of: Profile, metric: str, value: float, decimals: int, users: int | None = None) -> Figure:
    return Figure(
        metric=metric,
        value=max(round(value, decimals), 10.0**-decimals),
        rounding=0.5 * 10.0**-decimals,
        source="made up",
        users=users,
        prompt_tokens=of.prompt_tokens,
        output_tokens=of.output_tokens,
        lengths="limit",
    )

"""Parameters from published figures, fitted through the simulator.

The prior of such a machine (`published_priors`) is combined with the figures. The latency of a single user has a closed
form, so machines are drawn that have it exactly (`constrained_prior`); those that show the figures of a ladder are
found by simulating it (`figures`, `importance_sampling`). The result is a set of draws, as wide as the prior where the
figures say nothing, which `diagnostics` reports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np

from calibrate.arrays import Floats, Ints
from calibrate.regression.draws import correlations, parameter, residual
from calibrate.schedule.rules import rules
from calibrate.sources import diagnostics, published_priors
from calibrate.sources.constrained_prior import ConstrainedPrior
from calibrate.sources.figures import (
    CLOCKS,
    FACTORS,
    FigureSimulator,
    is_single_user,
    log_likelihood,
    profile,
    resolve,
    single_user_terms,
    title,
)
from calibrate.sources.importance_sampling import sample
from sim.engines.catalog import identity
from sim.executors import IN_PROCESS, Executor, silent
from sim.model.calibration import Calibration, Source, SystemParameters
from sim.model.scenario import Figure, Scenario
from sim.steptime.linear import MEANING

SIMULATIONS = 500
DRAWS = 200
EFFECTIVE = 40.0  # least effective sample size
RESIMULATION = 10**6  # a seed beyond those of a fit


def calibrate_published(
    scenario: Scenario,
    seed: int,
    *,
    simulations: int = SIMULATIONS,
    draws: int = DRAWS,
    executor: Executor = IN_PROCESS,
    progress: Callable[[float], None] = silent,
) -> Calibration:
    """Fit the scenario's `published` figures on its server.

    The result depends on `seed`, `simulations` and `draws` only, whatever the executor. `progress` is called with the
    number of machines simulated. Raises `BadInput` for impossible figures and `CannotFit` for a profile that the server
    could not serve.
    """
    figures = resolve(scenario)
    prior = ConstrainedPrior.of(figures, rules(scenario.server), scenario.machine)
    ladder = [figure for figure in figures if figure not in prior.single]
    simulator = FigureSimulator(
        tuple(ladder), rules(scenario.server), {profile(figure): figure.value for figure in prior.single}
    )
    rng = np.random.default_rng([seed, 0])

    def simulate(scores: Floats, first: int) -> Floats:
        seeds = [(seed, 1, first + i) for i in range(len(scores))]
        return simulator.show(prior.machines(scores), seeds, executor, lambda done: progress(first + done))

    found = sample(prior.draw, simulate, partial(log_likelihood, ladder), rng, simulations, EFFECTIVE)
    rows = _resample(found.weights, draws, rng)
    factors = _factors(log_likelihood(ladder, found.shown[rows]) * found.likelihood_power, rng)
    shown = np.concatenate(
        [
            prior.latencies(found.scores[rows]).T,
            np.take_along_axis(found.shown[rows], factors[:, None, None], 2)[..., 0],
        ],
        axis=1,
    )
    ordered = [*prior.single, *ladder]
    columns = prior.values(found.scores[rows])
    if any(figure.metric == "rps_takeoff" for figure in ladder):
        columns["takeoff_factor"] = FACTORS[factors]
    columns = {
        name: columns[name] for name in (*published_priors.STEP_TIMES, *published_priors.MEANING) if name in columns
    }
    center = _center(np.array(list(columns.values())).T, shown, ordered)
    meaning = MEANING | published_priors.MEANING
    return Calibration(
        source=Source(kind="published", note=diagnostics.fitted(ordered, shown, center)),
        model="affine",
        machine=scenario.machine,
        engine=identity(scenario.server.engine, "scenario"),
        parameters={name: parameter(float(x[center]), x, *meaning[name]) for name, x in columns.items()},
        draws={name: x.tolist() for name, x in columns.items()},
        range=_range(simulator, {name: float(x[center]) for name, x in columns.items()} | _middle(columns), seed),
        residuals={
            title(figure): residual(shown[:, i] - figure.value, np.full(len(shown), figure.value))
            for i, figure in enumerate(ordered)
        },
        clocks=CLOCKS,
        correlations=correlations(list(columns), np.array(list(columns.values())).T),
        warnings=[
            *diagnostics.contradictions(ladder, found, shown[center], ordered),
            *diagnostics.not_identified(prior, found),
            *diagnostics.assumptions(scenario),
        ],
    )


class Shown(NamedTuple):
    """A printed figure, and its value on the calibrated machine: of the central values, and (draws,) of draws."""

    title: str
    figure: Figure
    central: float
    drawn: Floats


def resimulate(
    scenario: Scenario, calibration: Calibration, seed: int, draws: int, executor: Executor = IN_PROCESS
) -> list[Shown]:
    """Every published figure of the scenario as a calibration's central values and so many of its draws show it, with
    seeds that the fit has not used."""
    figures = resolve(scenario)
    alone = {profile(figure): figure.value for figure in figures if is_single_user(figure)}
    ladder = [figure for figure in figures if not is_single_user(figure)]
    simulator = FigureSimulator(tuple(ladder), rules(scenario.server), alone)
    rows = [int(i * calibration.n_draws / draws) for i in range(draws)] if calibration.n_draws else []
    machines = [calibration.values, *(calibration.row(i) for i in rows)]
    climbed = simulator.show(machines, [(seed, 1, RESIMULATION + i) for i in range(len(machines))], executor)
    found = []
    for figure in figures:
        if is_single_user(figure):
            values = [_alone(figure, machine) for machine in machines]
        else:
            at = ladder.index(figure)
            factors = [SystemParameters.of(machine).takeoff_factor or FACTORS[0] for machine in machines]
            cells = [int(np.abs(FACTORS - factor).argmin()) for factor in factors]
            values = [float(shown[at, cell]) for shown, cell in zip(climbed, cells, strict=True)]
        found.append(Shown(title(figure), figure, values[0], np.array(values[1:])))
    return found


def _alone(figure: Figure, machine: Mapping[str, float]) -> float:
    terms, clocks = single_user_terms(profile(figure), np.array([SystemParameters.of(machine).output_attained]))
    return clocks + sum(machine.get(name, 0.0) * float(times[0]) for name, times in terms.items())


def _resample(weights: Floats, draws: int, rng: np.random.Generator) -> Ints:
    """Indices in proportion to the weights (systematic resampling), (draws,)."""
    at = (np.arange(draws) + rng.random()) / draws
    rows = np.minimum(np.searchsorted(np.cumsum(weights), at), len(weights) - 1)
    return np.asarray(rng.permutation(rows), dtype=np.int64)


def _factors(fit: Floats, rng: np.random.Generator) -> Ints:
    """The onset factor of each draw, as an index into `FACTORS`, from its likelihood given what the machine shows."""
    chances = np.exp(fit - fit.max(axis=1, keepdims=True))
    below = np.cumsum(chances, axis=1)
    at = rng.random((len(fit), 1)) * below[:, -1:]
    return np.asarray((below < at).sum(axis=1), dtype=np.int64)


def _center(values: Floats, shown: Floats, figures: list[Figure]) -> int:
    """The draw nearest to the median and to the figures, among those within the tolerance of each figure (else among
    all).

    Medians of single parameters need not show the figures together; a draw does.
    """
    spread = values.std(axis=0)
    middle = (((values - np.median(values, axis=0)) / np.where(spread > 0, spread, 1.0)) ** 2).mean(axis=1)
    deviations = np.array([diagnostics.deviation(figure, shown[:, i]) for i, figure in enumerate(figures)])
    return int(np.lexsort((middle + (deviations**2).sum(axis=0), np.maximum(deviations.max(axis=0), 1.0)))[0])


def _middle(columns: dict[str, Floats]) -> dict[str, float]:
    """The median token budget: that of the central draw may be any that shows the figures, and would bound the
    range."""
    return {name: float(np.median(x)) for name, x in columns.items() if name == "max_batch_total_tokens"}


def _range(simulator: FigureSimulator, machine: dict[str, float], seed: int) -> dict[str, tuple[float, float]]:
    """What the ladders of the figures cover on the central machine."""
    visited: dict[str, list[float]] = {}
    for of, users in simulator.ladders.items():
        run = simulator.task(machine, of, users, (seed, 2)).run()
        assert run.steps is not None
        steps = run.steps
        decode = steps[steps["decode_sequences"] > 0]
        context = decode["decode_context"] + decode["decode_sequences"] * decode["count"]
        visited.setdefault("prompt_tokens", []).append(of.prompt_tokens)
        visited.setdefault("users", []).extend(users)
        for name, column in (
            ("batch_prefill_tokens", steps["prefill_tokens"][steps["decode_sequences"] == 0]),
            ("sequences", decode["decode_sequences"]),
            ("context_tokens", context),
        ):
            visited.setdefault(name, []).extend((float(column.min()), float(column.max())))
    return {name: (float(min(values)), float(max(values))) for name, values in visited.items()}

"""What a machine shows of published figures: single-user latency in closed form, the rest from a simulated ladder.

The latency of a single user is linear in the step-time coefficients, so that an article which prints it nearly fixes
one of them. A figure of a ladder is read off a simulated ladder by the functions that read a forecast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np
import pandas as pd
from scipy.special import log_ndtr

from calibrate.arrays import Floats
from calibrate.schedule.rules import rules
from calibrate.sources.published_priors import TAKEOFF
from calibrate.sources.static_batch import batch_terms
from sim.engines.tgi_0_9_4 import Flags
from sim.executors import IN_PROCESS, Executor, Tell, silent
from sim.model.calibration import Clocks, Delay, SystemParameters
from sim.model.errors import BadInput
from sim.model.machine import Machine
from sim.model.scenario import Figure, Load, Scenario
from sim.model.workload import Workload
from sim.replicate import Task
from sim.results import rates
from sim.results.curve import latency_onset, plateau
from sim.steptime.linear import step_time

USERS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
SECONDS = 120.0  # of every rung's window, and at least ANSWERS times a single user's latency
ANSWERS = 8
FACTORS = np.linspace(TAKEOFF.low, TAKEOFF.high, 28)[:-1] + (TAKEOFF.high - TAKEOFF.low) / 54  # middles of 27 cells
# Relative: so much does one machine's latency onset differ between ladders of other rungs, where users lock into other
# groups (`tools/check_takeoff_readings.py`). The article does not print its ladder.
READ_OFF_ERROR = 0.04
# Relative: what is measured at a number of users is known as well as a window is wanted to know it
# (`docs/measuring.md`).
WINDOW_ERROR = 0.02
# What no article prints. A load generator in Python, near the server, takes its answers one after another.
CLOCKS = Clocks(
    uplink=Delay(quantiles=[1e-3, 3e-3], per_token=1e-6),
    downlink=Delay(quantiles=[1e-3]),
    turnaround=Delay(quantiles=[1e-3, 5e-3]),
    spacing=Delay(quantiles=[1e-3]),
)


class Profile(NamedTuple):
    """Fixed lengths, tokens; with `limit`, answers may have ended earlier."""

    prompt_tokens: int
    output_tokens: int
    limit: bool = False


def profile(figure: Figure) -> Profile:
    """The lengths of a figure that `resolve` has completed."""
    assert figure.prompt_tokens is not None
    assert figure.output_tokens is not None
    return Profile(figure.prompt_tokens, figure.output_tokens, figure.lengths == "limit")


def is_single_user(figure: Figure) -> bool:
    """Whether a figure has a closed form: the mean latency of one user."""
    return figure.metric == "e2e_mean" and figure.users == 1


def title(figure: Figure) -> str:
    """The figure's name in a sentence."""
    at = "" if figure.users is None else f" at {figure.users} user{'s' if figure.users > 1 else ''}"
    return f"{figure.metric} of {figure.prompt_tokens}/{figure.output_tokens}{at}"


def resolve(scenario: Scenario) -> list[Figure]:
    """The scenario's published figures, each with its lengths (its own, else the workload's); `BadInput` where one has
    none."""
    figures = []
    for i, figure in enumerate(scenario.published):
        lengths = {}
        for name in ("prompt_tokens", "output_tokens"):
            value = getattr(figure, name)
            if value is None and scenario.workload.conversations is None:
                value = getattr(scenario.workload, name)
            if not isinstance(value, int):
                raise BadInput(
                    "expected a number of tokens: the figure's, or the workload's", key=f"published[{i}].{name}"
                )
            lengths[name] = value
        permits = rules(scenario.server).max_concurrent_requests
        if figure.users is not None and figure.users > permits:
            raise BadInput(
                f"expected at most server.max_concurrent_requests ({permits}): more are refused",
                key=f"published[{i}].users",
            )
        if is_single_user(figure) and lengths["output_tokens"] < 2:
            raise BadInput("expected 2 or more: one token shows no decode step", key=f"published[{i}].output_tokens")
        figures.append(msgspec.structs.replace(figure, **lengths))
    if not figures:
        raise BadInput("expected at least one figure to fit", key="published")
    return figures


def single_user_terms(of: Profile, attained: Floats) -> tuple[dict[str, Floats], float]:
    """The latency of a single user: what multiplies each coefficient, (shares,), for shares of the output attained, and
    the seconds of network and client."""
    tokens = np.maximum(1.0, np.round(of.output_tokens * (attained if of.limit else np.ones_like(attained))))
    clocks = CLOCKS.uplink, CLOCKS.downlink
    return batch_terms(1, of.prompt_tokens, tokens), sum(law.mean + law.per_token * of.prompt_tokens for law in clocks)


@dataclass(frozen=True)
class FigureSimulator:
    """Simulates `figures` that need a ladder, on the `server` they were measured on.

    `alone` is the latency of a single user, s, of the profiles where it is known.
    """

    figures: tuple[Figure, ...]
    server: Flags
    alone: dict[Profile, float]

    def task(self, machine: Mapping[str, float], of: Profile, users: Sequence[int], seed: tuple[int, ...]) -> Task:
        """One ladder of this machine, by its parameters' names."""
        system = SystemParameters.of(machine)
        attained = system.output_attained if of.limit else 1.0
        terms, clocks = single_user_terms(of, np.array([attained]))
        alone = clocks + sum(machine.get(name, 0.0) * float(times[0]) for name, times in terms.items())
        server = self.server
        if (budget := system.capacity(server.declared)) is not None:
            server = msgspec.structs.replace(server, max_batch_total_tokens=round(budget))
        load = Load(users=list(users), spawn_rate=1.0, seconds=max(SECONDS, ANSWERS * alone))
        workload = Workload(prompt_tokens=of.prompt_tokens, output_tokens=of.output_tokens)
        model = Machine(step_time("affine", machine), server, clocks=CLOCKS, output_attained=attained)
        return Task(Scenario(name="published", server=server, workload=workload, load=load), model, seed)

    def show(
        self,
        machines: Sequence[Mapping[str, float]],
        seeds: Sequence[tuple[int, ...]],
        executor: Executor = IN_PROCESS,
        progress: Callable[[float], None] = silent,
    ) -> Floats:
        """Every figure as each machine shows it, for each of `FACTORS`: (machines, figures, factors). `progress` hears
        how many machines have been simulated."""
        ladders = self.ladders
        each = [(machine, seed) for machine, seed in zip(machines, seeds, strict=True)]
        tasks = [self.task(machine, of, users, seed) for machine, seed in each for of, users in ladders.items()]
        tables = executor.run(_table, tasks, lambda done, _: progress(done / len(ladders)))
        shown = [self._read(dict(zip(ladders, tables[i * len(ladders) :], strict=False))) for i in range(len(machines))]
        return np.array(shown).reshape(len(machines), len(self.figures), len(FACTORS))

    def _read(self, tables: Mapping[Profile, pd.DataFrame]) -> Floats:
        shown = np.empty((len(self.figures), len(FACTORS)))
        for i, figure in enumerate(self.figures):
            table = tables[profile(figure)]
            if figure.metric == "rps_takeoff":
                shown[i] = [latency_onset(table, factor).rps for factor in FACTORS]
            elif figure.metric == "rps_plateau":
                shown[i] = plateau(table).rps
            else:
                shown[i] = table.loc[table["load"] == figure.users, figure.metric].iloc[0]
        return shown

    @property
    def ladders(self) -> dict[Profile, list[int]]:
        """The rungs that the figures of each profile need, from one user up."""
        found: dict[Profile, list[int]] = {}
        for figure in self.figures:
            of, alone = profile(figure), self.alone.get(profile(figure))
            if figure.users is not None:
                top = figure.users
            elif figure.metric == "rps_takeoff" and alone is not None:
                top = int(1.3 * figure.value * TAKEOFF.high * alone)  # users = RPS × latency; machines too fast by 1.3
            else:
                top = USERS[-1]
            least = next((n for n in USERS if n >= top), USERS[-1])
            users = {n for n in USERS if n <= least} | ({figure.users} if figure.users else set())
            found[of] = sorted({n for n in users if n <= self.server.max_concurrent_requests} | set(found.get(of, [])))
        return found


def _table(task: Task, tell: Tell) -> pd.DataFrame:
    return rates.table(task.run(tell))


def log_likelihood(figures: Sequence[Figure], shown: Floats, spread: Floats | float = 0.0) -> Floats:
    """Log-likelihood of simulated figures, (…, figures, factors), for each onset factor: (…, factors).

    A printed figure is anything within its rounding. Reading it off a plot adds `READ_OFF_ERROR`, measuring it
    `WINDOW_ERROR`, an emulator its own relative `spread`, (figures, factors).
    """
    value = np.array([figure.value for figure in figures])[:, None]
    rounding = np.array([figure.rounding for figure in figures])[:, None]
    read = np.array([WINDOW_ERROR if figure.users is not None else READ_OFF_ERROR for figure in figures])[:, None]
    sd = value * np.hypot(read, spread)
    # log of Φ((v+r-x)/s) - Φ((v-r-x)/s); by symmetry for x ≥ v, where neither loses its digits
    far = np.abs(np.nan_to_num(shown, nan=1e6, posinf=1e6) - value)
    upper, lower = log_ndtr((rounding - far) / sd), log_ndtr((-rounding - far) / sd)
    logs = upper + np.log1p(-np.exp(np.minimum(lower - upper, -1e-12)))
    return np.asarray(logs.sum(axis=-2))

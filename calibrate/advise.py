"""What to measure next: the load whose measurement would narrow a forecast most.

A calibration's draws answer the question differently; that spread is its band. A streamed measurement would show the
step times of the batches it visits, and the draws disagree about those too. Where both disagreements go together, the
measurement decides the question: the usual formula of a linear Gaussian update, with covariances over draws and the
machine's own moods as error of measurement, says by how much (Lindley, On a Measure of the Information Provided by an
Experiment, 1956).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

import msgspec
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sim import metrics
from sim.calibration import Calibration, Noise
from sim.forms import step_time
from sim.ladder import climb
from sim.model import draw_model
from sim.scenario import Load, Scenario
from sim.steps import DECODE, PREFILL
from sim.workload import Workload

Floats = NDArray[np.float64]

DRAWS = 60
SECONDS = 60.0
FLOOR = 1e-3  # relative: no step time is known better than that


@dataclass(frozen=True)
class Question:
    """A metric of a scenario at one number of users."""

    scenario: Scenario
    users: int
    metric: str = "e2e_mean"


@dataclass(frozen=True)
class Measurement:
    """A load that could be measured: a workload, concurrent users, and the length of the window, s."""

    workload: Workload
    users: int
    seconds: float = SECONDS


@dataclass(frozen=True)
class Advice:
    """A measurement and what it promises: the half-width of the question's 90 % band, relative, now and after it."""

    measurement: Measurement
    now: float
    after: float

    @property
    def gain(self) -> float:
        """The share of the band that goes away."""
        return 1.0 - self.after / self.now if self.now > 0 else 0.0


def advise(
    calibration: Calibration,
    question: Question,
    candidates: Sequence[Measurement],
    *,
    seed: int = 0,
    draws: int = DRAWS,
    executor: Executor | None = None,
) -> list[Advice]:
    """The candidates, the most useful first, at the cost of `draws` simulations of the question and one of each."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(calibration.n_draws)[:draws].tolist()
    ask = partial(_answer, calibration, question, seed)
    answers = np.log(np.array(list(executor.map(ask, chosen) if executor else map(ask, chosen))))
    told = ~np.isnan(answers)
    now = float(np.std(answers[told], ddof=1))
    found = []
    for candidate in candidates:
        shown, error = _shown(calibration, question.scenario, candidate, chosen, seed)
        after = _after(answers[told], shown[told], error)
        found.append(Advice(candidate, 1.645 * now, 1.645 * after))
    return sorted(found, key=lambda advice: advice.after)


def _answer(calibration: Calibration, question: Question, seed: int, draw: int) -> float:
    """The question's metric under one draw, without the noise that no calibration takes away."""
    scenario = _at(question.scenario, question.scenario.workload, question.users, SECONDS)
    one = _only(calibration, draw)
    table = metrics.table(climb(scenario, draw_model(one, scenario.server, None), (seed, 1)))
    return float(table[question.metric].iloc[-1])


def _shown(
    calibration: Calibration, scenario: Scenario, candidate: Measurement, draws: Sequence[int], seed: int
) -> tuple[Floats, Floats]:
    """Logs of the step times that the candidate would show, (draws, kinds), and how well it would show them.

    Which batches it visits is taken from the central machine; decode steps of small, middle and large contexts are told
    apart, since their slope is told too.
    """
    there = _at(scenario, candidate.workload, candidate.users, candidate.seconds)
    central = msgspec.structs.replace(calibration, draws={}, noise=Noise())
    steps = climb(there, draw_model(central, there.server, None), (seed, 2)).steps
    assert steps is not None
    groups = [steps[steps["kind"] == PREFILL]]
    decode = steps[steps["kind"] == DECODE]
    groups += [decode[part] for part in _thirds(decode["tokens"].to_numpy(np.float64))]
    groups = [group for group in groups if len(group)]
    values = np.array([[_mean(calibration, draw, group) for group in groups] for draw in draws])
    noise = calibration.noise
    windows = candidate.seconds / max(2.0 * noise.drift_seconds, 1e-9)
    mood = noise.between**2 + noise.drift**2 / max(windows, 1.0)
    counts = np.array([float(group["count"].sum()) for group in groups])
    single = np.array(
        [float(np.std(noise.prefill or [0.0]))] + [float(np.std(noise.decode or [0.0]))] * (len(groups) - 1)
    )
    return np.log(values), np.sqrt(single**2 / np.maximum(counts, 1.0) + mood + FLOOR**2)


def _thirds(size: Floats) -> list[NDArray[np.bool_]]:
    if not len(size):
        return []
    low, high = np.quantile(size, [1 / 3, 2 / 3])
    return [size <= low, (size > low) & (size <= high), size > high]


def _mean(calibration: Calibration, draw: int, steps: pd.DataFrame) -> float:
    """The mean step of some rows under one draw, s."""
    form = step_time(calibration.model, calibration.values | {k: c[draw] for k, c in calibration.draws.items()})
    total, count = 0.0, 0
    few = steps.iloc[np.unique(np.linspace(0, len(steps) - 1, 40).astype(np.int64))]
    columns = (few[c].tolist() for c in ("kind", "sequences", "tokens", "prompt_sq", "longest", "count"))
    for kind, sequences, tokens, squares, longest, n in zip(*columns, strict=True):
        if kind == PREFILL:
            total += form.prefill(sequences, tokens, squares, longest)
            count += 1
        else:
            first, growth = form.decode(sequences, tokens, longest)
            total += n * first + growth * n * (n - 1) / 2
            count += n
    return total / count


def _after(answers: Floats, shown: Floats, error: Floats) -> float:
    """The standard deviation of the answers that is left once `shown` is known up to `error`."""
    centred, x = answers - answers.mean(), shown - shown.mean(axis=0)
    n = len(answers)
    inner = x.T @ x / (n - 1) + np.diag(error**2)
    cross = x.T @ centred / (n - 1)
    variance = float(centred @ centred / (n - 1))
    explained = float(cross @ np.linalg.solve(inner, cross))
    # a fit of as many slopes as are shown explains some of any n answers by chance
    left = max(variance - explained, 0.0) * (n - 1) / max(n - 1 - len(error), 1)
    return float(np.sqrt(min(left, variance)))


def _at(scenario: Scenario, workload: Workload, users: int, seconds: float) -> Scenario:
    load = Load(users=[users], seconds=seconds, spawn_rate=max(1.0, users / 2))
    return msgspec.structs.replace(scenario, workload=workload, load=load)


def _only(calibration: Calibration, draw: int) -> Calibration:
    """The machine of one draw as if it were certain, without noise."""
    parameters = {
        name: msgspec.structs.replace(p, value=calibration.draws[name][draw]) if name in calibration.draws else p
        for name, p in calibration.parameters.items()
    }
    return msgspec.structs.replace(calibration, parameters=parameters, draws={}, noise=Noise())


def candidates(question: Question, seen: Sequence[Workload], seconds: float = SECONDS) -> list[Measurement]:
    """Loads worth considering: the question's own profile, those seen, and ones that tell prompt from answer."""
    asked = question.scenario.workload
    profiles = [asked, *seen]
    server = question.scenario.server
    if isinstance(asked.prompt_tokens, int) and isinstance(asked.output_tokens, int):
        prompt, output = asked.prompt_tokens, asked.output_tokens
        room = server.max_total_tokens - output
        for other in (max(16, prompt // 4), min(2 * prompt, server.max_input_length, room)):
            profiles.append(msgspec.structs.replace(asked, prompt_tokens=other))
    top = min(question.users, server.max_concurrent_requests)
    loads = sorted({1, max(1, top // 4), max(1, top // 2), top})
    different = [w for i, w in enumerate(profiles) if w not in profiles[:i] and w.empirical is None and w.trace is None]
    return [Measurement(workload, users, seconds) for workload in different for users in loads]

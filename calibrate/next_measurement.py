"""What to measure next: the load whose measurement would narrow a forecast most.

A calibration's draws answer a question differently, which is the forecast's band. A streamed measurement would show
step durations of the batches it visits, about which the draws disagree too. So the draws are updated as such a
measurement would, with drift as its error, and the question is simulated again. A linear map from step durations to the
answer would not do, because the answer jumps where they decide who shares a batch (preposterior analysis: Raiffa and
Schlaifer, Applied Statistical Decision Theory, 1961; update: Evensen, The Ensemble Kalman Filter, 2003).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import msgspec
import numpy as np
import pandas as pd

from calibrate.arrays import Bools, Floats
from sim.executors import IN_PROCESS, Executor, Tell
from sim.model.calibration import Calibration
from sim.model.machine import draw_machine
from sim.model.scenario import Scenario
from sim.model.server import EngineFlags
from sim.model.workload import RequestLengths, Workload
from sim.replicate import Task
from sim.results import metrics
from sim.steptime.linear import step_time
from sim.steptime.noise_parameters import Noise
from sim.steptime.work import StepWork

DRAWS = 60
TRUTHS, EACH = 9, 12
SECONDS = 60.0
LONGER, WORTH = 3.0, 0.9  # a window so many times as long, if what it leaves of the band is less than this share
HALF_BAND = 1.645  # standard deviations of a normal distribution: 90 % lie within
FLOOR = 1e-3  # relative: no step time is known better than that


@dataclass(frozen=True)
class Question:
    """A metric of a scenario at one number of users; `lengths` are the requests of its workload's file, if any."""

    scenario: Scenario
    users: int
    metric: str = "e2e_mean"
    lengths: RequestLengths | None = None


@dataclass(frozen=True)
class Measurement:
    """A load that could be measured: a workload (and its file's `lengths`), users, and the length of the window, s."""

    workload: Workload
    users: int
    seconds: float = SECONDS
    lengths: RequestLengths | None = None


@dataclass(frozen=True)
class Advice:
    """A measurement and what it promises: the half-width of the question's 90 % band, relative, now and after it.

    `after` is the median over what the measurement may show, `low` and `high` the best and the worst of it.
    """

    measurement: Measurement
    now: float
    after: float
    low: float
    high: float

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
    executor: Executor = IN_PROCESS,
) -> list[Advice]:
    """The candidates, the most useful first, at the cost of `TRUTHS * EACH` simulations of the question for each."""
    now = half_width(calibration, question, seed=seed, executor=executor)
    found = []
    for candidate in candidates:
        machines = _informed(calibration, question.scenario, candidate, seed)
        widths = _widths(_answers(machines, question, seed, executor).reshape(TRUTHS, EACH))
        after, low, high = np.minimum([np.median(widths), widths.min(), widths.max()], now).tolist()
        found.append(Advice(candidate, now, after, low, high))
    return sorted(found, key=lambda advice: advice.after)


def longer_window(
    advice: Advice, calibration: Calibration, question: Question, *, seed: int = 0, executor: Executor = IN_PROCESS
) -> Advice:
    """The same load with a window `LONGER` times as long, if that leaves a band a tenth narrower: a longer window
    averages drift, but no run effect."""
    window = replace(advice.measurement, seconds=LONGER * advice.measurement.seconds)
    (longer,) = advise(calibration, question, [window], seed=seed, executor=executor)
    return longer if longer.after < WORTH * advice.after else advice


def half_width(
    calibration: Calibration, question: Question, *, seed: int = 0, executor: Executor = IN_PROCESS
) -> float:
    """Half the width of the question's 90 % band, relative, without the noise that no calibration removes."""
    chosen = np.random.default_rng(seed).permutation(calibration.n_draws)[:DRAWS].tolist()
    machines = [_certain(calibration, {name: x[draw] for name, x in calibration.draws.items()}) for draw in chosen]
    return float(_widths(_answers(machines, question, seed, executor)))


def _widths(answers: Floats) -> Floats:
    """Half the width of a 90 % band, relative, along the last axis; machines without an answer do not count."""
    return np.asarray(HALF_BAND * np.nanstd(np.log(answers), axis=-1, ddof=1))


def _answers(machines: Sequence[Calibration], question: Question, seed: int, executor: Executor) -> Floats:
    """The question's metric on every machine."""
    scenario = _at(question.scenario, question.scenario.workload, question.users, SECONDS)
    tasks = [Task(scenario, draw_machine(one, scenario.server, None), (seed, 1), question.lengths) for one in machines]
    return np.array(executor.run(partial(_answer, question.metric), tasks))


def _answer(metric: str, task: Task, tell: Tell) -> float:
    return float(metrics.table(task.run(tell))[metric].iloc[-1])


def _informed(calibration: Calibration, scenario: Scenario, candidate: Measurement, seed: int) -> list[Calibration]:
    """Machines that remain possible after the measurement: `EACH` for each of `TRUTHS` draws taken as the truth.

    Step durations are linear in the parameters, so covariances over draws say how far a draw moves to agree with the
    measurement of the truth. Each sees it with an error of its own, which keeps the spread that a measurement would
    leave.
    """
    rng = np.random.default_rng([seed, 5])
    names = list(calibration.draws)
    drawn = np.array([calibration.draws[name] for name in names]).T
    shown, error = _measured(calibration, scenario, candidate, seed)
    x, y = drawn - drawn.mean(axis=0), shown - shown.mean(axis=0)
    gain = np.linalg.solve(y.T @ y / (len(y) - 1) + np.diag(error**2), y.T @ x / (len(y) - 1))
    machines = []
    for truth in rng.permutation(len(drawn))[:TRUTHS]:
        others = rng.choice(len(drawn), EACH, replace=len(drawn) < EACH)
        seen = shown[truth] + error * rng.standard_normal((EACH, len(error)))
        moved = np.clip(drawn[others] + (seen - shown[others]) @ gain, drawn.min(axis=0), drawn.max(axis=0))
        machines += [_certain(calibration, dict(zip(names, values, strict=True))) for values in moved.tolist()]
    return machines


def _measured(calibration: Calibration, scenario: Scenario, candidate: Measurement, seed: int) -> tuple[Floats, Floats]:
    """The step durations that the candidate would measure, (draws, kinds), relative to the central ones, and their
    relative error, (kinds,).

    The batches it visits are those of the central machine; decode steps of small, middle and large contexts are told
    apart, because their slope is measured too.
    """
    there = _at(scenario, candidate.workload, candidate.users, candidate.seconds)
    central = msgspec.structs.replace(calibration, draws={}, noise=Noise())
    steps = Task(there, draw_machine(central, there.server, None), (seed, 2), candidate.lengths).run().steps
    assert steps is not None
    decode = steps[steps["decode_sequences"] > 0]
    groups = [steps[steps["decode_sequences"] == 0]]
    groups += [decode[part] for part in _thirds(decode["decode_context"].to_numpy(np.float64))]
    groups = [group for group in groups if len(group)]
    expected = np.array([_mean(central, group) for group in groups])
    draws = [dict(zip(calibration.draws, x, strict=True)) for x in zip(*calibration.draws.values(), strict=True)]
    values = np.array([[_mean(_certain(calibration, draw), group) for group in groups] for draw in draws])
    noise = calibration.noise
    windows = candidate.seconds / max(2.0 * noise.drift_seconds, 1e-9)
    share = np.array([noise.prefill_share] + [1.0] * (len(groups) - 1))
    shared = share**2 * (noise.between**2 + noise.drift**2 / max(windows, 1.0))
    counts = np.array([float(group["count"].sum()) for group in groups])
    single = np.array(
        [float(np.std(noise.prefill or [0.0]))] + [float(np.std(noise.decode or [0.0]))] * (len(groups) - 1)
    )
    return values / expected - 1.0, np.sqrt(single**2 / np.maximum(counts, 1.0) + shared + FLOOR**2)


def _thirds(size: Floats) -> list[Bools]:
    if not len(size):
        return []
    low, high = np.quantile(size, [1 / 3, 2 / 3])
    return [size <= low, (size > low) & (size <= high), size > high]


def _mean(machine: Calibration, steps: pd.DataFrame) -> float:
    """The mean step of some rows on a machine, s."""
    form = step_time(machine.model, machine.values)
    total, count = 0.0, 0
    few = steps.iloc[np.unique(np.linspace(0, len(steps) - 1, 40).astype(np.int64))]
    for n, *counts in zip(*(few[c].tolist() for c in ("count", *StepWork.__struct_fields__)), strict=True):
        work = StepWork(*counts)
        line = form.line(work, StepWork(decode_context=work.decode_sequences, decode_longest=1), n)
        total += n * line.first + line.growth * n * (n - 1) / 2
        count += n
    return total / count


def _at(scenario: Scenario, workload: Workload, users: int, seconds: float) -> Scenario:
    load = msgspec.structs.replace(
        scenario.load, users=[users], rate=None, trace=False, seconds=seconds, spawn_rate=max(1.0, users / 2)
    )
    return msgspec.structs.replace(scenario, workload=workload, load=load)


def _certain(calibration: Calibration, values: Mapping[str, float]) -> Calibration:
    """The machine with these values as if they were certain, without noise."""
    parameters = {
        name: msgspec.structs.replace(p, value=values.get(name, p.value)) for name, p in calibration.parameters.items()
    }
    return msgspec.structs.replace(calibration, parameters=parameters, draws={}, noise=Noise())


def candidates(question: Question, seen: Sequence[Workload], seconds: float = SECONDS) -> list[Measurement]:
    """Loads to consider: of the question's own profile, of those measured, and of ones that tell prompt from answer."""
    asked = question.scenario.workload
    profiles = [asked, *seen]
    server = question.scenario.server
    if isinstance(asked.prompt_tokens, int) and isinstance(asked.output_tokens, int):
        prompt, output = asked.prompt_tokens, asked.output_tokens
        for other in (max(16, prompt // 4), _longest(server, prompt, output)):
            profiles.append(msgspec.structs.replace(asked, prompt_tokens=other))
    top = min(question.users, server.permits or question.users)
    loads = sorted({1, max(1, top // 4), max(1, top // 2), top})
    different = [w for i, w in enumerate(profiles) if w not in profiles[:i] and w.prompt_tokens is not None]
    found = [Measurement(workload, users, seconds) for workload in different for users in loads]
    if question.lengths is not None:
        found = [Measurement(asked, users, seconds, question.lengths) for users in loads] + found
    return found


def _longest(server: EngineFlags, prompt: int, output: int) -> int:
    """The longest prompt, of up to twice this one, that the server takes with an answer of `output` tokens."""

    def too_long(tokens: int) -> bool:
        return server.refuses(tokens, output) or server.allowed(tokens, output) < output

    tokens = range(prompt, 2 * prompt + 1)
    return tokens[max(0, bisect_left(tokens, True, key=too_long) - 1)]

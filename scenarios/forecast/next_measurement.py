"""What to measure next: the loads whose measurement would narrow a forecast most, as sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from calibrate.next_measurement import Advice, Question, advise, candidates, longer_window
from sim.cluster.replay import asked_of
from sim.executors import Executor
from sim.model.calibration import Calibration
from sim.model.errors import BadInput
from sim.model.files.lengths import read_lengths
from sim.model.scenario import Scenario
from sim.model.workload import RequestLengths, Workload
from sim.run import Run

BEYOND = 1.5  # without a question: the load half as high again as the highest that was measured
SHOWN = 3


def next_measurements(
    calibration: Calibration,
    runs: Sequence[Run],
    question: Question,
    executor: Executor,
    seed: int,
    *,
    quick: bool = False,
) -> list[str]:
    """A line for each of the best measurements, the best first; `quick`: of the two highest loads of the question's own
    profile the better one."""
    if not calibration.draws:
        raise BadInput("expected a calibration with draws: without them nothing says what is uncertain")
    possible = candidates(question, [run.scenario.workload for run in runs])
    if quick:
        own = [one for one in possible if one.workload == question.scenario.workload]
        possible = sorted(own, key=lambda one: one.users)[-2:]
        return [_said(advise(calibration, question, possible, seed=seed, executor=executor)[0], question)]
    first, *others = advise(calibration, question, possible, seed=seed, executor=executor)
    first = longer_window(first, calibration, question, seed=seed, executor=executor)
    return [_said(advice, question) for advice in (first, *others[: SHOWN - 1])]


def question_of(runs: Sequence[Run], asked: Scenario | None = None, file: str | None = None) -> Question:
    """What the advice is for: the user's question (from `file`) at its highest number of users, or without one the last
    run's profile beyond the loads measured. `BadInput` where there are no users."""
    if asked is not None:
        if not asked.load.users:
            raise BadInput("expected numbers of users; advice is about closed-loop loads", path=file, key="load.users")
        return Question(asked, max(asked.load.users), lengths=read_lengths(asked.workload))
    run = runs[-1]
    top = max((rung.users for rung in run.rungs if rung.users is not None), default=0)
    if not top:
        raise BadInput("expected a run with numbers of users, or --question SCENARIO", path=run.path)
    scenario, users = msgspec.structs.replace(run.scenario, server=run.server), math.ceil(BEYOND * top)
    lengths = None
    if run.scenario.workload.prompt_tokens is None:  # its file need not be here any more, but what it asked is
        prompt, back, charged = np.array([spec[:3] for spec in asked_of(run.requests)], dtype=np.int64).T
        lengths = RequestLengths(prompt, back, charged)
    return Question(scenario, users, lengths=lengths)


def _said(advice: Advice, question: Question) -> str:
    load = advice.measurement
    return (
        f"Measure {load.users} users of {_profile(load.workload)} for {load.seconds:.0f} s: the mean latency at "
        f"{question.users} users of {_profile(question.scenario.workload)} would be known to ±{advice.after:.1%} "
        f"(±{advice.low:.1%} to ±{advice.high:.1%}, by what it shows) instead of ±{advice.now:.1%}."
    )


def _profile(workload: Workload) -> str:
    if isinstance(workload.prompt_tokens, int) and isinstance(workload.output_tokens, int):
        return f"{workload.prompt_tokens}/{workload.output_tokens} tokens"
    return "the same mix"

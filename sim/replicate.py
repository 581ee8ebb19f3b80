"""A replicate: one simulation of a scenario, or replay of a recorded run, with a draw of a calibration and a seed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from sim.cluster.ladder import climb
from sim.cluster.replay import replay
from sim.executors import Tell, silent
from sim.model.calibration import Calibration, SystemParameters, check_suits, read_calibration
from sim.model.machine import Draw, Machine, draw_machine
from sim.model.scenario import Scenario
from sim.model.workload import RequestLengths
from sim.results.curve import TAKEOFF_FACTOR
from sim.run import Run


@dataclass(frozen=True)
class Task:
    """Simulates the ladder of a scenario, or replays a recorded run, on a model; the result depends on these alone.

    `lengths` are the requests of the scenario's workload file, if it names one, and `groups` the machines of the groups
    of its fleet, if it has some.
    """

    of: Scenario | Run
    model: Machine
    seed: tuple[int, ...]
    lengths: RequestLengths | None = None
    groups: tuple[Machine, ...] = ()

    def run(self, tell: Tell = silent, *, members: bool = False) -> Run:
        """Simulate it; `tell` gets the share of a ladder that is done, and with `members` steps hold their requests."""
        if isinstance(self.of, Run):
            return replay(self.of, self.model, self.seed)
        return climb(self.of, self.model, self.seed, self.lengths, members=members, progress=tell, groups=self.groups)


def tasks_for(
    of: Scenario | Run,
    calibration: Calibration,
    seed: int,
    numbers: Iterable[int],
    lengths: RequestLengths | None = None,
) -> list[Task]:
    """A task for each number: 0 has the central values of the calibration, the others a draw each. Groups of a fleet
    share it, unless they have a calibration of their own, which is read here."""
    server, scenario = of.server, of.scenario if isinstance(of, Run) else of
    groups = [] if scenario.fleet is None else scenario.fleet.groups
    of_groups = [read_calibration(group.calibration) if group.calibration else calibration for group in groups]
    for group, own in zip(groups, of_groups, strict=True):
        if group.calibration:
            check_suits(own, server.declared, None, group.calibration)
    tasks = []
    for number in numbers:
        draw = draw_of(seed, number)
        machines = (
            draw_machine(
                own,
                group.server or server,
                replace(draw, of=place + 1) if draw is not None and group.calibration else draw,
                scenario.machine if group.calibration is None else None,
            )
            for place, (group, own) in enumerate(zip(groups, of_groups, strict=True))
        )
        model = draw_machine(calibration, server, draw, scenario.machine)
        tasks.append(Task(of, model, (seed, number), lengths, tuple(machines)))
    return tasks


def takeoff_factor(calibration: Calibration, seed: int, number: int) -> float:
    """The factor at which this replicate sees latency take off: a judgement by eye, so drawn.

    A calibration from published figures has draws of it, joint with the other parameters.
    """
    draw = draw_of(seed, number)
    values = calibration.values if draw is None else draw.values(calibration)
    if (factor := SystemParameters.of(values).takeoff_factor) is not None:
        return factor
    return float(np.random.default_rng([seed, number, 4]).uniform(*TAKEOFF_FACTOR))


def draw_of(seed: int, number: int) -> Draw | None:
    """The draw of a replicate; None for the central values."""
    return None if number == 0 else Draw(seed, number)

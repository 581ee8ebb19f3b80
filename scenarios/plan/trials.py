"""Trials of options, simulated together and never twice: a cache keyed by what an outcome depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec

from scenarios.load.options import Option
from scenarios.plan import traffic
from scenarios.plan.trial import Outcome, Trial, run_trial
from sim.executors import IN_PROCESS, Executor
from sim.model.calibration import Calibration
from sim.model.files.lengths import read_lengths
from sim.model.machine import draw_machine
from sim.model.scenario import Scenario
from sim.model.workload import RequestLengths, Workload
from sim.replicate import Task, draw_of

R = TypeVar("R")


class Setting(NamedTuple):
    """What is tried: an option with a number of replicas, under a multiple of its traffic and of its answers' lengths.

    `slo` are the limits by metric.
    """

    option: Option
    replicas: int
    slo: tuple[tuple[str, float], ...]
    traffic: float = 1.0
    answers: float = 1.0


Wanted = Sequence[tuple[Setting, int]]  # with the number of the draw
Search = Generator[Wanted, Sequence[Outcome], R]


class Trials:
    """Runs trials. Draw 0 has the central values of a calibration, the others a joint draw each; all options are given
    the same random numbers."""

    def __init__(
        self,
        calibrations: Mapping[str, Calibration],
        seed: int,
        period: float,
        executor: Executor = IN_PROCESS,
        progress: Callable[[str, float, int], None] = lambda what, done, total: None,
    ):
        """`calibrations` are those of the options, by name."""
        self.seed = seed
        self._calibrations, self._period = calibrations, period
        self._executor, self._progress = executor, progress
        self._digests = {name: _digest(calibration) for name, calibration in calibrations.items()}
        self._lengths: dict[bytes, RequestLengths | None] = {}
        self._known: dict[str, Outcome] = {}
        self._done = 0

    @property
    def simulated(self) -> int:
        """How many trials were simulated."""
        return len(self._known)

    def run(self, wanted: Wanted) -> list[Outcome]:
        """The outcome of each; those that are not known yet are simulated together."""
        keys, missing = [], dict[str, tuple[Setting, int]]()
        for setting, draw in wanted:
            key = self._key(setting, draw)
            keys.append(key)
            if key not in self._known:
                missing[key] = setting, draw
        trials = [self._trial(*each) for each in missing.values()]
        before = len(self._known)

        def tell(done: float, total: int) -> None:
            self._progress("simulating options", before + done, before + total)

        for key, outcome in zip(missing, self._executor.run(run_trial, trials, tell), strict=True):
            self._known[key] = outcome
        return [self._known[key] for key in keys]

    def together(self, searches: Sequence[Search[R]]) -> list[R]:
        """What each search finds. What they want next is simulated in one batch, so no order matters."""
        results: dict[int, R] = {}
        wanted: dict[int, Wanted] = {}

        def go_on(i: int, outcomes: Sequence[Outcome] | None) -> None:
            try:
                wanted[i] = searches[i].send(outcomes)  # type: ignore[arg-type]
            except StopIteration as e:
                wanted.pop(i, None)
                results[i] = e.value

        for i in range(len(searches)):
            go_on(i, None)
        while wanted:
            batch = {i: list(each) for i, each in wanted.items()}
            outcomes = iter(self.run([one for each in batch.values() for one in each]))
            for i, each in batch.items():
                go_on(i, [next(outcomes) for _ in each])
        return [results[i] for i in range(len(searches))]

    def scenario(self, setting: Setting) -> tuple[Scenario, RequestLengths | None]:
        """The scenario of a setting as it is simulated, and the requests of its workload's file."""
        scenario, lengths, _ = self._cut(setting)
        return (
            traffic.longer_answers(scenario, lengths, setting.answers) if setting.answers != 1 else (scenario, lengths)
        )

    def left_out(self, setting: Setting) -> str | None:
        """What of a setting's traffic is not simulated, in words."""
        return self._cut(setting)[2]

    def _cut(self, setting: Setting) -> tuple[Scenario, RequestLengths | None, str | None]:
        scenario = traffic.times(with_replicas(setting.option.scenario, setting.replicas), setting.traffic)
        return traffic.representative(scenario, self._read(scenario.workload), self._period)

    def calibration(self, option: Option) -> Calibration:
        """Whose draws an option has."""
        return self._calibrations[option.name]

    def _trial(self, setting: Setting, draw: int) -> Trial:
        scenario, lengths = self.scenario(setting)
        calibration = self._calibrations[setting.option.name]
        machine = draw_machine(calibration, scenario.server, draw_of(self.seed, draw), scenario.machine)
        period = traffic.share_of_hours(scenario) * self._period
        return Trial(Task(scenario, machine, (self.seed, draw), lengths), dict(setting.slo), period)

    def _key(self, setting: Setting, draw: int) -> str:
        scenario, _ = self.scenario(setting)
        asked = msgspec.structs.replace(
            scenario, name="-", description="", slo={}, goal=None, price=None, warnings=[], published=[], tolerances={},
            calibration=None, table=None, launch=None, written=msgspec.UNSET,
        )  # fmt: skip
        values = (asked, self._digests[setting.option.name], self.seed, draw, setting.slo, setting.answers)
        return hashlib.sha256(msgspec.json.encode((*values, self._period))).hexdigest()

    def _read(self, workload: Workload) -> RequestLengths | None:
        key = msgspec.json.encode(workload)
        if key not in self._lengths:
            self._lengths[key] = read_lengths(workload)
        return self._lengths[key]


def _digest(calibration: Calibration) -> str:
    kept: Any = msgspec.structs.replace(calibration, warnings=[], check=None)
    return hashlib.sha256(msgspec.json.encode(kept)).hexdigest()


def with_replicas(scenario: Scenario, replicas: int) -> Scenario:
    """The scenario with so many replicas; outages of others do not happen."""
    if scenario.fleet is None:
        return msgspec.structs.replace(scenario, replicas=replicas)
    outages = [each for each in scenario.fleet.outages if each.replica < replicas]
    fleet = msgspec.structs.replace(scenario.fleet, replicas=replicas, outages=outages)
    return msgspec.structs.replace(scenario, fleet=fleet)

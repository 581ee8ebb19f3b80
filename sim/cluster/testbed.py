"""One simulated server with its clients: what a ladder climbs and a replay repeats."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from sim.cluster.clients import FOR_EVER, Clients, Patience
from sim.cluster.clock import Clock
from sim.cluster.frontend import FrontEnd
from sim.cluster.replica import Replica
from sim.cluster.sessions import SessionSource
from sim.engines.catalog import identity, scheduler
from sim.model.errors import BadInput
from sim.model.machine import Machine
from sim.model.scenario import Scenario
from sim.model.steps import Call
from sim.model.workload import RequestLengths, Source
from sim.run import Run, Rung
from sim.steptime.noise import Noise


class Bench:
    """One server, its clients, and the rungs so far; with `members`, the steps keep the ids of their requests."""

    def __init__(
        self,
        scenario: Scenario,
        model: Machine,
        seed: Sequence[int],
        source: Source,
        start: float = 0.0,
        busy_until: float = 0.0,
        *,
        members: bool = False,
        patience: Patience = FOR_EVER,
        lengths: RequestLengths | None = None,
    ):
        if scenario.replicas != 1:
            raise BadInput(f"expected 1, found {scenario.replicas}: fleets are not simulated yet", key="replicas")
        self.scenario, self.model = scenario, model
        self.seed = seed
        self.clock = Clock(initial_time=start)
        self.clients = Clients(
            self.clock,
            source,
            model.clocks,
            seed,
            sessions=SessionSource.of(scenario.workload, model.server, seed, lengths, model.output_attained),
            think=scenario.load.think,
            retry=scenario.load.retry,
            patience=patience,
            classes=[each.name for each in scenario.workload.classes],
        )
        self.clients.server = front = FrontEnd(
            self.clock,
            self.clients.ended,
            model.server.permits,
            model.server.declared.tokenizer_workers,
            model.clocks.uplink.per_token,
            model.server.allowed,
        )
        noise = None if model.noise.silent else Noise(model.noise, seed)
        self.replica = Replica(
            self.clock,
            scheduler(model.server),
            model.step_time,
            front.ended,
            noise,
            busy_until=busy_until,
        )
        front.replica = self.replica
        self.rungs: list[Rung] = []
        self._members: list[list[int]] = []
        if members:
            self.replica.on_call = self._on_call

    def _on_call(self, call: Call) -> None:
        if call.op != "filter" and call.members:  # a step with nothing to run has no row
            self._members.append([r.id for r in call.members])

    def run(self) -> Run:
        """End the run now, and say what happened."""
        self.clients.abort()
        self.replica.stop()
        steps = self.replica.step_table()
        if self._members:
            steps["members"] = self._members
        return Run(
            kind="simulated",
            name=self.scenario.name,
            scenario=msgspec.structs.replace(self.scenario, server=self.model.server),
            rungs=self.rungs,
            requests=self.clients.log.table([rung.start for rung in self.rungs]),
            steps=steps,
            step_ends=self.replica.step_ends,
            stopped="all rungs of the list are done",
            engine=identity(self.model.server.engine, "scenario"),
        )

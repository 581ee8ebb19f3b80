"""A simulated server, or a fleet of them, with its clients: what a ladder climbs and a replay repeats."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain

import msgspec
import pandas as pd

from sim.cluster.balancers.policies import READ_STATE, balancer_of
from sim.cluster.clients import FOR_EVER, Clients, Patience
from sim.cluster.clock import Clock
from sim.cluster.fleet import Fleet
from sim.cluster.frontend import FrontEnd
from sim.cluster.replica import Replica
from sim.cluster.sessions import SessionSource
from sim.engines.catalog import identity, scheduler
from sim.model import fleet
from sim.model.errors import BadInput
from sim.model.machine import Machine
from sim.model.scenario import Scenario
from sim.model.steps import Call
from sim.model.workload import RequestLengths, Source
from sim.run import Run, Rung
from sim.steptime.noise import Noise


class Bench:
    """A server or a fleet, its clients, and the rungs so far; with `members`, steps keep the ids of their requests."""

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
        groups: Sequence[Machine] = (),
    ):
        """`groups` are the machines of the groups of a fleet; without them, all replicas are like `model`."""
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
        self._fronts: list[FrontEnd] = []
        self.replicas: list[Replica] = []
        if scenario.served_by.groups and not groups:
            raise BadInput("expected none: only `servecast simulate` takes groups of replicas", key="fleet.groups")
        self._groups = groups or [model] * len(scenario.groups)
        self._machines = [
            machine for machine, group in zip(self._groups, scenario.groups, strict=True) for _ in range(group.replicas)
        ]
        for machine in self._machines:
            self._add_replica(machine, busy_until)
        self.clients.server = self._fronts[0] if scenario.alone else self._fleet(scenario.served_by)
        self.rungs: list[Rung] = []
        self._members: list[list[list[int]]] = [[] for _ in self.replicas]
        if members:
            for replica, of in zip(self.replicas, self._members, strict=True):
                replica.on_call = partial(_note_members, of)

    def _add_replica(self, model: Machine, busy_until: float) -> None:
        index, server = len(self.replicas), model.server
        front = FrontEnd(
            self.clock,
            self.clients.ended,
            server.permits,
            server.declared.tokenizer_workers,
            model.clocks.uplink.per_token,
            server.allowed,
            index,
        )
        front.replica = Replica(
            self.clock,
            scheduler(server),
            model.step_time,
            front.ended,
            None if model.noise.silent else Noise(model.noise, self.seed, index),
            busy_until=busy_until,
            index=index,
        )
        self._fronts.append(front)
        self.replicas.append(front.replica)

    def _fleet(self, spec: fleet.Fleet) -> Fleet:
        made = Fleet(
            self.clock,
            self._fronts,
            balancer_of(spec, self.seed),
            self.clients.ended,
            in_flight=self.clients.in_flight,
            per_connection=spec.per == "connection",
            scrape_seconds=spec.scrape_seconds if spec.balancer.policy in READ_STATE else None,
        )
        engines = [partial(scheduler, machine.server) for machine in self._machines]
        made.plan_outages(spec.outages, spec.detection.active, engines)
        return made

    def run(self) -> Run:
        """End the run now, and say what happened."""
        self.clients.abort()
        for replica in self.replicas:
            replica.stop()
        steps = pd.concat([replica.step_table() for replica in self.replicas], ignore_index=True)
        if any(self._members):
            steps["members"] = list(chain.from_iterable(self._members))
        return Run(
            kind="simulated",
            name=self.scenario.name,
            scenario=self._settled(),
            rungs=self.rungs,
            requests=self.clients.log.table([rung.start for rung in self.rungs]),
            steps=steps,
            step_ends=list(chain.from_iterable(replica.step_ends for replica in self.replicas)),
            stopped="all rungs of the list are done",
            engine=identity(self.model.server.engine, "scenario"),
        )

    def _settled(self) -> Scenario:
        """The scenario with the flags that its servers had."""
        spec = self.scenario.fleet
        if spec is not None and spec.groups:
            groups = [
                msgspec.structs.replace(group, server=machine.server)
                for group, machine in zip(spec.groups, self._groups, strict=True)
            ]
            spec = msgspec.structs.replace(spec, groups=groups)
        return msgspec.structs.replace(self.scenario, server=self.model.server, fleet=spec)


def _note_members(of: list[list[int]], call: Call) -> None:
    if call.op != "filter" and call.members:  # a step with nothing to run has no row
        of.append([r.id for r in call.members])

"""The resolved scenario: a server, a workload, loads and SLOs.

`scenarios/load/scenario.py` reads YAML, follows `extends` and checks; here are only the frozen values.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from sim.model.errors import BadInput
from sim.model.files.format import FORMAT
from sim.model.flags import Flag, flags, names
from sim.model.fleet import Fleet, Group
from sim.model.price import Price
from sim.model.quantity import Count, NotNegative, NotNegativeInt, Positive, Size
from sim.model.server import EngineFlags
from sim.model.warning import Notice
from sim.model.workload import Gamma, RequestFile, Workload

W = TypeVar("W", bound=Workload)


def least_completions(users: int) -> int:
    """How many answers end a window whose length is not given: 30, and at least four a user (docs/measuring.md)."""
    return max(30, 4 * users)


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A day's traffic: 24 rates, requests/s, each constant within its hour, for so many `days`.

    `seconds` of every hour are simulated, by default all of them: the rates and their order stay.
    """

    requests_per_second: Annotated[list[NotNegative], msgspec.Meta(min_length=1)]
    days: Count = 1
    seconds: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 3600.0

    @property
    def lasts(self) -> float:
        """How long it is simulated, s."""
        return self.seconds * len(self.requests_per_second) * self.days

    @property
    def cumulated(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The edges of the hours, s, and how many arrivals are expected up to each."""
        rates = np.tile(np.asarray(self.requests_per_second, dtype=np.float64), self.days)
        edges = np.arange(len(rates) + 1, dtype=np.float64) * np.float64(self.seconds)
        return edges, np.concatenate([[0.0], np.cumsum(self.seconds * rates)])


class Load(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The ladder: concurrent `users` (closed loop), or `rate` in requests/s (open loop), the workload's own trace, or a
    day's `profile`.

    Seconds everywhere; `spawn_rate` in users/s; `seconds` fixes every rung's steady window.
    """

    users: Annotated[list[Count], msgspec.Meta(min_length=1)] | None = None
    rate: Annotated[list[Positive], msgspec.Meta(min_length=1)] | None = None
    trace: bool = False
    profile: Profile | None = None
    arrivals: str | Gamma = "poisson"
    think: NotNegative = 0.0
    retry: Positive = 0.2  # who is refused and asks again at once would ask for ever in no time
    spawn_rate: Positive = 1.0
    seconds: Positive | None = None
    max_seconds: Positive = 300.0
    settle: NotNegative = 30.0


class Figure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A published figure: `metric` of a fixed-length profile, exact to ± `rounding`.

    `users` is absent for metrics of a whole ladder (`rps_takeoff`). `lengths` says what `output_tokens` are: `full`,
    how many came back; `limit`, how many were asked for, of which an end-of-sequence token may have cut some.
    """

    metric: str
    value: Positive
    rounding: NotNegative
    source: str
    prompt_tokens: Count | None = None
    output_tokens: Count | None = None
    users: Count | None = None
    lengths: Literal["full", "limit"] = "full"


class Goal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a plan has to reach: every SLO (`slo`, else the scenario's) kept with a `probability`.

    Each `period`, s, of a trace or a profile keeps them; `spare` is how many replicas may be lost with them still kept.
    """

    slo: dict[str, Positive] = {}
    period: Positive = 3600.0
    probability: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.9
    spare: NotNegativeInt = 0


class Launch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How `measure` starts the server: in docker, from the engine's usual image if none is named, or by a `command` on
    this machine. The scenario's flags are appended to its arguments.

    `env` names variables to pass on; only their names are recorded. Without a `port`, docker uses 80, a command any
    that is free.
    """

    command: list[str] = []
    image: str = ""
    model: str = ""
    num_shard: Count | None = None
    gpus: str | None = "all"
    shm_size: str = "1g"
    volumes: dict[str, str] = {}
    args: dict[str, str | int | float | bool] = {}
    env: list[str] = []
    port: Count | None = None


class Hardware(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the model runs on, as far as known; files have it under `machine`."""

    model: str | None = None
    gpu: str | None = None
    gpus: Size | None = None
    tensor_parallel: Size | None = None


class Scenario(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that is asked. `calibration`, `table` and file names are as resolved by the reader.

    `written` are the keys of `server` that a file or an option gave, the others being defaults; unset where that was
    not recorded. It is in no file: runs and forecasts have `flags`, which say it of each.
    """

    format: int = FORMAT
    name: str
    description: str = ""
    server: EngineFlags
    workload: Workload = Workload()
    load: Load = Load()
    replicas: Count = 1  # short for those of a fleet
    fleet: Fleet | None = None
    machine: Hardware = Hardware()
    calibration: str | None = None
    table: str | None = None
    published: list[Figure] = []
    slo: dict[str, Positive] = {}
    goal: Goal | None = None
    tolerances: dict[str, Positive] = {}
    price: Price | None = None
    launch: Launch | None = None
    warnings: list[Notice] = []
    written: list[str] | msgspec.UnsetType = msgspec.UNSET

    @property
    def served_by(self) -> Fleet:
        """Its fleet; without one, `replicas` of them with the usual balancer."""
        return Fleet(replicas=self.replicas) if self.fleet is None else self.fleet

    @property
    def alone(self) -> bool:
        """Whether it is one server without a balancer."""
        return self.fleet is None and self.replicas == 1

    def check_alone(self, done: str) -> None:
        """Raise `BadInput` for a fleet: one is not `done` (measured, calibrated from) yet."""
        if not self.alone:
            raise BadInput(
                f"expected one server: fleets are simulated, and not {done} yet",
                path=self.name,
                key="replicas" if self.fleet is None else "fleet",
            )

    @property
    def groups(self) -> list[Group]:
        """The replicas by what they have in common, with the scenario's own server, price and calibration where a group
        has none; one group for a fleet of equal ones."""
        whole = Group(name=self.name, replicas=self.served_by.count)
        return [
            msgspec.structs.replace(
                group,
                server=group.server or self.server,
                price=group.price or self.price,
                calibration=group.calibration or self.calibration,
            )
            for group in self.served_by.groups or [whole]
        ]

    @property
    def servers(self) -> list[EngineFlags]:
        """The server of each replica."""
        return [group.server or self.server for group in self.groups for _ in range(group.replicas)]

    @property
    def usd_per_hour(self) -> float | None:
        """What all its replicas cost; None without a price."""
        costs = [None if group.price is None else group.price.of(group.replicas) for group in self.groups]
        return None if None in costs else sum(cost for cost in costs if cost is not None)

    @property
    def flags(self) -> dict[str, Flag]:
        """The flags of its server, and whether they were written; if that is unknown, those that differ from the
        defaults count as written."""
        written = self.written
        if written is msgspec.UNSET:
            kind = type(self.server)
            usual = kind()
            written = [name for name in names(kind) if getattr(self.server, name) != getattr(usual, name)]
        return flags(self.server, written)


def relocated(scenario: Scenario, old: Path, new: Path) -> Scenario:
    """The scenario with its file names, which were relative to the folder `old`, relative to `new`: inside a file they
    are relative to that file, and once read to the working directory. Absolute ones stay."""

    def moved(name: str | None) -> str | None:
        return name if name is None or Path(name).is_absolute() else os.path.relpath(old / name, new)

    def source(given: str | RequestFile | None) -> str | RequestFile | None:
        if isinstance(given, RequestFile):
            return msgspec.structs.replace(given, file=moved(given.file))
        return moved(given)

    def workload(work: W) -> W:
        classes = tuple(workload(each) for each in work.classes)
        files = {"empirical": source(work.empirical), "trace": source(work.trace)}
        return msgspec.structs.replace(work, classes=classes, **files)

    def groups(fleet: Fleet) -> Fleet:
        made = [msgspec.structs.replace(group, calibration=moved(group.calibration)) for group in fleet.groups]
        return msgspec.structs.replace(fleet, groups=made)

    return msgspec.structs.replace(
        scenario,
        fleet=None if scenario.fleet is None else groups(scenario.fleet),
        calibration=moved(scenario.calibration),
        table=moved(scenario.table),
        workload=workload(scenario.workload),
    )

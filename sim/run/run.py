"""A run and its rungs: what was measured or simulated, and what is known of the server."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sim.engines.catalog import NAMES, flags_of, kind_of
from sim.model.flags import SCENARIO, Flag, flags, in_words, told_by, untold
from sim.model.identity import Identity, NotTheEngine, check_engine, is_engine, named
from sim.model.scenario import Scenario
from sim.model.server import EngineFlags
from sim.model.status import Status
from sim.model.warning import Notice, notice

_WRITTEN = 1e-6  # s: files keep rungs and requests to the microsecond, and importers' segments exactly


@dataclass(frozen=True)
class Rung:
    """One load of the ladder; times in s since the run began. The steady window is [settled, end)."""

    start: float
    ramped: float
    settled: float
    end: float
    users: int | None = None
    rate: float | None = None
    status: str = "complete"
    warnings: list[Notice] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def load(self) -> float:
        """Users, or requests/s."""
        return float(self.users if self.users is not None else self.rate or 0.0)

    @property
    def named(self) -> str:
        """The load with its unit."""
        unit = "requests/s" if self.users is None else "user" if self.users == 1 else "users"
        return f"{self.load:g} {unit}"

    @property
    def seconds(self) -> float:
        """The length of the steady window."""
        return self.end - self.settled


@dataclass(frozen=True)
class Run:
    """Requests as a table with `REQUEST_COLUMNS` (times in s since the run began; NaN for what did not happen).

    `token_times` (measured) holds one array per row of `requests`, one time per token; simulated runs have `steps`
    instead, and `step_ends` (the ends of every decode row's steps, s) if they had noise. `event_tokens` (one array per
    row, None for a stream of one token an event) says how many tokens came with each event, where some had several.

    `engine` is that of its server, None where nothing tells; `launched` are the flags on the command line of a server
    that was started for it. `taken_as` is the engine for which the user takes a server of another, or of none that is
    known; the scenario's server then has the flags that are assumed.
    """

    kind: str
    name: str
    scenario: Scenario
    rungs: list[Rung]
    requests: pd.DataFrame
    token_times: list[NDArray[np.float64]] | None = None
    event_tokens: list[NDArray[np.int64] | None] | None = None
    steps: pd.DataFrame | None = None
    step_ends: list[NDArray[np.float64]] | None = None
    created: str | None = None
    software: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] | None = None
    segments: list[dict[str, Any]] = field(default_factory=list)
    stopped: str = ""
    warnings: list[Notice] = field(default_factory=list)
    path: Path | None = None
    engine: Identity | None = None
    launched: dict[str, Any] = field(default_factory=dict)
    taken_as: str | None = None

    @property
    def stretches(self) -> list[tuple[float, float]]:
        """The start and end of each stretch in which the users ran without a break, s; several if the run was resumed.

        The first begins with the run, whatever `segments` lists, and the last has no end.
        """
        starts = (float(segment["start"]) - _WRITTEN for segment in self.segments if "start" in segment)
        edges = sorted({0.0, *(max(0.0, start) for start in starts)})
        return list(zip(edges, [*edges[1:], math.inf], strict=True))

    @property
    def known(self) -> bool:
        """Whether its server is known to be of the engine that its scenario's flags are for."""
        return is_engine(self.engine, self.scenario.server.declared)

    @property
    def flags(self) -> dict[str, Flag]:
        """The flags of its server with the source of each; none if the server's engine is unknown."""
        if not self.known and self.taken_as is None:
            return {}
        written = [name for name, flag in self.scenario.flags.items() if flag.source == SCENARIO]
        return flags(self.scenario.server, written, self._told, self.launched)

    @property
    def server(self) -> EngineFlags:
        """The scenario's server, with what the real one said of itself where it did, and it can be.

        Raises `NotTheEngine` where the server is not known to be of that engine, and the user does not take it for it.
        """
        server = self.scenario.server
        if self.engine is None and self.taken_as is None:
            which = " or ".join(f"--as {name}" for name in NAMES)
            message = f"nothing says which engine served {self.name}; expected {which} to forecast it, with a warning"
            raise NotTheEngine(message, path=self.path)
        check_engine(self.engine, server.declared, self.taken_as, f"the server of {self.name}", self.path)
        return server.as_told(self.launched | self._told)

    @property
    def _told(self) -> dict[str, Any]:
        return told_by(type(self.scenario.server), self.info)

    @property
    def untold(self) -> list[Notice]:
        """A warning for each decisive flag that the server did not tell and its launch command does not show."""
        return untold(self.flags, self.scenario.server.declared)

    @property
    def assumptions(self) -> list[Notice]:
        """The warning that belongs to every number that is forecast from it, if it is taken for what it is not."""
        if self.known or self.taken_as is None:
            return []
        return [
            notice(
                "taken-as",
                f"{self.name} was measured on {named(self.engine)} and is taken for {self.taken_as} (--as): its "
                f"scheduler and flags are assumed ({in_words(self.flags)}), and a forecast can be far off",
            )
        ]


def taken_as(run: Run, engine: str, like: Scenario | None = None) -> Run:
    """The run with its server taken for `engine`; unchanged where it is known to be of it.

    Flags are those of the scenario `like`, else what the run's own scenario says of its server, else defaults. Limits
    that were not given are widened to what the server was seen to accept. `NotTheEngine` for a run of another
    engine that is simulated: no schedule can be followed through the steps of another.
    """
    if run.known and run.scenario.server.engine == engine:
        return run
    other = kind_of(run.engine)
    if other is not None and other.declared.name != engine:
        raise NotTheEngine(
            f"{run.name} was served by {run.engine}, whose schedule is another than that of {engine}; expected a run "
            f"of {engine}, or its own calibration in a forecast with --as {engine} --transfer 0.3",
            path=run.path,
        )
    asked = like or run.scenario
    if asked.server.engine != engine:
        asked = msgspec.structs.replace(asked, server=flags_of(engine)(), written=[])
    written = [name for name, flag in asked.flags.items() if flag.source == SCENARIO]
    given = {*written, *told_by(type(asked.server), run.info), *run.launched}
    requests = run.requests[run.requests["status"] != Status.VALIDATION]
    longest = int(requests["prompt_tokens"].max()) if len(requests) else 0
    total = int((requests["prompt_tokens"] + requests["max_new_tokens"]).max()) if len(requests) else 0
    users = max((rung.users or 0 for rung in run.rungs), default=0)
    server = asked.server.widened(longest, total, users, given)
    scenario = msgspec.structs.replace(run.scenario, server=server, written=written)
    return replace(run, scenario=scenario, taken_as=engine)

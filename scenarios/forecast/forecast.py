"""A forecast: what a scenario will do, with bands, what limits it, what it costs, and warnings. Frozen; one file.

`simulate` makes it; plots, tables and the report read it. Seconds, requests, tokens, dollars; `low`..`high`
is the 90 % band over replicates. What does not exist (a latency without steady state) is None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
from numpy.typing import ArrayLike

from sim.engines.catalog import convert, shape_of
from sim.model.files.atomic import write_file
from sim.model.files.document import Document
from sim.model.files.format import FORMAT
from sim.model.flags import Flag
from sim.model.identity import Identity
from sim.model.identity import named as named_engine
from sim.model.scenario import Figure, Scenario, relocated
from sim.model.warning import Notice, notice
from sim.results.curve import band


class Estimate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A value with its 90 % band."""

    value: float | None
    low: float | None
    high: float | None


def estimate(values: ArrayLike) -> Estimate:
    """The median and 90 % band of replicates; None where none of them has a value."""
    found = [None if math.isnan(x) else x for x in band(values)]
    return Estimate(value=found[0], low=found[1], high=found[2])


class Row(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One metric at one rung, of `users` or `rate` (requests/s).

    `extrapolated`: beyond what was calibrated; `unstable`: an open loop whose queue grows for ever.
    """

    scenario: str
    users: int | None = None
    rate: float | None = None
    metric: str
    value: float | None
    low: float | None
    high: float | None
    extrapolated: bool = False
    unstable: bool = False

    @property
    def load(self) -> float:
        """Users, or requests/s."""
        return float(self.users if self.users is not None else self.rate or 0.0)


class OperatingPoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A point on the curves: its load (users, or requests/s offered), the RPS there, and what makes it one.

    `reached` is the share of replicates in which the ladder came that far; the others count with its top rung.
    `passed` is the share in which its lowest rung lies beyond already; where that is most of them there is no value.
    """

    load: Estimate
    rps: Estimate
    reached: float
    meaning: str
    passed: float = 0.0

    @property
    def below(self) -> bool:
        """Whether the ladder begins beyond it."""
        return self.passed > 0.5


class Crossing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Up to which load every SLO is kept: at the rung `kept_at`, and all before it, with the `probability`; no longer,
    more likely than not, at the rung `broken_at`; and where in between (`load`; no value beyond either end of the
    ladder). `breaks` is the SLO that is broken first in most replicates."""

    kept_at: float | None
    broken_at: float | None
    load: Estimate
    breaks: str | None
    probability: float


class Cost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the machine's hours come to at one load, USD; a month is 730 hours, a year 8,760.

    Per million input tokens and per million output tokens each charge the whole machine; `blended` counts both.
    """

    at: str
    usd_per_hour: float
    per_1000_requests: Estimate
    per_million_input: Estimate
    per_million_output: Estimate
    per_million_blended: Estimate
    usd_per_month: float | None = None  # absent from older files, which have the hour alone
    usd_per_year: float | None = None


class Bottleneck(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What limits a rung, and why: `permits`, a limit that the engine declares, `admission rule`, `users`,
    `prefill compute` or `decode compute`."""

    load: float
    binds: str
    words: str


class SloProbability(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The probability, over replicates, that a rung keeps one SLO (`limit` in s, or a share)."""

    load: float
    metric: str
    limit: float
    probability: float


class ComparedFigure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A published figure beside the forecast of the same."""

    figure: Figure
    simulated: Estimate
    inside: bool


class Provenance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the numbers come from: the calibration, the seed, the software, the changes made by `--set`."""

    kind: str
    note: str
    files: dict[str, str]
    model: str
    parameters: dict[str, dict[str, Any]]
    seed: int
    replicates: int
    changes: list[str]
    software: dict[str, str]


def unit_of(scenario: Scenario) -> str:
    """What a scenario's loads count."""
    if scenario.load.users is not None:
        return "users"
    return "requests/s" if scenario.workload.sessions is None else "sessions/s"


def named(load: float, unit: str) -> str:
    """A load in words: `1 user`, `16 users`, `0.5 requests/s`."""
    return f"{load:g} user" if unit == "users" and load == 1 else f"{load:g} {unit}"


class Forecast(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The forecast of a scenario.

    `engine` is whose step times the calibration has; `taken_as` the engine for which the user takes them, if it is
    another; `flags` says where each flag of the server is from.
    """

    format: int = FORMAT
    name: str
    scenario: Scenario
    provenance: Provenance
    curves: list[Row]
    plateau: OperatingPoint
    knee: OperatingPoint
    latency_onset: OperatingPoint
    cost: list[Cost]
    bottleneck: list[Bottleneck]
    slo: list[SloProbability]
    published: list[ComparedFigure]
    warnings: list[Notice]
    crossing: Crossing | None = None  # without SLOs, and in older files
    engine: Identity | None = None
    taken_as: str | None = None
    flags: dict[str, Flag] = {}

    @property
    def assumptions(self) -> list[Notice]:
        """The warning that belongs to every number of it, if the user takes its calibration for another engine's."""
        if self.taken_as is None:
            return []
        return [
            notice(
                "taken-as",
                f"{self.name} has the step times of {named_engine(self.engine)}, taken for {self.taken_as} (--as)",
            )
        ]

    @property
    def unit(self) -> str:
        """What loads count."""
        return unit_of(self.scenario)

    def rows(self, metric: str) -> list[Row]:
        """One metric's rows, in the order of the ladder."""
        return [row for row in self.curves if row.metric == metric]

    def table(self, metric: str | None = None) -> pd.DataFrame:
        """The curves as a pandas table; of one metric, a row a rung: its load, value, low, high and marks."""
        if metric is None:
            return pd.DataFrame([msgspec.structs.asdict(row) for row in self.curves])
        columns = ["load", "value", "low", "high", "extrapolated", "unstable"]
        table = pd.DataFrame([[getattr(row, name) for name in columns] for row in self.rows(metric)], columns=columns)
        return table.rename(columns={"load": self.unit})


def common_warnings(forecasts: Sequence[Forecast]) -> list[Notice]:
    """The warnings that all these forecasts have."""
    return [text for text in forecasts[0].warnings if all(text in forecast.warnings for forecast in forecasts)]


def shared_warnings(forecasts: Sequence[Forecast]) -> list[Notice]:
    """The warnings of several forecasts: first what all of them have, then what single ones have, with their names."""
    if len(forecasts) == 1:
        return forecasts[0].warnings
    common = common_warnings(forecasts)
    return common + [said.of(f.name) for f in forecasts for said in f.warnings if said not in common]


def write_forecast(path: Path, forecast: Forecast) -> None:
    """Replace `forecast.json`; the same forecast gives the same bytes."""
    here = msgspec.structs.replace(forecast, scenario=relocated(forecast.scenario, Path(), path.parent))
    write_file(path, msgspec.json.format(msgspec.json.encode(here), indent=1) + b"\n")


def read_forecast(path: Path) -> Forecast:
    """Read `forecast.json`; `BadInput` names file, line and key."""
    document = Document(path, "a forecast")
    found = document.read_as(Forecast, shape_of, convert)
    return msgspec.structs.replace(found, scenario=relocated(found.scenario, path.parent, Path()))

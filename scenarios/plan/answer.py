"""A plan as a value: the options with what they cost and how probably they keep the SLOs, and what would change that.

`plan.json` is this, by the same names. Seconds, requests/s, tokens, USD; a month is 730 hours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from scenarios.forecast.forecast import Estimate
from sim.model.files.atomic import write_file
from sim.model.files.document import Document
from sim.model.files.format import FORMAT
from sim.model.files.shape import Key, known
from sim.model.metric import METRICS, plain
from sim.model.warning import Notice


class Share(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A probability, with its own standard error, from so many draws."""

    value: float
    stderr: float
    draws: int


class Tried(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A number of replicas that was tried: the probability that it keeps every SLO, its cost, and the quoted latency.

    `decision` is that of the sequential test; None where it came to none.
    """

    replicas: int
    kept: Share
    decision: bool | None
    usd_per_month: float | None
    latency: float | None


class Replicas(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The number of replicas that the option needs; `low` is the first that is not clearly too few."""

    value: int
    low: int
    high: int


class Period(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Medians and 90 % bands of metrics in a period that begins at `start`, s of the traffic, or of the day."""

    start: float
    metrics: dict[str, Estimate]


class OptionRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An option with the fewest replicas that reach the goal (`met`), or else the number nearest to it.

    `probability` has a share for every SLO and one for `all`. `metrics` are the medians and 90 % bands of the SLOs'
    metrics, of a trace or profile in the worst period; `periods` has those of each. `spare` of the replicas may be lost
    with the SLOs still kept.
    `flags` are those in which the option differs, `assumed` says of all where each is from.
    """

    name: str
    met: bool
    replicas: Replicas
    spare: int
    hardware: str
    flags: dict[str, Any]
    assumed: str
    probability: dict[str, Share]
    metrics: dict[str, Estimate]
    periods: list[Period] = []  # absent from older files
    usd_per_hour: float | None
    usd_per_month: float | None
    per_1000_requests: Estimate
    per_million_tokens: Estimate
    rps: Estimate
    utilisation: Estimate
    bottleneck: str
    why: str
    tried: list[Tried]
    warnings: list[Notice]
    depends_on: str | None = None


class Change(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What another input would change: the replicas of the best option, and USD a month; None: no number reaches it."""

    input: str
    change: str
    replicas: int | None
    usd_per_month: float | None
    effect: float | None
    words: str


class Crossing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The largest load that a fleet bears with the goal's probability, and the next one tried, which it does not."""

    option: str
    replicas: int
    kept_at: float | None
    broken_at: float | None
    tried: dict[str, Share]


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The answer to which option meets the SLOs at this traffic at the least cost.

    `load` is in `unit`; `quoted` the metric of the sentence and of the frontier. `best` and `frontier` are names of
    options. `kept_at` and `broken_at` are loads of the best option's fleet; `fewer` is the probability of one replica
    fewer, `lost` that of the SLOs being kept while one replica is lost.
    """

    format: int = FORMAT
    name: str
    question: dict[str, Any]
    load: float
    unit: str
    traffic: str
    slo: dict[str, float]
    goal: float
    spare: int
    period: float | None
    quoted: str
    options: Annotated[list[OptionRow], msgspec.Meta(min_length=1)]
    best: str | None
    nearest: str
    frontier: list[str]
    sensitivity: list[Change] = []
    kept_at: float | None = None
    broken_at: float | None = None
    fewer: Share | None = None
    lost: Share | None = None
    crossing: list[Crossing] = []
    next_measurement: list[str] = []
    warnings: list[Notice] = []
    seed: int
    simulations: int
    method: str

    @property
    def met(self) -> bool:
        """Whether an option reaches the goal; asked for the largest load, whether every fleet bears some."""
        if self.crossing:
            return all(each.kept_at is not None for each in self.crossing)
        return self.best is not None

    @property
    def chosen(self) -> OptionRow:
        """The best option, or the one nearest to the goal."""
        return next(row for row in self.options if row.name == (self.best or self.nearest))


def write_plan(path: Path, plan: Plan) -> None:
    """Replace `plan.json`; the same plan gives the same bytes."""
    write_file(path, msgspec.json.format(msgspec.json.encode(plan), indent=1) + b"\n")


def read_plan(path: Path) -> Plan:
    """Read `plan.json`; `BadInput` names file, line and key."""
    document = Document(path, "a plan")
    plan = document.read_as(Plan)
    names = [row.name for row in plan.options]
    best = [] if plan.best is None else [(("best",), plan.best)]
    for key, name in (
        *best,
        (("nearest",), plan.nearest),
        *((("frontier", i), n) for i, n in enumerate(plan.frontier)),
    ):
        known(name, names, "option", key, document.fail)
    if plan.crossing and [each.option for each in plan.crossing] != names:
        raise document.fail(("crossing",), f"expected a row for each option: {', '.join(names)}")
    for i, each in enumerate(plan.crossing):
        for load in each.tried:
            if not _NUMBER.fullmatch(load):
                raise document.fail(("crossing", i, "tried", load), "expected loads")
    if not plan.slo:
        raise document.fail(("slo",), "expected at least one limit")
    for key, name in ((("quoted",), plan.quoted), *((("slo", name), name) for name in plan.slo)):
        known(plain(name), METRICS, "metric", key, document.fail)
    for i, row in enumerate(plan.options):
        needed: list[tuple[Key, Mapping[str, object], set[str]]] = [
            (("metrics",), row.metrics, {plan.quoted, *plan.slo}),
            (("probability",), row.probability, {"all", *plan.slo}),
            *((("periods", n, "metrics"), period.metrics, {plan.quoted}) for n, period in enumerate(row.periods)),
        ]
        for at, there, expected in needed:
            if missing := sorted(expected - there.keys()):
                raise document.fail(("options", i, *at), f"expected {missing[0]}, too")
    return plan


_NUMBER = re.compile(r"\d{1,15}(\.\d+)?(e[+-]?\d\d)?", re.ASCII)  # as a load is written

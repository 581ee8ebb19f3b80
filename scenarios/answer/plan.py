"""A plan in words, as tables and as CSV."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.text import Text

from scenarios.answer.csv import as_csv
from scenarios.answer.numbers import parts, significant, with_band
from scenarios.answer.sentences import Answer, Check, limit_text
from scenarios.answer.tables import show_assumptions
from scenarios.forecast.forecast import named
from scenarios.plan.answer import Change, OptionRow, Plan, Share
from sim.model.metric import METRICS, label, plain
from sim.model.warning import Notice
from sim.terminal.columns import Column, show_columns, show_listed
from sim.terminal.console import Console


def sentence(plan: Plan) -> str:
    """The answer in a sentence; for the largest load one for each fleet."""
    if plan.crossing:
        return " ".join(_crossing(plan, row) for row in plan.options)
    row = plan.chosen
    goal = f"the goal of {plan.goal:.0%}"
    if plan.best is None:
        text = f"No option reaches {goal} at {plan.traffic}. The nearest is {_fleet(row)}: {_latency(plan, row)}, "
        return text + f"{_slos(plan)} kept with {percent(row.probability['all'])}{_money(row)}."
    text = (
        f"{_fleet(row)}: {_latency(plan, row)}, {_slos(plan)} kept with {percent(row.probability['all'])}{_money(row)}"
    )
    if plan.fewer is not None:
        n = row.replicas.value - 1
        text += f"; {n} {'replica keeps' if n == 1 else 'replicas keep'} {_it(plan)} with {percent(plan.fewer)}"
    return text + "."


def of_plan(plan: Plan) -> Answer:
    """The answer of a plan, with the SLOs of the option that is chosen, or nearest to the goal."""
    checks = []
    for metric, limit in plan.slo.items() if not plan.crossing else ():
        share = plan.chosen.probability[metric]
        words = f"kept with {percent(share)} (goal {plan.goal:.0%})"
        checks.append(Check(limit_text(metric, limit), share.value >= plan.goal, words))
    return Answer(f"{plan.name}, {plan.traffic}", [sentence(plan)], checks, assumptions(plan))


def assumptions(plan: Plan) -> list[Notice]:
    """The warnings about every number of the plan."""
    return [said for said in plan.warnings if said.code == "taken-as"]


def _fleet(row: OptionRow) -> str:
    flags = ", ".join(f"{name} {_flag(value)}" for name, value in row.flags.items())
    return f"{row.replicas.value} × {row.hardware}" + (f" with {flags}" if flags else "")


def _flag(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value.get('low')}–{value.get('high')}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _latency(plan: Plan, row: OptionRow) -> str:
    metric, name = METRICS[plain(plan.quoted)], label(plan.quoted)
    value, band = parts(row.metrics[plan.quoted], metric.scale)
    if value == "–":
        return f"no steady {name}"
    return f"{name} {value} {metric.unit}" + (f" ({band})" if band else "")


def _slos(plan: Plan) -> str:
    return "every SLO" if len(plan.slo) > 1 else limit_text(*next(iter(plan.slo.items())))


def _it(plan: Plan) -> str:
    return "them" if len(plan.slo) > 1 else "it"


def _money(row: OptionRow) -> str:
    return "" if row.usd_per_month is None else f", {usd(row.usd_per_month)} a month"


def usd(value: float | None) -> str:
    """Dollars, without cents from 100 on."""
    if value is None:
        return "–"
    return f"${value:,.0f}" if value >= 100 else f"${value:,.2f}"


def percent(share: Share) -> str:
    """A probability, no closer to certainty than its draws can tell."""
    return "less than 1%" if share.value < 0.01 else "more than 99%" if share.value > 0.99 else f"{share.value:.0%}"


def _crossing(plan: Plan, row: OptionRow) -> str:
    found = next(each for each in plan.crossing if each.option == row.name)
    if found.kept_at is None:
        return f"{_fleet(row)} bears no load that was tried."
    text = (
        f"{_fleet(row)} bears up to {_load(plan, found.kept_at)} with {_slos(plan)} kept with at least {plan.goal:.0%}"
    )
    return text + ("" if found.broken_at is None else f"; {_load(plan, found.broken_at)} are too many") + "."


def _load(plan: Plan, load: float) -> str:
    return named(float(significant(load)), plan.unit)


def show_plans(plans: Sequence[Plan], out: Console) -> None:
    """Print plans one below the other: the answer first, then the options and what would change the answer."""
    for i, plan in enumerate(plans):
        out.print() if i else None
        show_plan(plan, out)


def show_plan(plan: Plan, out: Console) -> None:
    """Print a plan."""
    out.print(Text(f"{plan.name}, {plan.traffic}", style="bold"))
    show_assumptions(assumptions(plan), out)
    out.print(Text(sentence(plan)))
    out.print()
    show_columns(options(plan), out, instead="--csv has every option in full")
    out.print()
    for line in details(plan):
        out.print(Text(line))
    if plan.sensitivity:
        out.print()
        out.print(Text("What would change the answer, the largest effect first:"))
        show_listed([(f"{c.input} {c.change}", effect(c)) for c in plan.sensitivity], out)
    out.print()
    out.print(Text(f"Flags {plan.chosen.assumed}", style="dim"))
    out.print(Text(f"{plan.simulations} simulations. {plan.method}.", style="dim"))


def options(plan: Plan) -> list[Column]:
    """A row for each option."""
    metric = METRICS[plain(plan.quoted)]
    rows, latency = plan.options, f"{label(plan.quoted)}, {metric.unit}"
    return [
        Column("option", [f"{row.name} *" if row.name == plan.best else row.name for row in rows], 0, left=True),
        Column("replicas", [str(row.replicas.value) for row in rows]),
        Column("P(kept)", [f"{row.probability['all'].value:.0%}" for row in rows], 1),
        Column(latency, [with_band(row.metrics[plan.quoted], metric.scale) for row in rows], 2),
        Column("$/month", [usd(row.usd_per_month).removeprefix("$") for row in rows], 1),
        Column("$/1000 requests", [with_band(row.per_1000_requests) for row in rows], 4),
        Column("busy, %", [with_band(row.utilisation, 100.0) for row in rows], 5),
        Column("bottleneck", [row.bottleneck for row in rows], 3, left=True),
    ]


def details(plan: Plan) -> list[str]:
    """What binds, the reserve, the frontier, and what to measure, in a sentence each."""
    row = plan.chosen
    found = [f"Bottleneck: {row.bottleneck} ({row.why})."]
    if not plan.crossing and plan.best is not None:
        found.append(_reserve(plan, row))
    if len(plan.options) > 1 and plan.frontier:
        latency = label(plan.quoted)
        found.append(f"On the frontier of cost against {latency}: {', '.join(plan.frontier)}.")
    if plan.period is not None:
        found.append(f"Every period of {plan.period:g} s has to keep the SLOs; metrics are those of the worst.")
    return found + plan.next_measurement


def _reserve(plan: Plan, row: OptionRow) -> str:
    text = "Reserve: "
    kept, broken = plan.kept_at, plan.broken_at
    text += f"kept up to {_load(plan, kept)}" if kept is not None else "none"
    text += f", broken at {_load(plan, broken)}" if broken is not None else ""
    if plan.lost is not None:
        text += f"; with one replica lost {_slos(plan)} kept with {percent(plan.lost)}"
    elif row.replicas.value == 1:
        text += "; a single replica has no reserve if it is lost"
    return text + "."


def effect(change: Change) -> str:
    """What a change does, in words."""
    if change.effect is None:
        return change.words
    cost = "" if change.usd_per_month is None else f", {usd(change.usd_per_month)} a month ({change.effect:+.0%})"
    return f"{change.words}{cost}"


FIELDS = (
    *("scenario", "load", "unit", "option", "best", "met", "replicas", "probability", "probability_stderr", "metric"),
    *("value", "low", "high", "usd_per_hour", "usd_per_month", "usd_per_1000_requests", "usd_per_million_tokens"),
    *("utilisation", "bottleneck", "kept_at", "broken_at"),
)


def plans_as_csv(plans: Iterable[Plan]) -> str:
    """Plans as CSV: one line per option and metric."""
    lines: list[list[object]] = []
    for plan in plans:
        loads = {each.option: (each.kept_at, each.broken_at) for each in plan.crossing}
        if plan.best is not None:
            loads = {plan.best: (plan.kept_at, plan.broken_at)}
        for row in plan.options:
            share = row.probability["all"]
            for name, at in row.metrics.items():
                one: list[object] = [plan.name, plan.load, plan.unit, row.name, row.name == plan.best, row.met]
                one += [row.replicas.value, share.value, share.stderr, name, at.value, at.low, at.high]
                one += [row.usd_per_hour, row.usd_per_month, row.per_1000_requests.value, row.per_million_tokens.value]
                lines.append([*one, row.utilisation.value, row.bottleneck, *loads.get(row.name, (None, None))])
    return as_csv(FIELDS, lines)

"""The section about a plan: its options, the frontier of cost against latency, the reserve and what would change it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from scenarios.answer.numbers import significant
from scenarios.answer.plan import details, percent, usd
from scenarios.answer.sentences import limit_text
from scenarios.forecast.forecast import Estimate
from scenarios.plan.answer import Change, OptionRow, Period, Plan, Share
from scenarios.report.figure import BLUE, GREY, Axes, Drawing, logarithmic, whole
from scenarios.report.plots import COLOURS, LONGEST, SLO
from scenarios.report.sections import Section, card, cell, grid, mark, pictures
from sim.model.metric import METRICS, label, plain

HOUR = 3600.0
BAND = 1.645  # standard errors in half of a 90 % band
ROOM = 0.45  # of an ordinate, for a legend above its points
DECISIONS = {True: ("in", "reaches the goal"), False: ("out", "does not reach it"), None: ("part", "undecided")}


def section(plan: Plan) -> Section:
    """The plan with its pictures and tables."""
    row = plan.chosen
    sentences = details(plan)
    parts: list[dict[str, Any]] = [
        pictures(_drawings(plan), "Cost, latency and probability", _legend(plan)),
        {"title": "Options", "table": _options(plan)},
        {"title": "Use and cost", "table": _use(plan)},
        *({"text": said} for said in sentences[: len(sentences) - len(plan.next_measurement)]),
    ]
    if plan.crossing:
        parts.append({"title": "The largest load of each fleet", "table": _crossing(plan)})
    if plan.sensitivity:
        parts.append({"title": "What would change the answer", "table": _sensitivity(plan.sensitivity)})
    if plan.next_measurement:
        parts.append({"title": "What to measure next"})
        parts += [{"text": said} for said in plan.next_measurement]
    if any(option.tried for option in plan.options):
        parts.append({"title": "Numbers of replicas that were tried", "table": _tried(plan)})
    return {
        "name": f"{plan.name}, plan",
        "description": f"{plan.traffic[:1].upper()}{plan.traffic[1:]}; {_goal(plan)}.",
        "cards": _cards(plan, row),
        "warnings": plan.warnings,
        "parts": parts,
        "parameters": _flags(plan),
        "provenance": f"{plan.method}\nseed {plan.seed}, {plan.simulations} simulations",
    }


def _goal(plan: Plan) -> str:
    limits = ", ".join(limit_text(metric, limit) for metric, limit in plan.slo.items())
    spare = f", with {plan.spare} lost" if plan.spare else ""
    return f"wanted: {limits} with a probability of at least {plan.goal:.0%}{spare}"


def _cards(plan: Plan, row: OptionRow) -> list[dict[str, str]]:
    if plan.crossing:
        return [
            {
                "what": f"{plan.unit} that {each.replicas} × {each.option} bear{'s' if each.replicas == 1 else ''}",
                "value": _load(each.kept_at),
                "band": "" if each.broken_at is None else f"not {_load(each.broken_at)}",
            }
            for each in plan.crossing
        ]
    metric, n = METRICS[plain(plan.quoted)], row.replicas
    range_ = "" if n.low == n.high else f"{n.low}–{n.high}"
    kept = {"what": "every SLO kept", "value": percent(row.probability["all"]), "band": f"goal {plan.goal:.0%}"}
    cards = [{"what": f"replicas of {row.name}", "value": str(n.value), "band": range_}, kept]
    cards.append(card(_title(plan.quoted), row.metrics[plan.quoted], metric.scale))
    if row.usd_per_month is not None:
        each = usd(row.per_1000_requests.value)
        cards.append({"what": "a month", "value": usd(row.usd_per_month), "band": f"{each} per 1,000 requests"})
    return cards


def _options(plan: Plan) -> dict[str, Any]:
    names = list(dict.fromkeys([plan.quoted, *plan.slo]))
    limits = plan.slo.items() if len(plan.slo) > 1 else ()
    rows = []
    for row in plan.options:
        kept = mark("in" if row.met else "out", percent(row.probability["all"]))
        cells: list[object] = [f"{row.name} *" if row.name == plan.best else row.name, row.replicas.value, kept]
        cells += [percent(row.probability[metric]) for metric, _ in limits]
        cells += [cell(row.metrics[name], METRICS[plain(name)].scale) for name in names]
        rows.append({"cells": [*cells, usd(row.usd_per_month), row.bottleneck]})
    titles = ["option", "replicas", "P(kept)", *(f"P({limit_text(metric, limit)})" for metric, limit in limits)]
    titles += [*(_title(name) for name in names), "$ a month", "bottleneck"]
    caption = "Medians and 90 % bands. P: the probability, over all that is uncertain, that the SLOs are kept."
    caption += " *: the cheapest that reaches the goal." if plan.best else ""
    return grid(titles, rows, (0, len(titles) - 1), (), caption)


def _title(name: str) -> str:
    unit = METRICS[plain(name)].unit
    return f"{label(name)}, {unit}" if unit else label(name)


def _use(plan: Plan) -> dict[str, Any]:
    rows = []
    for row in plan.options:
        cells = [row.rps, row.per_1000_requests, row.per_million_tokens]
        busy = cell(row.utilisation, 100.0)
        rows.append({"cells": [row.name, row.hardware, *map(cell, cells), busy, row.why]})
    titles = ["option", "a replica", "requests/s", "$ per 1,000 requests", "$ per million tokens", "busy, %", "why"]
    return grid(titles, rows, (0, 1, 6), (6,))


def _crossing(plan: Plan) -> dict[str, Any]:
    rows = []
    for each in plan.crossing:
        rows.append({"cells": [each.option, each.replicas, _load(each.kept_at), _load(each.broken_at)]})
    caption = "Loads that were tried: the largest that reaches the goal, and the next, which does not."
    return grid(["option", "replicas", f"kept at, {plan.unit}", f"broken at, {plan.unit}"], rows, (0,), (), caption)


def _load(load: float | None) -> str:
    return "–" if load is None else significant(load)


def _sensitivity(changes: Sequence[Change]) -> dict[str, Any]:
    rows = []
    for c in changes:
        effect = "–" if c.effect is None else f"{c.effect:+.0%}"
        replicas = "–" if c.replicas is None else c.replicas
        rows.append({"cells": [f"{c.input} {c.change}", replicas, usd(c.usd_per_month), effect, c.words]})
    caption = "Each alone, with the same option; the largest effect first."
    return grid(["change", "replicas", "$ a month", "effect on cost", ""], rows, (0, 4), (4,), caption)


def _tried(plan: Plan) -> dict[str, Any]:
    metric = METRICS[plain(plan.quoted)]
    rows = []
    for option in plan.options:
        for tried in option.tried:
            latency = "–" if tried.latency is None else significant(metric.scale * tried.latency)
            share = f"{tried.kept.value:.0%} ± {tried.kept.stderr:.0%}"
            decision = mark(*DECISIONS[tried.decision])
            cells = [option.name, tried.replicas, share, tried.kept.draws, decision, latency, usd(tried.usd_per_month)]
            rows.append({"cells": cells})
    titles = ["option", "replicas", "P(kept)", "draws", "decision", _title(plan.quoted), "$ a month"]
    caption = "From the draws of the search; the options' own probabilities are from draws that took no part in it."
    return grid(titles, rows, (0, 4), (), caption)


def _flags(plan: Plan) -> dict[str, Any]:
    rows = [{"cells": [row.name, row.assumed, row.depends_on or ""]} for row in plan.options]
    return grid(["option", "flags", "depends most on"], rows, (0, 1, 2), (1, 2))


def _legend(plan: Plan) -> str:
    text = "Large points: the options, with 90 % bands. Small points: numbers of replicas that were tried."
    text = text.replace("numbers of replicas", "loads") if plan.crossing else text
    return text + (" Grey line: the frontier; no option is both cheaper and faster." if len(plan.frontier) > 1 else "")


def _drawings(plan: Plan) -> list[Drawing]:
    found: list[Drawing] = [partial(_frontier, plan=plan)]
    found.append(partial(_loads, plan=plan) if plan.crossing else partial(_replicas, plan=plan))
    if plan.chosen.periods:
        found.append(partial(_periods, plan=plan, periods=plan.chosen.periods))
    return found


def _frontier(ax: Axes, plan: Plan) -> None:
    """The quoted latency against the cost; against replicas where an option has no price."""
    metric = METRICS[plain(plan.quoted)]
    priced = all(row.usd_per_month is not None for row in plan.options)
    at: dict[str, tuple[float, float]] = {}
    for row, colour, size in _marked(plan):
        tried = [t for t in row.tried if t.latency is not None]
        costs = [t.usd_per_month or 0.0 if priced else t.replicas for t in tried]
        ax.plot(costs, [metric.scale * (t.latency or 0.0) for t in tried], ".", color=colour, ms=7, alpha=0.6)
        value, low, high = _scaled(row.metrics[plan.quoted], metric.scale)
        if value is None:
            continue
        x = row.usd_per_month or 0.0 if priced else float(row.replicas.value)
        at[row.name] = x, value
        ax.vlines([x], low, high, color=colour, alpha=0.35, lw=4)
        ax.plot([x], [value], "o", color=colour, ms=size, label=_short(row.name), zorder=4)
    line = [at[name] for name in plan.frontier if name in at]
    if priced and len(line) > 1:
        ax.plot(*zip(*line, strict=True), color=GREY, drawstyle="steps-post", lw=1.2, zorder=1)
    _limit(ax, plan, metric.scale)
    ax.set(title=_title(plan.quoted), xlabel="$ a month" if priced else "replicas")
    logarithmic(ax)
    ax.set_xlim(0, None)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    whole(ax.xaxis, 4)
    bottom, top = ax.get_ylim()
    ax.set_ylim(top=top * (top / bottom) ** ROOM if ax.get_yscale() == "log" else top * (1.0 + ROOM))
    if ax.get_legend_handles_labels()[1]:
        ax.legend(fontsize=7, loc="upper left")


def _replicas(ax: Axes, plan: Plan) -> None:
    """The probability of every SLO being kept against the number of replicas."""
    for row, colour, size in _marked(plan):
        small = {float(t.replicas): t.kept for t in row.tried}
        _shares(ax, small, {float(row.replicas.value): row.probability["all"]}, colour, size, row.name)
    ax.set(title="P(every SLO kept)", xlabel="replicas")
    whole(ax.xaxis, 8)
    _probability(ax, plan)


def _loads(ax: Axes, plan: Plan) -> None:
    """The probability of every SLO being kept against the load, of each fleet."""
    by_name = {each.option: each for each in plan.crossing}
    for row, colour, size in _marked(plan):
        shares = {float(load): share for load, share in by_name[row.name].tried.items()}
        _shares(ax, shares, {plan.load: row.probability["all"]}, colour, size, row.name)
    ax.set(title="P(every SLO kept)", xlabel=plan.unit)
    ax.set_xlim(0, None)
    _probability(ax, plan)


def _shares(
    ax: Axes, small: Mapping[float, Share], large: Mapping[float, Share], colour: str, size: float, name: str
) -> None:
    both = sorted({**small, **large}.items())
    ax.plot([x for x, _ in both], [share.value for _, share in both], color=colour, lw=1, alpha=0.5)
    ax.plot(list(small), [share.value for share in small.values()], ".", color=colour, ms=7, alpha=0.6)
    ax.plot(list(large), [share.value for share in large.values()], "o", color=colour, ms=size, label=_short(name))
    for x, share in large.items():
        low, high = (share.value + sign * BAND * share.stderr for sign in (-1.0, 1.0))
        ax.vlines([x], max(0.0, low), min(1.0, high), color=colour, alpha=0.35, lw=4)


def _probability(ax: Axes, plan: Plan) -> None:
    ax.axhline(plan.goal, color=SLO, ls=(0, (1, 1)), lw=1.6, label=f"goal: {plan.goal:.0%}", zorder=3)
    ax.set_ylim(0, 1.03)
    ax.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    ax.legend(fontsize=7)


def _periods(ax: Axes, plan: Plan, periods: Sequence[Period]) -> None:
    """The quoted latency of the chosen option in each period."""
    metric = METRICS[plain(plan.quoted)]
    points = [(p.start / HOUR, *_scaled(p.metrics[plan.quoted], metric.scale)) for p in periods]
    known = [(x, low, value, high) for x, value, low, high in points if value is not None]
    hours = [x for x, *_ in known]
    ax.fill_between(hours, [p[1] for p in known], [p[3] for p in known], color=BLUE, alpha=0.16, lw=0)
    ax.plot(hours, [p[2] for p in known], "-", marker=".", color=BLUE, label=_short(plan.chosen.name))
    _limit(ax, plan, metric.scale)
    ax.set(title=f"{label(plan.quoted)} in each period, {metric.unit}", xlabel="start of the period, h")
    logarithmic(ax)
    ax.legend(fontsize=7)


def _limit(ax: Axes, plan: Plan, scale: float) -> None:
    if (limit := plan.slo.get(plan.quoted)) is not None:
        name = f"SLO: {limit_text(plan.quoted, limit)}"
        ax.axhline(scale * limit, color=SLO, ls=(0, (1, 1)), lw=1.6, label=name, zorder=3)


def _marked(plan: Plan) -> list[tuple[OptionRow, str, float]]:
    """The options with colours and sizes of their points; a later point leaves the edge of an earlier one visible."""
    sizes = [max(4.0, 9.0 - 1.5 * i) for i in range(len(plan.options))]
    return list(zip(plan.options, COLOURS * len(plan.options), sizes, strict=False))


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def _scaled(estimate: Estimate, scale: float) -> tuple[float | None, float, float]:
    """Value, low, high; the value alone where there is no band."""
    if estimate.value is None:
        return None, 0.0, 0.0
    value = scale * estimate.value
    low, high = (value if end is None else scale * end for end in (estimate.low, estimate.high))
    return value, low, high

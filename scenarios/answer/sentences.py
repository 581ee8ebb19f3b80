"""The answer in a few sentences: which load meets the SLOs, how long answers take there, and what that costs.

The sentences only restate a forecast, a run or a comparison.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pandas as pd

from scenarios.answer.numbers import parts, percent, significant
from scenarios.compare.comparison import Comparison
from scenarios.forecast.cost import of_the_machine
from scenarios.forecast.forecast import Forecast, Row, named
from scenarios.forecast.slo import KEPT
from sim.model.metric import METRICS, label, plain
from sim.model.warning import Notice
from sim.results import metrics
from sim.run import Run, Rung


class Check(NamedTuple):
    """One requirement, whether it is met (None: at some loads), and that in words."""

    what: str
    passed: bool | None
    words: str


class Answer(NamedTuple):
    """The name of what is described, the sentences, the requirements, and the warnings about every number in them."""

    name: str
    sentences: list[str]
    checks: list[Check]
    assumptions: Sequence[Notice] = ()


def of_forecast(f: Forecast) -> Answer:
    """The answer of a forecast, with bands and probabilities."""
    loads = [row.load for row in f.rows("rps")]
    at, first = _largest_load(f, loads)
    return Answer(f.name, [first, _latency_sentence(f, at), _cost_sentence(f, at)], _checks(f, loads), f.assumptions)


def _largest_load(f: Forecast, loads: Sequence[float]) -> tuple[float, str]:
    """The load that the other sentences are about, and the sentence about it."""
    if f.crossing is not None:
        return f.crossing.kept_at or loads[0], slo_sentence(f)
    knee, band = parts(f.knee.load)
    if f.knee.below:
        return loads[0], f"No SLO is set; {f.knee.meaning} at {named(loads[0], f.unit)} already."
    if f.knee.reached < 0.5:
        return loads[-1], f"No SLO is set; up to {named(loads[-1], f.unit)} nothing yet shows that {f.knee.meaning}."
    rps, spread = parts(f.plateau.rps)
    below = [load for load in loads if load <= (f.knee.load.value or math.inf)]
    most = f"at most {rps} requests/s{_in(spread)} come through"
    return (below or loads)[
        -1 if below else 0
    ], f"No SLO is set; {f.knee.meaning} at about {knee} {f.unit}{_in(band)}, and {most}."


def _latency_sentence(f: Forecast, load: float) -> str:
    at = named(load, f.unit)
    found = {metric: next((r for r in f.rows(metric) if r.load == load), None) for metric in _QUOTED}
    if (row := found["e2e_p50"]) is None or row.value is None:
        return f"At {at} there is no steady state: the queue grows, and no latency can be quoted."
    quoted = {metric: _value(row) for metric, row in found.items() if row is not None and row.value is not None}
    return _latencies(at, "take", "come", quoted)


_QUOTED = ("e2e_p50", "e2e_p95", "ttft_p95", "rps")


def _latencies(at: str, take: str, come: str, said: Mapping[str, str]) -> str:
    text = f"At {at} half of the answers {take} up to {said['e2e_p50']}"
    text += f" and 95 % up to {said['e2e_p95']}" if "e2e_p95" in said else ""
    text += f", 95 % of the first tokens {come} within {said['ttft_p95']}" if "ttft_p95" in said else ""
    return text + (f", at {said['rps']}." if "rps" in said else ".")


def _cost_sentence(f: Forecast, load: float) -> str:
    row = next((cost for cost in f.cost if cost.at == named(load, f.unit)), None)
    if row is None:
        return "The cost is not known: no price is set (--set price.usd_per_hour=12)."
    value, band = parts(row.per_1000_requests)
    return f"At this load 1,000 requests cost ${value}{_in(band)}, at {of_the_machine(row.usd_per_hour)}."


def _checks(f: Forecast, loads: Sequence[float]) -> list[Check]:
    found = []
    for metric, limit in f.scenario.slo.items():
        mine = [p for p in f.slo if p.metric == metric]
        kept = [p.probability >= KEPT for p in mine]
        odds = f"{mine[-1].probability:.0%} at {named(mine[-1].load, f.unit)}" if mine else ""
        if all(kept):
            found.append(Check(limit_text(metric, limit), True, f"at every load asked (probability {odds})"))
        elif not kept[0]:
            odds = f"{mine[0].probability:.0%} at {named(mine[0].load, f.unit)}"
            found.append(Check(limit_text(metric, limit), False, f"at every load asked (probability {odds})"))
        else:
            i = kept.index(False)
            words = f"kept up to {named(mine[i - 1].load, f.unit)} (probability {mine[i - 1].probability:.0%}); "
            words += f"{mine[i].probability:.0%} at {mine[i].load:g}"
            found.append(Check(limit_text(metric, limit), None, words))
    return found


def of_run(run: Run) -> Answer:
    """The answer of a run: what was observed at its loads, in one window each, so without bands."""
    table = metrics.table(run)
    name = f"{run.name}, {run.kind}"
    if table.empty:
        return Answer(name, ["No load of this run has a complete window, so it shows no metric."], [])
    loads = [_shortly(run.rungs[int(rung)]) for rung in table["rung"]]
    slo = run.scenario.slo
    kept = [all(row[metric] <= limit for metric, limit in slo.items()) for _, row in table.iterrows()]
    at, top = len(loads) - 1, int(table["rps"].to_numpy().argmax())
    most = f"at most {significant(float(table['rps'].iloc[top]))} requests/s came through"
    first = f"At {loads[0]} {most}."
    if len(loads) > 1:
        first = f"At loads of {loads[0]} to {loads[-1]} {most}, at {loads[top]}."
    if slo and False in kept:
        broken = kept.index(False)
        at = max(0, broken - 1)
        first = f"No load that was {run.kind} keeps every SLO."
        if broken:
            first = f"Every SLO was kept up to {loads[at]}, and not at {loads[broken]}."
    elif slo:
        first = f"Every SLO was kept at every load that was {run.kind}, up to {loads[-1]}."
    there = table.iloc[at]
    said = {m: _plain(m, float(there[m])) for m in _QUOTED if not math.isnan(there[m])}
    second = f"At {loads[at]} no answer was complete."
    sentences = [first, _latencies(loads[at], "took", "came", said) if "e2e_p50" in said else second]
    if (usd := run.scenario.usd_per_hour) is not None and there["rps"] > 0:
        each = significant(usd / 3.6 / float(there["rps"]))
        sentences.append(f"At this load 1,000 requests cost ${each}, at {of_the_machine(usd)}.")
    return Answer(name, sentences, [_seen(table, m, limit, loads) for m, limit in slo.items()])


def _shortly(rung: Rung) -> str:
    """A rung's load in words, with four digits."""
    return named(float(f"{rung.load:.4g}"), "users" if rung.users is not None else "requests/s")


def _seen(table: pd.DataFrame, metric: str, limit: float, loads: Sequence[str]) -> Check:
    """Whether a run kept one SLO; a metric that it does not show counts as not kept."""
    kept = [bool(value <= limit) for value in table[metric]]
    what = limit_text(metric, limit)
    if table[metric].isna().all():
        return Check(what, False, "not on record")
    if all(kept) or not kept[0]:
        at = -1 if all(kept) else 0
        value = f"{_plain(metric, float(table[metric].iloc[at]))} at {loads[at]}"
        return Check(what, all(kept), f"at every load of the run ({value})" if all(kept) else value)
    i = kept.index(False)
    return Check(what, None, f"kept up to {loads[i - 1]}, not at {loads[i]}")


def of_comparison(c: Comparison) -> Answer:
    """How far the two sides differ, and which tolerance holds."""
    known = {metric: s for metric, s in c.summary.items() if s.mape is not None}
    shown = [metric for metric in (*c.tolerances, "e2e_mean", "ttft_p50", "rps") if metric in known]
    apart = ", ".join(f"{percent(known[m].mape)} in {label(m)}" for m in dict.fromkeys(shown))
    subject = "The forecast is off by" if c.of == "a forecast" else "The second differs from the first by"
    nothing = "They have no metric in common." if not c.rows else "Every load was used for the fit, so none is scored."
    sentences = [f"{subject} {apart} on average." if apart else nothing]
    if c.coverage is not None and c.of == "a forecast":
        sentences.append(f"{c.coverage:.0%} of what was measured lies inside its 90 % band.")
    verdicts = {
        None: "There is no verdict: "
        + ("every rung was used for the fit." if c.tolerances else "no tolerance is set."),
        True: "That is within the tolerances.",
        False: "That is outside the tolerances.",
    }
    sentences.append(verdicts[c.passed])
    checks = []
    for metric, limit in c.tolerances.items():
        mape = known[metric].mape if metric in known else None
        holds = mape is not None and mape <= limit and c.passed is not None
        words = "not judged" if mape is None else f"{percent(mape)} on average"
        checks.append(Check(f"{label(metric)} within {percent(limit, digits=0)}", holds, words))
    return Answer(
        f"{c.measured} against {c.simulated}", sentences, checks if c.passed is not None else [], c.assumptions
    )


def limit_text(metric: str, limit: float) -> str:
    """A limit in words: `E2E p95 ≤ 15 s`."""
    return f"{label(metric)} ≤ {_plain(metric, limit)}"


def _plain(metric: str, value: float) -> str:
    what = METRICS[plain(metric)]
    return f"{significant(what.scale * value)} {what.unit or label(metric)}"


def _value(row: Row) -> str:
    value, band = parts(row)
    return f"{value} {'requests/s' if row.metric == 'rps' else 's'}{_in(band)}"


def _in(band: str) -> str:
    return f" ({band})" if band else ""


def slo_sentence(forecast: Forecast) -> str:
    """Up to which load the SLOs are kept, in a sentence."""
    found, unit, slo = forecast.crossing, forecast.unit, forecast.scenario.slo
    if found is None:
        return "There is no SLO to keep."
    goal = limit_text(*next(iter(slo.items()))) if len(slo) == 1 else "every SLO"
    goal_first = f"{goal[0].upper()}{goal[1:]}"
    top = forecast.curves[-1].load
    value, band = parts(found.load)
    about = "" if found.load.value is None else f", crossing at about {value} {unit}{_in(band)}"
    which = f", {label(found.breaks)} first" if found.breaks and len(slo) > 1 else ""
    sure = f"with a probability of at least {found.probability:.0%}"
    if found.kept_at is None:
        broken = "" if found.broken_at is None else f"; broken at {named(found.broken_at, unit)}{about}{which}"
        return f"No load keeps {goal} {sure}{broken}."
    if found.kept_at == top:
        return f"{goal_first} is kept up to {named(top, unit)}, the top of this ladder, {sure}."
    kept = f"{goal_first} is kept at {named(found.kept_at, unit)} {sure}"
    if found.broken_at is None:
        return f"{kept}; at {named(top, unit)}, the top of this ladder, it is not certain."
    return f"{kept}, broken at {named(found.broken_at, unit)}{about}{which}."

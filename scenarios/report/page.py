"""Forecasts, plans, runs and comparisons as one self-contained page, from the template `page.html`.

A section is a dictionary that the template renders: text, cards, pictures, tables. Nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from scenarios.answer import sentences, tables
from scenarios.answer.plan import of_plan
from scenarios.compare.comparison import Comparison
from scenarios.compare.saved import Saved
from scenarios.forecast.cost import of_the_machine
from scenarios.forecast.forecast import Estimate, Forecast, common_warnings, named
from scenarios.forecast.forecast import unit_of as unit_of_loads
from scenarios.plan.answer import Plan
from scenarios.report import plan, plots
from scenarios.report.sections import (
    Section,
    card,
    cell,
    grid,
    mark,
    of_comparison,
    of_flags,
    of_run,
    over_time,
    pictures,
)
from sim.cluster.replay import with_users
from sim.model.metric import METRICS, label
from sim.model.text import escaped
from sim.model.warning import SHOWN, Notice, ranked
from sim.results import rates
from sim.run import Run

CURVES = (*tables.LATENCY, *tables.RATES, *tables.STEPS)


def page(items: Sequence[Saved], runs: dict[str, Run], title: str = "Servecast report") -> str:
    """The page about these; `runs` are the central runs of forecasts, by name."""
    forecasts = [item for item in items if isinstance(item, Forecast)]
    of_a_kind = (forecasts[0].scenario.machine, forecasts[0].unit) if forecasts else None
    forecasts = [f for f in forecasts if (f.scenario.machine, f.unit) == of_a_kind]  # others have other axes
    shared = common_warnings(forecasts) if forecasts else []
    sections = [_together(forecasts, shared)] if len(forecasts) > 1 else []
    measured = [item for item in items if isinstance(item, Run) and item.kind == "measured"]
    for item in items:
        if isinstance(item, Forecast):
            said = shared if len(forecasts) > 1 else []
            sections.append(_forecast(item, runs.get(item.name), said, measured))
        elif isinstance(item, Run):
            sections.append(of_run(item))
        elif isinstance(item, Plan):
            sections.append(plan.section(item))
        else:
            sections.append(of_comparison(item))
    for i, section in enumerate(sections):
        section["id"] = f"s{i}"
        shown = folded_warnings(section.get("warnings", []))
        section["warnings"], section["more_warnings"] = shown
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, finalize=_shown
    )
    return environment.get_template("page.html").render(
        title=title,
        answers=_answers(items),
        sections=[_EMPTY | section for section in sections],
        version=version("servecast"),
        forecasts=bool(forecasts),
    )


def _shown(value: object) -> object:
    """A value as the page shows it: text from outside cannot command a browser, nor look like other text."""
    if isinstance(value, Markup):
        return Markup(escaped(value))
    return escaped(value) if isinstance(value, str) else value


def _answers(items: Sequence[Saved]) -> list[dict[str, Any]]:
    """The head of the page: the answers of all plans and forecasts, or of the runs if there is none; then the
    comparisons."""
    forecasts = [item for item in items if isinstance(item, Forecast)]
    found = [of_plan(item) for item in items if isinstance(item, Plan)]
    found += [sentences.of_forecast(f) for f in forecasts]
    if not found:
        found = [sentences.of_run(item) for item in items if isinstance(item, Run)]
    found += [sentences.of_comparison(item) for item in items if isinstance(item, Comparison)]
    words = {True: ("in", "pass"), False: ("out", "fail"), None: ("part", "in part")}
    return [
        {
            "name": each.name if len(found) > 1 else "",
            "text": " ".join(each.sentences),
            "assumptions": each.assumptions,
            "checks": [
                {"mark": mark(*words[check.passed]), "what": check.what, "words": check.words} for check in each.checks
            ],
        }
        for each in found
    ]


def folded_warnings(warnings: Sequence[Notice]) -> tuple[list[Notice], list[Notice]]:
    """The warnings that are shown, those that matter most, and those that are folded."""
    order = ranked(warnings)
    return order[:SHOWN], order[SHOWN:]


_EMPTY: Section = {
    "description": "",
    "headline": "",
    "cards": [],
    "warnings": [],
    "more_warnings": [],
    "parts": [],
    "parameters": {},
    "provenance": "",
}


def _together(forecasts: list[Forecast], shared: list[Notice]) -> Section:
    rows = []
    for f in forecasts:
        cost = f.cost[0].per_1000_requests if f.cost else Estimate(value=None, low=None, high=None)
        cells = [
            f.name,
            cell(f.knee.load),
            cell(f.knee.rps),
            cell(f.plateau.rps),
            cell(cost),
            f.bottleneck[-1].binds,
        ]
        rows.append({"cells": cells})
    titles = [
        "scenario",
        f"knee, {forecasts[0].unit}",
        "knee, RPS",
        "plateau, RPS",
        "$ per 1,000 requests at the knee",
        "bottleneck at the top",
    ]
    return {
        "name": "Side by side",
        "warnings": shared,
        "parts": [pictures(plots.several(forecasts)), {"table": grid(titles, rows, left=(0, 5))}],
    }


def _forecast(f: Forecast, run: Run | None, said: list[Notice], measured: Sequence[Run]) -> Section:
    end = "knee" if f.knee.reached >= 0.5 else "top of the ladder"  # where the others count with it
    knee = card(f"{f.unit} at the {end}", f.knee.load)
    if f.knee.below:
        knee["value"] = f"< {f.curves[0].load:g}"
    cards = [
        knee,
        card(f"requests/s at the {end}", f.knee.rps),
        card("requests/s at the plateau", f.plateau.rps),
    ]
    if f.cost:
        cards.append(card(f"$ per 1,000 requests at the {end}", f.cost[0].per_1000_requests))
    same = [run for run in measured if _same_question(run, f)]
    points = [rates.table(with_users(run)) for run in same]
    sections = [
        pictures(plots.overview(f, points), "Throughput and latency", _legend(f, bool(points))),
        pictures(plots.first_tokens(f, points)),
        {"table": _curves(f)},
        {"title": "Bottlenecks", "table": _bottleneck(f)},
    ]
    if f.published:
        sections.append({"title": "Published figures", "table": _published(f)})
    if f.slo or f.cost:
        sections.append({"title": "Cost and SLOs", "table": _plan(f)})
    if f.flags:
        sections.append({"title": "The server's flags", "table": of_flags(f.flags)})
    if run is not None:
        text = "One simulated run of the ladder, with the central parameters; steady windows are shaded."
        sections.append(over_time(run, "One run over time", text))
    return {
        "name": f.name,
        "description": f.scenario.description,
        "headline": _limits(f),
        "cards": cards,
        "warnings": [text for text in f.warnings if text not in said],
        "parts": sections,
        "parameters": _parameters(f),
        "provenance": _provenance(f),
    }


def _same_question(run: Run, f: Forecast) -> bool:
    """Whether what was measured belongs on the curves of a forecast: the same lengths, loads of the same unit."""
    return run.scenario.workload == f.scenario.workload and unit_of_loads(run.scenario) == f.unit


def _limits(f: Forecast) -> str:
    """What limits the top of the ladder."""
    top = f.bottleneck[-1]
    return f"Bottleneck at {named(top.load, f.unit)}: {top.binds}."


def _legend(f: Forecast, measured: bool) -> str:
    text = "Shaded: 90 % bands" + (", and the knee." if f.knee.reached >= 0.05 else ".")
    text += " Circles: measured." if measured else ""
    text += " Red: published." if f.published else ""
    return text + " Dashed lines: outside the calibrated range." if any(row.extrapolated for row in f.curves) else text


def _curves(f: Forecast) -> dict[str, Any]:
    by_metric = [f.rows(metric) for metric in CURVES]
    rows = [
        {
            "cells": [f"{each[0].load:g}", *(cell(row, METRICS[row.metric].scale) for row in each)],
            "beyond": each[0].extrapolated,
        }
        for each in zip(*by_metric, strict=True)
    ]
    caption = "Shaded rows lie outside the calibrated range." if any(row["beyond"] for row in rows) else ""
    return grid([f.unit, *(METRICS[name].column for name in CURVES)], rows, caption=caption)


def _bottleneck(f: Forecast) -> dict[str, Any]:
    rows = [{"cells": [f"{rung.load:g}", rung.binds, rung.words]} for rung in f.bottleneck]
    return grid([f.unit, "bottleneck", "why"], rows, left=(1, 2), wide=(2,))


def _published(f: Forecast) -> dict[str, Any]:
    rows = []
    for row in f.published:
        figure = row.figure
        inside = mark("in", "in the band") if row.inside else mark("out", "outside the band")
        printed = f"{figure.value:g} ± {figure.rounding:g}"
        name, users = label(figure.metric), figure.users or "–"
        rows.append({"cells": [name, users, printed, cell(row.simulated), inside, figure.source]})
    return grid(["metric", "users", "published", "simulated", "", "source"], rows, left=(0, 4, 5))


def _plan(f: Forecast) -> dict[str, Any]:
    limits = list(dict.fromkeys((p.metric, p.limit) for p in f.slo))
    chances = {(p.load, p.metric): f"{p.probability:.0%}" for p in f.slo}
    prices = {row.at: row for row in f.cost}
    names: list[tuple[str, float | None]] = [(named(row.load, f.unit), row.load) for row in f.rows("rps")]
    rows = []
    for name, load in [("knee", None), *names] if f.cost else names:
        cells: list[object] = [name]
        cells += ["" if load is None else chances[load, metric] for metric, _ in limits]
        if row := prices.get(name):
            each = row.per_1000_requests, row.per_million_input, row.per_million_output, row.per_million_blended
            cells += map(cell, each)
        rows.append({"cells": cells})
    titles = ["at", *(f"P({sentences.limit_text(metric, limit)})" for metric, limit in limits)]
    price, caption = (
        f.scenario.price,
        "P: the probability, over all that is uncertain, that an SLO is kept.",
    )
    if f.cost and price is not None:
        titles += ["$ per 1,000 requests", "$ per million input", "$ per million output", "$ per million tokens"]
        source = f" ({price.source})" if price.source else ""
        caption += (
            f" At {of_the_machine(f.cost[0].usd_per_hour)}{source}. Input and output tokens are each charged the whole "
            "machine; the last column counts both."
        )
    return grid(titles, rows, left=(0,), caption=caption)


def _parameters(f: Forecast) -> dict[str, Any]:
    rows = [
        {"cells": [name, f"{p['value']:.4g}", f"{p['low']:.3g} – {p['high']:.3g}", p["unit"], p["meaning"]]}
        for name, p in f.provenance.parameters.items()
    ]
    return grid(["parameter", "value", "95 % interval", "unit", "meaning"], rows, left=(0, 3, 4))


def _provenance(f: Forecast) -> str:
    p = f.provenance
    lines = [f"calibrated from: {p.kind}", p.note, *(f"{name} sha256 {digest}" for name, digest in p.files.items())]
    lines += [f"step times: {p.model}", f"seed {p.seed}, {p.replicates} replicates"]
    lines += [f"--set {change}" for change in p.changes]
    lines += [", ".join(f"{name} {number}" for name, number in p.software.items())]
    return "\n".join(line for line in lines if line)

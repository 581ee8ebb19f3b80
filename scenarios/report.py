"""Forecasts, runs and comparisons as one self-contained page, filled into `report.html`.

A section is a dictionary the template knows: words, cards, pictures, tables. What is said here is read off the values;
nothing is computed.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from scenarios import compare, plots, tables
from scenarios.compare import Comparison
from scenarios.evidence import Evidence, itl
from scenarios.forecast import Estimate, Forecast, Row, named, read_forecast
from scenarios.tables import parts, percent, unit_of
from sim import metrics
from sim.document import Document
from sim.errors import BadInput
from sim.run import Run, read_run

Section = dict[str, Any]
CURVES = tables.LATENCY + tables.RATES + tables.STEPS
OF_A_RUN = (
    ("E2E mean s", "e2e_mean"),
    ("E2E p50 s", "e2e_p50"),
    ("E2E p95 s", "e2e_p95"),
    ("TTFT p50 s", "ttft_p50"),
    ("TTFT p95 s", "ttft_p95"),
    ("ITL p50 ms", "itl_p50"),
    ("RPS", "rps"),
    ("in tok/s", "input_tokens_per_s"),
    ("out tok/s", "output_tokens_per_s"),
    ("errors %", "error_rate"),
)


def page(items: Sequence[Forecast | Run | Comparison], runs: dict[str, Run], title: str = "Servecast report") -> str:
    """The page about these; `runs` are the central runs of forecasts, by name."""
    forecasts = [item for item in items if isinstance(item, Forecast)]
    of_a_kind = (forecasts[0].scenario.machine, forecasts[0].unit) if forecasts else None
    forecasts = [f for f in forecasts if (f.scenario.machine, f.unit) == of_a_kind]  # others have other axes
    shared = [text for text in forecasts[0].doubts if all(text in f.doubts for f in forecasts)] if forecasts else []
    sections = [_together(forecasts, shared)] if len(forecasts) > 1 else []
    for item in items:
        if isinstance(item, Forecast):
            sections.append(_forecast(item, runs.get(item.name), shared if len(forecasts) > 1 else []))
        elif isinstance(item, Run):
            sections.append(_run(item))
        else:
            sections.append(_comparison(item))
    for i, section in enumerate(sections):
        section["id"] = f"s{i}"
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template("report.html").render(
        title=title, sections=[_EMPTY | section for section in sections], version=version("servecast")
    )


def read_item(path: Path) -> Forecast | Run | Comparison:
    """A forecast, a run or a comparison; of a folder that `simulate -o` or `compare -o` wrote, what is in it."""
    if path.is_dir():
        for name in ("forecast.json", "comparison.json"):
            if (path / name).exists() and not (path / "run.json").exists():
                return read_item(path / name)
        inside = sorted(each.parent.name for each in path.glob("*/forecast.json"))
        if inside and not (path / "run.json").exists():
            raise BadInput(f"holds the forecasts of several scenarios; name {path / inside[0]}", path=path)
        return read_run(path)
    document = Document(path, "a run directory, a forecast or a comparison", 1)
    if "curves" in document.values:
        return read_forecast(path)
    if "rows" not in document.values:
        raise BadInput("expected a run directory, a forecast or a comparison", path=path, line=1)
    try:
        return msgspec.convert(document.values, Comparison)
    except msgspec.ValidationError as e:
        raise BadInput(f"not a comparison: {e}", path=path) from e


_EMPTY: Section = {
    "description": "",
    "headline": "",
    "cards": [],
    "doubts": [],
    "parts": [],
    "parameters": {},
    "provenance": "",
}


def _together(forecasts: list[Forecast], shared: list[str]) -> Section:
    rows = []
    for f in forecasts:
        cost = f.cost[0].per_1000_requests if f.cost else Estimate(value=None, low=None, high=None)
        cells = [f.name, _cell(f.knee.load), _cell(f.knee.rps), _cell(f.plateau.rps), _cell(cost), f.binding[-1].binds]
        rows.append({"cells": cells})
    titles = [
        "scenario",
        f"knee, {forecasts[0].unit}",
        "knee, RPS",
        "plateau, RPS",
        "$/1000 requests at the knee",
        "binds at the top",
    ]
    return {
        "name": "Side by side",
        "doubts": shared,
        "parts": [{"image": _image(plots.several(forecasts))}, {"table": _table(titles, rows, left=(0, 5))}],
    }


def _forecast(f: Forecast, run: Run | None, said: list[str]) -> Section:
    end = "knee" if f.knee.reached > 0.05 else "top of the ladder"
    knee = _card(f"{f.unit} at the {end}", f.knee.load)
    if f.knee.below:
        knee["value"] = f"< {f.curves[0].load:g}"
    cards = [
        knee,
        _card(f"requests/s at the {end}", f.knee.rps),
        _card("requests/s at the plateau", f.plateau.rps),
    ]
    if f.cost:
        cards.append(_card(f"$ per 1,000 requests at the {end}", f.cost[0].per_1000_requests))
    sections = [
        {"image": _image(plots.overview(f)), "title": "Throughput and latency", "text": _legend(f)},
        {"image": _image(plots.first_tokens(f))},
        {"table": _curves(f)},
        {"title": "What limits it", "table": _binding(f)},
    ]
    if f.published:
        sections.append({"title": "Beside what was published", "table": _published(f)})
    if f.slo or f.cost:
        sections.append({"title": "Cost and service levels", "table": _plan(f)})
    if run is not None:
        text = "One simulated climb, with central parameters; the steady windows are shaded."
        sections.append(
            {"title": "As a load generator would show it", "text": text, "image": _image(plots.over_time(run))}
        )
    return {
        "name": f.name,
        "description": f.scenario.description,
        "headline": _headline(f),
        "cards": cards,
        "doubts": [text for text in f.doubts if text not in said],
        "parts": sections,
        "parameters": _parameters(f),
        "provenance": _provenance(f),
    }


def _headline(f: Forecast) -> str:
    (load, loads), (rps, rates), top = parts(f.knee.load), parts(f.knee.rps), f.binding[-1]
    loads, rates = (f" ({band})" if band else "" for band in (loads, rates))
    if f.knee.below:
        return f"At {named(f.curves[0].load, f.unit)} {f.knee.meaning} already: the ladder begins beyond the knee."
    if f.knee.reached < 0.05:
        return f"{named(f.curves[-1].load, f.unit)} and more before {f.knee.meaning}: the ladder ends before the knee."
    cost = f" at ${parts(f.cost[0].per_1000_requests)[0]} per 1,000 requests" if f.cost else ""
    return (
        f"{load} {f.unit}{loads} before {f.knee.meaning}: {rps} requests/s{rates}{cost}. "
        f"At {named(top.load, f.unit)} the limit is: {top.binds}."
    )


def _legend(f: Forecast) -> str:
    text = "Shaded: 90 % bands" + (", and the knee." if f.knee.reached >= 0.05 else ".")
    text += " Red: what was published." if f.published else ""
    return text + " Dashed lines: beyond what was calibrated." if any(row.extrapolated for row in f.curves) else text


def _run(run: Run) -> Section:
    table = metrics.table(run)
    counted = int(run.requests["output_tokens"].sum()) > 0
    shown = [(title, name) for title, name in OF_A_RUN if counted or not name.endswith("tokens_per_s")]
    rows = [
        {"cells": [f"{row['load']:g}", *(_number(unit_of(name) * row[name]) for _, name in shown)]}
        for _, row in table.iterrows()
    ]
    unit = "users" if run.scenario.load.users else "requests/s"
    doubts = list(run.doubts) + [f"{named(rung.load, unit)}: {text}" for rung in run.rungs for text in rung.doubts]
    if run.requests.empty:
        doubts.append("no request of it is on record")
    pictures = [{"image": _image(plots.over_time(run)), "title": "Over time"}] if len(table) else []
    if found := itl(run):
        picture = _image(plots.distributions(Evidence(itl=found), unit, (run.kind, "")))
        pictures.append({"image": picture, "title": "The gaps between tokens"})
    return {
        "name": f"{run.name}, {run.kind}",
        "description": f"A {run.kind} run{f', {run.created}' if run.created else ''}. {run.stopped}",
        "doubts": doubts,
        "parts": [{"table": _table([unit, *(title for title, _ in shown)], rows)}, *pictures],
        "parameters": _asked(run),
        "provenance": ", ".join(f"{name} {number}" for name, number in run.software.items() if number),
    }


def _asked(run: Run) -> dict[str, Any]:
    """What was measured: the server as it says it is, its flags, and what it was asked."""
    info = run.info or {}
    said = {name: info[name] for name in ("model_id", "model_dtype", "version") if info.get(name) is not None}
    asked = {f"workload.{name}": value for name, value in _given(run.scenario.workload).items()}
    asked |= {f"load.{name}": value for name, value in _given(run.scenario.load).items()}
    facts = said | {f"server.{name}": value for name, value in msgspec.to_builtins(run.server).items()} | asked
    rows = [{"cells": [name, str(value)]} for name, value in facts.items() if value is not None]
    return _table(["what", "value"], rows, left=(0, 1), wide=(1,))


def _given(values: msgspec.Struct) -> dict[str, Any]:
    """What differs from the default."""
    return {
        field.name: msgspec.to_builtins(getattr(values, field.name))
        for field in msgspec.structs.fields(values)
        if getattr(values, field.name) != field.default
    }


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4g}"


def _comparison(c: Comparison) -> Section:
    verdict = {
        None: "No tolerances were stated, so there is no verdict.",
        True: "Within the tolerances.",
        False: "Outside the tolerances.",
    }
    summary = [
        {
            "cells": [
                name,
                percent(s.mape),
                percent(s.bias, "+"),
                percent(s.coverage, digits=0),
                str(s.rungs),
                f"{s.effective:.2g}",
                percent(c.tolerances.get(name), digits=0),
            ]
        }
        for name, s in c.summary.items()
    ]
    repeated = any(row.repeat_error is not None for row in c.rows)
    rows = [
        {
            "cells": [
                f"{row.load:g}",
                row.metric,
                tables.significant(row.measured, 4),
                _simulated(row),
                percent(row.relative_error, "+"),
                {None: "", True: _mark("in", "inside"), False: _mark("out", "outside")}[row.inside],
                "" if row.held_out else "seen by the fit",
                *([percent(row.repeat_error, "+")] if repeated else []),
            ]
        }
        for row in c.rows
    ]
    against = c.of == "a forecast"
    error = "error" if against else "apart"
    titles = ["load", "metric", *c.titles, error, "band", "", *(["repeat"] if repeated else [])]
    overall = "" if c.coverage is None else f"Inside their bands, all together: {c.coverage:.0%}; 90 % should be. "
    caption = "Repeat: how far the real server was from itself when it was measured again." if repeated else ""
    return {
        "name": f"{c.measured} against {c.simulated}",
        "headline": verdict[c.passed],
        "doubts": c.doubts,
        "parts": [
            {
                "image": _image(plots.compared(c)),
                "title": "Measured over simulated" if against else "One over the other",
            },
            {
                "image": _image(plots.parity(c)),
                "text": "Every load and metric: on the line is right; shaded: 5 %; hollow: seen by the fit.",
            },
            *_behind(c),
            {
                "title": "Summary",
                "table": _table(
                    ["metric", "MAPE", "bias", "inside the band", "rungs", "effective", "tolerance"],
                    summary,
                    left=(0,),
                    caption=f"{overall}{tables.EFFECTIVE.capitalize()}.",
                ),
            },
            {
                "title": "Every load",
                "table": _table(titles, rows, left=(1, 5, 6), caption=caption),
            },
        ],
    }


def _simulated(row: compare.Row) -> Markup:
    """A forecast with its band and, where replicates fall into two groups, the centres of both."""
    value, band = tables.simulated(row, 4)
    two = "" if row.humps is None else f", about {row.humps[0]:.3g} or {row.humps[1]:.3g}"
    return Markup("{}<i>{}</i>").format(value, band + two)


def _behind(c: Comparison) -> list[dict[str, Any]]:
    """The pictures of what lies behind a comparison."""
    found: list[dict[str, Any]] = []
    if c.evidence is not None and c.evidence.itl:
        picture = _image(plots.distributions(c.evidence, c.unit, (c.measured, c.simulated)))
        text = "The share of all gaps that are no longer, in each load's window."
        found.append({"image": picture, "title": "The gaps between tokens", "text": text})
    if c.evidence is not None and c.evidence.by_batch:
        text = (
            "Steps as rebuilt from the streams against the model's step time: points are means, lines hold 90 % of the "
            "steps. Where means leave zero with the batch size, the form is wrong; where they do over time, the "
            "machine drifts."
        )
        found.append({"image": _image(plots.residuals(c.evidence)), "title": "What the step times miss", "text": text})
    return found


def _curves(f: Forecast) -> dict[str, Any]:
    by_metric = [f.rows(metric) for _, metric in CURVES]
    rows = [
        {
            "cells": [f"{each[0].load:g}", *(_cell(row, unit_of(row.metric)) for row in each)],
            "beyond": each[0].extrapolated,
        }
        for each in zip(*by_metric, strict=True)
    ]
    caption = "Shaded rows lie beyond what was calibrated." if any(row["beyond"] for row in rows) else ""
    return _table([f.unit, *(title for title, _ in CURVES)], rows, caption=caption)


def _binding(f: Forecast) -> dict[str, Any]:
    rows = [{"cells": [f"{rung.load:g}", rung.binds, rung.words]} for rung in f.binding]
    return _table([f.unit, "binds", "why"], rows, left=(1, 2), wide=(2,))


def _published(f: Forecast) -> dict[str, Any]:
    rows = []
    for row in f.published:
        figure = row.figure
        inside = _mark("in", "in the band") if row.inside else _mark("out", "outside the band")
        printed = f"{figure.value:g} ± {figure.rounding:g}"
        rows.append(
            {"cells": [figure.metric, figure.users or "–", printed, _cell(row.simulated), inside, figure.source]}
        )
    return _table(["metric", "users", "printed", "simulated", "", "source"], rows, left=(0, 4, 5))


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
            cells += map(_cell, each)
        rows.append({"cells": cells})
    titles = ["at", *(f"P({metric} ≤ {limit:g})" for metric, limit in limits)]
    price, caption = (
        f.scenario.price,
        "P: the probability, over all that is not known for sure, that a service level is kept.",
    )
    if f.cost and price is not None:
        titles += ["$ per 1,000 requests", "$ per million input", "$ per million output", "$ per million tokens"]
        source = f" ({price.source})" if price.source else ""
        caption += (
            f" At ${price.usd_per_hour:g} an hour{source}. Input alone and output alone each charge the whole machine; "
            "the last column counts both."
        )
    return _table(titles, rows, left=(0,), caption=caption)


def _parameters(f: Forecast) -> dict[str, Any]:
    rows = [
        {"cells": [name, f"{p['value']:.4g}", f"{p['low']:.3g} – {p['high']:.3g}", p["unit"], p["meaning"]]}
        for name, p in f.provenance.parameters.items()
    ]
    return _table(["parameter", "value", "95 % interval", "unit", "meaning"], rows, left=(0, 3, 4))


def _provenance(f: Forecast) -> str:
    p = f.provenance
    lines = [f"calibrated through: {p.door}", p.note, *(f"{name} sha256 {digest}" for name, digest in p.files.items())]
    lines += [f"step times: {p.model}", f"seed {p.seed}, {p.replicates} replicates"]
    lines += [f"--set {change}" for change in p.changes]
    lines += [", ".join(f"{name} {number}" for name, number in p.software.items())]
    return "\n".join(line for line in lines if line)


def _table(
    titles: list[str],
    rows: list[dict[str, Any]],
    left: Iterable[int] = (),
    wide: Iterable[int] = (),
    caption: str = "",
) -> dict[str, Any]:
    rows = [{"beyond": False} | row for row in rows]
    return {"titles": titles, "rows": rows, "left": tuple(left), "wide": tuple(wide), "caption": caption}


def _card(what: str, estimate: Estimate) -> dict[str, str]:
    value, band = parts(estimate)
    return {"what": what, "value": value, "band": band}


def _cell(estimate: Estimate | Row, scale: float = 1.0) -> Markup:
    value, band = parts(estimate, scale)
    return Markup("{}<i>{}</i>").format(value, band)


def _mark(kind: str, text: str) -> Markup:
    return Markup('<span class="{}">{}</span>').format(kind, text)


def _image(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()

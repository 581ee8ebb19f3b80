"""Sections of a report, as dictionaries for its template: those of runs and of comparisons."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from markupsafe import Markup

from scenarios.answer import tables
from scenarios.answer.numbers import parts, percent, significant, simulated
from scenarios.compare.comparison import Comparison, Diagnostics
from scenarios.compare.comparison import Row as ComparisonRow
from scenarios.compare.diagnostics import itl
from scenarios.forecast.forecast import Estimate
from scenarios.forecast.forecast import Row as ForecastRow
from scenarios.report import overlays, plots
from scenarios.report.figure import Drawing, panels
from sim.model.flags import WORDS, Flag, plain_flag
from sim.model.identity import named as named_engine
from sim.model.metric import METRICS
from sim.model.warning import notice
from sim.results import metrics
from sim.results.events import between_events
from sim.run import Run

Section = dict[str, Any]
NARROW = (4.2, 5.6)  # inches: a picture for a telephone
OF_A_RUN = (
    *("e2e_mean", "e2e_p50", "e2e_p95", "ttft_p50", "ttft_p95", "itl_p50"),
    *("rps", "input_tokens_per_s", "output_tokens_per_s", "error_rate"),
)


def of_run(run: Run) -> Section:
    """A run as it was measured, or simulated."""
    table = metrics.table(run)
    counted = int(run.requests["output_tokens"].sum()) > 0
    shown = [METRICS[name] for name in OF_A_RUN if counted or not name.endswith("tokens_per_s")]
    units = {"users" if rung.users is not None else "requests/s" for rung in run.rungs}
    unit = "load" if len(units) > 1 else next(iter(units), "users")
    loads = [rung.named if len(units) > 1 else f"{rung.load:g}" for rung in run.rungs]
    rows = [
        {"cells": [loads[int(row["rung"])], *(_number(metric.scale * row[metric.name]) for metric in shown)]}
        for _, row in table.iterrows()
    ]
    untold = [] if run.kind == "simulated" else run.untold
    warnings = [*run.warnings, *untold]
    warnings += [said.of(rung.named) for rung in run.rungs for said in rung.warnings]
    if run.requests.empty:
        warnings.append(notice("no-requests", "the run has no requests"))
    drawn = [over_time(run, "Over time")] if len(table) else []
    said = between_events(run)
    if found := itl(run):
        drawings = overlays.distributions(Diagnostics(itl=found), unit, (run.kind, ""))
        drawn.append(pictures(drawings, f"The gaps between {'events' if said else 'tokens'}"))
    flags = [{"title": "The server's flags", "table": of_flags(run.flags)}] if run.flags else []
    stopped = f"{run.stopped[:1].upper()}{run.stopped[1:]}"
    return {
        "name": f"{run.name}, {run.kind}",
        "description": f"A {run.kind} run{f', {run.created}' if run.created else ''}. {stopped}",
        "warnings": warnings,
        "parts": [
            {"table": grid([unit, *(metric.column for metric in shown)], rows, caption=f"{said}." if said else "")},
            *drawn,
            *flags,
        ],
        "parameters": _asked(run),
        "provenance": ", ".join(f"{name} {number}" for name, number in run.software.items() if number),
    }


def _asked(run: Run) -> dict[str, Any]:
    """What was measured: the server as it says it is, its flags, and what it was asked."""
    info = run.info or {}
    said = {name: info[name] for name in ("model_id", "model_dtype", "version") if info.get(name) is not None}
    asked = {f"workload.{name}": value for name, value in _given(run.scenario.workload).items()}
    asked |= {f"load.{name}": value for name, value in _given(run.scenario.load).items()}
    facts = {"engine": named_engine(run.engine)} | said | asked
    rows = [{"cells": [name, str(value)]} for name, value in facts.items() if value is not None]
    return grid(["what", "value"], rows, left=(0, 1), wide=(1,))


def of_flags(flags: Mapping[str, Flag]) -> dict[str, Any]:
    """The flags of a server, and where each is from."""
    rows = [{"cells": [name, plain_flag(flag), WORDS[flag.source]]} for name, flag in flags.items()]
    caption = "Check what only the scenario or a default says against the server's launch command."
    return grid(["flag", "value", "from"], rows, left=(0, 2), caption=caption)


def _given(values: msgspec.Struct) -> dict[str, Any]:
    """What differs from the default."""
    return {
        field.name: msgspec.to_builtins(getattr(values, field.name))
        for field in msgspec.structs.fields(values)
        if getattr(values, field.name) != field.default
    }


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4g}"


def of_comparison(c: Comparison) -> Section:
    """A comparison with its pictures, its summary and every load."""
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
                c.load(row),
                row.metric,
                significant(row.measured, 4),
                _simulated(row),
                percent(row.relative_error, "+"),
                {None: "", True: mark("in", "inside"), False: mark("out", "outside")}[row.inside],
                "" if row.held_out else "used for the fit",
                *([percent(row.repeat_error, "+")] if repeated else []),
            ]
        }
        for row in c.rows
    ]
    against = c.of == "a forecast"
    error = "error" if against else "difference"
    titles = ["load", "metric", *c.titles, error, "band", "", *(["repeat"] if repeated else [])]
    overall = "" if c.coverage is None else f"Inside their bands, all metrics: {c.coverage:.0%} (90 % expected). "
    caption = "Repeat: the same load measured again, against the first time." if repeated else ""
    return {
        "name": f"{c.measured} against {c.simulated}",
        "warnings": c.warnings,
        "parts": [
            pictures(overlays.compared(c), "Measured and simulated" if against else "First and second"),
            pictures(
                overlays.parity(c),
                text="Every load and metric. On the line both are equal; shaded: within 5 %; hollow: used for the fit.",
            ),
            *_behind(c),
            {
                "title": "Summary",
                "table": grid(
                    ["metric", "MAPE", "bias", "inside the band", "rungs", "effective", "tolerance"],
                    summary,
                    left=(0,),
                    caption=f"{overall}{tables.EFFECTIVE.capitalize()}.",
                ),
            },
            {
                "title": "Every load",
                "table": grid(titles, rows, left=(1, 5, 6), caption=caption),
            },
        ],
    }


def _simulated(row: ComparisonRow) -> Markup:
    """A forecast with its band and, where replicates fall into two groups, the centres of both."""
    value, band = simulated(row, 4)
    two = "" if row.modes is None else f", about {row.modes[0]:.3g} or {row.modes[1]:.3g}"
    return Markup("{}<i>{}</i>").format(value, band + two)


def _behind(c: Comparison) -> list[dict[str, Any]]:
    """The pictures of a comparison's diagnostics."""
    found: list[dict[str, Any]] = []
    if c.diagnostics is not None and c.diagnostics.itl:
        drawings = overlays.distributions(c.diagnostics, c.unit, (c.measured, c.simulated))
        text = "The cumulative share of the gaps, in each load's window."
        found.append(pictures(drawings, "The gaps between tokens", text))
    if c.diagnostics is not None and c.diagnostics.by_batch:
        text = (
            "Step times reconstructed from the streams, relative to the model: points are means, lines hold 90 % of "
            "them. Means that depart from zero with batch size mean that the form of the model is wrong; with time, "
            "that the machine drifts."
        )
        found.append(pictures(overlays.residuals(c.diagnostics), "Residuals of the step times", text))
    return found


def grid(
    titles: list[str],
    rows: list[dict[str, Any]],
    left: Iterable[int] = (),
    wide: Iterable[int] = (),
    caption: str = "",
) -> dict[str, Any]:
    """A table for the template; `left` and `wide` are the numbers of columns."""
    rows = [{"beyond": False} | row for row in rows]
    return {"titles": titles, "rows": rows, "left": tuple(left), "wide": tuple(wide), "caption": caption}


def card(what: str, estimate: Estimate, scale: float = 1.0) -> dict[str, str]:
    """A value in large digits, with its band below."""
    value, band = parts(estimate, scale)
    return {"what": what, "value": value, "band": band}


def cell(estimate: Estimate | ForecastRow, scale: float = 1.0) -> Markup:
    """A value of a table with its band."""
    value, band = parts(estimate, scale)
    return Markup("{}<i>{}</i>").format(value, band)


def mark(kind: str, text: str) -> Markup:
    """Words in the colour of a `kind`: in, out."""
    return Markup('<span class="{}">{}</span>').format(kind, text)


def pictures(drawings: Sequence[Drawing], title: str = "", text: str = "") -> dict[str, Any]:
    """Panels that the page lays out as it has room, with a title and words where there are any."""
    part: dict[str, Any] = {"panels": [image(svg) for svg in panels(drawings)]}
    return part | ({"title": title} if title else {}) | ({"text": text} if text else {})


def over_time(run: Run, title: str, text: str = "") -> dict[str, Any]:
    """A run over its time, drawn twice: for wide pages and for narrow ones."""
    part = {"image": image(plots.over_time(run)), "narrow": image(plots.over_time(run, *NARROW)), "title": title}
    return part | ({"text": text} if text else {})


def image(svg: bytes) -> str:
    """A picture inside the page."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()

"""Tables of the variants of a scenario side by side, simulated with the same random numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.text import Text

from scenarios.answer.numbers import parts, with_band
from scenarios.answer.tables import load_title, show_assumptions
from scenarios.forecast.forecast import Estimate, Forecast, Row
from scenarios.load.variants import Variant
from sim.model.metric import METRICS
from sim.terminal.columns import Column, fitting, show_columns
from sim.terminal.console import Console

LONGEST_TITLE = 20  # of a column; longer ones are numbered
REACHED = 0.95  # of the replicates
BANDS = "bands: --csv, --json, or a wider terminal"


def show_variants(forecasts: Sequence[Forecast], asked: Sequence[Variant], out: Console) -> None:
    """Print variants of a scenario side by side: the metrics of its SLOs at every load, operating points and cost."""
    titles = [" · ".join(variant.values) for variant in asked]
    out.print(Text(forecasts[0].name.rpartition(",")[0] or forecasts[0].name, style="bold"))
    out.print(Text(f"Columns: {' · '.join(v.key for v in asked[0].varied)}"))
    if max(map(len, titles)) > LONGEST_TITLE:
        for number, title in enumerate(titles, 1):
            out.print(Text(f"  {number}: {title}"))
        titles = [str(number) for number in range(1, len(titles) + 1)]
    show_assumptions(list(dict.fromkeys(text for f in forecasts for text in f.assumptions)), out)
    replicates = forecasts[0].provenance.replicates
    out.print(
        Text(
            f"Median and 90 % band of {replicates} simulations, with the same random numbers in every column",
            style="dim",
        )
    )
    for metric in dict.fromkeys(p.metric for f in forecasts for p in f.slo) or ("e2e_p95",):
        _show_metric(forecasts, metric, titles, out)
    _show_operating_points(forecasts, titles, out)


def _show_metric(forecasts: Sequence[Forecast], metric: str, titles: Sequence[str], out: Console) -> None:
    """One metric at every load that any of them has."""
    limits = {f"{f.scenario.slo[metric]:g}" for f in forecasts if metric in f.scenario.slo}
    loads = sorted({row.load for f in forecasts for row in f.rows(metric)})
    found = [{row.load: row for row in f.rows(metric)} for f in forecasts]
    beyond = {row.load for rows in found for row in rows.values() if row.extrapolated}
    columns = []
    for title, rows in zip(titles, found, strict=True):
        columns.append((title, [_scaled(rows[load]) if load in rows else None for load in loads]))
    first = [f"{load:g}{'*' if load in beyond else ' '}" for load in loads]
    notes = ["* outside the calibrated range"] if beyond else []
    out.print()
    out.print(Text(METRICS[metric].column + (f" (SLO: {', '.join(sorted(limits))})" if limits else "")))
    _show_estimates(Column(load_title(forecasts[0]), first, 0), columns, notes, out)


def _show_operating_points(forecasts: Sequence[Forecast], titles: Sequence[str], out: Console) -> None:
    """Plateaus, knees and the cost there."""
    lines: dict[str, list[Estimate | None]] = {
        "plateau, RPS": [f.plateau.rps for f in forecasts],
        f"knee, {forecasts[0].unit}": [f.knee.load for f in forecasts],
        "knee, RPS": [f.knee.rps for f in forecasts],
    }
    if any(f.cost for f in forecasts):
        lines["knee, $/1000 requests"] = [f.cost[0].per_1000_requests if f.cost else None for f in forecasts]
    columns = list(zip(titles, map(list, zip(*lines.values(), strict=True)), strict=True))
    meanings = "; ".join(dict.fromkeys(f.knee.meaning for f in forecasts))
    notes = [f"knee: {meanings}; plateau: {forecasts[0].plateau.meaning}"]
    if any(f.knee.reached < REACHED for f in forecasts):
        notes.append("where a ladder ends below the knee, its highest load is taken")
    out.print()
    _show_estimates(Column("", list(lines), 0, left=True), columns, notes, out)


def _show_estimates(
    first: Column, columns: Sequence[tuple[str, Sequence[Estimate | None]]], notes: list[str], out: Console
) -> None:
    """Estimates side by side, with their bands where there is room for them."""

    def made(text: Callable[[Estimate], str]) -> list[Column]:
        return [Column(title, ["–" if e is None else text(e) for e in cells]) for title, cells in columns]

    whole = [first, *made(with_band)]
    if not fitting(whole, out.width)[1]:
        return show_columns(whole, out, notes)
    return show_columns([first, *made(lambda e: parts(e)[0])], out, [*notes, BANDS])


def _scaled(row: Row) -> Estimate:
    """A metric in its customary unit."""
    ends = [None if x is None else METRICS[row.metric].scale * x for x in (row.value, row.low, row.high)]
    return Estimate(value=ends[0], low=ends[1], high=ends[2])

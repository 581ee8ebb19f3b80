"""Forecasts and comparisons as tables, 80 columns wide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from scenarios.forecast import Forecast, named
from scenarios.numbers import banded, percent, significant, simulated, unit_of
from sim.calibration import Calibration
from sim.console import Console
from sim.forms import LEVEL

if TYPE_CHECKING:
    from scenarios.comparison import Comparison

WIDTH = 80
LATENCY = (("E2E p50 s", "e2e_p50"), ("E2E p95 s", "e2e_p95"), ("TTFT p50 s", "ttft_p50"), ("TTFT p95 s", "ttft_p95"))
RATES = (("RPS", "rps"), ("in tok/s", "input_tokens_per_s"), ("out tok/s", "output_tokens_per_s"))
STEPS = (("TPOT ms", "tpot_mean"), ("queue", "queue"))


def console() -> Console:
    """stdout as rich sees it; exactly 80 columns and no colour where it is not a terminal."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=WIDTH, no_color=True, highlight=False)


def show(forecast: Forecast, out: Console) -> None:
    """Print a forecast: curves, corners, what binds, the published figures beside it, cost and SLO."""
    out.print(Text(forecast.name, style="bold"), Text(forecast.scenario.description))
    out.print(Text(f"median and 90 % band of {forecast.provenance.replicates} replicates", style="dim"))
    for columns in (LATENCY, RATES, STEPS):
        out.print()
        out.print(curves(forecast, columns))
    if any(row.extrapolated for row in forecast.curves):
        out.print(Text("* beyond what was calibrated", style="dim"))
    out.print()
    out.print(corners(forecast))
    out.print()
    for line in binding(forecast):
        out.print(Text(line))
    if forecast.published:
        out.print()
        out.print(published(forecast))
    out.print()
    out.print(promises(forecast))
    if forecast.cost:
        out.print()
        out.print(cost(forecast))


def curves(forecast: Forecast, columns: Sequence[tuple[str, str]]) -> Table:
    """Some metrics at every load."""
    table = _table(_load_title(forecast), *(title for title, _ in columns))
    by_metric = [forecast.rows(metric) for _, metric in columns]
    for rows in zip(*by_metric, strict=True):
        mark = "*" if rows[0].extrapolated else " "
        table.add_row(f"{rows[0].load:g}{mark}", *(banded(row, unit_of(row.metric)) for row in rows))
    return table


def corners(forecast: Forecast) -> Table:
    """Plateau, knee and takeoff."""
    table = _table("", _load_title(forecast), "RPS", "where", left=(0, 3))
    for name in ("plateau", "knee", "takeoff"):
        corner = getattr(forecast, name)
        load = banded(corner.load)
        where = corner.meaning if corner.reached > 0.95 else f"{corner.meaning} (in {corner.reached:.0%} of replicates)"
        if corner.reached < 0.05:
            load, where = f"> {forecast.curves[-1].load:g}", f"{corner.meaning}: beyond this ladder"
        elif corner.below:
            load, where = f"< {forecast.curves[0].load:g}", f"{corner.meaning}: at the first rung already"
        table.add_row(name, load, banded(corner.rps), where)
    table.columns[3].no_wrap = False
    return table


def binding(forecast: Forecast) -> list[str]:
    """What limits the server, in a line for each stretch of the ladder."""
    lines = []
    for binds, group in groupby(forecast.binding, key=lambda rung: rung.binds):
        rungs = list(group)
        ends = list(dict.fromkeys((f"{rungs[0].load:g}", f"{rungs[-1].load:g}")))
        lines.append(f"{' to '.join(ends)} {forecast.unit}: {binds} ({rungs[-1].words})")
    return lines


def published(forecast: Forecast) -> Table:
    """The figures somebody printed beside the same, simulated."""
    table = _table("published", "users", "printed", "simulated", "", left=(0, 4))
    for row in forecast.published:
        figure = row.figure
        users = "–" if figure.users is None else str(figure.users)
        inside = "in the band" if row.inside else "outside the band"
        table.add_row(figure.metric, users, f"{figure.value:g} ± {figure.rounding:g}", banded(row.simulated), inside)
    return table


def promises(forecast: Forecast) -> Table:
    """How probable it is, at every load, that each SLO is met; with what the server does there."""
    limits = list(dict.fromkeys((p.metric, p.limit) for p in forecast.slo))
    table = _table(_load_title(forecast), "batch", "429 %", *(f"P({metric} ≤ {limit:g})" for metric, limit in limits))
    chances = {(p.load, p.metric): f"{p.probability:.0%}" for p in forecast.slo}
    for batch, refused in zip(forecast.rows("mean_batch"), forecast.rows("overloaded_rate"), strict=True):
        does = [f"{batch.value or 0:.3g}", f"{100 * (refused.value or 0):.2g}"]
        table.add_row(f"{batch.load:g} ", *does, *(chances[batch.load, metric] for metric, _ in limits))
    return table


def cost(forecast: Forecast) -> Table:
    """What every load costs."""
    table = _table("", "$/1000 requests", "$/M tokens in", "$/M tokens out", "$/M tokens")
    growing = {named(row.load, forecast.unit) for row in forecast.rows("rps") if row.unstable}
    for row in forecast.cost:
        cells = row.per_1000_requests, row.per_million_input, row.per_million_output, row.per_million_blended
        table.add_row(f"{row.at} !" if row.at in growing else row.at, *map(banded, cells))
    hour = forecast.cost[0].usd_per_hour
    table.caption = f"at ${hour:g} an hour; in and out each charge the whole machine, the last column counts both"
    table.caption += "; ! no steady state: of what it gets done" if growing else ""
    table.caption_justify = "left"
    return table


def parameters(calibration: Calibration) -> Table:
    """Fitted parameters with their 95 % intervals."""
    table = _table("parameter", "value ± s.e.", "95 % interval", "unit", left=(0, 3))
    largest = calibration.range.get("sequences", (0.0, math.inf))[1]
    beyond = {n for n in calibration.parameters if n.startswith(LEVEL) and int(n.removeprefix(LEVEL)) > largest}
    for name, p in calibration.parameters.items():
        value = f"{p.value:.3g} ± {p.stderr:.1g}"
        label = f"{name}{'*' if name in beyond else ''}"
        table.add_row(f"{label}: {p.meaning}" if p.meaning else label, value, f"{p.low:.3g} to {p.high:.3g}", p.unit)
    if beyond:
        table.caption = f"* no batch of more than {largest:g} requests was seen: the trend, continued"
        table.caption_justify = "left"
    table.columns[0].no_wrap = False
    return table


EFFECTIVE = "effective: rungs that are independent, as neighbours share their machine's drift"
MORE = "every metric at every load: --csv, --json, -o FOLDER"
MAIN = ("e2e_mean", "e2e_p95", "ttft_p50", "ttft_p95", "rps", "output_tokens_per_s")


def compared(comparison: Comparison) -> list[Table]:
    """The main metrics at every load, and the errors of all of them together."""
    repeated = any(row.repeat_error is not None for row in comparison.rows)
    error = "error" if comparison.of == "a forecast" else "apart"
    titles = ("load ", "metric", *comparison.titles, error, "band", *(["repeat"] if repeated else []))
    each = _table(*titles, left=(1,))
    if comparison.of != "a forecast":
        each.title, each.title_justify = f"first: {comparison.measured}; second: {comparison.simulated}", "left"
    # where 80 columns are too few, a name is broken and no number
    for column in each.columns:
        column.no_wrap = column.header != "metric"
    for row in comparison.rows:
        if row.metric in MAIN:
            again = [percent(row.repeat_error, "+")] if repeated else []
            inside = {None: "–", True: "in", False: "out"}[row.inside]
            mark = " " if row.held_out else "*"
            value, band = simulated(row)
            cells = (f"{row.load:g}{mark}", row.metric, significant(row.measured), f"{value} {band}".rstrip())
            each.add_row(*cells, percent(row.relative_error, "+"), inside, *again)
    notes = ["* seen by the fit"] if any(not row.held_out for row in comparison.rows) else []
    notes += ["repeat: how far the real server was from itself"] if repeated else []
    each.caption, each.caption_justify = "; ".join(notes) or None, "left"
    together = _table("metric", "MAPE", "bias", "in band", "rungs", "effective", "tolerance", left=(0,))
    for metric, s in comparison.summary.items():
        limit = percent(comparison.tolerances.get(metric), digits=0)
        errors = percent(s.mape), percent(s.bias, "+"), percent(s.coverage, digits=0)
        together.add_row(metric, *errors, str(s.rungs), f"{s.effective:.2g}", limit)
    together.caption, together.caption_justify = f"{EFFECTIVE}; {MORE}", "left"
    if comparison.coverage is not None:
        together.caption = f"in band, all together: {comparison.coverage:.0%} (90 % should be); {EFFECTIVE}; {MORE}"
    return [each, together]


def show_comparison(comparison: Comparison, out: Console) -> None:
    """Print a comparison and its verdict."""
    for table in compared(comparison):
        if table.row_count:
            out.print(table)
            out.print()
    words = {
        None: "no verdict: every rung was used for the fit" if comparison.tolerances else "no tolerances, no verdict",
        True: "within the tolerances",
        False: "outside the tolerances",
    }
    out.print(words[comparison.passed])


def _load_title(forecast: Forecast) -> str:
    return "users " if forecast.scenario.load.users is not None else "req/s "


def _table(*titles: str, left: Sequence[int] = ()) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for i, title in enumerate(titles):  # where 80 columns are too few, a band goes below its value: no number is cut
        table.add_column(title, justify="left" if i in left else "right", overflow="fold")
    return table

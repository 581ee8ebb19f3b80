"""Forecasts and comparisons as tables that fit the terminal, and 80 columns where there is none."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.text import Text

from scenarios.answer.numbers import percent, significant, simulated, with_band
from scenarios.answer.sentences import of_forecast, slo_sentence
from scenarios.forecast.cost import of_the_machine
from scenarios.forecast.forecast import Forecast, named
from sim.model.calibration import Calibration, Checked
from sim.model.flags import in_words
from sim.model.metric import METRICS
from sim.model.warning import Notice
from sim.steptime.linear import LEVEL
from sim.terminal.columns import Column, show_columns, show_listed
from sim.terminal.console import Console

if TYPE_CHECKING:
    from measure.server.doctor import Finding
    from scenarios.compare.comparison import Comparison
    from scenarios.load.variants import Variant

WIDTH = 80
# metrics, and how soon the column of each is left out where there is little room
LATENCY = {"e2e_p50": 3, "e2e_p95": 1, "ttft_p50": 4, "ttft_p95": 2}
RATES = {"rps": 1, "input_tokens_per_s": 3, "output_tokens_per_s": 2}
STEPS = {"tpot_mean": 1, "tpot_p95": 2, "queue": 3}
CURVES = "--csv has every metric"


def console() -> Console:
    """stdout as rich sees it; where it is no terminal, without colour and 80 columns wide (or COLUMNS, if set)."""
    terminal = Console()
    if terminal.is_terminal:
        return terminal
    width = os.environ.get("COLUMNS", "")
    columns = int(width) if width.isdecimal() and int(width[:9]) > 0 else WIDTH
    return Console(width=columns, no_color=True, highlight=False)


def show_forecast(forecast: Forecast, out: Console) -> None:
    """Print a forecast: the answer first, then what it is read off."""
    out.print(Text(forecast.name, style="bold"), Text(forecast.scenario.description))
    out.print()
    show_answer(forecast, out)
    out.print()
    show_curves(forecast, out)


def show_answer(forecast: Forecast, out: Console) -> None:
    """Print what load is borne, how long answers take there, and what that costs: a sentence each."""
    show_assumptions(forecast.assumptions, out)
    for sentence in of_forecast(forecast).sentences:
        out.print(Text(sentence))


def show_curves(forecast: Forecast, out: Console) -> None:
    """Print what a forecast holds: curves, corners, what binds, the published figures beside it, SLOs and cost."""
    out.print(Text(f"median and 90 % band of {forecast.provenance.replicates} replicates", style="dim"))
    for columns in (LATENCY, RATES, STEPS):
        out.print()
        show_columns(curves(forecast, columns), out, instead=CURVES)
    if any(row.extrapolated for row in forecast.curves):
        out.print(Text("* beyond what was calibrated", style="dim"))
    out.print()
    show_operating_points(forecast, out)
    out.print()
    for line in bottleneck(forecast):
        out.print(Text(line))
    if forecast.published:
        out.print()
        show_columns(published(forecast), out)
    out.print()
    show_slo_probabilities(forecast, out)
    if forecast.cost:
        out.print()
        show_cost(forecast, out)
    out.print()
    out.print(flags(forecast))


def show_forecasts(forecasts: Sequence[Forecast], asked: Sequence[Variant], out: Console) -> None:
    """Print forecasts one below the other, or the variants of each scenario side by side."""
    from scenarios.answer.variants import show_variants

    several = math.prod(len(v.values) for v in asked[0].varied)
    for i in range(0, len(forecasts), several):
        out.print() if i else None
        if asked[i].varied:
            show_variants(forecasts[i : i + several], asked[i : i + several], out)
        else:
            show_forecast(forecasts[i], out)


def show_plan(forecasts: Sequence[Forecast], out: Console) -> None:
    """Print, for every scenario, how probably each load meets its SLOs and what it costs."""
    for i, forecast in enumerate(forecasts):
        out.print() if i else None
        out.print(Text(forecast.name, style="bold"))
        show_assumptions(forecast.assumptions, out)
        show_slo_probabilities(forecast, out)
        if forecast.cost:
            out.print()
            show_cost(forecast, out)
        out.print(Text(slo_sentence(forecast)))
        out.print(flags(forecast))


def show_evaluation(forecast: Forecast, comparison: Comparison, calibration: Calibration, out: Console) -> None:
    """Print what the evaluation of a run shows, before the answer: forecast, comparison and the check of the fit."""
    show_assumptions(forecast.assumptions, out)
    show_curves(forecast, out)
    out.print()
    show_comparison(comparison, out)
    show_check(calibration, out)


def show_calibration(calibration: Calibration, assumptions: Sequence[Notice], out: Console) -> None:
    """Print parameters, what they were fitted to, and the check of the fit."""
    show_assumptions(assumptions, out)
    show_parameters(calibration, out)
    if calibration.source.note:
        out.print(calibration.source.note)
    show_check(calibration, out)


def show_findings(findings: Iterable[Finding], out: Console) -> None:
    """Print what `servecast doctor` found, and how to fix what is missing."""
    words = {True: "ok", False: "missing", None: "-"}
    rows = []
    for finding in findings:
        rows.append((f"{finding.what:<16} {words[finding.ok]:<7}", finding.found))
        if finding.fix and finding.ok is not True:
            rows.append((f"{'':<16} fix:", finding.fix))
    show_listed(rows, out)


def show_assumptions(assumptions: Sequence[Notice], out: Console) -> None:
    """Print the warnings that belong to every number below."""
    for text in assumptions:
        out.print(Text(f"warning: {text}", style="bold red"))


def flags(forecast: Forecast) -> Text:
    """The server's flags, and where each is from."""
    return Text(f"flags {in_words(forecast.flags)}", style="dim")


def curves(forecast: Forecast, columns: Mapping[str, int]) -> list[Column]:
    """Some metrics at every load."""
    made = [_loads(forecast)]
    for name, rank in columns.items():
        metric = METRICS[name]
        made.append(Column(metric.column, [with_band(row, metric.scale) for row in forecast.rows(name)], rank))
    return made


def show_operating_points(forecast: Forecast, out: Console) -> None:
    """Plateau, knee and latency onset, and what each of them is."""
    names = ("plateau", "knee", "latency onset")
    loads, rates, notes = [], [], []
    for name in names:
        corner = getattr(forecast, name.replace(" ", "_"))
        load, where = with_band(corner.load), corner.meaning
        if corner.reached <= 0.95:
            where = f"{corner.meaning} (in {corner.reached:.0%} of replicates)"
        if corner.reached < 0.05:
            load, where = f"> {forecast.curves[-1].load:g}", f"{corner.meaning}: beyond this ladder"
        elif corner.below:
            load, where = f"< {forecast.curves[0].load:g}", f"{corner.meaning}: at the first rung already"
        loads.append(load)
        rates.append(with_band(corner.rps))
        notes.append(f"{name}: {where}")
    columns = [Column("", names, 0, left=True), Column(load_title(forecast), loads), Column("RPS", rates, 2)]
    show_columns(columns, out, notes)


def bottleneck(forecast: Forecast) -> list[str]:
    """What limits the server, in a line for each stretch of the ladder."""
    lines = []
    for binds, group in groupby(forecast.bottleneck, key=lambda rung: rung.binds):
        rungs = list(group)
        ends = list(dict.fromkeys((f"{rungs[0].load:g}", f"{rungs[-1].load:g}")))
        lines.append(f"{' to '.join(ends)} {forecast.unit}: {binds} ({rungs[-1].words})")
    return lines


def published(forecast: Forecast) -> list[Column]:
    """The figures somebody printed beside the same, simulated."""
    figures = [row.figure for row in forecast.published]
    return [
        Column("published", [figure.metric for figure in figures], 0, left=True),
        Column("users", ["–" if figure.users is None else str(figure.users) for figure in figures], 3),
        Column("printed", [f"{figure.value:g} ± {figure.rounding:g}" for figure in figures], 1),
        Column("simulated", [with_band(row.simulated) for row in forecast.published], 1),
        Column("band", ["in" if row.inside else "outside" for row in forecast.published], 2, left=True),
    ]


def show_slo_probabilities(forecast: Forecast, out: Console) -> None:
    """How probable it is, at every load, that each SLO is met; with what the server does there."""
    batch, refused = forecast.rows("mean_batch"), forecast.rows("overloaded_rate")
    columns = [
        _loads(forecast),
        Column("batch", [f"{row.value or 0:.3g}" for row in batch], 3),
        Column(
            f"{forecast.scenario.server.declared.overloaded_status} %",
            [f"{100 * (row.value or 0):.2g}" for row in refused],
            2,
        ),
    ]
    chances = {(p.load, p.metric): f"{p.probability:.0%}" for p in forecast.slo}
    for metric, limit in dict.fromkeys((p.metric, p.limit) for p in forecast.slo):
        columns.append(Column(f"P({metric} ≤ {limit:g})", [chances[row.load, metric] for row in batch]))
    show_columns(columns, out)


def show_cost(forecast: Forecast, out: Console) -> None:
    """What every load costs."""
    growing = {named(row.load, forecast.unit) for row in forecast.rows("rps") if row.unstable}
    machine = of_the_machine(forecast.cost[0].usd_per_hour)
    note = f"at {machine}; in and out each charge the whole machine, the last column counts both"
    note += "; ! no steady state: of what it gets done" if growing else ""
    columns = [
        Column("", [f"{row.at} !" if row.at in growing else row.at for row in forecast.cost], 0),
        Column("$/1000 requests", [with_band(row.per_1000_requests) for row in forecast.cost], 1),
        Column("$/M tokens in", [with_band(row.per_million_input) for row in forecast.cost], 4),
        Column("$/M tokens out", [with_band(row.per_million_output) for row in forecast.cost], 3),
        Column("$/M tokens", [with_band(row.per_million_blended) for row in forecast.cost], 2),
    ]
    show_columns(columns, out, [note])


def show_parameters(calibration: Calibration, out: Console) -> None:
    """Fitted parameters with their 95 % intervals, and what each of them is."""
    largest = calibration.range.get("sequences", (0.0, math.inf))[1]
    beyond = {n for n in calibration.parameters if n.startswith(LEVEL) and int(n.removeprefix(LEVEL)) > largest}
    found = {f"{name}{'*' if name in beyond else ''}": p for name, p in calibration.parameters.items()}
    columns = [
        Column("parameter", list(found), 0, left=True),
        Column("value ± s.e.", [f"{p.value:.3g} ± {p.stderr:.1g}" for p in found.values()], 1),
        Column("95 % interval", [f"{p.low:.3g} to {p.high:.3g}" for p in found.values()], 2),
        Column("unit", [p.unit for p in found.values()], 3, left=True),
    ]
    notes = [f"* no batch of more than {largest:g} requests was seen: the trend, continued"] if beyond else []
    show_columns(columns, out, notes)
    if any(p.meaning for p in found.values()):
        out.print()
        show_listed([(name, p.meaning) for name, p in found.items() if p.meaning], out)


CHECKED = {"e2e_mean": "E2E error", "ttft_p50": "TTFT error", "output_tokens_per_s": "tok/s error"}


def show_check(calibration: Calibration, out: Console) -> None:
    """What was fitted beside what the calibration shows of it: the measured value, and how far off the simulated is."""
    rows = [] if calibration.check is None else calibration.check.rows
    for of in dict.fromkeys(row.of for row in rows):
        mine = [row for row in rows if row.of == of]
        loads = list(dict.fromkeys(row.at for row in mine))
        if len(loads) < len(mine) and all(row.metric in CHECKED for row in mine):
            columns = [Column("fitted", loads, 0, left=True)]
            found = {(row.at, row.metric): row for row in mine}
            for metric in dict.fromkeys(row.metric for row in mine):
                cells = [found.get((at, metric)) for at in loads]
                columns.append(Column(METRICS[metric].column, ["" if c is None else _value(c) for c in cells], 2))
                columns.append(Column(CHECKED[metric], ["" if c is None else _error(c) for c in cells], 1))
        else:
            columns = [
                Column("fitted", [row.at for row in mine], 0, left=True),
                Column("measured", [_value(row) for row in mine], 2),
                Column("error", [_error(row) for row in mine], 1),
            ]
        missed = any(row.missed for row in mine)
        out.print()
        out.print(Text(f"check: what was fitted, simulated again ({of})"))
        show_columns(columns, out, ["* outside its 90 % band, by more than a client can tell"] if missed else [])


def _value(row: Checked) -> str:
    return f"{row.measured:.4g}" if row.low is not None else row.metric


def _error(row: Checked) -> str:
    error = "none" if row.relative_error is None else f"{100 * row.relative_error:+.1f} %"
    return f"{error}{'*' if row.missed else ''}"


EFFECTIVE = "effective: rungs that are independent, as neighbours share their machine's drift"
MORE = "every metric at every load: --csv, --json, -o FOLDER"
MAIN = ("e2e_mean", "e2e_p95", "ttft_p50", "ttft_p95", "rps", "output_tokens_per_s")


def compared(comparison: Comparison) -> list[Column]:
    """The main metrics at every load."""
    rows = [row for row in comparison.rows if row.metric in MAIN]
    error = "error" if comparison.of == "a forecast" else "apart"
    inside = {None: "–", True: "in", False: "out"}
    columns = [
        Column("load ", [f"{comparison.load(row)}{' ' if row.held_out else '*'}" for row in rows], 0),
        Column("metric", [METRICS[row.metric].column for row in rows], 0, left=True),
        Column(comparison.titles[0], [significant(row.measured) for row in rows], 4),
        Column(comparison.titles[1], [" ".join(simulated(row)).rstrip() for row in rows], 5),
        Column(error, [percent(row.relative_error, "+") for row in rows], 1),
        Column("band", [inside[row.inside] for row in rows], 2),
    ]
    if any(row.repeat_error is not None for row in comparison.rows):
        columns.append(Column("repeat", [percent(row.repeat_error, "+") for row in rows], 3))
    return columns


def errors(comparison: Comparison) -> list[Column]:
    """The errors of every metric over all loads together."""
    limits = [percent(comparison.tolerances.get(metric), digits=0) for metric in comparison.summary]
    found = list(comparison.summary.values())
    return [
        Column("metric", list(comparison.summary), 0, left=True),
        Column("MAPE", [percent(s.mape) for s in found], 0),
        Column("bias", [percent(s.bias, "+") for s in found], 3),
        Column("in band", [percent(s.coverage, digits=0) for s in found], 2),
        Column("rungs", [str(s.rungs) for s in found], 5),
        Column("effective", [f"{s.effective:.2g}" for s in found], 4),
        Column("tolerance", limits, 1),
    ]


def show_comparison(comparison: Comparison, out: Console) -> None:
    """Print a comparison and its verdict."""
    show_assumptions(comparison.assumptions, out)
    if comparison.of != "a forecast":
        out.print(Text(f"first: {comparison.measured}; second: {comparison.simulated}"))
    if any(row.metric in MAIN for row in comparison.rows):
        notes = ["* seen by the fit"] if any(not row.held_out for row in comparison.rows) else []
        if any(row.repeat_error is not None for row in comparison.rows):
            notes.append("repeat: how far the real server was from itself")
        show_columns(compared(comparison), out, ["; ".join(notes)] if notes else [])
        out.print()
    if comparison.summary:
        note = f"{EFFECTIVE}; {MORE}"
        if comparison.coverage is not None:
            note = f"in band, all together: {comparison.coverage:.0%} (90 % should be); {note}"
        show_columns(errors(comparison), out, [note])
        out.print()
    words = {
        None: "no verdict: every rung was used for the fit" if comparison.tolerances else "no tolerances, no verdict",
        True: "within the tolerances",
        False: "outside the tolerances",
    }
    out.print(words[comparison.passed])


def _loads(forecast: Forecast) -> Column:
    marks = [f"{row.load:g}{'*' if row.extrapolated else ' '}" for row in forecast.rows("rps")]
    return Column(load_title(forecast), marks, 0)


def load_title(forecast: Forecast) -> str:
    """What heads a column of loads."""
    return "users " if forecast.scenario.load.users is not None else "req/s "

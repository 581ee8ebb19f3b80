"""Forecasts and comparisons as tables that fit the terminal, and 80 columns where there is none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.text import Text

from scenarios.answer.numbers import percent, significant, simulated, with_band
from scenarios.answer.sentences import limit_text, of_forecast
from scenarios.forecast.cost import of_the_machine
from scenarios.forecast.forecast import Forecast, named
from sim.model.calibration import Calibration, Checked
from sim.model.flags import in_words
from sim.model.metric import METRICS, label
from sim.model.warning import Notice
from sim.steptime.linear import LEVEL
from sim.terminal.columns import Column, show_columns, show_listed
from sim.terminal.console import Console

if TYPE_CHECKING:
    from measure.server.doctor import Finding
    from scenarios.compare.comparison import Comparison
    from scenarios.load.variants import Variant

# metrics, and how soon the column of each is left out where there is little room
LATENCY = {"e2e_p50": 3, "e2e_p95": 1, "ttft_p50": 4, "ttft_p95": 2}
RATES = {"rps": 1, "input_tokens_per_s": 3, "output_tokens_per_s": 2}
STEPS = {"tpot_mean": 1, "tpot_p95": 2, "queue": 3}
CURVES = "--csv has every metric"


def show_forecast(forecast: Forecast, out: Console) -> None:
    """Print a forecast: the answer first, then the numbers behind it."""
    out.print(Text(forecast.name, style="bold"), Text(forecast.scenario.description))
    out.print()
    show_answer(forecast, out)
    out.print()
    show_curves(forecast, out)


def show_answer(forecast: Forecast, out: Console) -> None:
    """Print which load meets the SLOs, how long answers take there, and what that costs: a sentence each."""
    show_assumptions(forecast.assumptions, out)
    for sentence in of_forecast(forecast).sentences:
        out.print(Text(sentence))


def show_curves(forecast: Forecast, out: Console) -> None:
    """Print curves, operating points, bottlenecks, published figures, SLOs and cost of a forecast."""
    out.print(Text(f"Median and 90 % band of {forecast.provenance.replicates} simulations", style="dim"))
    for columns in (LATENCY, RATES, STEPS):
        out.print()
        show_columns(curves(forecast, columns), out, instead=CURVES)
    if any(row.extrapolated for row in forecast.curves):
        out.print(Text("* outside the calibrated range", style="dim"))
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
        out.print(Text(f"Warning: {text}", style="bold red"))


def flags(forecast: Forecast) -> Text:
    """The server's flags, and where each is from."""
    return Text(f"Flags {in_words(forecast.flags)}", style="dim")


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
        point = getattr(forecast, name.replace(" ", "_"))
        load, where = with_band(point.load), point.meaning
        if point.reached <= 0.95:
            where = f"{point.meaning} (in {point.reached:.0%} of replicates)"
        if point.reached < 0.05:
            load, where = f"> {forecast.curves[-1].load:g}", f"{point.meaning} (above this ladder)"
        elif point.below:
            load, where = f"< {forecast.curves[0].load:g}", f"{point.meaning} (at the first rung already)"
        loads.append(load)
        rates.append(with_band(point.rps))
        notes.append(f"{name}: {where}")
    columns = [Column("", names, 0, left=True), Column(load_title(forecast), loads), Column("RPS", rates, 2)]
    show_columns(columns, out, notes)


def bottleneck(forecast: Forecast) -> list[str]:
    """What limits the server, in a line for each stretch of the ladder."""
    lines = []
    for binds, group in groupby(forecast.bottleneck, key=lambda rung: rung.binds):
        rungs = list(group)
        ends = list(dict.fromkeys((f"{rungs[0].load:g}", f"{rungs[-1].load:g}")))
        lines.append(f"Bottleneck at {' to '.join(ends)} {forecast.unit}: {binds} ({rungs[-1].words})")
    return lines


def published(forecast: Forecast) -> list[Column]:
    """Published figures and their forecasts."""
    figures = [row.figure for row in forecast.published]
    return [
        Column("published metric", [label(figure.metric) for figure in figures], 0, left=True),
        Column("users", ["–" if figure.users is None else str(figure.users) for figure in figures], 3),
        Column("published", [f"{figure.value:g} ± {figure.rounding:g}" for figure in figures], 1),
        Column("simulated", [with_band(row.simulated) for row in forecast.published], 1),
        Column("band", ["in" if row.inside else "outside" for row in forecast.published], 2, left=True),
    ]


def show_slo_probabilities(forecast: Forecast, out: Console) -> None:
    """Print, for every load, the probability that each SLO is met, the batch size and the share refused."""
    batch, refused = forecast.rows("mean_batch"), forecast.rows("overloaded_rate")
    columns = [
        _loads(forecast),
        Column("batch size", [f"{row.value or 0:.3g}" for row in batch], 3),
        Column("refused, %", [f"{100 * (row.value or 0):.2g}" for row in refused], 2),
    ]
    chances = {(p.load, p.metric): f"{p.probability:.0%}" for p in forecast.slo}
    for metric, limit in dict.fromkeys((p.metric, p.limit) for p in forecast.slo):
        columns.append(Column(f"P({limit_text(metric, limit)})", [chances[row.load, metric] for row in batch]))
    show_columns(columns, out)


def show_cost(forecast: Forecast, out: Console) -> None:
    """What every load costs."""
    growing = {named(row.load, forecast.unit) for row in forecast.rows("rps") if row.unstable}
    machine = of_the_machine(forecast.cost[0].usd_per_hour)
    note = f"At {machine}. Input and output tokens are each charged the whole machine; the last column counts both."
    note += " ! No steady state: cost of the requests that are completed." if growing else ""
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
    notes = [f"* Extrapolated: no batch of more than {largest:g} requests was measured."] if beyond else []
    show_columns(columns, out, notes)
    if any(p.meaning for p in found.values()):
        out.print()
        show_listed([(name, p.meaning) for name, p in found.items() if p.meaning], out)


def show_check(calibration: Calibration, out: Console) -> None:
    """Print the check of a fit: the measured values, and the relative errors of their simulation."""
    rows = [] if calibration.check is None else calibration.check.rows
    for of in dict.fromkeys(row.of for row in rows):
        mine = [row for row in rows if row.of == of]
        loads = list(dict.fromkeys(row.at for row in mine))
        if len(loads) < len(mine) and all(row.metric in METRICS for row in mine):
            columns = [Column("load", loads, 0, left=True)]
            found = {(row.at, row.metric): row for row in mine}
            for metric in dict.fromkeys(row.metric for row in mine):
                cells = [found.get((at, metric)) for at in loads]
                columns.append(Column(METRICS[metric].column, ["" if c is None else _value(c) for c in cells], 2))
                columns.append(
                    Column(f"{METRICS[metric].title} error", ["" if c is None else _error(c) for c in cells], 1)
                )
        else:
            columns = [
                Column("load", [row.at for row in mine], 0, left=True),
                Column("measured", [_value(row) for row in mine], 2),
                Column("error", [_error(row) for row in mine], 1),
            ]
        missed = any(row.missed for row in mine)
        out.print()
        out.print(Text(f"Check of the fit: the loads it was fitted to, simulated again ({of})"))
        show_columns(
            columns, out, ["* Outside its 90 % band, by more than the client's timing error."] if missed else []
        )


def _value(row: Checked) -> str:
    return f"{row.measured:.4g}" if row.low is not None else row.metric


def _error(row: Checked) -> str:
    error = "none" if row.relative_error is None else f"{100 * row.relative_error:+.1f} %"
    return f"{error}{'*' if row.missed else ''}"


EFFECTIVE = "effective: number of independent rungs, as neighbouring rungs share the machine's drift"
MORE = "--csv, --json and -o FOLDER give every metric at every load"
MAIN = ("e2e_mean", "e2e_p95", "ttft_p50", "ttft_p95", "rps", "output_tokens_per_s")


def compared(comparison: Comparison) -> list[Column]:
    """The main metrics at every load."""
    rows = [row for row in comparison.rows if row.metric in MAIN]
    error = "error" if comparison.of == "a forecast" else "difference"
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
        Column("metric", [label(metric) for metric in comparison.summary], 0, left=True),
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
        out.print(Text(f"First: {comparison.measured}. Second: {comparison.simulated}."))
    if any(row.metric in MAIN for row in comparison.rows):
        notes = ["* used for the fit"] if any(not row.held_out for row in comparison.rows) else []
        if any(row.repeat_error is not None for row in comparison.rows):
            notes.append("repeat: the same load measured again, against the first time")
        show_columns(compared(comparison), out, ["; ".join(notes)] if notes else [])
        out.print()
    if comparison.summary:
        note = f"{EFFECTIVE}; {MORE}"
        if comparison.coverage is not None:
            note = f"in band, all metrics: {comparison.coverage:.0%} (90 % expected); {note}"
        show_columns(errors(comparison), out, [note])
        out.print()
    words = {
        None: f"No verdict: {'every rung was used for the fit' if comparison.tolerances else 'no tolerance is set'}.",
        True: "Within the tolerances.",
        False: "Outside the tolerances.",
    }
    out.print(words[comparison.passed])


def _loads(forecast: Forecast) -> Column:
    marks = [f"{row.load:g}{'*' if row.extrapolated else ' '}" for row in forecast.rows("rps")]
    return Column(load_title(forecast), marks, 0)


def load_title(forecast: Forecast) -> str:
    """What heads a column of loads."""
    return {"users": "users ", "requests/s": "req/s "}.get(forecast.unit, f"{forecast.unit} ")

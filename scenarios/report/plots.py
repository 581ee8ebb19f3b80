"""Curves of a forecast or of a run, for a report or a design document: bands shaded, published points marked.

Nothing is computed here but positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd

from scenarios.forecast.forecast import Forecast, Row
from scenarios.report.figure import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    Axes,
    Drawing,
    at_loads,
    figure,
    logarithmic,
    svg,
    whole,
)
from sim.model.metric import METRICS, OF_A_LADDER
from sim.model.status import Status
from sim.run import Run

COLOURS = (BLUE, ORANGE, GREEN, RED, GREY, "#7c3aed", "#0e7490", "#a16207", "#be185d")
SHARED, SHARES = ("prefill", "decode", "idle"), (ORANGE, BLUE, "#e5e7eb")  # of the server's time
SLO = "#111827"
LONGEST = 36  # characters of a name in a legend
SPREAD = 4  # times the first load: a ladder that goes further is drawn by octaves
BINS = 120  # points over time, at most; each spans an answer at least, or the RPS of lock-stepped users is a comb


def overview(forecast: Forecast, measured: Sequence[pd.DataFrame] = ()) -> list[Drawing]:
    """RPS against load, latency against load, and latency against RPS; `measured` (`sim.results.metrics.table`) are
    points."""
    return [
        partial(_throughput, forecast=forecast, measured=measured),
        partial(_quantiles, forecast=forecast, measured=measured, metric="e2e", title="Response time, s", corner=True),
        partial(_hockey_stick, forecast=forecast, measured=measured),
    ]


def first_tokens(forecast: Forecast, measured: Sequence[pd.DataFrame] = ()) -> list[Drawing]:
    """TTFT and TPOT against load, and where the server's time goes."""
    return [
        partial(
            _quantiles,
            forecast=forecast,
            measured=measured,
            metric="ttft",
            title="Time to first token, s",
            corner=False,
        ),
        partial(_per_token, forecast=forecast, measured=measured),
        partial(_shares, forecast=forecast),
    ]


def over_time(run: Run, width: float = 11.2, height: float = 5.0) -> bytes:
    """RPS, response times and users over a run's time, as load generators plot them; inches."""
    requests = run.requests[run.requests["status"] == Status.OK]
    end = float(np.nanmax([rung.end for rung in run.rungs]))  # a rung that was broken off has none
    e2e = requests["last_token"] - requests["scheduled"]
    bin_ = max(end / BINS, float(e2e.median()) if len(e2e) else 0.0)
    edges = np.arange(0.0, end, bin_)
    number = np.digitize(requests["ended"], edges) - 1
    at = edges[:-1] + bin_ / 2  # the last bin is cut short
    with figure(width, height, 1, rows=3, heights=(2, 2, 1)) as (picture, axes):
        axes[0].plot(at, np.bincount(number, minlength=len(edges))[: len(at)] / bin_, color=GREEN)
        axes[0].set(title="Requests per second", ylim=(0, None))
        for q, colour in ((0.95, ORANGE), (0.5, BLUE)):
            quantiles = e2e.groupby(number).quantile(q).reindex(range(len(at)))
            axes[1].plot(at, quantiles, color=colour, label=f"p{100 * q:.0f}")
        axes[1].set(title="Response time, s", ylim=(0, None))
        axes[1].legend(loc="upper left")
        steps = [(rung.start, rung.load) for rung in run.rungs]
        axes[2].step([*(t for t, _ in steps), end], [*(n for _, n in steps), steps[-1][1]], where="post", color=GREY)
        axes[2].set(title="Users" if run.scenario.load.users else "Requests/s offered", xlabel="s since the run began")
        if run.scenario.load.users:
            axes[2].set_ylim(0, 1.1 * max(n for _, n in steps))
            whole(axes[2].yaxis, 4)
        for ax in axes:
            ax.set_xlim(0, end)
            for rung in run.rungs:
                ax.axvspan(rung.settled, rung.end, color="#f3f4f6", zorder=0, lw=0)
        return svg(picture)


def several(forecasts: Sequence[Forecast]) -> list[Drawing]:
    """Throughput and p95 latency of several scenarios."""

    def draw(ax: Axes, metric: str) -> None:
        for forecast, colour in zip(forecasts, COLOURS * len(forecasts), strict=False):
            name = forecast.name if len(forecast.name) <= LONGEST else f"{forecast.name[: LONGEST - 1]}…"
            _curve(ax, forecast.rows(metric), colour, name)
        ax.set_title(METRICS[metric].column)
        if metric != "rps":
            logarithmic(ax)
        _load_axis(ax, sorted({row.load for f in forecasts for row in f.rows("rps")}), forecasts[0].unit)
        if metric == "rps":
            ax.legend(fontsize=8)

    return [partial(draw, metric=metric) for metric in ("rps", "e2e_p95")]


def _throughput(ax: Axes, forecast: Forecast, measured: Sequence[pd.DataFrame]) -> None:
    _curve(ax, forecast.rows("rps"), BLUE, "forecast")
    for printed in forecast.published:
        if printed.figure.metric in OF_A_LADDER:
            value, rounding = printed.figure.value, printed.figure.rounding
            what = "without deterioration" if printed.figure.metric == "rps_takeoff" else "at most"
            ax.axhline(value, color=RED, ls="--", lw=1.1, label=f"published: {value:g}/s {what}")
            ax.axhspan(value - rounding, value + rounding, color=RED, alpha=0.08, lw=0)
    _published(ax, forecast, "rps")
    _points(ax, measured, "rps", BLUE, "measured")
    _corner(ax, forecast, "knee")
    ax.set(title="Requests per second", ylim=(0, None))
    _axis_of(ax, forecast, measured)
    ax.legend(fontsize=8)


def _quantiles(
    ax: Axes, forecast: Forecast, measured: Sequence[pd.DataFrame], metric: str, title: str, corner: bool = False
) -> None:
    for q, colour in (("p95", ORANGE), ("p50", BLUE)):
        _curve(ax, forecast.rows(f"{metric}_{q}"), colour, q)
        _points(ax, measured, f"{metric}_{q}", colour, f"{q} measured")
    _published(ax, forecast, metric)
    _limits(ax, forecast, metric)
    if corner:
        _corner(ax, forecast)
    ax.set(title=title)
    logarithmic(ax)
    _axis_of(ax, forecast, measured)
    ax.legend(fontsize=8)


def _published(ax: Axes, forecast: Forecast, what: str, scale: float = 1.0) -> None:
    """What was published of these metrics (`e2e`: all of E2E's) at some users."""
    figures = [printed.figure for printed in forecast.published if printed.figure.users is not None]
    points = [(f.users, scale * f.value) for f in figures if f.metric.partition("_")[0] == what]
    if points:
        ax.plot(*zip(*points, strict=True), "D", color=RED, ms=5, zorder=5, label="published")


def _hockey_stick(ax: Axes, forecast: Forecast, measured: Sequence[pd.DataFrame]) -> None:
    for metric, colour, name in (("e2e_p95", ORANGE, "p95"), ("e2e_p50", BLUE, "p50")):
        pairs = zip(forecast.rows("rps"), forecast.rows(metric), strict=True)
        known = [(rate, row) for rate, row in pairs if row.value is not None and not row.unstable]
        rps = [rate.value or 0.0 for rate, _ in known]
        low, high = ([getattr(row, end) for _, row in known] for end in ("low", "high"))
        ax.fill_between(rps, low, high, color=colour, alpha=0.16, lw=0)
        ax.plot(rps, [row.value or 0.0 for _, row in known], "-", color=colour, label=name)
        ax.plot(rps, [row.value or 0.0 for _, row in known], ".", ms=4, color=colour)
        for table in measured:
            ax.plot(table["rps"], table[metric], "o", color=colour, mfc="white", ms=5, zorder=4, clip_on=False)
    for printed in forecast.published:
        if printed.figure.metric == "rps_takeoff":
            ax.axvline(printed.figure.value, color=RED, ls="--", lw=1.1, label="published latency onset")
    _limits(ax, forecast, "e2e")
    ax.set(title="Response time against RPS", xlabel="requests/s", ylabel="s", xlim=(0, None))
    logarithmic(ax)
    ax.legend(fontsize=8)


def _per_token(ax: Axes, forecast: Forecast, measured: Sequence[pd.DataFrame]) -> None:
    _curve(ax, forecast.rows("tpot_mean"), BLUE, "mean", scale=1000)
    _points(ax, measured, "tpot_mean", BLUE, "mean measured", scale=1000)
    _published(ax, forecast, "tpot", scale=1000)
    _limits(ax, forecast, "tpot", scale=1000)
    ax.set(title="Time per output token, ms", ylim=(0, None))
    _axis_of(ax, forecast, measured)
    ax.legend(fontsize=8)


def _shares(ax: Axes, forecast: Forecast) -> None:
    load = [row.load for row in forecast.rows("rps")]
    parts = [[row.value or 0.0 for row in forecast.rows(f"{what}_share")] for what in SHARED]
    if len(load) == 1:
        below = 0.0
        for part, colour, name in zip(parts, SHARES, SHARED, strict=True):
            ax.bar(load, part, load[0] / 2, below, color=colour, label=name, alpha=0.85)
            below += part[0]
    else:
        ax.stackplot(load, parts, colors=SHARES, labels=SHARED, lw=0, alpha=0.85)
    ax.set(title="The server's time", ylim=(0, 1))
    ax.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    ax.grid(visible=False)
    ax.legend(fontsize=8, loc="lower left")
    _axis_of(ax, forecast)


def _curve(ax: Axes, rows: Sequence[Row], colour: str, label: str, scale: float = 1.0) -> None:
    """A line with its band; dashed outside the calibrated range. One load alone is a point with a bar."""
    known = [row for row in rows if row.value is not None]
    load = [row.load for row in known]
    low, value, high = ([scale * getattr(row, part) for row in known] for part in ("low", "value", "high"))
    if len(rows) == 1:
        ax.vlines(load, low, high, color=colour, alpha=0.35, lw=5)
        ax.plot(load, value, "_", color=colour, ms=12, mew=2, label=label)
        return
    ax.fill_between(load, low, high, color=colour, alpha=0.16, lw=0)
    if any(row.extrapolated for row in known):
        ax.plot(load, value, color=colour, ls=(0, (4, 2)))
    inside = [np.nan if row.extrapolated else at for row, at in zip(known, value, strict=True)]
    ax.plot(load, inside, color=colour, label=label)


def _points(
    ax: Axes, measured: Sequence[pd.DataFrame], metric: str, colour: str, label: str, scale: float = 1.0
) -> None:
    """What was measured, load by load."""
    for i, table in enumerate(measured):
        values = scale * table[metric]
        name = label if i == 0 and values.notna().any() else None
        ax.plot(table["load"], values, "o", color=colour, mfc="white", ms=5, zorder=4, clip_on=False, label=name)


def _limits(ax: Axes, forecast: Forecast, what: str, scale: float = 1.0) -> None:
    """The SLOs on a latency, each with its line."""
    for metric, limit in forecast.scenario.slo.items():
        if metric.startswith(what):
            name = f"SLO: {metric.removeprefix(what)[1:]} ≤ {scale * limit:g}"
            ax.axhline(scale * limit, color=SLO, ls=(0, (1, 1)), lw=1.6, label=name, zorder=3)


def _corner(ax: Axes, forecast: Forecast, label: str | None = None) -> None:
    knee = forecast.knee.load
    if knee.low is not None and knee.high is not None and forecast.knee.reached >= 0.05:
        ax.axvspan(knee.low, knee.high, color=GREY, alpha=0.14, lw=0, label=label)


def _axis_of(ax: Axes, forecast: Forecast, measured: Sequence[pd.DataFrame] = ()) -> None:
    """The loads that are forecast, and those that were measured beside them."""
    loads = {row.load for row in forecast.rows("rps")}
    _load_axis(ax, sorted(loads.union(*(table["load"].tolist() for table in measured))), forecast.unit)


def _load_axis(ax: Axes, loads: Sequence[float], unit: str) -> None:
    if len(loads) == 1:
        ax.set_xlim(0, 2 * loads[0])
    else:
        if unit == "users" and loads[-1] > SPREAD * loads[0]:
            ax.set_xscale("log", base=2)
        ax.set_xlim(loads[0], loads[-1])
    at_loads(ax.xaxis, loads)
    ax.set_xlabel(unit)

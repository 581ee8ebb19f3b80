"""Curves of a forecast or of a run, for a report or a design document: bands shaded, published points marked.

Nothing is computed here but positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scenarios.figure import BLUE, GREEN, GREY, ORANGE, RED, Axes, figure, logarithmic, plain, svg
from scenarios.forecast import Forecast, Row
from sim.run import Run

BINS = 120  # points over time, at most; each spans an answer at least, or the RPS of lock-stepped users is a comb


def overview(forecast: Forecast) -> bytes:
    """RPS against load, latency against load, and latency against RPS, side by side."""
    with figure(11.2, 3.5, 3) as (picture, axes):
        _throughput(axes[0], forecast)
        _latency(axes[1], forecast)
        _hockey_stick(axes[2], forecast)
        return svg(picture)


def first_tokens(forecast: Forecast) -> bytes:
    """TTFT and TPOT against load, and where the server's time goes."""
    with figure(11.2, 3.3, 3) as (picture, axes):
        for metric, colour, name in (("ttft_p95", ORANGE, "p95"), ("ttft_p50", BLUE, "p50")):
            _curve(axes[0], forecast.rows(metric), colour, name)
        _published(axes[0], forecast, "ttft")
        axes[0].set(title="Time to first token", ylabel="s")
        logarithmic(axes[0])
        _curve(axes[1], forecast.rows("tpot_mean"), BLUE, "mean", scale=1000)
        _published(axes[1], forecast, "tpot", scale=1000)
        axes[1].set(title="Time per output token", ylabel="ms")
        _shares(axes[2], forecast)
        for ax in axes:
            _load_axis(ax, forecast)
        for ax in axes[:2]:
            ax.legend()
        return svg(picture)


def over_time(run: Run) -> bytes:
    """RPS, response times and users over a run's time, as load generators plot them."""
    requests = run.requests[run.requests["status"] == "ok"]
    end = float(np.nanmax([rung.end for rung in run.rungs]))  # a rung that was broken off has none
    e2e = requests["last_token"] - requests["scheduled"]
    width = max(end / BINS, float(e2e.median()) if len(e2e) else 0.0)
    edges = np.arange(0.0, end, width)
    number = np.digitize(requests["ended"], edges) - 1
    at = edges[:-1] + width / 2  # the last bin is cut short
    with figure(11.2, 5.0, 1, rows=3, heights=(2, 2, 1)) as (picture, axes):
        axes[0].plot(at, np.bincount(number, minlength=len(edges))[: len(at)] / width, color=GREEN)
        axes[0].set(title="Requests per second", ylim=(0, None))
        for q, colour in ((0.95, ORANGE), (0.5, BLUE)):
            quantiles = e2e.groupby(number).quantile(q).reindex(range(len(at)))
            axes[1].plot(at, quantiles, color=colour, label=f"p{100 * q:.0f}")
        axes[1].set(title="Response time, s", ylim=(0, None))
        axes[1].legend(loc="upper left")
        steps = [(rung.start, rung.load) for rung in run.rungs]
        axes[2].step([*(t for t, _ in steps), end], [*(n for _, n in steps), steps[-1][1]], where="post", color=GREY)
        axes[2].set(title="Users" if run.scenario.load.users else "Requests/s offered", xlabel="s since the run began")
        for ax in axes:
            ax.set_xlim(0, end)
            for rung in run.rungs:
                ax.axvspan(rung.settled, rung.end, color="#f3f4f6", zorder=0, lw=0)
        return svg(picture)


def several(forecasts: Sequence[Forecast]) -> bytes:
    """Throughput and p95 latency of several scenarios in one picture."""
    colours = (BLUE, ORANGE, GREEN, RED, GREY, "#7c3aed", "#0e7490", "#a16207", "#be185d")
    with figure(11.2, 3.7, 2) as (picture, axes):
        for ax, metric, title in zip(axes, ("rps", "e2e_p95"), ("Requests per second", "p95 E2E, s"), strict=True):
            for forecast, colour in zip(forecasts, colours * 9, strict=False):
                _curve(ax, forecast.rows(metric), colour, forecast.name)
            ax.set_title(title)
            _load_axis(ax, forecasts[0])
        logarithmic(axes[1])
        axes[0].legend(fontsize=8)
        return svg(picture)


def _throughput(ax: Axes, forecast: Forecast) -> None:
    _curve(ax, forecast.rows("rps"), BLUE, "forecast")
    for printed in forecast.published:
        if printed.figure.metric in ("rps_takeoff", "rps_plateau"):
            value, rounding = printed.figure.value, printed.figure.rounding
            what = "without deterioration" if printed.figure.metric == "rps_takeoff" else "at most"
            ax.axhline(value, color=RED, ls="--", lw=1.1, label=f"published: {value:g}/s {what}")
            ax.axhspan(value - rounding, value + rounding, color=RED, alpha=0.08, lw=0)
    _published(ax, forecast, "rps")
    _corner(ax, forecast, "rps")
    ax.set(title="Requests per second", ylim=(0, None))
    _load_axis(ax, forecast)
    ax.legend(fontsize=8)


def _latency(ax: Axes, forecast: Forecast) -> None:
    for metric, colour, name in (("e2e_p95", ORANGE, "p95"), ("e2e_p50", BLUE, "p50")):
        _curve(ax, forecast.rows(metric), colour, name)
    _published(ax, forecast, "e2e")
    _corner(ax, forecast, "e2e")
    ax.set(title="Response time, s")
    logarithmic(ax)
    _load_axis(ax, forecast)
    ax.legend(fontsize=8, loc="upper left")


def _published(ax: Axes, forecast: Forecast, what: str, scale: float = 1.0) -> None:
    """What was published of these metrics (`e2e`: all of E2E's) at some users."""
    figures = [printed.figure for printed in forecast.published if printed.figure.users is not None]
    points = [(f.users, scale * f.value) for f in figures if f.metric.partition("_")[0] == what]
    if points:
        ax.plot(*zip(*points, strict=True), "D", color=RED, ms=5, zorder=5, label="published")


def _hockey_stick(ax: Axes, forecast: Forecast) -> None:
    for metric, colour, name in (("e2e_p95", ORANGE, "p95"), ("e2e_p50", BLUE, "p50")):
        pairs = zip(forecast.rows("rps"), forecast.rows(metric), strict=True)
        known = [(rate, row) for rate, row in pairs if row.value is not None and not row.unstable]
        rps = [rate.value or 0.0 for rate, _ in known]
        low, high = ([getattr(row, end) for _, row in known] for end in ("low", "high"))
        ax.fill_between(rps, low, high, color=colour, alpha=0.16, lw=0)
        ax.plot(rps, [row.value or 0.0 for _, row in known], "o-", ms=3, color=colour, label=name)
    for printed in forecast.published:
        if printed.figure.metric == "rps_takeoff":
            ax.axvline(printed.figure.value, color=RED, ls="--", lw=1.1, label="published takeoff")
    ax.set(title="Response time against RPS", xlabel="requests/s", ylabel="s", xlim=(0, None))
    logarithmic(ax)
    ax.legend(fontsize=8, loc="upper left")


def _shares(ax: Axes, forecast: Forecast) -> None:
    load = [row.load for row in forecast.rows("rps")]
    parts = [[row.value or 0.0 for row in forecast.rows(f"{what}_share")] for what in ("prefill", "decode", "idle")]
    ax.stackplot(load, parts, colors=[ORANGE, BLUE, "#e5e7eb"], labels=["prefill", "decode", "idle"], lw=0, alpha=0.85)
    ax.set(title="The server's time", ylim=(0, 1))
    ax.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    ax.grid(visible=False)
    for i, (what, colour) in enumerate((("decode", "white"), ("prefill", "white"))):
        share = np.array(parts[1 - i])
        widest = len(load) * (i + 1) // 3
        below = 0.0 if what == "prefill" else parts[0][widest]
        if share[widest] > 0.1:
            ax.annotate(what, (load[widest], below + share[widest] / 2), color=colour, ha="center", va="center")


def _curve(ax: Axes, rows: Sequence[Row], colour: str, label: str, scale: float = 1.0) -> None:
    """A line with its band; dashed where it goes beyond what was calibrated."""
    known = [row for row in rows if row.value is not None]
    load = [row.load for row in known]
    low, value, high = ([scale * getattr(row, part) for row in known] for part in ("low", "value", "high"))
    ax.fill_between(load, low, high, color=colour, alpha=0.16, lw=0)
    if any(row.extrapolated for row in known):
        ax.plot(load, value, color=colour, ls=(0, (4, 2)))
    inside = [np.nan if row.extrapolated else at for row, at in zip(known, value, strict=True)]
    ax.plot(load, inside, color=colour, label=label)


def _corner(ax: Axes, forecast: Forecast, what: str) -> None:
    knee = forecast.knee.load
    if knee.low is not None and knee.high is not None and forecast.knee.reached >= 0.05:
        ax.axvspan(knee.low, knee.high, color=GREY, alpha=0.14, lw=0, label="knee" if what == "rps" else None)


def _load_axis(ax: Axes, forecast: Forecast) -> None:
    loads = [row.load for row in forecast.rows("rps")]
    if forecast.scenario.load.users is not None and len(loads) > 2:
        ax.set_xscale("log", base=2)
        ax.set_xticks([load for load in loads if load == loads[-1] or np.log2(load) % 1 == 0])
        ax.minorticks_off()
    plain(ax.xaxis)
    ax.set(xlabel=forecast.unit, xlim=(loads[0], loads[-1] if len(loads) > 1 else loads[0] + 1))

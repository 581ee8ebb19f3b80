"""Curves as pictures (SVG) for a report or a design document: bands shaded, published and measured points marked.

The same forecast gives the same bytes: fixed ids, no date. Nothing is computed here but positions.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis, YAxis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from scenarios.compare import Comparison
from scenarios.evidence import Distribution, Error, Evidence
from scenarios.forecast import Forecast, Row, named
from sim.run import Run

BLUE, ORANGE, GREEN, GREY, RED = "#2563a8", "#d9730d", "#2f7d4f", "#6b7280", "#b42318"
STYLE: Any = {
    "svg.hashsalt": "servecast",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": "#374151",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.7,
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "legend.frameon": True,  # curves run behind it
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "lines.linewidth": 1.7,
}
BINS = 120  # points over time, at most; each spans an answer at least, or the RPS of lock-stepped users is a comb


def overview(forecast: Forecast) -> bytes:
    """RPS against load, latency against load, and latency against RPS, side by side."""
    with _figure(11.2, 3.5, 3) as (figure, axes):
        _throughput(axes[0], forecast)
        _latency(axes[1], forecast)
        _hockey_stick(axes[2], forecast)
        return _svg(figure)


def first_tokens(forecast: Forecast) -> bytes:
    """TTFT and TPOT against load, and where the server's time goes."""
    with _figure(11.2, 3.3, 3) as (figure, axes):
        for metric, colour, name in (("ttft_p95", ORANGE, "p95"), ("ttft_p50", BLUE, "p50")):
            _curve(axes[0], forecast.rows(metric), colour, name)
        axes[0].set(title="Time to first token", ylabel="s")
        _log(axes[0])
        _curve(axes[1], forecast.rows("tpot_mean"), BLUE, "mean", scale=1000)
        axes[1].set(title="Time per output token", ylabel="ms")
        _shares(axes[2], forecast)
        for ax in axes:
            _load_axis(ax, forecast)
        for ax in axes[:2]:
            ax.legend()
        return _svg(figure)


def over_time(run: Run) -> bytes:
    """RPS, response times and users over a run's time, as load generators plot them."""
    requests = run.requests[run.requests["status"] == "ok"]
    end = float(np.nanmax([rung.end for rung in run.rungs]))  # a rung that was broken off has none
    e2e = requests["last_token"] - requests["scheduled"]
    width = max(end / BINS, float(e2e.median()) if len(e2e) else 0.0)
    edges = np.arange(0.0, end, width)
    number = np.digitize(requests["ended"], edges) - 1
    at = edges[:-1] + width / 2  # the last bin is cut short
    with _figure(11.2, 5.0, 1, rows=3, heights=(2, 2, 1)) as (figure, axes):
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
        return _svg(figure)


def several(forecasts: Sequence[Forecast]) -> bytes:
    """Throughput and p95 latency of several scenarios in one picture."""
    colours = (BLUE, ORANGE, GREEN, RED, GREY, "#7c3aed", "#0e7490", "#a16207", "#be185d")
    with _figure(11.2, 3.7, 2) as (figure, axes):
        for ax, metric, title in zip(axes, ("rps", "e2e_p95"), ("Requests per second", "p95 E2E, s"), strict=True):
            for forecast, colour in zip(forecasts, colours * 9, strict=False):
                _curve(ax, forecast.rows(metric), colour, forecast.name)
            ax.set_title(title)
            _load_axis(ax, forecasts[0])
        _log(axes[1])
        axes[0].legend(fontsize=8)
        return _svg(figure)


def compared(comparison: Comparison, metrics: Sequence[str] = ("e2e_mean", "ttft_p50", "rps")) -> bytes:
    """Measured points over the simulated curve and its band, a panel a metric."""
    titles = {"e2e_mean": "Mean E2E, s", "ttft_p50": "TTFT p50, s", "rps": "Requests per second"}
    with _figure(11.2, 3.4, len(metrics)) as (figure, axes):
        for ax, metric in zip(axes, metrics, strict=True):
            rows = [row for row in comparison.rows if row.metric == metric]
            forecast = [row for row in rows if row.simulated is not None]
            load = [row.load for row in forecast]
            if forecast and forecast[0].low is not None:
                low, high = ([getattr(row, end) for row in forecast] for end in ("low", "high"))
                ax.fill_between(load, low, high, color=BLUE, alpha=0.18, lw=0, label="90 % band")
            ax.plot(load, [row.simulated or 0.0 for row in forecast], color=BLUE, label=comparison.simulated)
            first = "measured" if comparison.of == "a forecast" else comparison.measured
            for held_out, face, name in ((True, RED, first), (False, "white", f"{first}, seen by the fit")):
                shown = [row for row in rows if row.held_out is held_out]
                if shown:
                    points = [row.load for row in shown], [row.measured for row in shown]
                    ax.plot(*points, "o", color=RED, mfc=face, ms=5, label=name, zorder=4)
            ax.set(title=titles.get(metric, metric), xlabel=comparison.unit, ylim=(0, None))
            ax.xaxis.set_major_locator(MaxNLocator(integer=comparison.unit == "users"))
        axes[0].legend(fontsize=8)
        return _svg(figure)


def parity(comparison: Comparison) -> bytes:
    """Simulated against measured, every rung and metric in seconds or per second: on the line is right."""
    groups = (
        ("Response times, s", {"E2E": "e2e_", "TTFT": "ttft_"}),
        ("Between tokens, s", {"ITL": "itl_", "TPOT": "tpot_"}),
        ("Rates, 1/s", {"requests": "rps", "output tokens": "output_tokens", "input tokens": "input_tokens"}),
    )
    known = [row for row in comparison.rows if min(row.measured, row.simulated or 0.0) > 0]
    with _figure(11.2, 3.9, 3) as (figure, axes):
        for ax, (title, prefixes) in zip(axes, groups, strict=True):
            rows = [row for row in known if row.metric.startswith(tuple(prefixes.values()))]
            for (name, prefix), colour in zip(prefixes.items(), (BLUE, ORANGE, GREEN), strict=False):
                mine = [row for row in rows if row.metric.startswith(prefix)]
                faces = [colour if row.held_out else "white" for row in mine]
                points = [row.measured for row in mine], [row.simulated or 0.0 for row in mine]
                ax.scatter(*points, s=16, c=faces, edgecolors=colour, label=name, zorder=3)
            if rows:
                ends = [min(row.measured for row in rows), max(row.measured for row in rows)]
                ax.plot(ends, ends, color=GREY, lw=1)
                ax.fill_between(ends, [0.95 * x for x in ends], [1.05 * x for x in ends], color=GREY, alpha=0.2, lw=0)
                ax.set(xscale="log", yscale="log")
                _round(ax.xaxis)
                _plain(ax.xaxis)
                _plain(ax.yaxis)
            ax.set(title=title, xlabel=comparison.titles[0], ylabel=comparison.titles[1])
            ax.legend(fontsize=8, loc="upper left")
        return _svg(figure)


def distributions(evidence: Evidence, unit: str, names: tuple[str, str] = ("measured", "simulated")) -> bytes:
    """The distribution of the gaps between tokens, measured and simulated over each other, at six loads at most."""
    shown = [evidence.itl[i] for i in np.unique(np.linspace(0, len(evidence.itl) - 1, 6).round().astype(int))]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    with _figure(11.2, 0.5 + 2.6 * rows, columns, rows, sharex=False) as (figure, axes):
        for ax, one in zip(axes, shown, strict=False):
            _distribution(ax, one, evidence.shares, names)
            ax.set_title(named(one.load, unit))
        for ax in axes[len(shown) :]:
            ax.set_visible(False)
        for ax in axes[max(0, len(shown) - columns) : len(shown)]:
            ax.set_xlabel("gap between two tokens, ms")
        axes[0].legend(fontsize=8, loc="lower right")
        return _svg(figure)


def residuals(evidence: Evidence) -> bytes:
    """How far rebuilt steps are from the model's step time, against batch size and time, prefill and decode apart."""
    kinds = list(evidence.by_batch)
    with _figure(11.2, 0.4 + 2.5 * len(kinds), 2, len(kinds), sharex=False) as (figure, axes):
        for i, kind in enumerate(kinds):
            colour = ORANGE if kind == "prefill" else BLUE
            left, right = axes[2 * i : 2 * i + 2]
            _errors(left, evidence.by_batch[kind], colour)
            left.set_title(f"{kind.capitalize()} steps, by batch size", pad=12)
            left.set_xlabel("prompts in the prefill" if kind == "prefill" else "requests in the batch")
            left.set_ylabel("measured / model − 1")
            left.xaxis.set_major_locator(MaxNLocator(integer=True))
            _errors(right, evidence.by_time[kind], colour)
            right.set_title(f"{kind.capitalize()} steps, over time", pad=12)
            right.set_xlabel("s since the run began")
        return _svg(figure)


def _distribution(ax: Axes, one: Distribution, shares: Sequence[float], names: tuple[str, str]) -> None:
    measured, simulated, low, high = (
        [1000 * value for value in values] for values in (one.measured, one.simulated, one.low, one.high)
    )
    if low:
        ax.fill_betweenx(shares, low, high, color=BLUE, alpha=0.18, lw=0, label="90 % band")
    if simulated:
        ax.plot(simulated, shares, color=BLUE, label=names[1])
    ax.plot(measured, shares, color=RED, lw=1.2, label=names[0])
    ax.set(xscale="log", ylim=(0, 1))
    ax.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    _round(ax.xaxis)
    _plain(ax.xaxis)


def _errors(ax: Axes, errors: Sequence[Error], colour: str) -> None:
    """Means with the spread of single steps; the more steps, the larger the point."""
    at, mean, low, high = ([getattr(error, name) for error in errors] for name in ("at", "mean", "low", "high"))
    most = max(error.steps for error in errors)
    ax.axhline(0.0, color=GREY, lw=1)
    ax.vlines(at, low, high, color=colour, alpha=0.3, lw=2.5)
    ax.scatter(at, mean, s=[6 + 22 * error.steps / most for error in errors], color=colour, zorder=3)
    ax.yaxis.set_major_formatter(lambda share, _: f"{share:+.0%}")


def _throughput(ax: Axes, forecast: Forecast) -> None:
    _curve(ax, forecast.rows("rps"), BLUE, "forecast")
    for printed in forecast.published:
        if printed.figure.users is None:
            value, rounding = printed.figure.value, printed.figure.rounding
            ax.axhline(value, color=RED, ls="--", lw=1.1, label=f"published: {value:g}/s without deterioration")
            ax.axhspan(value - rounding, value + rounding, color=RED, alpha=0.08, lw=0)
    _corner(ax, forecast, "rps")
    ax.set(title="Requests per second", ylim=(0, None))
    _load_axis(ax, forecast)
    ax.legend(fontsize=8)


def _latency(ax: Axes, forecast: Forecast) -> None:
    for metric, colour, name in (("e2e_p95", ORANGE, "p95"), ("e2e_p50", BLUE, "p50")):
        _curve(ax, forecast.rows(metric), colour, name)
    for printed in forecast.published:
        if printed.figure.users is not None:
            ax.plot([printed.figure.users], [printed.figure.value], "D", color=RED, ms=5, zorder=5, label="published")
    _corner(ax, forecast, "e2e")
    ax.set(title="Response time, s")
    _log(ax)
    _load_axis(ax, forecast)
    ax.legend(fontsize=8, loc="upper left")


def _hockey_stick(ax: Axes, forecast: Forecast) -> None:
    for metric, colour, name in (("e2e_p95", ORANGE, "p95"), ("e2e_p50", BLUE, "p50")):
        pairs = zip(forecast.rows("rps"), forecast.rows(metric), strict=True)
        known = [(rate, row) for rate, row in pairs if row.value is not None and not row.unstable]
        rps = [rate.value or 0.0 for rate, _ in known]
        low, high = ([getattr(row, end) for _, row in known] for end in ("low", "high"))
        ax.fill_between(rps, low, high, color=colour, alpha=0.16, lw=0)
        ax.plot(rps, [row.value or 0.0 for _, row in known], "o-", ms=3, color=colour, label=name)
    for printed in forecast.published:
        if printed.figure.users is None:
            ax.axvline(printed.figure.value, color=RED, ls="--", lw=1.1, label="published takeoff")
    ax.set(title="Response time against RPS", xlabel="requests/s", ylabel="s", xlim=(0, None))
    _log(ax)
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
    _plain(ax.xaxis)
    ax.set(xlabel=forecast.unit, xlim=(loads[0], loads[-1] if len(loads) > 1 else loads[0] + 1))


def _log(ax: Axes) -> None:
    """A logarithmic ordinate, where what is shown spans enough to need one; else one from 0."""
    shown = np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in ax.get_lines()] or [np.empty(0)])
    shown = shown[shown > 0]
    if len(shown) and shown.max() > 4 * shown.min():
        ax.set_yscale("log")
    else:
        ax.set_ylim(0, None)
    _plain(ax.yaxis)


def _plain(axis: Axis) -> None:
    if axis.get_scale() == "log" and isinstance(axis, YAxis):
        _round(axis)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _round(axis: Axis) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5, of a long one at powers of ten."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)))
    axis.set_minor_locator(NullLocator())


@contextmanager
def _figure(
    width: float,
    height: float,
    columns: int,
    rows: int = 1,
    heights: Sequence[float] | None = None,
    sharex: bool = True,
) -> Iterator[tuple[Figure, list[Axes]]]:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, height_ratios=heights, sharex=sharex and rows > 1)
        yield figure, list(axes.flat)


def _svg(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()

"""Pictures of measured against simulated: curves, every number, gaps between tokens, residuals of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from scenarios.compare.comparison import Comparison, Diagnostics, Distribution, Error
from scenarios.forecast.forecast import named
from scenarios.report.figure import BLUE, GREEN, GREY, ORANGE, RED, Axes, Drawing, at_loads, decades, plain, whole
from sim.model.metric import METRICS


def compared(comparison: Comparison, metrics: Sequence[str] = ("e2e_mean", "ttft_p50", "rps")) -> list[Drawing]:
    """Measured points over the simulated curve and its band, a panel a metric."""
    return [partial(_compared, comparison=comparison, metric=metric, named=i == 0) for i, metric in enumerate(metrics)]


def _compared(ax: Axes, comparison: Comparison, metric: str, named: bool) -> None:
    rows = [row for row in comparison.rows if row.metric == metric]
    forecast = [row for row in rows if row.simulated is not None]
    load = [row.load for row in forecast]
    if forecast and forecast[0].low is not None:
        low, high = ([getattr(row, end) for row in forecast] for end in ("low", "high"))
        ax.fill_between(load, low, high, color=BLUE, alpha=0.18, lw=0, label="90 % band")
    ax.plot(load, [row.simulated or 0.0 for row in forecast], "-", color=BLUE, label=comparison.simulated)
    ax.plot(load, [row.simulated or 0.0 for row in forecast], ".", color=BLUE)
    first = "measured" if comparison.of == "a forecast" else comparison.measured
    for held_out, face, name in ((True, RED, first), (False, "white", f"{first}, used for the fit")):
        shown = [row for row in rows if row.held_out is held_out]
        if shown:
            points = [row.load for row in shown], [row.measured for row in shown]
            ax.plot(*points, "o", color=RED, mfc=face, ms=5, label=name, zorder=4)
    ax.set(title=METRICS[metric].column, xlabel=comparison.unit, ylim=(0, None))
    if rows:
        at_loads(ax.xaxis, sorted({row.load for row in rows}))
    if named:
        ax.legend(fontsize=8)


def parity(comparison: Comparison) -> list[Drawing]:
    """Simulated against measured, every rung and metric in seconds or per second: on the line is right."""
    groups = (
        ("Response times, s", {"E2E": "e2e_", "TTFT": "ttft_"}),
        ("Between tokens, s", {"ITL": "itl_", "TPOT": "tpot_"}),
        ("Rates, 1/s", {"requests": "rps", "output tokens": "output_tokens", "input tokens": "input_tokens"}),
    )
    return [partial(_parity, comparison=comparison, title=title, prefixes=prefixes) for title, prefixes in groups]


def _parity(ax: Axes, comparison: Comparison, title: str, prefixes: Mapping[str, str]) -> None:
    known = [row for row in comparison.rows if min(row.measured, row.simulated or 0.0) > 0]
    rows = [row for row in known if row.metric.startswith(tuple(prefixes.values()))]
    for (name, prefix), colour in zip(prefixes.items(), (BLUE, ORANGE, GREEN), strict=False):
        mine = [row for row in rows if row.metric.startswith(prefix)]
        faces = [colour if row.held_out else "white" for row in mine]
        points = [row.measured for row in mine], [row.simulated or 0.0 for row in mine]
        if mine:
            ax.scatter(*points, s=16, c=faces, edgecolors=colour, label=name, zorder=3)
    ax.set(title=title, xlabel=comparison.titles[0], ylabel=comparison.titles[1])
    if not rows:
        ax.text(0.5, 0.5, "no data", ha="center", transform=ax.transAxes, color=GREY)
        return
    ends = [min(row.measured for row in rows), max(row.measured for row in rows)]
    ax.plot(ends, ends, color=GREY, lw=1)
    ax.fill_between(ends, [0.95 * x for x in ends], [1.05 * x for x in ends], color=GREY, alpha=0.2, lw=0)
    ax.set(xscale="log", yscale="log")
    decades(ax.xaxis)
    plain(ax.xaxis)
    plain(ax.yaxis)
    ax.legend(fontsize=8)


def distributions(
    diagnostics: Diagnostics, unit: str, names: tuple[str, str] = ("measured", "simulated")
) -> list[Drawing]:
    """The distribution of the gaps between tokens, measured and simulated over each other, at six loads at most."""
    shown = [diagnostics.itl[i] for i in np.unique(np.linspace(0, len(diagnostics.itl) - 1, 6).round().astype(int))]

    def draw(ax: Axes, one: Distribution, legend: bool) -> None:
        _distribution(ax, one, diagnostics.shares, names)
        ax.set_title(one.at or named(one.load, unit))
        ax.set_xlabel("gap between two tokens, ms")
        if legend:
            ax.legend(fontsize=8, loc="lower right")

    return [partial(draw, one=one, legend=one is shown[0]) for one in shown]


def residuals(diagnostics: Diagnostics) -> list[Drawing]:
    """How far observed steps are from the model's step time, against batch size and time, prefill and decode apart."""

    def draw(ax: Axes, errors: Sequence[Error], title: str, xlabel: str, colour: str, counted: bool) -> None:
        _errors(ax, errors, colour)
        ax.set_title(title, pad=12)
        ax.set(xlabel=xlabel, ylabel="measured / model − 1")
        if counted:
            whole(ax.xaxis)

    made: list[Drawing] = []
    for kind in diagnostics.by_batch:
        what, colour = f"{kind.capitalize()} steps", ORANGE if kind == "prefill" else BLUE
        size = "prompts in the prefill" if kind == "prefill" else "requests in the batch"
        by = [
            (diagnostics.by_batch[kind], "by batch size", size),
            (diagnostics.by_time[kind], "over time", "s since the run began"),
        ]
        for errors, how, xlabel in by:
            made.append(
                partial(
                    draw, errors=errors, title=f"{what}, {how}", xlabel=xlabel, colour=colour, counted=xlabel == size
                )
            )
    return made


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
    decades(ax.xaxis)
    plain(ax.xaxis)


def _errors(ax: Axes, errors: Sequence[Error], colour: str) -> None:
    """Means with the spread of single steps; the more steps, the larger the point."""
    at, mean, low, high = ([getattr(error, name) for error in errors] for name in ("at", "mean", "low", "high"))
    most = max(error.steps for error in errors)
    ax.axhline(0.0, color=GREY, lw=1)
    ax.vlines(at, low, high, color=colour, alpha=0.3, lw=2.5)
    ax.scatter(at, mean, s=[6 + 22 * error.steps / most for error in errors], color=colour, zorder=3)
    ax.yaxis.set_major_formatter(lambda share, _: f"{share:+.0%}")

"""Every metric of a run, once: its name in files, how tables show it, and when it exists.

`sim.results` computes them; tables, CSV, reports, and the checks of SLOs and tolerances read the names here.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """What a metric measures."""

    LATENCY = "latency"
    RATE = "rate"
    SHARE = "share"
    QUEUE = "queue"
    STATE = "state"


class Metric(NamedTuple):
    """A metric. Files have seconds, rates per second, and shares of 1; tables show `scale` times that, in `unit`."""

    name: str
    title: str
    kind: Kind
    unit: str = ""
    scale: float = 1.0
    needs: str = ""  # what a run must have recorded, where that is more than when requests began and ended

    @property
    def column(self) -> str:
        """The head of a table's column."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    @property
    def steady(self) -> bool:
        """Whether it has a value in a steady state only: without one, latencies and queues grow."""
        return self.kind in (Kind.LATENCY, Kind.QUEUE)


QUANTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}
_FIRST, _EVERY, _LENGTHS, _STEPS = "first tokens", "the time of every token", "numbers of tokens", "steps"
_LATENCIES = (
    ("e2e", "s", 1.0, ""),
    ("ttft", "s", 1.0, _FIRST),
    ("itl", "ms", 1e3, _EVERY),
    ("tpot", "ms", 1e3, _FIRST),
)

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        *(
            Metric(f"{what}_{which}", f"{what.upper()} {which}", Kind.LATENCY, unit, scale, needs)
            for what, unit, scale, needs in _LATENCIES
            for which in ("mean", *QUANTILES)
        ),
        Metric("rps", "RPS", Kind.RATE),
        Metric("input_tokens_per_s", "in", Kind.RATE, "tok/s", needs=_LENGTHS),
        Metric("output_tokens_per_s", "out", Kind.RATE, "tok/s", needs=_LENGTHS),
        Metric("goodput", "goodput", Kind.RATE),
        Metric("error_rate", "errors", Kind.SHARE, "%", 1e2),
        Metric("overloaded_rate", "429", Kind.SHARE, "%", 1e2),
        Metric("queue", "queued", Kind.QUEUE, needs=_FIRST),
        Metric("in_flight", "in flight", Kind.QUEUE),
        Metric("mean_batch", "batch", Kind.STATE, needs=_STEPS),
        Metric("prefill_share", "prefill share", Kind.STATE, needs=_STEPS),
        Metric("decode_share", "decode share", Kind.STATE, needs=_STEPS),
        Metric("idle_share", "idle share", Kind.STATE, needs=_STEPS),
    )
}
LATENCIES = tuple(name for name, metric in METRICS.items() if metric.kind is Kind.LATENCY)  # of one window, s
RATES = tuple(name for name, metric in METRICS.items() if metric.kind is Kind.RATE)
SHARES = tuple(name for name, metric in METRICS.items() if metric.kind is Kind.SHARE)
COMPARED = (*LATENCIES, *RATES, *SHARES)  # what a measured run has, too
# published figures of a whole ladder, and their names in a sentence
OF_A_LADDER = {"rps_takeoff": "RPS at latency onset", "rps_plateau": "RPS at the plateau"}


def plain(name: str) -> str:
    """The metric's name without the class of a mix: `ttft_p95` of `chat.ttft_p95`."""
    return name.rpartition(".")[2]


def label(name: str) -> str:
    """A metric in a sentence: `E2E p95`, `requests/s`, `E2E p95 of chat`; or a published figure of a whole ladder."""
    if (of := name.rpartition(".")[0]) and name not in OF_A_LADDER:
        return f"{label(plain(name))} of {of}"
    if name in OF_A_LADDER:
        return OF_A_LADDER[name]
    if METRICS[name].kind is Kind.LATENCY:
        return METRICS[name].title
    return {"rps": "requests/s"}.get(name, name.replace("_per_s", "/s").replace("_", " "))

"""Counters, gauges and histograms, written in Prometheus' text format. Read by `server.exposition`."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence


class Exposition:
    """The series of one server. A series appears with its first value.

    `labels` (`name="value"`) are those of every series, except where `others` has others by the series' name; a series
    has its labels in alphabetical order. `buckets` are the upper bounds of a histogram's buckets by its name, `usual`
    those of all others.
    """

    def __init__(
        self,
        buckets: Mapping[str, Sequence[float]],
        usual: Sequence[float],
        labels: Sequence[str] = (),
        others: Mapping[str, Sequence[str]] = {},
    ):
        self._buckets, self._usual, self._labels, self._others = buckets, usual, labels, others
        self._counters: dict[str, dict[str, float]] = {}
        self._gauges: dict[str, dict[str, float]] = {}
        self._histograms: dict[str, dict[str, _Histogram]] = {}

    def count(self, name: str, label: str = "", value: str = "", by: float = 1) -> None:
        """Add to a counter, perhaps one with a label."""
        series = self._counters.setdefault(name, {})
        labels = self._all(name, label, value)
        series[labels] = series.get(labels, 0) + by

    def gauge(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge; `labels` as they are written."""
        self._gauges.setdefault(name, {})[self._with(name, labels)] = value

    def histogram(self, name: str) -> None:
        """Have a histogram without observations."""
        self._histograms.setdefault(name, {})[self._with(name, ())] = _Histogram(self._buckets.get(name, self._usual))

    def observe(self, name: str, value: float, label: str = "", of: str = "") -> None:
        """Add an observation to a histogram, durations in s."""
        series = self._histograms.setdefault(name, {})
        labels = self._all(name, label, of)
        if labels not in series:
            series[labels] = _Histogram(self._buckets.get(name, self._usual))
        series[labels].observe(value)

    def text(self) -> str:
        """The body of an answer to `/metrics`."""
        out: list[str] = []
        for kind, families in (("counter", self._counters), ("gauge", self._gauges)):
            for name, series in families.items():
                out.append(f"# TYPE {name} {kind}")
                out += [
                    f"{name}{{{labels}}} {n:.12g}" if labels else f"{name} {n:.12g}" for labels, n in series.items()
                ]
        for name, histograms in self._histograms.items():
            out.append(f"# TYPE {name} histogram")
            for labels, histogram in histograms.items():
                out += histogram.lines(name, labels)
        return "\n".join(out) + "\n"

    def _all(self, name: str, label: str, value: str) -> str:
        return self._with(name, (f'{label}="{value}"',) if label else ())

    def _with(self, name: str, labels: Sequence[str]) -> str:
        return ",".join(sorted((*self._others.get(name, self._labels), *labels)))


class _Histogram:
    def __init__(self, bounds: Sequence[float]):
        self._bounds, self._counts = bounds, [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str, labels: str) -> list[str]:
        lead, total, out = labels + "," if labels else "", 0, []
        for bound, n in zip([*self._bounds, float("inf")], self._counts, strict=True):
            total += n
            le = "+Inf" if bound == float("inf") else repr(bound)
            out.append(f'{name}_bucket{{{lead}le="{le}"}} {total}')
        tail = f"{{{labels}}}" if labels else ""
        return [*out, f"{name}_sum{tail} {self._sum!r}", f"{name}_count{tail} {total}"]

"""Counters, gauges and histograms in Prometheus' text format, written and read.

The names are those of TGI 0.9.4 (router/src/server.rs:593-634); as there, a series appears with its first event.
"""

from __future__ import annotations

from bisect import bisect_left

DURATION_BUCKETS = [0.0001 * 1.5**k for k in range(1, 36)]  # router/src/server.rs:593-634


class Exposition:
    """The series of one server."""

    def __init__(self, max_input_length: int, max_total_tokens: int):
        self._counters: dict[str, dict[str, float]] = {}
        self._gauges: dict[str, float] = {}
        self._histograms: dict[str, dict[str, _Histogram]] = {}
        tokens = [max_total_tokens / 100 * k for k in range(1, 101)]
        self._buckets = {
            "tgi_request_input_length": [max_input_length / 100 * k for k in range(1, 101)],
            "tgi_request_generated_tokens": tokens,
            "tgi_request_max_new_tokens": tokens,
            "tgi_batch_next_size": [float(k) for k in range(1, 1025)],
        }

    def count(self, name: str, label: str = "", value: str = "") -> None:
        """One more of `name`, perhaps with a label."""
        series = self._counters.setdefault(name, {})
        labels = f'{label}="{value}"' if label else ""
        series[labels] = series.get(labels, 0) + 1

    def gauge(self, name: str, value: float) -> None:
        """Set a gauge."""
        self._gauges[name] = value

    def observe(self, name: str, value: float, label: str = "", of: str = "") -> None:
        """One more observation in a histogram, durations in s."""
        labels = f'{label}="{of}"' if label else ""
        series = self._histograms.setdefault(name, {})
        if labels not in series:
            series[labels] = _Histogram(self._buckets.get(name, DURATION_BUCKETS))
        series[labels].observe(value)

    def text(self) -> str:
        """What `/metrics` answers."""
        out: list[str] = []
        for name, series in self._counters.items():
            out.append(f"# TYPE {name} counter")
            out += [f"{name}{{{labels}}} {n:g}" if labels else f"{name} {n:g}" for labels, n in series.items()]
        for name, value in self._gauges.items():
            out += [f"# TYPE {name} gauge", f"{name} {value:g}"]
        for name, histograms in self._histograms.items():
            out.append(f"# TYPE {name} histogram")
            for labels, histogram in histograms.items():
                out += histogram.lines(name, labels)
        return "\n".join(out) + "\n"


class _Histogram:
    def __init__(self, bounds: list[float]):
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


def parse(text: str) -> dict[str, float]:
    """{name with labels: value} of an exposition, without histogram buckets: too coarse for any use here."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        close = line.rfind("}")
        name, _, rest = (line[: close + 1], "", line[close + 1 :]) if close >= 0 else line.partition(" ")
        if name.partition("{")[0].endswith("_bucket"):
            continue
        try:
            found[name.strip()] = float(rest.split()[0])
        except (ValueError, IndexError):
            continue  # not a sample; whatever else a server writes there is not ours to judge
    return found

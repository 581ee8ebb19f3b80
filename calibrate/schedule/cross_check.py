"""Cross-check of the steps found with the server's own counters at `/metrics`.

TGI 0.9.4 counts prefills and decode steps and times both. vLLM counts steps that delivered a token, whatever they held,
and requests that ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from calibrate.schedule.schedule import Schedule
from sim.model.files.records import Look, read_scrapes
from sim.model.warning import Notice, notice
from sim.run import Run

TOLERANCE = 0.05  # relative; a step or two is cut off at either end
EXTRA = {"prefill": 0.006, "decode": 0.0}  # s: network latency to an idle server, and the filter before a prefill
_COUNT = 'tgi_batch_inference_duration_count{method="%s"}'
_SUM = 'tgi_batch_inference_duration_sum{method="%s"}'
_MIXED = "vllm:iteration_tokens_total_count"
_ENDED = "vllm:request_success_total"  # by reason


class Counts(NamedTuple):
    """Steps of either kind between the first and the last scrape, their total time, s, and requests prefilled; of a
    server whose steps are mixed, all its steps as `mixed`, and requests that ended."""

    mixed: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    requests: float = 0.0

    def mean(self, kind: str) -> float:
        """Mean duration of a step of this kind, s."""
        return float(getattr(self, f"{kind}_seconds")) / max(float(getattr(self, kind)), 1.0)


def cross_check(run: Run, schedule: Schedule) -> list[Notice]:
    """Warnings where the number of steps, their duration or the number of requests differ from the server's
    counters."""
    scrapes = read_scrapes(run.path / "server.jsonl") if run.path is not None else []
    pairs = [
        (_seen(schedule.steps, scraped[0][0], scraped[-1][0], mixed=_counts_mixed(scraped[-1][1])), counted)
        for scraped in _scrapes_by_stretch(run, scrapes)
        if (counted := _counted(scraped[0][1], scraped[-1][1])) is not None
    ]
    if not pairs:
        return []
    ours, theirs = (Counts(*np.sum(counts, axis=0).tolist()) for counts in zip(*pairs, strict=True))
    warnings = []
    for kind, named in (("mixed", ""), ("prefill", "prefill "), ("decode", "decode ")):
        found, count = getattr(ours, kind), getattr(theirs, kind)
        if abs(found - count) > max(TOLERANCE * count, 3):
            warnings.append(
                notice(
                    "steps-disagree",
                    f"{run.name}: the streams show {found:.0f} {named}steps, the server counted {count:.0f}",
                )
            )
    for kind in EXTRA:
        took, said = ours.mean(kind), theirs.mean(kind)
        if said > 0 and not -TOLERANCE * said <= took - said <= TOLERANCE * said + EXTRA[kind]:
            warnings.append(
                notice(
                    "steps-disagree",
                    f"{run.name}: the streams show {kind} steps of {1e3 * took:.1f} ms, the server says "
                    f"{1e3 * said:.1f} ms",
                )
            )
    if theirs.requests > (1 + TOLERANCE) * ours.requests + 3:
        warnings.append(
            notice(
                "other-traffic",
                f"{run.name}: the server counted {theirs.requests:.0f} requests, this client's were "
                f"{ours.requests:.0f}: other traffic runs on it, and batch sizes are larger than they look",
            )
        )
    return warnings


def _scrapes_by_stretch(run: Run, scrapes: Sequence[Look]) -> Iterator[list[Look]]:
    """The scrapes of each stretch of a run, from its first rung on. Before that the server answered warm-ups, which are
    not recorded, and between two stretches it may have been restarted."""
    for start, end in run.stretches:
        begun = min((rung.start for rung in run.rungs if start <= rung.start < end), default=start)
        scraped = [scrape for scrape in scrapes if begun <= scrape[0] < end]
        if len(scraped) > 1:
            yield scraped


def _seen(steps: pd.DataFrame, start: float, end: float, *, mixed: bool) -> Counts:
    inside = steps[(steps["end"] > start) & (steps["end"] <= end)]
    if mixed:
        return Counts(mixed=len(inside), requests=float(inside["ended"].sum()))
    prefills, decodes = inside[inside["kind"] == "prefill"], inside[inside["kind"] == "decode"]
    return Counts(
        prefill=len(prefills),
        decode=len(decodes),
        prefill_seconds=float(prefills["seconds"].sum()),
        decode_seconds=float(decodes["seconds"].sum()),
        requests=float(prefills["sequences"].sum()),
    )


def _counts_mixed(metrics: Mapping[str, float]) -> bool:
    return any(name.partition("{")[0] == _MIXED for name in metrics)


def _counted(first: Mapping[str, float], last: Mapping[str, float]) -> Counts | None:
    """What the server counted between two scrapes; None where it does not count steps."""

    def grown(name: str) -> float:
        return last.get(name, 0.0) - first.get(name, 0.0)

    def together(series: str) -> float:
        return sum(grown(name) for name in last if name.partition("{")[0] == series)

    if _counts_mixed(last):
        return Counts(mixed=together(_MIXED), requests=together(_ENDED))
    if _COUNT % "decode" not in last:
        return None
    return Counts(
        prefill=grown(_COUNT % "prefill"),
        decode=grown(_COUNT % "decode"),
        prefill_seconds=grown(_SUM % "prefill"),
        decode_seconds=grown(_SUM % "decode"),
        requests=grown("tgi_batch_next_size_sum"),
    )

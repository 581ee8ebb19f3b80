"""The server's own counters as a second witness: `/metrics` must agree with the rebuilt steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from calibrate.schedule.rebuild import Schedule
from sim.model.files.records import Look, read_scrapes
from sim.run import Run

AGREE = 0.05  # relative; edges cut a step or two off either side
BESIDE = {"prefill": 0.006, "decode": 0.0}  # s: the way to an idle server, and what is dropped before a prefill
_COUNT = 'tgi_batch_inference_duration_count{method="%s"}'
_SUM = 'tgi_batch_inference_duration_sum{method="%s"}'


class Counts(NamedTuple):
    """What went on between the first look at the server's counters and the last: steps of either kind, what they took
    together, s, and requests prefilled."""

    prefill: float = 0.0
    decode: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    requests: float = 0.0

    def mean(self, kind: str) -> float:
        """How long a step of this kind takes, s."""
        return float(getattr(self, f"{kind}_seconds")) / max(float(getattr(self, kind)), 1.0)


def cross_check(run: Run, schedule: Schedule) -> list[str]:
    """Warnings where the numbers of steps, how long they take or the number of requests differ from the server's."""
    scrapes = read_scrapes(run.path / "server.jsonl") if run.path is not None else []
    pairs = [
        (_seen(schedule.steps, looks[0][0], looks[-1][0]), _counted(looks[0][1], looks[-1][1]))
        for looks in _looks(run, scrapes)
    ]
    if not pairs:
        return []
    ours, theirs = (Counts(*np.sum(counts, axis=0).tolist()) for counts in zip(*pairs, strict=True))
    warnings = []
    for kind in ("prefill", "decode"):
        found, count = getattr(ours, kind), getattr(theirs, kind)
        if abs(found - count) > max(AGREE * count, 3):
            warnings.append(f"{run.name}: the streams show {found:.0f} {kind} steps, the server counted {count:.0f}")
        took, said = ours.mean(kind), theirs.mean(kind)
        if said > 0 and not -AGREE * said <= took - said <= AGREE * said + BESIDE[kind]:
            warnings.append(
                f"{run.name}: the streams show {kind} steps of {1e3 * took:.1f} ms, the server says {1e3 * said:.1f} ms"
            )
    if theirs.requests > (1 + AGREE) * ours.requests + 3:
        warnings.append(
            f"{run.name}: the server prefilled {theirs.requests:.0f} requests, this client's were "
            f"{ours.requests:.0f}: other traffic runs on it, and batch sizes are larger than they look"
        )
    return warnings


def _looks(run: Run, scrapes: Sequence[Look]) -> Iterator[list[Look]]:
    """The looks of each stretch from its first rung on. Before it the server answered warm-ups, which are not recorded,
    and between two stretches it may have been started anew."""
    for start, end in run.stretches:
        begun = min((rung.start for rung in run.rungs if start <= rung.start < end), default=start)
        looks = [look for look in scrapes if begun <= look[0] < end]
        if len(looks) > 1:
            yield looks


def _seen(steps: pd.DataFrame, start: float, end: float) -> Counts:
    inside = steps[(steps["end"] > start) & (steps["end"] <= end)]
    prefills, decodes = inside[inside["kind"] == "prefill"], inside[inside["kind"] == "decode"]
    return Counts(
        prefill=len(prefills),
        decode=len(decodes),
        prefill_seconds=float(prefills["seconds"].sum()),
        decode_seconds=float(decodes["seconds"].sum()),
        requests=float(prefills["sequences"].sum()),
    )


def _counted(first: Mapping[str, float], last: Mapping[str, float]) -> Counts:
    def grown(name: str) -> float:
        return last.get(name, 0.0) - first.get(name, 0.0)

    return Counts(
        prefill=grown(_COUNT % "prefill"),
        decode=grown(_COUNT % "decode"),
        prefill_seconds=grown(_SUM % "prefill"),
        decode_seconds=grown(_SUM % "decode"),
        requests=grown("tgi_batch_next_size_sum"),
    )

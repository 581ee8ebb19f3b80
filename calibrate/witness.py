"""The server's own counters as a second witness: `/metrics` must agree with the rebuilt steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from calibrate.steps import Schedule
from sim.run import Run

AGREE = 0.05  # relative; edges cut a step or two off either side
_COUNT = 'tgi_batch_inference_duration_count{method="%s"}'
_SUM = 'tgi_batch_inference_duration_sum{method="%s"}'


def witness(run: Run, schedule: Schedule) -> list[str]:
    """Doubts where the number of steps, their total time or the number of requests differ from the server's own."""
    begun = run.rungs[0].start if run.rungs else 0.0  # before it the server answered warm-ups, which are not recorded
    scrapes = [s for s in _scrapes(run.path) if s[0] >= begun] if run.path is not None else []
    if len(scrapes) < 2:
        return []
    (start, first), (end, last) = scrapes[0], scrapes[-1]
    steps = schedule.steps
    inside = steps[(steps["end"] > start) & (steps["end"] <= end)]
    doubts = []

    def grown(name: str) -> float:
        return last.get(name, 0.0) - first.get(name, 0.0)

    busy = {kind: grown(_SUM % kind) for kind in ("prefill", "decode")}
    ours = float(inside["seconds"].sum())
    for kind in ("prefill", "decode"):
        count, found = grown(_COUNT % kind), int((inside["kind"] == kind).sum())
        if abs(found - count) > max(AGREE * count, 3):
            doubts.append(f"{run.name}: the streams show {found} {kind} steps, the server counted {count:.0f}")
    theirs = sum(busy.values())
    if theirs > 0 and abs(ours - theirs) > AGREE * theirs:
        doubts.append(f"{run.name}: the steps take {ours:.1f} s together, the server says {theirs:.1f} s")
    asked, mine = grown("tgi_batch_next_size_sum"), int(inside.loc[inside["kind"] == "prefill", "sequences"].sum())
    if asked > (1 + AGREE) * mine + 3:
        doubts.append(
            f"{run.name}: the server prefilled {asked:.0f} requests, this client's were {mine}: other traffic runs on "
            "it, and batch sizes are larger than they look"
        )
    return doubts


def _scrapes(path: Path) -> Iterator[tuple[float, Mapping[str, float]]]:
    file = path / "server.jsonl"
    if not file.exists():
        return
    for line in file.read_bytes().splitlines():
        try:
            record = msgspec.json.decode(line)
        except msgspec.DecodeError:
            continue  # torn by a crash; what came before it still counts
        if isinstance(record, dict) and isinstance(record.get("metrics"), dict) and "t" in record:
            yield float(record["t"]), record["metrics"]

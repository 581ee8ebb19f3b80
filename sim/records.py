"""The records that a run's files are made of: their shapes, and how they are read, line by line."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import msgspec

from sim.errors import BadInput
from sim.shape import Fail, Key, check_shape, dotted

STATUSES = ("ok", "overloaded", "validation", "generation", "incomplete", "timeout", "connect", "reset", "aborted")
CLOCKS = 0.01  # s: other tools round times, each by itself


class HeadLine(msgspec.Struct):
    """The head of a run, but for `rungs` and `segments`."""

    kind: str = "measured"
    name: str = ""
    created: str | None = None
    scenario: dict[str, Any] | None = None
    software: dict[str, Any] | None = None
    info: dict[str, Any] | None = None
    stopped: str | None = None
    doubts: list[str] | None = None


class RungLine(msgspec.Struct):
    """An entry of `rungs`; the last one of a killed run has not got to its later times."""

    start: float
    ramped: float | None = None
    settled: float | None = None
    end: float | None = None
    users: int | None = None
    rate: float | None = None
    status: str = "aborted"
    doubts: list[str] = []


class SegmentLine(msgspec.Struct):
    """An entry of `segments`."""

    start: float


class RequestLine(msgspec.Struct):
    """A line of `requests.jsonl`: what a request must say, and the types of what it may."""

    id: int
    sent: float
    prompt_tokens: int
    status: str
    rung: int = 0
    user: int = -1
    scheduled: float | None = None
    ended: float | None = None
    max_new_tokens: int = 0
    output_tokens: int = 0
    token_times: list[float] | None = None
    event_tokens: list[int] | None = None
    first_token: float | None = None
    last_token: float | None = None

    def impossible(self) -> tuple[str, str] | None:
        """What cannot be: the key, and what was expected of it."""
        for name in ("prompt_tokens", "max_new_tokens", "output_tokens", "sent"):
            if getattr(self, name) < 0:
                return name, f"expected 0 or more, found {getattr(self, name)}"
        if self.status not in STATUSES:
            return "status", f"expected one of {', '.join(STATUSES)}, found {self.status!r}"
        if self.event_tokens:
            tokens = len(self.token_times or [])
            if min(self.event_tokens) < 1 or sum(self.event_tokens) != tokens:
                return "event_tokens", f"expected positive numbers that add up to the {tokens} token_times"
        if self.ended is not None and self.ended < self.sent - CLOCKS:
            return "ended", f"expected no time before it was sent ({self.sent}), found {self.ended}"
        return None


class StepLine(msgspec.Struct):
    """A line of `steps.jsonl`: what the reader itself needs of it."""

    start: float
    end: float
    kind: str
    count: int
    sequences: int
    ends: list[float] = []


def read_lines(file: Path, doubts: list[str], shape: type[msgspec.Struct]) -> list[dict[str, Any]]:
    """The records of a file (plain or `.gz`) of JSON lines, each of that shape.

    A torn last line is dropped with a doubt. `BadInput` names file, line and key.
    """
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as e:
        raise BadInput(f"cannot be read ({e})", path=file) from e
    records = []
    lines = raw.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as e:
            if number == len(lines):
                doubts.append(f"{file.name}: the last line was torn and is left out")
                continue
            raise BadInput(f"not a JSON object ({e})", path=file, line=number) from e
        if not isinstance(record, dict):
            raise BadInput("expected a JSON object a line", path=file, line=number)
        try:
            known = msgspec.convert(record, shape)
        except msgspec.ValidationError:
            _complain(record, shape, file, number)
        else:
            if isinstance(known, RequestLine) and (wrong := known.impossible()):
                raise BadInput(wrong[1], path=file, line=number, key=wrong[0])
        records.append(record)
    return records


def kept_time(t: float) -> float | None:
    """A time as files keep it: to the microsecond, and null for one that never came."""
    return None if t != t else round(float(t), 6)


def _complain(record: dict[str, Any], shape: type[msgspec.Struct], file: Path, line: int) -> None:
    def fail(key: Key, message: str) -> BadInput:
        return BadInput(message, path=file, line=line, key=dotted(key))

    check_known(record, shape, fail)


def check_known(record: dict[str, Any], shape: type[msgspec.Struct], fail: Fail, key: Key = ()) -> None:
    """Complain about values under the keys that `shape` knows; others are ignored."""
    check_shape({k: v for k, v in record.items() if k in shape.__struct_fields__}, shape, fail, key)


Look = tuple[float, dict[str, float]]  # at a server's counters: s since the run began, value by name


def read_looks(file: Path) -> list[Look]:
    """The looks that `server.jsonl` has, in order of time; none where there is no file.

    What is torn, or has no time or no metrics, is left out: the rest still counts.
    """
    looks = []
    for line in file.read_bytes().splitlines() if file.exists() else []:
        try:
            record = msgspec.json.decode(line)
        except msgspec.DecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("metrics"), dict) and "t" in record:
            looks.append((float(record["t"]), record["metrics"]))
    return sorted(looks, key=lambda look: look[0])

"""The records that a run's files are made of: their shapes, and how they are read, line by line."""

from __future__ import annotations

import gzip
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from sim.model.errors import BadInput
from sim.model.files.atomic import gunzip
from sim.model.files.shape import Fail, Key, check_shape, dotted
from sim.model.status import Status
from sim.model.warning import Notice, notice

MOST_TOKENS = 10**9  # of one request: no context is that long
MOST_COUNT = 2**53  # that a float counts exactly
LATEST = 1e11  # s: where nothing says how long a run took; the clock of the wall is at 2e9
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
    warnings: list[Notice] | None = None


class RungLine(msgspec.Struct):
    """An entry of `rungs`; the last one of a killed run has not got to its later times."""

    start: float
    ramped: float | None = None
    settled: float | None = None
    end: float | None = None
    users: int | None = None
    rate: float | None = None
    status: str = "aborted"
    warnings: list[Notice] = []


class SegmentLine(msgspec.Struct):
    """An entry of `segments`."""

    start: float


class RequestLine(msgspec.Struct):
    """A line of `requests.jsonl`: what a request must say, and the types of what it may."""

    id: int
    sent: float
    prompt_tokens: int
    status: Status
    rung: int = 0
    user: int = -1
    replica: int = -1
    scheduled: float | None = None
    ended: float | None = None
    max_new_tokens: int = 0
    output_tokens: int = 0
    token_times: list[float] | None = None
    event_tokens: list[int] | None = None
    first_token: float | None = None
    last_token: float | None = None
    finish_reason: Any = None
    error: Any = None

    def wrong(self, latest: float) -> str | None:
        """Why its times or lengths are nobody's, in words: such a request is left out; None if they can be.

        No time of a run is later than `latest`, s.
        """
        times = self.token_times or []
        if any(after < before for before, after in pairwise(times)):
            return "token times go backward"
        first = times[0] if times else self.first_token
        last = times[-1] if times else self.last_token
        if first is not None and first < self.sent - CLOCKS:
            return "a token came before the request was sent"
        if last is not None and self.ended is not None and last > self.ended + CLOCKS:
            return "a token came after the answer had ended"
        said = (self.sent, self.scheduled, self.ended, first, last)
        if any(t is not None and not -CLOCKS <= t <= latest for t in said):
            return "a time is not of this run"
        if max(self.prompt_tokens, self.output_tokens) > MOST_TOKENS or self.max_new_tokens > MOST_COUNT:
            return "no model takes so many tokens"
        return None

    def impossible(self) -> tuple[str, str] | None:
        """What cannot be: the key, and what was expected of it."""
        for name in ("prompt_tokens", "max_new_tokens", "output_tokens", "sent"):
            if getattr(self, name) < 0:
                return name, f"expected 0 or more, found {getattr(self, name)}"
        if self.event_tokens:
            tokens = len(self.token_times or [])
            if min(self.event_tokens) < 1 or sum(self.event_tokens) != tokens:
                return "event_tokens", f"expected positive numbers that add up to the {tokens} token_times"
        if self.ended is not None and self.ended < self.sent - CLOCKS:
            return "ended", f"expected no time before it was sent ({self.sent}), found {self.ended}"
        return None


_PREFILLED = "prefill_sequences"


class StepLine(msgspec.Struct):
    """A line of `steps.jsonl`: what the reader itself needs of it, and what statistics of simulated runs do."""

    start: float
    end: float
    count: int
    replica: int = 0
    passes: int = 1
    prefill_tokens: int = 0
    prefill_sequences: int = 0
    prefill_attention: int = 0
    prefill_longest: int = 0
    decode_sequences: int = 0
    decode_context: int = 0
    decode_longest: int = 0
    dropped: int = 0
    kind: str | None = None  # format 1, as the next
    sequences: int = 0
    ends: list[float] = []
    tokens: int = 0
    prompt_sq: int = 0
    max_prompt: int = 0
    joined: int = 0
    ended: int = 0
    kept: int = 0
    used: int = 0
    first: float = 0.0
    growth: float = 0.0
    extra: float = 0.0
    begun: int = 0
    chunk_tokens: int = 0
    chunk_share: float = 0.0

    def impossible(self) -> tuple[str, str] | None:
        """What cannot be: the key, and what was expected of it."""
        if self.kind not in (None, "prefill", "decode"):
            return "kind", f"expected prefill or decode, found {self.kind!r}"
        size = "sequences" if self.kind is not None else "decode_sequences" if self.decode_sequences else _PREFILLED
        for name in ("count", size):
            if not 1 <= getattr(self, name) <= MOST_TOKENS:
                return name, f"expected 1 to {MOST_TOKENS}, found {getattr(self, name)}"
        if not 0 <= self.start <= LATEST:
            return "start", f"expected s since the run began, found {self.start:.15g}"
        if not self.start <= self.end <= LATEST:
            return "end", f"expected no time before its start ({self.start}), found {self.end:.15g}"
        if self.ends and (len(self.ends) != self.count or self.ends != sorted(self.ends)):
            return "ends", f"expected the {self.count} ends of its steps, in order"
        for name in self.__struct_fields__:
            if self.__annotations__[name] != "int":
                continue
            if not 0 <= getattr(self, name) <= MOST_COUNT:
                return name, f"expected 0 or more, found {getattr(self, name)}"
        for name in ("first", "growth", "extra"):
            if not abs(getattr(self, name)) <= LATEST:
                return name, f"expected seconds, found {getattr(self, name)}"
        return None


PART = 1 << 20  # bytes of a file that are looked at together


def each_line(
    file: Path, warnings: list[Notice], progress: Callable[[int], None] = lambda done: None
) -> Iterator[tuple[int, bytes]]:
    """The lines of a file (plain or `.gz`) with their numbers, empty ones left out, without holding them all.

    A torn last line is dropped with a warning. `progress` hears how many bytes of the file have been read. `BadInput`
    where the file cannot be read.
    """
    number, rest = 0, b""
    try:
        with file.open("rb") as raw, gzip.open(raw) if file.suffix == ".gz" else nullcontext(raw) as f:
            while part := f.read(PART):
                progress(raw.tell())
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    number += 1
                    if line.strip():
                        yield number, line
    except (OSError, EOFError, zlib.error) as e:
        raise BadInput(f"cannot be read ({e})", path=file) from e
    if not rest.strip():
        return
    try:
        msgspec.json.decode(rest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        warnings.append(notice("torn-line", f"{file.name}: the last line was torn and is left out"))
    else:
        yield number + 1, rest


def read_lines(file: Path, warnings: list[Notice], shape: type[msgspec.Struct]) -> list[dict[str, Any]]:
    """The records of a file (plain or `.gz`) of JSON lines, each of that shape.

    A torn last line is dropped with a warning. `BadInput` names file, line and key.
    """
    records = []
    for number, line in each_line(file, warnings):
        record = _record(line, file, number)
        _known(record, shape, file, number)
        records.append(record)
    return records


def read_requests(
    file: Path, warnings: list[Notice], progress: Callable[[int], None] = lambda done: None
) -> Iterator[RequestLine]:
    """The requests of a file, one after another; else like `read_lines`."""
    decoder = msgspec.json.Decoder(RequestLine)
    for number, line in each_line(file, warnings, progress):
        try:
            known = decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # slower, and says what is wrong
            known = _known(_record(line, file, number), RequestLine, file, number)
        else:
            _check_possible(known, file, number)
        yield known


def _record(line: bytes, file: Path, number: int) -> dict[str, Any]:
    try:
        record = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise BadInput(f"not a JSON object ({e})", path=file, line=number) from e
    except RecursionError as e:
        raise BadInput("nested too deeply; expected a JSON object a line", path=file, line=number) from e
    if not isinstance(record, dict):
        raise BadInput("expected a JSON object a line", path=file, line=number)
    return record


S = TypeVar("S", bound=msgspec.Struct)


def _known(record: dict[str, Any], shape: type[S], file: Path, number: int) -> S:
    try:
        known = msgspec.convert(record, shape)
    except msgspec.ValidationError:
        _complain(record, shape, file, number)
        # what is null is not said
        known = msgspec.convert({k: v for k, v in record.items() if v is not None}, shape)
    _check_possible(known, file, number)
    return known


def _check_possible(known: msgspec.Struct, file: Path, number: int) -> None:
    wrong = known.impossible() if isinstance(known, RequestLine | StepLine) else None
    if wrong is not None:
        raise BadInput(wrong[1], path=file, line=number, key=wrong[0])


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


def read_scrapes(file: Path) -> list[Look]:
    """The scrapes that `server.jsonl` (or `.gz`) has, in order of time; none where there is no file.

    What is torn, or has no time or no metrics, is left out: the rest still counts.
    """
    scrapes = []
    for line in _whole(file).splitlines():
        try:
            record = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
        if not isinstance(record, dict) or not isinstance(record.get("metrics"), dict) or not _number(record.get("t")):
            continue
        counters = {name: value for name, value in record["metrics"].items() if _number(value)}
        scrapes.append((float(record["t"]), counters))
    return sorted(scrapes, key=lambda scrape: scrape[0])


def _whole(file: Path) -> bytes:
    """What a file holds, or else the same with `.gz`; nothing where there is neither, or the latter is torn."""
    packed = file.with_name(f"{file.name}.gz")
    if file.exists() or not packed.exists():
        return file.read_bytes() if file.exists() else b""
    try:
        return gunzip(packed.read_bytes(), packed)
    except (OSError, EOFError, zlib.error):
        return b""


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max

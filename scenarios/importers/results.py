"""From another tool's requests, grouped by load level, to a run.

A tool's reader makes `LoadLevel`s in its own clock; `assemble` makes them the rungs of a ladder. Nothing is invented:
what a tool did not record is left out, or replaced as a warning says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scenarios.importers import observed
from scenarios.importers.observed import RequestTimes
from sim.cluster.replay import lanes
from sim.engines.catalog import DEFAULT, flags_of
from sim.model.errors import BadInput
from sim.model.files.records import CLOCKS
from sim.model.identity import Identity
from sim.model.requests import REQUEST_COLUMNS
from sim.model.scenario import Load, Scenario
from sim.model.status import Status
from sim.model.text import shortened_name
from sim.model.warning import Notice, notice
from sim.model.workload import MOST_TOKENS, Gamma
from sim.results.events import spread
from sim.run import Run, Rung

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
T = TypeVar("T")

MISCOUNTED = 0.01  # of the answers: where more have chunks that are no tokens, nothing says which chunks are tokens
INSTANT = 2e-6  # s: windows are half open and runs keep microseconds, so one that ends with an answer ends this later
BUSY = 0.98  # of the users: fewer in flight means that ramp or drain lies in the window (`docs/measuring.md`)
KIND_OF_FILE = re.compile(r"(\.(csv|jsonl?|ndjson|txt|gz|zst|bz2|xz))+$", re.IGNORECASE)
NOTHING: Floats = np.empty(0)


class RequestRecord(NamedTuple):
    """One request as a tool recorded it; times in s of the tool's clock, None where it recorded none.

    `chunks` are the arrivals of the parts of a streamed answer, which may or may not be tokens; `carried` says how many
    tokens each of them had, where the tool wrote that.
    """

    sent: float
    ended: float
    prompt_tokens: int
    output_tokens: int
    status: Status = Status.OK
    error: str | None = None
    due: float | None = None  # open loop: when it should have been sent
    max_new_tokens: int | None = None
    first: float | None = None
    last: float | None = None
    chunks: Floats = NOTHING
    end_known: bool = True  # else `ended` is when it was sent
    carried: Ints | None = None


@dataclass(frozen=True, kw_only=True)
class LoadLevel:
    """Everything measured at one load: closed loop at `users`, or open loop at `rate` requests/s.

    [settled, end) is the window over which the tool itself sums up; `answers` are to the requests begun here. `users`
    and `rate` are what the tool says; what the requests show stands for it. With neither it is `open_loop` that says
    how users behaved, and with none of the three the requests do. `counted` users were counted at every request, and
    think: fewer are in flight.
    """

    settled: float
    end: float
    answers: Sequence[RequestRecord]
    users: int | None = None
    rate: float | None = None
    open_loop: bool | None = None
    arrivals: str | Gamma | None = None
    counted: bool = False
    start: float | None = None  # absent: the window's, or when the first request was due or sent if that was before
    warnings: list[Notice] = field(default_factory=list)

    def shown(self) -> LoadLevel:
        """The level with the load that its requests show."""
        if self.counted or not self.answers:
            return self
        measured = [a for a in self.answers if a.sent < self.end and (a.ended > self.settled or not a.end_known)]
        requests = _request_times(self.answers)
        if self.users is not None or self.open_loop is False:
            load = observed.closed_loop(_request_times(measured) if measured else requests, self.users)
        elif self.rate is not None or self.open_loop:
            load = observed.open_loop(requests, self.rate, self.arrivals, (self.settled, self.end))
        else:
            load = observed.unstated_load(_request_times(measured) if measured else requests)
        return replace(
            self,
            answers=self.answers if load.users is None else [a._replace(due=None) for a in self.answers],
            users=load.users,
            rate=load.rate,
            arrivals=None if load.rate is None else load.arrivals,
            warnings=[*self.warnings, *load.warnings],
        )

    @property
    def began(self) -> float:
        """When it began."""
        if self.start is not None:
            return self.start
        return min([self.settled, *(_due(a) for a in self.answers)])


def _request_times(answers: Sequence[RequestRecord]) -> RequestTimes:
    columns = ([_due(a) for a in answers], [a.sent for a in answers], [a.ended for a in answers])
    due, sent, ended = (np.array(column, dtype=np.float64) for column in columns)
    return RequestTimes(due, sent, ended, np.array([a.end_known for a in answers], dtype=np.bool_))


def _possible(answer: RequestRecord, number: int, path: Path) -> RequestRecord:
    """The request, checked; the end of one that ended before it was sent is unknown, as it is of another clock."""
    for name in ("prompt_tokens", "output_tokens", "max_new_tokens"):
        count = getattr(answer, name)
        if count is not None and not 0 <= count <= MOST_TOKENS:
            found = "more" if count > 0 else str(count)
            message = f"expected 0 to {MOST_TOKENS:,} {name} of request {number}, found {found}"
            raise BadInput(message, path=path)
    moments = [answer.sent, answer.ended, *(t for t in (answer.due, answer.first, answer.last) if t is not None)]
    if not all(np.isfinite(moments)) or not np.isfinite(answer.chunks).all():
        raise BadInput(f"expected finite times of request {number}, found others", path=path)
    if answer.ended < answer.sent - CLOCKS:
        return answer._replace(ended=answer.sent, end_known=False)
    return answer


def _streamed(answer: RequestRecord) -> RequestRecord:
    """The request, without the time of a first token if all tokens came at once: it was not streamed."""
    chunks = answer.chunks
    at_once = len(chunks) == 1 or (answer.first is not None and answer.last is not None and answer.first >= answer.last)
    if not at_once or answer.output_tokens < 2 or answer.status != Status.OK:
        return answer
    return answer._replace(
        first=None, chunks=NOTHING, carried=None, last=float(chunks[-1]) if len(chunks) else answer.last
    )


def _due(answer: RequestRecord) -> float:
    return answer.sent if answer.due is None else min(answer.due, answer.sent)


def has(value: object, *keys: str) -> bool:
    """Whether a JSON value is a map with these keys."""
    return isinstance(value, dict) and set(keys) <= set(value)


def decoded_as(raw: Any, kind: type[T], path: Path, line: int | None = None) -> T:
    """`raw` as a `kind` of msgspec; raises `BadInput` naming the key and what was expected there."""
    try:
        return msgspec.convert(raw, kind, strict=False)
    except msgspec.ValidationError as e:
        message, _, key = str(e).partition(" - at `$")
        missing = message.partition("missing required field ")[2].strip("`")
        where = ".".join(part for part in (key.strip(".`"), missing) if part)
        raise BadInput("missing" if missing else message, path=path, line=line, key=where or None) from e


def assemble(
    path: Path,
    tool: str,
    levels: Sequence[LoadLevel],
    *,
    epoch: float | None = None,
    anew: bool = True,
    warnings: Sequence[Notice] = (),
    engine: Identity | None = None,
    info: dict[str, Any] | None = None,
) -> Run:
    """The run of some levels; `tool` is its name and version, `epoch` the unix time of its zero. `engine` is that of
    the server as far as the file tells, `info` what the server said of itself.

    `anew`: the users of a level began with it; otherwise they are added to those of the one before. Raises `BadInput`
    when nothing succeeded, or when two levels that began anew overlap.
    """
    levels = sorted(levels, key=lambda s: s.began)
    if not any(a.status == Status.OK for s in levels for a in s.answers):
        raise BadInput(f"no request of it succeeded; expected results of {tool} with at least one answer", path=path)
    for before, after in pairwise(levels):
        if anew and after.began < max((a.ended for a in before.answers), default=before.began):
            raise BadInput("two of its benchmarks overlap in time; expected one after the other", path=path)
    levels = [
        replace(s, answers=[_streamed(_possible(a, i, path)) for i, a in enumerate(s.answers, 1)]).shown()
        for s in levels
    ]
    zero = levels[0].began
    answers = [a for s in levels for a in s.answers]
    times, carried, found = _token_times(answers)
    groups = [[s] for s in levels] if anew else [levels]
    users = [user for group in groups for user in _users(group)]
    requests = _table(levels, users, times, zero)
    said = [*warnings, *found]
    said += _lacking(requests, times, said)
    name = named(path)
    return Run(
        kind="measured",
        name=name,
        scenario=_scenario(name, levels, f"imported from {path.name}, written by {tool}"),
        rungs=[_rung(s, zero) for s in levels],
        requests=requests,
        token_times=[np.maximum(t - zero, 0.0) for t in times] if times is not None else None,
        event_tokens=carried,
        created=None if epoch is None else moment(epoch + zero),
        software=software(tool),
        engine=engine,
        info=info,
        segments=[{"start": g[0].began - zero, "first_rung": levels.index(g[0])} for g in groups],
        stopped=f"{tool} had done what it was asked",
        warnings=[*warnings, *found, *_lacking(requests, times, warnings), *_unasked(answers), *_mixed(levels)],
    )


def named(path: Path) -> str:
    """What a run of this file is called: the file's name without what says its kind; other dots belong to the name."""
    return shortened_name(KIND_OF_FILE.sub("", path.resolve().name)).strip().lstrip(".") or "imported"


def moment(unix: float) -> str:
    """A time as runs write it."""
    return datetime.fromtimestamp(unix, UTC).isoformat(timespec="milliseconds")


def software(tool: str) -> dict[str, str]:
    """The versions of servecast and of the tool."""
    return {"servecast": version("servecast"), "client": tool}


def _rung(level: LoadLevel, zero: float) -> Rung:
    sent = sorted(a.sent for a in level.answers)
    ramped = sent[min(level.users or 1, len(sent)) - 1] if sent else level.began
    return Rung(
        start=level.began - zero,
        ramped=ramped - zero,
        settled=level.settled - zero,
        end=level.end - zero,
        users=level.users,
        rate=level.rate,
        warnings=[*level.warnings, *_warnings_of(level)],
        extra={} if level.arrivals is None else {"arrivals": msgspec.to_builtins(level.arrivals)},
    )


def _warnings_of(level: LoadLevel) -> list[Notice]:
    answers, seconds = level.answers, level.end - level.settled
    warnings = []
    if level.users is not None and seconds > 0:
        inside = (min(a.ended, level.end) - max(a.sent, level.settled) for a in answers)
        busy = sum(max(0.0, overlap) for overlap in inside) / seconds
        if busy < BUSY * level.users:
            warnings.append(
                notice(
                    "ramp-in-window",
                    f"on average {busy:.3g} of {level.users} users had a request in flight in the window: ramp, drain "
                    "or the tool's own pauses lie in it",
                )
            )
    unended = sum(not a.end_known for a in answers)
    if unended:
        warnings.append(
            notice(
                "ends-missing", f"when {unended} requests ended is not recorded; when they were sent stands in for it"
            )
        )
    failed = sum(a.status not in (Status.OK, Status.ABORTED) for a in answers)
    if failed:
        warnings.append(notice("requests-failed", f"{failed} of {len(answers)} requests failed"))
    return warnings


def _token_times(
    answers: Sequence[RequestRecord],
) -> tuple[list[Floats] | None, list[Ints | None] | None, list[Notice]]:
    """The time of every token, the tokens of each chunk where some had several, and warnings about them."""
    streamed = [a for a in answers if a.status == Status.OK and len(a.chunks)]
    if not streamed:
        return None, None, []
    # OpenAI-style servers other than vLLM say why an answer ended in a chunk of its own, without a token
    closing = sum(len(a.chunks) == a.output_tokens + 1 for a in streamed)
    miscounted = sum(len(a.chunks) > a.output_tokens + 1 for a in streamed)
    warnings = []
    if closing:
        warnings.append(
            notice(
                "closing-chunk",
                f"{closing} of {len(streamed)} answers came in one chunk more than they have tokens; the last, which "
                "only says why they ended, is left out, so E2E is to the last token",
            )
        )
    if miscounted:
        unknown = miscounted > MISCOUNTED * len(streamed)
        warnings.append(
            notice(
                "surplus-chunks",
                f"{miscounted} of {len(streamed)} answers came in more chunks than they have tokens: when each token "
                "came "
                + (
                    "is not known, so there is no ITL"
                    if unknown
                    else "is not known of them, and they are left out of ITL"
                ),
            )
        )
        if unknown:
            return None, None, warnings
    times, carried = zip(*(_stream(a) for a in answers), strict=True)
    tokens = sum(a.output_tokens for a in streamed)
    surplus = sum(max(0, a.output_tokens - len(a.chunks)) for a in streamed)
    if not surplus:
        return list(times), None, warnings
    if all(a.carried is not None for a in streamed):
        warnings.append(
            notice(
                "bundled-tokens",
                f"{surplus} of {tokens} tokens ({surplus / tokens:.2g}) came in a chunk with others: ITL is between "
                "chunks",
            )
        )
        return list(times), list(carried), warnings
    warnings.append(
        notice(
            "tokens-spread",
            f"{surplus} of {tokens} tokens ({surplus / tokens:.2g}) came in a chunk with others, the file does not "
            "say in which: they are spread evenly, and ITL is between chunks",
        )
    )
    return list(times), list(carried), warnings


def _stream(answer: RequestRecord) -> tuple[Floats, Ints | None]:
    """The time of every token of an answer, and the tokens of each chunk where some carried several."""
    chunks, tokens = answer.chunks, answer.output_tokens
    if answer.status != Status.OK or not len(chunks) or len(chunks) == tokens:
        return chunks, None
    if len(chunks) > tokens:
        return (chunks[:tokens] if len(chunks) == tokens + 1 else NOTHING), None
    each = np.array(spread(tokens, len(chunks)), dtype=np.int64) if answer.carried is None else answer.carried
    return np.repeat(chunks, each), each


def _lacking(requests: pd.DataFrame, times: list[Floats] | None, said: Sequence[Notice]) -> list[Notice]:
    """A warning for every metric that the run lacks because the file does not record what it needs."""
    ok = requests[(requests["status"] == Status.OK) & (requests["output_tokens"] > 0)]
    found = []
    silent = int(ok["first_token"].isna().sum())
    if silent:
        which = "no record says" if silent == len(ok) else f"{silent} of {len(ok)} answers do not say"
        found.append(
            notice("no-first-token", f"{which} when the first token came: no TTFT and no TPOT of such answers")
        )
    if len(ok) and times is None and not any("no ITL" in warning.text for warning in said):
        found.append(
            notice("no-token-times", "no record says when each token came: no ITL, and no steps to calibrate from")
        )
    if len(ok) and not ok["prompt_tokens"].any():
        found.append(
            notice(
                "no-prompt-lengths", "prompt lengths are not recorded: no input tokens/s, and nothing to forecast from"
            )
        )
    return found


def _mixed(levels: Sequence[LoadLevel]) -> list[Notice]:
    closed = sum(s.users is not None for s in levels)
    if closed in (0, len(levels)):
        return []
    return [
        notice(
            "mixed-loads",
            f"{closed} of {len(levels)} loads are users, the others requests/s: each is said with its warnings",
        )
    ]


def _table(levels: Sequence[LoadLevel], users: Sequence[int], times: list[Floats] | None, zero: float) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for rung, level in enumerate(levels):
        for answer in level.answers:
            chunks = answer.chunks if times is None or not len(times[len(rows)]) else times[len(rows)]
            first, last = (chunks[0], chunks[-1]) if len(chunks) else (answer.first, answer.last)
            moments: dict[str, float | None] = {
                "scheduled": _due(answer),
                "sent": answer.sent,
                "ended": answer.ended,
                "first_token": first,
                "last_token": last,
            }
            asked = answer.output_tokens if answer.max_new_tokens is None else answer.max_new_tokens
            rows.append(
                {"id": len(rows), "rung": rung, "user": users[len(rows)], "replica": -1, "finish_reason": None}
                | {name: float("nan") if t is None else t - zero for name, t in moments.items()}
                | {"prompt_tokens": answer.prompt_tokens, "output_tokens": answer.output_tokens}
                | {"max_new_tokens": asked, "status": answer.status, "error": answer.error}
            )
    columns = {name: pd.Series([row[name] for row in rows], dtype=kind) for name, kind in REQUEST_COLUMNS.items()}
    return pd.DataFrame(columns)


def _users(group: Sequence[LoadLevel]) -> list[int]:
    """Who sent each request of some levels that ran without a break; -1 in open loop."""
    answers = [a for level in group for a in level.answers]
    most = max(level.users or 0 for level in group)
    return lanes([a.sent for a in answers], [a.ended for a in answers], most) if most else [-1] * len(answers)


def _unasked(answers: Sequence[RequestRecord]) -> list[Notice]:
    warnings = []
    if any(a.output_tokens for a in answers) and all(a.max_new_tokens is None for a in answers):
        warnings.append(notice("limits-missing", "max_new_tokens is not recorded; what came back stands in for it"))
    unknown = sum(a.prompt_tokens == 0 for a in answers)
    if 0 < unknown < len(answers):
        warnings.append(
            notice("no-prompt-lengths", f"{unknown} of {len(answers)} requests have no known prompt length")
        )
    return warnings


def _scenario(name: str, levels: Sequence[LoadLevel], description: str) -> Scenario:
    users = [s.users for s in levels if s.users is not None]
    rates = [s.rate for s in levels if s.rate is not None]
    kinds = list({msgspec.json.encode(s.arrivals): s.arrivals for s in levels if s.arrivals is not None}.values())
    return Scenario(
        name=name,
        description=description,
        server=flags_of(DEFAULT)(),
        load=Load(
            users=users or None, rate=None if users else rates, arrivals=kinds[0] if len(kinds) == 1 else "poisson"
        ),
    )

"""One streamed request before the first rung: which optional keys the server accepts, whether it streams and counts
tokens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from time import perf_counter_ns

import gevent

from measure.apis import APIS
from measure.apis.api import Prompt
from measure.apis.openai import CONTINUOUS, FALLBACKS, USAGE
from measure.deadline import Deadline
from measure.ladder.probe import Refused
from measure.loadgen.client import Client, Record, RunClock
from measure.server.detection import PROBE_SECONDS, Server
from measure.server.endpoint import Endpoint
from measure.server.key import api_key
from sim.model.status import Status
from sim.model.warning import Notice, notice

TOKENS = 4  # of the answer
ATTEMPTS = 2  # a server that fails sometimes is still measured


def try_stream(
    endpoint: Endpoint, server: Server, prompt: Prompt, prompt_tokens: int, deadline: Deadline | None = None
) -> tuple[tuple[str, ...], list[Notice]]:
    """The optional keys that an OpenAI-style server accepts, and warnings; `Refused` if it does not answer.

    If a server refuses a key (HTTP 400 or 422), the request is repeated with fewer keys.
    """
    if server.api == "tgi":
        return (), []
    deadline = deadline or Deadline(PROBE_SECONDS, f"{endpoint.url} to stream an answer")
    record = Record(-1, -1, -1, 0.0, 0.0, prompt_tokens, TOKENS)
    for extras in FALLBACKS:
        record = _send(endpoint, server, extras, prompt, prompt_tokens, deadline)
        if record.status != Status.VALIDATION:
            break
    if record.status != Status.OK:
        raise Refused(f"the server does not answer a streamed request: {record.error}")
    return extras, [*_refused_keys(extras), *_missing_counts(record)]


def _send(
    endpoint: Endpoint, server: Server, extras: Sequence[str], prompt: Prompt, prompt_tokens: int, deadline: Deadline
) -> Record:
    now = RunClock(perf_counter_ns()).now
    api = APIS[server.api](server.model, extras)
    for _ in range(ATTEMPTS):
        client = Client(endpoint.url, api, now, patience=deadline.left() + 1.0, token=api_key())
        record = Record(-1, -1, -1, 0.0, 0.0, prompt_tokens, TOKENS)
        with closing(client), gevent.Timeout(deadline.left(), deadline.passed()):
            client.send(record, prompt)
        if record.status in (Status.OK, Status.VALIDATION):
            break
    return record


def _refused_keys(extras: Sequence[str]) -> list[Notice]:
    missing = [key for key in FALLBACKS[0] if key not in extras]
    if not missing or missing == [CONTINUOUS]:
        return []
    more = "; answers may be shorter than requested" if "ignore_eos" in missing else ""
    more += "; the server may not count tokens" if USAGE in missing else ""
    return [notice("parameter-refused", f"the server refuses {', '.join(missing)}: requests are sent without{more}")]


def _missing_counts(record: Record) -> list[Notice]:
    warnings = []
    if not record.token_times:
        warnings.append(
            notice(
                "no-streaming",
                "the server does not stream its answers: TTFT, ITL and TPOT are unknown, and a calibration can only "
                "use latencies",
            )
        )
    if record.generated_tokens is None:
        warnings.append(
            notice(
                "no-token-count",
                "the server does not count the tokens of its answers (usage): "
                + ("an event with text counts as one token" if record.token_times else "their lengths are not known"),
            )
        )
    return warnings

"""One streamed request before the first rung: which of our extra keys the server takes, whether it streams at all, and
whether it counts its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from time import perf_counter_ns

import gevent

from measure.apis.dialect import CONTINUOUS, DIALECTS, FEWER, USAGE, VALIDATION, Prompt
from measure.deadline import Deadline
from measure.ladder.probe import Refused
from measure.loadgen.client import OK, Client, Record, Stopwatch
from measure.server.endpoint import Endpoint
from measure.server.health import PROBE_SECONDS, Server
from measure.server.key import api_key

TOKENS = 4  # of the answer
ATTEMPTS = 2  # a server that fails now and then is still measured


def try_stream(
    endpoint: Endpoint, server: Server, prompt: Prompt, prompt_tokens: int, deadline: Deadline | None = None
) -> tuple[tuple[str, ...], list[str]]:
    """The extra keys to ask an OpenAI-style server with, and warnings; `Refused` where no answer comes.

    A server that refuses a key (HTTP 400 or 422) is asked again with fewer of them.
    """
    if server.api == "tgi":
        return (), []
    deadline = deadline or Deadline(PROBE_SECONDS, f"{endpoint.url} to stream an answer")
    record = Record(-1, -1, -1, 0.0, 0.0, prompt_tokens, TOKENS)
    for extras in FEWER:
        record = _ask(endpoint, server, extras, prompt, prompt_tokens, deadline)
        if record.status != VALIDATION:
            break
    if record.status != OK:
        raise Refused(f"the server does not answer a streamed request: {record.error}")
    return extras, [*_refused(extras), *_uncounted(record)]


def _ask(
    endpoint: Endpoint, server: Server, extras: Sequence[str], prompt: Prompt, prompt_tokens: int, deadline: Deadline
) -> Record:
    now = Stopwatch(perf_counter_ns()).now
    dialect = DIALECTS[server.api](server.model, extras)
    for _ in range(ATTEMPTS):
        client = Client(endpoint.url, dialect, now, patience=deadline.left() + 1.0, token=api_key())
        record = Record(-1, -1, -1, 0.0, 0.0, prompt_tokens, TOKENS)
        with closing(client), gevent.Timeout(deadline.left(), deadline.passed()):
            client.ask(record, prompt)
        if record.status in (OK, VALIDATION):
            break
    return record


def _refused(extras: Sequence[str]) -> list[str]:
    missing = [key for key in FEWER[0] if key not in extras]
    if not missing or missing == [CONTINUOUS]:
        return []
    more = "; answers may end before their length" if "ignore_eos" in missing else ""
    more += "; the server's count of tokens may be missing" if USAGE in missing else ""
    return [f"the server takes no {', '.join(missing)}: it is asked without{more}"]


def _uncounted(record: Record) -> list[str]:
    warnings = []
    if not record.token_times:
        warnings.append(
            "the server does not stream its answers, whatever is asked: TTFT, ITL and TPOT are not known, and a "
            "calibration has only latencies to go by"
        )
    if record.generated_tokens is None:
        warnings.append(
            "the server does not count the tokens of its answers (usage): "
            + ("an event with text is taken for a token" if record.token_times else "their lengths are not known")
        )
    return warnings

"""What `vllm bench serve --save-result --save-detailed` writes, as of 0.32.0; `--append-result` makes a rung of each.

| run | vllm |
|---|---|
| sent | `start_times`, s of `perf_counter` on the client |
| scheduled | with a `request_rate`: sent − `queue_times`, the wait for `max_concurrency`; without: sent |
| token times | sent + `ttfts`, then the sums of `itls`, which are gaps between chunks |
| ended | the last chunk, token or not |
| lengths | `input_lens`, `output_lens`: the server's counts if it gave them, else the client's tokenizer's |
| window | from when the first request was due, for `duration` |

A failed request has neither an end nor tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from scenarios.failures import last_line, status_of_text
from scenarios.results import NOTHING, Answer, Stretch, assemble, has, understood
from sim.errors import BadInput
from sim.request import OK
from sim.run import Run


class _Result(msgspec.Struct):
    duration: float
    start_times: list[float]
    ttfts: list[float]
    itls: list[list[float]]
    input_lens: list[int]
    output_lens: list[int]
    errors: list[str]
    queue_times: list[float] | None = None
    request_rate: float | None = None
    max_concurrency: int | None = None


def speaks(document: Any) -> bool:
    """Whether a JSON document is a result of vLLM's."""
    return has(document, "request_rate", "request_throughput", "num_prompts")


def read(documents: list[Any], path: Path) -> Run:
    """The run of one or more results."""
    stretches = [_stretch(document, path, i + 1) for i, document in enumerate(documents)]
    doubts = []
    if any(s.rate is not None and any(a.due is None for a in s.answers) for s in stretches):
        doubts.append("without queue_times a request's due time is not known: waiting for max_concurrency is left out")
    return assemble(path, "vllm bench serve", stretches, doubts=doubts)


def _stretch(document: Any, path: Path, line: int) -> Stretch:
    for key in ("ttfts", "start_times"):
        if not has(document, key):
            message = "missing; expected what every request did, which --save-detailed of a recent vLLM writes"
            raise BadInput(message, path=path, line=line, key=key)
    result = understood(document, _Result, path, line)
    count = len(result.start_times)
    lists = ("ttfts", "itls", "input_lens", "output_lens", "errors", "queue_times")
    for key in lists:
        values = getattr(result, key)
        if values is not None and len(values) != count:
            message = f"expected {count} values, one for each of start_times, found {len(values)}"
            raise BadInput(message, path=path, line=line, key=key)
    if not count or not result.duration > 0:
        raise BadInput("expected at least one request, and a duration", path=path, line=line, key="start_times")
    rate = result.request_rate if result.request_rate is not None and np.isfinite(result.request_rate) else None
    answers = [_answer(result, i, rate is not None) for i in range(count)]
    doubts = []
    if rate is None and result.max_concurrency is None:
        doubts.append("all requests were sent at once: the window is one burst, with nothing steady in it")
    if rate is not None and result.max_concurrency is not None:
        doubts.append(f"at most {result.max_concurrency} requests were let in at once: not all of an open loop's load")
    failed = sum(a.status != OK for a in answers)
    if failed:
        doubts.append(f"when the {failed} failed requests ended is not recorded; when they were sent stands in for it")
    queued = result.queue_times or [0.0] * count
    began = min(sent - wait for sent, wait in zip(result.start_times, queued, strict=True))
    users = None if rate is not None else result.max_concurrency or count
    end = began + result.duration
    return Stretch(users=users, rate=rate, settled=began, end=end, answers=answers, doubts=doubts)


def _answer(result: _Result, i: int, open_loop: bool) -> Answer:
    sent, error = result.start_times[i], result.errors[i]
    if error or not result.ttfts[i] > 0:
        text = last_line(error)
        return Answer(sent, sent, result.input_lens[i], 0, status_of_text(text), text or None)
    chunks = sent + result.ttfts[i] + np.cumsum([0.0, *result.itls[i]])
    # some endpoints are not streamed at all: one chunk is then the whole answer
    whole = len(chunks) == 1 and result.output_lens[i] > 1
    return Answer(
        sent=sent,
        ended=float(chunks[-1]),
        due=sent - result.queue_times[i] if open_loop and result.queue_times else None,
        prompt_tokens=result.input_lens[i],
        output_tokens=result.output_lens[i],
        last=float(chunks[-1]),
        chunks=NOTHING if whole else chunks,
    )

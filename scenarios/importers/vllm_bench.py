"""What `vllm bench serve --save-result --save-detailed` writes, as of 0.32.0; `--append-result` makes a rung of each.

| run | vllm |
|---|---|
| sent | `start_times`, s of `perf_counter` on the client |
| scheduled | with a `request_rate`: sent − `queue_times`, the wait for `max_concurrency`; without: sent |
| token times | sent + `ttfts`, then the sums of `itls`, which are gaps between chunks |
| ended | the last chunk, token or not |
| lengths | `input_lens`, `output_lens`: the server's counts if it gave them, else the client's tokenizer's |
| window | from when the first request was due, for `duration` |

A failed request has neither an end nor tokens. Files of older versions, and all of sglang's `bench_serving`, which is
of the same origin, have no `start_times`. In a closed loop they follow from the rest: requests wait in their order for
one of `max_concurrency` places, and each takes what its chunks took. At a rate they do not.

Of its own server's streams sglang divides the gap before a chunk of k tokens by k, and writes k of them, all the same
number. They are put together again: what a client saw is one gap.
"""

from __future__ import annotations

import heapq
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from scenarios.importers import observed
from scenarios.importers.failures import last_line, status_of_text
from scenarios.importers.results import INSTANT, Ints, LoadLevel, RequestRecord, assemble, decoded_as, has
from sim.engines.catalog import identity
from sim.model.errors import BadInput
from sim.model.identity import Identity
from sim.model.warning import notice
from sim.run import Run


class _Result(msgspec.Struct):
    duration: float
    ttfts: list[float]
    itls: list[list[float]]
    input_lens: list[int]
    output_lens: list[int]
    errors: list[str] | None = None
    start_times: list[float] | None = None
    queue_times: list[float] | None = None
    request_rate: float | None = None
    burstiness: float = 1.0
    max_concurrency: int | None = None
    ramp_up_strategy: str | None = None
    ramp_up_start_rps: float | None = None
    ramp_up_end_rps: float | None = None


NATIVE = ("tgi", "sglang")  # backends whose API no other server has
SGLANG = "total_output_tokens_retokenized"  # only its bench_serving counts tokens a second time
APART = 1.0  # s between two tests whose clock is not in the file
CHANCE = 3.0  # times as many equal neighbours as any two gaps are equal: they were divided, not rounded
ASTRAY = 0.1  # of the duration: times that were rebuilt and last longer or shorter are not what happened


def recognises(document: Any) -> bool:
    """Whether a JSON document is a result of vLLM's, or of sglang's."""
    return has(document, "request_rate", "request_throughput", "num_prompts") or (
        has(document, "duration", "completed") and has(document, SGLANG)
    )


def read(documents: list[Any], path: Path) -> Run:
    """The run of one or more results."""
    tool = "sglang's bench_serving" if has(documents[0], SGLANG) else "vllm bench serve"
    levels: list[LoadLevel] = []
    began = 0.0
    for line, document in enumerate(documents, 1):
        levels.append(_level(document, path, line, tool, began))
        began = max([levels[-1].end, *(a.ended for a in levels[-1].answers)]) + APART
    warnings = []
    if any(s.rate is not None and any(a.due is None for a in s.answers) for s in levels):
        warnings.append(
            notice(
                "due-times-missing",
                "without queue_times due times are not known: waiting for max_concurrency is left out",
            )
        )
    return assemble(path, tool, levels, warnings=warnings, engine=_engine(documents[0]))


def _engine(document: dict[str, Any]) -> Identity | None:
    """The server's engine: what `--metadata engine=vllm version=0.32.0` wrote, or the one whose own API was asked. The
    backends `vllm` and `openai` are any OpenAI-style server."""
    if isinstance(named := document.get("engine"), str):
        return identity(named, "file", document.get("version"))
    backend = document.get("backend")
    return identity(backend, "file") if isinstance(backend, str) and backend in NATIVE else None


def _level(document: Any, path: Path, line: int, tool: str, began: float) -> LoadLevel:
    if not has(document, "ttfts", "itls"):
        option = "--output-details" if has(document, SGLANG) else "--save-detailed"
        message = f"missing; expected what every request did, which {tool} writes with {option}"
        message += "; -o NAME.yaml makes published figures of the sums"
        raise BadInput(message, path=path, line=line, key="ttfts")
    result = decoded_as(document, _Result, path, line)
    count = len(result.ttfts)
    for key in ("start_times", "itls", "input_lens", "output_lens", "errors", "queue_times"):
        values = getattr(result, key)
        if values is not None and len(values) != count:
            message = f"expected {count} values, one for each of ttfts, found {len(values)}"
            raise BadInput(message, path=path, line=line, key=key)
    if not count or not result.duration > 0:
        raise BadInput("expected at least one request, and a duration", path=path, line=line, key="ttfts")
    rate = result.request_rate if result.request_rate is not None and np.isfinite(result.request_rate) else None
    warnings = []
    divided = has(document, SGLANG) and _divided(result.itls)
    starts = result.start_times
    if starts is None:
        if rate is not None:
            message = f"missing: {tool} did not write when each request was sent, which at a request_rate is not known"
            raise BadInput(message, path=path, line=line, key="start_times")
        starts = _rebuilt(result, began, path, line)
        warnings.append(
            notice(
                "sends-rebuilt", "when each request was sent is not in the file: rebuilt from their order and durations"
            )
        )
    queued = result.queue_times or [0.0] * count
    settled = min(sent - wait for sent, wait in zip(starts, queued, strict=True))
    spread = float(max(starts) - min(starts)) > observed.BURST * result.duration
    ramp = result.ramp_up_strategy
    open_loop = rate is not None or ramp is not None or (result.max_concurrency is None and spread)
    if ramp is not None:
        start, end = result.ramp_up_start_rps, result.ramp_up_end_rps
        bounds = f", from {start:g} to {end:g} requests/s" if start and end else ""
        warnings.append(
            notice("rate-changed", f"the rate went up ({ramp}{bounds}): a trace, which is replayed as it was recorded")
        )
    if not open_loop and result.max_concurrency is None:
        warnings.append(
            notice("burst", "all requests were sent at once: the window is one burst, with nothing steady in it")
        )
    if open_loop and result.max_concurrency is not None:
        warnings.append(
            notice(
                "load-capped",
                f"at most {result.max_concurrency} requests were let in at once: not all of the open loop's load",
            )
        )
    return LoadLevel(
        users=None if open_loop else result.max_concurrency,
        rate=rate,
        open_loop=open_loop,
        arrivals=observed.gamma_arrivals(result.burstiness) if rate is not None and result.burstiness > 0 else None,
        settled=settled,
        end=settled + result.duration + INSTANT,
        answers=[_answer(result, starts, i, rate is not None, divided) for i in range(count)],
        warnings=warnings,
    )


def _rebuilt(result: _Result, began: float, path: Path, line: int) -> list[float]:
    """When each request was sent: when the earliest of the places before it became free."""
    free = [began] * min(result.max_concurrency or len(result.ttfts), len(result.ttfts))
    starts = []
    for ttft, gaps in zip(result.ttfts, result.itls, strict=True):
        starts.append(heapq.heappop(free))
        heapq.heappush(free, starts[-1] + ttft + sum(gaps))
    lasted = max(free) - began
    if abs(lasted / result.duration - 1) > ASTRAY:
        message = (
            f"missing, and cannot be rebuilt: by its requests the test took {lasted:.3g} s, by its duration "
            f"{result.duration:.3g} s (requests failed, or were not streamed)"
        )
        raise BadInput(message, path=path, line=line, key="start_times")
    return starts


def _divided(itls: list[list[float]]) -> bool:
    """Whether gaps between chunks of several tokens were divided by them.

    Two clock readings hardly ever lie as far apart as the two before, so that equal neighbours come from one gap;
    unless all gaps were rounded: then any two of them are as likely to be equal.
    """
    gaps = np.concatenate([np.asarray(each, dtype=np.float64) for each in itls]) if itls else np.empty(0)
    neighbours = np.concatenate([np.diff(each) == 0.0 for each in itls]) if itls else np.empty(0)
    if not neighbours.any():
        return False
    _, counts = np.unique(gaps, return_counts=True)
    return bool(neighbours.mean() > CHANCE * float(((counts / len(gaps)) ** 2).sum()))


def _joined(gaps: list[float], tokens: int) -> tuple[list[float], Ints | None]:
    """Gaps that were divided by the tokens of their chunk as they were, and the tokens of each chunk, the first's too;
    None where they are not those of `tokens`."""
    each = np.asarray(gaps, dtype=np.float64)
    begins = np.flatnonzero(np.concatenate([[True], np.diff(each) != 0.0])) if len(each) else np.empty(0, np.int64)
    sizes = np.diff(np.append(begins, len(each)))
    first = tokens - len(each)
    whole = [float(gap) for gap in each[begins] * sizes]
    return whole, np.concatenate([[first], sizes]).astype(np.int64) if first > 0 else None


def _answer(result: _Result, starts: list[float], i: int, due: bool, divided: bool) -> RequestRecord:
    sent, error = starts[i], result.errors[i] if result.errors is not None else ""
    if error or not result.ttfts[i] > 0:
        text = last_line(error)
        return RequestRecord(sent, sent, result.input_lens[i], 0, status_of_text(text), text or None, end_known=False)
    gaps, carried = _joined(result.itls[i], result.output_lens[i]) if divided else (result.itls[i], None)
    chunks = sent + result.ttfts[i] + np.cumsum([0.0, *gaps])
    return RequestRecord(
        sent=sent,
        ended=float(chunks[-1]),
        due=sent - result.queue_times[i] if due and result.queue_times else None,
        prompt_tokens=result.input_lens[i],
        output_tokens=result.output_lens[i],
        last=float(chunks[-1]),
        chunks=chunks,
        carried=carried,
    )

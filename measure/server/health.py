"""Before the first request: what kind of server answers, whether it is well, and whether it can take the profile."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from measure.apis.dialect import EXTRAS
from measure.apis.refusal import REDIRECTS, clean
from measure.deadline import Deadline, OutOfTime
from measure.loadgen.prompts import tokenizer_file
from measure.server.endpoint import Answer, Endpoint, Unreachable, decoded, rows, table
from sim.engines.catalog import identity, of_info, of_owner
from sim.engines.tgi_0_9_4 import Flags
from sim.model.errors import UserError
from sim.model.identity import Identity, is_engine
from sim.model.scenario import Scenario
from sim.model.server import EngineFlags
from sim.model.workload import Lengths, RequestLengths

PROBE_SECONDS = 120.0
FITTING = ("max_batch_total_tokens", "max_input_length", "max_total_tokens")
# what is most telling about why nothing answered as wanted, first to last; other statuses come after these
TELLING = (401, 407, *REDIRECTS, 503, 429, 502, 504, 403)
# the longest prompt and answer together in `/v1/models`: of vLLM and SGLang, OpenRouter, Groq, Mistral and LM Studio
CONTEXT = ("max_model_len", "context_length", "context_window", "max_context_length")
LIMITS = {  # of TGI's `/info`, under its names in 0.9.4: what later versions call them
    "max_input_length": ("max_input_length", "max_input_tokens"),
    "max_total_tokens": ("max_total_tokens",),
    "max_batch_prefill_tokens": ("max_batch_prefill_tokens",),
    "max_batch_total_tokens": ("max_batch_total_tokens",),
}


class Unfit(UserError):
    """The server cannot take what the scenario asks, and which flag to change."""


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """What answers at the URL: its `api` (see `dialect`), `GET /info` if it has one, whether it has `/metrics`, and
    which of `dialect.EXTRAS` it takes.

    `limits` are the lengths that an OpenAI-style server tells, tokens, by its own names; `warnings` what it
    could not be asked.
    """

    api: str
    info: dict[str, Any] | None = None
    metrics: bool = False
    model: str | None = None
    extras: tuple[str, ...] = EXTRAS
    limits: dict[str, int] = {}
    warnings: list[str] = []
    engine: Identity | None = None


def look(endpoint: Endpoint, model: str | None = None, deadline: Deadline | None = None) -> Server:
    """Find out what answers: TGI by its `/info`, anything else by trying the two OpenAI styles.

    Raises `Unreachable` with the cause where nothing does, `OutOfTime` when the deadline passes first.
    """
    deadline = deadline or Deadline(PROBE_SECONDS, f"{endpoint.url} to say what it is")
    answers = {"/info": endpoint.get("/info", deadline)}
    info = decoded(answers["/info"].body)
    if answers["/info"].status == 200 and "model_id" in info:
        return _tgi(endpoint, info, deadline)
    answers["/v1/models"] = endpoint.get("/v1/models", deadline)
    if answers["/v1/models"].status == 401:
        raise _nothing(endpoint, answers)
    offered = [table(m) for m in rows(decoded(answers["/v1/models"].body).get("data"))]
    names = [m["id"] for m in offered if isinstance(m.get("id"), str)]
    if model is None or (tokenizer_file(model) is not None and model not in names):
        model = next(iter(names), None)
    limits = _limits_of_model(endpoint, next((m for m in offered if m.get("id") == model), {}), deadline)
    ask: dict[str, Any] = {"max_tokens": 1, "temperature": 0} | ({} if model is None else {"model": model})
    for api, path, prompt in (
        ("completions", "/v1/completions", {"prompt": [1000, 1001]}),
        ("chat", "/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
    ):
        answer = answers[path] = endpoint.post(path, ask | prompt, deadline)
        if answer.status == 200 and "choices" in decoded(answer.body):
            return Server(api=api, model=model, limits=limits, engine=_engine(endpoint, offered, deadline))
    raise _nothing(endpoint, answers)


def _tgi(endpoint: Endpoint, info: dict[str, Any], deadline: Deadline) -> Server:
    healthy = endpoint.get("/health", deadline)
    if healthy.status != 200:
        said = endpoint.explain("/health", healthy)
        raise Unreachable(f"{endpoint.url}: the server says it is unhealthy: /health answers {said}")
    warnings, metrics = [], False
    try:
        told = endpoint.get("/metrics", deadline)
        metrics = told.status == 200 and b"tgi_" in told.body
    except (Unreachable, OutOfTime) as e:
        if not deadline.left():
            raise
        warnings = [f"what the server measures of itself is not known: {e}"]
    model = clean(str(info["model_id"]))
    return Server(api="tgi", info=info, metrics=metrics, model=model, warnings=warnings, engine=of_info(info))


def _limits_of_model(endpoint: Endpoint, model: dict[str, Any], deadline: Deadline) -> dict[str, int]:
    """What an OpenAI-style server tells of the lengths it takes."""
    limits = {name: model[name] for name in CONTEXT if _length(model.get(name))}
    if model.get("owned_by") == "llamacpp":
        n_ctx = table(decoded(endpoint.get("/props", deadline).body).get("default_generation_settings")).get("n_ctx")
        if _length(n_ctx):
            limits["n_ctx"] = n_ctx
    return limits


def _length(found: Any) -> bool:
    return isinstance(found, int) and not isinstance(found, bool) and 0 < found < 2**53


def _nothing(endpoint: Endpoint, answers: dict[str, Answer]) -> Unreachable:
    """Nothing answered as TGI or an OpenAI-style server would: the most telling answer, then what was tried."""
    asked = {path: a for path, a in answers.items() if path.endswith("/completions")}
    models = answers.get("/v1/models")
    order = {status: rank for rank, status in enumerate(TELLING)}

    def telling(answer: Answer) -> int:
        if answer.status in (400, 422) and models is not None and models.status == 200:
            return -1  # a server that lists models and refuses ours says why
        return order.get(answer.status, len(order) + (answer.status in (404, 405)))

    path, answer = min((asked | answers).items(), key=lambda item: telling(item[1]))
    tried = ", ".join(f"{path} {a.status}" for path, a in answers.items())
    return Unreachable(
        f"{endpoint.url}: neither TGI nor an OpenAI-style server answers: {path}: {endpoint.explain(path, answer)} "
        f"(asked: {tried})"
    )


def _engine(endpoint: Endpoint, models: list[dict[str, Any]], deadline: Deadline) -> Identity | None:
    """The engine of an OpenAI-style server, where the models that it offers say who owns them."""
    owners = [str(m.get("owned_by")) for m in models]
    name = next((engine for owner in owners if (engine := of_owner(owner)) is not None), None)
    if name is None:
        return None
    version = decoded(endpoint.get("/version", deadline).body).get("version") if name == "vllm" else None
    return identity(name, "server", version if isinstance(version, str) else None)


def alive(endpoint: Endpoint) -> bool:
    """Whether the server still answers at all; never asked inside a window that goes well."""
    try:
        return endpoint.get("/health").status < 500
    except Unreachable:
        return False


def extent(lengths: int | Lengths | None, column: Any = None) -> tuple[int, int | None]:
    """The least and the greatest number of tokens that may be asked; no greatest where the law has none."""
    if column is not None:
        return int(column.min()), int(column.max())
    if isinstance(lengths, int):
        return lengths, lengths
    if lengths is not None and lengths.uniform is not None:
        return lengths.uniform
    law = None if lengths is None else lengths.lognormal or lengths.exponential
    return (1, None) if law is None else (law.low, law.high)


def _check_fits(info: dict[str, Any], server: EngineFlags, prompt: int | None, asked: int | None) -> None:
    """Raise `CannotFit` where one of our requests would stop a server for good (mended in TGI 2.0): none is risked.

    `/info` does not tell the prefill budget: it is the scenario's.
    """
    known = {name: info[name] for name in FITTING if isinstance(info.get(name), int)}
    flags = msgspec.structs.replace(server if isinstance(server, Flags) else Flags(), **known)
    if not isinstance(flags.max_batch_total_tokens, int) or asked is None:
        return
    longest = min(prompt or flags.max_input_length, flags.max_input_length)
    flags.check_fits(longest, min(asked, flags.max_total_tokens - longest))


def _check_limits(server: Server, prompt: tuple[int, int | None], total: tuple[int, int | None]) -> Iterable[str]:
    """Hold the lengths that may be asked, from the least to the greatest, against those that the server told."""
    warnings = []
    limits = dict(server.limits)
    for name, called in LIMITS.items():
        for found in ((server.info or {}).get(key) for key in called):
            if found is not None and _length(found):
                limits[name] = found
    for name, limit in limits.items():
        alone = name in ("max_input_length", "max_batch_prefill_tokens")
        (least, most), what = (prompt, "prompts") if alone else (total, "prompts and answers together")
        if server.api == "tgi":
            if least > limit:
                flag = f"--{name.replace('_', '-')}"
                raise Unfit(
                    f"the server's {name} is {limit}, the scenario's {what} take {least}: start it with {flag} {least}"
                )
            if "batch" in name and most is not None and most > limit:
                warnings.append(f"{what} may exceed the server's {name} {limit}; such requests may never be scheduled")
            elif "batch" not in name and (most is None or most > limit):
                warnings.append(f"{what} may exceed the server's {name} {limit}; such requests end as validation")
        elif max(least, most or 0) > limit:
            raise Unfit(
                f"the server's {name} is {limit}, the scenario's {what} take up to {most or least}: such answers would "
                f"be cut short, or refused; raise it (vLLM: --max-model-len {most or least}), or shorten the lengths"
            )
        elif most is None:
            warnings.append(f"{what} may exceed the server's {name} {limit}; such answers are cut short, or refused")
    return warnings


def check(server: Server, scenario: Scenario, lengths: RequestLengths | None = None) -> list[str]:
    """Warnings about measuring this scenario on this server; raises `Unfit` if no request of it can succeed,
    and `CannotFit` if one could never be scheduled."""
    info, warnings = server.info or {}, [*server.warnings, *(lengths.warnings if lengths is not None else ())]
    work = scenario.workload
    new = work.max_new_tokens if work.max_new_tokens is not None else work.output_tokens
    prompt = extent(work.prompt_tokens, None if lengths is None else lengths.prompt_tokens)
    asked = extent(new, None if lengths is None else lengths.max_new_tokens)
    total = (prompt[0] + asked[0], None if prompt[1] is None or asked[1] is None else prompt[1] + asked[1])
    if lengths is not None:
        total = extent(None, lengths.prompt_tokens + lengths.max_new_tokens)
    warnings += _check_limits(server, prompt, total)
    if str(info.get("version", "")).startswith(("0.9.", "1.")):
        _check_fits(info, scenario.server, prompt[1], asked[1])
    ours = is_engine(server.engine, scenario.server.declared)
    for name in scenario.server.declared.told if ours else ():
        said, wanted = info.get(name), getattr(scenario.server, name)
        if (
            isinstance(said, int | float)
            and isinstance(wanted, int | float)
            and abs(said - wanted) > 1e-6 * abs(wanted)
        ):
            warnings.append(f"the server's {name} is {said:g}, the scenario says {wanted:g}; the server's holds")
    permits = info.get("max_concurrent_requests")
    if isinstance(permits, int) and max(scenario.load.users or [0]) > permits:
        warnings.append(
            f"the ladder goes to {max(scenario.load.users or [0])} users, the server takes {permits} at a time"
        )
    return warnings

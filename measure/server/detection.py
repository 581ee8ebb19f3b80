"""Detects what kind of server answers at a URL: its API, engine, model and limits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import msgspec

from measure.apis.http_error import REDIRECTS, clean
from measure.apis.openai import EXTRAS
from measure.deadline import Deadline, OutOfTime
from measure.loadgen.prompts import tokenizer_file
from measure.server.endpoint import Answer, Endpoint, Unreachable, decoded, rows, table
from sim.engines.catalog import identity, of_info, of_owner
from sim.model.identity import Identity
from sim.model.warning import Notice, notice

PROBE_SECONDS = 120.0
# HTTP statuses that explain best why no API was detected, the best first; all others come after these
TELLING = (401, 407, *REDIRECTS, 503, 429, 502, 504, 403)
CACHE_CONFIG, LABEL = "vllm:cache_config_info{", re.compile(r'(\w+)="([^"]*)"')
# names of the context length in `/v1/models`: vLLM and SGLang, OpenRouter, Groq, Mistral and LM Studio
CONTEXT = ("max_model_len", "context_length", "context_window", "max_context_length")


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """The server at a URL: its `api` (a key of `apis.APIS`), what it tells of itself (`/info`), whether it has
    `/metrics`, and which of `openai.EXTRAS` it accepts.

    `limits` are the lengths that an OpenAI-style server tells, tokens, by its own names; `warnings` what could not be
    detected.
    """

    api: str
    info: dict[str, Any] | None = None
    metrics: bool = False
    model: str | None = None
    extras: tuple[str, ...] = EXTRAS
    limits: dict[str, int] = {}
    warnings: list[Notice] = []
    engine: Identity | None = None


def detect(endpoint: Endpoint, model: str | None = None, deadline: Deadline | None = None) -> Server:
    """Detect the server: TGI by its `/info`, any other by trying the two OpenAI-style APIs.

    Raises `Unreachable` with the cause if none works, `OutOfTime` if the deadline passes first.
    """
    deadline = deadline or Deadline(PROBE_SECONDS, f"{endpoint.url} to say what it is")
    answers = {"/info": endpoint.get("/info", deadline)}
    info = decoded(answers["/info"].body)
    if answers["/info"].status == 200 and "model_id" in info:
        return _tgi(endpoint, info, deadline)
    answers["/v1/models"] = endpoint.get("/v1/models", deadline)
    if answers["/v1/models"].status == 401:
        raise _undetected(endpoint, answers)
    offered = [table(m) for m in rows(decoded(answers["/v1/models"].body).get("data"))]
    names = [m["id"] for m in offered if isinstance(m.get("id"), str)]
    if model is None or (tokenizer_file(model) is not None and model not in names):
        model = next(iter(names), None)
    limits = _context_limits(endpoint, next((m for m in offered if m.get("id") == model), {}), deadline)
    body: dict[str, Any] = {"max_tokens": 1, "temperature": 0} | ({} if model is None else {"model": model})
    for api, path, prompt in (
        ("completions", "/v1/completions", {"prompt": [1000, 1001]}),
        ("chat", "/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
    ):
        answer = answers[path] = endpoint.post(path, body | prompt, deadline)
        if answer.status == 200 and "choices" in decoded(answer.body):
            engine = _engine(endpoint, offered, deadline)
            if engine is None or engine.name != "vllm":
                return Server(api=api, model=model, limits=limits, engine=engine)
            exposition = _vllm_metrics(endpoint, deadline)
            told, scraped = _vllm_info(exposition, limits, engine), "\nvllm:" in exposition
            return Server(api=api, info=told, metrics=scraped, model=model, limits=limits, engine=engine)
    raise _undetected(endpoint, answers)


def _tgi(endpoint: Endpoint, info: dict[str, Any], deadline: Deadline) -> Server:
    healthy = endpoint.get("/health", deadline)
    if healthy.status != 200:
        reason = endpoint.explain("/health", healthy)
        raise Unreachable(f"{endpoint.url}: the server is unhealthy: /health answers {reason}")
    warnings, metrics = [], False
    try:
        told = endpoint.get("/metrics", deadline)
        metrics = told.status == 200 and b"tgi_" in told.body
    except (Unreachable, OutOfTime) as e:
        if not deadline.left():
            raise
        warnings = [notice("no-metrics", f"the server's metrics cannot be read: {e}")]
    model = clean(str(info["model_id"]))
    return Server(api="tgi", info=info, metrics=metrics, model=model, warnings=warnings, engine=of_info(info))


def _context_limits(endpoint: Endpoint, model: dict[str, Any], deadline: Deadline) -> dict[str, int]:
    """The limits on lengths that an OpenAI-style server tells."""
    limits = {name: model[name] for name in CONTEXT if is_length(model.get(name))}
    if model.get("owned_by") == "llamacpp":
        n_ctx = table(decoded(endpoint.get("/props", deadline).body).get("default_generation_settings")).get("n_ctx")
        if is_length(n_ctx):
            limits["n_ctx"] = n_ctx
    return limits


def _vllm_metrics(endpoint: Endpoint, deadline: Deadline) -> str:
    """What vLLM writes at `/metrics`; nothing where it does not."""
    try:
        return endpoint.get("/metrics", deadline).body.decode("utf-8", "replace")
    except Unreachable:
        return ""


def _vllm_info(exposition: str, limits: dict[str, int], engine: Identity) -> dict[str, Any] | None:
    """The flags that vLLM tells, having no `/info`: its version, the labels of `vllm:cache_config_info` (which are
    Python's own texts), and max_model_len."""
    line = next((line for line in exposition.splitlines() if line.startswith(CACHE_CONFIG)), "")
    version: dict[str, Any] = {} if engine.version is None else {"version": engine.version}
    return (version | vllm_told(dict(LABEL.findall(line))) | limits) or None


def vllm_told(labels: Mapping[str, Any]) -> dict[str, Any]:
    """The flags among the labels of `vllm:cache_config_info`."""
    told: dict[str, Any] = {}
    for name in ("num_gpu_blocks", "block_size"):
        value = str(labels.get(name, ""))
        if value.isdecimal() and is_length(int(value)):
            told[name] = int(value)
    if (cached := labels.get("enable_prefix_caching")) in ("True", "False"):
        told["enable_prefix_caching"] = cached == "True"
    with suppress(KeyError, TypeError, ValueError):
        told["gpu_memory_utilization"] = float(labels["gpu_memory_utilization"])
    return told


def is_length(found: Any) -> bool:
    """Whether a JSON value can be a number of tokens."""
    return isinstance(found, int) and not isinstance(found, bool) and 0 < found < 2**53


def _undetected(endpoint: Endpoint, answers: dict[str, Answer]) -> Unreachable:
    """The error if no API was detected: the answer that explains most, then every request that was tried."""
    tried_apis = {path: a for path, a in answers.items() if path.endswith("/completions")}
    models = answers.get("/v1/models")
    order = {status: rank for rank, status in enumerate(TELLING)}

    def telling(answer: Answer) -> int:
        if answer.status in (400, 422) and models is not None and models.status == 200:
            return -1  # a server that lists models and refuses the probe says why
        return order.get(answer.status, len(order) + (answer.status in (404, 405)))

    path, answer = min((tried_apis | answers).items(), key=lambda item: telling(item[1]))
    tried = ", ".join(f"{path} {a.status}" for path, a in answers.items())
    return Unreachable(
        f"{endpoint.url}: no TGI and no OpenAI-style API found: {path}: {endpoint.explain(path, answer)} "
        f"(tried: {tried})"
    )


def _engine(endpoint: Endpoint, models: list[dict[str, Any]], deadline: Deadline) -> Identity | None:
    """The engine of an OpenAI-style server, from `owned_by` of its models; None if unknown."""
    owners = [str(m.get("owned_by")) for m in models]
    name = next((engine for owner in owners if (engine := of_owner(owner)) is not None), None)
    if name is None:
        return None
    version = decoded(endpoint.get("/version", deadline).body).get("version") if name == "vllm" else None
    return identity(name, "server", version if isinstance(version, str) else None)


def is_alive(endpoint: Endpoint) -> bool:
    """Whether the server still answers `/health`."""
    try:
        return endpoint.get("/health").status < 500
    except Unreachable:
        return False

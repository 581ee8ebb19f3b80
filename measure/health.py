"""Before the first request: what kind of server answers, whether it is well, and whether it can take the profile."""

from __future__ import annotations

from typing import Any

import msgspec

from measure.dialect import EXTRAS
from measure.endpoint import Endpoint, Unreachable, decoded
from measure.prompts import tokenizer_file
from sim.errors import UserError
from sim.run import TOLD
from sim.scenario import Scenario
from sim.server import ServerConfig
from sim.workload import Lengths, Pairs

PROBE_SECONDS = 120.0
FITTING = ("max_batch_total_tokens", "max_input_length", "max_total_tokens")


class Unfit(UserError):
    """The server cannot take what the scenario asks, and which flag to change."""


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """What answers at the URL: its `api` (see `dialect`), `GET /info` if it has one, whether it has `/metrics`, and
    which of `dialect.EXTRAS` it takes."""

    api: str
    info: dict[str, Any] | None = None
    metrics: bool = False
    model: str | None = None
    extras: tuple[str, ...] = EXTRAS


def look(endpoint: Endpoint, model: str | None = None) -> Server:
    """Find out what answers: TGI by its `/info`, anything else by trying the two OpenAI styles."""
    status, body = endpoint.get("/info")
    info = decoded(body)
    metrics, exposition = endpoint.get("/metrics")
    if status == 200 and "model_id" in info:
        healthy, _ = endpoint.get("/health")
        if healthy != 200:
            raise Unreachable(f"{endpoint.url}: the server says it is unhealthy (/health answers {healthy})")
        return Server(api="tgi", info=info, metrics=metrics == 200 and b"tgi_" in exposition, model=info["model_id"])
    status, body = endpoint.get("/v1/models")
    if status == 401:
        raise Unreachable(f"{endpoint.url}: the server wants a token; put it into SERVECAST_API_KEY")
    offered = [m.get("id") for m in decoded(body).get("data") or [] if isinstance(m, dict)]
    if model is None or (tokenizer_file(model) is not None and model not in offered):
        model = next((m for m in offered if m), None)
    ask: dict[str, Any] = {"max_tokens": 1, "temperature": 0} | ({} if model is None else {"model": model})
    tried = []
    for api, path, prompt in (
        ("completions", "/v1/completions", {"prompt": [1000, 1001]}),
        ("chat", "/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
    ):
        status, body = endpoint.post(path, ask | prompt, PROBE_SECONDS)
        if status == 200 and "choices" in decoded(body):
            return Server(api=api, model=model, metrics=False)
        tried.append(f"{path} {status}")
    raise Unreachable(f"{endpoint.url}: neither TGI (/info) nor OpenAI style ({', '.join(tried)}) answers")


def alive(endpoint: Endpoint) -> bool:
    """Whether the server still answers at all; never asked inside a window that goes well."""
    try:
        status, _ = endpoint.get("/health")
    except Unreachable:
        return False
    return status < 500


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


def _check_fits(info: dict[str, Any], flags: ServerConfig, prompt: int | None, asked: int | None) -> None:
    """Raise `CannotFit` where one of our requests would stop a server for good (mended in TGI 2.0): none is risked.

    `/info` does not tell the prefill budget: it is the scenario's.
    """
    known = {name: info[name] for name in FITTING if isinstance(info.get(name), int)}
    flags = msgspec.structs.replace(flags, **known)
    if not isinstance(flags.max_batch_total_tokens, int) or asked is None:
        return
    longest = min(prompt or flags.max_input_length, flags.max_input_length)
    flags.check_fits(longest, min(asked, flags.max_total_tokens - longest))


def check(server: Server, scenario: Scenario, pairs: Pairs | None = None) -> list[str]:
    """Doubts about measuring this scenario on this server; raises `Unfit` if no request of it can succeed,
    and `CannotFit` if one could never be scheduled."""
    info, doubts = server.info or {}, list(pairs.doubts if pairs is not None else ())
    work = scenario.workload
    new = work.max_new_tokens if work.max_new_tokens is not None else work.output_tokens
    prompt = extent(work.prompt_tokens, None if pairs is None else pairs.prompt_tokens)
    asked = extent(new, None if pairs is None else pairs.max_new_tokens)
    total = (prompt[0] + asked[0], None if prompt[1] is None or asked[1] is None else prompt[1] + asked[1])
    for name, (least, most), what in (
        ("max_input_length", prompt, "prompts"),
        ("max_total_tokens", total, "prompts and answers together"),
    ):
        limit = info.get(name)
        if not isinstance(limit, int):
            continue
        flag = f"--{name.replace('_', '-')}"
        if least > limit:
            raise Unfit(
                f"the server's {name} is {limit}, the scenario's {what} take {least}: start it with {flag} {least}"
            )
        if most is None or most > limit:
            doubts.append(f"{what} may exceed the server's {name} {limit}; such requests end as validation")
    if str(info.get("version", "")).startswith(("0.9.", "1.")):
        _check_fits(info, scenario.server, prompt[1], asked[1])
    for name in TOLD:
        said, wanted = info.get(name), getattr(scenario.server, name)
        if (
            isinstance(said, int | float)
            and isinstance(wanted, int | float)
            and abs(said - wanted) > 1e-6 * abs(wanted)
        ):
            doubts.append(f"the server's {name} is {said:g}, the scenario says {wanted:g}; the server's holds")
    permits = info.get("max_concurrent_requests")
    if isinstance(permits, int) and max(scenario.load.users or [0]) > permits:
        doubts.append(
            f"the ladder goes to {max(scenario.load.users or [0])} users, the server takes {permits} at a time"
        )
    if server.api == "tgi" and not str(info.get("version", "")).startswith("0.9.4"):
        doubts.append(f"the server is TGI {info.get('version')}, the simulated one 0.9.4")
    return doubts

"""The requests that TGI 0.9.4 refuses, in its order and with its messages (router/src/validation.rs)."""

from __future__ import annotations

from typing import Any

import msgspec

from sim.engines.tgi_0_9_4 import Flags

MAX_BEST_OF, MAX_STOP_SEQUENCES = 2, 4  # the launcher's defaults


class Parameters(msgspec.Struct):
    """The parameters that matter here; others are ignored, as by the router."""

    best_of: int | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    do_sample: bool = False
    max_new_tokens: int = 20
    stop: list[str] = []
    truncate: int | None = None
    details: bool = False
    decoder_input_details: bool = False
    seed: int | None = None


class Body(msgspec.Struct):
    """A request for a generation; `stream` only matters on `/`."""

    inputs: str
    parameters: Parameters = msgspec.field(default_factory=Parameters)
    stream: bool = False


class Refused(Exception):
    """A request that ends at once: the HTTP status where the answer is no stream, TGI's `error_type` and text."""

    def __init__(self, status: int, error_type: str, error: str):
        super().__init__(error)
        self.status, self.body = status, {"error": error, "error_type": error_type}
        self.error_type = error_type


def invalid(text: str) -> Refused:
    """A 422."""
    return Refused(422, "validation", f"Input validation error: {text}")


def overloaded() -> Refused:
    """A 429."""
    return Refused(429, "overloaded", "Model is overloaded")


def prompt_length(body: Body, server: Flags, streamed: bool) -> int:
    """Check a request; returns its `input_length`: one token for each word, and one for the beginning.

    Raises `Refused`.
    """
    p = body.parameters
    best_of = 1 if p.best_of in (None, 0) else p.best_of
    sampling = p.do_sample or any(x is not None for x in (p.temperature, p.top_k, p.top_p, p.typical_p))
    if streamed and best_of != 1:
        raise invalid("`best_of` != 1 is not supported when streaming tokens")
    if best_of > 1 and not sampling:
        raise invalid("you must use sampling when `best_of` is > 1")
    _check_sampling(p)
    if p.max_new_tokens == 0:
        raise invalid("`max_new_tokens` must be strictly positive")
    if len(p.stop) > MAX_STOP_SEQUENCES:
        raise invalid(f"`stop` supports up to {MAX_STOP_SEQUENCES} stop sequences. Given: {len(p.stop)}")
    if best_of > 1 and p.seed is not None:
        raise invalid("`seed` must not be set when `best_of` > 1")
    if not body.inputs:
        raise invalid("`inputs` cannot be empty")
    if p.truncate is not None and not 1 <= p.truncate <= server.max_input_length:
        raise invalid(
            f"`truncate` must be strictly positive and less than {server.max_input_length}. Given: {p.truncate}"
        )
    tokens = len(body.inputs.split()) + 1
    if p.truncate is not None:
        tokens = min(tokens, p.truncate)
    if tokens + p.max_new_tokens > server.max_total_tokens:
        raise invalid(
            f"`inputs` tokens + `max_new_tokens` must be <= {server.max_total_tokens}. "
            f"Given: {tokens} `inputs` tokens and {p.max_new_tokens} `max_new_tokens`"
        )
    if tokens > server.max_input_length:
        raise invalid(f"`inputs` must have less than {server.max_input_length} tokens. Given: {tokens}")
    return tokens


def _check_sampling(p: Parameters) -> None:
    positive: dict[str, Any] = {
        "temperature": p.temperature,
        "repetition_penalty": p.repetition_penalty,
        "top_k": p.top_k,
    }
    for name in ("temperature", "repetition_penalty"):
        if positive[name] is not None and positive[name] <= 0:
            raise invalid(f"`{name}` must be strictly positive")
    for name, share in (("top_p", p.top_p), ("typical_p", p.typical_p)):
        if share is not None and not 0 < share < 1:  # 1.0 itself is refused, whatever the schema says
            raise invalid(f"`{name}` must be > 0.0 and < 1.0")
    if p.top_k is not None and p.top_k <= 0:
        raise invalid("`top_k` must be strictly positive")

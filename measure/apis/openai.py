"""The OpenAI-style APIs of vLLM, llama.cpp, SGLang and later TGIs: `/v1/completions` and `/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec

from measure.apis import failure
from measure.apis.api import DONE, NOTHING, TOKEN, ParsedEvent, Prompt
from measure.apis.sse import Event
from measure.apis.tokens import CLOSING, EMPTY, NONE, OPENING, OUTPUT

NOT_OUTPUT = ("role", "id", "name", "type", "object")  # keys of a delta
FINISH_REASONS = {"length": "length", "stop": "eos_token"}  # no stop sequences are sent: `stop` is the model's own end
USAGE, CONTINUOUS = "stream_options", "continuous_usage_stats"
# Optional keys: token counts at the end of a stream, and in every event; answers as long as requested; no prompt cache.
# vLLM and llama.cpp apply these, most other servers ignore them.
EXTRAS = (USAGE, CONTINUOUS, "ignore_eos", "cache_prompt")
# Tried in turn on a server that refuses some keys: the length of answers matters most, token counts next.
FALLBACKS = (EXTRAS, (USAGE, "ignore_eos", "cache_prompt"), ("ignore_eos", "cache_prompt"), (USAGE,), ())


class _Usage(msgspec.Struct):
    completion_tokens: Any = None
    prompt_tokens: Any = None


class _Choice(msgspec.Struct):
    """A choice of a stream or of a whole answer. Servers put output beside `content` under many names (`reasoning`,
    `reasoning_content`, `refusal`, `tool_calls`, `function_call`, ...): any of them is output."""

    text: str | None = None
    delta: dict[str, Any] | None = None
    finish_reason: str | None = None
    usage: _Usage | None = None

    @property
    def kind(self) -> int:
        """The kind of its event (see `tokens`)."""
        delta = self.delta or {}
        if self.text or any(value and name not in NOT_OUTPUT for name, value in delta.items()):
            return OUTPUT
        if self.finish_reason is not None:
            return CLOSING
        return OPENING if "role" in delta else EMPTY


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


class Completions:
    """`/v1/completions`. The prompt is sent as token ids, so no tokenizer can change its length."""

    path = "/v1/completions"

    def __init__(self, model: str | None = None, extras: Collection[str] = EXTRAS):
        self._model = model
        self._extras = extras
        self._decoder = msgspec.json.Decoder(_Chunk)

    def request_body(self, prompt: Prompt, prompt_tokens: int, max_new_tokens: int) -> bytes:
        """See `Api.request_body`."""
        return self._encode({"prompt": prompt}, max_new_tokens)

    def parse_event(self, event: Event) -> ParsedEvent:
        """See `Api.parse_event`."""
        data = event.data
        if event.type == b"error":
            return failure.from_event(data)
        if data.strip() == b"[DONE]":
            return DONE
        chunk = self._decoder.decode(data)
        if chunk.error:
            return failure.from_error(chunk.error, None)
        if chunk.choices is None and chunk.usage is None:
            return failure.from_body(data, NOTHING)
        return _parsed(chunk)

    def parse_answer(self, body: bytes) -> ParsedEvent:
        """See `Api.parse_answer`."""
        chunk = self._decoder.decode(body)
        if chunk.error or not chunk.choices:
            return failure.from_body(body)
        return _parsed(chunk)._replace(kind=NONE)

    def _encode(self, prompt: dict[str, Any], max_new_tokens: int) -> bytes:
        body: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": 0, "stream": True}
        if USAGE in self._extras:
            body[USAGE] = {"include_usage": True}
            if CONTINUOUS in self._extras:
                body[USAGE][CONTINUOUS] = True
        if "ignore_eos" in self._extras:
            body["ignore_eos"] = True
        if "cache_prompt" in self._extras:
            body["cache_prompt"] = False
        if self._model is not None:
            body["model"] = self._model
        return msgspec.json.encode(body | prompt)


class Chat(Completions):
    """`/v1/chat/completions`; the server's chat template adds tokens to the prompt."""

    path = "/v1/chat/completions"

    def request_body(self, prompt: Prompt, prompt_tokens: int, max_new_tokens: int) -> bytes:
        """See `Api.request_body`."""
        return self._encode({"messages": [{"role": "user", "content": prompt}]}, max_new_tokens)


def _parsed(chunk: _Chunk) -> ParsedEvent:
    kind, reason, usage = NONE, None, chunk.usage
    for choice in chunk.choices or []:
        kind = choice.kind if kind == NONE else min(kind, choice.kind)
        reason = choice.finish_reason or reason
        usage = usage or choice.usage
    if reason is None and usage is None and kind == OUTPUT:
        return TOKEN
    reason = FINISH_REASONS.get(reason or "", reason)
    if usage is None:
        return ParsedEvent(kind, reason)
    return ParsedEvent(kind, reason, _count(usage.completion_tokens), _count(usage.prompt_tokens))


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else None

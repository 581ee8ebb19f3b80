"""How each kind of server is asked, and what one event of its stream says.

`tgi` is text-generation-inference's own `/generate_stream`; `completions` and `chat` are the OpenAI style that vLLM,
llama.cpp and later TGIs speak. Everything here is bytes and values: no sockets, no clock.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import msgspec

OVERLOADED, VALIDATION, GENERATION, INCOMPLETE = "overloaded", "validation", "generation", "incomplete"
ERROR_TYPES = {
    "overloaded": OVERLOADED,
    "validation": VALIDATION,
    "generation": GENERATION,
    "incomplete_generation": INCOMPLETE,
}


class Heard(NamedTuple):
    """What one event says. `tokens` and `prompt_tokens` are the server's own counts, where it gives them."""

    token: bool = False
    finish_reason: str | None = None
    tokens: int | None = None
    prompt_tokens: int | None = None
    status: str | None = None  # of a failure
    error: str | None = None


TOKEN = Heard(token=True)
NOTHING = Heard()
Prompt = str | list[int]


class Dialect(Protocol):
    """One way of asking for a streamed answer."""

    path: str

    def body(self, prompt: Prompt, prompt_tokens: int, max_new_tokens: int) -> bytes:
        """The JSON of a request for a greedy answer of at most `max_new_tokens`."""

    def hear(self, data: bytes) -> Heard:
        """One event's data; `msgspec.DecodeError` when it is not what this dialect sends."""


ABSENT = msgspec.Raw()


class _Details(msgspec.Struct):
    finish_reason: str | None = None
    generated_tokens: int | None = None


class _TgiEvent(msgspec.Struct):
    token: msgspec.Raw = ABSENT
    details: _Details | None = None
    error: Any = None
    error_type: str | None = None


class Tgi:
    """`/generate_stream`: one event is one token, whatever its text; errors come in HTTP 200 (`tgi-0.9.4.md` §1)."""

    path = "/generate_stream"

    def __init__(self, model: str | None = None):
        self._decoder = msgspec.json.Decoder(_TgiEvent)

    def body(self, prompt: Prompt, prompt_tokens: int, max_new_tokens: int) -> bytes:
        """`truncate` makes the server cut the text to exactly `prompt_tokens`, whatever its tokenizer."""
        parameters = {"max_new_tokens": max_new_tokens, "truncate": prompt_tokens, "details": True}
        return msgspec.json.encode({"inputs": prompt, "parameters": parameters})

    def hear(self, data: bytes) -> Heard:
        """See `Dialect.hear`."""
        event = self._decoder.decode(data)
        if event.error is not None:
            return failure(event.error, event.error_type)
        if event.details is None:
            return TOKEN if event.token is not ABSENT else NOTHING
        return Heard(event.token is not ABSENT, event.details.finish_reason, event.details.generated_tokens)


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int | None = None
    prompt_tokens: int | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


FINISH = {"length": "length", "stop": "eos_token"}  # no stop sequences are sent, so `stop` is the model's own end


class Completions:
    """`/v1/completions`; the prompt goes as token ids, whose number no tokenizer can change."""

    path = "/v1/completions"

    def __init__(self, model: str | None = None):
        self._model = model
        self._decoder = msgspec.json.Decoder(_Chunk)

    def body(self, prompt: Prompt, prompt_tokens: int, max_new_tokens: int) -> bytes:
        """See `Dialect.body`."""
        return self._encode({"prompt": prompt}, max_new_tokens)

    def hear(self, data: bytes) -> Heard:
        """A chunk with text is taken for one token; `usage`, where it comes, is what really was one."""
        if data.strip() == b"[DONE]":
            return NOTHING
        chunk = self._decoder.decode(data)
        if chunk.error is not None:
            return failure(chunk.error, None)
        token, reason = False, None
        for choice in chunk.choices:
            delta = choice.delta
            token = bool(choice.text or (delta is not None and (delta.content or delta.reasoning_content)))
            reason = choice.finish_reason
        if token and reason is None and chunk.usage is None:
            return TOKEN
        usage = chunk.usage or _Usage()
        return Heard(token, FINISH.get(reason or "", reason), usage.completion_tokens, usage.prompt_tokens)

    def _encode(self, asked: dict[str, Any], max_new_tokens: int) -> bytes:
        body = {
            "max_tokens": max_new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,  # vLLM and llama.cpp heed it, others ignore it: what came back is counted anyway
            "cache_prompt": False,
        }
        if self._model is not None:
            body["model"] = self._model
        return msgspec.json.encode(body | asked)


class Chat(Completions):
    """`/v1/chat/completions`; the server's template adds tokens of its own to the prompt."""

    path = "/v1/chat/completions"

    def body(self, prompt: Prompt, prompt_tokens: int, max_new_tokens: int) -> bytes:
        """See `Dialect.body`."""
        return self._encode({"messages": [{"role": "user", "content": prompt}]}, max_new_tokens)


DIALECTS: dict[str, type[Tgi] | type[Completions]] = {"tgi": Tgi, "completions": Completions, "chat": Chat}


def failure(error: Any, error_type: str | None) -> Heard:
    """An error object, TGI's (`error`, `error_type`) or OpenAI's (`error.message`, `error.type`, `error.code`)."""
    if isinstance(error, dict):
        code = error.get("code")
        kind = ERROR_TYPES.get(str(error.get("type")), "")
        status = kind or (status_of(code) if isinstance(code, int) else GENERATION)
        return Heard(status=status, error=str(error.get("message", error)))
    return Heard(status=ERROR_TYPES.get(error_type or "", GENERATION), error=str(error))


def status_of(code: int) -> str:
    """What an HTTP status other than 200 means for the request (`tgi-0.9.4.md` §1.4)."""
    if code in (429, 503):
        return OVERLOADED
    return GENERATION if code == 424 or code >= 500 else VALIDATION


def refusal(code: int, body: bytes) -> Heard:
    """An answer that is not a stream: JSON of either style or, as axum writes them, plain text."""
    try:
        said = msgspec.json.decode(body)
    except msgspec.DecodeError:
        said = None
    text = body[:200].decode("utf-8", "replace").strip()
    if isinstance(said, dict) and said.get("error") is not None:
        error = said["error"]
        text = str(error.get("message", error)) if isinstance(error, dict) else str(error)
        known = ERROR_TYPES.get(str(said.get("error_type")))
        if known is not None:
            return Heard(status=known, error=text)
    return Heard(status=status_of(code), error=f"HTTP {code}: {text}" if text else f"HTTP {code}")

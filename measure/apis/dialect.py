"""How each kind of server is asked, and what one event of its stream says.

`tgi` is text-generation-inference's own `/generate_stream`; `completions` and `chat` are the OpenAI style that vLLM,
llama.cpp and later TGIs speak. Everything here is bytes and values: no sockets, no clock.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, Protocol

import msgspec

from measure.apis.refusal import clean, explain
from measure.apis.sse import Event
from measure.apis.tokens import CLOSING, EMPTY, NONE, OPENING, OUTPUT

OVERLOADED, VALIDATION, GENERATION, INCOMPLETE = "overloaded", "validation", "generation", "incomplete"
ERROR_TYPES = {
    "overloaded": OVERLOADED,
    "validation": VALIDATION,
    "generation": GENERATION,
    "incomplete_generation": INCOMPLETE,
}


class Heard(NamedTuple):
    """What one event says: what `kind` it is (`tokens`); `tokens` and `prompt_tokens` are the server's own counts,
    where it gives them; `done` where nothing follows."""

    kind: int = NONE
    finish_reason: str | None = None
    tokens: int | None = None
    prompt_tokens: int | None = None
    status: str | None = None  # of a failure
    error: str | None = None
    done: bool = False


TOKEN = Heard(OUTPUT)
NOTHING = Heard()
DONE = Heard(done=True)
Prompt = str | list[int]


class Dialect(Protocol):
    """One way of asking for a streamed answer."""

    path: str

    def body(self, prompt: Prompt, prompt_tokens: int, max_new_tokens: int) -> bytes:
        """The JSON of a request for a greedy answer of at most `max_new_tokens`."""

    def hear(self, event: Event) -> Heard:
        """What one event says; `msgspec.DecodeError` when it is not what this dialect sends."""

    def whole(self, body: bytes) -> Heard:
        """What an answer says that was not streamed; `msgspec.DecodeError` when it is not what this dialect sends."""


ABSENT = msgspec.Raw()


class _Details(msgspec.Struct):
    finish_reason: str | None = None
    generated_tokens: int | None = None


class _TgiAnswer(msgspec.Struct):
    generated_text: str | None = None
    details: _Details | None = None


class _TgiEvent(msgspec.Struct):
    token: msgspec.Raw = ABSENT
    details: _Details | None = None
    error: Any = None
    error_type: str | None = None


class Tgi:
    """`/generate_stream`: one event is one token, whatever its text; errors come in HTTP 200 (router/src/server.rs)."""

    path = "/generate_stream"

    def __init__(self, model: str | None = None, extras: Collection[str] = ()):
        self._decoder = msgspec.json.Decoder(_TgiEvent)

    def body(self, prompt: Prompt, prompt_tokens: int, max_new_tokens: int) -> bytes:
        """`truncate` makes the server cut the text to exactly `prompt_tokens`, whatever its tokenizer."""
        parameters = {"max_new_tokens": max_new_tokens, "truncate": prompt_tokens, "details": True}
        return msgspec.json.encode({"inputs": prompt, "parameters": parameters})

    def hear(self, event: Event) -> Heard:
        """See `Dialect.hear`."""
        if event.type == b"error":
            return error_event(event.data)
        said = self._decoder.decode(event.data)
        if said.error is not None:
            return failure(said.error, said.error_type)
        if said.details is None:
            return TOKEN if said.token is not ABSENT else NOTHING
        kind = OUTPUT if said.token is not ABSENT else NONE
        return Heard(kind, said.details.finish_reason, said.details.generated_tokens)

    def whole(self, body: bytes) -> Heard:
        """See `Dialect.whole`."""
        said = msgspec.json.decode(body, type=_TgiAnswer | list[_TgiAnswer])
        if isinstance(said, list):
            said = said[0] if said else _TgiAnswer()
        if said.generated_text is None:
            return failed(body)
        details = said.details or _Details()
        return Heard(NONE, details.finish_reason, details.generated_tokens)


class _Usage(msgspec.Struct):
    completion_tokens: Any = None
    prompt_tokens: Any = None


class _Choice(msgspec.Struct):
    """Of a stream, or of a whole answer. What servers put beside `content` has many names (`reasoning`,
    `reasoning_content`, `refusal`, `tool_calls`, `function_call`, ...): any of them is output."""

    text: str | None = None
    delta: dict[str, Any] | None = None
    finish_reason: str | None = None
    usage: _Usage | None = None

    @property
    def kind(self) -> int:
        """What the choice is, of `tokens`' kinds."""
        delta = self.delta or {}
        if self.text or any(value and name not in NO_OUTPUT for name, value in delta.items()):
            return OUTPUT
        if self.finish_reason is not None:
            return CLOSING
        return OPENING if "role" in delta else EMPTY


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


NO_OUTPUT = ("role", "id", "name", "type", "object")  # of a delta
FINISH = {"length": "length", "stop": "eos_token"}  # no stop sequences are sent, so `stop` is the model's own end
USAGE, CONTINUOUS = "stream_options", "continuous_usage_stats"
# What is asked for beside what every server takes: the count of tokens at the end of a stream, and in every event; that
# answers do not end early, and that no prompt is remembered. vLLM and llama.cpp heed these, others ignore them.
EXTRAS = (USAGE, CONTINUOUS, "ignore_eos", "cache_prompt")
# What to try in turn on a server that refuses some of them: the length of answers first, the count of tokens next.
FEWER = (EXTRAS, (USAGE, "ignore_eos", "cache_prompt"), ("ignore_eos", "cache_prompt"), (USAGE,), ())


class Completions:
    """`/v1/completions`; the prompt goes as token ids, whose number no tokenizer can change. `extras` are those of
    `EXTRAS` that the server takes."""

    path = "/v1/completions"

    def __init__(self, model: str | None = None, extras: Collection[str] = EXTRAS):
        self._model = model
        self._extras = extras
        self._decoder = msgspec.json.Decoder(_Chunk)

    def body(self, prompt: Prompt, prompt_tokens: int, max_new_tokens: int) -> bytes:
        """See `Dialect.body`."""
        return self._encode({"prompt": prompt}, max_new_tokens)

    def hear(self, event: Event) -> Heard:
        """See `Dialect.hear`."""
        data = event.data
        if event.type == b"error":
            return error_event(data)
        if data.strip() == b"[DONE]":
            return DONE
        chunk = self._decoder.decode(data)
        if chunk.error:
            return failure(chunk.error, None)
        if chunk.choices is None and chunk.usage is None:
            return failed(data, NOTHING)
        return _heard(chunk)

    def whole(self, body: bytes) -> Heard:
        """See `Dialect.whole`."""
        chunk = self._decoder.decode(body)
        if chunk.error or not chunk.choices:
            return failed(body)
        return _heard(chunk)._replace(kind=NONE)

    def _encode(self, asked: dict[str, Any], max_new_tokens: int) -> bytes:
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
        return msgspec.json.encode(body | asked)


def _heard(chunk: _Chunk) -> Heard:
    kind, reason, usage = NONE, None, chunk.usage
    for choice in chunk.choices or []:
        kind = choice.kind if kind == NONE else min(kind, choice.kind)
        reason = choice.finish_reason or reason
        usage = usage or choice.usage
    if reason is None and usage is None and kind == OUTPUT:
        return TOKEN
    if usage is None:
        return Heard(kind, FINISH.get(reason or "", reason))
    return Heard(kind, FINISH.get(reason or "", reason), _count(usage.completion_tokens), _count(usage.prompt_tokens))


def _count(said: Any) -> int | None:
    return said if isinstance(said, int) and not isinstance(said, bool) and 0 <= said < 2**53 else None


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
        code = str(error.get("code"))
        kind = ERROR_TYPES.get(str(error.get("type")), "")
        status = kind or (status_of(int(code)) if code.isdecimal() and len(code) == 3 else GENERATION)
        return Heard(status=status, error=clean(str(error.get("message") or error.get("detail") or error)))
    return Heard(status=ERROR_TYPES.get(error_type or "", GENERATION), error=clean(str(error)))


def failed(body: bytes, otherwise: Heard | None = None) -> Heard:
    """What a body or event without an answer says of its failure: `error` in any shape, or the object itself, as vLLM
    and FastAPI write it (`message`, `detail`). `otherwise` is what it means where it speaks of no failure."""
    said = msgspec.json.decode(body)
    if isinstance(said, dict):
        if said.get("error"):
            error_type = said.get("error_type")
            return failure(said["error"], error_type if isinstance(error_type, str) else None)
        if said.get("object") == "error" or said.get("message") or said.get("detail"):
            return failure(said, None)
    text = clean(body[:1000].decode("utf-8", "replace"))
    return otherwise or Heard(status=INCOMPLETE, error=f"an answer without a choice: {text}")


def error_event(data: bytes) -> Heard:
    """An event whose type says that it is an error, whatever its data."""
    text = clean(data[:1000].decode("utf-8", "replace"))
    otherwise = Heard(status=GENERATION, error=text or "an error without a word")
    try:
        return failed(data, otherwise)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return otherwise


def status_of(code: int) -> str:
    """What an HTTP status other than 200 means for the request (router/src/server.rs:797-825)."""
    if code in (429, 503):
        return OVERLOADED
    return GENERATION if code == 424 or code >= 500 else VALIDATION


def refusal(code: int, body: bytes, headers: Mapping[str, str] = {}, url: str = "") -> Heard:
    """An answer that is not a stream, as what became of the request; its text is `refusal.explain`'s."""
    try:
        said = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        said = None
    known = ERROR_TYPES.get(str(said.get("error_type"))) if isinstance(said, dict) and said.get("error") else None
    return Heard(status=known or status_of(code), error=explain(code, headers, body, url))

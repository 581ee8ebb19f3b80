"""The requests that vLLM refuses, and the prompts of those it accepts (vllm/entrypoints/openai, version 0.32.0)."""

from __future__ import annotations

from typing import Any
from zlib import crc32

import msgspec

from measure.standin.answer import word
from sim.engines.vllm_v1_flags import Flags
from sim.model.request import Text

VOCABULARY = 32_000  # token ids, as many as Llama 2 has
BEGIN, TURN, END_OF_TURN = 1, 2, 3  # of a text; before the role of a message, and after the message
_RESERVED = 4


class Refused(Exception):
    """A request that is refused: its HTTP status and the body of the answer."""

    def __init__(self, status: int, kind: str, message: str, param: str | None = None):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}


def bad_request(message: str, param: str | None = None) -> Refused:
    """HTTP 400."""
    return Refused(400, "BadRequestError", message, param)


class StreamOptions(msgspec.Struct):
    """What a stream says of its usage."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Body(msgspec.Struct):
    """The keys that both APIs have and that matter here; others are ignored."""

    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    priority: int = 0


class Completion(Body):
    """A request to `/v1/completions`."""

    prompt: Any = None


class Message(msgspec.Struct):
    """A message of a chat; its content is a text, or a list of parts with one each."""

    role: str
    content: Any = ""


class ChatCompletion(Body):
    """A request to `/v1/chat/completions`."""

    messages: list[Message] = []
    max_completion_tokens: int | None = None


def prompts(body: Completion) -> list[list[int]]:
    """The token ids of each prompt: texts or lists of token ids, one or several."""
    given = body.prompt
    if given in (None, "", []) or (isinstance(given, list) and any(part in ("", []) for part in given)):
        raise bad_request("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    if isinstance(given, str):
        return [tokens_of_text(given)]
    if isinstance(given, list):
        if all(isinstance(part, str) for part in given):
            return [tokens_of_text(part) for part in given]
        several = given if isinstance(given[0], list) else [given]
        if all(isinstance(ids, list) and all(type(i) is int for i in ids) for ids in several):
            for i in (i for ids in several for i in ids):
                if not 0 <= i < VOCABULARY:
                    raise bad_request(f"Token id {i} is out of vocabulary", "prompt")
            return several
    raise bad_request("prompt must be a string, array of strings, array of tokens, or array of token arrays", "prompt")


def chat_prompt(body: ChatCompletion) -> list[int]:
    """The token ids of a chat: of each message a marker, its role, its words and an end; then the assistant's turn."""
    ids = [BEGIN]
    for message in body.messages:
        content = message.content
        if isinstance(content, list):
            content = " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
        ids += [TURN, token_of(message.role), *map(token_of, str(content or "").split()), END_OF_TURN]
    return [*ids, TURN, token_of("assistant")]


def tokens_of_text(text: str) -> list[int]:
    """The token ids of a text: one for the beginning, and one for each word."""
    return [BEGIN, *map(token_of, text.split())]


def token_of(word: str) -> int:
    """The token id of a word."""
    return _RESERVED + crc32(word.encode()) % (VOCABULARY - _RESERVED)


def check(body: Body, model: str, flags: Flags) -> None:
    """Raise `Refused` for parameters that vLLM does not accept, and for those that this server does not simulate."""
    if body.model not in (None, model):
        raise Refused(404, "NotFoundError", f"The model `{body.model}` does not exist.", "model")
    if body.stream_options is not None and not body.stream:
        raise bad_request("Stream options can only be defined when `stream=True`.", "stream_options")
    if body.temperature is not None and body.temperature < 0:
        raise bad_request(f"temperature must be non-negative, got {body.temperature}.", "temperature")
    if body.top_p is not None and not 0 < body.top_p <= 1:
        raise bad_request(f"top_p must be in (0, 1], got {body.top_p}.", "top_p")
    if body.n != 1:
        raise bad_request(f"n must be 1 on this stand-in, got {body.n}.", "n")
    if body.max_tokens is not None and body.max_tokens > flags.max_model_len:
        raise bad_request(
            f"max_tokens={body.max_tokens} cannot be greater than max_model_len={flags.max_model_len}.", "max_tokens"
        )


def max_tokens(body: Body, prompt_tokens: int, default: int | None, flags: Flags) -> int:
    """The most tokens of an answer: as requested, silently cut to the room left; `default` None is all of that."""
    asked = default if body.max_tokens is None else body.max_tokens
    room = flags.max_model_len - prompt_tokens
    if room < 0:
        raise bad_request(
            f"This model's maximum context length is {flags.max_model_len} tokens. However, your request has at least "
            f"{flags.max_model_len + 1} input tokens. Please reduce the length of the input messages.",
            "input_tokens",
        )
    limit = room if asked is None else min(asked, room)
    if limit < 1:
        raise bad_request(f"max_tokens must be at least 1, got {limit}.", "max_tokens")
    if not 0 <= body.min_tokens <= limit:
        raise bad_request(
            f"min_tokens must be less than or equal to max_tokens={limit}, got {body.min_tokens}.", "min_tokens"
        )
    return limit


def first_word(ids: list[int]) -> int:
    """The number of the first word of the answer to a prompt: the same prompt has the same answer."""
    return crc32(msgspec.msgpack.encode(ids))


def names(ids: list[int], answer_tokens: int, flags: Flags) -> Text:
    """What identifies the blocks of a prompt and its answer: texts are shared as far as all their tokens agree."""
    size, start = flags.block_size, first_word(ids)
    whole = [*ids, *(token_of(word(start + i).strip()) for i in range(answer_tokens))]
    text, name = [], 0
    for end in range(size, len(whole) + 1, size):
        name = hash((name, *whole[end - size : end]))
        text.append((end, name))
    return (*text, (0, object()))

"""The requests that vLLM refuses, in its words, and the prompts of those it accepts.

Of version 0.32.0: entrypoints/openai/*/protocol.py, renderers/params.py, sampling_params.py, and for what cannot be
decoded entrypoints/serve/exception_handling/handlers/validation.py. tests/samples/vllm-0.32.0 has answers of the real
server.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Any
from zlib import crc32

import msgspec

from measure.standin.answer import word
from sim.engines.vllm_v1 import Flags
from sim.model.request import Text

VOCABULARY = 32_000  # token ids, as many as Llama 2 has
BEGIN, TURN, END_OF_TURN = 1, 2, 3  # of a text; before the role of a message, and after the message
_RESERVED = 4
GREEDY = 1e-5  # temperatures below it (sampling_params.py:_SAMPLING_EPS)
MOST_N = 16384  # VLLM_MAX_N_SEQUENCES (envs.py)
BUSY = {  # exceptions.py
    "max_num_queued_reqs": "The engine is currently busy and cannot accept new requests.",
    "max_num_queued_tokens": "The engine has reached its prefill token backlog limit.",
}


class Refused(Exception):
    """A request that is refused: its HTTP status and the body of the answer."""

    def __init__(self, status: int, kind: str, message: str, param: str | None = None):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}


def bad_request(message: str, param: str | None = None, value: Any = None) -> Refused:
    """HTTP 400; the message of one about a parameter ends with its name, and its value if that is told."""
    if param is not None:
        message += f" (parameter={param}{'' if value is None else f', value={value}'})"
    return Refused(400, "BadRequestError", message, param)


def undecodable(message: str, param: str | None) -> Refused:
    """HTTP 400 for a body that is not of the form; `param` begins with `body`. Only the message is not vLLM's own."""
    said = message if param is None else str({"loc": param, "msg": message})
    return Refused(400, HTTPStatus.BAD_REQUEST.phrase, f"1 validation error:\n  {said}", param)


def busy(reason: str) -> Refused:
    """HTTP 503: too much is queued."""
    message = f"{BUSY[reason]} Please try again later or on a different instance."
    return Refused(503, HTTPStatus.SERVICE_UNAVAILABLE.phrase, message)


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
    stream_interval: Annotated[int, msgspec.Meta(ge=1)] | None = None
    use_beam_search: bool = False


class Completion(Body):
    """A request to `/v1/completions`."""

    prompt: Any = None


class Message(msgspec.Struct):
    """A message of a chat; its content is a text, or a list of parts with one each."""

    role: str
    content: Any = ""


class ChatCompletion(Body):
    """A request to `/v1/chat/completions`."""

    messages: list[Message] | None = None
    max_completion_tokens: int | None = None


def prompts(body: Completion) -> list[list[int]]:
    """The token ids of each prompt: texts or lists of token ids, one or several."""
    given = body.prompt
    if given is None or given == "":
        raise bad_request("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    if given == []:
        raise bad_request("You must pass at least one prompt")
    if isinstance(given, str):
        return [tokens_of_text(given)]
    if isinstance(given, list):
        if any(part in ("", []) for part in given):
            raise bad_request("The decoder prompt cannot be empty")
        if all(isinstance(part, str) for part in given):
            return [tokens_of_text(part) for part in given]
        several = given if isinstance(given[0], list) else [given]
        if all(isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids) for ids in several):
            for i in (i for ids in several for i in ids):
                if i >= VOCABULARY:
                    raise bad_request(f"Token id {i} is out of vocabulary")
            return several
    raise undecodable("Input should be a text, token ids, or a list of either", "body.prompt")


def chat_prompt(body: ChatCompletion) -> list[int]:
    """The token ids of a chat: of each message a marker, its role, its words and an end; then the assistant's turn."""
    ids = [BEGIN]
    for message in body.messages or ():
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
    """Raise `Refused` for parameters that vLLM does not accept whatever the prompt is, and for those that this server
    does not simulate; `best_of` is ignored, as vLLM ignores it."""
    if body.stream_options is not None and not body.stream:
        raise bad_request("Stream options can only be defined when `stream=True`.", "stream_options")
    if body.use_beam_search:
        raise bad_request(
            "Streaming is not currently supported with beam search"
            if body.stream and isinstance(body, Completion)
            else "Beam search is not simulated by this stand-in."
        )
    if body.model not in (None, model):
        message = f"The model `{body.model}` does not exist. Valid aliases: {model}."
        raise Refused(404, "NotFoundError", message, "model")
    name = "max_tokens"
    if isinstance(body, ChatCompletion) and body.max_completion_tokens is not None:
        name, body.max_tokens = "max_completion_tokens", body.max_completion_tokens
    if body.max_tokens is not None and body.max_tokens > flags.max_model_len:
        raise bad_request(
            f"{name}={body.max_tokens} cannot be greater than max_model_len={flags.max_model_len}. Please request "
            "fewer output tokens.",
            name,
            body.max_tokens,
        )


def check_length(ids: list[int], answer_tokens: int, flags: Flags) -> None:
    """Raise `Refused` for a prompt that the model has no room for, in versions that do not cut answers also together
    with the `answer_tokens` that are requested (renderers/params.py of 0.32.0, and of 0.25.1)."""
    most, found = flags.max_model_len, len(ids)
    if not flags.cuts and found + answer_tokens > most:
        least = "at least " if found + answer_tokens == most + 1 else ""
        raise bad_request(
            f"This model's maximum context length is {most} tokens. However, you requested {answer_tokens} output "
            f"tokens and your prompt contains {least}{found} input tokens, for a total of {least}"
            f"{found + answer_tokens} tokens. Please reduce the length of the input prompt or the number of requested "
            "output tokens.",
            "input_tokens",
            found,
        )
    if found > most:
        raise bad_request(
            f"This model's maximum context length is {most} tokens. However, your prompt contains "
            f"{'at least ' if found == most + 1 else ''}{found} input tokens, which exceeds this limit even without "
            "any output tokens. Please reduce the length of the input prompt.",
            "input_tokens",
            found,
        )


def max_tokens(body: Body, prompt_tokens: int, default: int | None, flags: Flags) -> int:
    """The most tokens of an answer: as requested, silently cut to the room left; `default` None is all of that.

    Raises `Refused` for parameters of sampling that vLLM does not accept.
    """
    asked = default if body.max_tokens is None else body.max_tokens
    room = flags.max_model_len - prompt_tokens
    limit = room if asked is None else min(asked, room)
    temperature, top_p = body.temperature, body.top_p
    if body.n < 1:
        raise bad_request(f"n must be at least 1, got {body.n}.")
    if body.n > MOST_N:
        raise bad_request(
            f"n must be at most {MOST_N}, got {body.n}. To increase this limit, set the VLLM_MAX_N_SEQUENCES "
            "environment variable."
        )
    if temperature is not None and temperature < 0:
        raise bad_request(f"temperature must be non-negative, got {temperature}.", "temperature", temperature)
    if temperature is not None and temperature > 2:
        raise bad_request(f"temperature must be in [0, 2], got {temperature}.", "temperature", temperature)
    if top_p is not None and not 0 < top_p <= 1:
        raise bad_request(f"top_p must be in (0, 1], got {top_p}.", "top_p", top_p)
    if limit < 1:
        raise bad_request(f"max_tokens must be at least 1, got {limit}.", "max_tokens", limit)
    if body.min_tokens < 0:
        raise bad_request(f"min_tokens must be greater than or equal to 0, got {body.min_tokens}.")
    if body.min_tokens > limit:
        raise bad_request(f"min_tokens must be less than or equal to max_tokens={limit}, got {body.min_tokens}.")
    if body.n > 1 and temperature is not None and temperature < GREEDY:
        raise bad_request(f"n must be 1 when using greedy sampling, got {body.n}.")
    return limit


def first_word(ids: list[int]) -> int:
    """The number of the first word of the answer to a prompt: the same prompt has the same answer."""
    return crc32(msgspec.msgpack.encode(ids))


def names(ids: list[int], start: int, answer_tokens: int, flags: Flags) -> Text:
    """What identifies the blocks of a prompt and its answer, whose first word has the number `start`: texts are shared
    as far as all their tokens agree."""
    size = flags.block_size
    whole = [*ids, *(token_of(word(start + i).strip()) for i in range(answer_tokens))]
    text, name = [], 0
    for end in range(size, len(whole) + 1, size):
        name = hash((name, *whole[end - size : end]))
        text.append((end, name))
    return (*text, (0, object()))

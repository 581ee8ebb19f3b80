"""Events of a stream, and whole answers, as vLLM writes them (vllm/entrypoints/openai/*/serving.py)."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from measure.standin.answer import Answer, chunk, word
from measure.standin.vllm.validation import Refused, StreamOptions

DONE = b"data: [DONE]\n\n"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "total_tokens": total, "completion_tokens": completion_tokens}


def finish_reason(answer: Answer) -> str:
    """Why an answer ended."""
    return "length" if answer.request.output_tokens == answer.request.max_new_tokens else "stop"


class VllmEvents:
    """See `answer.Events`; one object for each request, whose answers (one for each prompt) have an `index`.

    With `interval` k, an event carries the first token, every k-th from there, and the last (`--stream-interval`).
    """

    def __init__(self, model: str, chat: bool, options: StreamOptions | None, interval: int = 1, crlf: bool = False):
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.answers: list[Answer] = []  # by index
        self._model, self._chat, self._options = model, chat, options or StreamOptions()
        self._interval, self._end = interval, b"\r\n" if crlf else b"\n"
        self._created = int(time.time())
        self._begun: dict[Answer, int] = {}  # tokens that events have carried

    def token(self, answer: Answer, last: bool) -> bytes:
        """See `answer.Events.token`."""
        sent = len(answer.sent)
        if not last and sent % self._interval:
            return b""
        carried = self._begun.get(answer)
        self._begun[answer] = sent + 1
        text = "".join(word(answer.first_word + i) for i in range(carried or 0, sent + 1))
        end: dict[str, Any] = {"finish_reason": finish_reason(answer) if last else None, "stop_reason": None}
        index = self.answers.index(answer)
        prompt_tokens = answer.request.prompt_tokens
        if not self._chat:
            choice = {"index": index, "text": text, "logprobs": None, **end}
            return self._chunk(choice, usage(prompt_tokens, sent + 1))
        first = b""
        if carried is None:
            role: dict[str, Any] = {
                "index": index,
                "delta": {"role": "assistant", "content": ""},
                "finish_reason": None,
            }
            first = self._chunk({**role, "logprobs": None}, usage(prompt_tokens, 0))
        choice = {"index": index, "delta": {"content": text}, "logprobs": None, **end}
        return first + self._chunk(choice, usage(prompt_tokens, sent + 1))

    def failure(self) -> Refused:
        """See `answer.Events.failure`."""
        return Refused(500, "InternalServerError", "EngineCore encountered an issue (injected).")

    def closing(self) -> bytes:
        """What follows the last token: the usage if it was requested, and the end."""
        body = b""
        if self._options.include_usage:
            prompt = sum(answer.request.prompt_tokens for answer in self.answers)
            tokens = sum(len(answer.sent) for answer in self.answers)
            body = self._event({**self._head(), "choices": [], "usage": usage(prompt, tokens)})
        return body + DONE.replace(b"\n", self._end)

    def error(self, refused: Refused) -> bytes:
        """An error in the middle of a stream, and the end."""
        return self._event(refused.body) + DONE.replace(b"\n", self._end)

    def whole(self) -> dict[str, Any]:
        """The answer to a request without streaming."""
        choices = []
        for index, answer in enumerate(self.answers):
            end = {"logprobs": None, "finish_reason": finish_reason(answer), "stop_reason": None}
            message = {"role": "assistant", "content": answer.text}
            output: dict[str, Any] = {"message": message} if self._chat else {"text": answer.text}
            choices.append({"index": index, **output, **end})
        prompt = sum(answer.request.prompt_tokens for answer in self.answers)
        tokens = sum(len(answer.sent) for answer in self.answers)
        return {**self._head(whole=True), "choices": choices, "usage": usage(prompt, tokens)}

    def _head(self, whole: bool = False) -> dict[str, Any]:
        kind = "text_completion" if not self._chat else "chat.completion" if whole else "chat.completion.chunk"
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(self, choice: dict[str, Any], counts: dict[str, int]) -> bytes:
        event = {**self._head(), "choices": [choice]}
        if self._options.continuous_usage_stats:
            event["usage"] = counts
        elif not self._chat:  # of a chat, keys without a value are left out
            event["usage"] = None
        return chunk(self._event(event))

    def _event(self, event: dict[str, Any]) -> bytes:
        return b"data: " + json.dumps(event, separators=(",", ":")).encode() + self._end * 2

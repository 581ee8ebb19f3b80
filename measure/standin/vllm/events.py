"""Events of a stream, and whole answers, as vLLM writes them (vllm/entrypoints/openai/*/serving.py)."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any
from zlib import crc32

from measure.standin.answer import Answer, chunk, word
from measure.standin.vllm.validation import Refused, StreamOptions

DONE = b"data: [DONE]\n\n"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """Token counts."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "total_tokens": total, "completion_tokens": completion_tokens}


def finish_reason(answer: Answer) -> str:
    """Why an answer ended."""
    return "length" if answer.request.output_tokens == answer.request.max_new_tokens else "stop"


class VllmEvents:
    """See `answer.Events`; one object for each request, whose answers (`n` for each prompt) have an `index`.

    With `interval` k, an event carries the first token, every k-th from there, and the last (`--stream-interval`).
    Keys that are always null are those of version 0.32.0 (tests/samples/vllm-0.32.0).
    """

    def __init__(
        self,
        model: str,
        chat: bool,
        options: StreamOptions | None,
        n: int = 1,
        *,
        version: str,
        name: str | None = None,
        interval: int = 1,
        crlf: bool = False,
    ):
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{name or uuid.uuid4().hex[:16]}"
        self.answers: list[Answer] = []  # by index
        self._fingerprint = f"vllm-{version}-{crc32(model.encode()):08x}"
        self._n = n
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
        index, reason = self.answers.index(answer), finish_reason(answer) if last else None
        counts = usage(answer.request.prompt_tokens, sent + 1)
        choice: dict[str, Any] = {"index": index}
        if not self._chat:
            choice |= {"text": text, "logprobs": None, "finish_reason": reason}
            return self._chunk(choice | dict.fromkeys(("stop_reason", "prompt_token_ids", "token_ids")), counts, last)
        first = b"" if len(self._begun) > 1 or carried is not None else self._roles(answer.request.prompt_tokens)
        end: dict[str, Any] = {"stop_reason": None} if last else {}
        choice |= {"delta": {"content": text}, "logprobs": None, "finish_reason": reason, **end, "token_ids": None}
        return first + self._chunk(choice, counts, last)

    def failure(self) -> Refused:
        """See `answer.Events.failure`."""
        return Refused(500, "InternalServerError", "Internal server error")

    def closing(self) -> bytes:
        """What follows the last token: the usage if it was requested, and the end."""
        body = b""
        if self._options.include_usage:
            prompt, tokens = self._totals()
            counts = {"usage": usage(prompt, tokens), "system_fingerprint": self._fingerprint}
            body = self._event({**self._head(), "choices": [], **counts})
        return body + DONE.replace(b"\n", self._end)

    def error(self, refused: Refused) -> bytes:
        """An error in the middle of a stream, and the end."""
        return self._event(refused.body) + DONE.replace(b"\n", self._end)

    def whole(self) -> dict[str, Any]:
        """The answer to a request without streaming."""
        choices = []
        for index, answer in enumerate(self.answers):
            output: dict[str, Any] = {"text": answer.text}
            more: dict[str, Any] = {"prompt_logprobs": None, "prompt_token_ids": None}
            if self._chat:
                empty = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "reasoning"))
                output, more = {"message": {"role": "assistant", "content": answer.text, **empty}}, {}
            end = {"logprobs": None, "finish_reason": finish_reason(answer), "stop_reason": None, "token_ids": None}
            choices.append({"index": index, **output, **end, **more, "routed_experts": None})
        details = {"prompt_tokens_details": None, "completion_tokens_details": None}
        of_chat = ("prompt_logprobs", "prompt_token_ids", "prompt_text") if self._chat else ()
        return {
            **self._head(whole=True),
            "choices": choices,
            "service_tier": None,
            "system_fingerprint": self._fingerprint,
            "usage": usage(*self._totals()) | details,
            **dict.fromkeys((*of_chat, "kv_transfer_params", "ec_transfer_params", "metrics")),
        }

    def _totals(self) -> tuple[int, int]:
        """The tokens of all prompts, and of all answers."""
        prompt = sum(answer.request.prompt_tokens for answer in self.answers[:: self._n])
        return prompt, sum(len(answer.sent) for answer in self.answers)

    def _roles(self, prompt_tokens: int) -> bytes:
        """What a chat begins with: an event for each choice."""
        events = b""
        for index in range(self._n):
            delta = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            more = {"prompt_token_ids": None, "prompt_text": None}
            events += self._chunk({"index": index, **delta}, usage(prompt_tokens, 0), last=False, more=more)
        return events

    def _head(self, whole: bool = False) -> dict[str, Any]:
        kind = "text_completion" if not self._chat else "chat.completion" if whole else "chat.completion.chunk"
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(
        self, choice: dict[str, Any], counts: dict[str, Any], last: bool, more: dict[str, Any] | None = None
    ) -> bytes:
        event = {**self._head(), "choices": [choice]}
        if self._options.include_usage and self._options.continuous_usage_stats:
            event["usage"] = counts | ({"completion_tokens_details": None} if self._chat else {})
        if last and not self._options.include_usage:
            event["system_fingerprint"] = self._fingerprint
        return chunk(self._event(event | (more or {})))

    def _event(self, event: dict[str, Any]) -> bytes:
        return b"data: " + json.dumps(event, separators=(",", ":")).encode() + self._end * 2

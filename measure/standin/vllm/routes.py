"""The HTTP of vLLM's OpenAI-style server (vllm/entrypoints/openai, version 0.32.0).

A request that is refused is answered in JSON with its status, streamed or not; an error after that comes as an event.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from time import perf_counter
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from measure.standin.answer import Answer
from measure.standin.surface import Surface, ignore_closed_connections
from measure.standin.vllm.events import VllmEvents
from measure.standin.vllm.metrics import VllmMetrics
from measure.standin.vllm.validation import (
    Body,
    ChatCompletion,
    Completion,
    Refused,
    bad_request,
    chat_prompt,
    check,
    first_word,
    max_tokens,
    names,
    prompts,
    tokens_of_text,
)
from sim.engines.vllm_v1_flags import Flags
from sim.model.calibration import Calibration

COMPLETION_TOKENS = 16  # of a completion that does not say how many
BUSY = "The engine is currently busy and cannot accept more requests. Please retry later."

B = TypeVar("B", bound=Body)


class Routes(Surface):
    """The HTTP of vLLM. With `max_num_queued_tokens` prompt tokens before their first token, a request is refused;
    `stream_interval` is how many tokens an event carries."""

    def __init__(
        self,
        calibration: Calibration,
        flags: Flags,
        *,
        model: str = "servecast/stand-in",
        max_num_queued_tokens: int | None = None,
        stream_interval: int = 1,
        **options: Any,
    ):
        self.flags, self.metrics = flags, VllmMetrics(flags, model)
        super().__init__(calibration, flags, self.metrics, model=model, **options)
        self._most_tokens, self._interval = max_num_queued_tokens, stream_interval
        self._created = int(time.time())

    def application(self) -> web.Application:
        """The routes that clients use."""
        app = web.Application(client_max_size=64 << 20, middlewares=[ignore_closed_connections])
        app.add_routes(
            [
                web.post("/v1/completions", self.completions),
                web.post("/v1/chat/completions", self.chat_completions),
                web.post("/tokenize", self.tokenize),
                web.get("/v1/models", self.models),
                web.get("/version", self.version),
                web.get("/health", self.health),
                web.get("/ping", self.health),
                web.get("/metrics", self.exposition),
            ]
        )
        return app

    async def models(self, request: web.Request) -> web.Response:
        """The one model, with its longest prompt and answer together."""
        model = {
            "id": self.model,
            "object": "model",
            "created": self._created,
            "owned_by": "vllm",
            "root": self.model,
            "parent": None,
            "max_model_len": self.flags.max_model_len,
        }
        return web.json_response({"object": "list", "data": [model]})

    async def version(self, request: web.Request) -> web.Response:
        """The version."""
        return web.json_response({"version": self.flags.version})

    async def health(self, request: web.Request) -> web.Response:
        """Always healthy."""
        return web.Response()

    async def exposition(self, request: web.Request) -> web.Response:
        """Prometheus' text format."""
        return web.Response(text=self.metrics.text())

    async def tokenize(self, request: web.Request) -> web.Response:
        """The token ids of a prompt."""
        try:
            body = msgspec.json.decode(await request.read(), type=dict[str, Any])
        except msgspec.DecodeError as e:
            return _error(Refused(400, "Bad Request", str(e)))
        ids = tokens_of_text(str(body.get("prompt", "")))
        return web.json_response({"count": len(ids), "max_model_len": self.flags.max_model_len, "tokens": ids})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """Answers to one or several prompts, of which each is a choice."""
        arrived = perf_counter()
        try:
            body = await _decoded(request, Completion)
            check(body, self.model, self.flags)
            return await self._answer(request, body, prompts(body), COMPLETION_TOKENS, arrived)
        except Refused as e:
            return _error(e)

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        """The assistant's next message."""
        arrived = perf_counter()
        try:
            body = await _decoded(request, ChatCompletion)
            if body.max_completion_tokens is not None:
                body.max_tokens = body.max_completion_tokens
            check(body, self.model, self.flags)
            if not body.messages:
                raise bad_request("messages must not be empty.", "messages")
            return await self._answer(request, body, [chat_prompt(body)], None, arrived)
        except Refused as e:
            return _error(e)

    async def _answer(
        self, request: web.Request, body: Body, ids: list[list[int]], default: int | None, arrived: float
    ) -> web.StreamResponse:
        limits = [max_tokens(body, len(prompt), default, self.flags) for prompt in ids]
        fault = self.draw_fault()
        self._check_queue(fault)
        chat = isinstance(body, ChatCompletion)
        events = VllmEvents(self.model, chat, body.stream_options, self._interval, self.faults.crlf)
        try:
            if body.stream:
                return await self._stream(request, body, events, ids, limits, fault, arrived)
            self._start(request, body, events, ids, limits, fault, arrived, None)
            for answer in events.answers:
                await answer.done
                while answer.fault == "stall":
                    await asyncio.sleep(self.faults.comments)
                if answer.fault == "incomplete":
                    raise events.failure()
                if answer.fault == "reset" and request.transport is not None:
                    request.transport.abort()
            return web.json_response(events.whole())
        finally:
            for answer in events.answers:
                self.serving.leave(answer)
                self.metrics.left(answer.request)
                self.log(answer)

    async def _stream(
        self,
        request: web.Request,
        body: Body,
        events: VllmEvents,
        ids: list[list[int]],
        limits: list[int],
        fault: str | None,
        arrived: float,
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        self._start(request, body, events, ids, limits, fault, arrived, request.transport)
        try:
            for answer in events.answers:
                await answer.done
            while any(answer.fault == "stall" for answer in events.answers):
                await asyncio.sleep(self.faults.comments)  # computed but not sent: the client must give up
            if not any(answer.fault == "incomplete" for answer in events.answers):
                await response.write(events.closing())
        except Refused as e:
            await response.write(events.error(e))
        with suppress(ConnectionError):
            await response.write_eof()
        return response

    def _start(
        self,
        request: web.Request,
        body: Body,
        events: VllmEvents,
        ids: list[list[int]],
        limits: list[int],
        fault: str | None,
        arrived: float,
        transport: asyncio.Transport | None,
    ) -> list[Answer]:
        name = request.headers.get("X-Request-Id")
        for prompt, limit in zip(ids, limits, strict=True):
            ended = "eos" if fault == "eos" and not body.ignore_eos else None
            asked = self.new_request(len(prompt), limit, ended, max(1, body.min_tokens))
            asked.arrived, asked.priority = arrived, body.priority
            if self.flags.enable_prefix_caching:
                asked.text = names(prompt, asked.output_tokens, self.flags)
            self.metrics.arrived(asked, arrived)
            answer = self.start(asked, name, events, fault, transport, first_word(prompt))
            answer.arrived = arrived
            events.answers.append(answer)
        return events.answers

    def _check_queue(self, fault: str | None) -> None:
        """Raise `Refused` where too many requests, or prompt tokens, are queued (v1/engine/async_llm.py)."""
        if not self.serving.has_permit or fault == "overloaded":
            reason = "max_num_queued_reqs"
        elif self._most_tokens is not None and self.metrics.prefilling_tokens >= self._most_tokens:
            reason = "max_num_queued_tokens"
        else:
            return
        self.metrics.rejected(reason)
        raise Refused(503, "ServiceUnavailableError", BUSY)


async def _decoded(request: web.Request, kind: type[B]) -> B:
    if not request.content_type.endswith("json"):
        raise Refused(415, "Unsupported Media Type", "Only 'application/json' is allowed")
    try:
        return msgspec.json.decode(await request.read(), type=kind, strict=False)
    except msgspec.DecodeError as e:  # ValidationError is one
        raise Refused(400, "Bad Request", str(e)) from e


def _error(refused: Refused) -> web.Response:
    return web.json_response(refused.body, status=refused.status)

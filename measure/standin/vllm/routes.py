"""The HTTP of vLLM's OpenAI-style server (vllm/entrypoints/openai, version 0.32.0).

A request that is refused is answered in JSON with its status, streamed or not; an error after that comes as an event.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import suppress
from http import HTTPStatus
from time import perf_counter
from typing import Any, TypeVar

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from measure.standin.answer import Answer
from measure.standin.surface import Surface, ignore_closed_connections
from measure.standin.vllm.events import VllmEvents
from measure.standin.vllm.metrics import Group, VllmMetrics
from measure.standin.vllm.validation import (
    Body,
    ChatCompletion,
    Completion,
    Refused,
    bad_request,
    busy,
    chat_prompt,
    check,
    check_length,
    first_word,
    max_tokens,
    names,
    prompts,
    tokens_of_text,
    undecodable,
)
from sim.engines.vllm_v1 import Flags
from sim.model.calibration import Calibration

COMPLETION_TOKENS = 16  # of a completion that does not say how many

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
        app = web.Application(client_max_size=64 << 20, middlewares=[ignore_closed_connections, _in_json])
        app.add_routes(
            [
                web.post("/v1/completions", self.completions),
                web.post("/v1/chat/completions", self.chat_completions),
                web.post("/tokenize", self.tokenize),
                web.get("/v1/models", self.models),
                web.get("/version", self.version),
                web.get("/health", self.health),
                web.route("*", "/ping", self.health),
                web.get("/load", self.load),
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
            "permission": [
                {
                    "id": f"modelperm-{uuid.uuid4().hex[:16]}",
                    "object": "model_permission",
                    "created": self._created,
                    "allow_create_engine": False,
                    "allow_sampling": True,
                    "allow_logprobs": True,
                    "allow_search_indices": False,
                    "allow_view": True,
                    "allow_fine_tuning": False,
                    "organization": "*",
                    "group": None,
                    "is_blocking": False,
                }
            ],
        }
        return web.json_response({"object": "list", "data": [model]})

    async def load(self, request: web.Request) -> web.Response:
        """What vLLM says without `--enable-server-load-tracking`."""
        return web.json_response({"server_load": 0})

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
        """The token ids of a prompt, or of a chat."""
        try:
            body = await _decoded(request, _Text)
        except Refused as e:
            return _error(e)
        ids = tokens_of_text(body.prompt) if body.prompt is not None else chat_prompt(body)
        found = {"count": len(ids), "max_model_len": self.flags.max_model_len, "tokens": ids, "token_strs": None}
        return web.json_response(found)

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
            check(body, self.model, self.flags)
            if body.messages is None:
                raise undecodable("Field required", "body.messages")
            if not body.messages:
                raise bad_request("Cannot apply chat template to an empty conversation. Provide at least one message.")
            return await self._answer(request, body, [chat_prompt(body)], None, arrived)
        except Refused as e:
            return _error(e)

    async def _answer(
        self, request: web.Request, body: Body, ids: list[list[int]], default: int | None, arrived: float
    ) -> web.StreamResponse:
        for prompt in ids:
            check_length(prompt, (default if body.max_tokens is None else body.max_tokens) or 0, self.flags)
        limits = [max_tokens(body, len(prompt), default, self.flags) for prompt in ids]
        fault = self.draw_fault()
        self._check_queue(fault, body.n)
        events = VllmEvents(
            self.model,
            isinstance(body, ChatCompletion),
            body.stream_options,
            body.n,
            version=self.flags.version,
            name=request.headers.get("X-Request-Id"),
            interval=max(self._interval, body.stream_interval or 1),
            crlf=self.faults.crlf,
        )
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
            group = Group(body.n)  # v1/engine/parallel_sampling.py: a request of the engine for each answer
            for child in range(body.n):
                ended = "eos" if fault == "eos" and not body.ignore_eos else None
                asked = self.new_request(len(prompt), limit, ended, max(1, body.min_tokens))
                asked.arrived, asked.priority = arrived, body.priority
                word = first_word([child, *prompt]) if child else first_word(prompt)
                if self.flags.enable_prefix_caching:
                    asked.text = names(prompt, word, asked.output_tokens, self.flags)
                self.metrics.arrived(asked, arrived, group)
                answer = self.start(asked, name, events, fault, transport, word)
                answer.arrived = arrived
                events.answers.append(answer)
        return events.answers

    def _check_queue(self, fault: str | None, n: int) -> None:
        """Raise `Refused` where too many requests, or prompt tokens, are queued (v1/engine/async_llm.py)."""
        if not self.serving.has_permits(n) or fault == "overloaded":
            reason = "max_num_queued_reqs"
        elif self._most_tokens is not None and self.metrics.prefilling_tokens >= self._most_tokens:
            reason = "max_num_queued_tokens"
        else:
            return
        self.metrics.rejected(reason)
        raise busy(reason)


class _Text(ChatCompletion):
    """A request to `/tokenize`."""

    prompt: str | None = None


@web.middleware
async def _in_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer in JSON where there is no such route or method."""
    try:
        return await handler(request)
    except web.HTTPClientError as e:
        return web.json_response({"detail": HTTPStatus(e.status).phrase}, status=e.status)


async def _decoded(request: web.Request, kind: type[B]) -> B:
    if request.content_type != "application/json":
        raise undecodable("Unsupported Media Type: Only 'application/json' is allowed", None)
    try:
        return msgspec.json.decode(await request.read(), type=kind, strict=False)
    except msgspec.DecodeError as e:  # ValidationError is one
        message, _, key = str(e).partition(" - at `$")
        raise undecodable(message, f"body{key.rstrip('`')}") from e


def _error(refused: Refused) -> web.Response:
    return web.json_response(refused.body, status=refused.status)

"""The HTTP of text-generation-inference 0.9.4: its routes, headers, errors and their order (router/src/server.rs).

A stream is HTTP 200 however it ends; a permit is taken before a request is validated; a body that is no request is
refused in plain text.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from time import perf_counter
from typing import Any

import msgspec
from aiohttp import web

from measure.standin.answer import VOCABULARY, Answer
from measure.standin.surface import Surface, ignore_closed_connections
from measure.standin.tgi.events import TgiEvents, finish_reason, token_event
from measure.standin.tgi.metrics import TgiMetrics
from measure.standin.tgi.validation import (
    MAX_BEST_OF,
    MAX_STOP_SEQUENCES,
    Body,
    Refused,
    invalid,
    overloaded,
    prompt_length,
)
from sim.engines.tgi_0_9_4 import Flags
from sim.model.calibration import Calibration

COMPUTE = {"x-compute-type": "gpu+optimized"}  # hard-coded in 0.9.4


class Routes(Surface):
    """The HTTP of TGI 0.9.4."""

    def __init__(self, calibration: Calibration, flags: Flags, **options: Any):
        self.flags, self.metrics = flags, TgiMetrics(flags.max_input_length, flags.max_total_tokens)
        super().__init__(calibration, flags, self.metrics, **options)
        self._events = TgiEvents(self.faults.crlf)

    def application(self) -> web.Application:
        """The routes of 0.9.4 (router/src/server.rs:667-691)."""
        app = web.Application(client_max_size=2 << 20, middlewares=[ignore_closed_connections])
        app.add_routes(
            [
                web.post("/generate", self.generate),
                web.post("/generate_stream", self.generate_stream),
                web.post("/", self.either),
                web.post("/invocations", self.either),
                web.get("/info", self.info),
                web.get("/health", self.health),
                web.get("/ping", self.health),
                web.get("/", self.health),
                web.get("/metrics", self.exposition),
            ]
        )
        return app

    async def info(self, request: web.Request) -> web.Response:
        """The model and its limits; neither the prefill budget nor the padding, as in 0.9.4."""
        s = self.flags
        return web.json_response(
            {
                "model_id": self.model,
                "model_sha": None,
                "model_dtype": "torch.float16",
                "model_device_type": "cuda",
                "model_pipeline_tag": "text-generation",
                "max_concurrent_requests": s.max_concurrent_requests,
                "max_best_of": MAX_BEST_OF,
                "max_stop_sequences": MAX_STOP_SEQUENCES,
                "max_input_length": s.max_input_length,
                "max_total_tokens": s.max_total_tokens,
                "waiting_served_ratio": s.waiting_served_ratio,
                "max_batch_total_tokens": s.token_budget,
                "max_waiting_tokens": s.max_waiting_tokens,
                "validation_workers": 2,
                "version": "0.9.4",
                "sha": "servecast-standin",
                "docker_label": None,
            }
        )

    async def health(self, request: web.Request) -> web.Response:
        """Always healthy."""
        return web.Response()

    async def exposition(self, request: web.Request) -> web.Response:
        """Prometheus' text format."""
        return web.Response(text=self.metrics.text())

    async def either(self, request: web.Request) -> web.StreamResponse:
        """The compatible route: streams on demand, and answers a list of one otherwise."""
        body = await self._body(request)
        return await (self._stream(request, body) if body.stream else self._whole(request, body, as_list=True))

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """One JSON object, with the timing headers."""
        return await self._whole(request, await self._body(request))

    async def generate_stream(self, request: web.Request) -> web.StreamResponse:
        """Server-sent events; whatever goes wrong with the request comes inside HTTP 200."""
        return await self._stream(request, await self._body(request))

    async def _body(self, request: web.Request) -> Body:
        # axum refuses what is no request at all in plain text
        if not request.content_type.endswith("json"):
            raise web.HTTPUnsupportedMediaType(text="Expected request with `Content-Type: application/json`")
        raw = await request.read()
        try:
            return msgspec.json.decode(raw, type=Body)
        except msgspec.ValidationError as e:
            raise web.HTTPUnprocessableEntity(
                text=f"Failed to deserialize the JSON body into the target type: {e}"
            ) from e
        except msgspec.DecodeError as e:
            raise web.HTTPBadRequest(text=f"Failed to parse the request body as JSON: {e}") from e

    def _accept(self, body: Body, name: str | None, streamed: bool, transport: asyncio.Transport | None) -> Answer:
        """A permit first, then validation, then the queue (infer.rs:97-129)."""
        self.metrics.count("tgi_request_count")
        fault = self.draw_fault()
        try:
            if fault == "overloaded" or not self.serving.has_permits():
                raise overloaded()
            if streamed and body.parameters.decoder_input_details:
                raise invalid("`decoder_input_details` == true is not supported when streaming tokens")
            length = prompt_length(body, self.flags, streamed)
        except Refused as e:
            self.metrics.count("tgi_request_failure", "err", e.error_type)
            raise
        request = self.new_request(length, body.parameters.max_new_tokens, fault)
        self.metrics.observe("tgi_request_input_length", length)
        self.metrics.observe("tgi_request_max_new_tokens", request.max_new_tokens)
        events = self._events.with_details(body.parameters.details)
        return self.start(request, name, events, fault, transport, request.id)

    async def _stream(self, request: web.Request, body: Body) -> web.StreamResponse:
        arrived = perf_counter()
        response = web.StreamResponse(
            headers={
                "content-type": "text/event-stream",
                "cache-control": "no-cache",
                "X-Accel-Buffering": "no",
                "x-compute-characters": str(len(body.inputs)),
                **COMPUTE,
            }
        )
        response.enable_chunked_encoding()
        await response.prepare(request)
        answer: Answer | None = None
        try:
            answer = self._accept(body, request.headers.get("X-Request-Id"), True, request.transport)
            answer.arrived = arrived
            while not answer.done.done():
                quiet = perf_counter() - max(answer.sent[-1:] or [arrived])
                await asyncio.wait([answer.done], timeout=max(0.01, self.faults.comments - quiet))
                if (
                    not answer.done.done()
                    and perf_counter() - max(answer.sent[-1:] or [arrived]) >= self.faults.comments
                ):
                    await response.write(b":" + self._events.end * 2)
            answer.done.result()
            if answer.fault == "stall":
                while True:  # all tokens were computed and none sent: the client must give up
                    await asyncio.sleep(self.faults.comments)
                    await response.write(b":" + self._events.end * 2)
            self._succeeded(answer)
        except Refused as e:
            await response.write(b"data:" + json.dumps(e.body).encode() + self._events.end * 2)
        finally:
            if answer is not None:
                self.serving.leave(answer)
                self.log(answer)
        with suppress(ConnectionError):
            await response.write_eof()
        return response

    async def _whole(self, request: web.Request, body: Body, as_list: bool = False) -> web.StreamResponse:
        arrived = perf_counter()
        copies = max(1, body.parameters.best_of or 1)
        answers: list[Answer] = []
        try:
            if copies > MAX_BEST_OF:
                raise invalid(f"`best_of` must be > 0 and <= {MAX_BEST_OF}. Given: {copies}")
            for _ in range(copies):
                answers.append(self._accept(body, request.headers.get("X-Request-Id"), False, None))
            for answer in answers:
                await answer.done
                if answer.fault == "incomplete":
                    raise Refused(500, "incomplete_generation", "Incomplete generation")
                while answer.fault == "stall":
                    await asyncio.sleep(self.faults.comments)
                if answer.fault == "reset" and request.transport is not None:
                    request.transport.abort()
        except Refused as e:
            return web.json_response(e.body, status=e.status)
        finally:
            for answer in answers:
                self.serving.leave(answer)
        answer = answers[0]
        answer.arrived = arrived
        result = self._described(answer, body)
        headers = COMPUTE | {"x-compute-characters": str(len(body.inputs))} | self._succeeded(answer)
        return web.json_response([result] if as_list else result, headers=headers)

    def _described(self, answer: Answer, body: Body) -> dict[str, Any]:
        result: dict[str, Any] = {"generated_text": answer.text}
        if body.parameters.details or body.parameters.decoder_input_details:
            tokens = range(answer.request.output_tokens)
            result["details"] = {
                "finish_reason": finish_reason(answer),
                "generated_tokens": answer.request.output_tokens,
                "seed": None,
                "prefill": [],
                "tokens": [token_event((answer.request.id + i) % VOCABULARY)["token"] for i in tokens],
            }
        if body.parameters.decoder_input_details:
            words = ["<s>", *body.inputs.split()[-(answer.request.prompt_tokens - 1) :]][: answer.request.prompt_tokens]
            result["details"]["prefill"] = [
                {"id": i, "text": word, "logprob": -0.5 if i else None} for i, word in enumerate(words)
            ]
        return result

    def _succeeded(self, answer: Answer) -> dict[str, str]:
        """Count a success; returns the timing headers, in whole milliseconds."""
        if not answer.sent or answer.fault in ("reset", "incomplete"):
            return {}
        now, tokens = perf_counter(), len(answer.sent)
        times = {
            "total": now - answer.arrived,
            "validation": answer.queued - answer.arrived,
            "queue": answer.selected - answer.queued,
            "inference": now - answer.selected,
        }
        per_token = times["inference"] / tokens
        self.metrics.count("tgi_request_success")
        self.metrics.observe("tgi_request_generated_tokens", tokens)
        self.metrics.observe("tgi_request_mean_time_per_token_duration", per_token)
        for name, seconds in times.items():
            self.metrics.observe(f"tgi_request_{'' if name == 'total' else name + '_'}duration", seconds)
        headers = {f"x-{name}-time": str(int(1000 * seconds)) for name, seconds in times.items()}
        return headers | {"x-compute-time": headers["x-total-time"], "x-time-per-token": str(int(1000 * per_token))}

"""One request that the stand-in is answering: its tokens, and the connection they are written to."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from time import perf_counter
from typing import Any

from measure.standin.realtime import Server
from measure.standin.tgi_validation import Refused
from sim.model.request import Request

VOCABULARY = 512


def token_event(number: int) -> dict[str, Any]:
    """The event of token `number` of the vocabulary, as in 0.9.4 (router/src/server.rs:390-461)."""
    token = {"id": number, "text": f" w{number}", "logprob": -0.5, "special": False}
    return {"token": token, "generated_text": None, "details": None}


class Frames:
    """Events as chunks of HTTP, each written in one piece: `data:` with no space, as 0.9.4 has it."""

    def __init__(self, crlf: bool = False):
        self.end = b"\r\n" if crlf else b"\n"
        self.tokens = [self.frame(token_event(i)) for i in range(VOCABULARY)]

    def frame(self, event: dict[str, Any]) -> bytes:
        """One event."""
        data = b"data:" + json.dumps(event, separators=(",", ":")).encode() + self.end * 2
        return b"%x\r\n%s\r\n" % (len(data), data)


class Answer:
    """An `realtime.Job`. Without a `transport` nothing is written; times are `perf_counter` seconds."""

    def __init__(self, request: Request, name: int | str, server: Server, frames: Frames, details: bool):
        self.request, self.name = request, name
        self.arrived = self.queued = self.selected = perf_counter()
        self.sent: list[float] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport | None = None
        self.fault: str | None = None
        self.fault_at = 0  # the token before which it strikes
        self._server, self._frames, self._details = server, frames, details

    def token(self, last: bool) -> float:
        """See `realtime.Job`."""
        index = len(self.sent)
        if self.fault is not None and index == self.fault_at and self._strike(self.fault):
            return perf_counter()
        now = perf_counter()  # before writing: whoever reads it reads it later
        if self.transport is not None:
            write = self.transport.write
            write(self._last() if last else self._frames.tokens[(self.request.id + index) % VOCABULARY])
        self.sent.append(now)
        if last and not self.done.done():
            self.done.set_result(None)
        return perf_counter()

    @property
    def text(self) -> str:
        """The generated text so far."""
        return "".join(f" w{(self.request.id + i) % VOCABULARY}" for i in range(len(self.sent)))

    @property
    def finish_reason(self) -> str:
        """Why the answer ended."""
        return "length" if self.request.output_tokens == self.request.max_new_tokens else "eos_token"

    def _last(self) -> bytes:
        n = len(self.sent) + 1
        event = token_event((self.request.id + n - 1) % VOCABULARY)
        event["generated_text"] = self.text + event["token"]["text"]
        if self._details:
            event["details"] = {"finish_reason": self.finish_reason, "generated_tokens": n, "seed": None}
        return self._frames.frame(event)

    def _strike(self, fault: str) -> bool:
        if fault == "stall":
            self.transport = None  # computed, but nobody hears of it
            return False
        self._server.leave(self)
        if fault == "reset" and self.transport is not None:
            connection = self.transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST, not FIN
            self.transport.abort()
        elif fault == "error" and not self.done.done():
            self.done.set_exception(
                Refused(424, "generation", "Request failed during generation: Server error: injected")
            )
        if not self.done.done():
            self.done.set_result(None)
        return True

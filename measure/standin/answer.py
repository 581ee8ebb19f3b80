"""One request while the stand-in answers it: its tokens, and the connection they are written to."""

from __future__ import annotations

import asyncio
import socket
import struct
from time import perf_counter
from typing import Protocol

from measure.standin.realtime import Server
from sim.model.request import Request

VOCABULARY = 512  # words that answers are made of


def word(number: int) -> str:
    """A word of an answer, with the space before it."""
    return f" w{number % VOCABULARY}"


def chunk(data: bytes) -> bytes:
    """A chunk of an HTTP body in chunked encoding, to be written in one piece."""
    return b"%x\r\n%s\r\n" % (len(data), data)


class Events(Protocol):
    """How a server writes the tokens of a streamed answer."""

    def token(self, answer: Answer, last: bool) -> bytes:
        """What is written for the next token (`answer.sent` has those before it); empty for nothing."""

    def failure(self) -> Exception:
        """The error of an answer that fails midway."""


class Answer:
    """A `realtime.Job`. Without a `transport` nothing is written; times are `perf_counter` seconds.

    `first_word` is the number of its first word; the others follow from it.
    """

    def __init__(self, request: Request, name: int | str, server: Server, events: Events, first_word: int):
        self.request, self.name, self.first_word = request, name, first_word
        self.arrived = self.queued = self.selected = perf_counter()
        self.sent: list[float] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport | None = None
        self.fault: str | None = None
        self.fault_at = 0  # the token before which it strikes
        self._server, self._events = server, events

    def token(self, last: bool) -> float:
        """See `realtime.Job`."""
        if self.fault is not None and len(self.sent) == self.fault_at and self._strike(self.fault):
            return perf_counter()
        now = perf_counter()  # before writing, so that no client can read it earlier
        if self.transport is not None and (data := self._events.token(self, last)):
            self.transport.write(data)
        self.sent.append(now)
        if last and not self.done.done():
            self.done.set_result(None)
        return perf_counter()

    @property
    def text(self) -> str:
        """The text of the tokens sent so far."""
        return "".join(word(self.first_word + i) for i in range(len(self.sent)))

    def _strike(self, fault: str) -> bool:
        if fault == "stall":
            self.transport = None  # computed, but not sent
            return False
        self._server.leave(self)
        if fault == "reset" and self.transport is not None:
            connection = self.transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST, not FIN
            self.transport.abort()
        elif fault == "error" and not self.done.done():
            self.done.set_exception(self._events.failure())
        if not self.done.done():
            self.done.set_result(None)
        return True

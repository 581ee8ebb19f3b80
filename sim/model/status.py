"""How a request ended."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """How a request ended; files have these words."""

    OK = "ok"  # answered
    OVERLOADED = "overloaded"  # turned away: the server has as many requests as it lets in (HTTP 429)
    VALIDATION = "validation"  # refused: longer than the server's limits, or malformed (HTTP 422)
    GENERATION = "generation"  # the server failed while it answered
    INCOMPLETE = "incomplete"  # the answer ended without its last token
    TIMEOUT = "timeout"  # the client waited too long, and left
    CONNECT = "connect"  # no connection
    RESET = "reset"  # the connection broke
    ABORTED = "aborted"  # still under way when the run ended


BROKEN = (Status.GENERATION, Status.INCOMPLETE, Status.CONNECT, Status.RESET)  # by a fault, whatever the load

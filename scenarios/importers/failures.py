"""Other tools' messages about failed requests, as the statuses of a run."""

from __future__ import annotations

from sim.model.status import Status

# The first that occurs in the text decides; aiohttp's and httpx's names of exceptions, and HTTP's reasons.
WORDS = {
    "requestcancellation": Status.ABORTED,
    "cancelled": Status.ABORTED,
    "too many requests": Status.OVERLOADED,
    "service unavailable": Status.OVERLOADED,
    "overloaded": Status.OVERLOADED,
    "timeout": Status.TIMEOUT,
    "timed out": Status.TIMEOUT,
    "disconnected": Status.RESET,
    "reset": Status.RESET,
    "broken pipe": Status.RESET,
    "readerror": Status.RESET,
    "remoteprotocolerror": Status.RESET,
    "connect": Status.CONNECT,
    "unprocessable": Status.VALIDATION,
    "bad request": Status.VALIDATION,
    "never received a valid chunk": Status.INCOMPLETE,
}


def status_of_text(text: str) -> Status:
    """The status of a request that failed with this message; the server's failure if nothing else is known."""
    low = text.lower()
    return next((status for word, status in WORDS.items() if word in low), Status.GENERATION)


def last_line(text: str) -> str:
    """What a traceback says in the end, without the paths of somebody's machine."""
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""

"""Other tools' words for why a request failed, as the statuses of a run."""

from __future__ import annotations

from measure.apis.failure import GENERATION, OVERLOADED, VALIDATION
from sim.model.request import ABORTED

# The first that occurs in the text decides; aiohttp's and httpx's names of exceptions, and HTTP's reasons.
WORDS = {
    "requestcancellation": ABORTED,
    "cancelled": ABORTED,
    "too many requests": OVERLOADED,
    "service unavailable": OVERLOADED,
    "overloaded": OVERLOADED,
    "timeout": "timeout",
    "timed out": "timeout",
    "disconnected": "reset",
    "reset": "reset",
    "broken pipe": "reset",
    "readerror": "reset",
    "remoteprotocolerror": "reset",
    "connect": "connect",
    "unprocessable": VALIDATION,
    "bad request": VALIDATION,
    "never received a valid chunk": "incomplete",
}


def status_of_text(text: str) -> str:
    """The status of a request that failed with these words; a failure of the server's if nothing else is known."""
    low = text.lower()
    return next((status for word, status in WORDS.items() if word in low), GENERATION)


def last_line(text: str) -> str:
    """What a traceback says in the end, without the paths of somebody's machine."""
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""

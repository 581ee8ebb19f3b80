"""The server's API key: read from the environment, sent in a header, written nowhere."""

from __future__ import annotations

import os

from sim.model.errors import BadInput

VARIABLE = "SERVECAST_API_KEY"


def api_key() -> str | None:
    """The key from the environment, stripped of white space; None if it is not set."""
    key = os.environ.get(VARIABLE, "").strip()
    if not key:
        return None
    if not (key.isascii() and key.isprintable()):
        raise BadInput("expected a key in visible ASCII characters", path=VARIABLE)  # the key itself is not shown
    return key


def without_key(text: str) -> str:
    """A server's text with the key masked, in case the server repeats it."""
    key = os.environ.get(VARIABLE, "").strip()
    return text.replace(key, "***") if key else text

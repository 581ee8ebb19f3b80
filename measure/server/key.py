"""The server's API key: from the environment, into a header, and nowhere else."""

from __future__ import annotations

import os

from sim.model.errors import BadInput

VARIABLE = "SERVECAST_API_KEY"


def api_key() -> str | None:
    """The key of the environment, without the blanks and newlines that files and shells leave around it."""
    key = os.environ.get(VARIABLE, "").strip()
    if not key:
        return None
    if not (key.isascii() and key.isprintable()):
        raise BadInput("expected a key in visible ASCII characters", path=VARIABLE)  # which is not shown
    return key


def without_key(text: str) -> str:
    """A text of a server, which may repeat the key it was sent."""
    key = os.environ.get(VARIABLE, "").strip()
    return text.replace(key, "***") if key else text

"""Faults of a stand-in, to test clients: requests that fail, and a server that dies."""

from __future__ import annotations

import msgspec
import numpy as np

KINDS = ("reset", "stall", "overloaded", "error", "eos", "incomplete")


class Faults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shares of requests (0 to 1) that fail in each way, and faults of the whole server.

    `reset` cuts the connection midway, `stall` sends no more tokens, `overloaded` refuses with the server's status for
    it, `error` ends with its error event, `eos` ends early as a model does, `incomplete` ends the stream without a last
    token. The first `after` requests are spared. `die` kills the server after so many seconds; `crlf` ends lines with
    CRLF; `comments` is how long TGI's streams are silent, s, before they send a comment.
    """

    reset: float = 0.0
    stall: float = 0.0
    overloaded: float = 0.0
    error: float = 0.0
    eos: float = 0.0
    incomplete: float = 0.0
    after: int = 0
    die: float | None = None
    crlf: bool = False
    comments: float = 15.0  # axum's default, router/src/server.rs:491

    def draw(self, rng: np.random.Generator, before: int) -> str | None:
        """The fault of a request that arrives after `before` others; None for none."""
        if before < self.after:
            return None
        at = float(rng.random())
        for kind in KINDS:
            at -= getattr(self, kind)
            if at < 0.0:
                return kind
        return None


def parse_faults(texts: list[str]) -> Faults:
    """Parse faults of a command line: `reset=0.1`, `die=30`, `crlf`. Raises `ValueError` with what was expected."""
    values: dict[str, float | bool] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in Faults.__struct_fields__:
            raise ValueError(f"expected one of {', '.join(Faults.__struct_fields__)}, found {name!r}")
        if name == "crlf":
            values[name] = True
            continue
        try:
            values[name] = int(value) if name == "after" else float(value)
        except ValueError:
            raise ValueError(f"{name}: expected a number, found {value!r}") from None
        if name in KINDS and not 0.0 <= values[name] <= 1.0:
            raise ValueError(f"{name}: expected a share of requests from 0 to 1, found {value}")
    return msgspec.convert(values, Faults)

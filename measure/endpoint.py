"""The server's address, for everything but the load: its limits, its health, its metrics, a probe."""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

import msgspec

from sim.errors import UserError

TOKEN_VARIABLE = "SERVECAST_API_KEY"


class Unreachable(UserError):
    """Nobody answers at the URL, or not what was expected."""


class Endpoint:
    """A base URL and the token for it, which comes from the environment and reaches no file."""

    def __init__(self, url: str, timeout: float = 10.0):
        parts = urlsplit(url if "//" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise Unreachable(f"{url}: expected a URL like http://127.0.0.1:8080")
        if parts.username is not None:
            raise Unreachable(f"{parts.hostname}: put the secret into {TOKEN_VARIABLE}, not into the URL")
        path = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc}{path}"
        self.timeout = timeout
        # no proxy from the environment: the load goes straight to the server, so do the questions about it
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body; `Unreachable` when there is no answer."""
        return self._open(urllib.request.Request(self.url + path))

    def post(self, path: str, body: dict[str, Any], timeout: float | None = None) -> tuple[int, bytes]:
        """Status and body of a JSON request; `Unreachable` when there is no answer."""
        request = urllib.request.Request(self.url + path, msgspec.json.encode(body), method="POST")
        request.add_header("Content-Type", "application/json")
        return self._open(request, timeout)

    def _open(self, request: urllib.request.Request, timeout: float | None = None) -> tuple[int, bytes]:
        if token := os.environ.get(TOKEN_VARIABLE):
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with self._opener.open(request, timeout=timeout or self.timeout) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as e:
            return e.code, e.read()
        except urllib.error.URLError as e:
            raise Unreachable(f"{self.url}: no server answers ({e.reason})") from e
        except (OSError, ValueError, http.client.HTTPException) as e:
            raise Unreachable(f"{self.url}: no server answers ({e})") from e


def decoded(body: bytes) -> dict[str, Any]:
    """A JSON object, or an empty one for anything else."""
    try:
        said = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return {}
    return said if isinstance(said, dict) else {}

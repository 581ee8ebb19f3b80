"""Unexpected HTTP answers explained in one line: the status first, then the server's own message."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from html import unescape
from typing import Any
from urllib.parse import urljoin, urlsplit

import msgspec

from measure.server.key import VARIABLE, api_key, without_key
from sim.model.errors import BadInput
from sim.model.text import printable

SHOWN = 200  # characters of a server's message
REDIRECTS = (301, 302, 303, 307, 308)
HINTS = {
    400: "",
    422: "",
    403: f"forbidden; the key in {VARIABLE} lacks the permission, or is not set",
    404: "not found; check the URL and --model",
    405: "this path does not accept this method; check the URL",
    407: "a proxy requires a password",
    413: "the request is too large",
    429: "too many requests",
    502: "a gateway cannot reach the server behind it",
    503: "overloaded, or not ready yet",
    504: "a gateway timed out waiting for the server behind it",
}
PATHS = re.compile(r"(/v1)?(/(chat/)?completions|/models|/generate(_stream)?|/info|/health|/metrics)?$")  # of the APIs
TITLE = re.compile(r"<title[^>]*>([^<]*)", re.IGNORECASE)


def explain(status: int, headers: Mapping[str, str], body: bytes, url: str = "") -> str:
    """One line: `HTTP 401: set SERVECAST_API_KEY (no key)`. `headers` have lower-case names; `url` was requested."""
    if status in REDIRECTS:
        return f"HTTP {status}: {_redirect(headers.get('location', ''), url)}"
    text = message(headers, body)
    hint = _unauthorised() if status == 401 else HINTS.get(status, "")
    if retry := headers.get("retry-after", ""):
        text = f"{text}; " * bool(text) + f"retry after {printable(retry, limit=40)}"
    if status == 200:
        return f"HTTP 200, but {text or 'nothing in it'}"
    if hint:
        return f"HTTP {status}: {hint} ({text})" if text else f"HTTP {status}: {hint}"
    return f"HTTP {status}: {text}" if text else f"HTTP {status}"


def message(headers: Mapping[str, str], body: bytes) -> str:
    """The server's message: that of a JSON error, the title of an HTML page, else the beginning of the text."""
    encoding = headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        unpacked = inflated(encoding, body)
        if unpacked is None:
            return f"an answer encoded as {printable(encoding, limit=40)}, which was not requested"
        body = unpacked
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        found = None
    if isinstance(found, dict):
        return clean(_error_message(found))
    text = body[:20_000].decode("utf-8", "replace").strip()
    if is_html(headers, text):
        title = TITLE.search(text)
        name = clean(unescape(title.group(1)).strip()) if title else ""
        return f'an HTML page, "{name}"' if name else "an HTML page"
    return clean(text)


def is_html(headers: Mapping[str, str], text: str) -> bool:
    """Whether an answer is a page for people."""
    return "html" in headers.get("content-type", "").lower() or text[:100].lower().startswith(("<!doctype", "<html"))


def inflated(encoding: str, body: bytes, limit: int = 1 << 25) -> bytes | None:
    """Decompress a body, up to `limit` bytes; None if it cannot be decompressed."""
    if encoding not in ("gzip", "x-gzip", "deflate"):
        return None
    try:
        return zlib.decompressobj(wbits=47).decompress(body, limit)  # 47: either header
    except zlib.error:
        return None


def clean(text: str) -> str:
    """A server's text made safe to show and to store: one short line, no control characters, no API key."""
    return printable(without_key(" ".join(text.split())), limit=SHOWN)


def shown_url(url: str) -> str:
    """A URL without parts that may be secret: user, password, query."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return clean(url.rpartition("@")[2].partition("?")[0])
    host = f"[{host}]" if ":" in host else host
    return clean(f"{parts.scheme}://{host}{'' if port is None else f':{port}'}{parts.path}")


def _redirect(location: str, url: str) -> str:
    if not location:
        return "a redirect without a location"
    try:
        target = urljoin(url, location)
    except ValueError:
        target = location
    target = shown_url(target)
    base = PATHS.sub("", target.rstrip("/"))
    return f"redirects to {target}" + (f"; if that is the server, give --url {base}" if base != target else "")


def _unauthorised() -> str:
    try:
        known = api_key() is not None
    except BadInput:
        known = True
    return f"the server does not accept the key in {VARIABLE}" if known else f"set {VARIABLE}"


def _error_message(body: dict[str, Any]) -> str:
    """OpenAI's `error.message`, TGI's `error`, FastAPI's `detail`, and others' `message`."""
    for key in ("error", "message", "detail"):
        found = body.get(key)
        if isinstance(found, dict):
            found = found.get("message", found)
        if isinstance(found, list):
            found = "; ".join(str(e.get("msg", e)) if isinstance(e, dict) else str(e) for e in found[:3])
        if found:
            return str(found)
    return str(body) if body else ""

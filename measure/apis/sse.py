"""Parser of server-sent events (WHATWG HTML, 9.2.6) from blocks of bytes, cut anywhere; detects other bodies."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

BOM = b"\xef\xbb\xbf"
PACKED = ("gzip", "x-gzip", "deflate")


class Event(NamedTuple):
    """An event: its type, empty for an ordinary one, and its data, the lines joined."""

    type: bytes
    data: bytes


class UnknownEncoding(ValueError):
    """The Content-Encoding of a body is not supported."""


class EventParser:
    """An incremental parser. Lines end with LF, CR or CRLF; the space after `data:` and the blank line after the last
    event are optional.

    `body` collects an answer that is not an event stream: one that begins with a bracket (JSON) or `<` (HTML). It is
    None for streams, and until the first byte that is not white space.
    """

    def __init__(self) -> None:
        self.body: bytearray | None = None
        self._rest = b""
        self._begun = self._after_cr = False
        self._type = b""
        self._data: list[bytes] = []

    def feed(self, block: bytes) -> Iterable[Event]:
        """The events completed by `block`."""
        # fast path: nearly every block is one event of one line
        if block[:5] == b"data:" and block[-2:] == b"\n\n" and block.find(b"\n") == len(block) - 2:
            pending = self._rest or self._data or self._type or self._after_cr or self.body is not None
            if self._begun and not pending and b"\r" not in block:
                return (Event(b"", block[5:-2].removeprefix(b" ")),)
        return self._feed(block)

    def _feed(self, block: bytes) -> Iterator[Event]:
        if self.body is not None:
            self.body += block
            return
        if not self._begun:
            block = (self._rest + block).removeprefix(BOM)
            start = block.lstrip()
            if not start or BOM.startswith(block):  # nothing but white space, or part of a BOM, so far
                self._rest = block
                return
            self._begun, self._rest = True, b""
            if start[:1] in (b"{", b"[", b"<"):
                self.body = bytearray(start)
                return
        if not block:
            return
        cut = self._after_cr and block[:1] == b"\n"
        self._after_cr = block[-1:] == b"\r"
        block = block[1:] if cut else block
        if b"\r" in block:
            block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, self._rest = (self._rest + block).split(b"\n")
        for line in lines:
            if line:
                self._field(line)
            elif self._data:
                yield self._event()

    def end(self) -> Iterator[Event]:
        """The event completed by the end of the stream, if any."""
        if self.body is None and self._rest.strip():
            self._field(self._rest)
        if self._data:
            yield self._event()

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
        elif name == b"event":
            self._type = value.strip()

    def _event(self) -> Event:
        event = Event(self._type, b"\n".join(self._data))
        self._type, self._data = b"", []
        return event


def unpacker(encoding: str) -> Callable[[bytes], bytes]:
    """A function that decodes a Content-Encoding block by block; raises `UnknownEncoding` if it is not supported."""
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return bytes
    if encoding not in PACKED:
        raise UnknownEncoding(f"the answer is encoded as {encoding[:40]!r}, which was not requested")
    packed = zlib.decompressobj(wbits=47)  # gzip or zlib header
    bare = zlib.decompressobj(wbits=-15)  # some servers send raw deflate
    begun: list[zlib._Decompress] = []

    def unpack(block: bytes) -> bytes:
        if begun:
            return begun[0].decompress(block)
        try:
            found = packed.decompress(block)
            begun.append(packed)
        except zlib.error:
            if encoding != "deflate":
                raise
            found = bare.decompress(block)
            begun.append(bare)
        return found

    return unpack

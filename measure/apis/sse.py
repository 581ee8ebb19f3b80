"""Server-sent events out of bytes, however these are cut (WHATWG HTML, 9.2.6), and bodies that are something else."""

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
    """A body is encoded in a way that cannot be undone."""


class EventParser:
    """Events as their bytes come. Lines end with LF, CR or CRLF, `data` may stand without a space, and the last event
    without a blank line after it.

    `body` holds what came instead where the answer is no event stream: it begins with a bracket, as JSON does, or like
    a page; None until that is known, and for streams.
    """

    def __init__(self) -> None:
        self.body: bytearray | None = None
        self._rest = b""
        self._begun = self._after_cr = False
        self._type = b""
        self._data: list[bytes] = []

    def feed(self, block: bytes) -> Iterable[Event]:
        """The events that `block` completes."""
        # nearly every block is one event of one line, and this is most of what a token costs
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
            if not start or BOM.startswith(block):  # not a byte of it that says anything
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
        """The event that the end of the stream completes, if there is one."""
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
    """What undoes a Content-Encoding, block by block; `UnknownEncoding` for one that was never asked for."""
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return bytes
    if encoding not in PACKED:
        raise UnknownEncoding(f"the answer is encoded as {encoding[:40]!r}, which was not asked for")
    packed = zlib.decompressobj(wbits=47)  # either header
    bare = zlib.decompressobj(wbits=-15)  # some send deflate without one
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

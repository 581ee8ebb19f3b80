"""Files of JSON lines that a kill at any moment leaves whole, but for a torn last line at worst."""

from __future__ import annotations

import os
from pathlib import Path

CHUNK = 1 << 16


class Lines:
    """A file to which every line goes in one write. A torn last line, left by a crash, is cut off on opening."""

    def __init__(self, path: Path):
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = end = os.fstat(self._fd).st_size
        while end:
            start = max(0, end - CHUNK)
            at = os.pread(self._fd, end - start, start).rfind(b"\n")
            if at >= 0:
                end = start + at + 1
                break
            end = start
        if end < size:
            os.ftruncate(self._fd, end)

    def write(self, line: bytes) -> None:
        """Append one line, given without its newline, or nothing of it; raises `OSError`, which names the file."""
        whole, written = line + b"\n", 0
        try:
            while written < len(whole):  # a file that is full takes a part first
                written += os.write(self._fd, whole[written:])
        except OSError as e:
            if written:  # what follows would be one line with this part
                os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
            raise OSError(e.errno, e.strerror, str(self._path)) from e

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

"""The standard streams: they take any text, exist even where the caller closed them, and may lose their reader."""

from __future__ import annotations

import os
import stat
import sys
from contextlib import suppress
from io import BufferedWriter, FileIO, TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from sim.model.text import ENCODING_ERRORS

if TYPE_CHECKING:
    from typing_extensions import Buffer


class _Pipe(FileIO):
    """A pipe whose reader may go away, such as `head`: later output is dropped, and output files are still written."""

    def write(self, data: Buffer) -> int:
        """See `io.FileIO`."""
        try:
            return super().write(data)
        except BrokenPipeError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return super().write(data)


def open_streams() -> None:
    """Prepare stdin, stdout and stderr. A closed one becomes the null device: the next file would take its place."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115 - open as long as the process
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=ENCODING_ERRORS)
    sys.stdout, sys.stderr = _without_reader(sys.stdout), _without_reader(sys.stderr)


def discard_stdout() -> None:
    """Send stdout to the null device: nothing more can be written to it, and Python must not try at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _without_reader(stream: TextIO) -> TextIO:
    """The stream; a pipe or a socket as one whose reader may go away."""
    if not isinstance(stream, TextIOWrapper) or not (
        stat.S_ISFIFO(mode := os.fstat(stream.fileno()).st_mode) or stat.S_ISSOCK(mode)
    ):
        return stream
    stream.flush()
    return TextIOWrapper(
        BufferedWriter(_Pipe(stream.fileno(), "wb", closefd=False)),
        encoding=stream.encoding,
        errors=ENCODING_ERRORS,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )

"""Files read with an end in sight, and replaced in one piece: a reader sees the old content or the new, never half.

Nothing is replaced that should not be.

A symbolic link stays, and what it leads to is replaced. What is no regular file (a device, a pipe) is written to as a
stream. When a write fails, the error names the file that was asked for, and nothing is left behind.
"""

from __future__ import annotations

import errno
import gzip
import io
import os
import secrets
import select
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sim.model.errors import BadInput

TEMPORARY = ".servecast-"  # how names of files begin that are not yet in place; short, whatever the file's name is


MOST = 1 << 29  # bytes of a file that is read whole: what is made of them takes several times as much memory
PIPE_SECONDS = 10.0  # that a pipe is waited for: whoever writes to one by hand is there, and a forgotten one never ends


def read_file(path: Path, most: int = MOST) -> bytes:
    """The content of a regular file, or what comes through a pipe: of at most `most` bytes.

    Raises `OSError`, whose `strerror` says why, for more than that, for a device, which may never end, and for a pipe
    through which nothing comes.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        about = os.fstat(fd)
        if stat.S_ISDIR(about.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not (stat.S_ISREG(about.st_mode) or stat.S_ISFIFO(about.st_mode)):
            raise OSError(errno.EINVAL, "a device, not a file", str(path))
        if stat.S_ISREG(about.st_mode) and about.st_size > most:
            raise _too_large(path, most)
        parts, size = [], 0
        while part := _next_part(fd, path, stat.S_ISFIFO(about.st_mode)):
            parts.append(part)
            size += len(part)
            if size > most:
                raise _too_large(path, most)
        return b"".join(parts)
    finally:
        os.close(fd)


def gunzip(raw: bytes, path: Path) -> bytes:
    """What gzipped bytes hold, of at most `MOST` bytes; raises `OSError`, `EOFError` and `zlib.error`."""
    with gzip.GzipFile(fileobj=io.BytesIO(raw)) as f:
        content = f.read(MOST + 1)
    if len(content) > MOST:
        raise _too_large(path, MOST)
    return content


def _next_part(fd: int, path: Path, pipe: bool) -> bytes:
    if pipe and not select.select([fd], [], [], PIPE_SECONDS)[0]:
        raise OSError(errno.ETIMEDOUT, f"nothing came through this pipe for {PIPE_SECONDS:g} s", str(path))
    return os.read(fd, 1 << 20)


def _too_large(path: Path, most: int) -> OSError:
    return OSError(errno.EFBIG, f"more than {most / 2**20:.0f} MB", str(path))


@contextmanager
def in_the_name_of(path: Path) -> Iterator[None]:
    """Errors of the system inside are raised again as errors about `path`: which temporary file it was is no matter."""
    try:
        yield
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from e


def target_of(path: Path) -> Path:
    """What a path leads to when every link in it is followed, whether or not it exists; a link in a circle stays."""
    return Path(os.path.realpath(path))


def is_stdout(path: Path) -> bool:
    """Whether writing to a path is writing to our own stdout (`/dev/stdout`)."""
    try:
        return os.path.samestat(os.fstat(sys.__stdout__.fileno() if sys.__stdout__ else 1), path.stat())
    except (OSError, ValueError):
        return False


def is_stream(path: Path) -> bool:
    """Whether a path is there and is neither a regular file nor a folder."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def holder_of(path: Path) -> Path | None:
    """The run directory that a path lies in (or would, or is), by its name or by what it leads to; None if in none."""
    for place in (Path(os.path.abspath(path)), target_of(path)):
        for folder in (place, *place.parents):
            if (folder / "run.json").is_file():
                return folder
    return None


def refuse_in_run(path: Path) -> None:
    """Raise `BadInput` if a path lies in a run directory, where nothing is ever written but by the measurement."""
    if (holder := holder_of(path)) is not None:
        raise BadInput(f"is inside the run {holder}, which is never written to; expected another place", path=path)


@contextmanager
def folder_of(path: Path) -> Iterator[None]:
    """The folder of a file to be written, made if absent; removed again, as far as it was made, when that fails."""
    absent = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in absent:  # the innermost first
            with suppress(OSError):
                folder.rmdir()
        raise


def write_file(path: Path, data: bytes) -> None:
    """Replace a file by one with this content, or make it, folders included."""
    with in_the_name_of(path):
        if is_stdout(path):
            sys.stdout.flush()
            _write_all(sys.__stdout__.fileno() if sys.__stdout__ else 1, data)
        elif is_stream(path):
            # a pipe that nobody reads would be waited for, for ever
            fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
            try:
                os.set_blocking(fd, True)
                _write_all(fd, data)
            finally:
                os.close(fd)
        else:
            _replace(target_of(path), data)


def _replace(path: Path, data: bytes) -> None:
    mode = None
    with suppress(FileNotFoundError):
        mode = stat.S_IMODE(path.stat().st_mode)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    with folder_of(path):
        temporary = path.with_name(TEMPORARY + secrets.token_hex(8))
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                _write_all(fd, data)
                if mode is not None:
                    os.fchmod(fd, mode)
                os.fsync(fd)
            finally:
                os.close(fd)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


def _write_all(fd: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]

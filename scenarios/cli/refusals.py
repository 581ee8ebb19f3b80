"""What the operating system refused a command (a full disk, a taken port, no more processes), in one line."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from socket import gaierror

from scenarios.cli.streams import discard_stdout

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
# Neither a file's fault nor ours, and what to do about it
ADVICE = {
    **dict.fromkeys((errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES, errno.EPERM), ""),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "; allow more open files with `ulimit -n`"),
    **dict.fromkeys((errno.EAGAIN, errno.ENOMEM), "; ask for fewer processes (--jobs, --processes)"),
}


def refused(e: OSError) -> str:
    """What was refused and what to do about it; raises the error again if it is a bug of ours."""
    if e.filename is not None:
        return f"{os.fsdecode(e.filename) if isinstance(e.filename, bytes) else e.filename}: {e.strerror}"
    try:
        Path.cwd()
    except FileNotFoundError:
        return "the working directory is gone; change to one that exists"
    if "temporary directory" in str(e):  # the words of Python, and of matplotlib, which keeps its fonts there
        return "no folder for temporary files can be written; set TMPDIR to one that can"
    if e.errno in FULL:  # an error about a file of ours names that file
        discard_stdout()
        return f"standard output: {e.strerror}"
    if not isinstance(e, gaierror) and e.errno not in ADVICE:
        raise e
    return f"{e.strerror}{ADVICE.get(e.errno or 0, '')}"

"""A stand-in server for as long as a program needs it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def standin(*arguments: str) -> Iterator[str]:
    """Start one on a free port; its URL."""
    command = [sys.executable, "-m", "scenarios", "standin", "--port", "0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.terminate()

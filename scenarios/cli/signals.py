"""SIGINT and SIGTERM: the command cleans up and ends with the signal's exit status, never with a traceback.

Imports next to nothing, so that the handlers stand before anything that takes time is imported.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False  # see `main`
if TYPE_CHECKING:
    from types import FrameType

INTERRUPTED, TERMINATED = 130, 143
GRACE = 60.0  # s: the longest that cleaning up after a signal may take; stopping a container takes ten
_status = 0  # the exit status that a signal asked for


def end_at_once() -> None:
    """Until `end_cleanly`, a signal ends the process without further ado: there is nothing to clean up yet."""
    _handle(lambda number, frame: os._exit(INTERRUPTED if number == signal.SIGINT else TERMINATED))


def end_cleanly() -> None:
    """From here on a signal raises `KeyboardInterrupt` or `SystemExit` in the main thread."""
    _handle(_raise)


def exit_status() -> int:
    """The exit status that a signal asked for; 0 if there was none.

    Its exception may have been lost in a destructor or a callback, so the status is kept here.
    """
    return _status


def _handle(handler: signal._HANDLER) -> None:
    signal.signal(signal.SIGTERM, handler)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as for a script's background processes
        signal.signal(signal.SIGINT, handler)


def _raise(number: int, frame: FrameType | None) -> None:
    global _status
    _status = INTERRUPTED if number == signal.SIGINT else TERMINATED
    _exit_in(GRACE, _status)
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(_status)


def _exit_in(seconds: float, status: int) -> None:
    """Ignore further signals, which would stop the clean-up half-way; exit after so long even if it never ends."""
    from threading import Timer

    for number in (signal.SIGINT, signal.SIGTERM):
        # not SIG_IGN: Python complains about a signal that has arrived and whose handler is gone when its turn comes
        signal.signal(number, lambda number, frame: None)
    sys.unraisablehook = lambda lost: None  # a `KeyboardInterrupt` that a destructor swallowed
    last = Timer(seconds, os._exit, [status])
    last.daemon = True
    last.start()

"""Deadlines: one time limit for a whole phase, shared by every wait in it.

A socket timeout limits one wait, and a server can cause any number of them. A deadline limits their sum: each wait gets
the time that is left. The user is told what is awaited, and for how long at most.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from sim.model.errors import UserError

T = TypeVar("T")
Say = Callable[[str], None]


class OutOfTime(UserError):
    """A phase took longer than its limit."""


class Deadline:
    """The end of a phase that may take `seconds`, and no longer than the `budget` of the command. `what` is awaited."""

    def __init__(self, seconds: float, what: str, budget: Deadline | None = None):
        self.what, self.seconds, self._budget = what, seconds, None
        if budget is not None and budget.left() < seconds:
            self.seconds, self._budget = budget.left(), budget
        self._end = time.monotonic() + self.seconds

    def left(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self._end - time.monotonic())

    def passed(self, why: str = "") -> OutOfTime:
        """The error to raise once it has passed; `why` is the cause, if known."""
        cause = f" ({why})" if why else ""
        if self._budget is not None:
            return OutOfTime(f"the budget of {self._budget.seconds:g} s was spent waiting for {self.what}{cause}")
        return OutOfTime(f"timed out after {self.seconds:g} s waiting for {self.what}{cause}")


def wait_for(say: Say, seconds: float, what: str, budget: Deadline | None = None) -> Deadline:
    """A new deadline, after telling the user what is awaited and for how long at most."""
    deadline = Deadline(seconds, what, budget)
    say(f"waiting for {what} (at most {in_words(deadline.seconds)})")
    return deadline


def run_within(seconds: float, function: Callable[[], T], give_up: Callable[[], None] | None = None) -> T:
    """Call `function` with a time limit: its result or exception, or `TimeoutError` after `seconds`.

    It runs in a thread, because some waits (a name look-up) cannot be interrupted; `give_up` ends the others.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            results.append(function())
        except BaseException as e:  # passed on to the caller
            errors.append(e)
        finally:
            done.set()

    threading.Thread(target=run, daemon=True).start()
    if not done.wait(seconds):
        if give_up is not None:
            give_up()
        raise TimeoutError
    if errors:
        raise errors[0]
    return results[0]


def in_words(seconds: float) -> str:
    """A duration for people: whole minutes from 120 s, else seconds."""
    if seconds >= 120:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"

"""One time limit for a whole phase, however it is spent: on a name server, a byte a second, an answer without end.

A timeout of a socket limits one wait, and a server can make any number of them. Here a phase has an end, everything in
it gets what is left, and what a person is told says what is waited for and for how long at most.
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
    """A phase took longer than it may: what was waited for, and the limit."""


class Deadline:
    """The end of a phase `what` that may take `seconds`, and no longer than the `budget` of the whole command."""

    def __init__(self, seconds: float, what: str, budget: Deadline | None = None):
        self.what, self.seconds, self._budget = what, seconds, None
        if budget is not None and budget.left() < seconds:
            self.seconds, self._budget = budget.left(), budget
        self._end = time.monotonic() + self.seconds

    def left(self) -> float:
        """Seconds until it ends, 0 afterwards."""
        return max(0.0, self._end - time.monotonic())

    def passed(self, why: str = "") -> OutOfTime:
        """The error that says so; `why` is what is known of the cause."""
        cause = f" ({why})" if why else ""
        if self._budget is not None:
            return OutOfTime(f"the budget of {self._budget.seconds:g} s was spent waiting for {self.what}{cause}")
        return OutOfTime(f"waited {self.seconds:g} s for {self.what}, in vain{cause}")


def wait_for(say: Say, seconds: float, what: str, budget: Deadline | None = None) -> Deadline:
    """Say what is waited for and for how long at most; returns when that is over."""
    deadline = Deadline(seconds, what, budget)
    say(f"waiting for {what} (at most {in_words(deadline.seconds)})")
    return deadline


def run_within(seconds: float, function: Callable[[], T], give_up: Callable[[], None] | None = None) -> T:
    """What `function` returns or raises, or `TimeoutError` after `seconds`; `give_up` then wakes it where it waits.

    It runs in a thread of its own, because some waits (a name server's) can be ended by nobody.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            results.append(function())
        except BaseException as e:  # handed on to the caller
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
    """A duration a person can plan with."""
    if seconds >= 120:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"

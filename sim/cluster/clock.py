"""SimPy's environment with absolute times: events that are due at the same time get exactly the same time."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from operator import attrgetter
from typing import Any

from simpy import Environment, Event

ARRIVAL, ROUTER = 1, 2  # at one instant clients leave and requests arrive first, then the router acts


class Clock(Environment):
    """An environment whose events can be due *at* a time: `now + delay` would round it."""

    now = property(attrgetter("_now"), doc="The time, s.")  # read ten times a request: without a frame of Python

    def at(self, time: float, priority: int = ARRIVAL, value: Any = None) -> Event:
        """An event that happens at `time`, s, not before now."""
        event = Event(self)
        event._ok = True
        event._value = value
        heappush(self._queue, (time if time > self._now else self._now, priority, next(self._eid), event))  # type: ignore[misc]
        return event

    def skip(self, time: float) -> bool:
        """Let the time pass up to `time` at once, if nothing is due until then; whether it has."""
        if self._queue and self._queue[0][0] <= time:
            return False
        self._now = time
        return True

    def call(self, time: float, what: Callable[[Any], None], value: Any = None, priority: int = ARRIVAL) -> None:
        """Have `what(value)` called at `time`, s, not before now."""
        # in the queue an event takes twice as long as its function: this is one without an event
        due = time if time > self._now else self._now
        heappush(self._queue, (due, priority, next(self._eid), None, what, value))  # type: ignore[misc]

    def step(self) -> None:
        """Let the next event or call happen."""
        queue: list[Any] = self._queue
        if queue and queue[0][3] is None:
            self._now, _, _, _, what, value = heappop(queue)
            what(value)
        else:
            super().step()

"""Events of a streamed answer, and how many tokens each of them carries.

Most servers send one token an event. With speculative decoding, a stream interval, or a server process that lags, an
event carries several: they have one time, and what a client sees as a gap lies between events, not between tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from sim.run import Run  # not when run: a load generator counts tokens and needs no tables

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ALIKE = 1.05  # ratio of tokens an event: up to this, their gaps differ by no more than the goal for ITL (5 %)


def spread(tokens: int, events: int) -> list[int]:
    """So many tokens over so many events, as evenly as whole numbers allow.

    The first event has at least one; with fewer tokens than events the last has one too (but for a single token).
    """
    if tokens >= events:
        edges = -(-tokens * np.arange(events + 1) // events)
        counts: list[int] = np.diff(edges).tolist()
        return counts
    carrying = [0] * events
    for place in np.rint(np.linspace(0, events - 1, tokens)).astype(int).tolist():
        carrying[place] = 1
    return carrying


def event_times(times: Floats, carried: Ints | None) -> Floats:
    """The times of the events behind token times; `carried` is the tokens of each event (None: one token an event)."""
    if carried is None:
        return times
    firsts: Floats = times[np.cumsum(carried) - carried]
    return firsts


def merged(carried: Ints | None) -> int:
    """How many of a stream's tokens came in an event with others."""
    return 0 if carried is None else int(carried[carried > 1].sum())


def tokens_per_event(run: Run) -> float:
    """The mean over all events of a run's streams; 1.0 where nothing was streamed."""
    if run.token_times is None or run.event_tokens is None:
        return 1.0
    tokens = sum(map(len, run.token_times))
    events = sum(
        len(times) if carried is None else len(carried)
        for times, carried in zip(run.token_times, run.event_tokens, strict=True)
    )
    return tokens / events if events else 1.0


def alike(first: float, second: float) -> bool:
    """Whether gaps between events of so many tokens each are the same quantity."""
    return max(first, second) <= ALIKE * min(first, second)


def between_events(run: Run) -> str | None:
    """What a reader of the run's ITL must know; None where every event carries one token."""
    if run.token_times is None or run.event_tokens is None:
        return None
    return f"ITL is the time between events; an event carries {tokens_per_event(run):.3g} tokens on average"

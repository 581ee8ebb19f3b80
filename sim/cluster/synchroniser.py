"""How far a replayed ladder is behind its recording: the point of the server's round counts, not the time of day.

Users of equal lengths go round in lock-step groups, and whom a new user joins depends on where in their round the
groups are just then. A model that is half a percent slow is after a minute anywhere in the round, and so is one of a
noisy machine: users added at the recorded *times* would be added at a random point, and the difference from the
recording would be the luck of it. Users of unequal lengths have no round; of theirs only the nearest answer is looked
for, and the next one is not waited for if that has been already.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import pandas as pd
from simpy import Event

from sim.cluster.clients import Clients
from sim.cluster.clock import Clock
from sim.model.request import Request
from sim.model.status import Status

ROUNDED = 2e-6  # s: more than files round times by
_ROUNDS = 2  # an answer is waited for as long as this many took in the recording


class Synchroniser:
    """Follows the answers of a simulated ladder; `late` is how far it is behind, s (negative: ahead)."""

    def __init__(self, clock: Clock, clients: Clients, recorded: pd.DataFrame):
        answers = recorded[recorded["status"] == Status.OK].sort_values("last_token")
        self._ended = answers["last_token"].to_numpy(np.float64)
        self._took = self._ended - answers["sent"].to_numpy(np.float64)
        self._users = answers["user"].to_numpy()
        self._alike = len(answers[["prompt_tokens", "output_tokens"]].drop_duplicates()) == 1
        self._clock = clock
        self._latest: dict[int, float] = {}  # when each user's latest answer ended
        self._awaited: tuple[int, float, Event] | None = None
        self.late = 0.0
        clients.on_ended = self._on_ended

    def reach(self, time: float) -> Generator[Event, Any, None]:
        """Pass the time until the simulation is where the recording was at `time`, s: as long after the same user's
        answer as the last one before it had ended then."""
        last = int(np.searchsorted(self._ended, time)) - 1
        if last >= 0:
            ended, took = float(self._ended[last]), float(self._took[last])
            earliest = ended + self.late - took / 2
            if self._alike:  # one that ended too long ago will be here again a round later
                earliest = max(earliest, self._clock.now - (time - ended) - ROUNDED)
            patience = _ROUNDS * took if self._alike else took
            found = yield from self._answer(int(self._users[last]), earliest, patience)
            now = self._clock.now - time
            self.late = now if found is None else max(now, found - ended)
        yield self._clock.at(time + self.late)

    def _answer(self, user: int, earliest: float, patience: float) -> Generator[Event, Any, float | None]:
        """When this user's next answer from `earliest` on ends; None if that takes longer."""
        if self._latest.get(user, -np.inf) >= earliest:
            return self._latest[user]
        ended = self._clock.event()
        self._awaited = user, earliest, ended
        happened = yield ended | self._clock.at(max(earliest, self._clock.now) + patience)
        self._awaited = None
        return float(happened[ended]) if ended in happened else None

    def _on_ended(self, request: Request, ended: float) -> None:
        if request.status != Status.OK:
            return
        self._latest[request.user] = ended
        if self._awaited is not None:
            user, earliest, event = self._awaited
            if request.user == user and ended >= earliest and not event.triggered:
                event.succeed(ended)

"""How many tokens each event of a streamed answer carries, by the server's counts wherever it sends them.

Some servers send a running count (`usage` in every event), others only a total at the end. With running counts, an
event's tokens are their difference. With a total only, it decides which events with empty text are tokens; if there are
still too few or too many events, the total is spread evenly over them (speculative decoding) and the record says so.
Without any count, an event with output is taken for one token, unless earlier answers with counts show otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sim.results.events import alike, spread

# Kinds of events: nothing, output, empty output, empty output with a finish reason (often the model's end token), and a
# role only (a token only if output or empty output came before).
NONE, OUTPUT, EMPTY, CLOSING, OPENING = range(5)


class EventProfile:
    """What answers with counts have shown about a server: `empty`, whether its events with empty text are tokens, and
    `each`, how many tokens an event carries. It is used for answers that broke off before their count."""

    def __init__(self) -> None:
        self.empty, self.each = False, 1.0
        self._total, self._kinds = 0, [0] * (OPENING + 1)

    def learn(self, kinds: Sequence[int], total: int) -> None:
        """Take a complete answer of `total` tokens into account."""
        self._total += total
        for kind in kinds:
            self._kinds[kind] += 1
        output, empty, closing = (self._kinds[kind] for kind in (OUTPUT, EMPTY, CLOSING))
        self.empty = self._total > output + closing
        each = self._total / max(1, output + empty if self.empty else output)
        self.each = 1.0 if alike(each, 1.0) or (each > 1.0 and not self.empty) else each


class TokenCounts(NamedTuple):
    """The tokens of an answer: the time of each, how many came with each event that carried any, and whether they were
    spread evenly over the events."""

    times: list[float]
    carried: list[int]
    spread: bool


class TokenCounter:
    """Counts the tokens of one answer. `times` is provisional while the answer arrives; `finish` gives the result."""

    def __init__(self, profile: EventProfile):
        self.times: list[float] = []
        self.last_count: int | None = None  # of the server
        self._profile = profile
        self._at: list[float] = []
        self._kinds: list[int] = []
        self._counts: list[int | None] = []
        self._ahead = 0.5  # fractional tokens of the events so far; starts at 0.5 to round to the nearest

    @property
    def begun(self) -> bool:
        """Whether an event that may be a token has arrived."""
        return any(self._kinds)

    def add(self, at: float, kind: int, count: int | None) -> None:
        """Add an event that arrived at `at` s, with the server's running count if it sent one."""
        if kind == OPENING and any(self._kinds):
            kind = EMPTY
        self._at.append(at)
        self._kinds.append(kind)
        self._counts.append(count)
        profile = self._profile
        if count is not None:
            self.last_count = count
            if kind in (OUTPUT, EMPTY):
                self.times += [at] * (count - len(self.times))
        elif kind == OUTPUT and profile.each == 1.0:
            self.times.append(at)
        elif kind == OUTPUT or (kind == EMPTY and profile.empty):
            self._ahead += profile.each
            whole = int(self._ahead)
            self._ahead -= whole
            self.times += [at] * whole

    def finish(self, complete: bool, expected: int | None = None) -> TokenCounts:
        """The tokens of the answer. `expected` is the length that a `complete` answer without a count must have."""
        kinds, counts = self._kinds, self._counts
        shares = by_running_counts(kinds, counts, self._profile, complete)
        guessed = False
        if shares is None:
            total = (expected if self._stale() else self.last_count) if complete else None
            if total == 0 and OUTPUT in kinds:  # a count that is never filled in
                total = expected
            if total is None:
                shares, guessed = by_profile(kinds, self._profile)
            else:
                shares, guessed = by_total(kinds, total)
                if self.last_count == total:
                    self._profile.learn(kinds, total)
        carried = [n for n in shares if n]
        times = [at for at, n in zip(self._at, shares, strict=True) for _ in range(n)]
        return TokenCounts(times, carried, guessed)

    def _stale(self) -> bool:
        """Whether the last count is not the total: output came after it, or there was no count."""
        last = max((i for i, count in enumerate(self._counts) if count is not None), default=-1)
        return OUTPUT in self._kinds[last + 1 :]


def by_running_counts(
    kinds: Sequence[int], counts: Sequence[int | None], profile: EventProfile, complete: bool
) -> list[int] | None:
    """Tokens of each event from the server's running counts; None if the counts are not running counts.

    They are not if a count decreases, if the first output is not counted with its event, if most events with output do
    not increase the count, or if a complete answer has output after the last count.
    """
    shares = [0] * len(kinds)
    waiting: list[int] = []
    counted = told = 0
    for i, (kind, count) in enumerate(zip(kinds, counts, strict=True)):
        if kind not in (NONE, OPENING):
            waiting.append(i)
        if count is None:
            continue
        told += kind == OUTPUT
        if count < counted:
            return None
        if waiting:
            found, _ = by_total([kinds[j] for j in waiting], count - counted)
            for j, n in zip(waiting, found, strict=True):
                shares[j] = n
            last, waiting = waiting[-1], []
        elif counted:
            shares[last] += count - counted
        elif count:
            return None  # tokens before any event that could carry them
        counted = count
    output = [i for i, kind in enumerate(kinds) if kind == OUTPUT]
    if 2 * told < len(output) or not output or not shares[output[0]]:
        return None
    if 2 * sum(shares[i] > 0 for i in output) < len(output):
        return None
    if any(kinds[i] == OUTPUT for i in waiting):
        if complete:
            return None
        found, _ = by_profile([kinds[i] for i in waiting], profile)
        for j, n in zip(waiting, found, strict=True):
            shares[j] = n
    return shares


def by_total(kinds: Sequence[int], total: int) -> tuple[list[int], bool]:
    """Tokens of each event when only the `total` is known, and whether they were spread evenly."""
    shares = [0] * len(kinds)
    output = [i for i, kind in enumerate(kinds) if kind == OUTPUT]
    likely = [*output, *_nearest(kinds, EMPTY, output), *_nearest(kinds, CLOSING, output)]
    if len(output) <= total <= len(likely):
        for i in likely[:total]:
            shares[i] = 1
        return shares, False
    carriers = sorted(output if total < len(output) else [i for i in likely if kinds[i] != CLOSING] or likely)
    for i, n in zip(carriers, spread(total, len(carriers)) if carriers else [], strict=True):
        shares[i] = n
    return shares, len(carriers) > 1


def by_profile(kinds: Sequence[int], profile: EventProfile) -> tuple[list[int], bool]:
    """Tokens of each event of an answer without counts, and whether they were spread evenly."""
    carriers = sum(kind == OUTPUT or (kind == EMPTY and profile.empty) for kind in kinds)
    found, _ = by_total([NONE if kind == EMPTY and not profile.empty else kind for kind in kinds], carriers)
    if profile.each == 1.0 or not carriers:
        return found, False
    places = [i for i, n in enumerate(found) if n]
    for i, n in zip(places, spread(max(1, round(profile.each * carriers)), carriers), strict=True):
        found[i] = n
    return found, True


def _nearest(kinds: Sequence[int], kind: int, output: Sequence[int]) -> list[int]:
    """The events of a kind, nearest to the output first: events long before or after it are least likely tokens."""
    places = [i for i, each in enumerate(kinds) if each == kind]
    if not output:
        return places
    return sorted(places, key=lambda i: max(output[0] - i, i - output[-1], 0))

"""Which events of a streamed answer carry tokens, and how many: by the server's count wherever it gives one.

A server may count as it goes (`usage` in every event), or only in the end. With counts in every event, an event's
tokens are their difference. The total alone decides which events with empty text are tokens; where events are still too
few or too many, it is spread over them evenly (speculative decoding) and the record says so. Without any count, an
event with output is a token, as it was in the answers that did have one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sim.results.events import alike, spread

# What an event is: with output, with empty output, with empty output and the reason for the end (often the model's end
# token), with nothing but a role (a token only where something like it came before).
NONE, OUTPUT, EMPTY, CLOSING, OPENING = range(5)


class Habit:
    """What the answers that were counted show of a server: whether its events with empty text are tokens, and how many
    tokens an event carries. It tells the tokens of an answer that broke off before its count came."""

    def __init__(self) -> None:
        self.empty, self.each = False, 1.0
        self._total, self._kinds = 0, [0] * (OPENING + 1)

    def learn(self, kinds: Sequence[int], total: int) -> None:
        """Take in a whole answer of `total` tokens."""
        self._total += total
        for kind in kinds:
            self._kinds[kind] += 1
        output, empty, closing = (self._kinds[kind] for kind in (OUTPUT, EMPTY, CLOSING))
        self.empty = self._total > output + closing
        each = self._total / max(1, output + empty if self.empty else output)
        self.each = 1.0 if alike(each, 1.0) or (each > 1.0 and not self.empty) else each


class Counted(NamedTuple):
    """An answer's tokens: when each came, how many came with each event that has some, and whether that is a guess."""

    times: list[float]
    carried: list[int]
    spread: bool


class Counter:
    """The tokens of one answer. `times` is what can be said while it comes; `settle` says what is known in the end."""

    def __init__(self, habit: Habit):
        self.times: list[float] = []
        self.told: int | None = None  # the server's last count
        self._habit = habit
        self._at: list[float] = []
        self._kinds: list[int] = []
        self._counts: list[int | None] = []
        self._ahead = 0.5  # tokens of the events so far that no whole token stands for: rounds to the nearest

    @property
    def begun(self) -> bool:
        """Whether an event has come that may be a token."""
        return any(self._kinds)

    def hear(self, at: float, kind: int, count: int | None) -> None:
        """An event at `at` s, with the server's running count where it gave one."""
        if kind == OPENING and any(self._kinds):
            kind = EMPTY
        self._at.append(at)
        self._kinds.append(kind)
        self._counts.append(count)
        habit = self._habit
        if count is not None:
            self.told = count
            if kind in (OUTPUT, EMPTY):
                self.times += [at] * (count - len(self.times))
        elif kind == OUTPUT and habit.each == 1.0:
            self.times.append(at)
        elif kind == OUTPUT or (kind == EMPTY and habit.empty):
            self._ahead += habit.each
            whole = int(self._ahead)
            self._ahead -= whole
            self.times += [at] * whole

    def settle(self, complete: bool, asked: int | None = None) -> Counted:
        """The tokens as they were. Of a `complete` answer without a count, `asked` is how many it must have had."""
        kinds, counts = self._kinds, self._counts
        shares = running(kinds, counts, self._habit, complete)
        guessed = False
        if shares is None:
            total = (asked if self._stale() else self.told) if complete else None
            if total == 0 and OUTPUT in kinds:  # a count that does not count
                total = asked
            if total is None:
                shares, guessed = by_habit(kinds, self._habit)
            else:
                shares, guessed = share_out(kinds, total)
                if self.told == total:
                    self._habit.learn(kinds, total)
        carried = [n for n in shares if n]
        times = [at for at, n in zip(self._at, shares, strict=True) for _ in range(n)]
        return Counted(times, carried, guessed)

    def _stale(self) -> bool:
        """Whether output came after the last count, which is then no total; or there was none."""
        last = max((i for i, count in enumerate(self._counts) if count is not None), default=-1)
        return OUTPUT in self._kinds[last + 1 :]


def running(kinds: Sequence[int], counts: Sequence[int | None], habit: Habit, complete: bool) -> list[int] | None:
    """The tokens of every event by the server's running counts; None where it does not count as it goes.

    It does not where counts fall, where the first output is not counted yet when it comes, where most output comes
    without a token of its own, and where a complete answer has output after the last count.
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
            found, _ = share_out([kinds[j] for j in waiting], count - counted)
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
        found, _ = by_habit([kinds[i] for i in waiting], habit)
        for j, n in zip(waiting, found, strict=True):
            shares[j] = n
    return shares


def share_out(kinds: Sequence[int], total: int) -> tuple[list[int], bool]:
    """So many tokens of each event, where `total` is all that is known, and whether they were spread evenly."""
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


def by_habit(kinds: Sequence[int], habit: Habit) -> tuple[list[int], bool]:
    """The tokens of each event of an answer that nobody counted, and whether they were spread evenly."""
    carriers = sum(kind == OUTPUT or (kind == EMPTY and habit.empty) for kind in kinds)
    found, _ = share_out([NONE if kind == EMPTY and not habit.empty else kind for kind in kinds], carriers)
    if habit.each == 1.0 or not carriers:
        return found, False
    places = [i for i, n in enumerate(found) if n]
    for i, n in zip(places, spread(max(1, round(habit.each * carriers)), carriers), strict=True):
        found[i] = n
    return found, True


def _nearest(kinds: Sequence[int], kind: int, output: Sequence[int]) -> list[int]:
    """The events of a kind, those between events with output first: what comes long before or after is least likely one
    of the tokens."""
    places = [i for i, each in enumerate(kinds) if each == kind]
    if not output:
        return places
    return sorted(places, key=lambda i: max(output[0] - i, i - output[-1], 0))

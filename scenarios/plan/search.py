"""The smallest number of replicas that keeps the SLOs, and the largest load that a fleet bears: one bisection.

A search asks for draws and is told which of them keep the SLOs; it knows neither clock nor machine. It is a generator,
so that the draws that several searches want next are simulated together. More replicas are taken to be better, and so
is less load: what was tested at two neighbours holds beyond them.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from itertools import count
from typing import NamedTuple

from scenarios.plan.sequential import BATCH, SequentialTest

Asked = Sequence[tuple[int, int]]  # (place, draw): draw 0 has the central values of the calibration
Answers = Sequence[bool]


class Found(NamedTuple):
    """The first place that passes and the tests made, by place. `place` is None where none up to the highest does."""

    place: int | None
    tests: Mapping[int, SequentialTest]

    @property
    def undecided(self) -> list[int]:
        """The places where the most draws gave no decision."""
        return [place for place, test in self.tests.items() if test.decision is None]


def first_place(
    low: int, high: int, goal: float, order: Sequence[int], guess: int | None = None
) -> Generator[Asked, Answers, Found]:
    """The first place from `low` to `high` that passes the sequential test, verified there and at the one before.

    `order` are the draws, in the random order in which every place is asked them. Without a `guess` the central draw
    gives one, by bisection. A place without a decision does not pass.
    """
    near = guess if guess is not None else (yield from _central(low, high))
    tests: dict[int, SequentialTest] = {}
    fails, passes = low - 1, high + 1
    at, stride = min(max(near, low), high), 1
    while passes - fails > 1:
        tests[at] = yield from _tested(at, goal, order)
        if tests[at].decision:
            passes = at
        else:
            fails = at
        if fails >= low and passes <= high:
            at = (fails + passes) // 2
        else:  # one side is still open: strides double until it is closed
            at = max(passes - stride, low) if passes <= high else min(fails + stride, high)
            stride *= 2
    return Found(passes if passes <= high else None, tests)


def _central(low: int, high: int) -> Generator[Asked, Answers, int]:
    """The first place that the central draw keeps; `high` if it keeps none."""
    while low < high:
        middle = (low + high) // 2
        (kept,) = yield [(middle, 0)]
        low, high = (low, middle) if kept else (middle + 1, high)
    return low


def _tested(place: int, goal: float, order: Sequence[int]) -> Generator[Asked, Answers, SequentialTest]:
    test = SequentialTest(goal)
    for begin in count(0, BATCH):
        draws = order[begin : begin + BATCH]
        if test.over or not draws:
            return test
        kept = yield [(place, draw) for draw in draws]
        test = test.after(sum(kept), len(kept))
    raise AssertionError

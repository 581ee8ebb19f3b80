"""How much a warning matters to the number that was asked for, and which are shown first.

A forecast's band holds what its draws hold. So the order is: what makes the number one of something else; what moves it
beyond its band; what already widens the band; how an input was read. Files of format 1 keep warnings as sentences, in
the order in which they were found: a kind is known by words of its sentence. Unknown sentences, a user's own in
`warnings:` among them, rank with those that move the number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import IntEnum

SHOWN = 3  # as many as are read


class Severity(IntEnum):
    """What a warning does to the number; the first matters most."""

    WRONG = 0  # it is a number of something else: another machine, server or traffic, or nothing steady
    MOVED = 1  # it is off by an amount that its band does not know
    WIDE = 2  # its band knows, and is wider for it
    NOTE = 3  # how an input was read: nothing is off


# Words that only sentences of one kind have. A test looks for each in the source, so that none outlives its sentence.
KINDS: tuple[tuple[Severity, tuple[str, ...]], ...] = (
    (
        Severity.WRONG,
        (
            "no steady state from",
            "the step times are those of another",
            "nobody measured these step times",
            "pads its batches",
            "does not pad its batches",
            "answered requests of other clients",
            "other traffic runs on it",
            "no simulated machine comes near the run",
            "the figures do not hold together",
            "no form here follows this table",
            "does not show what it was fitted to",
            "not of the machine that",
            "counts as outside its tolerance",
            "are not of the same",
            "no request was completed in the window",
            "the server stopped answering",
            "several servers behind one address",
            "(--as)",
            "scheduled here as",
            "its steps are scheduled as",
        ),
    ),
    (
        Severity.MOVED,
        (
            "extrapolated",
            "client-limited",
            "unhealthy",
            "requests failed",
            "rates are too low",
            "requests/s were sent and",
            "shorter than three answers",
            "times as long as a request",
            "refuses requests longer than its limits",
            "speak against that",
            "can move p95 by half",
            "batches were larger than they look",
            "its steps look longer",
            "the machine was",
            "could not be checked against any",
        ),
    ),
    (
        Severity.WIDE,
        (
            "do not pin down",
            "of the steps are left out: their tokens came",
            "cannot be told apart",
            "hardly told apart",
            "moved together",
            "few machines show the figures",
            "show the rest",
            "two patterns are stable",
            "whose luck decides",
            "look alike",
            "off by more than their bands say",
            "no step was seen",
        ),
    ),
    (
        Severity.NOTE,
        (
            "are taken to have come back at output_attained",
            "are taken to have come back in full",
            "do not tell noise from step to step",
            "was read off a plot by eye",
            "tells neither",
            "times neither",
            "stands in for it",
            "says why they ended, is left out",
            "are counted once",
            "the last line was torn",
            "does not repeat",
            "the forecast draws its own requests",
            "s are replayed (load.settle, load.seconds)",
            "has grown since it was fitted",
            "is taken for a run that was fitted",
        ),
    ),
)
_BEYOND = re.compile(r"([\d,.]+) [^\d();]*\(calibrated (?:up to|from) ([\d,.]+)")


def severity(text: str) -> Severity:
    """What a warning does to the number."""
    for level, kinds in KINDS:
        if any(words in text for words in kinds):
            return level
    return Severity.MOVED


def ranked(texts: Iterable[str]) -> list[str]:
    """Each once, those that move the number most first; equals stay in the order given."""
    return sorted(dict.fromkeys(texts), key=lambda text: (severity(text), -_factor(text)))


def _factor(text: str) -> float:
    """How far beyond the calibrated range a sentence says that it goes, as a factor; 1 where it says nothing."""
    found = (
        (float(asked.replace(",", "")), float(known.rstrip(".,").replace(",", "")))
        for asked, known in _BEYOND.findall(text)
    )
    return max((max(asked / known, known / asked) for asked, known in found if asked and known), default=1.0)


def folded(texts: Iterable[str], rest: str, most: int | None = SHOWN) -> list[str]:
    """The lines to be shown of some warnings: the `most` that matter most (None: all), and how many more there are;
    `rest` says where those are."""
    order = ranked(texts)
    shown = order[:most]
    more = len(order) - len(shown)
    return [f"warning: {text}" for text in shown] + ([f"warning: and {more} more; {rest}"] if more else [])

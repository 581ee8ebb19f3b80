"""What a column of times says, in whatever form it was written: numbers of a unit, unix times, or times of the day.

Times are kept as exact integers wherever they were written as such: in nanoseconds since 1970 a float is off by more
than 100 ns, and only differences between times matter in the end.
"""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ISO = re.compile(
    r"(?P<whole>\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d)?)?)(?:[.,](?P<part>\d+))?\s*(?P<zone>Z|[+-]\d\d:?\d\d)?"
)
_MOST = 10**30  # more is no time, and no number of tokens
# A number within these bounds is a unix time between 2001 and 2128, of this unit.
_UNIX = {"s": (1e9, 5e9), "ms": (1e12, 5e12), "us": (1e15, 5e15), "ns": (1e18, 5e18)}


def number(value: object) -> int | float | None:
    """A number, exact where it was written as a whole one; None for what is none, or not finite."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value if abs(value) < _MOST else None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if not isinstance(value, str) or "_" in value or len(value) > 40:
        return None
    try:
        return number(int(value))
    except ValueError:
        pass
    try:
        found = float(value)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def nanoseconds(value: object) -> int | None:
    """An ISO 8601 time, to the last digit that was written, as ns since 1970; one without a zone is taken for UTC."""
    found = _ISO.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        return None
    try:
        of_day = "" if ":" in found["whole"] else "T00:00"
        whole = datetime.fromisoformat(found["whole"] + of_day + (found["zone"] or "+00:00"))
    except ValueError:
        return None
    return (whole - _EPOCH) // timedelta(seconds=1) * 10**9 + int((found["part"] or "0").ljust(9, "0")[:9])


def has_zone(value: object) -> bool:
    """Whether an ISO 8601 time says its zone."""
    found = _ISO.fullmatch(value.strip()) if isinstance(value, str) else None
    return found is not None and found["zone"] is not None


def unix_unit(value: int | float) -> str | None:
    """The unit of which a number would be a unix time of our days, if there is one."""
    return next((unit for unit, (low, high) in _UNIX.items() if low <= value < high), None)

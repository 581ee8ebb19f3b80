"""The questions people ask: scenarios in; forecasts, comparisons and reports out.

Reading guide: `load` turns YAML into a checked `Scenario` (`shape`, `checks`); `forecast` simulates it many times and
says what to expect, with bands; `cost` puts a price on it; `plots` and `report` show it; `cli` has one command per
question.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scenarios.load import load, shipped

__all__ = ["load", "shipped"]

_HOME = {"load": "scenarios.load", "shipped": "scenarios.load"}


def __getattr__(name: str) -> Any:
    """Names are fetched when asked for: `servecast --help` must not wait for pandas."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

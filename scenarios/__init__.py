"""The questions people ask: scenarios in; forecasts, comparisons and reports out.

Reading guide: `load` turns YAML into a checked `Scenario` (`checks`); `simulation` runs its ladder many times, each a
`replicate`, and sums up in a `forecast` what to expect, with bands; `binding` says what limits it, `cost` what it
costs; `plots`, `overlays`, `tables` and `report` show it; `foreign` makes runs of other tools' results; `cli` has one
command per question.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scenarios.load import load, shipped

if TYPE_CHECKING:
    from scenarios.simulation import simulate

__all__ = ["load", "shipped", "simulate"]


def __getattr__(name: str) -> Any:
    """`simulate` is fetched when asked for: reading a scenario, and `servecast --help`, need not wait for pandas."""
    if name == "simulate":
        from scenarios.simulation import simulate

        return simulate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The questions people ask: scenarios in, forecasts, comparisons and reports out.

Reading guide: `load` turns YAML into a checked `Scenario` (`shape`, `checks`); `cli` has one command per question.
"""

from scenarios.load import load, shipped

__all__ = ["load", "shipped"]

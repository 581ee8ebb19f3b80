"""Results as CSV, for a spreadsheet or a notebook: full precision, one line per load and metric."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import msgspec

from scenarios.forecast.forecast import Estimate, Forecast, Row, named
from scenarios.forecast.plan import crossing_row
from scenarios.forecast.slo import NOWHERE

if TYPE_CHECKING:
    from scenarios.compare.comparison import Comparison


def curves_as_csv(forecasts: Iterable[Forecast]) -> str:
    """The curves as CSV, one line per scenario, load and metric."""
    fields = Row.__struct_fields__
    return _warned(fields, [(f, [getattr(row, name) for name in fields]) for f in forecasts for row in f.curves])


def rows_as_csv(comparison: Comparison) -> str:
    """A comparison as CSV, one line per load and metric; the centres of two modes are joined by a space."""
    rows = comparison.rows
    fields = [f.encode_name for f in msgspec.structs.fields(rows[0])] if rows else []
    lines = (msgspec.structs.astuple(msgspec.structs.replace(row, modes=None)) for row in rows)
    modes = (" ".join(f"{centre:.6g}" for centre in row.modes or ()) for row in rows)
    return _warned(fields, [(comparison, [*line[:-1], two]) for line, two in zip(lines, modes, strict=True)])


def _warned(fields: Sequence[str], lines: Sequence[tuple[Forecast | Comparison, list[object]]]) -> str:
    """Lines as CSV; with a column `warning` if something has a warning about all its numbers."""
    if not any(of.assumptions for of, _ in lines):
        return _csv(fields, (line for _, line in lines))
    return _csv((*fields, "warning"), ([*line, "; ".join(map(str, of.assumptions))] for of, line in lines))


PLAN = (
    *("scenario", "load", "metric", "limit", "probability", "usd_per_1000_requests", "low", "high"),
    *("usd_per_hour", "usd_per_month", "usd_per_year"),
    *("kept_at", "broken_at", "crossing", "crossing_low", "crossing_high", "breaks"),
)


def plan_as_csv(forecasts: Iterable[Forecast]) -> str:
    """What each load costs and which SLO it keeps, as CSV: one line per scenario, load and SLO.

    The machine's cost, and the loads at which every SLO is kept and one is broken, are the same in all lines of a
    scenario.
    """
    lines: list[tuple[Forecast | Comparison, list[object]]] = []
    for f in forecasts:
        costs = {row.at: row.per_1000_requests for row in f.cost}
        machine = [f.cost[0].usd_per_hour, f.cost[0].usd_per_month, f.cost[0].usd_per_year] if f.cost else [None] * 3
        found = crossing_row(f)
        at = found["crossing"] or NOWHERE
        borne = [found["kept_at"], found["broken_at"], at.value, at.low, at.high, found["breaks"]]
        for p in f.slo:
            price = costs.get(named(p.load, f.unit), Estimate(value=None, low=None, high=None))
            one = [f.name, p.load, p.metric, p.limit, p.probability, price.value, price.low, price.high]
            lines.append((f, [*one, *machine, *borne]))
    return _warned(PLAN, lines)


def _csv(fields: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(fields)
    writer.writerows(lines)
    return text.getvalue()

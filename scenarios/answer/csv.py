"""Results as CSV, for a spreadsheet or a notebook: full precision, one line per load and metric."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import msgspec

from scenarios.forecast.forecast import Forecast, Row

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
        return as_csv(fields, (line for _, line in lines))
    return as_csv((*fields, "warning"), ([*line, "; ".join(map(str, of.assumptions))] for of, line in lines))


def as_csv(fields: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """Lines as CSV, below the names of their fields."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(fields)
    writer.writerows(lines)
    return text.getvalue()

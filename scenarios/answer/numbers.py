"""Numbers as text: as many digits as the band of a value justifies, and each metric in its customary unit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from scenarios.forecast.forecast import Estimate, Row

if TYPE_CHECKING:
    from scenarios.compare.comparison import Row as ComparisonRow


def decimals(low: float, high: float) -> int:
    """The decimals that a band justifies: one digit of its half-width (two if it is a 1), three of the value."""
    half, size = abs(high - low) / 2, max(abs(low), abs(high))
    three = 2 - math.floor(math.log10(size)) if size else 2
    if half == 0:
        return max(0, min(2, three))
    place = -math.floor(math.log10(half))
    return max(0, min(three, place + 1 if half < 2 * 10.0**-place else place))


def parts(estimate: Estimate | Row, scale: float = 1.0) -> tuple[str, str]:
    """A value and its band, `1.10` and `0.96–1.21`; a dash and nothing where there is no value."""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return "–", ""
    value, low, high = (scale * x for x in (estimate.value, estimate.low, estimate.high))
    n = decimals(low, high)
    if 0 < abs(value) < 1:
        n = max(n, -math.floor(math.log10(abs(value))))
    if f"{low:.{n}f}" == f"{high:.{n}f}":
        return f"{value:.0f}" if value == int(value) else f"{value:.{n}f}", ""
    return f"{value:.{n}f}", f"{low:.{n}f}–{high:.{n}f}"


def with_band(estimate: Estimate | Row, scale: float = 1.0) -> str:
    """`1.10 0.96–1.21`, as `parts` has them."""
    return " ".join(part for part in parts(estimate, scale) if part)


def percent(share: float | None, sign: str = "", digits: int = 1) -> str:
    """A share as `1.2%`, with `sign` `+` as `+1.2%`; a dash where there is none."""
    if share is None or math.isnan(share):
        return "–"
    return f"{share:{sign}.{digits if abs(share) < 10 else 0}%}"


def simulated(row: ComparisonRow, digits: int = 3) -> tuple[str, str]:
    """A forecast and its band; a dash and nothing where there is none."""
    if row.simulated is None:
        return "–", ""
    if row.low is None or row.high is None:
        return significant(row.simulated, digits), ""
    return significant(row.simulated, digits), f"{significant(row.low, digits)}–{significant(row.high, digits)}"


def significant(value: float, digits: int = 3) -> str:
    """A value with so many significant digits; without an exponent where plain digits are as short."""
    return f"{value:.0f}" if 10.0**digits <= abs(value) < 1e7 else f"{value:.{digits}g}"

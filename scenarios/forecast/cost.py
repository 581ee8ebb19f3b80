"""What a load costs: the price of the machine's hours, per request and per token completed in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from scenarios.forecast.forecast import Cost, Estimate, estimate
from sim.results.curve import OperatingPoint

SECONDS = 3600.0
MONTH, YEAR = 730.0, 8760.0  # hours


def of_the_machine(usd_per_hour: float) -> str:
    """What the machine costs by the hour, the month and the year, in words."""
    return (
        f"${usd_per_hour:,.2f} an hour (${MONTH * usd_per_hour:,.0f} a month of {MONTH:.0f} h, "
        f"${YEAR * usd_per_hour:,.0f} a year)"
    )


def costs(
    usd_per_hour: float, tables: Sequence[pd.DataFrame], knees: Sequence[OperatingPoint], name: Callable[[float], str]
) -> list[Cost]:
    """What the machines' hours come to at the knee and at every rung, USD, with bands over replicates (`tables`, one
    row a rung each).

    `name` puts a load in words. At the knee, which lies between rungs, rates are interpolated by load.
    """
    between = pd.DataFrame([_at(table, knee.load) for table, knee in zip(tables, knees, strict=True)])
    found = [_cost("knee", usd_per_hour, between)]
    together = pd.concat(tables, ignore_index=True)
    for _, rung in together.groupby("rung", sort=True):
        found.append(_cost(name(float(rung["load"].iloc[0])), usd_per_hour, rung))
    return found


def _at(table: pd.DataFrame, load: float) -> dict[str, float]:
    rates = ("rps", "input_tokens_per_s", "output_tokens_per_s")
    return {rate: float(np.interp(load, table["load"], table[rate])) for rate in rates}


def _cost(at: str, usd_per_hour: float, rates: pd.DataFrame) -> Cost:
    def per(amount: float, rate: pd.Series) -> Estimate:
        with np.errstate(divide="ignore"):
            usd = usd_per_hour / SECONDS * amount / rate.to_numpy(dtype=np.float64)
        return estimate(np.where(np.isfinite(usd), usd, np.nan))

    tokens = rates["input_tokens_per_s"], rates["output_tokens_per_s"]
    return Cost(
        at=at,
        usd_per_hour=usd_per_hour,
        per_1000_requests=per(1e3, rates["rps"]),
        per_million_input=per(1e6, tokens[0]),
        per_million_output=per(1e6, tokens[1]),
        per_million_blended=per(1e6, tokens[0] + tokens[1]),
        usd_per_month=MONTH * usd_per_hour,
        usd_per_year=YEAR * usd_per_hour,
    )

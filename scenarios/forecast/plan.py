"""A plan: which load of a forecast meets every SLO, and with what probability; as a row of JSON."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from scenarios.forecast.forecast import Forecast
from scenarios.load.variants import Variant
from sim.model.errors import BadInput


def check_slo(asked: Iterable[Variant]) -> None:
    """Raise `BadInput` for a scenario without an SLO: a plan would have nothing to meet."""
    for variant in asked:
        if not variant.scenario.slo:
            message = "missing; a plan needs an SLO to meet, such as --slo e2e_p95=15"
            raise BadInput(message, path=variant.source, key="slo")


def meets(forecast: Forecast) -> bool:
    """Whether some load of the ladder meets every SLO with the wanted probability."""
    return forecast.crossing is not None and forecast.crossing.kept_at is not None


def plan_row(forecast: Forecast) -> dict[str, Any]:
    """The plan of a forecast as keys of JSON."""
    return {
        "format": 1,
        "name": forecast.name,
        "unit": forecast.unit,
        "slo": forecast.slo,
        "cost": forecast.cost,
        "price": forecast.scenario.price,
        "largest_load": forecast.crossing.kept_at if forecast.crossing else None,
        "engine": forecast.engine,
        "taken_as": forecast.taken_as,
        "flags": forecast.flags,
        "warnings": forecast.warnings,
    } | crossing_row(forecast)


def crossing_row(forecast: Forecast) -> dict[str, Any]:
    """Up to which load the SLOs are met, as keys of JSON; `crossing` is null where it lies beyond the ladder."""
    found = forecast.crossing
    if found is None:
        return {"kept_at": None, "broken_at": None, "crossing": None, "breaks": None}
    load = None if found.load.value is None else found.load
    return {"kept_at": found.kept_at, "broken_at": found.broken_at, "crossing": load, "breaks": found.breaks}

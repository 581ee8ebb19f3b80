"""servecast from Python: load a scenario, simulate it, read runs and calibrations, compute metrics.

A forecast in three lines; strings after the name change keys of the scenario:

>>> import servecast
>>> scenario = servecast.load("llama2-70b-1500-100", "load.users=[1, 8]", "load.seconds=60")
>>> calibration = servecast.read_calibration(scenario.calibration)
>>> forecast = servecast.simulate(scenario, calibration, replicates=19)

Its curves are pandas tables, one row per load:

>>> forecast.table("e2e_p95")["users"].tolist()
[1.0, 8.0]

A run, measured or simulated, is a directory. Its metrics are a table with one row per load:

>>> run = servecast.read_run("data/tgi-0.9.4-router-http/short")
>>> table = servecast.metrics(run)
>>> {"load", "rps", "e2e_p95", "ttft_p95"} <= set(table.columns)
True
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibrate.sources.published import calibrate_published
    from calibrate.sources.step_time_table import calibrate_table
    from calibrate.sources.streamed import calibrate_runs
    from scenarios.forecast.forecast import Forecast, read_forecast
    from scenarios.forecast.simulate import simulate
    from scenarios.load.scenario import load, shipped
    from sim.model.calibration import Calibration, read_calibration
    from sim.results.metrics import table as metrics
    from sim.run import Run, read_run

_PLACES = {  # imported when first used: `import servecast` need not wait for pandas
    "Calibration": "sim.model.calibration:Calibration",
    "Forecast": "scenarios.forecast.forecast:Forecast",
    "Run": "sim.run:Run",
    "calibrate_published": "calibrate.sources.published:calibrate_published",
    "calibrate_runs": "calibrate.sources.streamed:calibrate_runs",
    "calibrate_table": "calibrate.sources.step_time_table:calibrate_table",
    "load": "scenarios.load.scenario:load",
    "metrics": "sim.results.metrics:table",
    "read_calibration": "sim.model.calibration:read_calibration",
    "read_forecast": "scenarios.forecast.forecast:read_forecast",
    "read_run": "sim.run:read_run",
    "shipped": "scenarios.load.scenario:shipped",
    "simulate": "scenarios.forecast.simulate:simulate",
}
__all__ = [
    "Calibration",
    "Forecast",
    "Run",
    "calibrate_published",
    "calibrate_runs",
    "calibrate_table",
    "load",
    "metrics",
    "read_calibration",
    "read_forecast",
    "read_run",
    "shipped",
    "simulate",
]


def __getattr__(name: str) -> Any:
    """The public name, imported from where it lives."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name].split(":")
    return getattr(import_module(module), attribute)

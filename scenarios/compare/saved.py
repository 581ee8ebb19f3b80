"""What servecast has written and reads again: forecasts, plans, runs and comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from scenarios.compare.comparison import Comparison
from scenarios.forecast.forecast import Forecast, read_forecast
from scenarios.plan.answer import Plan, read_plan
from scenarios.progress import read_run_with_progress
from sim.model.errors import BadInput
from sim.model.files.document import Document
from sim.run import Run, read_run

Saved = Forecast | Plan | Run | Comparison
EXPECTED = "a run directory, a forecast, a plan or a comparison"


def read_saved(path: Path) -> Saved:
    """A forecast, a plan, a run or a comparison; of a folder that `simulate`, `plan` or `compare` wrote with `-o`, what
    is in it."""
    if path.is_dir():
        for name in ("forecast.json", "comparison.json"):
            if (path / name).exists() and not (path / "run.json").exists():
                return read_saved(path / name)
        inside = sorted(each.parent.name for each in path.glob("*/forecast.json"))
        if inside and not (path / "run.json").exists():
            raise BadInput(f"holds the forecasts of several scenarios; name {path / inside[0]}", path=path)
        plans = sorted(path.glob("*.plan.json"))
        if plans and not (path / "run.json").exists():
            if len(plans) > 1:
                raise BadInput(f"holds several plans; name {plans[0]}", path=path)
            return read_plan(plans[0])
        return read_run_with_progress(path)
    document = Document(path, EXPECTED)
    if "curves" in document.values:
        return read_forecast(path)
    if "options" in document.values:
        return read_plan(path)
    if "rows" not in document.values:
        raise BadInput(f"expected {EXPECTED}", path=path, line=1)
    try:
        return msgspec.convert(document.values, Comparison)
    except msgspec.ValidationError as e:
        raise BadInput(f"not a comparison: {e}", path=path) from e


def simulated_runs(paths: Sequence[Path], items: Sequence[Saved]) -> dict[str, Run]:
    """The central runs that `simulate -o` wrote beside its forecasts (`items`, read from `paths`), by name."""
    runs = {}
    for path, item in zip(paths, items, strict=True):
        folder = (path if path.is_dir() else path.parent) / "run"
        if isinstance(item, Forecast) and (folder / "run.json").exists():
            run = read_run(folder)
            if run.kind == "simulated":  # not the measured run that a forecast was fitted to
                runs[item.name] = run
    return runs

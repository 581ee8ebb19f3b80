"""Where a scenario's parameters come from: a calibration file, or a fit of its table or published figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from scenarios.load.scenario import origin
from sim.executors import IN_PROCESS, Executor
from sim.model.calibration import Calibration, read_calibration
from sim.model.errors import BadInput
from sim.model.files.atomic import write_file
from sim.model.scenario import Scenario

Progress = Callable[[str, float, int], None]


def calibration_of(
    source: str | Path,
    scenario: Scenario,
    *,
    sets: Sequence[str] = (),
    seed: int = 0,
    executor: Executor = IN_PROCESS,
    progress: Progress = lambda what, done, total: None,
    known: dict[bytes, Calibration] | None = None,
    anew: bool = False,
) -> Calibration:
    """The calibration that a scenario (loaded from `source` with `sets`) names, or one fitted to what it names; with
    `anew` one fitted, whether or not it names a calibration.

    Published figures are fitted on the server of the file they stand in: a what-if that extends that file changes the
    server it asks about, not the one that was measured. `known` keeps those fits: two profiles may share one.
    """
    if scenario.calibration is not None and not anew:
        return read_calibration(Path(scenario.calibration))
    if scenario.table is not None:
        from calibrate.sources.step_time_table import calibrate_table

        declared = scenario.server.declared
        rng = np.random.default_rng(seed)
        return calibrate_table([Path(scenario.table)], rng, machine=scenario.machine, declared=declared)
    measured = origin(source, "published", *sets)
    if not measured.published:
        if scenario.calibration is not None:
            raise BadInput("has a calibration and nothing to fit; expected table or published", path=source)
        raise BadInput("expected calibration, table or published: nothing says how fast the machine is", path=source)
    known = {} if known is None else known
    key = msgspec.json.encode((measured.published, measured.server, measured.machine, seed))
    if key not in known:
        from calibrate.sources.published import SIMULATIONS, calibrate_published

        def tell(done: float) -> None:
            progress("fitting the published figures", done, SIMULATIONS)

        known[key] = calibrate_published(measured, seed, executor=executor, progress=tell)
    return known[key]


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Replace `calibration.json`; the same calibration gives the same bytes."""
    write_file(path, msgspec.json.format(msgspec.json.encode(calibration), indent=1) + b"\n")

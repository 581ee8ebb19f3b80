"""Simulate scenarios many times over: every replicate has its own draw of the parameters and its own random numbers.

At least 99 replicates make the 5 % and 95 % quantiles lie within the sample.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from scenarios.forecast.forecast import Forecast, write_forecast
from scenarios.forecast.replicate import replicate
from scenarios.forecast.size import check_size
from scenarios.forecast.summary import summarise
from scenarios.forecast.transfer import check_transfer, transferred
from scenarios.load.parameters import calibration_of
from scenarios.load.variants import Variant
from sim.cluster.ladder import check_servable
from sim.executors import IN_PROCESS, Executor, Progress, silent
from sim.model.calibration import Calibration, check_suits, read_calibration
from sim.model.errors import BadInput
from sim.model.files.lengths import read_lengths
from sim.model.flags import SCENARIO, Flag
from sim.model.machine import draw_machine
from sim.model.scenario import Scenario
from sim.replicate import tasks_for
from sim.run import Run, write_run

REPLICATES = 99


def simulate(
    scenario: Scenario,
    calibration: Calibration,
    *,
    seed: int = 0,
    replicates: int = REPLICATES,
    executor: Executor = IN_PROCESS,
    progress: Progress = silent,
    changes: Sequence[str] = (),
    taken_as: str | None = None,
    transfer: float | None = None,
    flags: Mapping[str, Flag] | None = None,
) -> Forecast:
    """Forecast a scenario. The same scenario, calibration and seed give the same forecast, whatever the executor.

    `sim.executors.processes` makes an executor of several processes. `progress` hears how many replicates are done;
    `changes` are the `--set` options to be recorded. `flags` says where each flag of the server is from, if not all are
    from the scenario. `transfer` is the relative spread of step times that are taken from another simulated engine.
    `NotTheEngine` for a calibration from runs that are not known to be of the scenario's engine, unless they are
    `taken_as` it.
    """
    check_transfer(calibration, scenario.server.declared, taken_as, transfer, scenario.calibration)
    check_suits(calibration, scenario.server.declared, taken_as, scenario.calibration)
    if transfer is not None:
        calibration = transferred(calibration, transfer, seed)
        changes = [*changes, f"--transfer {transfer:g}"]
    lengths = read_lengths(scenario.workload)
    check_size(scenario, calibration, replicates, lengths)
    check_servable(
        scenario, draw_machine(calibration, scenario.server, None, scenario.machine).server, lengths
    )  # not first by a worker
    tasks = tasks_for(scenario, calibration, seed, range(1, replicates + 1), lengths)
    tables = executor.run(replicate, tasks, progress)
    return summarise(scenario, calibration, tasks, tables, changes, taken_as, flags)


def central_run(scenario: Scenario, calibration: Calibration, seed: int = 0) -> Run:
    """Replicate 0, which has the central values of all parameters: a run to look at, down to whose each step is."""
    (task,) = tasks_for(scenario, calibration, seed, [0], read_lengths(scenario.workload))
    return task.run(members=True)


def simulate_all(
    asked: Sequence[Variant],
    *,
    seed: int,
    replicates: int,
    executor: Executor,
    progress: Callable[[str, float, int], None],
    taken_as: str | None = None,
    transfer: float | None = None,
) -> list[tuple[Forecast, Calibration]]:
    """Forecast scenarios one after another, each with its calibration; what several are fitted to is fitted once.

    `progress` hears what is simulated, how much of it is done, and of how much.
    """
    for variant in asked:  # every error comes before anything runs
        scenario = variant.scenario
        try:
            _ = scenario.served_by.count
        except BadInput as e:  # a range of replicas
            raise BadInput(e.message, path=variant.source, key=e.key) from e
        if scenario.calibration is not None:
            calibration = read_calibration(scenario.calibration)
            check_transfer(calibration, scenario.server.declared, taken_as, transfer, scenario.calibration)
            check_suits(calibration, scenario.server.declared, taken_as, scenario.calibration)
    made = []
    known: dict[bytes, Calibration] = {}
    for variant in asked:
        calibration = calibration_of(
            variant.source,
            variant.scenario,
            sets=variant.sets,
            seed=seed,
            executor=executor,
            progress=progress,
            known=known,
        )

        def tell(done: float, total: int, what: str = f"simulating {variant.scenario.name}") -> None:
            progress(what, done, total)

        forecast = simulate(
            variant.scenario,
            calibration,
            seed=seed,
            replicates=replicates,
            executor=executor,
            progress=tell,
            changes=variant.sets,
            taken_as=taken_as,
            transfer=transfer,
        )
        made.append((forecast, calibration))
    return made


def write_with_run(folder: Path, forecast: Forecast, calibration: Calibration, seed: int, *, steps: bool) -> None:
    """Write a forecast and its central run into a folder: both or neither."""
    written = [name for name, flag in forecast.flags.items() if flag.source == SCENARIO]
    scenario = msgspec.structs.replace(forecast.scenario, written=written)
    run = write_run(central_run(scenario, calibration, seed), folder / "run", steps=steps)
    try:
        write_forecast(folder / "forecast.json", forecast)
    except BaseException:
        shutil.rmtree(run)
        with suppress(OSError):
            folder.rmdir()
        raise

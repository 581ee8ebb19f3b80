"""The plans that scenarios ask for: one for each of their loads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from scenarios.forecast.forecast import named
from scenarios.forecast.transfer import check_transfer, transferred
from scenarios.load.options import Option, check_limits, load_options, single_loads
from scenarios.load.parameters import calibration_of
from scenarios.plan import traffic
from scenarios.plan.answer import Plan
from scenarios.plan.plan import FRESH, make_plan
from sim.executors import IN_PROCESS, Executor
from sim.model.calibration import Calibration, check_suits


def plans_of(
    sources: Sequence[str],
    sets: Sequence[str] = (),
    *,
    seed: int = 0,
    draws: int = FRESH,
    executor: Executor = IN_PROCESS,
    progress: Callable[[str, float, int], None] = lambda what, done, total: None,
    taken_as: str | None = None,
    transfer: float | None = None,
    max_load: bool = False,
    check: Callable[[list[str]], None] = lambda names: None,
) -> list[Plan]:
    """A plan for each load of each scenario (a file or a shipped name, with the changes `sets`); every error in a file
    comes before anything is simulated. `check` is told the names of all plans before that."""
    asked = [(source, load_options(source, *sets)) for source in sources]
    for source, options in asked:
        check_limits(options, source)
    check([at_load[0].scenario.name for _, options in asked for at_load in _at_loads(options, max_load)])
    known: dict[bytes, Calibration] = {}
    found = []
    for source, options in asked:
        calibrations = {}
        for option in options:
            calibration = calibration_of(
                source, option.scenario, sets=sets, seed=seed, executor=executor, progress=progress, known=known
            )
            declared, path = option.scenario.server.declared, option.scenario.calibration
            check_transfer(calibration, declared, taken_as, transfer, path)
            check_suits(calibration, declared, taken_as, path)
            calibrations[option.name] = calibration if transfer is None else transferred(calibration, transfer, seed)
        for at_load in _at_loads(options, max_load):
            found.append(
                make_plan(
                    at_load,
                    calibrations,
                    seed=seed,
                    draws=draws,
                    executor=executor,
                    progress=progress,
                    taken_as=taken_as,
                    max_load=max_load,
                )
            )
    return found


def _at_loads(options: Sequence[Option], max_load: bool) -> list[list[Option]]:
    """The options at each load of their scenario; with `max_load` at the first, where the search begins."""
    loads = [list(at_load) for at_load in zip(*map(single_loads, options), strict=True)]
    if max_load or len(loads) == 1:
        return loads[:1]
    return [[_named(option) for option in at_load] for at_load in loads]


def _named(option: Option) -> Option:
    """The option of a scenario whose name says which of its loads it is."""
    scenario = option.scenario
    name = f"{scenario.name}-{named(traffic.load_of(scenario), traffic.unit(scenario))}".replace(" ", "-").replace(
        "/", "-per-"
    )
    return option._replace(scenario=msgspec.structs.replace(scenario, name=name))

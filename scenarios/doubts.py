"""When not to believe a forecast, in words: beyond the calibration, no steady state, another machine, short windows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from scenarios.compare import humps
from scenarios.forecast import named, unit_of
from sim.calibration import Calibration
from sim.run import Run
from sim.scenario import Scenario
from sim.server import ServerConfig

SLACK = 1.1  # a tenth beyond what was calibrated is no news
WORDS = {
    "prompt_tokens": "prompts of {:,.0f} tokens",
    "batch_prefill_tokens": "prefills of {:,.0f} tokens",
    "sequences": "batches of {:,.0f} requests",
    "context_tokens": "{:,.0f} tokens of context at once",
    "users": "{:,.0f} users",
}


def extrapolated(calibration: Calibration, rung: pd.Series) -> list[str]:
    """What a rung does beyond the calibrated range, in words; `rung` holds medians of the columns of `replicate`."""
    found = []
    for name, words in WORDS.items():
        value = float(rung["load"] if name == "users" else rung[f"max_{name}"])
        if name in calibration.range and value > SLACK * calibration.range[name][1]:
            found.append(f"{words.format(value)} (calibrated up to {calibration.range[name][1]:,.0f})")
    return found


def misfits(run: Run, calibration: Calibration, tables: Sequence[pd.DataFrame]) -> list[str]:
    """Why a calibration may not be a measured run's, after its own doubts; `tables` are those of `forecast_run`."""
    unit = unit_of(run.scenario)
    rungs = [rung for _, rung in pd.concat(tables).groupby("rung", sort=True).median(numeric_only=True).iterrows()]
    found = [*calibration.doubts, *_other_machine(run.scenario, calibration), *_other_padding(run.server, calibration)]
    found += _from_on(
        [extrapolated(calibration, rung) for rung in rungs], [float(rung["load"]) for rung in rungs], unit
    )
    for name, column in (("users", "load"), ("prompt_tokens", "max_prompt_tokens")):
        low = calibration.range.get(name, (0.0, 0.0))[0]
        below = max((x for rung in rungs if SLACK * (x := float(rung[column])) < low), default=None)
        if below is not None and (name != "users" or unit == "users"):
            words = named(below, unit) if name == "users" else WORDS[name].format(below)
            found.append(f"extrapolated: {words} (calibrated from {low:,.0f} on)")
    return found


def unstable(scenario: Scenario, rung: pd.Series) -> bool:
    """Whether an open loop has no steady state here: requests stay behind, or are turned away."""
    open_loop = scenario.load.users is None
    return open_loop and bool(rung["backlog"] > 0.05 or rung["overloaded_rate"] > 0.01)


def doubts(
    scenario: Scenario,
    calibration: Calibration,
    rungs: pd.DataFrame,
    beyond: Sequence[list[str]],
    growing: Sequence[bool],
) -> list[str]:
    """Every reason to doubt a forecast; `rungs` are medians over replicates, one row a rung."""
    unit = unit_of(scenario)
    found = list(scenario.doubts)
    found += _other_machine(scenario, calibration) + _other_padding(scenario.server, calibration)
    loads = [float(load) for load in rungs["load"]]
    found += _from_on(beyond, loads, unit)
    if any(growing):
        first = list(growing).index(True)
        found.append(f"no steady state from {named(loads[first], unit)} on: the queue grows, no latency is quoted")
    seconds = scenario.load.seconds
    long = [load for load, e2e in zip(loads, rungs["e2e_mean"], strict=True) if seconds and seconds < 3 * e2e]
    if long:
        found.append(f"from {named(long[0], unit)} on the window of {seconds:g} s is shorter than three answers")
    refused = [
        load for load, share in zip(loads, rungs["error_rate"] - rungs["overloaded_rate"], strict=True) if share > 0
    ]
    if refused:
        found.append(f"from {named(refused[0], unit)} on the server refuses requests longer than its limits (422)")
    return found + calibration.doubts


def several_patterns(scenario: Scenario, tables: Sequence[pd.DataFrame]) -> list[str]:
    """Loads at which replicates fall into two separate groups: lock-stepped users have more than one stable pattern."""
    together = pd.concat(tables, ignore_index=True)
    found = []
    for _, rung in together.groupby("rung", sort=True):
        for metric, what in (("ttft_p50", "TTFT p50"), ("e2e_p50", "E2E p50")):
            centres = humps(rung[metric].to_numpy(dtype=np.float64))
            if centres is not None:
                at = named(float(rung["load"].iloc[0]), unit_of(scenario))
                found.append(f"at {at} two patterns are stable: {what} about {centres[0]:.2g} or {centres[1]:.2g} s")
                break
    return found


def _from_on(beyond: Sequence[list[str]], loads: Sequence[float], unit: str) -> list[str]:
    first = next((i for i, words in enumerate(beyond) if words), None)
    if first is None:
        return []
    most = max(beyond, key=len)
    return [f"extrapolated from {named(loads[first], unit)} on: {'; '.join(most)}"]


def _other_padding(server: ServerConfig, calibration: Calibration) -> list[str]:
    """Padded batches cost more, and their step times have another form; only runs say which they were."""
    known = {bool(flags["requires_padding"]) for flags in calibration.server if "requires_padding" in flags}
    if not known or server.requires_padding in known:
        return []
    if server.requires_padding:
        return ["this server pads its batches; the calibrated one did not"]
    return ["this server does not pad its batches; the calibrated one did"]


def _other_machine(scenario: Scenario, calibration: Calibration) -> list[str]:
    found = []
    for what, name in (
        ("model", "model"),
        ("gpu", "GPU"),
        ("gpus", "number of GPUs"),
        ("tensor_parallel", "tensor parallelism"),
    ):
        asked, known = getattr(scenario.machine, what), getattr(calibration.machine, what)
        if asked is not None and known is not None and asked != known:
            found.append(f"the step times are those of another {name}: {known}, not {asked}")
    return found

"""Warnings of a forecast: beyond the calibration, no steady state, another machine, short windows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from scenarios.forecast.forecast import SloProbability, named, unit_of
from scenarios.forecast.modes import modes
from sim.model.calibration import Calibration
from sim.model.scenario import Scenario
from sim.model.server import EngineFlags
from sim.model.status import BROKEN
from sim.model.warning import Notice, notice
from sim.model.workload import RequestLengths
from sim.results import metrics
from sim.results.rates import growing
from sim.run import Run

FEW = 200  # answers in a window, of which ten lie beyond its p95
NOTED = 0.01  # share of the requests from which on that is said
SLACK = 1.1  # a tenth beyond what was calibrated is no news
WORDS = {
    "prompt_tokens": "prompts of {:,.0f} tokens",
    "batch_prefill_tokens": "prefills of {:,.0f} tokens",
    "sequences": "batches of {:,.0f} requests",
    "context_tokens": "{:,.0f} tokens of context at once",
    "users": "{:,.0f} users",
}


def above(calibration: Calibration, rung: pd.Series, unit: str, replicas: int = 1) -> dict[str, float]:
    """What lies beyond the upper end of the calibrated range; `rung` holds medians of the columns of `replicate`, and
    `unit` is its load's, which so many replicas share."""
    asked = _asked(rung, unit, WORDS, replicas)
    return {name: x for name, x in asked.items() if x > SLACK * calibration.range.get(name, (0.0, np.inf))[1]}


def below(calibration: Calibration, rung: pd.Series, unit: str, replicas: int = 1) -> dict[str, float]:
    """What lies under the lower end of the calibrated range, of what a ladder does not pass on its way up: its users,
    and its prompts."""
    asked = _asked(rung, unit, ("users", "prompt_tokens"), replicas)
    return {name: x for name, x in asked.items() if SLACK * x < calibration.range.get(name, (0.0, 0.0))[0]}


def _asked(rung: pd.Series, unit: str, names: Iterable[str], replicas: int) -> dict[str, float]:
    users = {"users": float(rung["load"]) / replicas} if unit == "users" else {}  # a rate is no number of users
    return {name: float(rung[f"max_{name}"]) for name in names if name != "users"} | users


def _words(name: str, value: float) -> str:
    return named(value, "users") if name == "users" else WORDS[name].format(value)


def without_draws(calibration: Calibration) -> list[Notice]:
    """A warning where parameters have intervals but no draws: bands then leave out that uncertainty."""
    wide = [name for name, p in calibration.parameters.items() if p.low < p.high]
    if calibration.draws or not wide:
        return []
    return [
        notice(
            "no-draws",
            f"the calibration has no draws, so bands leave out what is not known of its parameters ({', '.join(wide)})",
        )
    ]


def replay_warnings(run: Run, calibration: Calibration, tables: Sequence[pd.DataFrame]) -> list[Notice]:
    """Why a calibration may not be a measured run's, after its own warnings; `tables` are those of `forecast_run`."""
    rungs = pd.concat(tables).groupby("rung", sort=True).median(numeric_only=True)
    found = [*without_draws(calibration), *calibration.warnings, *_other_machine(run.scenario, calibration)]
    found += _other_padding(run.server, calibration)
    measured = [run.rungs[int(rung)] for rung in metrics.table(run)["rung"]]  # those that are replayed, in order
    units = ["requests/s" if measured[int(str(place))].users is None else "users" for place in rungs.index]
    return found + _broken(run) + beyond(calibration, rungs, units)


def _broken(run: Run) -> list[Notice]:
    """A warning if measured requests failed, since simulated ones do not fail."""
    failed = run.requests["status"][run.requests["status"].isin(BROKEN)].value_counts()
    if failed.sum() <= NOTED * len(run.requests):
        return []
    kinds = ", ".join(f"{count} {status}" for status, count in failed.items())
    return [
        notice(
            "requests-failed",
            f"{failed.sum()} of {len(run.requests)} requests failed ({kinds}); in the forecast they are answered",
        )
    ]


def beyond(calibration: Calibration, rungs: pd.DataFrame, units: Sequence[str], replicas: int = 1) -> list[Notice]:
    """From which load on, and up to which, the calibrated range is left; `rungs` are medians over replicates, `units`
    what each of their loads counts."""
    rows = list(zip((rung for _, rung in rungs.iterrows()), units, strict=True))
    over, under = ([leaves(calibration, *row, replicas) for row in rows] for leaves in (above, below))
    since: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for values in over for name in values):
        first, unit = next(row for row, values in zip(rows, over, strict=True) if name in values)
        most, known = max(values.get(name, 0.0) for values in over), calibration.range[name][1]
        words = f"{_words(name, most)} (calibrated up to {known:,.0f})"
        since.setdefault(named(float(first["load"]), unit), []).append(words)
    found = [notice("extrapolated", f"extrapolated from {load} on: {'; '.join(what)}") for load, what in since.items()]
    for name in dict.fromkeys(name for values in under for name in values):
        value = max(values[name] for values in under if name in values)
        found.append(
            notice(
                "extrapolated",
                f"extrapolated: {_words(name, value)} (calibrated from {calibration.range[name][0]:,.0f} on)",
            )
        )
    return found


def unstable(scenario: Scenario, rung: pd.Series) -> bool:
    """Whether an open loop has no steady state here: requests stay behind, or are turned away."""
    return scenario.load.users is None and growing(rung)


def forecast_warnings(
    scenario: Scenario,
    calibration: Calibration,
    rungs: pd.DataFrame,
    growing: Sequence[bool],
    lengths: RequestLengths | None = None,
) -> list[Notice]:
    """Every warning of a forecast; `rungs` are medians over replicates, one row a rung, `lengths` the requests of
    the workload's file."""
    unit = unit_of(scenario)
    found = [*scenario.warnings, *(lengths.warnings if lengths is not None else ())]
    found += _other_machine(scenario, calibration) + _other_padding(scenario.server, calibration)
    loads = [float(load) for load in rungs["load"]]
    found += beyond(calibration, rungs, [unit] * len(rungs), scenario.served_by.count)
    if any(growing):
        first = list(growing).index(True)
        found.append(
            notice(
                "no-steady-state",
                f"no steady state from {named(loads[first], unit)} on: the queue grows, no latency is quoted",
            )
        )
    seconds = scenario.load.seconds
    if scenario.load.trace and lengths is not None and lengths.times is not None:
        lasts = float(lengths.times[-1])
        end = min(scenario.load.settle, lasts / 2) + (seconds or lasts)
        if end < lasts:
            found.append(
                notice(
                    "trace-cut",
                    f"the trace lasts {lasts:.0f} s, of which {end:.0f} s are replayed (load.settle, load.seconds)",
                )
            )
    long = [load for load, e2e in zip(loads, rungs["e2e_mean"], strict=True) if seconds and seconds < 3 * e2e]
    if long:
        found.append(
            notice(
                "short-window",
                f"from {named(long[0], unit)} on the window of {seconds:g} s is shorter than three answers",
            )
        )
    refused = [
        load for load, share in zip(loads, rungs["error_rate"] - rungs["overloaded_rate"], strict=True) if share > 0
    ]
    if refused:
        status = scenario.server.declared.refused_status
        found.append(
            notice(
                "requests-refused",
                f"from {named(refused[0], unit)} on the server refuses requests longer than its limits ({status})",
            )
        )
    return [*scenario.server.warnings, *_cut(scenario), *found, *without_draws(calibration), *calibration.warnings]


def short_windows(scenario: Scenario, rungs: pd.DataFrame, probabilities: Sequence[SloProbability]) -> list[Notice]:
    """A warning where a window has few answers: P(SLO) on a p95 or p99 is then that of one window, not the long run."""
    answers = dict(zip(rungs["load"].tolist(), rungs["completions"].tolist(), strict=True))
    for p in probabilities:
        if p.metric.endswith(("_p95", "_p99")) and 0.02 < p.probability < 0.98 and 0 < answers[p.load] < FEW:
            return [
                notice(
                    "short-window-slo",
                    f"P({p.metric}) is the probability that one window keeps the SLO, not the long run; the window at "
                    f"{named(p.load, unit_of(scenario))} holds only {answers[p.load]:.0f} answers",
                )
            ]
    return []


def several_patterns(scenario: Scenario, tables: Sequence[pd.DataFrame]) -> list[Notice]:
    """Loads at which replicates fall into two separate groups: lock-stepped users have more than one stable pattern."""
    together = pd.concat(tables, ignore_index=True)
    found = []
    for _, rung in together.groupby("rung", sort=True):
        for metric, what in (("ttft_p50", "TTFT p50"), ("e2e_p50", "E2E p50")):
            centres = modes(rung[metric].to_numpy(dtype=np.float64))
            if centres is not None:
                at = named(float(rung["load"].iloc[0]), unit_of(scenario))
                found.append(
                    notice(
                        "two-patterns",
                        f"at {at} two patterns are stable: {what} about {centres[0]:.2g} or {centres[1]:.2g} s",
                    )
                )
                break
    return found


def _cut(scenario: Scenario) -> list[Notice]:
    """A warning where the server cuts answers to its limit, which it does without an error."""
    work = scenario.workload
    asked = work.output_tokens if work.max_new_tokens is None else work.max_new_tokens
    if not isinstance(work.prompt_tokens, int) or not isinstance(asked, int):
        return []
    most = scenario.server.allowed(work.prompt_tokens, asked)
    if not 0 < most < asked:
        return []
    return [
        notice(
            "answers-limited",
            f"the server cuts answers to {most} tokens without an error: {asked} after {work.prompt_tokens} exceed its "
            "limit",
        )
    ]


def _other_padding(server: EngineFlags, calibration: Calibration) -> list[Notice]:
    """Padded batches cost more, and their step times have another form; only runs say which they were."""
    known = {bool(flags["requires_padding"]) for flags in calibration.server if "requires_padding" in flags}
    if not known and server.pads and calibration.model.startswith("affine"):
        return [notice("padding-differs", "this server pads its batches; whether the calibrated one did is unknown")]
    if not known or server.pads in known:
        return []
    if server.pads:
        return [notice("padding-differs", "this server pads its batches; the calibrated one did not")]
    return [notice("padding-differs", "this server does not pad its batches; the calibrated one did")]


def _other_machine(scenario: Scenario, calibration: Calibration) -> list[Notice]:
    found = []
    for what, name in (
        ("model", "model"),
        ("gpu", "GPU"),
        ("gpus", "number of GPUs"),
        ("tensor_parallel", "tensor parallelism"),
    ):
        asked, known = getattr(scenario.machine, what), getattr(calibration.machine, what)
        if asked is not None and known is not None and asked != known:
            found.append(notice("other-machine", f"the step times are those of another {name}: {known}, not {asked}"))
    return found

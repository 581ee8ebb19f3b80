"""Parameters from measured runs.

In order: `schedule` gives the steps, `design` the regression problem, `fit` selects and solves a form with the
`priors`, `variance_components` estimates random effects, with which the form is selected and solved again, `posterior`
draws, `step_noise` and `client_delays` describe what is left, and `token_budget` says what bounded the batch. Runs
without single steps go to `latency_only`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from calibrate.arrays import Floats
from calibrate.regression.design import COLD_CACHE, TREND, Rows, build_rows
from calibrate.regression.draws import correlations, parameter, residual
from calibrate.regression.fit import Form, Regression, choose
from calibrate.regression.identifiability import different_machines, not_identified, outlying_rungs
from calibrate.regression.posterior import DRAWS, antithetic_normals, draw_coefficients
from calibrate.regression.step_noise import fit_noise
from calibrate.regression.variance_components import fit_random_effects
from calibrate.schedule.admission_timing import LATENCY_BETWEEN_RUNS, admission_timings
from calibrate.schedule.client_delays import ASSUMED, fit_clocks
from calibrate.schedule.cross_check import cross_check
from calibrate.schedule.rules import server_of
from calibrate.schedule.schedule import Schedule, schedule_of, shows_steps
from calibrate.schedule.token_budget import MEANING as BUDGET
from calibrate.schedule.token_budget import fit_budget
from calibrate.sources.latency_only import NOISE as LATENCY_ONLY_NOISE
from calibrate.sources.latency_only import fit_latencies
from sim.executors import IN_PROCESS, Executor
from sim.model.calibration import Calibration, Source, SourceFile
from sim.model.errors import NotEnoughData
from sim.model.identity import Identity, named
from sim.model.server import EngineFlags
from sim.model.warning import Notice, notice
from sim.results.events import tokens_per_event
from sim.run import Run
from sim.steptime.linear import LEVEL, MEANING

PLAIN = ("a0", "a1", "a2", "a3", "b0", "b1", "b2", "c0", "c1", "f0", "f1", "u0", "u1")
MIXED = ("s0", "s1", "s2", "s3", "s4", "s5", "u0", "u1")
PADDED = ("a4", "c2", "f2", COLD_CACHE)  # terms of padded batches, and of small machines
LATENCY_TERMS = ("u0", "u1")  # network latency: part of the client's delays, not of the machine


def calibrate_runs(
    runs: Sequence[Run],
    seed: int = 0,
    rungs: Sequence[Collection[int] | None] | None = None,
    executor: Executor = IN_PROCESS,
) -> Calibration:
    """Fit one machine to measured runs of it, or to some `rungs` of each run (None: all of them).

    Runs that show no single steps (answers that were not streamed, or several tokens an event) count only where no
    other was given; those are fitted through simulations, which `executor` runs. `NotEnoughData` when there is nothing
    to fit, `NotTheEngine` where the server of one is not known to be of the engine that its
    flags are for (`sim.run.taken_as`).
    """
    if not runs:
        raise NotEnoughData("no runs to calibrate from")
    for run in runs:
        run.scenario.check_alone("calibrated from")
    engine = _one_engine(runs)
    assumed = [text for run in runs for text in run.assumptions]
    # a simulated server has the flags of its scenario
    untold = list(dict.fromkeys(text for run in runs if run.kind != "simulated" for text in run.untold))
    if len({run.server.pads for run in runs}) > 1:
        raise NotEnoughData("some of these servers pad their batches and some do not: not one machine")
    for run in runs:
        if not run.rungs:
            raise NotEnoughData(f"{run.name}: it has no rung: nothing says which loads its requests are of")
        if shows_steps(run) and not (run.requests["prompt_tokens"] > 0).any():
            raise NotEnoughData(
                f"{run.name}: it does not say how many tokens its prompts had: nothing to calibrate from"
            )
    chosen = list(zip(runs, rungs or [None] * len(runs), strict=True))
    streamed = [(run, only) for run, only in chosen if shows_steps(run)]
    if not streamed:
        calibration = _from_latencies(chosen, seed, executor)
        warnings = [*assumed, *calibration.warnings, *untold, *_rung_warnings(chosen)]
        return msgspec.structs.replace(calibration, engine=engine, warnings=warnings)
    # thousands of small matrices: threads wait for each other, and a fit took six times as long on a busy machine
    with threadpool_limits(limits=1, user_api="blas"):
        calibration = _from_steps([run for run, _ in streamed], [only for _, only in streamed], seed)
    unseen = [
        notice("run-without-steps", f"{run.name}: {_why_no_steps(run)}, and so left out")
        for run in runs
        if not shows_steps(run)
    ]
    warnings = [*assumed, *calibration.warnings, *untold, *unseen, *_rung_warnings(streamed)]
    return msgspec.structs.replace(calibration, engine=engine, warnings=warnings)


def _one_engine(runs: Sequence[Run]) -> Identity | None:
    """The engine of all runs; `NotEnoughData` where they are of several."""
    found = {run.engine if run.engine is None else (run.engine.name, run.engine.version) for run in runs}
    if len(found) > 1:
        said = "; ".join(f"{run.name}: {named(run.engine)}" for run in runs)
        raise NotEnoughData(f"these runs are not of one engine ({said}); expected runs of one server")
    return runs[0].engine


def _rung_warnings(chosen: Sequence[tuple[Run, Collection[int] | None]]) -> list[Notice]:
    """The warnings of the rungs that were fitted; one that several rungs of a run share appears once."""
    loads: dict[tuple[str, Notice], list[str]] = {}
    for run, only in chosen:
        for i, rung in enumerate(run.rungs):
            if only is None or i in only:
                for said in dict.fromkeys(rung.warnings):
                    loads.setdefault((run.name, said), []).append(f"{rung.load:g}")
    return [said.of(f"{name}, at {', '.join(dict.fromkeys(at))}") for (name, said), at in loads.items()]


def _why_no_steps(run: Run) -> str:
    if run.token_times is None:
        return "not streamed"
    return f"an event carries {tokens_per_event(run):.3g} tokens on average"


def _from_latencies(chosen: Sequence[tuple[Run, Collection[int] | None]], seed: int, executor: Executor) -> Calibration:
    """A calibration from runs that show no steps, through the simulator."""
    runs, rungs = [run for run, _ in chosen], [only for _, only in chosen]
    padded = server_of(runs[0]).requires_padding
    rng = np.random.default_rng(seed)
    why = "; ".join(dict.fromkeys(_why_no_steps(run) for run in runs))
    drawn, warnings = fit_latencies(runs, rungs, padded, rng, DRAWS, executor)
    told = {server_of(run).max_batch_total_tokens for run in runs}
    budget = told.pop()
    if not told and isinstance(budget, int):
        drawn["max_batch_total_tokens"] = np.full(DRAWS, float(budget))
    meanings = MEANING | {"max_batch_total_tokens": ("tokens", BUDGET)}
    used = [rung for run, only in chosen for i, rung in enumerate(run.rungs) if only is None or i in only]
    users = [rung.users for rung in used if rung.users is not None]
    return Calibration(
        source=Source(kind="run", files=_files(runs), note=f"fitted through the simulator: {why}"),
        model="padded" if padded else "affine",
        machine=runs[0].scenario.machine,
        parameters={name: parameter(float(np.median(x)), x, *meanings[name]) for name, x in drawn.items()},
        draws={name: [float(f"{v:.6g}") for v in x] for name, x in drawn.items()},
        range={
            "prompt_tokens": _span(np.concatenate([run.requests["prompt_tokens"].to_numpy() for run in runs])),
        }
        | ({"users": _span(np.array(users))} if users else {}),
        server=[_flags(run) for run in runs],
        noise=LATENCY_ONLY_NOISE,
        clocks=ASSUMED,
        correlations=correlations(list(drawn), np.array(list(drawn.values())).T),
        warnings=[notice("no-steps", f"{why}: no step was seen"), *warnings, *different_machines(runs)],
    )


def _from_steps(runs: Sequence[Run], rungs: Sequence[Collection[int] | None], seed: int) -> Calibration:
    """A calibration from streamed runs: find the steps, then regress."""
    schedules = [schedule_of(run, only) for run, only in zip(runs, rungs, strict=True)]
    rows = build_rows(runs, schedules)
    admissions = admission_timings(runs, schedules)
    forms = candidate_forms(runs[0].server)
    effects = fit_random_effects(choose(rows, forms, admissions)[0], rows)
    regression, choice = choose(rows, forms, admissions, effects)
    noise = fit_noise(rows, regression.predicted, effects)
    rng = np.random.default_rng(seed)
    all_drawn = draw_coefficients(regression, rows, rng)
    names, values, drawn = _as_parameters(regression, all_drawn)
    parameters = {
        name: parameter(float(value), drawn[:, i], *_meaning(name))
        for i, (name, value) in enumerate(zip(names, values, strict=True))
    }
    draws = {name: [float(f"{x:.6g}") for x in drawn[:, i]] for i, name in enumerate(names)}
    warnings = [d for s in schedules for d in s.warnings] + rows.warnings
    warnings += [d for run, schedule in zip(runs, schedules, strict=True) for d in cross_check(run, schedule)]
    correlated = correlations(names, drawn)
    budget = fit_budget(runs, schedules, rng, len(drawn))
    if budget is not None:
        parameters["max_batch_total_tokens"], draws["max_batch_total_tokens"], said = budget
        warnings += said
    u0, u1 = (regression.names.index(u) for u in LATENCY_TERMS)
    coefficients = regression.coefficients
    clocks = fit_clocks(runs, schedules, float(coefficients[u0]), float(coefficients[u1]))
    latency = clocks.uplink.mean
    between_runs = 1 + LATENCY_BETWEEN_RUNS * antithetic_normals(rng, len(drawn), 1)[:, 0]
    latencies = np.maximum(all_drawn[:, u0] - coefficients[u0] + latency, 0.0) * between_runs
    counting = all_drawn[:, u1]
    for name, value, drawn, unit, meaning in (
        ("uplink", latency, latencies, "s", "network latency to the server"),
        (
            "uplink_per_token",
            clocks.uplink.per_token,
            counting,
            "s/token",
            "counting a prompt's tokens before it is queued",
        ),
    ):
        parameters[name] = parameter(value, drawn, unit, meaning)
        draws[name] = [float(f"{x:.6g}") for x in drawn]
    return Calibration(
        source=Source(kind="run", files=_files(runs), note=f"{_agreement(schedules)}; {choice}"),
        model=regression.form.model,
        machine=runs[0].scenario.machine,
        parameters=parameters,
        draws=draws,
        range=_range(runs, rows),
        server=[_flags(run) for run in runs],
        residuals={
            kind: residual((rows.seconds - regression.predicted)[of], regression.predicted[of])
            for kind, of in (("prefill", rows.prefill), ("decode", ~rows.prefill))
            if of.any()
        },
        noise=noise,
        clocks=clocks,
        correlations=correlated,
        warnings=warnings
        + different_machines(runs)
        + outlying_rungs(runs, rows, regression)
        + not_identified(runs, rows, correlated),
    )


def _agreement(schedules: Sequence[Schedule]) -> str:
    """How far the server decided as the rules of its engine say, in words."""
    decisions = sum(s.followed.decisions for s in schedules)
    against = sum(s.followed.disagreements.total() for s in schedules)
    return f"{decisions - against} of {decisions} scheduling decisions as the engine's rules say"


def candidate_forms(server: EngineFlags) -> list[Form]:
    """The forms that a server can have, the simplest first.

    A server that pads is a small one, whose kernels use the processor better the more rows they have, so that its step
    time flattens with the batch: a line through the batch sizes of one profile, up to nine, was 80 % too high at 24.
    """
    if "mixed" in server.declared.forms:
        return [Form("mixed", MIXED)]
    longest = ((), ("b3",))
    if not server.pads:
        affine = [Form("affine", PLAIN + b3) for b3 in longest]
        return [*affine, *(Form("affine_levels", PLAIN + tuple(TREND) + b3) for b3 in longest)]
    return [Form("levels", PLAIN + PADDED + tuple(TREND) + b3) for b3 in longest]


def _as_parameters(regression: Regression, drawn: Floats) -> tuple[tuple[str, ...], Floats, Floats]:
    """The form's parameters and their draws: a level is the trend at its batch size plus its deviation."""
    names, values = list(regression.names), regression.coefficients.copy()
    drawn = drawn.copy()
    for i, name in enumerate(names):
        if name.startswith(LEVEL):
            size = float(name.removeprefix(LEVEL))
            for table in (values, drawn.T):
                trend = table[names.index("b0")] + table[names.index("b1")] * size
                for b, curve in TREND.items():
                    trend = trend + table[names.index(b)] * curve(np.asarray(size))
                table[i] = np.maximum(table[i] + trend, 1e-5)
    hidden = (*LATENCY_TERMS, COLD_CACHE, *(("b0", *TREND) if regression.form.by_batch else ()))
    keep = [i for i, name in enumerate(names) if name not in hidden]
    return tuple(names[i] for i in keep), values[keep], drawn[:, keep]


def _meaning(name: str) -> tuple[str, str]:
    if name.startswith(LEVEL):
        return "s", f"decode step of {name.removeprefix(LEVEL)} requests, without context"
    return MEANING[name]


def _range(runs: Sequence[Run], rows: Rows) -> dict[str, tuple[float, float]]:
    """What the fitted rungs have shown; the others of the same runs may still be forecast."""
    t = rows.table
    prefill, decode = t[t["prefill_tokens"] > 0], t[~rows.prefill]
    used = t[["run", "rung"]].drop_duplicates()
    rungs = [(runs[i], runs[i].rungs[j]) for i, j in used.itertuples(index=False)]
    prompts = [
        run.requests.loc[run.requests["scheduled"].between(rung.start, rung.end), "prompt_tokens"].to_numpy()
        for run, rung in rungs
    ]
    seen = {
        "prompt_tokens": np.concatenate(prompts),
        "batch_prefill_tokens": prefill["prefill_tokens"].to_numpy(),
        "sequences": decode["sequences"].to_numpy(),
        "context_tokens": decode["decode_context"].to_numpy(),
        "users": np.array([rung.users for _, rung in rungs if rung.users is not None]),
    }
    return {name: _span(x) for name, x in seen.items() if len(x)}


def _span(x: NDArray[Any]) -> tuple[float, float]:
    return float(x.min()), float(x.max())


def _flags(run: Run) -> dict[str, Any]:
    sources = {name: flag.source for name, flag in run.flags.items()}
    return {"run": run.name, **msgspec.to_builtins(run.server), "sources": sources}


def _files(runs: Sequence[Run]) -> list[SourceFile]:
    files = []
    for run in runs:
        if run.path is None:
            continue
        for file in sorted([run.path / "run.json", *run.path.glob("requests*.jsonl*")]):
            raw = file.read_bytes()
            name, digest = f"{run.path.name}/{file.name}", hashlib.sha256(raw).hexdigest()
            files.append(SourceFile(path=name, sha256=digest, bytes=len(raw)))
    return files

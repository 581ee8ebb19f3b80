"""A run whose answers were not streamed: parameters from when requests began and ended, through the simulator.

Without token times no step is seen. What is left is how latency and throughput change with the load, and what machines
can be: one drawn at random is replayed against the run, and weighed by how near it comes (`search`). Few numbers pin
down few parameters, so the draws stay wide, and say so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from calibrate.laws import HalfNormal, Law, LogNormal, Uniform
from calibrate.search import Found, search
from sim import metrics
from sim.calibration import Clocks, Delay, Noise
from sim.forms import step_time
from sim.model import Model
from sim.replay import replay
from sim.run import Run

Floats = NDArray[np.float64]

SIMULATIONS = 240
EFFECTIVE = 20.0  # machines that the draws should stand for, at least
STATISTICS = ("e2e_mean", "rps", "e2e_p95")
NEAR = {"e2e_mean": 0.02, "rps": 0.03, "e2e_p95": 0.05}  # relative: what one window's luck, or a mood, is worth
NOISE = Noise(decode=(1 + 0.05 * ndtri(np.linspace(0.01, 0.99, 41))).tolist(), drift=0.02, between=0.02)
ASSUMED = Clocks(uplink=Delay(quantiles=[1.2e-3, 1.8e-3]), turnaround=Delay(quantiles=[2e-4, 6e-4]))

# Where a lone user's latency goes, and what company costs: what the scores of `search` stand for.
LAWS: dict[str, Law] = {
    "prefill": LogNormal(4.0, 1.3),  # a lone prompt's prefill, in decode steps
    "fixed": Uniform(0.0, 0.7),  # share of the prefill that does not grow with the prompt
    "squared": HalfNormal(0.1),  # share of the prefill that grows with the square of it
    "sequence": LogNormal(0.02, 1.3),  # one more sequence, in decode steps
    "context": LogNormal(0.03, 1.3),  # the context of one more sequence, in decode steps
    "keeping": HalfNormal(0.1),  # joining and dropping, in decode steps
}


def fit_unstreamed(
    runs: Sequence[Run], rungs: Sequence[Collection[int] | None], padded: bool, rng: np.random.Generator, n: int
) -> tuple[dict[str, Floats], list[str]]:
    """`n` joint draws of every coefficient, and what to doubt. All runs must be of one machine."""
    runs = [_answered(run) for run in runs]
    latency, prompt, output = min(_lone(run) for run in runs)
    scored = [_scored(run, only) for run, only in zip(runs, rungs, strict=True)]
    measured = np.concatenate([_shown(run, list(places)) for run, places in zip(runs, scored, strict=True)])
    near = np.concatenate([[NEAR[s] for _ in places for s in STATISTICS] for places in scored])
    model = "padded" if padded else "affine"

    def simulate(scores: Floats, first: int) -> Floats:
        columns = _coefficients(scores, latency, prompt, output)
        shown = []
        for i in range(len(scores)):
            form = step_time(model, {name: float(column[i]) for name, column in columns.items()})
            machines = (Model(form, run.server, NOISE, ASSUMED) for run in runs)
            replays = (replay(run, machine, (first + i,)) for run, machine in zip(runs, machines, strict=True))
            shown.append(np.concatenate([_shown(r, p.values()) for r, p in zip(replays, scored, strict=True)]))
        return np.array(shown)[:, :, None]

    found = search(
        lambda g, m: g.standard_normal((m, len(LAWS))),
        simulate,
        partial(_log_fit, measured, near),
        rng,
        SIMULATIONS,
        EFFECTIVE,
    )
    chosen = rng.choice(len(found.weights), n, p=found.weights)
    # resampled machines repeat; a little of the spread between them keeps the draws from being a handful of points
    around = found.scores[chosen] + 0.15 * rng.standard_normal((n, len(LAWS))) * _spread(found)
    return _coefficients(around, latency, prompt, output), _doubts(found)


def _coefficients(scores: Floats, latency: float, prompt: float, output: float) -> dict[str, Floats]:
    """The coefficients of machines that all have the same lone-user latency: what differs is where it goes."""
    drawn = {name: law.at(scores[:, i]) for i, (name, law) in enumerate(LAWS.items())}
    squared = np.minimum(drawn["squared"], 0.5)
    step = latency / (drawn["prefill"] + max(output - 1.0, 0.0))
    prefill = step * drawn["prefill"]
    grows = prefill * (1 - drawn["fixed"])
    context = prompt + output / 2
    share = drawn["sequence"] + drawn["context"]
    scale = np.minimum(1.0, 0.8 / share)  # of a step of one, something is left that does not grow
    b1, b2 = step * drawn["sequence"] * scale, step * drawn["context"] * scale / context
    return {
        "a0": prefill * drawn["fixed"],
        "a1": grows * (1 - squared) / prompt,
        "a2": grows * squared / prompt**2,
        "b0": step - b1 - b2 * context,
        "b1": b1,
        "b2": b2,
        "c0": step * drawn["keeping"],
        "f0": step * drawn["keeping"],
    }


def _lone(run: Run) -> tuple[float, float, float]:
    """The median latency at the lowest load, s, and the mean lengths."""
    ok = run.requests[run.requests["status"] == "ok"]
    rung = ok[ok["rung"] == ok["rung"].min()]
    latency = float((rung["ended"] - rung["sent"]).median())
    return latency, float(ok["prompt_tokens"].mean()), float(ok["output_tokens"].mean())


def _answered(run: Run) -> Run:
    """The run with the end of every answer as the time of its last token, where nothing better is known."""
    requests = run.requests
    last = requests["last_token"].where(
        requests["last_token"].notna() | (requests["status"] != "ok"), requests["ended"]
    )
    return replace(run, requests=requests.assign(last_token=last), token_times=None)


def _scored(run: Run, only: Collection[int] | None) -> dict[int, int]:
    """The rungs to be met, and the place each has in a replay, which has the complete rungs only."""
    whole = [i for i, g in enumerate(run.rungs) if g.end > g.settled]
    return {rung: place for place, rung in enumerate(whole) if only is None or rung in only}


def _shown(run: Run, rungs: Iterable[int]) -> Floats:
    """The statistics of some rungs, one after another."""
    table = metrics.table(run).set_index("rung")
    return table.loc[list(rungs), list(STATISTICS)].to_numpy(np.float64).ravel()


def _log_fit(measured: Floats, near: Floats, shown: Floats, spread: Floats | float) -> Floats:
    """Log-likelihood of what was measured, (n, 1): log-normal errors, the emulator's `spread` added."""
    apart = np.log(np.maximum(np.nan_to_num(shown, nan=1e-9), 1e-9)) - np.log(measured)[:, None]
    variance = near[:, None] ** 2 + np.asarray(spread) ** 2
    # rungs of one run share the machine's moods: together they say less than as many independent ones
    return np.asarray(-0.5 * (apart**2 / variance).sum(axis=1) / len(STATISTICS))


def _spread(found: Found) -> Floats:
    centre = found.weights @ found.scores
    return np.asarray(np.sqrt(found.weights @ (found.scores - centre) ** 2))


def _doubts(found: Found) -> list[str]:
    doubts = [
        "answers were not streamed: no step was seen. Parameters are those of simulated machines that show the same "
        "latencies and throughput; where the latency goes between prefill and decode stays wide"
    ]
    if found.tempered < 0.3:
        doubts.append("no simulated machine comes near the run: the form, or the server's flags, may be wrong")
    return doubts

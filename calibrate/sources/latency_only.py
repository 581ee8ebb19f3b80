"""Parameters from a run without single steps: from when requests began and ended, through the simulator.

Without token times, or where an event carries several tokens, no step is seen. What remains is how latency and
throughput change with the load. Machines drawn from a prior are replayed against the run and weighted by how close they
come (`importance_sampling`). Few numbers identify few parameters, so draws stay wide.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle

import msgspec
import numpy as np
import pandas as pd
from scipy.special import ndtri

from calibrate.arrays import Floats, Ints
from calibrate.schedule.client_delays import ASSUMED
from calibrate.schedule.rules import server_of
from calibrate.schedule.token_budget import budget_bounds, known_budget
from calibrate.sources.importance_sampling import Sample, sample
from calibrate.sources.published_priors import Distribution, HalfNormal, LogNormal, Uniform
from calibrate.sources.static_batch import prefill_terms
from sim.engines.tgi_0_9_4 import Flags, ceil_block
from sim.executors import IN_PROCESS, Executor, Tell
from sim.model.errors import NotEnoughData
from sim.model.machine import Machine
from sim.model.server import Bounds
from sim.model.status import Status
from sim.model.warning import Notice, notice
from sim.replicate import Task
from sim.results import metrics
from sim.run import Run
from sim.steptime.linear import step_time
from sim.steptime.noise_parameters import Noise

SIMULATIONS = 40  # per dimension: an emulator of more dimensions needs more
EFFECTIVE = 20.0  # least effective sample size
STATISTICS = ("e2e_mean", "rps", "e2e_p95")
ERRORS = {"e2e_mean": 0.02, "rps": 0.03, "e2e_p95": 0.05}  # relative: sd of one window's statistics, drift included
NOISE = Noise(decode=(1 + 0.05 * ndtri(np.linspace(0.01, 0.99, 41))).tolist(), drift=0.02, between=0.02)

BUDGET = "max_batch_total_tokens"
LATENCY = "latency"

# Priors of how a single user's latency divides, and of what more requests cost; the scores' dimensions.
PRIORS: dict[str, Distribution] = {
    "prefill": LogNormal(4.0, 1.3),  # a single prompt's prefill, in decode steps
    "fixed": Uniform(0.0, 0.7),  # share of the prefill that does not grow with the prompt
    "squared": HalfNormal(0.1),  # share of the prefill that grows with the square of it
    "sequence": LogNormal(0.02, 1.3),  # one more sequence, in decode steps
    "context": LogNormal(0.03, 1.3),  # the context of one more sequence, in decode steps
    "keeping": HalfNormal(0.1),  # joining and dropping, in decode steps
}


@dataclass(frozen=True)
class _LogUniform:
    """Uniform in the logarithm from `low` to `high`."""

    low: float
    high: float

    def at(self, score: Floats) -> Floats:
        """See `Distribution`."""
        return np.asarray(np.exp(Uniform(float(np.log(self.low)), float(np.log(self.high))).at(score)))

    def density(self, value: Floats) -> Floats:
        """See `Distribution`."""
        inside = (value >= self.low) & (value <= self.high) & (self.high > self.low)
        return np.where(inside, 1 / np.maximum(value, 1e-300) / max(np.log(self.high / self.low), 1e-300), 0.0)


@dataclass(frozen=True)
class _SingleUser:
    """A single user's request: the prior of its latency (s), its lengths (tokens), and warnings."""

    latency: Distribution
    prompt: float
    output: float
    warnings: list[Notice]


def fit_latencies(
    runs: Sequence[Run],
    rungs: Sequence[Collection[int] | None],
    padded: bool,
    rng: np.random.Generator,
    n: int,
    executor: Executor = IN_PROCESS,
) -> tuple[dict[str, Floats], list[Notice]]:
    """`n` joint draws of every coefficient (and of a budget that is not told), and warnings.

    All runs must be of one machine. Raises `NotEnoughData` where no rung has a whole window with answers of known
    lengths.
    """
    runs = [_answered(run) for run in runs]
    compared = [_compared(run, only) for run, only in zip(runs, rungs, strict=True)]
    runs, compared = [r for r, p in zip(runs, compared, strict=True) if p], [p for p in compared if p]
    if not runs:
        raise NotEnoughData("no rung has a whole window with an answered request: nothing to calibrate from")
    user = _single_user(runs, compared)
    budget, budget_warnings = _budget(runs, compared)
    priors = PRIORS | {LATENCY: user.latency} | budget
    measured = np.concatenate([_measured(run, list(places)) for run, places in zip(runs, compared, strict=True)])
    errors = np.concatenate([[ERRORS[s] for _ in places for s in STATISTICS] for places in compared])
    model = "padded" if padded else "affine"

    def simulate(scores: Floats, first: int) -> Floats:
        columns = _parameters(priors, scores, user)
        tasks = []
        for i in range(len(scores)):
            drawn = {name: float(column[i]) for name, column in columns.items()}
            form = step_time(model, drawn)
            tasks += [
                Task(run, Machine(form, _with_budget(server_of(run), drawn), NOISE, ASSUMED), (first + i,))
                for run in runs
            ]
        tables = executor.run(_statistics, tasks)
        shown = [table.loc[list(places.values())].to_numpy() for table, places in zip(tables, cycle(compared))]
        return np.concatenate(shown).reshape(len(scores), -1, 1)

    found = sample(
        lambda g, m: g.standard_normal((m, len(priors))),
        simulate,
        partial(_log_likelihood, measured, errors),
        rng,
        SIMULATIONS * len(priors),
        EFFECTIVE,
    )
    chosen = rng.choice(len(found.weights), n, p=found.weights)
    # resampled machines repeat: noise of a part of their spread smooths the draws
    around = found.scores[chosen] + 0.15 * rng.standard_normal((n, len(priors))) * found.spread
    return _parameters(priors, around, user), _warnings(found) + user.warnings + budget_warnings


def _parameters(priors: dict[str, Distribution], scores: Floats, user: _SingleUser) -> dict[str, Floats]:
    """The parameters of machines, (n,) each, from how a single user's latency divides into parts."""
    drawn = {name: distribution.at(scores[:, i]) for i, (name, distribution) in enumerate(priors.items())}
    prompt, output = user.prompt, user.output
    squared = np.minimum(drawn["squared"], 0.5)
    step = drawn[LATENCY] / (drawn["prefill"] + max(output - 1.0, 0.0))
    prefill = step * drawn["prefill"]
    grows = prefill * (1 - drawn["fixed"])
    each = prefill_terms(1, prompt)
    context = prompt + output / 2
    share = drawn["sequence"] + drawn["context"]
    scale = np.minimum(1.0, 0.8 / share)  # a fifth of a step of one sequence does not grow
    b1, b2 = step * drawn["sequence"] * scale, step * drawn["context"] * scale / context
    coefficients = {
        "a0": prefill * drawn["fixed"],
        "a1": grows * (1 - squared) / each["a1"],
        "a2": grows * squared / each["a2"],
        "b0": step - b1 - b2 * context,
        "b1": b1,
        "b2": b2,
        "c0": step * drawn["keeping"],
        "f0": step * drawn["keeping"],
    }
    return coefficients | ({BUDGET: np.rint(drawn[BUDGET])} if BUDGET in drawn else {})


def _single_user(runs: Sequence[Run], compared: Sequence[dict[int, int]]) -> _SingleUser:
    """A single user's latency from a rung of one user, else what the least loaded rung leaves open.

    Of several runs, the one with the shortest requests, so that the others are extrapolations upwards. The lowest rung
    does not stand for one user: that made a forecast for one user 87 % too high, from a rung of four.
    """
    rungs = [(run, rung, _ended_in(run, rung)) for run, places in zip(runs, compared, strict=True) for rung in places]
    single = [(run, rung, ok) for run, rung, ok in rungs if run.rungs[rung].users == 1]

    def latency(ok: pd.DataFrame) -> float:
        return float((ok["last_token"] - ok["sent"]).median())

    if single:
        run, rung, ok = min(single, key=lambda found: latency(found[2]))
    else:
        run, rung, ok = min(rungs, key=lambda found: (_concurrency(*found[:2]), latency(found[2])))
    prompt, output = float(ok["prompt_tokens"].median()), float(ok["output_tokens"].median())
    if not (prompt > 0 and output > 0):
        raise NotEnoughData(
            f"{run.name}: it does not say how many tokens its prompts and answers had: nothing to calibrate from"
        )
    seconds = latency(ok)
    if single:
        # the median of a few requests of all lengths is uncertain
        each = float(np.abs(np.log((ok["last_token"] - ok["sent"]) / seconds)).median()) * 1.48
        return _SingleUser(LogNormal(seconds, 1.25 * each / np.sqrt(len(ok))), prompt, output, [])
    concurrency = _concurrency(run, rung)
    low = seconds / concurrency  # as if batching gained nothing
    warning = notice(
        "no-single-user",
        f"no rung of one user was fitted: a lone request takes anything from {low:.3g} to {seconds:.3g} s, what "
        f"{run.rungs[rung].load:g} {'users' if run.rungs[rung].users is not None else 'requests/s'} leave open; "
        "forecasts for less load are wide",
    )
    return _SingleUser(_LogUniform(low, seconds), prompt, output, [warning])


def _concurrency(run: Run, rung: int) -> float:
    """The mean number of requests in the server, this one included."""
    users = run.rungs[rung].users
    if users is not None:
        return float(max(users, 1))
    return 1.0 + metrics.rung_metrics(run, run.rungs[rung])["in_flight"]


def _budget(runs: Sequence[Run], compared: Sequence[dict[int, int]]) -> tuple[dict[str, Distribution], list[Notice]]:
    """The prior of a token budget that some run does not tell, and warnings; none where all tell.

    Requests that surely ran at once, between their first and last tokens, had room. Where first tokens were not seen
    either, that is one request, since all others may have waited; the simulations tell the rest.
    """
    unknown = [(r, p) for r, p in zip(runs, compared, strict=True) if _is_unknown(r)]
    if not unknown:
        return {}, []
    low = 0.0
    for run, places in unknown:
        ok = pd.concat([_ended_in(run, rung) for rung in places])
        first, last = (ok[c].to_numpy() for c in ("first_token", "last_token"))
        prompt, new = ok["prompt_tokens"].to_numpy(), ok["max_new_tokens"].to_numpy()
        held = np.array([ceil_block(n) for n in (prompt + new - 1).tolist()])
        let_in = [ceil_block(p) + ceil_block(m) for p, m in zip(prompt.tolist(), new.tolist(), strict=True)]
        # a request that is only known to have ended held its tokens at that instant
        low = max(low, _peak(np.where(np.isnan(first), last, first), last, held), *let_in)
    said = [server_of(r).max_batch_total_tokens for r, _ in unknown]
    bounds = [b for b in said if isinstance(b, Bounds)]
    if bounds:
        low = max(low, *(b.low for b in bounds))
        high = max(low, min(b.high for b in bounds))
    else:
        low, high = budget_bounds([server_of(run) for run, _ in unknown], math.ceil(low))
    return {BUDGET: _LogUniform(low, high)}, [
        notice(
            "budget-bounded",
            f"max_batch_total_tokens is not told, only bounded: drawn from {low:.0f} to {high:.0f}, as far as the "
            "latencies allow",
        )
    ]


def _is_unknown(run: Run) -> bool:
    # a server that pads and has no such flag takes the router's own default
    return known_budget(run) is None and not (
        server_of(run).requires_padding and server_of(run).max_batch_total_tokens is None
    )


def _with_budget(server: Flags, drawn: dict[str, float]) -> Flags:
    """The server with the budget that was drawn, where it does not tell its own."""
    if BUDGET not in drawn or isinstance(server.max_batch_total_tokens, int):
        return server
    return msgspec.structs.replace(server, max_batch_total_tokens=round(drawn[BUDGET]))


def _peak(begin: Floats, end: Floats, held: Ints) -> float:
    """The largest sum of `held` over intervals from `begin` to `end`, both included, that overlap."""
    time = np.concatenate([begin, end])
    change = np.concatenate([held, -held])
    order = np.lexsort((-change, time))
    return float(np.cumsum(change[order]).max(initial=0))


def _ended_in(run: Run, rung: int) -> pd.DataFrame:
    """The requests answered within the window of a rung."""
    r, window = run.requests, run.rungs[rung]
    return r[(r["status"] == Status.OK) & (r["last_token"] >= window.settled) & (r["last_token"] < window.end)]


def _answered(run: Run) -> Run:
    """The run with the end of every answer as the time of its last token, where nothing better is known."""
    requests = run.requests
    last = requests["last_token"].where(
        requests["last_token"].notna() | (requests["status"] != Status.OK), requests["ended"]
    )
    return replace(run, requests=requests.assign(last_token=last), token_times=None, event_tokens=None)


def _compared(run: Run, only: Collection[int] | None) -> dict[int, int]:
    """The rungs to compare, which have answers, and the place of each in a replay, which has only complete rungs."""
    whole = [i for i, g in enumerate(run.rungs) if g.end > g.settled]
    answered = {i for i in whole if len(_ended_in(run, i))}
    return {rung: place for place, rung in enumerate(whole) if rung in answered and (only is None or rung in only)}


def _measured(run: Run, rungs: Iterable[int]) -> Floats:
    """The statistics of some rungs, one after another."""
    return metrics.table(run).set_index("rung").loc[list(rungs), list(STATISTICS)].to_numpy(np.float64).ravel()


def _statistics(task: Task, tell: Tell) -> pd.DataFrame:
    return metrics.table(task.run(tell)).set_index("rung")[list(STATISTICS)].astype(np.float64)


def _log_likelihood(measured: Floats, errors: Floats, shown: Floats, spread: Floats | float) -> Floats:
    """Log-likelihood of the measured statistics, (n, 1): log-normal errors, the emulator's `spread` added."""
    apart = np.log(np.maximum(np.nan_to_num(shown, nan=1e-9), 1e-9)) - np.log(measured)[:, None]
    variance = errors[:, None] ** 2 + np.asarray(spread) ** 2
    # the statistics of one window say about as much as one: users and latency determine the throughput
    return np.asarray(-0.5 * (apart**2 / variance).sum(axis=1) / len(STATISTICS))


def _warnings(found: Sample) -> list[Notice]:
    warnings = [
        notice(
            "latency-only",
            "parameters are those of simulated machines that show the same latencies and throughput; where the latency "
            "goes between prefill and decode stays wide",
        ),
        notice(
            "latency-only-lengths",
            "prompts or answers of other lengths than these can be off by more than their bands say: stream the "
            "answers to forecast those",
        ),
    ]
    if found.likelihood_power < 0.3:
        warnings.append(
            notice(
                "no-machine-fits",
                "no simulated machine comes near the run: the form, or the server's flags, may be wrong",
            )
        )
    return warnings

"""Calibrate simulated servers of known truth: are their step times found, and as surely as the intervals say?

    python tools/check_fit.py [--machines N] [--requests N] [--seed N]

Every machine has coefficients of its own around those of the recorded router-http runs, and a day of its own; two
profiles are climbed on it (1500/100 and 50/500) and seen through clients' eyes. Printed: how far the fitted times of
three steps are from the true ones (the mean, and what 95 % stay below), how often 95 % intervals hold them, which share
of the steps is rebuilt as it was, and how long a run of many requests takes to fit (of a server that pads, whose form
has most coefficients). Exit status 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import sys
import time
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # how clients see a simulated server is the tests' own

from streams import SERVER, TRUTH, lengths, observe

from calibrate.schedule.schedule import schedule_of
from calibrate.sources.streamed import calibrate_runs
from sim.executors import Tell, processes
from sim.steptime.linear import step_time
from sim.steptime.noise_parameters import Noise

Floats = NDArray[np.float64]

QUESTIONS = ("prefill of 1 x 1500", "decode of 1 at 550", "decode of 20 at 1500")
ERROR, INTERVALS, REBUILT = 0.02, (0.90, 0.99), 0.995
FIT = 10.0  # s, for a run of 10,000 requests
LADDER = [1, 2, 4, 8, 16, 32]
LONG, MIXED, PACE = [1, 4, 16, 64, 96], lengths((16, 400), (20, 180)), 30.0  # requests per second of a rung, over all


class Fitted(NamedTuple):
    """What one machine's calibration says: relative errors, and whether its 95 % intervals hold the truth; (3,)."""

    error: Floats
    held: NDArray[np.bool_]


def main() -> int:
    """Print the tables; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description="Calibrate simulated servers of known truth.")
    parser.add_argument("--machines", type=int, default=40)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=2026)
    asked = parser.parse_args()
    out = Console()
    with processes() as pool:
        fits = pool.run(partial(fit_one, asked.seed), range(asked.machines))
        users = (1, 4, 16, 64)
        shares = pool.run(rebuilt, users)
    error, held = np.abs([f.error for f in fits]), np.array([f.held for f in fits])
    table = Table(title=f"step times of {asked.machines} simulated machines", title_justify="left")
    for name in ("step", "mean error, %", "95th, %", "in its interval, %"):
        table.add_column(name, justify="left" if name == "step" else "right")
    for i, question in enumerate(QUESTIONS):
        worst = np.quantile(error[:, i], 0.95)
        table.add_row(
            question, *(f"{100 * x:.2f}" for x in (error[:, i].mean(), worst)), f"{100 * held[:, i].mean():.0f}"
        )
    out.print(table)
    low, high = INTERVALS
    seen = ", ".join(f"{share:.2%} at {u}" for u, share in zip(users, shares, strict=True))
    met = [
        verdict(out, f"mean errors (goal: up to {ERROR:.0%})", bool((error.mean(axis=0) <= ERROR).all())),
        verdict(
            out, f"95 % intervals held {held.mean():.0%} (goal: {low:.0%} to {high:.0%})", low <= held.mean() <= high
        ),
        verdict(out, f"steps rebuilt under 1 ms of jitter: {seen} users (goal: {REBUILT:.1%})", min(shares) >= REBUILT),
    ]
    padding = msgspec.structs.replace(SERVER, requires_padding=True)
    many = observe(LONG, MIXED, seconds=asked.requests / PACE, server=padding, model="padded", seed=asked.seed).run
    began = time.perf_counter()
    calibrate_runs([many])
    took = time.perf_counter() - began
    met.append(verdict(out, f"{len(many.requests):,} requests fitted in {took:.1f} s (goal: {FIT:g} s)", took < FIT))
    return 0 if all(met) else 1


def fit_one(seed: int, number: int, _: Tell) -> Fitted:
    """A machine drawn at random, measured and calibrated."""
    rng = np.random.default_rng([seed, number])
    truth = {name: value * float(np.exp(0.3 * rng.standard_normal())) for name, value in TRUTH.items()}
    spread = rng.uniform(0.02, 0.08)
    noise = Noise(
        prefill=[1 - spread / 2, 1.0, 1 + spread / 2],
        decode=[1 - spread, 1.0, 1 + spread],
        drift=rng.uniform(0.003, 0.02),
        drift_seconds=rng.uniform(4.0, 20.0),
    )
    runs = [
        observe(
            LADDER, lengths(*profile), truth=truth, noise=noise, seconds=14.0, jitter=2e-4, seed=1000 * number + i
        ).run
        for i, profile in enumerate(((1500, 100), (50, 500)))
    ]
    found = calibrate_runs(runs, number)
    true = answers(truth, "affine")
    drawn = np.array(
        [answers({name: column[i] for name, column in found.draws.items()}, found.model) for i in range(found.n_draws)]
    )
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return Fitted(answers(found.values, found.model) / true - 1, (low <= true) & (true <= high))


def answers(parameters: dict[str, float], model: str) -> Floats:
    """The times of `QUESTIONS`, s."""
    form = step_time(model, parameters)
    return np.array(
        [form.prefill(1, 1500, 1500**2, 1500), form.decode(1, 550, 550)[0], form.decode(20, 30000, 1500)[0]]
    )


def rebuilt(users: int, _: Tell) -> float:
    """The share of a simulated server's steps that are rebuilt with their kind and their members."""
    noise = Noise(prefill=[0.95, 1.0, 1.05], decode=[0.9, 1.0, 1.1], drift=0.05)
    seen = observe([users], lengths((10, 900), (1, 60)), noise=noise, jitter=1e-3, seconds=30.0, seed=users)
    steps = schedule_of(seen.run).steps
    found = [(kind, frozenset(who.tolist())) for kind, who in zip(steps["kind"], steps["members"], strict=True)]
    alike = SequenceMatcher(None, seen.steps, found, autojunk=False).get_matching_blocks()
    return sum(block.size for block in alike) / max(len(seen.steps), len(found))


def verdict(out: Console, what: str, met: bool) -> bool:
    """Say it, and whether it is good enough."""
    out.print(what if met else f"{what}: [bold red]missed[/bold red]")
    return met


if __name__ == "__main__":
    sys.exit(main())

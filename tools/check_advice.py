"""Follow the advice on what to measure next, on a server whose truth is known, and hold it against random choices.

    python tools/check_advice.py [--others N] [--seconds S] [--seed N]

The stand-in is measured a little at short prompts; the question is about long ones and more users. Then every load is
measured for as long as the others: the advised one, and some drawn from the same candidates. How well the question is
known after each is what a calibration of both runs says. Exit status 1 unless following the advice leaves a narrower
band than the median of the random choices, and none wider than was promised at worst.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console
from standin import standin

from calibrate.next_measurement import DRAWS, Advice, Question, advise, candidates, half_width
from calibrate.sources.streamed import calibrate_runs
from measure.ladder.session import measure
from scenarios.load.scenario import load
from sim.model.scenario import Load, Scenario
from sim.model.workload import Workload
from sim.run import Run, read_run

KNOWN = Workload(prompt_tokens=100, output_tokens=60)
KNOWN_USERS = [1, 2]
ASKED = Workload(prompt_tokens=800, output_tokens=40)
ASKED_USERS = 6
SLACK = 1.0 + 2.0 / np.sqrt(2.0 * DRAWS)  # two standard errors of a width that comes from so many draws


def main() -> int:
    """Measure, ask, measure what was advised and what was not, and judge."""
    parser = argparse.ArgumentParser(description="Follow the advice on the stand-in; compare with random choices.")
    parser.add_argument("--others", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    scenario = load("standin")
    question = Question(msgspec.structs.replace(scenario, workload=ASKED), ASKED_USERS)
    with tempfile.TemporaryDirectory() as place, standin() as url:
        folder = Path(place)
        first = measured(scenario, KNOWN, KNOWN_USERS, asked.seconds, url, folder / "first")
        before = calibrate_runs([first])
        ranked = advise(before, question, candidates(question, [KNOWN], asked.seconds))
        drawn = np.random.default_rng(asked.seed).permutation(len(ranked))[: asked.others]
        chosen = [ranked[0], *(ranked[i] for i in drawn)]
        got = []
        for number, one in enumerate(advice.measurement for advice in chosen):
            more = measured(scenario, one.workload, [one.users], one.seconds, url, folder / str(number))
            got.append(half_width(calibrate_runs([first, more]), question))
    show(chosen, got)
    return judge(chosen[0], got)


def measured(scenario: Scenario, workload: Workload, users: list[int], seconds: float, url: str, out: Path) -> Run:
    """What the clients saw of a load, `seconds` a rung."""
    there = Load(users=users, spawn_rate=10.0, seconds=seconds)
    with Path(os.devnull).open("w") as null:
        measure(msgspec.structs.replace(scenario, workload=workload, load=there), url, out, console=Console(file=null))
    return read_run(out)


def show(chosen: list[Advice], got: list[float]) -> None:
    """One row a load measured, and what is known before and after it."""
    asked = f"{ASKED.prompt_tokens}/{ASKED.output_tokens} tokens at {ASKED_USERS} users"
    print(f"mean latency of {asked}: known to ±{chosen[0].now:.1%} beforehand\n")
    print(f"{'measured':12}{'tokens':>9}{'users':>7}{'promised':>10}{'at best, at worst':>20}{'got':>8}")
    for number, (advice, found) in enumerate(zip(chosen, got, strict=True)):
        one, why = advice.measurement, "at random" if number else "as advised"
        tokens = f"{one.workload.prompt_tokens}/{one.workload.output_tokens}"
        span = f"±{advice.low:.1%}, ±{advice.high:.1%}"
        print(f"{why:12}{tokens:>9}{one.users:7}{f'±{advice.after:.1%}':>10}{span:>20}{f'±{found:.1%}':>8}")


def judge(advice: Advice, got: list[float]) -> int:
    """The verdict in a line, and the exit status: 0 when the advice was good and kept its word."""
    followed, others = got[0], np.array(got[1:])
    kept = followed <= SLACK * advice.high
    better = followed < float(np.median(others))
    print(
        f"\nadvice followed: ±{followed:.1%}{'' if kept else ': wider than promised'}\nrandom choices: median "
        f"±{np.median(others):.1%}, ±{others.min():.1%} to ±{others.max():.1%}{'' if better else ': no better advised'}"
    )
    return 0 if better and kept else 1


if __name__ == "__main__":
    sys.exit(main())

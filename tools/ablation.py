"""Remove one mechanism of the statistical model after the other: which of them improve forecasts of left-out runs?

    python tools/ablation.py [--fit FOLDER --runs FOLDER] [--backward] [--only NAME ...]

Every run of a machine is forecast from the other runs of that machine (leave one run out), or those in RUNS from those
in FIT. Printed for every mechanism: how much larger the mean interval score of the logarithm is without it (positive:
it pays), the standard error of that over runs, the mean |error| and the coverage of 90 % intervals. With --backward
the mechanism that pays least is removed and all others are tried again, until each pays: substitutes look useless one
at a time. On these runs, which the model was made with, this flatters every mechanism.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
from held_out import DATA, Score, coverage, runs_in, score
from rich.console import Console
from rich.table import Table

from calibrate.regression import design, fit, priors
from calibrate.regression.fit import Form
from calibrate.regression.random_effects import RandomEffects
from calibrate.sources import streamed
from scenarios.compare.run_with_model import forecast_run
from sim.executors import Executor, processes
from sim.model.calibration import Calibration, Delay
from sim.run import Run

MACHINES = ("tgi-0.9.4-router-http", "tgi-0.9.4-cpu", "vllm-cpu")
REPLICATES = 49  # the same seeds for all: differences need fewer than bands do

Removal = Callable[[ExitStack], None]


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit", type=Path, help="a folder of runs to fit")
    parser.add_argument("--runs", type=Path, help="a folder of runs to forecast")
    parser.add_argument("--backward", action="store_true", help="remove what pays least, and try again")
    parser.add_argument("--only", nargs="*", choices=MECHANISMS, help="the mechanisms to try")
    parser.add_argument("--machines", nargs="*", choices=MACHINES, default=MACHINES)
    asked = parser.parse_args()
    if asked.fit and asked.runs:
        splits = [(run, runs_in(asked.fit)) for run in runs_in(asked.runs)]
    else:
        families = [runs_in(DATA / name) for name in asked.machines]
        splits = [(run, [o for o in runs if o is not run]) for runs in families for run in runs]
    tried = list(asked.only or MECHANISMS)
    with processes() as executor:
        removed: list[str] = []
        while True:
            least = _round(splits, removed, tried, executor)
            if not asked.backward or least is None:
                return 0
            removed.append(least)
            tried.remove(least)


def _round(
    splits: Sequence[tuple[Run, list[Run]]], removed: Sequence[str], tried: Sequence[str], executor: Executor
) -> str | None:
    """Print what each mechanism pays beside the others; the one that pays least, if it pays nothing."""
    out = Console(width=150)
    base = _scores(splits, removed, executor)
    table = Table(title=f"without {', '.join(removed) or 'nothing'}", title_justify="left")
    for name in ("without", "score", "pays", "± ", "error %", "covers %", *(s.run[-12:] for s in base)):
        table.add_column(name, justify="left" if name == "without" else "right")
    _add(table, "(all)" if not removed else "(as above)", base, base)
    pays = {}
    for name in tried:
        scores = _scores(splits, [*removed, name], executor)
        pays[name] = _add(table, name, scores, base)
        print(f"{name}: {1e3 * pays[name]:+.2f}", file=sys.stderr, flush=True)
    out.print(table)
    least = min(pays, key=lambda name: pays[name], default=None)
    return least if least is not None and pays[least] <= 0 else None


def _scores(splits: Sequence[tuple[Run, list[Run]]], removed: Sequence[str], executor: Executor) -> list[Score]:
    scores = []
    of_fit = tuple(name for name in removed if name in REMOVALS)
    for run, others in splits:
        calibration = _fitted(run.name, others, of_fit)
        for name in removed:
            calibration = AFTERWARDS.get(name, _same)(calibration)
        scores.append(score(run, forecast_run(run, calibration, executor, replicates=REPLICATES)))
    return scores


def _fitted(held_out: str, runs: Sequence[Run], removed: tuple[str, ...]) -> Calibration:
    """The calibration from all runs but one; those that nothing was removed of are kept."""
    if removed or held_out not in _plain:
        with _without(removed):
            found = streamed.calibrate_runs(runs)
        if removed:
            return found
        _plain[held_out] = found
    return _plain[held_out]


_plain: dict[str, Calibration] = {}


def _add(table: Table, name: str, scores: Sequence[Score], base: Sequence[Score]) -> float:
    """A row of the table; by how much the mean score is larger than the `base`."""
    each = np.array([s.interval.mean() - b.interval.mean() for s, b in zip(scores, base, strict=True)])
    mean = float(np.mean([s.interval.mean() for s in scores]))
    error = float(np.mean(np.abs(np.concatenate([s.error for s in scores]))))
    held = coverage(scores)[-1]
    spread = each.std(ddof=1) / np.sqrt(len(each)) if len(each) > 1 else float("nan")
    cells = [f"{mean:.4f}", f"{each.mean():+.4f}", f"{spread:.4f}", f"{100 * error:.2f}"]
    runs = [
        f"{1e3 * d:+.1f}" if name[0] != "(" else f"{s.interval.mean():.3f}" for d, s in zip(each, scores, strict=True)
    ]
    table.add_row(name, *cells, f"{100 * held[0]:.0f} ± {100 * held[1]:.0f}", *runs)
    return float(each.mean())


def _same(calibration: Calibration) -> Calibration:
    return calibration


def _noise(calibration: Calibration, **changed: Any) -> Calibration:
    return msgspec.structs.replace(calibration, noise=msgspec.structs.replace(calibration.noise, **changed))


def _clocks(calibration: Calibration, **changed: Any) -> Calibration:
    return msgspec.structs.replace(calibration, clocks=msgspec.structs.replace(calibration.clocks, **changed))


def _point(delay: str, calibration: Calibration) -> Calibration:
    old: Delay = getattr(calibration.clocks, delay)
    return _clocks(calibration, **{delay: Delay(quantiles=[old.mean], per_token=old.per_token)})


def _effects(**changed: float) -> Removal:
    def removal(stack: ExitStack) -> None:
        fitted = streamed.fit_random_effects

        def without(*args: Any) -> RandomEffects:
            return fitted(*args)._replace(**changed)

        stack.enter_context(mock.patch.object(streamed, "fit_random_effects", without))

    return removal


def _attribute(where: Any, name: str, value: Any) -> Removal:
    return lambda stack: stack.enter_context(mock.patch.object(where, name, value)) and None


def _forms(keep: Callable[[list[Form]], list[Form]]) -> Removal:
    def removal(stack: ExitStack) -> None:
        all_forms = streamed.candidate_forms
        stack.enter_context(mock.patch.object(streamed, "candidate_forms", lambda server: keep(all_forms(server))))

    return removal


def _flat(*names: str) -> Removal:
    """The prior of some coefficients ten times as wide."""

    def removal(stack: ExitStack) -> None:
        for of in ("_coefficients", "_mixed_coefficients"):
            known = getattr(priors, of)

            def wider(*args: Any, known: Any = known) -> Mapping[str, tuple[float, float]]:
                return {n: (m, 10 * sd if n in names else sd) for n, (m, sd) in known(*args).items()}

            stack.enter_context(mock.patch.object(priors, of, wider))

    return removal


def _no_cold_cache(forms: list[Form]) -> list[Form]:
    return [Form(f.model, tuple(t for t in f.terms if t != design.COLD_CACHE)) for f in forms]


def _no_levels(forms: list[Form]) -> list[Form]:
    plain = {"levels": "padded", "affine_levels": "affine"}
    kept = [Form(plain.get(f.model, f.model), tuple(t for t in f.terms if t not in design.TREND)) for f in forms]
    return list(dict.fromkeys(kept))


# what is removed of the fit, and of the calibration that was fitted
REMOVALS: dict[str, Removal] = {
    "drift": _effects(drift=0.0),
    "skewness": _effects(skew=0.0),
    "rung effect": _effects(rung=0.0),
    "run effect": _effects(run=0.0),
    "prefill share": _effects(prefill=1.0),
    "random effects in the fit": _attribute(streamed, "fit_random_effects", lambda *args: RandomEffects()),
    "admission timing": _attribute(
        fit, "admission_rows", lambda t, names, *args: (np.zeros((0, len(names))), np.zeros(0))
    ),
    "cold cache": _forms(_no_cold_cache),
    "levels": _forms(_no_levels),
    "longest context": _forms(lambda forms: [f for f in forms if "b3" not in f.terms]),
    "prior of fixed part": _attribute(priors, "FIXED_PART", (0.9, 4.0)),
    "prior of quadratic": _flat("a2", "s2"),
    "prior of prompts": _flat("a3", "s3"),
    "prior of caches": _flat("a4"),
    "prior of batch": _flat("b1", "s4", *design.TREND),
    "prior of context": _flat("b2", "s5", "b3"),
    "prior of joining": _flat("c0", "c1", "c2"),
    "prior of filter": _flat("f0", "f1", "f2"),
    "prior of latency": _flat("u0", "u1"),
    "latency bounds": _attribute(design, "latency_bounds", lambda *args: None),
}
AFTERWARDS: dict[str, Callable[[Calibration], Calibration]] = {
    "autocorrelation": partial(_noise, memory=0.0),
    "moving-average share": partial(_noise, returned=0.0),
    "step noise": partial(_noise, decode=[], prefill=[], memory=0.0, returned=0.0),
    "spacing": partial(_clocks, spacing=Delay()),
    "reading": partial(_clocks, reading=0.0),
    "turnaround spread": partial(_point, "turnaround"),
    "downlink spread": partial(_point, "downlink"),
    "uplink spread": partial(_point, "uplink"),
}
MECHANISMS = (*REMOVALS, *AFTERWARDS)


@contextmanager
def _without(removed: Sequence[str]) -> Iterator[None]:
    with ExitStack() as stack:
        for name in removed:
            if name in REMOVALS:
                REMOVALS[name](stack)
        yield


if __name__ == "__main__":
    sys.exit(main())

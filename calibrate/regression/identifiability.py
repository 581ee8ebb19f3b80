"""Warnings about a fit: outlying rungs, runs of different machines, coefficients that the data hardly tell apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from calibrate.regression.design import BLOCK_SECONDS, Rows
from calibrate.regression.fit import Regression
from sim.model.warning import Notice, notice
from sim.run import Run
from sim.steptime.basis import AFFINE, PREFILL

PREFILL_TERMS = {name for name, term in AFFINE.items() if term.of == PREFILL}
_TYPICAL = 0.02  # relative: a rung this far off is no outlier, however alike the others are
_UNLIKELY = 3.0  # standard deviations
MAX_CORRELATION = 0.95  # |correlation| of a prefill's coefficients to warn about; 0.9 is usual for a mix of prompts


def outlying_rungs(runs: Sequence[Run], rows: Rows, regression: Regression) -> list[Notice]:
    """Rungs during which the machine was faster or slower than its random effects make likely."""
    seconds, predicted = (np.bincount(rows.rung, weights=x) for x in (rows.seconds, regression.predicted))
    off = seconds / predicted - 1
    blocks = np.bincount(rows.rung_of_block)
    usual = np.array([regression.effects.rung_sd(n * BLOCK_SECONDS, 1) for n in blocks.tolist()])
    usual = np.hypot(np.maximum(usual, _TYPICAL), regression.effects.run)
    warnings = []
    for rung in np.flatnonzero(np.abs(off) > _UNLIKELY * usual).tolist():
        at = int(np.flatnonzero(rows.rung == rung)[0])
        run = runs[int(rows.run[at])]
        load = run.rungs[int(rows.table["rung"].iloc[at])].load
        how = f"{abs(off[rung]):.0%} {'slower' if off[rung] > 0 else 'quicker'}"
        warnings.append(
            notice(
                "outlying-rung",
                f"{run.name}: at load {load:g} the machine was {how} than the rest says",
            )
        )
    return warnings


def different_machines(runs: Sequence[Run]) -> list[Notice]:
    """A warning where runs say that they were measured on different machines."""
    first = runs[0]
    others = [run.name for run in runs if run.scenario.machine != first.scenario.machine]
    if not others:
        return []
    return [
        notice(
            "different-machines",
            f"{', '.join(others)}: not of the machine that {first.name} says it is of; fitted as one all the same",
        )
    ]


def not_identified(runs: Sequence[Run], rows: Rows, together: list[tuple[str, str, float]]) -> list[Notice]:
    """What these runs cannot tell; `together` are the correlations of the draws."""
    warnings = []
    if not any(rung.users for run in runs for rung in run.rungs):
        warnings.append(
            notice(
                "turnaround-assumed",
                "requests did not wait for answers in these runs: how soon a user sends the next is assumed, and "
                "in forecasts of users milliseconds of that decide who shares a prefill",
            )
        )
    alike = [pair for pair in together if set(pair[:2]) <= PREFILL_TERMS and abs(pair[2]) > MAX_CORRELATION]
    prompts = rows.longest[rows.prefill]
    if len(prompts) and np.ptp(prompts) < 0.05 * prompts.mean():
        warnings.append(
            notice(
                "one-prompt-length",
                f"every prompt had about {prompts.mean():.0f} tokens: costs per token, per pair of tokens "
                "attended and per prompt cannot be told apart; bands of forecasts for other prompts include that",
            )
        )
    elif alike:
        pairs = ", ".join(f"{one} and {other} correlate by {r:.2f}" for one, other, r in alike)
        warnings.append(
            notice(
                "prefill-collinear",
                "a prefill's constant and its costs per token, per pair of tokens attended and per prompt are "
                f"hardly told apart ({pairs}); bands of forecasts for other prompts include that",
            )
        )
    for one, other, r in together:
        if {one, other} == {"b1", "b2"} or {one, other} == {"b0", "b2"}:
            warnings.append(
                notice(
                    "batch-context-collinear",
                    f"batch size and context moved together ({one} and {other} correlate by {r:.2f})",
                )
            )
    return warnings

"""What is believed of step times before they are measured, as pseudo-observations.

One prompt length cannot tell a cost per token from one per prompt or per squared token, and answers of one length move
batch size and context together. Least squares alone would then choose arbitrarily, and a forecast for other lengths
would inherit the choice. So weak beliefs, all relative to what was measured, settle what the data leave open, and joint
draws scatter over it: each draw takes its own sample of the beliefs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibrate.regression.design import TREND, Rows
from sim.steptime.linear import LEVEL

Floats = NDArray[np.float64]

# A prefill's fixed part, of a decode step of one sequence: both read all weights once. 0.9 to 1.8 of it by the tables
# of Splitwise and LMDeploy in data/, 0.6 where router-http was recorded: less where reading and computing overlap.
FIXED_PART = (0.9, 0.4)
PROMPT_OVERHEAD = 16.0  # tokens: what one more prompt costs besides its tokens (a launch, a sampled token), about,
PROMPT_SHARE = 0.3  # or this share of a short one: else prompts of 20 tokens would leave long ones nearly free
# tokens: the prompt length at which attention costs as much as all else, about at the earliest. Padded servers here are
# those without flash attention, and small.
QUADRATIC_FROM = {False: 40000.0, True: 3000.0}
CACHE_FROM = 20000.0  # tokens: a padded prefill so large that outgrowing the caches has doubled its cost
CONTEXT_SHARE = (0.5, 0.29)  # of what one more sequence costs, the part due to its context: anything from 0 to 1
BOOKKEEPING = 0.5  # of what one more sequence costs a step: joining and dropping go through the same lists, about
LEVEL_SPREAD = 0.12  # how far a batch size's own time is from the smooth trend, relative
# In ln(batch size): how far two sizes may be apart and still resemble each other. On the recorded small server, which
# pads, 16 rows fill what 15 do not, and so do all larger batches seen.
LEVEL_REACH = {False: 0.35, True: 1.0}
WAY = 1.5e-3  # s: to an idle server and back, on one machine
COUNTING = 1e-6  # s: a router's tokeniser per token, about (Hugging Face's, in Rust, one thread; as a client's writing)
FAR = 3.0  # times that: a client is believed to be elsewhere from here on


@dataclass(frozen=True)
class Prior:
    """Pseudo-observations `rows @ x ≈ target` of unit noise, (k, p) and (k,), and the lowest value of each x."""

    names: tuple[str, ...]
    rows: Floats
    target: Floats
    floor: Floats

    def extended(self, rows: Floats, target: Floats) -> Prior:
        """The same beliefs and some more."""
        return Prior(self.names, np.vstack([self.rows, rows]), np.concatenate([self.target, target]), self.floor)


def prior_for(names: tuple[str, ...], rows: Rows, padded: bool) -> Prior:
    """The beliefs for these coefficients, scaled by a first look at the rows."""
    beliefs = {name: b for name, b in _beliefs(rows, padded).items() if name in names}
    matrix = np.zeros((len(beliefs), len(names)))
    target = np.zeros(len(beliefs))
    for i, (name, (mean, sd)) in enumerate(beliefs.items()):
        matrix[i, names.index(name)] = 1.0 / sd
        target[i] = mean / sd
    prior = _with_fixed_part(Prior(names, matrix, target, np.zeros(len(names))), rows)
    return _with_levels(prior, rows, LEVEL_REACH[padded]) if any(n.startswith(LEVEL) for n in names) else prior


def _beliefs(rows: Rows, padded: bool) -> Mapping[str, tuple[float, float]]:
    """Mean and standard deviation of each coefficient of which something is believed."""
    t, y, pre = rows.table, rows.seconds, rows.prefill
    n, longest = t["sequences"].to_numpy(np.float64), rows.longest
    believed = {"u0": _way(rows), "u1": (COUNTING, COUNTING)}
    if pre.any():
        size, time = float(longest[pre].mean()), float(y[pre].mean())
        per_token = _slope(n[pre], y[pre], fallback=0.7 * time / float(n[pre].mean())) / size
        believed |= {
            "a0": (0.3 * time, 0.3 * time),  # and about a decode step: `_with_fixed_part`
            "a2": _somewhat(2 * per_token / QUADRATIC_FROM[padded]),  # a prompt of n attends n (n + 1) / 2 pairs
            "a3": (0.0, min(PROMPT_OVERHEAD, PROMPT_SHARE * size) * per_token),
            "a4": _somewhat(per_token / CACHE_FROM),
        }
    if (~pre).any():
        context, time, size = float(longest[~pre].mean()), float(y[~pre].mean()), float(n[~pre].mean())
        per_sequence = _slope(n[~pre], y[~pre], fallback=0.1 * time)
        share, spread = CONTEXT_SHARE
        believed |= {
            "b1": (0.0, 0.2 * time),
            **dict.fromkeys(TREND, (0.0, 0.5 * time)),
            "b2": (share * per_sequence / context, spread * per_sequence / context),
            "b3": (0.0, 0.1 * time / context),
        }
        for what in "cf":  # joining and dropping: some tenth of a step
            believed |= {
                f"{what}0": (0.0, 0.1 * time),
                f"{what}1": (0.0, BOOKKEEPING * per_sequence),
                f"{what}2": (0.0, 0.1 * time / size / context),
            }
    return believed


def _with_fixed_part(prior: Prior, rows: Rows) -> Prior:
    """A prefill of no tokens takes about as long as a decode step of one sequence and no context."""
    share, spread = FIXED_PART
    sd = spread * float(rows.seconds[~rows.prefill].mean())
    step = dict.fromkeys(("b0", "b1", f"{LEVEL}1"), 1.0) | {name: float(f(np.ones(1))[0]) for name, f in TREND.items()}
    row = [float(name == "a0") / sd - share * step.get(name, 0.0) / sd for name in prior.names]
    return prior.extended(np.array([row]), np.zeros(1))


def _with_levels(prior: Prior, rows: Rows, reach: float) -> Prior:
    """Levels are deviations from the trend that resemble those of neighbouring sizes."""
    at = np.array([i for i, name in enumerate(prior.names) if name.startswith(LEVEL)])
    sizes = np.array([float(prior.names[i].removeprefix(LEVEL)) for i in at])
    n, y = rows.table["sequences"].to_numpy(np.float64)[~rows.prefill], rows.seconds[~rows.prefill]
    slope = _slope(n, y, fallback=0.0)
    spread = LEVEL_SPREAD * np.maximum(float(y.mean()) + slope * (sizes - float(n.mean())), 0.3 * float(y.mean()))
    apart = np.abs(np.subtract.outer(np.log(sizes), np.log(sizes)))
    covariance = np.outer(spread, spread) * np.exp(-apart / reach)
    whitened = np.zeros((len(at), len(prior.names)))
    whitened[:, at] = np.linalg.inv(np.linalg.cholesky(covariance))
    floor = prior.floor.copy()
    floor[at] = -4.0 * spread  # nonnegative least squares wants a bound; this one is far
    return Prior(prior.names, prior.rows, prior.target, floor).extended(whitened, np.zeros(len(at)))


def _somewhat(scale: float) -> tuple[float, float]:
    """What is positive and of this order: the mean and standard deviation of a half-normal."""
    return 0.8 * scale, 0.6 * scale


def _way(rows: Rows) -> tuple[float, float]:
    """Belief about the way to the server and back: milliseconds, unless lone prefills on an idle server clearly say
    more; without such, what requests say that just missed a look of the router (`way`)."""
    t = rows.table
    alone = rows.prefill & (t["sequences"] == 1).to_numpy()
    idle = t["idle"].to_numpy()
    if not (alone & idle).any() or not (alone & ~idle).any():
        if rows.way is None or min(rows.way) < FAR * WAY:
            return WAY, WAY
        middle, half = sum(rows.way) / 2, abs(rows.way[1] - rows.way[0]) / 2
        return middle, max(half, 0.1 * middle)
    design = np.stack([np.ones(int(alone.sum())), rows.longest[alone], idle[alone].astype(np.float64)], axis=1)
    found = np.linalg.lstsq(design, rows.seconds[alone], rcond=None)[0]
    longer, missed = float(found[2]), rows.seconds[alone] - design @ found
    few = min(int((alone & idle).sum()), int((alone & ~idle).sum()))
    clear = longer - WAY > 5.0 * float(missed.std()) / np.sqrt(few)
    return (longer, longer) if clear else (WAY, WAY / 2)


def _slope(x: Floats, y: Floats, fallback: float) -> float:
    """By how much y grows with x, at least a tenth of `fallback`; `fallback` where x does not vary."""
    if np.ptp(x) == 0:
        return fallback
    covariance = np.cov(x, y)
    return max(float(covariance[0, 1] / covariance[0, 0]), 0.1 * fallback)

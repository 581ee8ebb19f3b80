"""Weakly informative priors of the coefficients, as pseudo-observations.

With prompts of one length a cost per token, per prompt and per pair of tokens attended look alike, and with answers of
one length batch size and context grow together. Least squares alone would choose between them arbitrarily, and a
forecast for other lengths would inherit the choice. The priors are relative to what was measured. Each joint draw adds
its own noise to their targets, so that draws spread over what the data leave open.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from calibrate.arrays import Floats
from calibrate.regression.design import TREND, Rows
from sim.steptime.linear import LEVEL

# Mean and sd of a prefill's constant, in decode steps of one sequence: both read all weights once. It is 0.9 to 1.8 in
# the tables of Splitwise and LMDeploy in data/, 0.6 for router-http: less where reading overlaps computing.
FIXED_PART = (0.9, 0.4)
PROMPT_OVERHEAD = 16.0  # tokens: sd of what a prompt costs besides its tokens (a launch, a sampled token),
PROMPT_SHARE = 0.3  # at most this share of it: with prompts of 20 tokens, long ones would be nearly free
# tokens: about the shortest prompt whose attention costs as much as all else, by whether the server pads (a small one
# without flash attention)
QUADRATIC_FROM = {False: 40000.0, True: 3000.0}
CACHE_FROM = 20000.0  # tokens of a padded prefill whose cost has doubled because it outgrew the caches
CONTEXT_SHARE = (
    0.5,
    0.29,
)  # mean and sd, as if uniform on 0 to 1: the share of one more sequence's cost due to its context
BOOKKEEPING = 0.5  # sd, of one more sequence's cost in a step: joining and dropping go through the same lists
LEVEL_SPREAD = 0.12  # relative sd of a batch size's own time around the smooth trend
# Correlation length of those deviations in ln(batch size), by whether the server pads. On the recorded small server,
# which pads, 16 rows use the processor fully and 15 do not, nor did any smaller batch.
LEVEL_REACH = {False: 0.35, True: 1.0}
LATENCY = 1.5e-3  # s: network latency to an idle server and back, on one machine
TOKENIZING = 1e-6  # s per token: Hugging Face's tokenizer in Rust, one thread, about; a client's writing is as fast
FAR = 3.0  # times `LATENCY`: from here on a client is on another network


@dataclass(frozen=True)
class Prior:
    """Pseudo-observations `rows @ x ≈ target` of unit variance, (k, p) and (k,), and the lower bound of each x,
    (p,)."""

    names: tuple[str, ...]
    rows: Floats
    target: Floats
    floor: Floats

    def extended(self, rows: Floats, target: Floats) -> Prior:
        """The same prior with more pseudo-observations."""
        return Prior(self.names, np.vstack([self.rows, rows]), np.concatenate([self.target, target]), self.floor)


def prior_for(names: tuple[str, ...], rows: Rows, padded: bool) -> Prior:
    """The prior of these coefficients, scaled by first estimates from the rows."""
    found = _mixed_coefficients(rows) if "s0" in names else _coefficients(rows, padded)
    known = {name: b for name, b in found.items() if name in names}
    matrix = np.zeros((len(known), len(names)))
    target = np.zeros(len(known))
    for i, (name, (mean, sd)) in enumerate(known.items()):
        matrix[i, names.index(name)] = 1.0 / sd
        target[i] = mean / sd
    prior = Prior(names, matrix, target, np.zeros(len(names)))
    if "a0" in names:
        prior = _with_fixed_part(prior, rows)
    return _with_levels(prior, rows, LEVEL_REACH[padded]) if any(n.startswith(LEVEL) for n in names) else prior


def _coefficients(rows: Rows, padded: bool) -> Mapping[str, tuple[float, float]]:
    """Mean and standard deviation of each coefficient that has a prior of its own."""
    t, y, pre = rows.table, rows.seconds, rows.prefill
    n, longest = t["sequences"].to_numpy(np.float64), rows.longest
    known = {"u0": _latency(rows), "u1": (TOKENIZING, TOKENIZING)}
    if pre.any():
        size, time = float(longest[pre].mean()), float(y[pre].mean())
        per_token = _slope(n[pre], y[pre], fallback=0.7 * time / float(n[pre].mean())) / size
        known |= {
            "a0": (0.3 * time, 0.3 * time),  # and see `_with_fixed_part`
            "a2": _half_normal(2 * per_token / QUADRATIC_FROM[padded]),  # a prompt of n attends n (n + 1) / 2 pairs
            "a3": (0.0, min(PROMPT_OVERHEAD, PROMPT_SHARE * size) * per_token),
            "a4": _half_normal(per_token / CACHE_FROM),
        }
    if (~pre).any():
        context, time, size = float(longest[~pre].mean()), float(y[~pre].mean()), float(n[~pre].mean())
        per_sequence = _slope(n[~pre], y[~pre], fallback=0.1 * time)
        share, spread = CONTEXT_SHARE
        known |= {
            "b1": (0.0, 0.2 * time),
            **dict.fromkeys(TREND, (0.0, 0.5 * time)),
            "b2": (share * per_sequence / context, spread * per_sequence / context),
            "b3": (0.0, 0.1 * time / context),
        }
        for what in "cf":  # joining and dropping: about a tenth of a step
            known |= {
                f"{what}0": (0.0, 0.1 * time),
                f"{what}1": (0.0, BOOKKEEPING * per_sequence),
                f"{what}2": (0.0, 0.1 * time / size / context),
            }
    return known


def _mixed_coefficients(rows: Rows) -> Mapping[str, tuple[float, float]]:
    """The same of a form whose steps hold chunks of prompts beside decodes, as `_coefficients` has those of the
    corresponding terms; scaled by a plane through tokens and decoding requests."""
    t, y = rows.table, rows.seconds
    tokens, decodes = (t[name].to_numpy(np.float64) for name in ("prefill_tokens", "decode_sequences"))
    plane = np.stack([np.ones(len(y)), tokens, decodes], axis=1) / y[:, None]
    constant, per_token, per_sequence = nnls(plane, np.ones(len(y)))[0].tolist()
    constant = constant or float(y.min())  # noise can leave the plane none; the constant exceeds no step
    per_token = per_token or constant / max(float(tokens.max(initial=0.0)), 1.0)
    per_sequence = per_sequence or 0.1 * constant / max(float(decodes.mean()), 1.0)
    context = float(t["decode_longest"].to_numpy(np.float64)[decodes > 0].mean())
    prompt = float(t["prefill_longest"].to_numpy(np.float64)[tokens > 0].mean()) if (tokens > 0).any() else 1.0
    share, spread = CONTEXT_SHARE
    return {
        "u0": _latency(rows),
        "u1": (TOKENIZING, TOKENIZING),
        "s2": _half_normal(2 * per_token / QUADRATIC_FROM[True]),  # the wider of the two: small servers run it too
        "s3": (0.0, min(PROMPT_OVERHEAD, PROMPT_SHARE * prompt) * per_token),
        "s4": (0.0, max(0.2 * constant, per_sequence)),
        "s5": (share * per_sequence / context, spread * per_sequence / context),
    }


def _with_fixed_part(prior: Prior, rows: Rows) -> Prior:
    """The constant of a prefill is about a decode step of one sequence without context (`FIXED_PART`)."""
    share, spread = FIXED_PART
    sd = spread * float(rows.seconds[~rows.prefill].mean())
    step = dict.fromkeys(("b0", "b1", f"{LEVEL}1"), 1.0) | {name: float(f(np.ones(1))[0]) for name, f in TREND.items()}
    row = [float(name == "a0") / sd - share * step.get(name, 0.0) / sd for name in prior.names]
    return prior.extended(np.array([row]), np.zeros(1))


def _with_levels(prior: Prior, rows: Rows, reach: float) -> Prior:
    """Levels are deviations from the trend, correlated between neighbouring sizes."""
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


def _half_normal(scale: float) -> tuple[float, float]:
    """Mean and standard deviation of a half-normal distribution of this scale."""
    return 0.8 * scale, 0.6 * scale


def _latency(rows: Rows) -> tuple[float, float]:
    """Mean and standard deviation of the network latency to the server and back, s.

    `LATENCY`, unless single prefills clearly take longer on an idle server than on a busy one; where there are none to
    compare, the bounds from admissions (`Rows.latency`).
    """
    t = rows.table
    alone = rows.prefill & (t["sequences"] == 1).to_numpy()
    idle = t["idle"].to_numpy()
    if not (alone & idle).any() or not (alone & ~idle).any():
        if rows.latency is None or min(rows.latency) < FAR * LATENCY:
            return LATENCY, LATENCY
        middle, half = sum(rows.latency) / 2, abs(rows.latency[1] - rows.latency[0]) / 2
        return middle, max(half, 0.1 * middle)
    design = np.stack([np.ones(int(alone.sum())), rows.longest[alone], idle[alone].astype(np.float64)], axis=1)
    found = np.linalg.lstsq(design, rows.seconds[alone], rcond=None)[0]
    longer, missed = float(found[2]), rows.seconds[alone] - design @ found
    few = min(int((alone & idle).sum()), int((alone & ~idle).sum()))
    clear = longer - LATENCY > 5.0 * float(missed.std()) / np.sqrt(few)
    return (longer, longer) if clear else (LATENCY, LATENCY / 2)


def _slope(x: Floats, y: Floats, fallback: float) -> float:
    """Least-squares slope of y on x, at least a tenth of `fallback`; `fallback` where x does not vary."""
    if np.ptp(x) == 0:
        return fallback
    covariance = np.cov(x, y)
    return max(float(covariance[0, 1] / covariance[0, 0]), 0.1 * fallback)

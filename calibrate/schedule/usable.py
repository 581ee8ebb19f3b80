"""Which rebuilt steps can be timed, with a warning for what is left out."""

from __future__ import annotations

import pandas as pd

from calibrate.arrays import Bools
from sim.model.warning import Notice, notice
from sim.run import Run, Rung

_REMAINING = 0.25  # share of the steps that must remain without busy rungs, or these are used too
_LOADS = 2  # rungs that must remain
_NO_STEP = 0.1  # of the median of a batch size: no step is shorter
_STALL, _NEIGHBOURS = 5.0, 21  # times the median of so many steps of its kind; at most 2.8 in the recorded runs
_RARE = 0.01  # share of the steps: more stalls than that are typical of the server
_NOTED = 0.002  # share of the steps left out that deserves a warning
STALLED = 20.0  # ms: a client whose canary's 99th percentile exceeds this measures itself (docs/measuring.md)


def usable_steps(run: Run, steps: pd.DataFrame, idle: pd.Series, warnings: list[Notice]) -> Bools:
    """Which of a run's `steps` can be fitted, (steps,): used ones whose start was seen or, at an `idle` server, is a
    request's.

    Left out, each with a warning, are steps whose tokens came together, steps during a stall, and rungs whose client
    was too busy to time anything.
    """
    used = steps.loc[steps["used"], "rung"].unique()
    limited = [i for i, g in enumerate(run.rungs) if i in used and client_limited(g)]
    usable = (steps["seen"] | idle) & steps["used"]
    count = max(1, int(steps["used"].sum()))
    coalesced = _coalesced(steps) & usable
    if (share := coalesced.sum() / count) > _NOTED:
        warnings.append(
            notice(
                "steps-lumped",
                f"{run.name}: {share:.1%} of the steps are left out: their tokens came together with those of "
                "others (a delayed client, or a proxy that buffers)",
            )
        )
    usable &= ~coalesced & (steps["seconds"] > 0)
    stalled = _stalled(steps) & usable
    if 0 < stalled.sum() <= _RARE * count:
        usable &= ~stalled
        longest = 1e3 * float(steps.loc[stalled, "seconds"].max())
        warnings.append(
            notice(
                "steps-stalled",
                f"{run.name}: {int(stalled.sum())} of {count} steps are left out, over {_STALL:.0f} times as long as "
                f"those around them (up to {longest:.0f} ms): a stall, and forecasts have none",
            )
        )
    dropped = usable & steps["rung"].isin(limited)
    remaining = steps.loc[usable & ~dropped, "rung"].nunique()
    # a fragment of a rung says no more than a busy client, and one rung shows no growth with the batch
    if limited and remaining >= _LOADS and (usable & ~dropped).sum() >= _REMAINING * usable.sum():
        usable &= ~dropped
        loads = ", ".join(f"{run.rungs[i].load:g}" for i in limited)
        warnings.append(
            notice(
                "client-limited-steps",
                f"{run.name}: {dropped.sum() / count:.0%} of the steps are left out, those at load {loads}: "
                "the client was too busy to time them",
            )
        )
    elif limited:
        warnings.append(
            notice(
                "client-limited",
                f"{run.name}: the client was too busy to time itself at nearly every load used; its steps look longer",
            )
        )
    return usable.to_numpy(bool)


def _coalesced(steps: pd.DataFrame) -> pd.Series:
    """Which steps ended, or began, at an instant that is the client's and not the server's.

    Where a client is delayed, or something gathers tokens, several steps seem to end at once: the first looks long, the
    others take no time, and the step after them began earlier than it seems.
    """
    seconds = steps["seconds"]
    usual = seconds.where(seconds > 0).groupby([steps["kind"], steps["sequences"]]).transform("median")
    nothing = steps["seen"] & ((seconds <= 0) | (seconds < _NO_STEP * usual))
    return nothing | nothing.shift(1, fill_value=False) | nothing.shift(-1, fill_value=False)


def _stalled(steps: pd.DataFrame) -> pd.Series:
    """Which steps took several times as long as the steps of their kind around them, prefills per token.

    A stall of a third of a second says nothing about steps, and least squares would follow it: one such step in 7,000
    made the forecast for 32 users half as long again.
    """
    each = steps["seconds"] / steps["prefill_tokens"].clip(lower=1)
    mixed = (steps["decode_sequences"] > 0) & (steps["prefill_tokens"] > 0)
    each = each.where(steps["seen"] & (each > 0) & ~mixed)
    usual = each.groupby(steps["kind"]).transform(lambda x: x.rolling(_NEIGHBOURS, center=True, min_periods=5).median())
    return each > _STALL * usual


def client_limited(rung: Rung) -> bool:
    """Whether the client was too busy, by its recorded lag; earlier runs have a flag for a lag of 5 % of a short
    gap."""
    canary = rung.extra.get("canary_p99_ms")
    if isinstance(canary, int | float):
        return canary > STALLED
    return bool(rung.extra.get("client_limited"))

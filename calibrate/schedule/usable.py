"""Which rebuilt steps say how long the server's steps take, and what was left out, in words."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sim.run import Run, Rung

_CALM = 0.25  # share of the steps that busy rungs must leave, or they are used too
_LOADS = 2  # loads that must be left
_NO_STEP = 0.1  # of the usual time of a batch: no step of it is that quick
_STILL, _BESIDE = 5.0, 21  # times the median of so many steps of its kind; on the recorded runs it is 2.8 at the most
_SELDOM = 0.01  # share of the steps from which on that is how the server is
_NOTED = 0.002  # share of the steps left out for that which is said
STALLED = 20.0  # ms: a client whose canary is later than this at its 99th percentile times itself (docs/measuring.md)


def usable_steps(run: Run, steps: pd.DataFrame, idle: pd.Series, warnings: list[str]) -> NDArray[np.bool_]:
    """Which `steps` of a run's schedule are: of those used, whose beginning was seen or is a request's at an `idle`
    server. Left out, with a warning: steps whose tokens came in a lump, those during which something stood still, and
    rungs whose client was too busy to time anything.
    """
    used = steps.loc[steps["used"], "rung"].unique()
    limited = [i for i, g in enumerate(run.rungs) if i in used and client_limited(g)]
    usable = (steps["seen"] | idle) & steps["used"]
    count = max(1, int(steps["used"].sum()))
    lumped = _lumped(steps) & usable
    if (share := lumped.sum() / count) > _NOTED:
        warnings.append(
            f"{run.name}: {share:.1%} of the steps are left out: their tokens came in one lump with those of "
            "others (a client that was held up, or something on the way that gathers them)"
        )
    usable &= ~lumped & (steps["seconds"] > 0)
    still = _stood_still(steps) & usable
    if 0 < still.sum() <= _SELDOM * count:
        usable &= ~still
        longest = 1e3 * float(steps.loc[still, "seconds"].max())
        warnings.append(
            f"{run.name}: {int(still.sum())} of {count} steps are left out, over {_STILL:.0f} times as long as those "
            f"around them (up to {longest:.0f} ms): something stood still, and in a forecast nothing does"
        )
    dropped = usable & steps["rung"].isin(limited)
    calm = steps.loc[usable & ~dropped, "rung"].nunique()
    # a fragment of a rung is no better witness than a busy client, and one rung shows no growth with the batch
    if limited and calm >= _LOADS and (usable & ~dropped).sum() >= _CALM * usable.sum():
        usable &= ~dropped
        loads = ", ".join(f"{run.rungs[i].load:g}" for i in limited)
        warnings.append(
            f"{run.name}: {dropped.sum() / count:.0%} of the steps are left out, those at load {loads}: "
            "the client was too busy to time them"
        )
    elif limited:
        warnings.append(
            f"{run.name}: the client was too busy to time itself at nearly every load used; its steps look longer"
        )
    return usable.to_numpy(bool)


def _lumped(steps: pd.DataFrame) -> pd.Series:
    """Which steps ended, or began, at an instant that is the client's and not the server's.

    A client that is held up, and whatever gathers tokens on the way, lets several steps seem to end at once: the first
    of them looks long, the others like nothing, and the step after them began before the lump was seen.
    """
    seconds = steps["seconds"]
    usual = seconds.where(seconds > 0).groupby([steps["kind"], steps["sequences"]]).transform("median")
    nothing = steps["seen"] & ((seconds <= 0) | (seconds < _NO_STEP * usual))
    return nothing | nothing.shift(1, fill_value=False) | nothing.shift(-1, fill_value=False)


def _stood_still(steps: pd.DataFrame) -> pd.Series:
    """Which steps took several times what a step of their kind beside them took, a prefill by its tokens.

    A machine that stops for a third of a second once says nothing of what a step takes, and least squares would have it
    said by one: of one such step in 7,000 the forecast for 32 users became half as long again.
    """
    each = steps["seconds"] / steps["prefill_tokens"].clip(lower=1)
    each = each.where(steps["seen"] & (each > 0))
    usual = each.groupby(steps["kind"]).transform(lambda x: x.rolling(_BESIDE, center=True, min_periods=5).median())
    return each > _STILL * usual


def client_limited(rung: Rung) -> bool:
    """By the lag that was recorded; runs of earlier versions also flagged rungs whose lag was 5 % of a short gap."""
    canary = rung.extra.get("canary_p99_ms")
    if isinstance(canary, int | float):
        return canary > STALLED
    return bool(rung.extra.get("client_limited"))

"""Warnings about work of the server that a run does not show: other requests, absent users, tokens sent together."""

from __future__ import annotations

import numpy as np
import pandas as pd

from calibrate.arrays import Floats
from sim.model.status import BROKEN, Status
from sim.model.warning import Notice, notice
from sim.run import Run

_FEW = 0.01  # share of broken streams that needs no warning


def coalesced(times: list[Floats]) -> list[Notice]:
    """A warning where tokens arrive together: single steps were not seen then, only their sums."""
    gaps = [np.diff(t) for t in times if len(t) > 8]
    if not gaps:
        return []
    lumps = float(np.mean(np.concatenate([g < 0.1 * np.median(g[g > 0]) if (g > 0).any() else g >= 0 for g in gaps])))
    if lumps <= 0.02:
        return []
    return [
        notice(
            "lumped-tokens",
            f"{lumps:.0%} of the tokens arrived together with the one before: a proxy or the client buffers them",
        )
    ]


def hidden(steps: pd.DataFrame) -> list[Notice]:
    """A warning where decode steps look as if prefills of other clients lay between them."""
    alone = (steps["decode_sequences"] > 0) & (steps["prefill_tokens"] == 0)
    plain = steps[alone & steps["seen"] & (steps["once_joined"] == 0)]
    prefills = int((steps["kind"] == "prefill").sum())
    if len(plain) < 50:
        return []
    typical = plain.groupby("sequences")["seconds"].transform("median")
    # a long step with nothing after it is several that were seen at once
    followed = steps["seconds"].shift(-1, fill_value=np.inf)[plain.index] > 0.1 * typical
    long = int(((plain["seconds"] > 3.0 * typical) & followed).sum())
    if long <= max(2, 0.01 * prefills):  # on the recorded runs, whose clients are all known, at most one
        return []
    return [
        notice(
            "other-traffic",
            f"{long} of {len(plain)} decode steps took over three times the usual time with no prefill of this "
            "client's: other clients' requests run on this server, and batch sizes are larger than they look",
        )
    ]


def unstreamed(run: Run) -> list[Notice]:
    """A warning where some answers were not streamed: they lengthened the batches at unknown times."""
    requests, times = run.requests, run.token_times or []
    answered = (requests["status"] == Status.OK).to_numpy() & (requests["output_tokens"] > 1).to_numpy()
    whole = int((answered & np.array([not len(t) for t in times], dtype=bool)).sum()) if times else 0
    if not whole:
        return []
    return [
        notice(
            "unstreamed-answers",
            f"{run.name}: {whole} of {int(answered.sum())} answers were not streamed: batches were larger than they "
            "look",
        )
    ]


def lost(run: Run) -> list[Notice]:
    """A warning where streams broke off: the server may have continued them unseen."""
    requests = run.requests
    broken = int((requests["status"].isin(BROKEN) & (requests["output_tokens"] > 0)).sum())
    if broken <= _FEW * len(requests):
        return []
    return [
        notice(
            "broken-streams",
            f"{run.name}: {broken} of {len(requests)} streams broke off: if the server continued them, "
            "batches were larger than they look",
        )
    ]


def absent(run: Run) -> list[Notice]:
    """A warning where some users of a load are not in the run: their requests lengthened the batches too."""
    requests, missing = run.requests, []
    for rung in run.rungs:
        if rung.users is None or rung.end <= rung.settled:
            continue
        here = (requests["sent"] < rung.end) & (requests["ended"].fillna(np.inf) > rung.settled)
        there = int(requests.loc[here & (requests["user"] >= 0), "user"].nunique())
        if 0 < there < rung.users:
            missing.append(f"{there} of {rung.users}")
    if not missing:
        return []
    return [
        notice("users-missing", f"{run.name} shows only {', '.join(missing)} users: batches were larger than they look")
    ]

"""One replicate of a forecast: a ladder simulated once, with the metrics of its windows and their circumstances.

The extra columns say why a rung is what it is: how far its batches went (`max_…`) and how full the two budgets were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sim.executors import Tell, silent
from sim.model.server import EngineFlags
from sim.model.steps import held_before
from sim.replicate import Task
from sim.results import metrics, rates
from sim.run import Run, Rung

COLUMNS = (
    "start",
    "end",
    "count",
    "prefill_tokens",
    "prefill_sequences",
    "decode_sequences",
    "decode_context",
)


def replicate(task: Task, tell: Tell = silent) -> pd.DataFrame:
    """The metrics of one replicate with long-run rates, one row a rung, with the columns of `circumstances`."""
    run = task.run(tell)
    return _described(run, rates.table(run), [machine.server for machine in task.groups or [task.model]])


def described(run: Run, server: EngineFlags) -> pd.DataFrame:
    """What a simulated run's windows counted, with their circumstances, one row a rung."""
    return _described(run, metrics.table(run), [server])


def _described(run: Run, table: pd.DataFrame, servers: Sequence[EngineFlags]) -> pd.DataFrame:
    extra = [circumstances(run, rung, servers) for rung in run.rungs if rung.end > rung.settled]
    return pd.concat([table, pd.DataFrame(extra)], axis=1)


def circumstances(run: Run, rung: Rung, servers: Sequence[EngineFlags]) -> dict[str, float]:
    """What bounded the servers (of each group of a fleet) within one rung: extremes in tokens and requests, and how
    often the limits of their engine were met (`EngineFlags.full`), on the average over the replicas."""
    assert run.steps is not None
    low, high = rung.settled, rung.end
    steps = {name: run.steps[name].to_numpy() for name in COLUMNS}
    here = (steps["end"] > rung.start) & (steps["start"] < high)
    decode = here & (steps["decode_sequences"] > 0)
    requests = run.requests
    sent = requests["scheduled"].to_numpy()
    begun = (sent >= rung.start) & (sent < high)
    prompts, asked = (requests[name].to_numpy()[begun] for name in ("prompt_tokens", "max_new_tokens"))
    prompt, usual = (int(np.median(x)) if len(x) else 0 for x in (prompts, asked))
    steps |= {
        "held": held_before(run.steps),
        "inside": here & (steps["start"] >= low),
    }

    def most(values: NDArray[np.int64]) -> float:
        return float(values.max(initial=0))

    return {
        "max_prompt_tokens": most(prompts),
        "max_batch_prefill_tokens": most(steps["prefill_tokens"][here & ~decode]),
        "max_sequences": most(steps["decode_sequences"][decode]),
        "max_context_tokens": most((steps["decode_context"] + steps["decode_sequences"] * steps["count"])[decode]),
    } | _full(run, servers, steps, prompt, usual)


def _full(
    run: Run, servers: Sequence[EngineFlags], steps: dict[str, NDArray[Any]], prompt: int, usual: int
) -> dict[str, float]:
    if len(servers) == 1:
        return servers[0].full(steps, prompt, usual)
    assert run.steps is not None
    shares = np.array([group.replicas for group in run.scenario.groups]) / run.scenario.served_by.count
    last = np.cumsum([group.replicas for group in run.scenario.groups])
    of = np.searchsorted(last, run.steps["replica"].to_numpy(), side="right")  # the group of each row
    found = [
        server.full(steps | {"inside": steps["inside"] & (of == place)}, prompt, usual)
        for place, server in enumerate(servers)
    ]
    return {
        name: float(sum(share * each[name] for share, each in zip(shares, found, strict=True))) for name in found[0]
    }

"""Admission timing: whether a request that follows an answer was queued before the router's next scheduling point.

A user whose answer has just ended is back within milliseconds, while the server filters its batch. Whether the new
request is queued in time decides whom it shares a prefill with, and can group users for minutes. Neither the time of
the filter nor the network latency shows in the streams as closely as here: a request sent `x` after the end of the step
was admitted at once if and only if `latency + x < filter`. The latency grows with the tokens that the router's
tokenizer workers have to count, those of all who came with it and before it. A probit model of that, linear in the
coefficients of filter and latency, joins the regression of step durations as weighted rows (iteratively reweighted
least squares).

A router whose requests have waited long enough admits all that are queued at every scheduling point, before each decode
step. So a request that is prefilled now was not queued at the scheduling point before, a step ago: it arrived in
between, which bounds the network latency (`latency_bounds`). A near client shows only that its latency is below a step;
a far one is bounded closely by steps that end at all phases.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from heapq import heapreplace

import numpy as np
import pandas as pd
from scipy.special import ndtr

from calibrate.arrays import Bools, Floats, Ints
from calibrate.schedule.rules import has_prefills, server_of
from calibrate.schedule.schedule import BEFORE, Schedule
from sim.engines.tgi_0_9_4 import BLOCK, Flags
from sim.run import Run
from sim.steptime.basis import DROP, PADDED, columns

TAIL = 0.05  # share of the requests whose bounds may mislead: a budget kept them waiting, or their client was delayed
_ENOUGH = 10  # requests that bound the latency
FILTER = ("dropped", "kept", "decode_longest")  # columns of `StepWork` that say what a filter does
LAPSE_RATE = 0.03  # share of the admissions that something else decides: a budget, a delayed client
LATENCY_BETWEEN_RUNS = 0.2  # relative sd of the network latency between runs (tools/check_network_latency.py)
UPLINK_SPREAD = 0.1  # relative sd of the network latency: small, or groups that came together would split


def admission_timings(runs: Sequence[Run], schedules: Sequence[Schedule]) -> pd.DataFrame:
    """One row per request that was admitted, or not, at a scheduling point after its user's last answer.

    Columns: `x` (when it was sent, s after the end of the step), `tokens` (that its worker counts before it is queued),
    those of `FILTER` (what the filter before the scheduling point does; zeros without one), `won` (admitted), `weight`
    (1 a group of requests that came together).
    """
    known = [(r, s) for r, s in zip(runs, schedules, strict=True) if has_prefills(r)]
    points = [_at_point(r, s, point) for r, s in known for point in (1, 2)]
    if not points:
        return pd.DataFrame(columns=["x", "tokens", *FILTER, "won", "weight"])
    return pd.concat(points, ignore_index=True)


def _at_point(run: Run, schedule: Schedule, point: int) -> pd.DataFrame:
    """The rows of the first scheduling point after a step's answers ended, after the filter, or of the second, a decode
    step later."""
    steps = schedule.steps
    asked = run.requests[["sent", "prompt_tokens", "max_new_tokens"]]
    table = asked.assign(written=schedule.written, first=schedule.first, **{"from": schedule.after}).sort_values("sent")
    table["counted"] = _tokens_counted(table["from"].tolist(), table["prompt_tokens"].tolist())
    table["all"] = table.groupby("from")["counted"].transform("max")
    table = table[(table["from"] >= 0) & (table["first"] >= table["from"] + point)]
    table = table[steps["used"].to_numpy()[table["from"].to_numpy()]]
    source = table["from"].to_numpy()
    before, there = source + point - 1, source + point  # the scheduling point is between these steps
    decode, ended = (steps["kind"] == "decode").to_numpy(), steps["ended"].to_numpy()
    following = steps.iloc[there]
    table = table.assign(
        x=table["written"].to_numpy() - steps["end"].to_numpy()[before],
        **{name: following[BEFORE + name].to_numpy() for name in FILTER},
        forced=steps["since"].to_numpy()[before] >= server_of(run).max_waiting_tokens - 1,
        won=table["first"] == there,
        # admitted one decode step later, which ended no answer: budgets were the same, so it was not queued before
        lost=(table["first"] == there + 1) & decode[there] & (ended[there] == 0),
    )
    if point == 1:
        table = table[(table["dropped"] > 0) & (table["x"] > 0)]
    else:
        late = ~decode[there] & (table["first"] > there) & _fits(run, schedule, table, there)
        table = table.assign(lost=table["lost"] | late)[decode[before] & (ended[before] == 0) & table["forced"]]
    table = table[table["won"] | table["lost"]]
    # unless the router has to admit, it admits a group once enough are queued, so that only the last of them decides
    group = table.groupby("from")
    alike = group["won"].transform("all") | group["lost"].transform("all")
    table = table[table["forced"] | alike]
    tokens = table["counted"].where(table["forced"], table["all"])
    table = table.assign(tokens=tokens, weight=1.0 / table.groupby("from")["x"].transform("size"))
    return pd.DataFrame(table[["x", "tokens", *FILTER, "won", "weight"]])


def _fits(run: Run, schedule: Schedule, table: pd.DataFrame, prefill: Ints) -> Bools:
    """Whether these requests would have fitted into these prefills: into the prefill budget, and beside what ran then,
    given the most that the server is known to hold. No request overtakes one of the same group that does not fit."""
    requests, steps, server = run.requests, schedule.steps, server_of(run)
    holds = (requests["prompt_tokens"] + requests["max_new_tokens"]).to_numpy()
    came, left = schedule.first >= 0, schedule.last >= 0
    change = np.bincount(schedule.first[came], weights=holds[came], minlength=len(steps) + 1)
    change -= np.bincount(schedule.last[left] + 1, weights=holds[left], minlength=len(steps) + 1)
    held = change.cumsum()
    more = (table["prompt_tokens"] + table["max_new_tokens"]).to_numpy()
    mine = table["prompt_tokens"].to_numpy()
    if server.requires_padding:
        sequences, longest = (steps[f"prefill_{name}"].to_numpy()[prefill] for name in ("sequences", "longest"))
        tokens = (sequences + 1) * np.maximum(longest, mine)
    else:
        blocks = -(-requests["prompt_tokens"].to_numpy() // BLOCK) * BLOCK
        taken = np.bincount(schedule.first[came], weights=blocks[came], minlength=len(steps))
        tokens = taken[prefill] - (-mine // BLOCK) * BLOCK
    fits = (tokens <= server.max_batch_prefill_tokens) & (held[prefill] + more <= held.max())
    return table.assign(fits=fits).groupby("from")["fits"].cummin().to_numpy(np.bool_)


def _tokens_counted(group: Sequence[int], prompts: Sequence[float]) -> list[float]:
    """For each prompt, in order of arrival, the tokens that its worker has counted of its group when it is done."""
    workers: dict[int, list[float]] = defaultdict(lambda: [0.0] * Flags.declared.tokenizer_workers)
    through = []
    for of, tokens in zip(group, prompts, strict=True):
        through.append(workers[of][0] + tokens)
        heapreplace(workers[of], through[-1])
    return through


def margin_terms(table: pd.DataFrame, names: Sequence[str]) -> Floats:
    """What each coefficient multiplies in `filter − latency`, (admissions, names)."""
    terms = {name: term for name, term in PADDED.items() if term.of == DROP}
    latency = {"u0": -np.ones(len(table)), "u1": -table["tokens"].to_numpy(np.float64)}
    known = columns(terms, {name: table[name] for name in FILTER}) | latency
    return np.stack([known.get(name, np.zeros(len(table))) for name in names], axis=1)


def admission_rows(table: pd.DataFrame, names: Sequence[str], x: Floats, spread: float) -> tuple[Floats, Floats]:
    """The admissions as rows of least squares around the coefficients `x`, at most one each, and their targets.

    `spread` is the relative standard deviation of single steps, which the part of a filter that grows with the batch
    shares; that of the latency is `UPLINK_SPREAD`.
    """
    if not len(table):
        return np.zeros((0, len(names))), np.zeros(0)
    design = margin_terms(table, names)
    delay, won = table["x"].to_numpy(np.float64), np.where(table["won"], 1.0, -1.0)
    margin, scale, _ = margins(table, names, x, spread)
    z = np.clip(won * margin / scale, -4.0, 4.0)
    chance = LAPSE_RATE + (1 - 2 * LAPSE_RATE) * ndtr(z)
    slope = (1 - 2 * LAPSE_RATE) * np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    information = slope**2 / (chance * (1 - chance))
    working = margin + won * scale * (1 - chance) / slope  # what the margin should have been
    root = np.sqrt(table["weight"].to_numpy(np.float64) * information) / scale
    rows, target = design * root[:, None], (working + delay) * root
    used = np.flatnonzero(np.abs(rows).sum(axis=0) > 0)
    q, r = np.linalg.qr(rows[:, used])
    compact = np.zeros((len(r), len(names)))
    compact[:, used] = r
    return compact, np.asarray(q.T @ target, dtype=np.float64)


def margins(table: pd.DataFrame, names: Sequence[str], x: Floats, spread: float) -> tuple[Floats, Floats, Floats]:
    """Expected margin of each request before the scheduling point, its standard deviation, and its network latency,
    s."""

    def seconds(only: Sequence[str]) -> Floats:
        return margin_terms(table, [name if name in only else "" for name in names]) @ x

    latency = -seconds(("u0", "u1"))
    margin = margin_terms(table, names) @ x - table["x"].to_numpy(np.float64)
    return margin, np.maximum(np.hypot(UPLINK_SPREAD * latency, spread * seconds(("f1", "f2"))), 5e-5), latency


def latency_bounds(runs: Sequence[Run], schedules: Sequence[Schedule]) -> tuple[float, float] | None:
    """A lower and an upper bound of the latency, s, that nearly all requests agree with; None where too few say
    anything. They may cross, since latencies vary."""
    if not all(map(has_prefills, runs)):
        return _least_contradicted([seen for schedule in schedules for seen in schedule.followed.waited])
    pairs = [_bounds(run, schedule) for run, schedule in zip(runs, schedules, strict=True)]
    least, most = (np.concatenate([pair[i] for pair in pairs]) for i in (0, 1))
    if len(least) < _ENOUGH:
        return None
    return float(np.quantile(least, 1 - TAIL)), float(np.quantile(most, TAIL))


def _least_contradicted(waited: Sequence[tuple[float, bool]]) -> tuple[float, float] | None:
    """The bounds of the latency that the fewest of `Followed.waited` contradict: who had been sent longer ago than that
    was admitted, the others were not."""
    x = np.array([seconds for seconds, _ in waited])
    won = np.array([admitted for _, admitted in waited], dtype=bool)
    known = x > 0  # sent after the step had begun, for all the client could see: that says nothing
    x, won = x[known], won[known]
    if len(x) < _ENOUGH:
        return None
    edges = np.concatenate([[0.0], np.sort(x)])
    against = np.searchsorted(np.sort(x[won]), edges, side="right") + (~won).sum()
    against -= np.searchsorted(np.sort(x[~won]), edges, side="right")
    best = np.flatnonzero(against == against.min())
    return float(edges[best[0]]), float(edges[min(best[-1] + 1, len(edges) - 1)])


def _bounds(run: Run, schedule: Schedule) -> tuple[Floats, Floats]:
    """For every request that tells: how long before the last two scheduling points before its prefill it was sent,
    s."""
    steps = schedule.steps
    step = np.maximum(schedule.first, 2)
    decode, ended = (steps["kind"] == "decode").to_numpy(), steps["ended"].to_numpy()
    end, known = steps["end"].to_numpy(), (steps["seen"] & steps["used"]).to_numpy()
    open_to_all = steps["since"].to_numpy() >= server_of(run).max_waiting_tokens - 1
    tells = (
        (schedule.first >= 2)
        & known[step]
        & known[step - 1]
        & decode[step - 1]
        & decode[step - 2]
        & open_to_all[step - 2]
    )
    tells &= ended[step - 1] == 0  # no answer ended in between and made room
    return (end[step - 2] - schedule.written)[tells], (end[step - 1] - schedule.written)[tells]

"""The effective `max_batch_total_tokens`, from what the router admitted and what it kept waiting.

A server that does not pad ignores the flag and uses what its warm-up found free (`docs/engines.md`). Where `/info` was
not asked, behaviour bounds it: every admitted batch fits (lower bound), and a first request in the queue that waited
for no other reason does not (upper bound). Nearly all upper bounds come from prefills that took part of the queue,
because a router that is bound by the budget admits as soon as it can. A budget that never bound has only the bounds of
any such server (`budget_bounds`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from calibrate.regression.draws import parameter
from calibrate.schedule.follow import UNCERTAIN_ARRIVAL
from calibrate.schedule.rules import has_prefills, server_of
from calibrate.schedule.schedule import Schedule
from sim.engines.tgi_0_9_4 import BLOCK, Batch, Entry, Flags, ceil_block
from sim.model.calibration import Parameter
from sim.model.request import Request
from sim.model.warning import Notice, notice
from sim.run import Run

MEANING = "tokens all running requests may hold"


@dataclass
class AdmissionEvidence:
    """What scheduling points say: `fitted` tokens were admitted, `refused` tokens were not; `least` is
    needed for a request that was answered."""

    fitted: list[int] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    least: int = 0

    def least_contradicted(self) -> tuple[int, int | None, int]:
        """The lowest and the highest budget (None: no highest) that the fewest scheduling points contradict, and how
        many do.

        One misread scheduling point must not outvote hundreds that agree. Something must have been admitted.
        """
        fitted, refused = np.sort(self.fitted), np.sort(self.refused)
        # the count changes only at a batch that fits from there on, and at one that should fit and did not
        budgets = np.unique(np.concatenate([fitted, refused]).astype(np.int64))
        least = max(int(fitted[0]), self.least)
        budgets = np.union1d(budgets[budgets >= least], [least])
        against = len(fitted) - np.searchsorted(fitted, budgets, side="right")
        against += np.searchsorted(refused, budgets, side="right")
        best = np.flatnonzero(against == against.min())
        high = int(budgets[best[-1] + 1]) - 1 if best[-1] + 1 < len(budgets) else None
        return int(budgets[best[0]]), high, int(against.min())


def fit_budget(
    runs: Sequence[Run], schedules: Sequence[Schedule], rng: np.random.Generator, n: int
) -> tuple[Parameter, list[float], list[Notice]] | None:
    """The parameter, its draws and warnings; None where nothing tells.

    What every run's `/info` or scenario says, drawn among where they differ; else what the admissions of runs without
    show.
    """
    if not all(has_prefills(run) for run in runs):
        return None
    told = [known_budget(run) for run in runs]
    unknown = [(r, s) for r, s, budget in zip(runs, schedules, told, strict=True) if budget is None]
    if not unknown:
        said = np.unique([float(budget) for budget in told if budget is not None])
        drawn, warnings = np.full(n, said[0]), []
        if len(said) > 1:
            drawn = rng.choice(said, n)
            differ = ", ".join(f"{x:.0f}" for x in said)
            warnings = [
                notice(
                    "budget-differs",
                    f"max_batch_total_tokens was {differ}: a forecast that is not told draws one of them",
                )
            ]
        return parameter(float(said[len(said) // 2]), drawn, "tokens", MEANING), drawn.tolist(), warnings
    evidence = AdmissionEvidence()
    for run, schedule in unknown:
        _add_evidence(run, schedule, evidence)
    if not evidence.fitted:
        return None
    low, high, against = evidence.least_contradicted()
    if high is None:
        least, most = budget_bounds([server_of(run) for run, _ in unknown], low)
        drawn = np.exp(rng.uniform(np.log(least), np.log(most), n))
        between = f"{least}" if least == most else f"{least} to {most}"
        warnings = [
            notice(
                "budget-unseen",
                f"max_batch_total_tokens is at least {low}; it never bound, so how much more is not seen: taken to be "
                f"{between}, as such servers have",
            )
        ]
    else:
        drawn = rng.uniform(low, high, n)
        warnings = [
            notice(
                "budget-inferred",
                f"max_batch_total_tokens is between {low} and {high} by what was admitted and what had to wait",
            )
        ]
    if against:
        count = len(evidence.fitted) + len(evidence.refused)
        warnings.append(
            notice(
                "flags-contradicted",
                f"{against} of {count} admissions contradict that: flags of the server may differ from the "
                "scenario's (max_batch_prefill_tokens), or the network latency was long",
            )
        )
    draws = [float(round(x)) for x in drawn.tolist()]
    return parameter(float(np.median(drawn)), drawn, "tokens", MEANING), draws, warnings


def budget_bounds(servers: Sequence[Flags], low: int) -> tuple[int, int]:
    """The least and the most that an untold budget can be, if `low` tokens are known to fit.

    A server that pads uses the router's default. Otherwise the warm-up has found room for a whole prefill, and a
    working server for a whole request; beyond what all permits can hold, more makes no difference.
    """
    if all(server.requires_padding for server in servers):
        usual = max(msgspec.structs.replace(s, max_batch_total_tokens=None).token_budget for s in servers)
        return max(low, usual), max(low, usual)
    whole = [ceil_block(s.max_total_tokens) + BLOCK for s in servers]  # prompt and answer are rounded up apart
    least = min(max(s.max_batch_prefill_tokens, n) for s, n in zip(servers, whole, strict=True))
    most = max(s.max_concurrent_requests * n for s, n in zip(servers, whole, strict=True))
    return max(low, least), max(low, least, most)


def known_budget(run: Run) -> int | None:
    """What the server said at `/info`, else what the scenario says."""
    told = server_of(run).max_batch_total_tokens
    return told if isinstance(told, int) else None


def _add_evidence(run: Run, schedule: Schedule, evidence: AdmissionEvidence) -> None:
    """Add what each scheduling point within the rungs to be used says."""
    config = server_of(run)
    asked = (run.requests[c].tolist() for c in ("prompt_tokens", "output_tokens", "max_new_tokens", "sent"))
    numbered = enumerate(zip(*asked, strict=True))
    requests = [Entry(Request(i, p, max(o, 1), new, sent=s)) for i, (p, o, new, s) in numbered]
    answered = np.unique(schedule.request)  # a request without a token may never have been queued
    waiting = sorted((requests[i] for i in answered.tolist()), key=lambda e: e.request.sent)
    # who was answered fitted in, whatever was misread
    evidence.least = max([evidence.least, *(_charged([requests[i]], config) for i in answered.tolist())])
    batch = Batch(padded=config.requires_padding)
    since, front = 1, 0
    taken: set[int] = set()
    steps = schedule.steps
    rows = (steps[c].tolist() for c in ("kind", "members", "start", "seen", "used"))
    for number, (kind, members, start, seen, used) in enumerate(zip(*rows, strict=True)):
        begun = np.unique(members[schedule.first[members] == number]).tolist() if kind == "prefill" else []
        new = [requests[m] for m in begun]
        taken.update(e.request.id for e in new)
        while front < len(waiting) and waiting[front].request.id in taken:
            front += 1
        head = (
            waiting[front] if front < len(waiting) and waiting[front].request.sent + UNCERTAIN_ARRIVAL < start else None
        )
        if used and new:
            evidence.fitted.append(batch.used + _charged(new, config))
        # a prefill and the decode step after it have no scheduling point between them
        scheduled = bool(new) or (since > 1 and since >= config.max_waiting_tokens)
        if used and seen and scheduled and head is not None:
            wanted = [*new, head]
            if _prompts(wanted, config) <= config.max_batch_prefill_tokens:
                evidence.refused.append(batch.used + _charged(wanted, config))
        if new:
            batch.join(new)
            since = 1
            continue
        if batch.members:
            batch.advance(1)
        since += 1


def _prompts(new: Sequence[Entry], config: Flags) -> int:
    """What a prefill counts against `max_batch_prefill_tokens` (queue.rs:197-230)."""
    if config.requires_padding:
        return len(new) * max(r.prompt_tokens for r in new)
    return sum(r.prompt_blocks for r in new)


def _charged(new: Sequence[Entry], config: Flags) -> int:
    """What the router charges a prefill: its prompts and all that may follow them (queue.rs:197-230)."""
    return _prompts(new, config) + sum(r.max_new_tokens if config.requires_padding else r.new_blocks for r in new)

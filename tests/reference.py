"""The simulator's reference: TGI 0.9.4 one step at a time, as `docs/engines.md` writes it down.

Nothing is jumped over, kept relative or remembered here: every step rebuilds what it needs from the entries. It shares
with `sim` the value types, the step-time form, and the noise, which is indexed by the step's number.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from sim.engines.tgi_0_9_4 import Flags
from sim.steptime.linear import StepTime
from sim.steptime.noise import Noise
from sim.steptime.work import StepWork


@dataclass(frozen=True)
class Arrival:
    """A request and the instant at which its client sends it, and at which the client leaves (None: never)."""

    time: float
    prompt: int
    new: int  # charged
    output: int  # comes back
    leaves: float | None = None


@dataclass(frozen=True)
class World:
    """A server, its step times, and what arrives; uids are positions in `arrivals`."""

    config: Flags
    step_time: StepTime
    arrivals: list[Arrival]
    noise: tuple[object, int] | None = None  # its parameters and a seed

    def new_noise(self) -> Noise | None:
        return None if self.noise is None else Noise(*self.noise)  # type: ignore[arg-type]


@dataclass
class History:
    """What happened: calls (op, start, end, uids, use the shard reports), tokens and outcome by uid, and counters.

    Only the simulator tells the order in which requests `came`, and how many permits were `held` from each instant on.
    """

    calls: list[tuple[str, float, float, tuple[int, ...], int | None]] = field(default_factory=list)
    tokens: dict[int, list[float]] = field(default_factory=dict)
    outcome: dict[int, str] = field(default_factory=dict)
    ended: dict[int, float] = field(default_factory=dict)
    backpressure: int = 0
    wait_exceeded: int = 0
    came: list[int] = field(default_factory=list)
    held: list[tuple[float, int]] = field(default_factory=list)


@dataclass(eq=False)
class Entry:
    """A request on the server."""

    uid: int
    prompt: int
    new: int
    output: int
    received: int = 0
    gone: bool = False
    over: bool = False


@dataclass
class Cached:
    """A batch as the shard keeps it: `max_tokens` is what it reports."""

    entries: list[Entry]
    max_tokens: int


def ceil16(n: int) -> int:
    return (n + 15) // 16 * 16


class Reference:
    """One run of one world; `history` is what happened."""

    def __init__(self, world: World):
        self.config, self.step_time, self.noise = world.config, world.step_time, world.new_noise()
        self.padded = self.config.requires_padding
        self.history = History(tokens={uid: [] for uid in range(len(world.arrivals))})
        self.now = 0.0
        self.number = 0  # of the next step
        self.queue: list[Entry] = []
        self.permits = self.config.max_concurrent_requests
        self.entries = [Entry(uid, a.prompt, a.new, a.output) for uid, a in enumerate(world.arrivals)]
        self.here: set[int] = set()
        # at one instant clients leave first, then requests arrive
        events = [(a.leaves, 0, uid) for uid, a in enumerate(world.arrivals) if a.leaves is not None]
        events += [(a.time, 1, uid) for uid, a in enumerate(world.arrivals)]
        self.events = sorted(events)
        self.run()

    def run(self) -> None:
        while True:  # infer.rs:246-354
            self.catch_up()
            batch = self.next_batch(None, self.config.token_budget)
            if batch is None:
                if not self.events:
                    return
                self.now = self.events[0][0]
                continue
            cached = self.prefill(batch)
            waiting = 1
            run: Run | None = None
            while cached is not None:
                size = len(cached.entries)
                if waiting >= self.config.max_waiting_tokens:
                    min_size = None
                else:
                    min_size = int(np.floor(np.float32(size) * np.float32(self.config.waiting_served_ratio)))
                new = self.next_batch(min_size, max(0, self.config.token_budget - cached.max_tokens))
                extra = 0.0
                if new is not None:
                    run = None
                    if min_size is None:
                        self.history.wait_exceeded += 1
                    else:
                        self.history.backpressure += 1
                    joining = self.prefill(new)
                    waiting = 1
                    if joining is not None:
                        longest = max(e.prompt + e.received for e in (*cached.entries, *joining.entries))
                        extra = self.step_time.line(
                            StepWork(kept=size, joined=len(joining.entries), decode_longest=longest)
                        ).first
                        cached = self.concatenate(cached, joining)
                if run is None:
                    run = Run(self, cached.entries, extra)
                cached, changed = self.decode(cached, run)
                if changed:
                    run = None
                waiting += 1

    def catch_up(self) -> None:
        while self.events and self.events[0][0] <= self.now:
            time, arrives, uid = self.events.pop(0)
            entry = self.entries[uid]
            if not arrives:
                if uid in self.here and not entry.over:
                    entry.gone = entry.over = True
                    self.permits += 1
                    self.history.outcome[uid], self.history.ended[uid] = "gone", time
                continue
            self.here.add(uid)
            if self.permits == 0:
                self.over(entry, "overloaded", time)
            elif entry.prompt + entry.new > self.config.max_total_tokens or entry.prompt > self.config.max_input_length:
                self.over(entry, "validation", time)
            else:
                self.permits -= 1
                self.queue.append(entry)

    def over(self, entry: Entry, status: str, at: float) -> None:
        entry.over = True
        self.history.outcome[entry.uid] = status
        self.history.ended[entry.uid] = at

    def next_batch(self, min_size: int | None, token_budget: int) -> list[Entry] | None:
        """queue.rs:113-282"""
        if not self.queue or (min_size is not None and len(self.queue) < min_size):
            return None
        taken: list[Entry] = []
        prefill = decode = longest = 0
        while self.queue:
            entry = self.queue.pop(0)
            if entry.gone:
                continue
            if self.padded:
                longest = max(longest, entry.prompt)
                prefill = (len(taken) + 1) * longest
                decode += entry.new
            else:
                prefill += ceil16(entry.prompt)
                decode += ceil16(entry.new)
            if prefill > self.config.max_batch_prefill_tokens or prefill + decode > token_budget:
                self.queue.insert(0, entry)
                break
            taken.append(entry)
        if not taken:
            return None
        if min_size is not None and len(taken) < min_size:
            self.queue[:0] = taken
            return None
        return taken

    def prefill(self, batch: list[Entry]) -> Cached | None:
        start = self.now
        prompts = [e.prompt for e in batch]
        took = self.step_time.prefill(len(batch), sum(prompts), sum(p * p for p in prompts), max(prompts))
        if self.noise is not None:
            took = took * self.noise.factor("prefill", self.number) * self.noise.drift_of("prefill", start)[0]
        self.number += 1
        self.now = start + took
        self.catch_up()
        padded = len(batch) * (max(prompts) + sum(e.new for e in batch))  # causal_lm.py:125
        use = padded if self.padded else self.blocks(batch)
        self.history.calls.append(("prefill", start, self.now, tuple(e.uid for e in batch), None))
        return self.delivered(batch, use)[0]

    def decode(self, cached: Cached, run: Run) -> tuple[Cached | None, bool]:
        start = self.now
        self.now = run.next_end()
        self.number += 1
        self.catch_up()
        uids = tuple(e.uid for e in cached.entries)
        self.history.calls.append(("decode", start, self.now, uids, cached.max_tokens))
        return self.delivered(cached.entries, cached.max_tokens)

    def delivered(self, entries: list[Entry], use: int) -> tuple[Cached | None, bool]:
        """Every entry has its next token; filter those that are done. What is kept, and whether any was dropped."""
        kept = []
        for e in entries:
            e.received += 1
            if e.gone:
                continue
            self.history.tokens[e.uid].append(self.now)
            if e.received == e.output:
                self.over(e, "ok", self.now)
                self.permits += 1
            else:
                kept.append(e)
        if len(kept) == len(entries):
            return Cached(kept, use), False
        if not kept:
            return None, True
        longest = max(e.prompt + e.received for e in kept)
        took = self.step_time.line(
            StepWork(kept=len(kept), dropped=len(entries) - len(kept), decode_longest=longest)
        ).first
        if self.noise is not None:
            fixed = self.step_time.line(StepWork(kept=0, dropped=len(entries) - len(kept), decode_longest=0)).first
            took = fixed + (took - fixed) * self.noise.factor("decode", self.number)
            took *= self.noise.drift(self.now)[0]
        after_prefill = self.history.calls[-1][0] == "prefill"
        start, self.now = self.now, self.now + took
        self.catch_up()
        if self.padded:  # causal_lm.py:226
            use = len(kept) * max(e.prompt + e.received for e in kept) + sum(e.new - e.received for e in kept)
        else:
            use = self.blocks(kept)
        uids = tuple(e.uid for e in kept)
        self.history.calls.append(("filter", start, self.now, uids, None if after_prefill else use))
        return Cached(kept, use), True

    def concatenate(self, old: Cached, new: Cached) -> Cached:
        parts = [old, new]
        if not self.padded:
            return Cached(old.entries + new.entries, old.max_tokens + new.max_tokens)
        longest = [max(e.prompt + e.received for e in part.entries) for part in parts]
        use = sum(  # causal_lm.py:350
            part.max_tokens + (max(longest) - mine) * len(part.entries)
            for part, mine in zip(parts, longest, strict=True)
        )
        return Cached(old.entries + new.entries, use)

    @staticmethod
    def blocks(entries: list[Entry]) -> int:
        return 16 * sum(-(-(e.prompt + e.new - 1) // 16) for e in entries)  # flash_causal_lm.py:263-268


class Run:
    """The decode steps of one unchanged batch. A boundary is the run's start plus the length of its first k steps."""

    def __init__(self, server: Reference, entries: list[Entry], extra: float):
        contexts = [e.prompt + e.received for e in entries]
        self.first, self.growth = server.step_time.decode(len(entries), sum(contexts), max(contexts))
        self.server, self.extra = server, extra
        self.start, self.k = server.now, 0
        self.cell, self.length = -1.0, 0.0  # with noise: the end of the drift's cell, and the sum within it

    def next_end(self) -> float:
        self.k += 1
        noise = self.server.noise
        if noise is None:
            return self.start + (self.extra + self.k * self.first + self.growth * (self.k * (self.k - 1) / 2))
        factor, until = noise.drift(self.server.now)
        if until != self.cell:  # the machine has drifted: a new sum from here
            self.cell, self.start, self.length = until, self.server.now, 0.0
        work = self.first + self.growth * (self.k - 1) + (self.extra if self.k == 1 else 0.0)
        self.length += work * noise.factor("decode", self.server.number) * factor
        return self.start + self.length

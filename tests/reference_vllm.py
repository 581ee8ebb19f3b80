"""vLLM V1's scheduler and KV cache, rule by rule and one step at a time: what the engine is held against.

Shares no code with `sim`. Every block is an object with a content, every token has a name, the free list is a list:
slow and obvious where the engine is fast. Rules: those of vLLM 0.32.0 (`vllm/v1/engine/core.py`,
`vllm/v1/core/sched/scheduler.py`, `async_scheduler.py`), and where an older version differs, that one's.

Covers what the engine covers: one text-only decoder, one group of full attention, no LoRA, no speculative decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

MOST_STEPS = 5_000  # of a run
Segments = Sequence[tuple[int, Hashable]]  # end (0: none) and name; the name also tells all that stands before


class Livelock(Exception):
    """Requests preempt each other for ever, as the rules of priority have it of two that are equal."""


class Job:
    """A request: its lengths in tokens, what its tokens are called, and how far it is."""

    def __init__(
        self,
        uid: int,
        arrived: int,
        prompt: int,
        max_new: int,
        output: int,
        *,
        priority: int = 0,
        leaves: int | None = None,
        segments: Segments = (),
    ):
        self.uid, self.arrived, self.prompt, self.max_new, self.output = uid, arrived, prompt, max_new, output
        self.priority, self.leaves, self.segments = priority, leaves, segments
        self.where = "outside"  # then waiting, running, ended
        self.received = 0
        self.placeholders = 0  # tokens that steps already scheduled will sample
        self.computed = 0  # tokens computed or scheduled
        self.target = 0  # tokens it had when it was last admitted
        self.blocks: list[Block] = []
        self.keys: list[int] = []  # of the texts up to the end of each of its blocks, as far as anybody asked
        self.entered = 0  # how many of its blocks are in the cache, from the start
        self.preemptions = 0
        self.token_times: list[int] = []
        self.finish = ""

    @property
    def known(self) -> int:
        return self.prompt + self.received

    def token(self, i: int) -> Hashable:
        for end, name in self.segments:
            if end == 0 or i < end:
                return name, i
        return "own", self.uid, i


class Block:
    """A block of the KV cache: who uses it, what is written in it, and whether the cache can find it."""

    def __init__(self) -> None:
        self.users = 0
        self.key: int | None = None  # of its cache entry
        self.text: tuple[Hashable, ...] = ()  # what was written at entering, for the check at each hit


class Row(NamedTuple):
    """A request's part in a step."""

    job: Job
    tokens: int
    is_prefill: bool
    before: int  # tokens computed before
    samples: bool  # the step computes the last of the request's tokens, and so yields the next
    preemptions: int  # how often the request had been preempted when this was scheduled


class Step:
    """A step, and what was seen of the scheduler when it was scheduled and after its output."""

    def __init__(self, scheduled: int):
        self.scheduled = scheduled
        self.rows: list[Row] = []
        self.preempted: list[Job] = []
        self.free = self.running = self.waiting = 0
        self.begin: int | None = None
        self.end: int | None = None
        self.free_after: int | None = None


class Reference:
    """The engine core over requests known beforehand: `run` fills `steps` and the jobs' times.

    `config` has vLLM's names of its flags, `duration` the time of a step of so many (tokens, requests).
    """

    def __init__(self, config: Mapping[str, Any], jobs: Iterable[Job], duration: Callable[[int, int], int]):
        self.config, self.duration = config, duration
        self.jobs = list(jobs)
        version = tuple(int(part) for part in config.get("version", "0.32.0").split("."))
        self.depth = 2 if config["async_scheduling"] else 1  # steps scheduled ahead of the output
        self.size: int = config["block_size"]
        self.caching: bool = config["enable_prefix_caching"]
        self.by_priority = config["policy"] == "priority"
        self.seats: int = config.get("max_num_active_seqs") or config["max_num_seqs"]
        self.reserve = config["scheduler_reserve_full_isl"] and version > (0, 17, 1)
        self.watermark = int(config["watermark"] * config["num_gpu_blocks"]) if version > (0, 20, 2) else 0
        self.cap_spares_the_lone = version > (0, 25, 1)
        self.unfindable_first = version > (0, 20, 2)  # blocks without a cache entry are reused first
        self.delivers_to_preempted = version > (0, 25, 1)  # the token of the step under way when it was preempted
        self.skips_long_prompts = version <= (0, 11, 2)  # chunking off: the next may go where one is too long
        self.free = [Block() for _ in range(config["num_gpu_blocks"] - 1)]  # one is never used
        self.usable = list(self.free)
        self.cache: dict[int, list[Block]] = {}  # the oldest entry first
        self.keys: dict[tuple[int | None, tuple[Hashable, ...]], int] = {}
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.steps: list[Step] = []
        self.now = 0

    # the loop

    def run(self) -> None:
        events = [(job.arrived, 1, job) for job in self.jobs]
        events += [(job.leaves, 2, job) for job in self.jobs if job.leaves is not None]
        events.sort(key=lambda e: e[:2])
        queue: list[Step] = []
        busy_until = 0
        while True:
            self._take(events)
            if self.waiting or self.running:
                step = self.schedule()
                queue.append(step)
                if step.rows and len(queue) < self.depth:
                    continue
            elif not queue:
                if not events:
                    return
                self.now = events[0][0]
                continue
            step = queue.pop(0)
            begin = end = max(step.scheduled, busy_until)
            if step.rows:
                end = begin + self.duration(sum(row.tokens for row in step.rows), len(step.rows))
                step.begin, step.end = begin, end
            busy_until, self.now = end, max(self.now, end)
            self._abort(events)
            self._output(step)
            step.free_after = len(self.free) if step.rows else None
            self._check()

    def _take(self, events: list[tuple[int, int, Job]]) -> None:
        while events and events[0][0] <= self.now:
            _, kind, job = events.pop(0)
            if kind == 1:
                job.where = "waiting"
                self.waiting.append(job)
                self._sort()
            else:
                self._leave(job)

    def _abort(self, events: list[tuple[int, int, Job]]) -> None:
        """Who left while a step ran is gone before its output; who also came meanwhile is dealt with in its turn."""
        for event in [e for e in events if e[0] <= self.now and e[1] == 2 and e[2].where != "outside"]:
            events.remove(event)
            self._leave(event[2])

    def _leave(self, job: Job) -> None:
        if job.where != "ended":
            self._end(job, "abort")

    # the schedule

    def schedule(self) -> Step:
        config, step = self.config, Step(self.now)
        budget = config["max_num_batched_tokens"]
        present = len(self.running) + len(self.waiting)
        cap = config["long_prefill_token_threshold"]
        if config["long_prefill_token_threshold_adaptive"]:
            cap = max(cap, budget // present)
        if not cap or (present == 1 and self.cap_spares_the_lone):
            cap = budget
        given: dict[Job, int] = {}
        for job in list(self.running):
            if budget == 0:
                break
            if job.where != "running":  # preempted for one before it
                continue
            if job.placeholders and job.received + job.placeholders >= job.max_new:
                continue
            n = job.known + job.placeholders - job.computed
            n = min(n, cap, budget, config["max_model_len"] - job.computed - 1)
            if n <= 0:
                continue
            while job.where == "running" and self._missing(job.computed + n, job.blocks) > len(self.free):
                victim = self.running[-1]
                if self.by_priority:
                    worst = max((other.priority, other.arrived) for other in self.running)
                    victim = next(v for v in self.running if (v.priority, v.arrived) == worst)
                budget += given.pop(victim, 0)
                self._preempt(victim)
                step.preempted.append(victim)
            if job.where != "running":
                break
            self._allocate(job, job.computed + n)
            given[job] = n
            budget -= n
        if not step.preempted:
            for job in list(self.waiting):
                if budget == 0 or len(self.running) >= self.seats:
                    break
                hits = self._hits(job)
                n = min(job.known - len(hits) * self.size, cap)
                if n > budget and not config["enable_chunked_prefill"]:
                    if self.skips_long_prompts:
                        continue
                    break
                n = min(n, budget)
                room = len(self.free) - sum(block.users == 0 for block in hits)
                if self.running:
                    room -= self.watermark
                if self.reserve and self._missing(job.known, hits) > room:
                    break
                if self._missing(len(hits) * self.size + n, hits) > room:
                    break
                for block in hits:
                    if block.users == 0:
                        self.free.remove(block)
                    block.users += 1
                self.waiting.remove(job)
                self.running.append(job)
                job.where, job.blocks, job.entered = "running", hits, len(hits)
                job.computed, job.target = len(hits) * self.size, job.known
                self._allocate(job, job.computed + n)
                given[job] = n
                budget -= n
        for job in self.running:
            if job in given:
                before = job.computed
                job.computed += given[job]
                samples = job.computed == job.known + job.placeholders
                if samples and self.depth > 1:
                    job.placeholders += 1
                step.rows.append(Row(job, given[job], before < job.target, before, samples, job.preemptions))
        step.free, step.running, step.waiting = len(self.free), len(self.running), len(self.waiting)
        self.steps.append(step)
        if len(self.steps) > MOST_STEPS:
            raise Livelock
        self._check()
        return step

    def _preempt(self, job: Job) -> None:
        self.running.remove(job)
        self._give_back(job)
        job.computed = job.placeholders = 0
        job.preemptions += 1
        job.where = "waiting"
        self.waiting.insert(0, job)
        self._sort()

    def _sort(self) -> None:
        if self.by_priority:
            self.waiting.sort(key=lambda job: (job.priority, job.arrived, str(job.uid)))

    # the output

    def _output(self, step: Step) -> None:
        for row in step.rows:
            job = row.job
            if job.where == "ended" or not row.samples:
                continue
            if row.preemptions != job.preemptions and not self.delivers_to_preempted:
                continue
            job.received += 1
            job.token_times.append(self.now)
            if row.preemptions == job.preemptions and self.depth > 1:
                job.placeholders -= 1
                self._enter(job, job.computed - job.placeholders)
            if job.received == job.output < job.max_new:
                self._end(job, "stop")
            elif job.received == job.max_new or job.known >= self.config["max_model_len"]:
                self._end(job, "length")

    def _end(self, job: Job, how: str) -> None:
        for line in (self.running, self.waiting):
            if job in line:
                line.remove(job)
        self._give_back(job)
        job.where, job.finish = "ended", how

    # the KV cache

    def _missing(self, tokens: int, held: list[Block]) -> int:
        return -(-tokens // self.size) - len(held)

    def _allocate(self, job: Job, tokens: int) -> None:
        """Blocks for so many tokens, from the front of the free list; what they fill can be found from now on."""
        for _ in range(self._missing(tokens, job.blocks)):
            block = self.free.pop(0)
            if block.key is not None:
                self.cache[block.key].remove(block)
                block.key = None
            block.users = 1
            job.blocks.append(block)
        self._enter(job, min(tokens, job.known))

    def _enter(self, job: Job, tokens: int) -> None:
        if not self.caching:
            return
        for i in range(job.entered, tokens // self.size):
            block, key = job.blocks[i], self._key(job, i)
            block.key, block.text = key, self._text(job, i)
            self.cache.setdefault(key, []).append(block)
            job.entered = i + 1

    def _hits(self, job: Job) -> list[Block]:
        """Its first blocks, as many as are in the cache, but never all of its tokens."""
        found: list[Block] = []
        while self.caching and len(found) < (job.known - 1) // self.size:
            entries = self.cache.get(self._key(job, len(found)))
            if not entries:
                break
            assert entries[0].text == self._text(job, len(found))
            found.append(entries[0])
        return found

    def _give_back(self, job: Job) -> None:
        for block in reversed(job.blocks):
            block.users -= 1
            if block.users == 0:
                at = len(self.free) if block.key is not None or not self.unfindable_first else 0
                self.free.insert(at, block)
        job.blocks, job.entered = [], 0

    def _text(self, job: Job, i: int) -> tuple[Hashable, ...]:
        return tuple(job.token(t) for t in range(i * self.size, (i + 1) * self.size))

    def _key(self, job: Job, i: int) -> int:
        while len(job.keys) <= i:
            parent = job.keys[-1] if job.keys else None
            job.keys.append(self.keys.setdefault((parent, self._text(job, len(job.keys))), len(self.keys)))
        return job.keys[i]

    def _check(self) -> None:
        """Every block is used or free, and has as many users as requests hold it."""
        assert len(set(self.free)) == len(self.free) == sum(block.users == 0 for block in self.usable)
        assert sum(block.users for block in self.usable) == sum(len(job.blocks) for job in self.running)

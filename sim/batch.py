"""What the shard keeps between two steps: who is running, how long their contexts are, who is done next.

All members gain one token a step, so nothing here is touched per step: `advance(k)` adds to one counter, and contexts,
remaining tokens and the next to finish are kept relative to it. The cost of a request is the same whatever its length.
"""

from __future__ import annotations

from heapq import heappop, heappush

from sim.request import Request


class Batch:
    """The running requests. `used` is the number of tokens the shard reports for them (`tgi-0.9.4.md` §3.2, §4.3)."""

    def __init__(self, padded: bool = False):
        self.padded = padded
        self.members: dict[Request, None] = {}
        self.leaving: list[Request] = []  # members whose client has gone: they compute until the next step ends
        self.steps = 0  # decode steps so far; everything below is relative to it
        self.used = 0
        self._context = 0  # Σ (prompt + tokens received - steps)
        self._remaining = 0  # Σ (max_new_tokens - tokens received + steps)
        self._finishing: dict[int, list[Request]] = {}  # by the step at which their last token comes
        self._finish_order: list[int] = []
        self._lengths: dict[int, int] = {}  # how many have (prompt + tokens received - steps)
        self._length_order: list[int] = []

    def __len__(self) -> int:
        return len(self.members)

    @property
    def context(self) -> int:
        """Summed contexts, prompts plus tokens received."""
        return self._context + len(self.members) * self.steps

    @property
    def longest(self) -> int:
        """The longest context; 0 for an empty batch."""
        order = self._length_order
        while order and not self._lengths.get(-order[0]):
            self._lengths.pop(-heappop(order), None)
        return self.steps - order[0] if order else 0

    @property
    def steps_to_finish(self) -> int:
        """How many decode steps until the next member has its last token; the batch is not empty."""
        order = self._finish_order
        while not self._finishing.get(order[0]):
            self._finishing.pop(heappop(order), None)
        return order[0] - self.steps

    def join(self, prefilled: list[Request]) -> list[Request]:
        """Take prefilled requests in, each with its first token; returns those that ended with it (or left meanwhile).

        `used` follows the shard: the new batch is filtered on its own before it is concatenated to the running one.
        """
        ended = [r for r in prefilled if r.output_tokens <= 1 or r.gone]
        kept = [r for r in prefilled if r.output_tokens > 1 and not r.gone] if ended else prefilled
        if not kept:
            return ended
        if self.padded:
            self._join_padded(kept, prefilled if not ended else None)
        else:
            for r in kept:
                self.used += r.live_tokens
        now, finishing, lengths = self.steps, self._finishing, self._lengths
        for r in kept:
            self.members[r] = None
            r.running = True
            length = r.prompt_tokens + 1 - now
            self._context += length
            self._remaining += r.max_new_tokens - 1 + now
            if length in lengths:
                lengths[length] += 1
            else:
                lengths[length] = 1
                heappush(self._length_order, -length)
            r.last_step = last = now + r.output_tokens - 1
            if last in finishing:
                finishing[last].append(r)
            else:
                finishing[last] = [r]
                heappush(self._finish_order, last)
        return ended

    def advance(self, steps: int) -> list[Request]:
        """Let `steps` decode steps pass, at most to the next finish; returns those that ended at the last of them."""
        self.steps += steps
        if self._finish_order[0] > self.steps and not self.leaving:
            return []
        ended = self._finishing.pop(self.steps, [])
        for r in self.leaving:
            if r.last_step > self.steps:
                self._finishing[r.last_step].remove(r)
                ended.append(r)
        self.leaving.clear()
        if ended:
            self._drop(ended)
        return ended

    def leave(self, request: Request) -> None:
        """A member's client has gone: the member goes at the end of the next step."""
        self.leaving.append(request)

    def _drop(self, ended: list[Request]) -> None:
        now = self.steps
        for r in ended:
            del self.members[r]
            r.running = False
            r.received = r.output_tokens - (r.last_step - now)
            length = r.prompt_tokens + r.received - now
            self._context -= length
            self._remaining -= r.max_new_tokens - r.received + now
            self._lengths[length] -= 1
            if not self.padded:
                self.used -= r.live_tokens
        if not self.members:
            self.used = 0
        elif self.padded:
            self.used = self._filtered_tokens(
                len(self.members), self.longest, self._remaining - len(self.members) * now
            )

    def _join_padded(self, kept: list[Request], whole: list[Request] | None) -> None:
        longest = max(r.prompt_tokens for r in kept) + 1
        if whole is not None:  # n × (max_in + Σ max_new), causal_lm.py:125
            new = len(kept) * (longest - 1 + sum(r.max_new_tokens for r in kept))
        else:
            new = self._filtered_tokens(len(kept), longest, sum(r.max_new_tokens - 1 for r in kept))
        if self.members:  # each part padded up to the longest of both, causal_lm.py:350
            mine = self.longest
            both = max(mine, longest)
            self.used += (both - mine) * len(self.members) + new + (both - longest) * len(kept)
        else:
            self.used = new

    @staticmethod
    def _filtered_tokens(kept: int, longest: int, remaining: int) -> int:
        return kept * longest + remaining  # causal_lm.py:226

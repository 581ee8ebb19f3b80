"""The batch that the shard keeps.

All members gain one token a step, so nothing is touched per step: contexts, remaining tokens and the next to finish are
kept relative to a counter of steps. The cost of a request is the same whatever its length.
"""

from __future__ import annotations

from heapq import heappop, heappush

from sim.engines.tgi_0_9_4.entry import Entry


class Batch:
    """The running requests. `used` is the number of tokens that the shard reports for them."""

    def __init__(self, padded: bool = False):
        self.padded = padded
        self.members: dict[Entry, None] = {}
        self.leaving: list[Entry] = []  # members whose client has gone: they compute until the next step ends
        self.steps = 0  # decode steps so far; everything below is relative to it
        self.used = 0
        self._context = 0  # Σ (prompt + tokens received - steps)
        self._remaining = 0  # Σ (max_new_tokens - tokens received + steps)
        self._finishing: dict[int, list[Entry]] = {}  # by the step at which their last token comes
        self._finish_order: list[int] = []
        self._lengths: dict[int, int] = {}  # how many have (prompt + tokens received - steps)
        self._length_order: list[int] = []

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

    def join(self, prefilled: list[Entry]) -> list[Entry]:
        """Take prefilled requests in, each with its first token; returns those that ended with it (or left meanwhile).

        `used` follows the shard: the new batch is filtered on its own before it is concatenated to the running one.
        """
        ended = [e for e in prefilled if e.output_tokens <= 1 or e.gone]
        kept = [e for e in prefilled if e.output_tokens > 1 and not e.gone] if ended else prefilled
        if not kept:
            return ended
        if self.padded:
            self._join_padded(kept, prefilled if not ended else None)
        else:
            for e in kept:
                self.used += e.live_tokens
        now, finishing, lengths = self.steps, self._finishing, self._lengths
        for e in kept:
            self.members[e] = None
            e.running = True
            length = e.prompt_tokens + 1 - now
            self._context += length
            self._remaining += e.max_new_tokens - 1 + now
            if length in lengths:
                lengths[length] += 1
            else:
                lengths[length] = 1
                heappush(self._length_order, -length)
            e.last_step = last = now + e.output_tokens - 1
            if last in finishing:
                finishing[last].append(e)
            else:
                finishing[last] = [e]
                heappush(self._finish_order, last)
        return ended

    def advance(self, steps: int) -> list[Entry]:
        """Let `steps` decode steps pass, at most to the next finish; returns those that ended at the last of them."""
        self.steps += steps
        if self._finish_order[0] > self.steps and not self.leaving:
            return []
        ended = self._finishing.pop(self.steps, [])
        for e in self.leaving:
            if e.last_step > self.steps:
                self._finishing[e.last_step].remove(e)
                ended.append(e)
        self.leaving.clear()
        if ended:
            self._drop(ended)
        return ended

    def leave(self, entry: Entry) -> None:
        """A member's client has gone: the member goes at the end of the next step."""
        self.leaving.append(entry)

    def _drop(self, ended: list[Entry]) -> None:
        now = self.steps
        for e in ended:
            del self.members[e]
            e.running = False
            received = e.output_tokens - (e.last_step - now)
            length = e.prompt_tokens + received - now
            self._context -= length
            self._remaining -= e.max_new_tokens - received + now
            self._lengths[length] -= 1
            if not self.padded:
                self.used -= e.live_tokens
        if not self.members:
            self.used = 0
        elif self.padded:
            self.used = self._filtered_tokens(
                len(self.members), self.longest, self._remaining - len(self.members) * now
            )

    def _join_padded(self, kept: list[Entry], whole: list[Entry] | None) -> None:
        longest = max(e.prompt_tokens for e in kept) + 1
        if whole is not None:  # n × (max_in + Σ max_new), causal_lm.py:125
            new = len(kept) * (longest - 1 + sum(e.max_new_tokens for e in kept))
        else:
            new = self._filtered_tokens(len(kept), longest, sum(e.max_new_tokens - 1 for e in kept))
        if self.members:  # each part padded up to the longest of both, causal_lm.py:350
            mine = self.longest
            both = max(mine, longest)
            self.used += (both - mine) * len(self.members) + new + (both - longest) * len(kept)
        else:
            self.used = new

    @staticmethod
    def _filtered_tokens(kept: int, longest: int, remaining: int) -> int:
        return kept * longest + remaining  # causal_lm.py:226

"""Which blocks hold the beginnings of which texts (v1/core/kv_cache_manager.py)."""

from __future__ import annotations

from collections.abc import Hashable

from sim.engines.kv_cache import Blocks, Run
from sim.engines.vllm_v1.held import WAITING, Held


class PrefixCache:
    """The blocks of the KV cache, and what can be found in them of the texts of requests; `size` tokens a block."""

    def __init__(self, blocks: Blocks, size: int, enabled: bool):
        self.blocks, self.size, self.enabled = blocks, size, enabled
        self.shared = 0  # requests that decode a text which another request has, too
        self._texts: dict[Hashable, int] = {}  # how many requests have a text of that name
        self._open: dict[Hashable, int] = {}  # how many decode a text of that name

    def hits(self, held: Held, most: int) -> list[Run]:
        """The blocks that hold the beginning of a text."""
        hits: list[Run] = []
        for name, first, end in held.names(0, most, self.size):
            hits += self.blocks.find(name, first, end)
            if len(hits) < end:
                break
        return hits

    def enter(self, held: Held, tokens: int) -> None:
        """So many tokens of a text that others may share can be found from now on, as far as they fill blocks."""
        entered, full = len(held.blocks), tokens // self.size
        if full > entered:
            for name, first, end in held.names(entered, full, self.size):
                held.blocks += self.blocks.enter(name, first, end)

    def give_back(self, held: Held, computed: int, findable: int) -> None:
        """Give back the blocks of so many computed tokens, when a request is over or has been preempted."""
        size, total = self.size, -(-computed // self.size)
        if not self.enabled:
            self.blocks.give_back(total, 0)
            return
        full, waits = findable // size, held.state == WAITING
        if waits and not held.text and full > (held.prompt + held.base - 1) // size:
            # it will not hit the last of these blocks, and computing it again it enters the same text twice
            held.text = ((0, held.request),)
            self.count_text(held, 1)
        if held.text:
            self.enter(held, findable)
            self.blocks.leave(held.blocks, total - len(held.blocks))
            held.blocks = []
        elif waits:
            held.parked = self.blocks.park(total - full, full)
        else:
            self.blocks.give_back(total - full, full)

    def count_text(self, held: Held, change: int) -> None:
        """A request with a text has come (1) or is over (-1)."""
        for _, name in held.text:
            before = self._texts.get(name, 0)
            now = self._texts[name] = before + change
            self.shared += self._open.get(name, 0) * ((now > 1) - (before > 1))
            if not now:
                del self._texts[name]

    def count_open(self, held: Held, change: int) -> None:
        """A request begins (1) or ceases (-1) to decode a text."""
        for name in held.open_names():
            self._open[name] = self._open.get(name, 0) + change
            self.shared += change * (self._texts.get(name, 0) > 1)
            if not self._open[name]:
                del self._open[name]

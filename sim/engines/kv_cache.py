"""The blocks of a paged KV cache: how many are free, and which hold what, for servers that reuse prefixes.

The rules are those of vLLM V1 (v1/core/block_pool.py, kv_cache_manager.py). Allocation takes blocks from the front of
the free list. Blocks that are given back go to its back if they hold something that can be found again, and to its
front if not; so the tail of a text is evicted before its head. A full block is found by the whole text up to its end.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Protocol


class Blocks(Protocol):
    """Blocks for sequences; `held` is what one sequence holds, in the order of its tokens."""

    @property
    def free(self) -> int:
        """How many blocks nobody uses."""

    def hits(self, keys: Sequence[Hashable]) -> list[int]:
        """The blocks that hold the longest prefix of `keys`."""

    def idle(self, blocks: Sequence[int]) -> int:
        """How many of these nobody uses: taking them makes the free list shorter."""

    def take(self, held: list[int], hits: Sequence[int], new: int) -> None:
        """Give a sequence blocks that were hit and then `new` ones, of which there are enough."""

    def enter(self, block: int, key: Hashable) -> None:
        """A block is full: it can be found by its key from now on."""

    def give_back(self, held: list[int]) -> None:
        """A sequence needs its blocks no more."""


class CountedBlocks:
    """Blocks that are never found again: only their number matters."""

    def __init__(self, blocks: int):
        self._free = blocks

    @property
    def free(self) -> int:
        """How many blocks nobody uses."""
        return self._free

    def hits(self, keys: Sequence[Hashable]) -> list[int]:
        """See `Blocks.hits`."""
        return []

    def idle(self, blocks: Sequence[int]) -> int:
        """See `Blocks.idle`."""
        return 0

    def take(self, held: list[int], hits: Sequence[int], new: int) -> None:
        """See `Blocks.take`."""
        self._free -= new
        held.extend([0] * new)

    def enter(self, block: int, key: Hashable) -> None:
        """See `Blocks.enter`."""

    def give_back(self, held: list[int]) -> None:
        """See `Blocks.give_back`."""
        self._free += len(held)
        held.clear()


class CachedBlocks:
    """Blocks that keep what they hold until they are used for something else."""

    def __init__(self, blocks: int):
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))
        self._users = [0] * blocks
        self._key: list[Hashable | None] = [None] * blocks
        self._found: dict[Hashable, OrderedDict[int, None]] = {}  # blocks of the same text, the oldest entry first

    @property
    def free(self) -> int:
        """How many blocks nobody uses."""
        return len(self._free)

    def hits(self, keys: Sequence[Hashable]) -> list[int]:
        """See `Blocks.hits`."""
        found = []
        for key in keys:
            same = self._found.get(key)
            if not same:
                break
            found.append(next(iter(same)))
        return found

    def idle(self, blocks: Sequence[int]) -> int:
        """See `Blocks.idle`."""
        return sum(not self._users[block] for block in blocks)

    def take(self, held: list[int], hits: Sequence[int], new: int) -> None:
        """See `Blocks.take`."""
        for block in hits:
            if not self._users[block]:
                del self._free[block]
            self._users[block] += 1
            held.append(block)
        for _ in range(new):
            block, _ = self._free.popitem(last=False)
            self._evict(block)
            self._users[block] = 1
            held.append(block)

    def enter(self, block: int, key: Hashable) -> None:
        """See `Blocks.enter`."""
        if self._key[block] is None:
            self._key[block] = key
            self._found.setdefault(key, OrderedDict())[block] = None

    def give_back(self, held: list[int]) -> None:
        """See `Blocks.give_back`."""
        for block in reversed(held):
            self._users[block] -= 1
            if not self._users[block]:
                self._free[block] = None
                if self._key[block] is None:
                    self._free.move_to_end(block, last=False)
        held.clear()

    def _evict(self, block: int) -> None:
        key = self._key[block]
        if key is not None:
            self._key[block] = None
            same = self._found[key]
            del same[block]
            if not same:
                del self._found[key]

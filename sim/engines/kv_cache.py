"""The blocks of a paged KV cache: how many are free, and in which order those that can be hit again are evicted.

The rules are those of vLLM V1 (v1/core/block_pool.py, kv_cache_manager.py). Allocation takes blocks from the front of
the free list. Blocks that are given back go to its back if they have a cache entry, and to its front if not; so the end
of a text is evicted before its beginning. A full block is found by the whole text up to its end.

Which block holds what does not matter, only the order of the free list. Blocks without an entry are a number, and so
are those whose text no other request has: only texts that others may share are kept block by block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence


class Run:
    """Blocks with cache entries that are next to one another in the free list, to be taken from the last to the first.

    A block of a text that others may share is a run of its own, in the list only while no request uses it.
    """

    __slots__ = ("blocks", "dead", "found", "number", "users", "younger")

    def __init__(self, blocks: int, dead: bool = False):
        self.blocks = blocks
        self.dead = dead  # no request will ask for this text again
        self.users = 0
        self.found: Entries | None = None  # where it is found, by its number in the text
        self.number = 0
        self.younger: list[Run] | None = None  # later entries of the same text


class Entries(dict[int, Run]):
    """Where the blocks of a text are found, by their numbers; where several are the same, the oldest."""

    def __init__(self, name: Hashable):
        self.name = name


class Blocks:
    """The free blocks, and the cache entries; `free` is negative while blocks are owed that there are not.

    `blank_first`: blocks without an entry go to the front of the free list (vLLM 0.20 and later), else to its back.
    """

    def __init__(self, blocks: int, blank_first: bool = True):
        self.free = blocks
        self._blank = blocks  # at the front of the list, without an entry
        self._list: OrderedDict[Run, None] = OrderedDict()
        self._found: dict[Hashable, Entries] = {}
        self._blank_first = blank_first

    def take(self, blocks: int) -> None:
        """Take blocks from the front of the free list; what they held is lost."""
        self.free -= blocks
        blank = self._blank
        if blocks <= blank or not self._list:
            self._blank = blank - blocks
            return
        if blank > 0:
            blocks -= blank
            self._blank = 0
        while blocks and self._list:
            run = next(iter(self._list))
            if run.blocks > blocks:
                run.blocks -= blocks
                return
            blocks -= run.blocks
            del self._list[run]
            run.blocks = 0
            if run.found is not None:
                self._forget(run)
        self._blank -= blocks

    def give_back(self, blank: int, cached: int) -> None:
        """A request ends whose text no other has; `cached` of its blocks have an entry, `blank` have none."""
        self.free += blank + cached
        if self._blank_first:
            self._blank += blank
        else:
            cached += blank
        if cached:
            last = next(reversed(self._list), None)
            if last is not None and last.dead:
                last.blocks += cached
            else:
                self._list[Run(cached, dead=True)] = None

    def park(self, blank: int, cached: int) -> Run:
        """A request is preempted whose text no other has: what it may find again of its `cached` blocks."""
        if blank:
            self.give_back(blank, 0)
        self.free += cached
        run = Run(cached)
        if cached:
            self._list[run] = None
        return run

    def claim(self, run: Run) -> None:
        """Its request takes what is left of a parked run."""
        if run.blocks:
            del self._list[run]
            self.free -= run.blocks

    def find(self, name: Hashable, first: int, end: int) -> list[Run]:
        """The blocks with an entry for the text `name`, from the number `first` on without a gap, before `end`."""
        found = self._found.get(name)
        if not found:
            return []
        runs = list(map(found.get, range(first, end)))
        if None in runs:
            del runs[runs.index(None) :]
        return runs  # type: ignore[return-value]

    def idle(self, blocks: Sequence[Run]) -> int:
        """How many of these no request uses: taking them makes the free list shorter."""
        return sum([not block.users for block in blocks])

    def use(self, blocks: Sequence[Run]) -> None:
        """A request takes blocks that it has hit."""
        for block in blocks:
            if not block.users:
                del self._list[block]
                self.free -= 1
            block.users += 1

    def enter(self, name: Hashable, first: int, end: int) -> list[Run]:
        """A request's blocks from number `first` to `end` are full: they can be found from now on."""
        found = self._found.get(name)
        if found is None:
            found = self._found[name] = Entries(name)
        blocks = []
        for number in range(first, end):
            block = Run(1)
            block.users, block.found, block.number = 1, found, number
            oldest = found.setdefault(number, block)
            if oldest is not block:
                if oldest.younger is None:
                    oldest.younger = []
                oldest.younger.append(block)
            blocks.append(block)
        return blocks

    def leave(self, blocks: Sequence[Run], blank: int) -> None:
        """A request needs its blocks no more: `blocks` with entries, in the order of its text, and `blank` without."""
        if blank:
            self.give_back(blank, 0)
        free, waiting = 0, self._list
        for block in reversed(blocks):
            block.users -= 1
            if not block.users:
                waiting[block] = None
                free += 1
        self.free += free

    def _forget(self, block: Run) -> None:
        found, number = block.found, block.number
        assert found is not None
        oldest = found[number]
        if oldest is not block:
            assert oldest.younger is not None
            oldest.younger.remove(block)
        elif block.younger:
            heir, *younger = block.younger
            heir.younger = younger
            found[number] = heir
        else:
            del found[number]
            if not found:
                del self._found[found.name]

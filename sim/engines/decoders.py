"""Requests that get one token with every step, in closed form, so that any number of steps costs the same.

Steps are numbered from 1 as they are scheduled. A request that has its first token of this kind from step `start` has
computed `line + s` tokens after step s, where `line` never changes; sums over all requests follow from sums of lines.
A block of the KV cache is needed by step s where line + s - 1 is a multiple of the block size, so a histogram of lines
modulo the block size tells the demand of every step to come.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Generic, Protocol, TypeVar


class Decoding(Protocol):
    """What is asked of a member."""

    line: int  # tokens computed after step s are line + s
    last: int  # the step that samples its last token


D = TypeVar("D", bound=Decoding)


class Decoders(Generic[D]):
    """The requests that every further step gives a token, and the steps at which they and others end."""

    def __init__(self, block_size: int):
        self.count = 0
        self.lines = 0  # their sum
        self.ends: dict[int, list[D]] = {}  # by the step that samples the last token
        self._size = block_size
        self._phases = [0] * block_size  # how many take a block at steps that are equal modulo the block size
        self._end_order: list[int] = []
        self._lengths: dict[int, int] = {}  # how many have that line
        self._length_order: list[int] = []

    def join(self, member: D) -> None:
        """A request gets a token with every step to come, up to its `last`."""
        line, last = member.line, member.last
        self.count += 1
        self.lines += line
        self._phases[(1 - line) % self._size] += 1
        lengths = self._lengths
        if line in lengths:
            lengths[line] += 1
        else:
            lengths[line] = 1
            heappush(self._length_order, -line)
        ends = self.ends
        if last in ends:
            ends[last].append(member)
        else:
            ends[last] = [member]
            heappush(self._end_order, last)

    def stop(self, member: D) -> None:
        """No further step computes it; its end is still to come."""
        line = member.line
        self.count -= 1
        self.lines -= line
        self._phases[(1 - line) % self._size] -= 1
        self._lengths[line] -= 1

    def forget_end(self, member: D) -> None:
        """It does not end at its `last` step."""
        same = self.ends[member.last]
        same.remove(member)
        if not same:
            del self.ends[member.last]

    @property
    def longest(self) -> int:
        """The largest line; there is a member."""
        order, lengths = self._length_order, self._lengths
        while not lengths.get(-order[0]):
            lengths.pop(-heappop(order), None)
        return -order[0]

    @property
    def next_end(self) -> int:
        """The first step that samples a last token; there is one to come."""
        order, ends = self._end_order, self.ends
        while order[0] not in ends:
            heappop(order)
        return order[0]

    def blocks(self, first: int, steps: int = 1) -> int:
        """How many blocks of the KV cache so many steps from number `first` on take."""
        size, phases = self._size, self._phases
        if steps == 1:
            return phases[first % size]
        cycles, rest = divmod(steps, size)
        begin = first % size
        end = begin + rest
        partial = sum(phases[begin:end]) + (sum(phases[: end - size]) if end > size else 0)
        return cycles * self.count + partial

    def fitting(self, first: int, steps: int, free: int) -> int:
        """For how many steps from number `first` on, `steps` at most, that many free blocks are enough."""
        size = self._size
        if -(-steps // size) * self.count <= free or self.blocks(first, steps) <= free:
            return steps
        cycles = free // self.count
        free -= cycles * self.count
        fit = cycles * size
        while (free := free - self._phases[(first + fit) % size]) >= 0:
            fit += 1
        return fit

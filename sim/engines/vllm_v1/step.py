"""A step as it was scheduled, and what it computes."""

from __future__ import annotations

from sim.engines.engine import Row
from sim.engines.vllm_v1.held import Held
from sim.model.request import Request
from sim.steptime.work import NOTHING, StepWork


class Step:
    """A step as it was scheduled: all who decode get a token, and `chunks` of prompts are computed.

    `lines` and `longest` are those of the `decoders` (how many they are); a chunk is a request, its tokens, and the
    tokens computed before.
    """

    __slots__ = ("admitted", "chunks", "decoders", "lines", "longest", "number", "preempted", "rows", "sampling")

    def __init__(self, number: int):
        self.number = number
        self.decoders = self.lines = self.longest = 0
        self.chunks: list[tuple[Held, int, int]] = []
        self.sampling: list[Held] = []  # those whose prompt it ends
        self.admitted: list[Request] = []
        self.preempted: list[Request] = []
        self.rows: list[Row] = []  # who takes part, in order, where somebody wants to know

    def work(self) -> StepWork:
        """What it computes."""
        count, number = self.decoders, self.number
        context = longest_context = 0
        if count:
            context, longest_context = self.lines + count * number, self.longest + number
        elif not self.chunks:
            return NOTHING
        total = attention = longest = 0
        for _, tokens, before in self.chunks:
            total += tokens
            attention += tokens * before + tokens * (tokens + 1) // 2
            if tokens > longest:
                longest = tokens
        return StepWork(1, total, len(self.chunks), attention, longest, count, context, longest_context)

    def growth(self) -> StepWork:
        """What the next step computes more, if it has the same shape."""
        count = self.decoders
        if not self.chunks:
            return StepWork(0, 0, 0, 0, 0, 0, count, 1) if count else NOTHING
        if self.sampling or len(self.chunks) > 1:
            return NOTHING
        return StepWork(0, 0, 0, self.chunks[0][1] ** 2, 0, 0, count, 1 if count else 0)

    def pass_by(self, steps: int) -> None:
        """Become the step that comes so many later."""
        self.number += steps
        self.chunks = [(held, tokens, before + steps * tokens) for held, tokens, before in self.chunks]

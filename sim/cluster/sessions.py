"""Sessions: conversations of several turns, each of which is sent with all that was said before.

What a session asks is a function of the seed, of its user (or stream of arrivals), its number and the turn: a session
takes as many turns from its owner's draws as it was to have, also where it ends before them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple, Self

from sim.model.request import Request, Text
from sim.model.server import EngineFlags
from sim.model.status import Status
from sim.model.workload import (
    RequestLengths,
    RequestSpec,
    Sampler,
    Sessions,
    Workload,
    class_seed,
    session_turns,
    source_of,
)

SYSTEM = "system"  # the name of the tokens with which all sessions begin
Delays = tuple[float, ...]


class Ask(NamedTuple):
    """What a client sends next: lengths, delays, and the session that it belongs to."""

    asked: RequestSpec
    delays: Delays
    session: Session | None = None


class Session:
    """One conversation while it goes on; `text` names its tokens (see `request.Text`), `think` is the pause after each
    answer, s, and `over` says that it ended.

    `turns` are what each turn adds, with its delays; `outgrown(prompt_tokens, max_new_tokens)` says which requests are
    longer than the server answers in full.
    """

    __slots__ = ("_ask", "_name", "_outgrown", "_turns", "over", "text", "think")

    def __init__(
        self,
        name: Hashable,
        system_prompt_tokens: int,
        turns: Sequence[tuple[RequestSpec, Delays]],
        outgrown: Callable[[int, int], bool],
        think: float = 0.0,
    ):
        self._name, self._turns, self._outgrown, self.think = name, iter(turns), outgrown, think
        of = turns[0][0].of if turns else 0  # classes of a mix have system prompts of their own
        shared = ((system_prompt_tokens, (SYSTEM, of) if of else SYSTEM),) if system_prompt_tokens else ()
        self.text: Text = (*shared, (0, name))
        self.over = False
        self._ask: Ask

    def turn(self, said: int) -> Ask | None:
        """The next turn, after `said` tokens; None if there is none."""
        if (following := next(self._turns, None)) is None:
            return None
        (prompt, output, new, of), delays = following
        self._ask = Ask(RequestSpec(said + prompt, output, new, of), delays, self)
        return self._ask

    def answered(self, said: int) -> Ask | None:
        """The next turn, after an answer with which the conversation has `said` tokens; None if the session is over,
        which it also is if that turn would outgrow the server."""
        following = self.turn(said)
        if following is not None and self._outgrown(following.asked.prompt_tokens, following.asked.max_new_tokens):
            following = None
        self.over = following is None
        return following

    def after(self, request: Request) -> Ask | None:
        """What its client sends after a request of it has ended; None if the session is over.

        Users repeat a turn that failed, but for one that is too long; arrivals of an open loop do not.
        """
        if request.status == Status.OK:
            return self.answered(request.prompt_tokens + request.received)
        if request.status == Status.VALIDATION or request.user < 0:
            self.over = True
            return None
        if request.received:  # another answer will stand in the place of the tokens that came
            *before, (_, name) = self.text
            self.text = (*before, (request.prompt_tokens, name), (0, (self._name, len(self.text))))
        return self._ask


class SessionSource:
    """Begins the sessions of a workload, or of the classes of a mix that have them; the server has `flags`."""

    def __init__(
        self,
        workload: Workload,
        flags: EngineFlags,
        seed: int | Sequence[int],
        lengths: RequestLengths | None = None,
        attained: float = 1.0,
    ):
        self._laws = [part.conversations for part in workload.parts]
        seeds: list[int | Sequence[int]] = [class_seed(seed, number) for number in range(len(workload.classes))]
        seeds = seeds or [seed]
        self._seeds, self._flags = seeds, flags
        files = lengths.classes if lengths is not None and lengths.classes else (lengths,) * len(seeds)
        later = [(*class_seed(each, 0), number + 1) for number, each in enumerate(seeds)]
        self._later = [
            Sampler(part, own, rows, attained) for part, own, rows in zip(workload.parts, later, files, strict=True)
        ]

    @classmethod
    def of(
        cls,
        workload: Workload,
        flags: EngineFlags,
        seed: int | Sequence[int],
        lengths: RequestLengths | None = None,
        attained: float = 1.0,
    ) -> Self | None:
        """None for a workload without sessions."""
        if all(part.conversations is None for part in workload.parts):
            return None
        return cls(workload, flags, seed, lengths, attained)

    def begin(self, owner: int, turns: Iterator[tuple[RequestSpec, Delays]]) -> Iterator[Ask]:
        """The first turn of every session of a user or of a stream of arrivals, without end; `turns` are its draws.

        Requests of a class without sessions are asked as they are drawn. In a mix only the first turn is drawn from
        `turns`, and further ones from the class's own stream.
        """
        if len(self._laws) == 1:
            (law,) = self._laws
            assert law is not None
            for number, length in enumerate(session_turns(law, self._seeds[0], owner)):
                yield self._session(law, (owner, number), list(islice(turns, length)))
            return
        laws = list(zip(self._laws, self._seeds, strict=True))
        lengths = [None if law is None else session_turns(law, s, owner) for law, s in laws]
        later = [part.requests(owner) for part in self._later]
        for number, (asked, delays) in enumerate(turns):
            law, many = self._laws[asked.of], lengths[asked.of]
            if law is None or many is None:
                yield Ask(asked, delays)
                continue
            mine = [(asked, delays)]
            for _, pause in islice(turns, next(many) - 1):
                mine.append((next(later[asked.of])._replace(of=asked.of), pause))
            yield self._session(law, (owner, number), mine)

    def _session(self, law: Sessions, name: Hashable, turns: Sequence[tuple[RequestSpec, Delays]]) -> Ask:
        shared = law.system_prompt_tokens
        first = Session(name, shared, turns, self._outgrown, law.think).turn(shared)
        assert first is not None
        return first

    def _outgrown(self, prompt_tokens: int, max_new_tokens: int) -> bool:
        if self._flags.refuses(prompt_tokens, max_new_tokens):
            return True
        return self._flags.allowed(prompt_tokens, max_new_tokens) < max_new_tokens


def foreseen(
    workload: Workload, flags: EngineFlags, lengths: RequestLengths | None = None, attained: float = 1.0
) -> Iterator[RequestSpec]:
    """What a user could ask, one request after another, if every answer came whole; without end."""
    asked = source_of(workload, 0, lengths, attained).requests(0)
    if (sessions := SessionSource.of(workload, flags, 0, lengths, attained)) is None:
        yield from asked
        return
    for first in sessions.begin(0, ((one, ()) for one in asked)):
        turn: Ask | None = first
        while turn is not None:
            yield turn.asked
            if turn.session is None:
                break
            turn = turn.session.answered(turn.asked.prompt_tokens + turn.asked.output_tokens)

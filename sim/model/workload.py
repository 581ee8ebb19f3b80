"""The workload: lengths of prompts and answers, and gaps between arrivals in open loop.

Everything is drawn in blocks from a `numpy.random.Generator` that the caller owns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain, count, cycle, repeat
from typing import Annotated, Literal, NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from sim.model.quantity import Count, NotNegative, NotNegativeInt, Positive
from sim.model.warning import Notice
from sim.randomness import BLOCK, Kind, Randomness, arrivals_at

Ints = NDArray[np.int64]

MOST_TOKENS = 10**9  # of one request: no model has a context of more, and sums of them stay exact in 64 bits

MOST_TURNS = 10_000  # of one session, whose turns are all drawn when it begins

UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}  # of times in files, per second


class Lognormal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A lognormal of mean `mean` and coefficient of variation `cv` (standard deviation over mean), rounded to whole
    tokens and clipped to `low`..`high`; mean and cv are those before clipping."""

    mean: Positive
    cv: Positive
    low: Count = 1
    high: Count | None = None


class Exponential(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An exponential of mean `mean`, rounded up to whole tokens (which adds half a token) and clipped to
    `low`..`high`."""

    mean: Positive
    low: Count = 1
    high: Count | None = None


class Geometric(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A geometric on 1, 2, ... of mean `mean` (after each, the next one comes with the same probability), clipped to
    `low`..`high`."""

    mean: Annotated[float, msgspec.Meta(ge=1)]
    low: Count = 1
    high: Count | None = None


class Lengths(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A distribution of a number of tokens or of turns: exactly one of these is given."""

    uniform: tuple[Count, Count] | None = None
    lognormal: Lognormal | None = None
    exponential: Exponential | None = None
    geometric: Geometric | None = None


class Cv(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Gaps between arrivals by their coefficient of variation: 1 is Poisson, more is burstier."""

    cv: Positive


class Gamma(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A renewal process with gamma-distributed gaps."""

    gamma: Cv


class Columns(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Names of a file's columns (JSON: keys, `a.b` for a nested one); those that are absent are found by name."""

    time: str | None = None
    prompt_tokens: str | None = None
    output_tokens: str | None = None
    max_new_tokens: str | None = None


class RequestFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file of requests and how it is read.

    `time_unit` is the unit of numeric times: s, ms, us or ns. `window` keeps what arrives from its first to its second
    number of seconds after the first request. `scale` multiplies the number of requests while hours
    keep their length: copies, shifted in time, are superposed, or requests are left out at random. `compress` divides
    the gaps between arrivals.
    """

    file: str
    columns: Columns = Columns()
    time_unit: Literal["s", "ms", "us", "ns"] | None = None
    window: tuple[NotNegative, Positive] | None = None
    scale: Positive = 1.0
    compress: Positive = 1.0


class Sessions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Conversations of several `turns`, `think` s after each answer; all begin with the same system prompt.

    The prompt of a turn holds what was said before it: the system prompt, earlier prompts and earlier answers.
    """

    turns: Annotated[int, msgspec.Meta(gt=0, le=MOST_TURNS)] | Lengths
    think: NotNegative = 0.0
    system_prompt_tokens: NotNegativeInt = 0


class Workload(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Lengths from distributions, from random rows of a file (`empirical`), from a file in order (`trace`), or from a
    mix of `classes`, each a workload of its own.

    In `sessions` they are those of a turn: what it adds to the conversation. `system_prompt_tokens` stand before the
    prompt of every request, where there are no sessions. With `ignore_eos` no answer ends before its limit.
    """

    prompt_tokens: Count | Lengths | None = None
    output_tokens: Count | Lengths | None = None
    max_new_tokens: Count | Lengths | None = None
    empirical: str | RequestFile | None = None
    trace: str | RequestFile | None = None
    sessions: Sessions | None = None
    system_prompt_tokens: NotNegativeInt = 0
    ignore_eos: bool = False
    classes: tuple[RequestClass, ...] = ()

    @property
    def parts(self) -> Sequence[Workload]:
        """Its classes; itself where it is no mix."""
        return self.classes or [self]

    @property
    def conversations(self) -> Sessions | None:
        """Its sessions; requests that share a system prompt are sessions of one turn. None where no text is shared."""
        if self.sessions is None and self.system_prompt_tokens:
            return Sessions(turns=1, system_prompt_tokens=self.system_prompt_tokens)
        return self.sessions

    @property
    def source(self) -> RequestFile | None:
        """The file of requests; None where lengths are distributions."""
        given = self.trace if self.trace is not None else self.empirical
        return RequestFile(file=given) if isinstance(given, str) else given


class RequestClass(Workload, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One class of a mix: its name, its share of the requests (or, in sessions, of the sessions; shares need not sum to
    1), and its own SLOs, by metric."""

    name: str
    share: Positive
    slo: dict[str, Positive] = {}


class RequestSpec(NamedTuple):
    """The lengths of one request, tokens: its prompt, its answer, and the most it may generate (charged to budgets).
    `of` is the number of its class in a mix."""

    prompt_tokens: int
    output_tokens: int
    max_new_tokens: int
    of: int = 0


class RequestLengths(NamedTuple):
    """The requests of a file, one row each: lengths in tokens, and for a trace arrival times in s since the first."""

    prompt_tokens: Ints
    output_tokens: Ints
    max_new_tokens: Ints
    times: NDArray[np.float64] | None = None
    warnings: tuple[Notice, ...] = ()  # about the file
    classes: tuple[RequestLengths | None, ...] = ()  # of a mix, those of each class; the columns are then empty


def draw_lengths(lengths: int | Lengths, rng: np.random.Generator, n: int) -> Ints:
    """`n` numbers of tokens (or turns), each at least 1."""
    if isinstance(lengths, int):
        return np.full(n, lengths, dtype=np.int64)
    if lengths.uniform is not None:
        low, high = lengths.uniform
        return rng.integers(low, high, n, endpoint=True, dtype=np.int64)
    if lengths.lognormal is not None:
        mean, cv = lengths.lognormal.mean, lengths.lognormal.cv
        var = math.log1p(cv * cv)
        drawn = np.minimum(np.rint(rng.lognormal(math.log(mean) - var / 2, math.sqrt(var), n)), MOST_TOKENS)
        return np.clip(drawn.astype(np.int64), max(1, lengths.lognormal.low), lengths.lognormal.high)
    if lengths.geometric is not None:
        drawn = rng.geometric(1.0 / lengths.geometric.mean, n).astype(np.int64)
        return np.clip(drawn, max(1, lengths.geometric.low), lengths.geometric.high)
    assert lengths.exponential is not None
    law = lengths.exponential
    drawn = np.ceil(rng.exponential(law.mean, n)).astype(np.int64)
    return np.clip(drawn, max(1, law.low), law.high)


class Source(Protocol):
    """Supplies the lengths of each request."""

    def requests(self, owner: int) -> Iterator[RequestSpec]:
        """The lengths of every request of a user, or of a stream of arrivals, from the first on, without end."""


class Sampler:
    """Draws lengths independently for every request, from a workload's distributions or rows of its file.

    Those of an owner's k-th request depend on the seed, the owner and k only. Where the workload gives one length for
    an answer, that is its limit, and answers reach the share `attained` of it (all of it with `ignore_eos`). Where it
    gives both, `output_tokens` is taken as it is.
    """

    def __init__(
        self,
        workload: Workload,
        seed: int | Sequence[int],
        lengths: RequestLengths | None = None,
        attained: float = 1.0,
    ):
        self._workload, self._random, self._lengths = workload, Randomness(seed), lengths
        self._attained = 1.0 if workload.ignore_eos else attained
        w = workload
        self._same = lengths is None and all(
            x is None or isinstance(x, int) for x in (w.prompt_tokens, w.output_tokens, w.max_new_tokens)
        )

    def requests(self, owner: int) -> Iterator[RequestSpec]:
        """See `Source.requests`."""
        if self._same:
            return repeat(next(self._draw(owner, 0)))
        return chain.from_iterable(self._draw(owner, block) for block in count())

    def _draw(self, owner: int, block: int) -> Iterator[RequestSpec]:
        w, n, rng = self._workload, BLOCK, self._random.block(Kind.LENGTHS, owner, block)
        if self._lengths is not None:
            at = rng.integers(0, len(self._lengths.prompt_tokens), n)
            columns = (
                self._lengths.prompt_tokens[at],
                self._lengths.output_tokens[at],
                self._lengths.max_new_tokens[at],
            )
            return map(RequestSpec, *(c.tolist() for c in columns))
        assert w.prompt_tokens is not None
        prompt = draw_lengths(w.prompt_tokens, rng, n)
        charged = None if w.max_new_tokens is None else draw_lengths(w.max_new_tokens, rng, n)
        back = charged if w.output_tokens is None else draw_lengths(w.output_tokens, rng, n)
        assert back is not None
        if charged is None:
            charged = back
        if w.output_tokens is None or w.max_new_tokens is None:
            back = np.maximum(np.rint(back * self._attained).astype(np.int64), 1)
        return map(RequestSpec, prompt.tolist(), np.minimum(back, charged).tolist(), charged.tolist())


class Mix:
    """Draws the class of every request by the shares, and its lengths from the class's own sampler.

    The class of an owner's k-th request depends on the seed, the owner and k; the lengths of the j-th of a class on the
    seed, the owner, the class and j.
    """

    def __init__(
        self,
        workload: Workload,
        seed: int | Sequence[int],
        lengths: RequestLengths | None = None,
        attained: float = 1.0,
    ):
        self._random = Randomness(seed)
        shares = np.cumsum([each.share for each in workload.classes])
        self._edges = shares / shares[-1]
        files = lengths.classes if lengths is not None else (None,) * len(workload.classes)
        seeds = [class_seed(seed, number) for number in range(len(workload.classes))]
        self._parts = [
            Sampler(each, own, rows, attained) for each, own, rows in zip(workload.classes, seeds, files, strict=True)
        ]

    def requests(self, owner: int) -> Iterator[RequestSpec]:
        """See `Source.requests`."""
        streams = [part.requests(owner) for part in self._parts]
        for block in count():
            drawn = self._random.block(Kind.CLASS, owner, block).random(BLOCK)
            for number in np.searchsorted(self._edges, drawn, side="right").tolist():
                yield next(streams[number])._replace(of=number)


def class_seed(seed: int | Sequence[int], number: int) -> tuple[int, ...]:
    """The seed of a class of a mix."""
    return (*((seed,) if isinstance(seed, int) else seed), number + 1)  # zeros at the end would not count


def source_of(
    workload: Workload, seed: int | Sequence[int], lengths: RequestLengths | None = None, attained: float = 1.0
) -> Source:
    """What supplies a workload's lengths; `lengths` are the requests of its files."""
    if workload.classes:
        return Mix(workload, seed, lengths, attained)
    if lengths is not None and workload.trace is not None:
        return Trace(lengths)
    return Sampler(workload, seed, lengths, attained)


class Trace:
    """The requests of a file in order, whichever user asks; starts again at the end of the file."""

    def __init__(self, lengths: RequestLengths):
        columns = (lengths.prompt_tokens, lengths.output_tokens, lengths.max_new_tokens)
        self._specs = cycle(list(map(RequestSpec, *(c.tolist() for c in columns))))

    def requests(self, owner: int) -> Iterator[RequestSpec]:
        """See `Source.requests`; all owners share the file."""
        return self._specs


def session_turns(sessions: Sessions, seed: int | Sequence[int], owner: int) -> Iterator[int]:
    """How many turns each session of a user or of a stream of arrivals is to have, without end."""
    random = Randomness(seed)
    for block in count():
        drawn = draw_lengths(sessions.turns, random.block(Kind.TURNS, owner, block), BLOCK)
        yield from np.minimum(drawn, MOST_TURNS).tolist()


def arrival_gaps(arrivals: str | Gamma, rate: float, seed: int | Sequence[int], before: int = 0) -> Iterator[float]:
    """The gaps between arrivals of `rate` requests/s, s, without end: functions of the seed, the rate, and how many
    rungs of this rate there were `before`."""
    random, owner = Randomness(seed), arrivals_at(rate, before)
    for block in count():
        rng = random.block(Kind.GAPS, owner, block)
        if arrivals == "constant":
            yield from repeat(1.0 / rate, BLOCK)
        elif arrivals == "poisson":
            yield from rng.exponential(1.0 / rate, BLOCK).tolist()
        else:
            assert isinstance(arrivals, Gamma)
            shape = 1.0 / arrivals.gamma.cv**2
            yield from rng.gamma(shape, 1.0 / (rate * shape), BLOCK).tolist()

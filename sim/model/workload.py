"""The workload: lengths of prompts and answers, and gaps between arrivals in open loop.

Everything is drawn in blocks from a `numpy.random.Generator` that the caller owns.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from sim.model.warning import Notice

Ints = NDArray[np.int64]

MOST_TOKENS = 10**9  # of one request: no model has a context of more, and sums of them stay exact in 64 bits

UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}  # of times in files, per second


class Lognormal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A lognormal of mean `mean` and coefficient of variation `cv` (standard deviation over mean), rounded to whole
    tokens and clipped to `low`..`high`; mean and cv are those before clipping."""

    mean: float
    cv: float
    low: int = 1
    high: int | None = None


class Exponential(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An exponential of mean `mean`, rounded up to whole tokens (which adds half a token) and clipped to
    `low`..`high`."""

    mean: float
    low: int = 1
    high: int | None = None


class Lengths(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A distribution of a number of tokens: exactly one of the three is given."""

    uniform: tuple[int, int] | None = None
    lognormal: Lognormal | None = None
    exponential: Exponential | None = None


class Cv(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Gaps between arrivals by their coefficient of variation: 1 is Poisson, more is burstier."""

    cv: float


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

    `time_unit` is the unit of numeric times: s, ms, us or ns. `scale` multiplies the number of requests while hours
    keep their length: copies, shifted in time, are superposed, or requests are left out at random. `compress` divides
    the gaps between arrivals.
    """

    file: str
    columns: Columns = Columns()
    time_unit: str | None = None
    scale: float = 1.0
    compress: float = 1.0


class Workload(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Lengths from distributions, from random rows of a file (`empirical`), or from a file in order (`trace`)."""

    prompt_tokens: int | Lengths | None = None
    output_tokens: int | Lengths | None = None
    max_new_tokens: int | Lengths | None = None
    empirical: str | RequestFile | None = None
    trace: str | RequestFile | None = None

    @property
    def source(self) -> RequestFile | None:
        """The file of requests; None where lengths are distributions."""
        given = self.trace if self.trace is not None else self.empirical
        return RequestFile(file=given) if isinstance(given, str) else given


class RequestSpec(NamedTuple):
    """The lengths of one request, tokens: its prompt, its answer, and the most it may generate (charged to budgets)."""

    prompt_tokens: int
    output_tokens: int
    max_new_tokens: int


class RequestLengths(NamedTuple):
    """The requests of a file, one row each: lengths in tokens, and for a trace arrival times in s since the first."""

    prompt_tokens: Ints
    output_tokens: Ints
    max_new_tokens: Ints
    times: NDArray[np.float64] | None = None
    warnings: tuple[Notice, ...] = ()  # about the file


def draw_lengths(lengths: int | Lengths, rng: np.random.Generator, n: int) -> Ints:
    """`n` numbers of tokens, each at least 1."""
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
    assert lengths.exponential is not None
    law = lengths.exponential
    drawn = np.ceil(rng.exponential(law.mean, n)).astype(np.int64)
    return np.clip(drawn, max(1, law.low), law.high)


class Source(Protocol):
    """Supplies the lengths of each request."""

    def next(self, user: int) -> RequestSpec:
        """The lengths of the user's next request."""


class Sampler:
    """Draws lengths independently for every request, from a workload's distributions or rows of its file.

    Where the workload gives one length for an answer, that is its limit, and answers reach the share `attained` of it.
    Where it gives both, `output_tokens` is taken as it is.
    """

    BLOCK = 1024

    def __init__(
        self, workload: Workload, rng: np.random.Generator, lengths: RequestLengths | None = None, attained: float = 1.0
    ):
        self._workload, self._rng, self._lengths, self._attained = workload, rng, lengths, attained
        self._block: list[RequestSpec] = []
        self._same: RequestSpec | None = None
        w = workload
        if lengths is None and all(
            x is None or isinstance(x, int) for x in (w.prompt_tokens, w.output_tokens, w.max_new_tokens)
        ):
            self._same = self._draw(1)[0]

    def next(self, user: int) -> RequestSpec:
        """See `Source.next`; all users are alike."""
        if self._same is not None:
            return self._same
        if not self._block:
            self._block = self._draw(self.BLOCK)[::-1]
        return self._block.pop()

    def _draw(self, n: int) -> list[RequestSpec]:
        w, rng = self._workload, self._rng
        if self._lengths is not None:
            at = rng.integers(0, len(self._lengths.prompt_tokens), n)
            columns = (
                self._lengths.prompt_tokens[at],
                self._lengths.output_tokens[at],
                self._lengths.max_new_tokens[at],
            )
            return list(map(RequestSpec, *(c.tolist() for c in columns)))
        assert w.prompt_tokens is not None
        prompt = draw_lengths(w.prompt_tokens, rng, n)
        charged = None if w.max_new_tokens is None else draw_lengths(w.max_new_tokens, rng, n)
        back = charged if w.output_tokens is None else draw_lengths(w.output_tokens, rng, n)
        assert back is not None
        if charged is None:
            charged = back
        if w.output_tokens is None or w.max_new_tokens is None:
            back = np.maximum(np.rint(back * self._attained).astype(np.int64), 1)
        return list(map(RequestSpec, prompt.tolist(), np.minimum(back, charged).tolist(), charged.tolist()))


class Trace:
    """The requests of a file in order, whichever user asks; starts again at the end of the file."""

    def __init__(self, lengths: RequestLengths):
        columns = (lengths.prompt_tokens, lengths.output_tokens, lengths.max_new_tokens)
        self._specs = list(map(RequestSpec, *(c.tolist() for c in columns)))
        self._at = 0

    def next(self, user: int) -> RequestSpec:
        """See `Source.next`; all users are alike."""
        spec = self._specs[self._at % len(self._specs)]
        self._at += 1
        return spec


def arrival_gaps(arrivals: str | Gamma, rate: float, rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    """`n` gaps between arrivals of `rate` requests/s, s."""
    if arrivals == "constant":
        return np.full(n, 1.0 / rate)
    if arrivals == "poisson":
        return rng.exponential(1.0 / rate, n)
    assert isinstance(arrivals, Gamma)
    shape = 1.0 / arrivals.gamma.cv**2
    return rng.gamma(shape, 1.0 / (rate * shape), n)

"""The traffic of a plan: one load, and what-ifs of it (more of it, longer answers)."""

from __future__ import annotations

from typing import TypeVar

import msgspec
import numpy as np

from scenarios.forecast.forecast import named, unit_of
from sim.model.scenario import Scenario
from sim.model.workload import (
    MOST_TOKENS,
    Exponential,
    Geometric,
    Lengths,
    Lognormal,
    RequestFile,
    RequestLengths,
    Workload,
)

MOST = 50_000  # requests of a trace or a profile that a trial simulates: a second or two
SHORTEST = 300.0  # s of every hour: what remains of one is long against an answer
STEP = 1.05  # ratio between neighbouring loads of a search: finer than a calibration knows a crossing
SPAN = 64.0  # how far from the load asked about a search for the largest one goes, up and down

W = TypeVar("W", bound=Workload)


def times(scenario: Scenario, factor: float) -> Scenario:
    """The scenario with `factor` times its users, rate or trace."""
    if factor == 1.0:
        return scenario
    load, work = scenario.load, scenario.workload
    if load.users is not None:
        load = msgspec.structs.replace(load, users=[max(1, round(factor * users)) for users in load.users])
    elif load.rate is not None:
        load = msgspec.structs.replace(load, rate=[factor * rate for rate in load.rate])
    elif load.profile is not None:
        rates = [factor * rate for rate in load.profile.requests_per_second]
        profile = msgspec.structs.replace(load.profile, requests_per_second=rates)
        load = msgspec.structs.replace(load, profile=profile)
    else:
        assert work.trace is not None
        trace = RequestFile(file=work.trace) if isinstance(work.trace, str) else work.trace
        work = msgspec.structs.replace(work, trace=msgspec.structs.replace(trace, scale=factor * trace.scale))
    return msgspec.structs.replace(scenario, load=load, workload=work)


def load_factors(scenario: Scenario) -> list[float]:
    """Loads, as multiples of the scenario's, from the heaviest to the lightest; numbers of users are whole."""
    steps = int(np.ceil(np.log(SPAN) / np.log(STEP)))
    factors = [STEP**k for k in range(steps, -steps - 1, -1)]
    if scenario.load.users is not None:
        (users,) = scenario.load.users
        whole = sorted({max(1, round(factor * users)) for factor in factors}, reverse=True)
        return [each / users for each in whole]
    return factors


def load_of(scenario: Scenario) -> float:
    """Users, requests/s (of a profile: in its busiest hour), or the multiple of the trace."""
    load = scenario.load
    if load.users is not None:
        return float(load.users[0])
    if load.rate is not None:
        return load.rate[0]
    if load.profile is not None:
        return max(load.profile.requests_per_second)
    source = scenario.workload.source
    return source.scale if source is not None else 1.0


def unit(scenario: Scenario) -> str:
    """What `load_of` counts."""
    if scenario.load.profile is not None:
        return f"{unit_of(scenario)} in the busiest hour"
    return "times the trace" if scenario.load.trace else unit_of(scenario)


def in_words(scenario: Scenario) -> str:
    """The load in words: `80 users`."""
    return named(float(f"{load_of(scenario):.3g}"), unit(scenario))


def share_of_hours(scenario: Scenario) -> float:
    """The share of a day's time that is simulated: less than 1 where a profile has shorter hours."""
    return 1.0 if scenario.load.profile is None else scenario.load.profile.seconds / 3600.0


def longer_answers(
    scenario: Scenario, lengths: RequestLengths | None, factor: float
) -> tuple[Scenario, RequestLengths | None]:
    """The scenario, and the requests of its file, with answers `factor` times as long."""
    work = _with_longer(scenario.workload, factor)
    return msgspec.structs.replace(scenario, workload=work), None if lengths is None else _rows(lengths, factor)


def _rows(lengths: RequestLengths, factor: float) -> RequestLengths:
    back, charged = (np.rint(factor * x).astype(np.int64) for x in (lengths.output_tokens, lengths.max_new_tokens))
    parts = tuple(None if part is None else _rows(part, factor) for part in lengths.classes)
    return lengths._replace(output_tokens=back, max_new_tokens=charged, classes=parts)


def _with_longer(work: W, factor: float) -> W:
    return msgspec.structs.replace(
        work,
        output_tokens=_longer(work.output_tokens, factor),
        max_new_tokens=_longer(work.max_new_tokens, factor),
        classes=[_with_longer(each, factor) for each in work.classes],
    )


def _longer(law: int | Lengths | None, factor: float) -> int | Lengths | None:
    if law is None:
        return None
    if isinstance(law, int):
        return min(max(1, round(factor * law)), MOST_TOKENS)
    changed: dict[str, object] = {}
    for name in Lengths.__struct_fields__:
        if (given := getattr(law, name)) is None:
            continue
        if isinstance(given, tuple):
            changed[name] = tuple(max(1, round(factor * x)) for x in given)
        else:
            assert isinstance(given, Lognormal | Exponential | Geometric)
            high = None if given.high is None else max(1, round(factor * given.high))
            changed[name] = msgspec.structs.replace(given, mean=factor * given.mean, high=high)
    return msgspec.structs.replace(law, **changed)


def representative(
    scenario: Scenario, lengths: RequestLengths | None, period: float
) -> tuple[Scenario, RequestLengths | None, str | None]:
    """The traffic, cut to windows where it is too long to simulate whole, and what was left out, in words.

    Of a profile every hour is shortened, with its rate. Of a trace whole periods are kept, in order, those with the
    most requests, prompt tokens or answer tokens first: if any breaks an SLO, these do. Outages have their times in the
    whole traffic: with them nothing is cut.
    """
    load = scenario.load
    if scenario.served_by.outages:
        return scenario, lengths, None
    if (profile := load.profile) is not None:
        hours = len(profile.requests_per_second)
        each = 3600.0 * sum(profile.requests_per_second)
        if profile.lasts / profile.seconds / hours * each * profile.seconds / 3600.0 <= MOST:
            return scenario, lengths, None
        seconds = min(profile.seconds, max(SHORTEST, 3600.0 * MOST / each))
        cut = msgspec.structs.replace(profile, days=1, seconds=seconds)
        scenario = msgspec.structs.replace(scenario, load=msgspec.structs.replace(load, profile=cut))
        return scenario, lengths, f"{seconds:.0f} s of every hour are simulated, each with its own rate, for one day"
    if not load.trace or lengths is None or lengths.times is None or len(lengths.times) <= MOST:
        return scenario, lengths, None
    number = (lengths.times // period).astype(np.int64)
    weights = (np.ones(len(number)), lengths.prompt_tokens, lengths.output_tokens)
    ranked = [np.argsort(-np.bincount(number, weights=w), kind="stable").tolist() for w in weights]
    kept, total = list[int](), 0
    counts = np.bincount(number)
    for place in dict.fromkeys(p for places in zip(*ranked, strict=True) for p in places):
        if kept and total + counts[place] > MOST:
            break
        kept.append(place)
        total += int(counts[place])
    kept.sort()
    here = np.isin(number, kept)
    begin = np.searchsorted(kept, number[here]) * period
    times_ = lengths.times[here] - number[here] * period + begin
    rows = RequestLengths(
        lengths.prompt_tokens[here], lengths.output_tokens[here], lengths.max_new_tokens[here], times_, lengths.warnings
    )
    words = f"{len(kept)} of {int((counts > 0).sum())} periods of {period:g} s are simulated, the busiest"
    return scenario, rows, words

"""Which option keeps the SLOs at the least cost? The search, and what would change its answer.

Every option is given the same draws, in the same random order, until the sequential test is clear (`sequential`); the
number of replicas is verified at n and at n - 1 (`search`). Choosing the cheapest of what passed prefers options that
were lucky in their draws, so what is said of the chosen one comes from draws that took no part in the choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pandas as pd

from scenarios.forecast.bottleneck import bottleneck
from scenarios.forecast.cost import MONTH, SECONDS
from scenarios.forecast.forecast import Estimate, estimate
from scenarios.forecast.warnings import forecast_warnings
from scenarios.load.options import REPLICAS, Option, limits
from scenarios.plan import traffic
from scenarios.plan.answer import Change, Crossing, OptionRow, Period, Plan, Replicas, Share, Tried
from scenarios.plan.search import Answers, Asked, Found, first_place
from scenarios.plan.sequential import BATCH, ERROR, MOST, SequentialTest
from scenarios.plan.trial import Outcome
from scenarios.plan.trials import Search, Setting, Trials
from sim.executors import IN_PROCESS, Executor
from sim.model.calibration import Calibration, check_suits
from sim.model.errors import BadInput
from sim.model.flags import in_words
from sim.model.machine import Draw
from sim.model.metric import LATENCIES, plain
from sim.model.scenario import Goal, Scenario
from sim.model.warning import Notice, notice

FRESH = 99  # draws of which the chosen option's probability and bands are made: the usual replicates of a forecast
MORE, LONGER, TIGHTER = 1.25, 1.2, 0.8  # what-ifs: traffic, answers, limits
WORST = 0.1  # the calibration's worst decile
LIKELY = (0.05, 0.95)  # between these a measurement could change the decision
STRONG = 0.5  # rank correlation from which on a parameter is named as what the decision depends on

Progress = Callable[[str, float, int], None]
METHOD = (
    f"Wald's sequential probability ratio test (1945) at {ERROR:.0%} error, decided after every {BATCH} draws; "
    "fewest replicas by bisection, verified at n and n - 1; "
    "the chosen option's probability from draws not used to choose"
)


def make_plan(
    options: Sequence[Option],
    calibrations: Mapping[str, Calibration],
    *,
    seed: int = 0,
    draws: int = FRESH,
    executor: Executor = IN_PROCESS,
    progress: Progress = lambda what, done, total: None,
    taken_as: str | None = None,
    max_load: bool = False,
) -> Plan:
    """The plan of options, each at one load, with their calibrations by name. The same options, calibrations and seed
    give the same plan, whatever the executor. With `max_load` only the largest load that each option's fleet bears."""
    goal = options[0].scenario.goal or Goal()
    slo = tuple(limits(options[0].scenario).items())
    trials = Trials(calibrations, seed, goal.period, executor, progress)
    order = (1 + np.random.default_rng([seed, 10]).permutation(MOST)).tolist()
    work = _Work(trials, goal, slo, order, list(range(MOST + 1, MOST + 1 + draws)), taken_as)
    crossings = [] if not max_load else work.largest_loads([(option, _fixed(option)) for option in options])
    rows = [work.row(option, _fixed(option), {}, True) for option in options] if max_load else work.rows(options)
    return work.plan(options, rows, crossings, seed)


def _fixed(option: Option) -> int:
    """The replicas of a given fleet; one where nothing is said."""
    if option.low == option.high:
        return option.low
    if (option.low, option.high) == REPLICAS:
        return 1
    raise BadInput("expected one number of replicas to find the largest load of", key="fleet.replicas")


class _Work(NamedTuple):
    """What the parts of a plan share: its trials, goal, limits, the draws of tests and those kept back."""

    trials: Trials
    goal: Goal
    slo: tuple[tuple[str, float], ...]
    order: Sequence[int]
    fresh: Sequence[int]
    taken_as: str | None

    def rows(self, options: Sequence[Option]) -> list[OptionRow]:
        """Every option with its fewest replicas."""
        found = self.trials.together([self.fewest(option) for option in options])
        return [self.row(o, _nearest(f), f.tests, f.place is not None) for o, f in zip(options, found, strict=True)]

    def setting(self, option: Option, replicas: int, **what_if: Any) -> Setting:
        """An option with so many replicas."""
        return Setting(option, replicas, what_if.pop("slo", self.slo), **what_if)

    def fewest(
        self, option: Option, guess: int | None = None, high: int | None = None, **what_if: Any
    ) -> Search[Found]:
        """Search for the fewest replicas that keep the SLOs, spare ones not counted."""
        spare = self.goal.spare
        top = option.high if high is None else high
        if top <= spare:
            raise BadInput(f"expected more than {spare} replicas, of which {spare} may be lost", key="goal.spare")
        search = first_place(max(1, option.low - spare), top - spare, self.goal.probability, self.order, guess)
        return _settings(search, lambda place: self.setting(option, place, **what_if))

    def row(self, option: Option, needed: int, tests: Mapping[int, SequentialTest], met: bool) -> OptionRow:
        """What is known of an option with `needed` replicas and the spare ones, by the draws that were kept back."""
        draws = self.fresh
        scenario = option.scenario
        whole = needed + self.goal.spare
        outcomes = self.trials.run([(self.setting(option, needed), draw) for draw in draws])
        shown = outcomes
        if self.goal.spare:
            shown = self.trials.run([(self.setting(option, whole), draw) for draw in draws])
        hour = usd_per_hour(scenario, whole)
        simulated, lengths = self.trials.scenario(self.setting(option, whole))
        table = pd.DataFrame([o.metrics for o in shown])
        middle = table.median(numeric_only=True)
        growing = sum(o.growing for o in shown) > len(shown) / 2
        binds = bottleneck(simulated, middle)
        calibration = self.trials.calibration(option)
        rungs = pd.DataFrame([middle])
        rungs["load"] = rungs["load"] / whole  # what one replica gets is what was calibrated
        warnings = [
            *check_suits(calibration, scenario.server.declared, self.taken_as, scenario.calibration),
            *scenario.warnings,
            *self._left_out(option, whole),
            *forecast_warnings(simulated, calibration, rungs, [growing], lengths),
        ]
        rates = [o.metrics["rps"] for o in shown]
        tokens = [o.metrics["input_tokens_per_s"] + o.metrics["output_tokens_per_s"] for o in shown]
        clear = {place: test.decision for place, test in tests.items()}
        return OptionRow(
            name=option.name,
            met=met,
            replicas=Replicas(
                value=whole,
                low=1 + self.goal.spare + max((p for p, d in clear.items() if d is False and p < needed), default=0),
                high=self.goal.spare + min((p for p, d in clear.items() if d), default=option.high),
            ),
            spare=self.goal.spare,
            hardware=hardware(scenario),
            flags=option.flags,
            assumed=in_words(scenario.flags),
            probability={"all": _share([o.keeps for o in outcomes])}
            | {name: _share([o.kept[name] for o in outcomes]) for name, _ in self.slo},
            metrics={name: _known([o.metrics[name] for o in shown if not o.growing]) for name in self._quotable()},
            periods=self._periods(shown, traffic.share_of_hours(simulated)),
            usd_per_hour=hour,
            usd_per_month=None if hour is None else MONTH * hour,
            per_1000_requests=_per(hour, rates, 1e3),
            per_million_tokens=_per(hour, tokens, 1e6),
            rps=_known(rates),
            utilisation=_known([1.0 - o.metrics["idle_share"] for o in shown]),
            bottleneck=binds.binds,
            why=binds.words,
            tried=[self._tried(option, place, tests[place]) for place in sorted(tests)],
            warnings=list(dict.fromkeys(warnings)),
            depends_on=self._depends_on(calibration, outcomes, draws),
        )

    def _left_out(self, option: Option, replicas: int) -> list[Notice]:
        words = self.trials.left_out(self.setting(option, replicas))
        return [] if words is None else [notice("windows-only", f"the traffic is long: {words}")]

    def _quotable(self) -> list[str]:
        return list(dict.fromkeys([self.quoted, *(name for name, _ in self.slo), "e2e_p95", "ttft_p95"]))

    def _periods(self, outcomes: Sequence[Outcome], share: float) -> list[Period]:
        steady = [o.periods for o in outcomes if not o.growing]
        names = [*self._quotable(), "rps"]
        return [
            Period(start=start / share, metrics={n: _known([p[start][n] for p in steady if start in p]) for n in names})
            for start in sorted({start for periods in steady for start in periods})
        ]

    @property
    def quoted(self) -> str:
        """The metric of the sentence: an SLO's, E2E before others."""
        named = [name for name, _ in self.slo if plain(name) in LATENCIES]
        return next((name for name in named if plain(name).startswith("e2e")), named[0] if named else "e2e_p95")

    def _tried(self, option: Option, place: int, test: SequentialTest) -> Tried:
        outcomes = self.trials.run([(self.setting(option, place), draw) for draw in self.order[: test.draws]])
        hour = usd_per_hour(option.scenario, place + self.goal.spare)
        return Tried(
            replicas=place + self.goal.spare,
            kept=Share(value=test.share, stderr=test.stderr, draws=test.draws),
            decision=test.decision,
            usd_per_month=None if hour is None else MONTH * hour,
            latency=_known([o.metrics[self.quoted] for o in outcomes if not o.growing]).value,
        )

    def _depends_on(self, calibration: Calibration, outcomes: Sequence[Outcome], draws: Sequence[int]) -> str | None:
        """The parameter whose rank correlates most with how far the worst SLO is from its limit."""
        margins = pd.Series([self.strain(o) for o in outcomes]).rank()
        if len(draws) < 2 * BATCH or margins.nunique() < 3:
            return None
        drawn = pd.DataFrame([Draw(self.trials.seed, draw).values(calibration) for draw in draws]).rank()
        varied = drawn.loc[:, drawn.nunique() > 1]
        if varied.empty:
            return None
        found = varied.corrwith(margins).abs()
        if not found.max() >= STRONG:
            return None
        name = str(found.idxmax())
        parameter = calibration.parameters[name]
        return f"{parameter.meaning or name} ({name}, {parameter.low:.3g} to {parameter.high:.3g} {parameter.unit})"

    def strain(self, outcome: Outcome) -> float:
        """The largest metric in units of its limit; infinite without a steady state."""
        if outcome.growing:
            return math.inf
        ratios = [outcome.metrics[name] / limit for name, limit in self.slo]
        return math.inf if any(map(math.isnan, ratios)) else max(ratios)

    def largest_loads(self, fleets: Sequence[tuple[Option, int]]) -> list[Crossing]:
        """The largest load that each fleet bears."""
        searches = [self._largest(option, replicas) for option, replicas in fleets]
        found = self.trials.together(searches)
        return [self._crossing(option, n, f) for (option, n), f in zip(fleets, found, strict=True)]

    def _largest(self, option: Option, replicas: int, guess: int | None = None) -> Search[Found]:
        factors = traffic.load_factors(option.scenario)
        search = first_place(0, len(factors) - 1, self.goal.probability, self.order, guess)
        return _settings(search, lambda place: self.setting(option, replicas, traffic=factors[place]))

    def _crossing(self, option: Option, replicas: int, found: Found) -> Crossing:
        load, factors = traffic.load_of(option.scenario), traffic.load_factors(option.scenario)
        heavier = [place for place, test in found.tests.items() if not test.decision]
        return Crossing(
            option=option.name,
            replicas=replicas,
            kept_at=None if found.place is None else load * factors[found.place],
            broken_at=load * factors[max(heavier)] if heavier else None,
            tried={
                f"{load * factors[place]:.6g}": Share(value=test.share, stderr=test.stderr, draws=test.draws)
                for place, test in sorted(found.tests.items(), reverse=True)
            },
        )

    def plan(self, options: Sequence[Option], rows: list[OptionRow], crossings: list[Crossing], seed: int) -> Plan:
        """The answer: the cheapest option that reaches the goal, said anew from fresh draws, and what changes it."""
        met = [i for i, row in enumerate(rows) if row.met]
        at = min(met or range(len(rows)), key=lambda i: self._rank(rows[i], bool(met)))
        option, row = options[at], rows[at]
        needed = row.replicas.value - self.goal.spare
        sensitivity, kept_at, broken_at, fewer, lost = list[Change](), None, None, None, None
        if crossings:
            kept_at, broken_at = crossings[at].kept_at, crossings[at].broken_at
        else:
            if met:
                sensitivity = self._sensitivity(option, needed, row, rows)
                guess = traffic.load_factors(option.scenario).index(1.0)
                (found,) = self.trials.together([self._largest(option, needed, guess)])
                reserve = self._crossing(option, needed, found)
                kept_at, broken_at = reserve.kept_at, reserve.broken_at
            fewer = self._kept(option, needed - 1)
            lost = self._kept(option, row.replicas.value - 1)
        name = options[0].scenario.name
        load = options[0].scenario.load
        return Plan(
            name=name,
            question=msgspec.to_builtins(msgspec.structs.replace(options[0].scenario, written=msgspec.UNSET)),
            load=traffic.load_of(options[0].scenario),
            unit=traffic.unit(options[0].scenario),
            traffic=traffic.in_words(options[0].scenario),
            slo=dict(self.slo),
            goal=self.goal.probability,
            spare=self.goal.spare,
            period=None if load.users is not None or load.rate is not None else self.goal.period,
            quoted=self.quoted,
            options=rows,
            best=row.name if met and not crossings else None,
            nearest=row.name,
            frontier=_frontier(rows, self.quoted),
            sensitivity=sensitivity,
            kept_at=kept_at,
            broken_at=broken_at,
            fewer=fewer,
            lost=lost,
            crossing=crossings,
            next_measurement=self._next(rows),
            warnings=list(dict.fromkeys(said for r in rows for said in r.warnings)),
            seed=seed,
            simulations=self.trials.simulated,
            method=METHOD,
        )

    def _rank(self, row: OptionRow, met: bool) -> tuple[float, float]:
        latency = row.metrics[self.quoted].value
        cost = row.usd_per_month if row.usd_per_month is not None else float(row.replicas.value)
        second = math.inf if latency is None else latency
        return (cost, second) if met else (-row.probability["all"].value, cost)

    def _kept(self, option: Option, replicas: int) -> Share | None:
        if replicas < 1:
            return None
        outcomes = self.trials.run([(self.setting(option, replicas), draw) for draw in self.fresh])
        return _share([o.keeps for o in outcomes])

    def _sensitivity(self, option: Option, needed: int, row: OptionRow, rows: Sequence[OptionRow]) -> list[Change]:
        """What other inputs would change, the largest effect on cost first."""
        high = 4 * needed + self.goal.spare + 4
        tighter = tuple((name, TIGHTER * limit) for name, limit in self.slo)
        more = max(needed, round(MORE * needed))
        asked: list[tuple[str, str, Search[int | None]]] = [
            ("traffic", f"× {MORE:g}", _place(self.fewest(option, more, high, traffic=MORE))),
            ("answers", f"{LONGER - 1:.0%} longer", _place(self.fewest(option, more, high, answers=LONGER))),
            ("SLO", f"limits × {TIGHTER:g}", _place(self.fewest(option, needed, high, slo=tighter))),
            ("machine", "the calibration's worst decile", self._worst(option, needed, high)),
        ]
        found = self.trials.together([search for _, _, search in asked])
        changes = [self._change(option, row, what, how, n) for (what, how, _), n in zip(asked, found, strict=True)]
        if row.usd_per_month is not None:
            others = [r for r in rows if r.met and r.name != row.name and r.usd_per_month is not None]
            rival = min(others, key=lambda r: r.usd_per_month or 0.0, default=None)
            words = "the same option stays the cheapest"
            if rival is not None and (rival.usd_per_month or 0.0) < MORE * row.usd_per_month:
                words = f"{rival.name} is then cheaper"
            cost = MORE * row.usd_per_month
            changes.append(
                Change(
                    input="price",
                    change=f"of this option × {MORE:g}",
                    replicas=row.replicas.value,
                    usd_per_month=cost,
                    effect=MORE - 1.0,
                    words=words,
                )
            )
        return sorted(changes, key=lambda c: -math.inf if c.effect is None else -abs(c.effect))

    def _change(self, option: Option, row: OptionRow, what: str, how: str, needed: int | None) -> Change:
        if needed is None:
            words = "no number of replicas reaches the goal"
            return Change(input=what, change=how, replicas=None, usd_per_month=None, effect=None, words=words)
        whole = needed + self.goal.spare
        now = usd_per_hour(option.scenario, row.replicas.value)
        then = usd_per_hour(option.scenario, whole)
        effect = whole / row.replicas.value - 1.0 if now is None or then is None else then / now - 1.0
        by = whole - row.replicas.value
        words = "the same number of replicas" if by == 0 else f"{abs(by)} {'more' if by > 0 else 'fewer'}"
        month = None if then is None else MONTH * then
        return Change(input=what, change=how, replicas=whole, usd_per_month=month, effect=effect, words=words)

    def _worst(self, option: Option, needed: int, high: int) -> Search[int | None]:
        """The fewest replicas with which the goal is reached even in the draws that strain the SLOs most."""
        outcomes = yield [(self.setting(option, needed), draw) for draw in self.fresh]
        strains = [self.strain(o) for o in outcomes]
        many = max(1, round(WORST * len(strains)))
        worst = [self.fresh[i] for i in np.argsort(strains, kind="stable")[-many:].tolist()]
        for replicas in range(needed, high + 1):
            outcomes = yield [(self.setting(option, replicas), draw) for draw in worst]
            if sum(o.keeps for o in outcomes) >= self.goal.probability * many:
                return replicas
        return None

    def _next(self, rows: Sequence[OptionRow]) -> list[str]:
        """What to measure where a better known machine could change the decision."""
        said = []
        for row in rows:
            low, high = LIKELY
            open_ones = [t for t in row.tried if t.decision is None or low < t.kept.value < high]
            if not open_ones:
                continue
            tried = max(open_ones, key=lambda t: -abs(t.kept.value - 0.5))
            why = f"; it depends most on {row.depends_on}" if row.depends_on else ""
            undecided = " (undecided)" if tried.decision is None else ""
            said.append(
                f"{row.name}: {tried.replicas} {'replica keeps' if tried.replicas == 1 else 'replicas keep'} the SLOs "
                f"in {tried.kept.value:.0%} of the search's draws{undecided}{why}. Measure a machine at its "
                "share of this load (`servecast measure`); `servecast calibrate RUN --advise --question SCENARIO` says "
                "which load tells most."
            )
        return said


def _settings(search: Generator[Asked, Answers, Found], setting: Callable[[int], Setting]) -> Search[Found]:
    """The search with its places as settings."""
    asked = next(search)
    while True:
        outcomes = yield [(setting(place), draw) for place, draw in asked]
        try:
            asked = search.send([outcome.keeps for outcome in outcomes])
        except StopIteration as e:
            found: Found = e.value
            return found


def _place(search: Search[Found]) -> Search[int | None]:
    found = yield from search
    return found.place


def _nearest(found: Found) -> int:
    """The place that passes, or the one that comes nearest to it."""
    if found.place is not None:
        return found.place
    return max(found.tests, key=lambda place: (found.tests[place].share, -place))


def usd_per_hour(scenario: Scenario, replicas: int) -> float | None:
    """What so many replicas cost an hour; None without a price."""
    return None if scenario.price is None else scenario.price.of(replicas)


def hardware(scenario: Scenario) -> str:
    """What a replica runs on, in words; its model where the boards are not known."""
    machine = scenario.machine
    if machine.gpu is not None:
        return f"{machine.gpus}×{machine.gpu}" if machine.gpus and machine.gpus > 1 else machine.gpu
    return machine.model or "one machine"


def _share(kept: Sequence[bool]) -> Share:
    test = SequentialTest(0.5, sum(kept), len(kept))
    return Share(value=test.share, stderr=test.stderr, draws=test.draws)


def _known(values: Sequence[float]) -> Estimate:
    return estimate(np.array([x for x in values if not math.isnan(x)]))


def _per(usd: float | None, rates: Sequence[float], amount: float) -> Estimate:
    return _known([] if usd is None else [usd / SECONDS * amount / rate for rate in rates if rate > 0])


def _frontier(rows: Sequence[OptionRow], quoted: str) -> list[str]:
    """The options that no other beats in both cost and latency, the cheapest first."""
    known = [
        (row.usd_per_month, latency, row.name)
        for row in rows
        if row.usd_per_month is not None and (latency := row.metrics[quoted].value) is not None
    ]
    best, found = math.inf, list[str]()
    for _, latency, name in sorted(known):
        if latency < best:
            best = latency
            found.append(name)
    return found

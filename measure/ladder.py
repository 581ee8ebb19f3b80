"""Climb the users ladder on a live server and leave a run: the one module that knows the whole course of a measurement.

The load generator is a process of its own; here are the server's limits, the phases of each rung (`rung`), the files
(`journal`, `scrape`) and what a person sees (`screen`). Whatever ends it (Ctrl-C, SIGTERM, a dead server, a bug), what
was measured is kept and the run says where it stopped.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from measure import health, rung
from measure.client import Stopwatch
from measure.container import launched
from measure.endpoint import Endpoint
from measure.generator import Generator, GeneratorDied, free_port
from measure.journal import Journal, refuse_existing
from measure.orders import REPORT_SECONDS, Order, Setup, boot_id
from measure.probe import learn
from measure.prompts import Recipe
from measure.rung import Climb
from measure.scrape import Scraper
from measure.screen import Screen
from measure.watch import Watch, Window
from measure.witness import disagreements
from sim.errors import BadInput, UserError
from sim.pairs import read_pairs
from sim.run import read_run
from sim.scenario import Scenario
from sim.workload import Pairs

LEAD_SECONDS = 0.1  # orders reach the workers before they take effect
PATIENCE = 300.0
WARM_REQUESTS = 2
HOPELESS = 10  # failures in a row after which the server is asked whether it lives; more with more users
DRAIN_SECONDS = 60.0
WINDOW_SECONDS = 1.0  # between two looks at a window: they cost more the longer it is
SILENT_SECONDS = 30.0  # of the load generator, which reports four times a second
TERMINATED = 143
NO_PERMITS_KNOWN = 128  # where a default ladder ends on a server that does not say


class ServerGone(UserError):
    """The server stopped answering in the middle of the run; what was measured is kept."""


def measure(
    scenario: Scenario,
    url: str | None,
    out: Path,
    *,
    resume: bool = False,
    processes: int = 1,
    model: str | None = None,
    console: Console | None = None,
    seed: int = 0,
    patience: float = PATIENCE,
    budget: float | None = None,
    bind: str | None = None,
    remote: int = 0,
) -> Path:
    """Measure a scenario on the server at `url`, or on one started by docker, and return the run directory `out`.

    `resume` goes on at the first unfinished rung of the run in `out`. `processes` generate the load here; `remote`
    more workers are waited for at `bind` (HOST:PORT). `model` names the model where the server has several, or a folder
    with its `tokenizer.json`. `patience` is how long a request waits for its next token, `budget` how long the whole
    ladder may take, s. Progress goes to `console`.

    Raises `UserError` for what the user can mend, `KeyboardInterrupt` or `SystemExit(143)` when stopped; the run is
    closed first.
    """
    console = console or Console(stderr=True)
    if url is None and scenario.launch is None:
        raise BadInput("expected a server: give --url URL, or a launch: block in the scenario")
    if not resume:
        refuse_existing(out)
    host, port = ("127.0.0.1", free_port()) if bind is None else listening(bind)
    pairs = read_pairs(scenario.workload)
    with ExitStack() as stack:
        stack.enter_context(terminable())
        # before anything is written: a wrong URL, or a server that cannot take the profile, leaves no run
        found = None if url is None else attach(url, scenario, pairs, model, seed)
        journal = Journal.resume(out, scenario) if resume else Journal.begin(out, scenario, seed=seed)
        stack.callback(journal.close)
        seed = journal.head.get("seed", seed)
        if found is None:
            assert scenario.launch is not None
            try:
                running = stack.enter_context(launched(scenario.launch, scenario.server, out, console))
                journal.head["container"] = running.described
                found = attach(running.url, scenario, pairs, model, seed)
            except UserError as e:
                journal.head["stopped"] = f"the server did not start: {e}"
                journal.save()
                raise
        endpoint, server, recipe, doubts = found
        for sentence in doubts:
            journal.doubt(sentence)
            console.print(f"doubt: {sentence}", highlight=False, markup=False, soft_wrap=True)
        journal.head |= {"info": server.info, "api": server.api}
        journal.head["software"]["server"] = (server.info or {}).get("version")
        journal.save()
        setup = Setup(
            url=endpoint.url,
            api=server.api,
            out=str(out.resolve()),
            zero=journal.zero,
            boot=boot_id(),
            seed=seed,
            recipe=recipe,
            workload=scenario.workload,
            model=server.model,
            pairs=None if pairs is None else [column.tolist() for column in pairs[:3]],
            open_loop=scenario.load.users is None and (scenario.load.rate is not None or scenario.load.trace),
            patience=patience,
            think=scenario.load.think,
            retry=scenario.load.retry,
            first_id=journal.first_id,
            segment=journal.segment,
            workers=processes + remote,
            bind=host,
            port=port if processes + remote > 1 else 0,
        )
        ladder = Ladder(scenario, setup, journal, endpoint, server, pairs, Screen(console), budget)
        ladder.run(processes)
    return out


def listening(bind: str) -> tuple[str, int]:
    """HOST:PORT in its two parts."""
    host, _, port = bind.rpartition(":")
    if not host or not port.isdigit():
        raise BadInput(f"expected HOST:PORT, found {bind!r}", path="--bind")
    return host, int(port)


def attach(
    url: str, scenario: Scenario, pairs: Pairs | None, model: str | None, seed: int
) -> tuple[Endpoint, health.Server, Recipe, list[str]]:
    """The server at a URL, how to make prompts for it, and what is doubtful about it and the scenario."""
    endpoint = Endpoint(url)
    server = health.look(endpoint, model)
    doubts = health.check(server, scenario, pairs)
    recipe, unsure = learn(endpoint, server, scenario, pairs, model, seed)
    return endpoint, server, recipe, doubts + unsure


class Ladder:
    """A measurement under way."""

    def __init__(
        self,
        scenario: Scenario,
        setup: Setup,
        journal: Journal,
        endpoint: Endpoint,
        server: health.Server,
        pairs: Pairs | None,
        screen: Screen,
        budget: float | None,
    ):
        self.load, self.setup, self.journal, self.screen = scenario.load, setup, journal, screen
        self.endpoint, self.server, self.pairs, self.budget = endpoint, server, pairs, budget
        self.watch, self.time = Watch(), Stopwatch(setup.zero)
        self.window: Window | None = None  # of the rung being climbed, as of a second ago at most
        self.generator: Generator
        self.scraper: Scraper | None = None
        permits = (server.info or {}).get("max_concurrent_requests")
        self.permits = permits if isinstance(permits, int) else None
        self.listed = self.load.users is not None or setup.open_loop

    def loads(self) -> list[float]:
        """Users, or requests/s, of every rung; a trace is one."""
        if self.load.trace:
            if self.pairs is None or self.pairs.times is None:
                raise BadInput("expected a workload.trace with arrival times", key="load.trace")
            return [len(self.pairs.times) / max(float(self.pairs.times[-1]), 1e-9)]
        if self.load.rate is not None:
            return list(self.load.rate)
        return [float(n) for n in self.load.users or rung.default_users(self.permits or NO_PERMITS_KNOWN)]

    def longest(self, loads: list[float]) -> float:
        """The longest the ladder can take, s."""
        load, total, present = self.load, 0.0, 0.0
        for n in loads:
            window = load.seconds if load.seconds is not None else load.max_seconds
            if load.trace and self.pairs is not None and self.pairs.times is not None:
                total += float(self.pairs.times[-1]) + DRAIN_SECONDS
            elif self.setup.open_loop:
                total += load.settle + window
            else:
                total += (n - present) / load.spawn_rate + load.max_seconds + window
                present = n
        return min(total, self.budget or total)

    def run(self, processes: int) -> None:
        """Climb what is left to climb; closes the run whatever happens."""
        loads = self.loads()
        done = [r for r in self.journal.rungs if r["status"] != "aborted"]
        left = loads[len(done) :]
        if not left:
            self.screen.say("every rung of this run is finished already")
            return
        seconds = self.longest(left)
        what = "requests/s" if self.setup.open_loop else "users"
        most = f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
        self.screen.say(f"{what} {', '.join(f'{n:g}' for n in left)}: at most {most}")
        self.generator = Generator(self.setup, processes)
        stopped = "a bug or a full disk ended it"
        try:
            if self.server.metrics:
                self.scraper = Scraper(self.endpoint, self.journal.path / "server.jsonl", self.time.now)
            self._warm()
            with self.screen:
                stopped = self._climb(left)
        except KeyboardInterrupt:
            stopped = "interrupted"
            raise
        except SystemExit:
            stopped = "terminated"
            raise
        except UserError as e:
            stopped = str(e)
            raise
        finally:
            self._close(stopped)

    def _close(self, stopped: str) -> None:
        unfinished = any(r["status"] == "aborted" for r in self.journal.rungs)
        try:
            self.generator.stop()
        except RuntimeError as e:
            stopped = f"{stopped}; {e}"
        finally:
            self.generator.close()
            if self.scraper is not None:
                self.scraper.close()
            self.journal.head["stopped"] = stopped
            self.journal.save()
        if self.server.api == "tgi" and self.server.metrics:
            self._hear_witness()
        self.screen.say(f"stopped: {stopped}")
        if unfinished or stopped in ("interrupted", "terminated"):
            self.screen.say(f"all that was measured is in {self.journal.path}; --resume goes on from there")

    def _hear_witness(self) -> None:
        for number, doubts in disagreements(read_run(self.journal.path)).items():
            fresh = [doubt for doubt in doubts if doubt not in self.journal.rungs[number]["doubts"]]
            self.journal.rungs[number]["doubts"] += fresh
            for doubt in fresh:
                self.screen.say(f"  doubt at rung {number}: {doubt}")
        self.journal.save()

    def _warm(self) -> None:
        self.generator.ready()
        self.generator.order(Order(do="warm", requests=WARM_REQUESTS))
        self.screen.say("warming up")
        while True:
            for report in self.generator.reports(1.0):
                if report.said == "warmed":
                    if report.text:
                        raise UserError(f"a warm-up request failed: {report.text}")
                    return

    def _climb(self, left: list[float]) -> str:
        climbed: list[int] = []
        windows = []
        began = self.time.now()
        for n in left:
            if self.budget is not None and self.time.now() - began > self.budget:
                return f"the budget of {self.budget:g} s is spent"
            climb = self._rung(n)
            assert climb.settled is not None and climb.end is not None
            window = self.watch.window(climb.settled, climb.end)
            climb.doubts += rung.doubts(window, climb.users)
            self.journal.rungs[-1] = climb.record(window)
            self.journal.save()
            self.screen.done(climb.label, window, climb.status, climb.doubts)
            windows.append(window)
            if climb.users is not None:
                climbed.append(climb.users)
            if reason := rung.reason_to_stop(windows, climbed, self.permits, self.listed):
                return reason
        if self.load.trace:
            self._drain()
        return "the ladder is climbed"

    def _rung(self, n: float) -> Climb:
        index, start = len(self.journal.rungs), round(self.time.now() + LEAD_SECONDS, 6)
        users = None if self.setup.open_loop else int(n)
        times = None
        if self.load.trace and self.pairs is not None and self.pairs.times is not None:
            times = self.pairs.times.tolist()
        climb = Climb(self.load, start, users, None if users else n, None if times is None else times[-1])
        self.watch.forget(start)
        self.journal.rungs.append(climb.record())
        self.journal.save()
        self.generator.order(
            Order(
                do="rung",
                rung=index,
                start=start,
                users=users or 0,
                spawn_rate=self.load.spawn_rate,
                rate=None if users else n,
                arrivals=self.load.arrivals,
                times=times,
            )
        )
        try:
            while climb.phase != "done":
                self._listen(climb)
        except ServerGone:
            climb.doubts.append("the server stopped answering")
            self.journal.rungs[-1] = climb.record()
            raise
        return climb

    def _listen(self, climb: Climb) -> None:
        """Wait for the next reports, and let the rung decide what they mean."""
        before = climb.phase
        if self.time.now() - self.watch.t > SILENT_SECONDS and self.watch.t > 0.0:
            raise GeneratorDied(f"the load generator has not been heard of for {SILENT_SECONDS:g} s")
        for report in self.generator.reports(REPORT_SECONDS):
            self.watch.hear(report)
            self.journal.note(report)
            if report.said == "ramped" and climb.ramped is None and report.t >= climb.start:
                climb.ramped = report.t
        # what has not been reported yet has not been seen: the rung's clock is the reports'
        now = self.watch.t
        if climb.settled is None:
            self.window = None
        elif self.window is None or now - self.window.end >= WINDOW_SECONDS:
            self.window = self.watch.window(climb.settled, now)
        doing = climb.step(self.watch, now, self.window)
        if climb.phase != before and climb.phase in ("measure", "done") and self.scraper is not None:
            self.scraper.scrape()
        if climb.phase != "done":
            self.screen.now(climb.label, doing, self.window)
        if self.watch.failures >= max(HOPELESS, 2 * (climb.users or 0)) and not health.alive(self.endpoint):
            raise ServerGone(f"the server stopped answering at {now:.1f} s of the run ({self._last_error()})")

    def _last_error(self) -> str:
        return "; ".join(f"{status}: {text}" for status, text in self.watch.errors.items())

    def _drain(self) -> None:
        """A trace is over when its last answer is."""
        deadline = time.monotonic() + DRAIN_SECONDS
        while self.watch.alive() and time.monotonic() < deadline:
            for report in self.generator.reports(REPORT_SECONDS):
                self.watch.hear(report)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, by an exception: `SystemExit` with the status of a terminated process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    before: Any = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

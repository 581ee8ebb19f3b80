"""The way up: rung after rung, until there is a reason to stop, and whatever ends it, a run that is closed.

The load generator is a process of its own; here its reports are heard, each rung decides by them what to do (`rung`),
and what came of it goes to the files (`journal`, `scrape`) and to a person (`screen`).
"""

from __future__ import annotations

from measure.deadline import Deadline, in_words, wait_for
from measure.journal import Journal
from measure.ladder import rung
from measure.ladder.generator import LESS, READY_SECONDS, STOP_SECONDS, CannotWrite, Generator, GeneratorKilled
from measure.ladder.progress import Screen
from measure.ladder.rung import Climb
from measure.ladder.totals import Watch, Window
from measure.loadgen.client import Stopwatch
from measure.loadgen.messages import REPORT_SECONDS, Order, Setup
from measure.server import health
from measure.server.cross_check import disagreements
from measure.server.endpoint import Endpoint
from measure.server.scrape import Scraper
from sim.model.errors import UserError
from sim.model.files.lengths import arrivals
from sim.model.scenario import Scenario
from sim.model.warning import folded
from sim.model.workload import RequestLengths
from sim.run import read_run

LEAD_SECONDS = 0.1  # orders reach the workers before they take effect
WARM_REQUESTS = 2
WARM_SECONDS = 600.0  # for both of them: 70B on a machine without GPUs takes minutes for one
HOPELESS = 10  # failures in a row after which the server is asked whether it lives; more with more users
DRAIN_SECONDS = 60.0
WINDOW_SECONDS = 1.0  # between two looks at a window: they cost more the longer it is
SILENT_SECONDS = 30.0  # of the load generator, which reports four times a second
NO_PERMITS_KNOWN = 128  # where a default ladder ends on a server that does not say


class ServerGone(UserError):
    """The server stopped answering in the middle of the run; what was measured is kept."""


class Ascent:
    """A measurement under way."""

    def __init__(
        self,
        scenario: Scenario,
        setup: Setup,
        journal: Journal,
        endpoint: Endpoint,
        server: health.Server,
        lengths: RequestLengths | None,
        screen: Screen,
        budget: Deadline | None,
        timeout: float | None = None,
    ):
        self.load, self.setup, self.journal, self.screen = scenario.load, setup, journal, screen
        self.endpoint, self.server, self.lengths, self.budget = endpoint, server, lengths, budget
        self.timeout = WARM_SECONDS if timeout is None else timeout
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
            times = arrivals(self.setup.workload, self.lengths)
            return [len(times) / float(times[-1])]
        if self.load.rate is not None:
            return list(self.load.rate)
        return [float(n) for n in self.load.users or rung.default_users(self.permits or NO_PERMITS_KNOWN)]

    def longest(self, loads: list[float], settling: float | None = None) -> float:
        """The longest the ladder can take, s, if each rung's users settle within `settling` (their limit if absent)."""
        load, total, present = self.load, 0.0, 0.0
        for n in loads:
            window = load.seconds if load.seconds is not None else load.max_seconds
            if load.trace and self.lengths is not None and self.lengths.times is not None:
                total += float(self.lengths.times[-1]) + DRAIN_SECONDS
            elif self.setup.open_loop:
                total += load.settle + window
            else:
                limit = load.max_seconds if settling is None else settling
                total += (n - present) / load.spawn_rate + limit + window
                present = n
        return total if self.budget is None else min(total, self.budget.left())

    def run(self, processes: int) -> None:
        """Climb what is left to climb; closes the run whatever happens."""
        left = self._left()
        if not left:
            self.screen.say("every rung of this run is finished already")
            return
        names = ", ".join(f"{n:g}" for n in left)
        most = in_words(self.longest(left))
        if self.setup.open_loop:
            self.screen.say(f"requests/s {names}: at most {most}")
        else:
            self.screen.say(
                f"users {names}: at most {most}, {in_words(self.longest(left, 0.0))} if they settle at once"
            )
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
        except OSError as e:
            stopped = f"{e.filename}: {e.strerror}" if e.filename else str(e.strerror)
            raise
        finally:
            self._close(stopped)

    def _left(self) -> list[float]:
        """The loads that no rung has finished yet."""
        return self.loads()[sum(r["status"] != "aborted" for r in self.journal.rungs) :]

    def _close(self, stopped: str) -> None:
        unfinished = any(r["status"] == "aborted" for r in self.journal.rungs)
        try:
            self.screen.say(f"waiting for the load generator to stop (at most {in_words(STOP_SECONDS)})")
            self.generator.stop()
        except (GeneratorKilled, RuntimeError) as e:
            unfinished = True
            if str(e) != stopped:
                stopped = f"{stopped}; {e}"
        except CannotWrite:  # has been said already, or is of no matter any more
            unfinished = True
        finally:
            self.generator.close()
            if self.scraper is not None:
                self.scraper.close()
                for warning in self.scraper.warnings():
                    self.journal.warn(warning)
                    self.screen.say(f"warning: {warning}")
            self.journal.head["stopped"] = stopped
            unfinished |= not self._saved()
        if self.server.api == "tgi" and self.server.metrics:
            self._hear_witness()
        for line in folded(self._warnings(), f"{self.journal.path}/run.json has all"):
            self.screen.say(line)
        self.screen.say(f"stopped: {stopped}")
        if self._left() and (unfinished or stopped in ("interrupted", "terminated")):
            self.screen.say(f"all that was measured is in {self.journal.path}; --resume goes on from there")

    def _saved(self) -> bool:
        """Whether the head of the run could be written: on a full disk it stays as it was at the last rung's edge."""
        try:
            self.journal.save()
        except OSError as e:
            self.screen.say(f"{e.filename}: {e.strerror}")
            return False
        return True

    def _warnings(self) -> list[str]:
        """What the rungs give reason to distrust, each sentence with all the loads at which it holds."""
        loads: dict[str, list[str]] = {}
        for record in self.journal.rungs:
            load = f"{record['rate']:g} requests/s" if "rate" in record else f"{record['users']} users"
            for text in record["warnings"]:
                loads.setdefault(text, []).append(load)
        return [f"at {', '.join(at)}: {text}" for text, at in loads.items()]

    def _hear_witness(self) -> None:
        try:
            found = disagreements(read_run(self.journal.path))
        except UserError:  # nothing was recorded: what ended the run has more to say than its files
            return
        for number, warnings in found.items():
            fresh = [warning for warning in warnings if warning not in self.journal.rungs[number]["warnings"]]
            self.journal.rungs[number]["warnings"] += fresh
        self._saved()

    def _warm(self) -> None:
        workers = "the load generator" if self.setup.workers == 1 else f"{self.setup.workers} load generators"
        starting = wait_for(self.screen.say, READY_SECONDS, f"{workers} to start", self.budget)
        self.generator.ready(starting)
        what = f"{WARM_REQUESTS} warm-up requests at {self.endpoint.url}"
        deadline = wait_for(self.screen.say, self.timeout, what, self.budget)
        self.generator.order(Order(do="warm", requests=WARM_REQUESTS))
        while deadline.left():
            for report in self.generator.reports(min(1.0, deadline.left())):
                if report.said == "warmed":
                    if report.text:
                        raise UserError(f"a warm-up request failed: {report.text}")
                    return
        raise deadline.passed()

    def _climb(self, left: list[float]) -> str:
        climbed: list[int] = []
        windows = []
        end = float("inf") if self.budget is None else self.time.now() + self.budget.left()
        for n in left:
            climb = self._rung(n, end)
            if climb.settled is None or climb.end is None:
                self.journal.rungs[-1] = climb.record()
                return self._spent()
            window = self.watch.window(climb.settled, climb.end)
            climb.warnings += rung.warnings(window, climb.users, climb.rate)
            self.journal.rungs[-1] = climb.record(window)
            self.journal.save()
            self.screen.done(climb.label, window, climb.status, climb.warnings)
            windows.append(window)
            if climb.users is not None:
                climbed.append(climb.users)
            if self.time.now() >= end:
                return self._spent()
            if reason := rung.reason_to_stop(windows, climbed, self.permits, self.listed):
                return reason
        if self.load.trace:
            self._drain()
        return "the ladder is climbed"

    def _spent(self) -> str:
        assert self.budget is not None
        return f"the budget of {self.budget.seconds:g} s is spent"

    def _rung(self, n: float, end: float) -> Climb:
        """Climb one rung; without an end it did not get to its window before `end`."""
        index, start = len(self.journal.rungs), round(self.time.now() + LEAD_SECONDS, 6)
        users = None if self.setup.open_loop else int(n)
        times = None
        if self.load.trace and self.lengths is not None and self.lengths.times is not None:
            times = self.lengths.times.tolist()
        climb = Climb(self.load, start, users, None if users else n, None if times is None else times[-1])
        most = in_words(min(self.longest([n]), max(0.0, end - self.time.now())))
        self.screen.say(f"waiting for {climb.label} to be measured at {self.endpoint.url} (at most {most})")
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
            while climb.phase != "done" and self.time.now() < end:
                self._listen(climb)
            if climb.phase != "done":
                climb.cut(self.watch.t)
        except BaseException as e:
            if isinstance(e, ServerGone):
                climb.warnings.append("the server stopped answering")
            self.journal.rungs[-1] = climb.record()  # as far as it got
            raise
        return climb

    def _listen(self, climb: Climb) -> None:
        """Wait for the next reports, and let the rung decide what they mean."""
        before = climb.phase
        if self.time.now() - self.watch.t > SILENT_SECONDS and self.watch.t > 0.0:
            raise GeneratorKilled(
                f"the load generator has not been heard of for {SILENT_SECONDS:g} s, as when the machine is out of "
                f"memory or was stopped; {LESS}"
            )
        for report in self.generator.reports(REPORT_SECONDS):
            self.watch.hear(report)
            self.journal.note(report)
            if report.said == "ramped" and climb.ramped is None and report.t >= climb.start:
                climb.ramped = report.t
        # what has not been reported yet has not been seen: the rung's clock is the reports'
        now = self.watch.t
        if climb.settled is None or self.window is None or now - self.window.end >= WINDOW_SECONDS:
            self.window = climb.window(self.watch, now)
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
        if not self.watch.alive():
            return
        deadline = wait_for(self.screen.say, DRAIN_SECONDS, "the trace's last answers", self.budget)
        while self.watch.alive() and deadline.left():
            for report in self.generator.reports(REPORT_SECONDS):
                self.watch.hear(report)

"""Runs the ladder: rung after rung until there is a reason to stop; the run is closed however it ends.

The load generator is a separate process. Its reports are added up (`totals`), each rung decides by them (`rung`), and
results go to the files (`journal`, `scrape`) and to the terminal (`progress`).
"""

from __future__ import annotations

import msgspec

from measure.deadline import Deadline, in_words, wait_for
from measure.journal import Journal
from measure.ladder import rung
from measure.ladder.generator import READY_SECONDS, REDUCE_LOAD, STOP_SECONDS, CannotWrite, Generator, GeneratorKilled
from measure.ladder.progress import Progress
from measure.ladder.rung import Rung
from measure.ladder.totals import Totals, Window
from measure.loadgen.client import RunClock
from measure.loadgen.messages import REPORT_SECONDS, Command, Setup
from measure.server.cross_check import disagreements
from measure.server.detection import Server, is_alive
from measure.server.endpoint import Endpoint
from measure.server.limits import permits_of
from measure.server.scrape import Scraper
from sim.model.errors import UserError
from sim.model.files.lengths import arrivals
from sim.model.scenario import Scenario
from sim.model.warning import Notice, folded, notice
from sim.model.workload import RequestLengths
from sim.run import read_run

LEAD_SECONDS = 0.1  # commands reach the workers before they take effect
WARM_UP_REQUESTS = 2
WARM_UP_SECONDS = 600.0  # for both: a 70B model on a machine without GPUs takes minutes for one request
MAX_FAILURES = 10  # in a row (more with more users), after which /health is requested
DRAIN_SECONDS = 60.0
WINDOW_SECONDS = 1.0  # between updates of a window, whose cost grows with its length
SILENT_SECONDS = 30.0  # without a report of the load generator, which sends four a second
DEFAULT_MAX_USERS = 128  # of a default ladder, if the server does not tell its permits


class ServerGone(UserError):
    """The server stopped answering during the run; what was measured is kept."""


class LadderRun:
    """A measurement in progress."""

    def __init__(
        self,
        scenario: Scenario,
        setup: Setup,
        journal: Journal,
        endpoint: Endpoint,
        server: Server,
        lengths: RequestLengths | None,
        progress: Progress,
        budget: Deadline | None,
        timeout: float | None = None,
    ):
        self.load, self.setup, self.journal, self.progress = scenario.load, setup, journal, progress
        self.endpoint, self.server, self.lengths, self.budget = endpoint, server, lengths, budget
        self.timeout = WARM_UP_SECONDS if timeout is None else timeout
        self.totals, self.clock = Totals(), RunClock(setup.zero)
        self.window: Window | None = None  # of the current rung, at most a second old
        self.generator: Generator
        self.scraper: Scraper | None = None
        self.permits = permits_of(server, scenario)
        self.listed = self.load.users is not None or setup.open_loop

    def loads(self) -> list[float]:
        """Users, or requests/s, of every rung; a trace is one rung."""
        if self.load.trace:
            times = arrivals(self.setup.workload, self.lengths)
            return [len(times) / float(times[-1])]
        if self.load.rate is not None:
            return list(self.load.rate)
        return [float(n) for n in self.load.users or rung.default_users(self.permits or DEFAULT_MAX_USERS)]

    def max_duration(self, loads: list[float], settling: float | None = None) -> float:
        """The longest that the ladder can take, s, if each rung settles within `settling` s (default: its limit)."""
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
        """Run the remaining rungs; the run is closed whatever happens."""
        left = self._left()
        if not left:
            self.progress.say("every rung of this run is already finished")
            return
        names = ", ".join(f"{n:g}" for n in left)
        most = in_words(self.max_duration(left))
        if self.setup.open_loop:
            self.progress.say(f"requests/s {names}: at most {most}")
        else:
            self.progress.say(
                f"users {names}: at most {most}, {in_words(self.max_duration(left, 0.0))} if they settle at once"
            )
        self.generator = Generator(self.setup, processes)
        stopped = "an internal error"
        try:
            if self.server.metrics:
                self.scraper = Scraper(self.endpoint, self.journal.path / "server.jsonl", self.clock.now)
            self._warm_up()
            with self.progress:
                stopped = self._run_rungs(left)
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
        """The loads that have no finished rung yet."""
        return self.loads()[sum(r["status"] != "aborted" for r in self.journal.rungs) :]

    def _close(self, stopped: str) -> None:
        unfinished = any(r["status"] == "aborted" for r in self.journal.rungs)
        try:
            self.progress.say(f"waiting for the load generator to stop (at most {in_words(STOP_SECONDS)})")
            self.generator.stop()
        except (GeneratorKilled, RuntimeError) as e:
            unfinished = True
            if str(e) != stopped:
                stopped = f"{stopped}; {e}"
        except CannotWrite:  # reported before, or the run is over
            unfinished = True
        finally:
            self.generator.close()
            if self.scraper is not None:
                self.scraper.close()
                for warning in self.scraper.warnings():
                    self.journal.warn(warning)
                    self.progress.say(f"warning: {warning}")
            self.journal.head["stopped"] = stopped
            unfinished |= not self._saved()
        if self.server.metrics:
            self._cross_check()
        for line in folded(self._warnings(), f"{self.journal.path}/run.json has all"):
            self.progress.say(line)
        self.progress.say(f"stopped: {stopped}")
        if self._left() and (unfinished or stopped in ("interrupted", "terminated")):
            self.progress.say(f"everything measured is in {self.journal.path}; --resume continues the run")

    def _saved(self) -> bool:
        """Write `run.json`; False if that fails (full disk), and the file then keeps its last content."""
        try:
            self.journal.save()
        except OSError as e:
            self.progress.say(f"{e.filename}: {e.strerror}")
            return False
        return True

    def _warnings(self) -> list[Notice]:
        """The warnings of all rungs, each with the loads that it concerns."""
        loads: dict[Notice, list[str]] = {}
        for record in self.journal.rungs:
            load = f"{record['rate']:g} requests/s" if "rate" in record else f"{record['users']} users"
            for said in msgspec.convert(record["warnings"], list[Notice]):
                loads.setdefault(said, []).append(load)
        return [said.of(f"at {', '.join(at)}") for said, at in loads.items()]

    def _cross_check(self) -> None:
        try:
            found = disagreements(read_run(self.journal.path))
        except UserError:  # nothing was recorded; the reason is reported elsewhere
            return
        for number, warnings in found.items():
            known = self.journal.rungs[number]["warnings"]
            known += [said for said in msgspec.to_builtins(warnings) if said not in known]
        self._saved()

    def _warm_up(self) -> None:
        workers = "the load generator" if self.setup.workers == 1 else f"{self.setup.workers} load generators"
        starting = wait_for(self.progress.say, READY_SECONDS, f"{workers} to start", self.budget)
        self.generator.ready(starting)
        what = f"{WARM_UP_REQUESTS} warm-up requests at {self.endpoint.url}"
        deadline = wait_for(self.progress.say, self.timeout, what, self.budget)
        self.generator.send(Command(do="warm", requests=WARM_UP_REQUESTS))
        while deadline.left():
            for report in self.generator.receive(min(1.0, deadline.left())):
                if report.event == "warmed":
                    if report.text:
                        raise UserError(f"a warm-up request failed: {report.text}")
                    return
        raise deadline.passed()

    def _run_rungs(self, left: list[float]) -> str:
        measured: list[int] = []
        windows = []
        end = float("inf") if self.budget is None else self.clock.now() + self.budget.left()
        for n in left:
            current = self._run_rung(n, end)
            if current.settled is None or current.end is None:
                self.journal.rungs[-1] = current.record()
                return self._budget_spent()
            window = self.totals.window(current.settled, current.end)
            current.warnings += rung.window_warnings(window, current.users, current.rate)
            self.journal.rungs[-1] = current.record(window)
            self.journal.save()
            self.progress.finish(current.label, window, current.status, current.warnings)
            windows.append(window)
            if current.users is not None:
                measured.append(current.users)
            if self.clock.now() >= end:
                return self._budget_spent()
            if reason := rung.reason_to_stop(windows, measured, self.permits, self.listed):
                return reason
        if self.load.trace:
            self._drain()
        return "every rung was measured"

    def _budget_spent(self) -> str:
        assert self.budget is not None
        return f"the budget of {self.budget.seconds:g} s is spent"

    def _run_rung(self, n: float, end: float) -> Rung:
        """Run one rung; its `end` is None if its window did not begin before `end`."""
        index, start = len(self.journal.rungs), round(self.clock.now() + LEAD_SECONDS, 6)
        users = None if self.setup.open_loop else int(n)
        times = None
        if self.load.trace and self.lengths is not None and self.lengths.times is not None:
            times = self.lengths.times.tolist()
        current = Rung(self.load, start, users, None if users else n, None if times is None else times[-1])
        most = in_words(min(self.max_duration([n]), max(0.0, end - self.clock.now())))
        self.progress.say(f"waiting for {current.label} to be measured at {self.endpoint.url} (at most {most})")
        self.totals.forget(start)
        self.journal.rungs.append(current.record())
        self.journal.save()
        self.generator.send(
            Command(
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
            while current.phase != "done" and self.clock.now() < end:
                self._receive(current)
            if current.phase != "done":
                current.cut(self.totals.t)
        except BaseException as e:
            if isinstance(e, ServerGone):
                current.warnings.append(notice("server-stopped", "the server stopped answering"))
            self.journal.rungs[-1] = current.record()  # as far as it got
            raise
        return current

    def _receive(self, current: Rung) -> None:
        """Wait for reports and advance the rung."""
        before = current.phase
        if self.clock.now() - self.totals.t > SILENT_SECONDS and self.totals.t > 0.0:
            raise GeneratorKilled(
                f"the load generator has not reported for {SILENT_SECONDS:g} s: it was stopped, or memory ran "
                f"out; {REDUCE_LOAD}"
            )
        for report in self.generator.receive(REPORT_SECONDS):
            self.totals.add(report)
            self.journal.add(report)
            if report.event == "ramped" and current.ramped is None and report.t >= current.start:
                current.ramped = report.t
        # the rung's clock is that of the reports: what is not reported yet is not counted
        now = self.totals.t
        if current.settled is None or self.window is None or now - self.window.end >= WINDOW_SECONDS:
            self.window = current.window(self.totals, now)
        doing = current.step(self.totals, now, self.window)
        if current.phase != before and current.phase in ("measure", "done") and self.scraper is not None:
            self.scraper.scrape()
        if current.phase != "done":
            self.progress.update(current.label, doing, self.window)
        if self.totals.failures >= max(MAX_FAILURES, 2 * (current.users or 0)) and not is_alive(self.endpoint):
            raise ServerGone(
                notice(
                    "server-stopped", f"the server stopped answering at {now:.1f} s of the run ({self._last_error()})"
                )
            )

    def _last_error(self) -> str:
        return "; ".join(f"{status}: {text}" for status, text in self.totals.errors.items())

    def _drain(self) -> None:
        """Wait for the last answers of a trace."""
        if not self.totals.in_flight():
            return
        deadline = wait_for(self.progress.say, DRAIN_SECONDS, "the trace's last answers", self.budget)
        while self.totals.in_flight() and deadline.left():
            for report in self.generator.receive(REPORT_SECONDS):
                self.totals.add(report)

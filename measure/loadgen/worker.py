"""The users of one process: what they ask, the file their requests go to, and the reports about them.

Of locust it knows only the runner it is given, which carries its messages and stops its users.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.monkey
import gevent.pool
import gevent.socket
import msgspec
import numpy as np
import psutil

from measure.apis.dialect import DIALECTS
from measure.apis.tokens import Habit
from measure.loadgen.client import OK, Client, Record, Stopwatch
from measure.loadgen.messages import REPORT_SECONDS, Ended, Order, Report, Setup, boot_id
from measure.loadgen.prompts import generator
from measure.server.key import api_key
from sim.model.files.json_lines import Lines
from sim.model.workload import RequestLengths, RequestSpec, Sampler, Source, Trace, arrival_gaps

CANARY_SECONDS = 0.01


def tick(pipe: int, now: Callable[[], float]) -> None:
    """Write the time into a pipe every so often, for ever.

    From a thread, whose sleep is not rounded up to a millisecond as gevent's is; by a descriptor, as tokens come.
    """
    sleep = gevent.monkey.get_original("time", "sleep")
    due = now()
    while True:
        due = max(due, now() - CANARY_SECONDS) + CANARY_SECONDS
        sleep(max(0.0, due - now()))
        os.write(pipe, struct.pack("d", due))


class Worker:
    """The users of one process: their requests, the file these are written to, and the reports about them."""

    def __init__(self, runner: Any, setup: Setup, index: int, offset: int):
        self.runner, self.setup, self.index = runner, setup, index
        self.watch = Stopwatch(setup.zero + offset)
        self.token = api_key()
        self.rungs: list[Order] = []
        self.alive: dict[int, Record] = {}
        self.ended: list[Ended] = []
        self.tokens_ended = self.tokens_told = 0
        self.lags: list[float] = []
        self.count = self.users = 0
        self.since = 0.0
        self.idle: list[Client] = []
        self.habit = Habit()
        self.source, self.lengths = self._source()
        name = f"requests-{index}.jsonl" if index else "requests.jsonl"
        self.file = Lines(Path(setup.out) / name) if setup.boot == boot_id() else None
        self.ticks, pipe = os.pipe()
        gevent.monkey.get_original("_thread", "start_new_thread")(tick, (pipe, self.watch.now))
        self.process = psutil.Process()
        self.process.cpu_percent()

    def _source(self) -> tuple[Source, RequestLengths | None]:
        s = self.setup
        rng = np.random.default_rng([s.seed, 1, s.segment, self.index])
        if s.lengths is None:
            return Sampler(s.workload, rng), None
        prompt, output, new = (np.asarray(column, dtype=np.int64) for column in s.lengths)
        lengths = RequestLengths(prompt, output, new)
        if s.workload.trace is None:
            return Sampler(s.workload, rng, lengths), lengths
        mine = slice(self.index, None, s.workers)
        return Trace(RequestLengths(prompt[mine], output[mine], new[mine])), lengths

    def client(self) -> Client:
        """A new connection to the server."""
        s = self.setup
        return Client(
            s.url,
            DIALECTS[s.api](s.model, s.extras),
            self.watch.now,
            patience=s.patience,
            token=self.token,
            habit=self.habit,
        )

    def ask(self, client: Client, user: int, scheduled: float | None = None, asked: RequestSpec | None = None) -> bool:
        """One request from beginning to end, written down whatever happens to it; whether it went well."""
        if asked is None:
            asked = self.source.next(user)
        number = self.setup.first_id + self.count * self.setup.workers + self.index
        self.count += 1
        prompt = self.setup.recipe.prompt(asked.prompt_tokens, generator(self.setup.seed, number))
        record = Record(number, self.rung, user, 0.0, self.watch.now(), asked.prompt_tokens, asked.max_new_tokens)
        self.alive[number] = record
        try:
            client.ask(record, prompt)
        finally:  # locust stops users by killing their greenlets
            record.ended = record.ended or self.watch.now()
            record.scheduled = record.sent if scheduled is None else scheduled
            record.rung = self.rung_at(record.scheduled)
            del self.alive[number]
            self._keep(record)
        return record.status == OK

    def _keep(self, record: Record) -> None:
        line = msgspec.json.encode(record)
        if self.file is not None:
            try:
                self.file.write(line)
            except OSError as e:  # a full disk: nothing more can be kept, so nothing more is measured
                self.report("unwritable", f"{e.filename}: {e.strerror}")
                return
        else:  # another machine's disk is not the ladder's
            self.runner.send_message("record", line.decode())
        times, carried = record.token_times, record.event_tokens
        self.tokens_ended += record.output_tokens
        first, last = (times[0], times[-1]) if times else (None, record.ended if record.status == OK else None)
        self.ended.append(
            Ended(
                record.user,
                record.rung,
                record.scheduled,
                record.sent,
                record.ended,
                first,
                last,
                record.output_tokens,
                record.status,
                record.error,
                record.max_new_tokens,
                record.prompt_tokens,
                record.counted_prompt,
                len(times) if carried is msgspec.UNSET else len(carried),
                record.spread is True,
                record.finish_reason,
            )
        )

    @property
    def rung(self) -> int:
        """The rung that is being climbed."""
        return self.rungs[-1].rung if self.rungs else -1

    def rung_at(self, time: float) -> int:
        """The rung in which a request of this instant began; orders come a little before they take effect."""
        return next((order.rung for order in reversed(self.rungs) if time >= order.start), self.rung)

    def warm(self, requests: int) -> None:
        """A few requests of the profile's own size that no file hears of."""
        client = self.client()
        errors = []
        for i in range(requests):
            asked = self.source.next(0)
            prompt = self.setup.recipe.prompt(asked.prompt_tokens, generator(self.setup.seed, 2**40 + i))
            record = Record(-1, -1, -1, 0.0, 0.0, asked.prompt_tokens, asked.max_new_tokens)
            client.ask(record, prompt)
            if record.status != OK:
                errors.append(f"{record.status}: {record.error}")
        client.close()
        # one that fails now and then is measured, and its failures are counted
        self.report("warmed", errors[0] if len(errors) == requests else "")

    def arrivals(self, order: Order) -> Iterator[tuple[int, float]]:
        """This worker's share of an open-loop rung: (number, due), every one of them known before it is due.

        All workers draw the same schedule and take every `workers`-th of it.
        """
        if order.times is not None:
            for number in range(self.index, len(order.times), self.setup.workers):
                yield number, order.start + order.times[number]
            return
        assert order.rate is not None
        rng = np.random.default_rng([self.setup.seed, 2, self.setup.segment, order.rung])
        number, due = 0, order.start
        while True:
            for gap in arrival_gaps(order.arrivals, order.rate, rng, 1024).tolist():
                due += gap
                if number % self.setup.workers == self.index:
                    yield number, due
                number += 1

    def converse(self) -> None:
        """Closed loop: ask, read the whole answer, think, ask again."""
        user = self.users * self.setup.workers + self.index
        self.users += 1
        client = self.client()
        try:
            while True:
                went_well = self.ask(client, user)
                gevent.sleep(self.setup.think if went_well else self.setup.retry)
        finally:
            client.close()

    def dispatch(self) -> None:
        """Open loop: send what is due, rung after rung, whether or not the server keeps up."""
        crowd = gevent.pool.Group()
        try:
            self._dispatch(crowd)
        finally:
            crowd.kill()

    def _dispatch(self, crowd: gevent.pool.Group) -> None:
        done = 0
        while True:
            while done == len(self.rungs):
                gevent.sleep(0.005)
            order = self.rungs[done]
            done += 1
            for number, due in self.arrivals(order):
                if not self._due(due, done):
                    break
                crowd.spawn(self._visit, number, due)

    def _due(self, due: float, done: int) -> bool:
        """Wait for a request's time; False if the next rung begins before it."""
        while True:
            if done < len(self.rungs) and due >= self.rungs[done].start:
                return False
            wait = due - self.watch.now()
            if wait <= 0.0:
                return True
            # gevent rounds sleeps up to a millisecond: the last one is passed by looking again and again
            gevent.sleep(min(wait, 0.05) - 0.001 if wait > 0.002 else 0.0)

    def _visit(self, number: int, due: float) -> None:
        client = self.idle.pop() if self.idle else self.client()
        asked = None
        if self.lengths is not None and self.setup.workload.trace is not None:
            at = number % len(self.lengths.prompt_tokens)
            asked = RequestSpec(*(int(column[at]) for column in self.lengths[:3]))
        self.ask(client, -1, due, asked)
        self.idle.append(client)

    def report(self, said: str = "", text: str = "") -> None:
        """Tell the driver what has happened since the last report."""
        now = self.watch.now()
        tokens = self.tokens_ended + sum(len(record.token_times) for record in self.alive.values())
        report = Report(
            worker=self.index,
            t=now,
            said=said,
            text=text,
            since=self.since,
            tokens=tokens - self.tokens_told,
            ended=self.ended,
            alive=[(record.user, record.sent) for record in self.alive.values()],
            lags=self.lags,
            cpu=self.process.cpu_percent() / 100,
        )
        self.since, self.tokens_told, self.ended, self.lags = now, tokens, [], []
        self.runner.send_message("report", msgspec.json.encode(report).decode())

    def keep_reporting(self) -> None:
        """Report a few times a second."""
        while True:
            gevent.sleep(REPORT_SECONDS)
            self.report()

    def canary(self) -> None:
        """How late this process hears of something: a busy machine delays every token by as much."""
        while True:
            gevent.socket.wait_read(self.ticks)
            now = self.watch.now()
            dues = os.read(self.ticks, 4096)
            self.lags += [max(0.0, round(now - due, 6)) for (due,) in struct.iter_unpack("d", dues)]

    def obey(self, order: Order) -> None:
        """Do what the ladder says."""
        if order.do == "rung":
            self.rungs.append(order)
        elif order.do == "warm" and self.index == 0:
            gevent.spawn(self.warm, order.requests)
        elif order.do == "stop":
            self.runner.stop()
            self.report("bye")

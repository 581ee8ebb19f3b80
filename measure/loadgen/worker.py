"""The users of one load generator process: they send requests, record them and report progress.

locust is only seen through the runner passed in, which carries messages and stops users.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import gevent
import gevent.monkey
import gevent.pool
import gevent.socket
import msgspec
import numpy as np
import psutil

from measure.apis import APIS
from measure.apis.tokens import EventProfile
from measure.loadgen.client import Client, Record, RunClock
from measure.loadgen.messages import REPORT_SECONDS, Command, FinishedRequest, Report, Setup, boot_id
from measure.loadgen.prompts import generator
from measure.server.key import api_key
from sim.model.files.json_lines import Lines
from sim.model.status import Status
from sim.model.workload import RequestLengths, RequestSpec, Sampler, Source, Trace, arrival_gaps
from sim.randomness import ARRIVALS, arrivals_at

CANARY_SECONDS = 0.01


def write_ticks(pipe: int, now: Callable[[], float]) -> None:
    """Write the due time into a pipe every `CANARY_SECONDS`, for ever.

    Runs in a thread, because gevent rounds sleeps up to a millisecond; uses a descriptor, because tokens arrive by one.
    """
    sleep = gevent.monkey.get_original("time", "sleep")
    due = now()
    while True:
        due = max(due, now() - CANARY_SECONDS) + CANARY_SECONDS
        sleep(max(0.0, due - now()))
        os.write(pipe, struct.pack("d", due))


class Worker:
    """One load generator process: its users, its file of records, and the contents of its next report."""

    def __init__(self, runner: Any, setup: Setup, index: int, offset: int):
        self.runner, self.setup, self.index = runner, setup, index
        self.clock = RunClock(setup.zero + offset)
        self.api_key = api_key()
        self.rungs: list[Command] = []
        self.in_flight: dict[int, Record] = {}
        self.finished: list[FinishedRequest] = []
        self.tokens_finished = self.tokens_reported = 0
        self.lags: list[float] = []
        self.count = self.users = 0
        self.since = 0.0
        self.idle: list[Client] = []
        self.profile = EventProfile()
        self.seed = setup.seed, 1, setup.segment
        self.source, self.lengths = self._source()
        name = f"requests-{index}.jsonl" if index else "requests.jsonl"
        self.file = Lines(Path(setup.out) / name) if setup.boot == boot_id() else None
        self.ticks, pipe = os.pipe()
        gevent.monkey.get_original("_thread", "start_new_thread")(write_ticks, (pipe, self.clock.now))
        self.process = psutil.Process()
        self.process.cpu_percent()

    def _source(self) -> tuple[Source, RequestLengths | None]:
        s = self.setup
        if s.lengths is None:
            return Sampler(s.workload, self.seed), None
        prompt, output, new = (np.asarray(column, dtype=np.int64) for column in s.lengths)
        lengths = RequestLengths(prompt, output, new)
        if s.workload.trace is None:
            return Sampler(s.workload, self.seed, lengths), lengths
        mine = slice(self.index, None, s.workers)
        return Trace(RequestLengths(prompt[mine], output[mine], new[mine])), lengths

    def client(self) -> Client:
        """A new connection to the server."""
        s = self.setup
        return Client(
            s.url,
            APIS[s.api](s.model, s.extras),
            self.clock.now,
            patience=s.patience,
            token=self.api_key,
            profile=self.profile,
        )

    def send(self, client: Client, user: int, spec: RequestSpec, scheduled: float | None = None) -> bool:
        """Send one request and record it, however it ends; returns whether it succeeded."""
        number = self.setup.first_id + self.count * self.setup.workers + self.index
        self.count += 1
        prompt = self.setup.recipe.prompt(spec.prompt_tokens, generator(self.setup.seed, number))
        record = Record(number, self.rung, user, 0.0, self.clock.now(), spec.prompt_tokens, spec.max_new_tokens)
        self.in_flight[number] = record
        try:
            client.send(record, prompt)
        finally:  # locust stops users by killing their greenlets
            record.ended = record.ended or self.clock.now()
            record.scheduled = record.sent if scheduled is None else scheduled
            record.rung = self.rung_at(record.scheduled)
            del self.in_flight[number]
            self._write(record)
        return record.status == Status.OK

    def _write(self, record: Record) -> None:
        line = msgspec.json.encode(record)
        if self.file is not None:
            try:
                self.file.write(line)
            except OSError as e:  # a full disk ends the measurement
                self.report("unwritable", f"{e.filename}: {e.strerror}")
                return
        else:  # on another machine
            self.runner.send_message("record", line.decode())
        times, carried = record.token_times, record.event_tokens
        self.tokens_finished += record.output_tokens
        first, last = (times[0], times[-1]) if times else (None, record.ended if record.status == Status.OK else None)
        self.finished.append(
            FinishedRequest(
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
        """The current rung; -1 before the first."""
        return self.rungs[-1].rung if self.rungs else -1

    def rung_at(self, time: float) -> int:
        """The rung of a request sent at `time`; commands arrive shortly before they take effect."""
        return next((command.rung for command in reversed(self.rungs) if time >= command.start), self.rung)

    def warm_up(self, requests: int) -> None:
        """Send a few requests of the workload's size that are not recorded."""
        client = self.client()
        errors = []
        for i, spec in enumerate(islice(self.source.requests(ARRIVALS), requests)):
            prompt = self.setup.recipe.prompt(spec.prompt_tokens, generator(self.setup.seed, 2**40 + i))
            record = Record(-1, -1, -1, 0.0, 0.0, spec.prompt_tokens, spec.max_new_tokens)
            client.send(record, prompt)
            if record.status != Status.OK:
                errors.append(f"{record.status}: {record.error}")
        client.close()
        # a server that fails sometimes is measured, and its failures are counted
        self.report("warmed", errors[0] if len(errors) == requests else "")

    def arrivals(self, command: Command) -> Iterator[tuple[float, RequestSpec]]:
        """This worker's share of an open-loop rung: when each request is due, and its lengths.

        All workers draw the same schedule and take every `workers`-th request of it.
        """
        owner = ARRIVALS
        if command.times is not None:
            due: Iterator[float] = (command.start + time for time in command.times)
        else:
            assert command.rate is not None
            before = sum(other.rate == command.rate and other.rung < command.rung for other in self.rungs)
            owner, gaps = (
                arrivals_at(command.rate, before),
                arrival_gaps(command.arrivals, command.rate, self.seed, before),
            )
            due = islice(accumulate(gaps, initial=command.start), 1, None)
        whole = self.lengths if self.setup.workload.trace is not None else None
        source = self.source if whole is None else Trace(whole)
        return islice(zip(due, source.requests(owner), strict=False), self.index, None, self.setup.workers)

    def run_user(self) -> None:
        """Closed loop: send a request, read the answer, wait the think time, repeat."""
        user = self.users * self.setup.workers + self.index
        self.users += 1
        client = self.client()
        try:
            for spec in self.source.requests(user):
                succeeded = self.send(client, user, spec)
                gevent.sleep(self.setup.think if succeeded else self.setup.retry)
        finally:
            client.close()

    def run_open_loop(self) -> None:
        """Open loop: send each request when it is due, rung after rung, whether or not the server keeps up."""
        group = gevent.pool.Group()
        try:
            self._dispatch(group)
        finally:
            group.kill()

    def _dispatch(self, group: gevent.pool.Group) -> None:
        done = 0
        while True:
            while done == len(self.rungs):
                gevent.sleep(0.005)
            command = self.rungs[done]
            done += 1
            for due, spec in self.arrivals(command):
                if not self._wait_until(due, done):
                    break
                group.spawn(self._send_scheduled, due, spec)

    def _wait_until(self, due: float, done: int) -> bool:
        """Wait until a request is due; False if the next rung begins before."""
        while True:
            if done < len(self.rungs) and due >= self.rungs[done].start:
                return False
            wait = due - self.clock.now()
            if wait <= 0.0:
                return True
            # gevent rounds sleeps up to a millisecond: poll during the last one
            gevent.sleep(min(wait, 0.05) - 0.001 if wait > 0.002 else 0.0)

    def _send_scheduled(self, due: float, spec: RequestSpec) -> None:
        client = self.idle.pop() if self.idle else self.client()
        self.send(client, -1, spec, due)
        self.idle.append(client)

    def report(self, event: str = "", text: str = "") -> None:
        """Send what happened since the last report to the driver."""
        now = self.clock.now()
        tokens = self.tokens_finished + sum(len(record.token_times) for record in self.in_flight.values())
        report = Report(
            worker=self.index,
            t=now,
            event=event,
            text=text,
            since=self.since,
            tokens=tokens - self.tokens_reported,
            finished=self.finished,
            in_flight=[(record.user, record.sent) for record in self.in_flight.values()],
            lags=self.lags,
            cpu=self.process.cpu_percent() / 100,
        )
        self.since, self.tokens_reported, self.finished, self.lags = now, tokens, [], []
        self.runner.send_message("report", msgspec.json.encode(report).decode())

    def keep_reporting(self) -> None:
        """Report a few times a second."""
        while True:
            gevent.sleep(REPORT_SECONDS)
            self.report()

    def canary(self) -> None:
        """Record how late this process is woken: on a busy machine every token is late by as much."""
        while True:
            gevent.socket.wait_read(self.ticks)
            now = self.clock.now()
            dues = os.read(self.ticks, 4096)
            self.lags += [max(0.0, round(now - due, 6)) for (due,) in struct.iter_unpack("d", dues)]

    def execute(self, command: Command) -> None:
        """Execute a command of the ladder."""
        if command.do == "rung":
            self.rungs.append(command)
        elif command.do == "warm" and self.index == 0:
            gevent.spawn(self.warm_up, command.requests)
        elif command.do == "stop":
            self.runner.stop()
            self.report("stopped")

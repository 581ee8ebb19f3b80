"""The load generator: a process of its own, because importing locust patches the standard library.

Locust manages the users: it spawns them at the spawn rate, distributes them over workers and stops them. Requests and
records are ours (`worker`, `client`); locust's statistics are not used. Started by `ladder.generator`:

    python -m measure.loadgen.locustfile                   the driver: locust's local or master runner
    python -m measure.loadgen.locustfile worker HOST:PORT  a worker, here or on another machine

The driver is controlled through stdin and ends within a second after it is closed, however the ladder's process died;
so does a worker started with `--tied`. Workers on other machines end with their master.
"""

from __future__ import annotations

import locust  # first: it patches socket, ssl and threading

# isort: split
import logging
import os
import resource
import sys
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import gevent
import gevent.event
import gevent.fileobject
import msgspec
from locust.env import Environment
from locust.runners import MasterRunner

from measure.loadgen.client import RunClock, freeze_heap
from measure.loadgen.messages import Command, Report, Setup, boot_id
from measure.loadgen.worker import Worker
from sim.model.files.json_lines import Lines


class LoadUser(locust.User):
    """What locust spawns: a closed-loop user, or the one greenlet that runs a worker's open loop."""

    wait_time = locust.constant(0)
    worker: Worker

    @locust.task
    def call(self) -> None:
        """Send requests until stopped."""
        if self.worker.setup.open_loop:
            self.worker.run_open_loop()
        else:
            self.worker.run_user()


def start_worker(runner: Any, setup: Setup, index: int, offset: int = 0) -> Worker:
    """Create this process's worker and start its canary and its reports."""
    worker = Worker(runner, setup, index, offset)
    LoadUser.worker = worker
    freeze_heap()
    user_error: Any = runner.environment.events.user_error  # locust's events are not typed
    user_error.add_listener(
        lambda user_instance, exception, tb, **_: worker.report("error", f"{type(exception).__name__}: {exception}")
    )
    gevent.spawn(worker.canary)
    gevent.spawn(worker.keep_reporting)
    worker.report("ready")
    return worker


def drive() -> None:
    """The driver: forwards the ladder's commands to the workers, and their reports to the ladder."""
    reports = os.dup(1)  # stdout carries reports only; what a library prints goes to the log
    os.dup2(2, 1)
    lines = gevent.fileobject.FileObjectPosix(os.dup(0), "rb")
    setup = msgspec.json.decode(lines.readline(), type=Setup)
    environment = Environment(user_classes=[LoadUser])
    alone = setup.port == 0
    runner: Any = (
        environment.create_local_runner() if alone else environment.create_master_runner(setup.bind, setup.port)
    )
    joined: list[str] = []
    remote: list[Lines] = []

    def send(text: str) -> None:
        os.write(reports, text.encode() + b"\n")

    def hello(msg: Any, **_: Any) -> None:
        joined.append(msg.node_id)
        answer = {"index": len(joined) - 1, "setup": msgspec.json.encode(setup).decode()}
        runner.send_message("setup", answer, client_id=msg.node_id)

    def clock(msg: Any, **_: Any) -> None:
        runner.send_message("clock", [msg.data, perf_counter_ns()], client_id=msg.node_id)

    def record(msg: Any, **_: Any) -> None:
        if not remote:
            remote.append(Lines(Path(setup.out) / "requests-remote.jsonl"))
        remote[0].write(msg.data.encode())

    runner.register_message("report", lambda msg, **_: send(msg.data))
    runner.register_message("record", record)
    runner.register_message("hello", hello)
    runner.register_message("clock", clock)
    if alone:
        worker = start_worker(runner, setup, 0)
        runner.register_message("command", lambda msg, **_: worker.execute(msgspec.json.decode(msg.data, type=Command)))
    run_clock = RunClock(setup.zero)
    spawning_complete: Any = environment.events.spawning_complete
    spawning_complete.add_listener(
        lambda user_count, **_: send(msgspec.json.encode(Report(worker=-1, t=run_clock.now(), event="ramped")).decode())
    )
    for line in lines:
        command = msgspec.json.decode(line, type=Command)
        runner.send_message("command", line.decode())
        if command.do == "rung":
            users, rate = (setup.workers, 100.0) if setup.open_loop else (command.users, command.spawn_rate)
            gevent.spawn_later(max(0.0, command.start - run_clock.now()), runner.start, users, rate)
    leave(runner)


def work(address: str, tied: bool) -> None:
    """A worker: joins the master at `address`, receives the setup, measures its clock offset and executes commands."""
    host, _, port = address.rpartition(":")
    environment = Environment(user_classes=[LoadUser])
    runner: Any = environment.create_worker_runner(host, int(port))
    offsets: list[tuple[int, int]] = []  # (round trip, master's clock - ours), ns
    received = gevent.event.AsyncResult()

    def clock(msg: Any, **_: Any) -> None:
        sent, master = msg.data
        now = perf_counter_ns()
        offsets.append((now - sent, master - (sent + now) // 2))

    def begin(msg: Any, **_: Any) -> None:
        received.set(msg.data)

    runner.register_message("clock", clock)
    runner.register_message("setup", begin)
    workers: list[Worker] = []

    def execute(msg: Any, **_: Any) -> None:
        workers[0].execute(msgspec.json.decode(msg.data, type=Command))

    runner.register_message("command", execute, concurrent=True)
    runner.send_message("hello", boot_id())
    answer = received.get()
    setup = msgspec.json.decode(answer["setup"], type=Setup)
    offset = 0
    if setup.boot != boot_id():
        for _ in range(20):
            runner.send_message("clock", perf_counter_ns())
            gevent.sleep(0.05)
        offset = -min(offsets)[1]
    workers.append(start_worker(runner, setup, answer["index"], offset))
    if tied:
        gevent.fileobject.FileObjectPosix(os.dup(0), "rb").read()
    else:
        runner.greenlet.join()
    leave(runner)


def leave(runner: Any) -> None:
    """Exit: stop the users, so that their requests are recorded, and wait for nothing else."""
    with gevent.Timeout(0.7, False):
        if isinstance(runner, MasterRunner):
            runner.send_message("quit")  # for workers on other machines, which have no pipe to us
            gevent.sleep(0.1)
        else:
            runner.stop()
    os._exit(0)


def main(arguments: list[str]) -> None:
    """See the module's docstring."""
    logging.basicConfig(level=logging.WARNING)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a connection per user
    if not arguments:
        drive()
    elif arguments[0] == "worker" and len(arguments) in (2, 3):
        work(arguments[1], "--tied" in arguments)
    else:
        raise SystemExit("usage: python -m measure.loadgen.locustfile [worker HOST:PORT]")


if __name__ == "__main__":
    main(sys.argv[1:])

"""The load generator's processes: started, sent commands, read for reports, ended."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

import msgspec

from measure.deadline import Deadline
from measure.loadgen.messages import Command, Report, Setup
from sim.model.errors import UserError

READY_SECONDS, STOPPED_SECONDS, EXIT_SECONDS = 30.0, 5.0, 2.0
STOP_SECONDS = STOPPED_SECONDS + EXIT_SECONDS


class CannotWrite(UserError):
    """Records can no longer be written, usually because the disk is full. Those already written are kept."""


class GeneratorDied(RuntimeError):
    """The load generator exited, or did not start: a bug of ours."""


class GeneratorKilled(UserError):
    """The load generator was killed, ran out of memory or hangs. Records already written are kept."""


REDUCE_LOAD = "try fewer users or fewer --processes"


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


class Generator:
    """The driver and its workers. Each exits when its stdin is closed, and so when this process dies.

    With one worker the driver is the worker; with more it is locust's master, and `processes` of the `setup.workers`
    are started here.
    """

    def __init__(self, setup: Setup, processes: int = 1):
        self._log = (Path(setup.out) / "client.log").open("ab")
        self._reports: queue.SimpleQueue[Report | None] = queue.SimpleQueue()
        self._processes: list[subprocess.Popen[bytes]] = []
        self.workers = setup.workers
        driver = self._start([], stdout=subprocess.PIPE)
        self._send(msgspec.json.encode(setup))
        if setup.workers > 1:
            for _ in range(processes):
                self._start(["worker", f"127.0.0.1:{setup.port}", "--tied"], stdout=self._log)
        self._listener = threading.Thread(target=self._listen, args=(driver,), daemon=True)
        self._listener.start()

    def _start(self, arguments: list[str], stdout: int | IO[bytes]) -> subprocess.Popen[bytes]:
        # a session of its own: Ctrl-C in the terminal must reach only the ladder, which then stops the users
        process: subprocess.Popen[bytes] = subprocess.Popen(
            [sys.executable, "-m", "measure.loadgen.locustfile", *arguments],
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=self._log,
            start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        self._processes.append(process)
        return process

    def _listen(self, driver: subprocess.Popen[bytes]) -> None:
        assert driver.stdout is not None
        decoder = msgspec.json.Decoder(Report)
        with driver.stdout:
            for line in driver.stdout:
                self._reports.put(decoder.decode(line))
        self._reports.put(None)

    def _send(self, line: bytes) -> None:
        pipe = self._processes[0].stdin
        assert pipe is not None
        try:
            pipe.write(line + b"\n")
            pipe.flush()
        except BrokenPipeError:
            raise self._died() from None

    def _died(self) -> GeneratorDied | GeneratorKilled:
        with suppress(subprocess.TimeoutExpired):
            self._processes[0].wait(EXIT_SECONDS)  # pipes are closed shortly before the exit status is known
        self._log.flush()
        tail = Path(self._log.name).read_text(errors="replace").strip().splitlines()[-3:]
        if (killed := self._killed()) is not None:
            return killed
        if tail and tail[-1].startswith("MemoryError"):
            return GeneratorKilled(f"the load generator ran out of memory; {REDUCE_LOAD}")
        return GeneratorDied("the load generator died: " + (" | ".join(tail) or "no output"))

    def _killed(self) -> GeneratorKilled | None:
        """The error if a signal ended one of the processes, usually the kernel's when memory is short."""
        for process in self._processes:
            code = process.poll()
            if code is None or code >= 0:
                continue
            if code == -signal.SIGKILL:
                return GeneratorKilled(
                    f"the load generator was killed (SIGKILL), probably because memory ran out; {REDUCE_LOAD}"
                )
            return GeneratorKilled(f"the load generator was ended by signal {-code} ({signal.strsignal(-code)})")
        return None

    def send(self, command: Command) -> None:
        """Send a command to all workers."""
        self._send(msgspec.json.encode(command))

    def receive(self, seconds: float) -> list[Report]:
        """The reports that have arrived; waits up to `seconds` for the first.

        Raises `GeneratorKilled` (also if only one of several workers was killed), `GeneratorDied` or `CannotWrite`.
        """
        if (killed := self._killed()) is not None:  # the driver does not exit with its workers
            raise killed
        found: list[Report] = []
        try:
            while True:
                report = self._reports.get(timeout=max(0.0, seconds)) if not found else self._reports.get_nowait()
                if report is None:
                    raise self._died()
                if report.event == "unwritable":
                    raise CannotWrite(report.text)
                if report.event == "error" and report.text.startswith("MemoryError"):
                    raise GeneratorKilled(f"the load generator ran out of memory; {REDUCE_LOAD}")
                if report.event == "error":
                    raise GeneratorDied(report.text)
                found.append(report)
        except queue.Empty:
            return found

    def ready(self, deadline: Deadline | None = None) -> None:
        """Wait until every worker has joined, including those on other machines; `OutOfTime` if they do not."""
        deadline = deadline or Deadline(READY_SECONDS, "the load generator to start")
        missing = self.workers
        while missing and deadline.left():
            missing -= sum(report.event == "ready" for report in self.receive(min(1.0, deadline.left())))
        if missing:
            raise deadline.passed(f"{missing} of {self.workers} workers did not join")

    def stop(self) -> list[Report]:
        """Stop all users, so that requests in flight are recorded; returns the last reports."""
        found: list[Report] = []
        self.send(Command(do="stop"))
        missing, deadline = self.workers, time.monotonic() + STOPPED_SECONDS
        while missing and time.monotonic() < deadline:
            reports = self.receive(0.2)
            missing -= sum(report.event == "stopped" for report in reports)
            found += reports
        return found

    def close(self) -> None:
        """End every process."""
        for process in self._processes:
            if process.stdin is not None:
                with suppress(BrokenPipeError):
                    process.stdin.close()
        for process in self._processes:
            try:
                process.wait(EXIT_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._listener.join()
        self._log.close()

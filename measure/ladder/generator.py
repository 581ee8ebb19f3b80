"""The load generator seen from the ladder: its processes, the orders they get, the reports they give."""

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
from measure.loadgen.messages import Order, Report, Setup
from sim.model.errors import UserError

READY_SECONDS, BYE_SECONDS, END_SECONDS = 30.0, 5.0, 2.0
STOP_SECONDS = BYE_SECONDS + END_SECONDS


class CannotWrite(UserError):
    """The answers can no longer be written down: a full disk, as a rule. Those on record are kept."""


class GeneratorDied(RuntimeError):
    """The load generator ended by itself, or never began: a bug of ours."""


class GeneratorKilled(UserError):
    """The load generator was killed, ran out of memory or does not run any more; those answers on record are kept."""


LESS = "try fewer users or fewer --processes"


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


class Generator:
    """The driver and its workers; each ends by itself when the pipe to its stdin is closed, so when we die.

    With one worker the driver does the work itself; with more it is locust's master, and `processes` of the
    `setup.workers` are started here.
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
        # a session of its own: the terminal's Ctrl-C is for the ladder, which stops the users in good order
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
            self._processes[0].wait(END_SECONDS)  # its pipes close a moment before it has an exit status
        self._log.flush()
        tail = Path(self._log.name).read_text(errors="replace").strip().splitlines()[-3:]
        if (killed := self._killed()) is not None:
            return killed
        if tail and tail[-1].startswith("MemoryError"):
            return GeneratorKilled(f"the load generator ran out of memory; {LESS}")
        return GeneratorDied("the load generator died: " + (" | ".join(tail) or "it said nothing"))

    def _killed(self) -> GeneratorKilled | None:
        """Whether a signal ended one of the processes: the kernel's, as a rule, where memory is short."""
        for process in self._processes:
            code = process.poll()
            if code is None or code >= 0:
                continue
            if code == -signal.SIGKILL:
                return GeneratorKilled(
                    f"the load generator was killed (SIGKILL), as it is when the machine runs out of memory; {LESS}"
                )
            return GeneratorKilled(f"the load generator was ended by signal {-code} ({signal.strsignal(-code)})")
        return None

    def order(self, order: Order) -> None:
        """Tell all workers."""
        self._send(msgspec.json.encode(order))

    def reports(self, seconds: float) -> list[Report]:
        """What has been reported, waiting up to `seconds` for the first of it.

        Raises `GeneratorKilled`, also when one of several workers was, `GeneratorDied` and `CannotWrite`.
        """
        if (killed := self._killed()) is not None:  # a driver does not end with its workers
            raise killed
        found: list[Report] = []
        try:
            while True:
                report = self._reports.get(timeout=max(0.0, seconds)) if not found else self._reports.get_nowait()
                if report is None:
                    raise self._died()
                if report.said == "unwritable":
                    raise CannotWrite(report.text)
                if report.said == "error" and report.text.startswith("MemoryError"):
                    raise GeneratorKilled(f"the load generator ran out of memory; {LESS}")
                if report.said == "error":
                    raise GeneratorDied(report.text)
                found.append(report)
        except queue.Empty:
            return found

    def ready(self, deadline: Deadline | None = None) -> None:
        """Wait until every worker is there, those of other machines included; `OutOfTime` if they do not come."""
        deadline = deadline or Deadline(READY_SECONDS, "the load generator to start")
        missing = self.workers
        while missing and deadline.left():
            missing -= sum(report.said == "ready" for report in self.reports(min(1.0, deadline.left())))
        if missing:
            raise deadline.passed(f"{missing} of {self.workers} workers did not come")

    def stop(self) -> list[Report]:
        """Stop all users, so that what they were at is on record; returns the last reports."""
        found: list[Report] = []
        self.order(Order(do="stop"))
        missing, deadline = self.workers, time.monotonic() + BYE_SECONDS
        while missing and time.monotonic() < deadline:
            got = self.reports(0.2)
            missing -= sum(report.said == "bye" for report in got)
            found += got
        return found

    def close(self) -> None:
        """Let every process end, and see that it has."""
        for process in self._processes:
            if process.stdin is not None:
                with suppress(BrokenPipeError):
                    process.stdin.close()
        for process in self._processes:
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._listener.join()
        self._log.close()

"""A server started by the command in a scenario file, on this machine and without docker, and ended after the run.

A supervisor process starts the command in a session of its own and ends all of it when its standard input closes, which
happens however the measurement ends.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from measure.deadline import wait_for
from measure.server.endpoint import Endpoint
from measure.server.launch import (
    LOG_BYTES,
    LOG_LINES,
    START_SECONDS,
    CannotStart,
    Running,
    check_environment,
    command_line,
    logged_flags,
    wait_until_healthy,
)
from sim.model.scenario import Launch, Scenario
from sim.model.text import escaped
from sim.terminal.console import Console

END_SECONDS = 20.0  # for the server to end by itself before it is killed


@contextmanager
def launched(
    launch: Launch,
    scenario: Scenario,
    out: Path,
    console: Console,
    port: int,
    seconds: float = START_SECONDS,
) -> Iterator[Running]:
    """Show the command, run it, wait until the server is healthy at `port`, and end it at the end.

    What it writes is kept as `out/server.log`. Raises `CannotStart` for a program that is not there, or a server that
    does not become healthy.
    """
    check_environment(launch)
    program = shutil.which(launch.command[0])
    if program is None:
        raise CannotStart(f"launch.command: no program {launch.command[0]} is found here")
    argv = command_line(launch, scenario, port)
    console.print(escaped(f"starting: {shlex.join(argv)}"), highlight=False, markup=False, soft_wrap=True)
    file = out / "server.log"
    with file.open("wb") as log:
        began = time.perf_counter()
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "measure.server.process", program, *argv[1:]],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the measurement, which ends the server in order
        )
    try:
        endpoint = Endpoint(f"http://127.0.0.1:{port}")
        deadline = wait_for(
            lambda line: console.print(line, highlight=False, markup=False),
            seconds,
            f"the started server to be healthy at {endpoint.url}",
        )

        def last_line() -> str:
            text = escaped(file.read_bytes().decode("utf-8", "replace")).rstrip()
            tail = text.split("\n")[-LOG_LINES:]
            console.print("\n".join(tail), highlight=False, markup=False, soft_wrap=True)
            return tail[-1] or "no output"

        wait_until_healthy(endpoint, deadline, lambda: supervisor.poll() is not None, last_line)
        with file.open("rb") as written:
            text = written.read(LOG_BYTES).decode("utf-8", "replace")
        described = {"argv": argv, "env": launch.env, "logged": logged_flags(type(scenario.server), text)}
        yield Running(endpoint.url, began, described)
    finally:
        assert supervisor.stdin is not None
        with suppress(BrokenPipeError):
            supervisor.stdin.close()
        supervisor.wait(END_SECONDS + 10.0)


def supervise(argv: list[str]) -> int:
    """Run a command in a session of its own until it ends, or until standard input does; returns its exit status."""
    server = subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True)

    def end() -> None:
        while os.read(0, 1):  # not through `sys.stdin`, whose lock a thread must not hold when the interpreter ends
            pass
        _signal(server.pid, signal.SIGTERM)
        time.sleep(END_SECONDS)
        _signal(server.pid, signal.SIGKILL)

    threading.Thread(target=end, daemon=True).start()
    try:
        return server.wait()
    finally:
        _signal(server.pid, signal.SIGKILL)  # what it started and left


def _signal(group: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[1:]))

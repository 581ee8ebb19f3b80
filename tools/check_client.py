"""Does a late client shift the step times that are fitted to what it saw? The thresholds of `measure.ladder.rung` rest
on this.

    python tools/check_client.py [--seconds N] [--gap MS]

A stand-in is measured while the load generator is kept from its core: by busy processes pinned to it, or by stopping it
for a while again and again, which is what a virtual machine suffers from its host. Each run is calibrated twice, with
the token times that the client saw and with those of the stand-in's own log, everything else being equal. Printed are
the canary's lag at p99 and by how much the two fits differ, with the standard error of a fit: in the time of a decode
step at the batches measured, and of a prefill. Exit status 1 if either is shifted by more than 1 % and three standard
errors in a run below `CANARY_LIMITED`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import psutil
from numpy.typing import NDArray
from rich.console import Console

from calibrate.sources.streamed import calibrate_runs
from measure.ladder.rung import CANARY_LIMITED
from measure.ladder.session import measure
from sim.engines.tgi_0_9_4 import Flags
from sim.model.calibration import Calibration, Parameter, Source
from sim.model.scenario import Load, Scenario
from sim.model.workload import Lengths, Workload
from sim.run import Run, read_run
from sim.steptime.linear import step_time

USERS = [1, 2, 4]
PROMPT, OUTPUT = 300, 60
SHIFT = 0.01  # of the fitted step times (docs/measuring.md)
SPIN = "while True: pass"


def main() -> int:
    """Print a line per disturbance."""
    parser = argparse.ArgumentParser(description="Does a late client shift the step times that are fitted?")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each of the three rungs")
    parser.add_argument("--gap", type=float, default=21.0, help="between the tokens of a stream, ms")
    asked = parser.parse_args()
    disturbances: list[tuple[str, Callable[[int], object]]] = [("nothing", lambda pid: None)]
    disturbances += [(f"{n} busy neighbours", busy(n)) for n in (1, 2, 4, 8)]
    disturbances += [(f"stopped {ms} ms, twice a second", stopping(ms / 1000)) for ms in (5, 10, 20, 30, 60, 120)]
    print(f"gaps of {asked.gap:g} ms; load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"{'the client is kept by':<32}{'canary p99, ms':>15}{'decode step':>22}{'prefill':>22}")
    failed = False
    for name, disturb in disturbances:
        with tempfile.TemporaryDirectory() as place:
            lag, decode, prefill = shift(Path(place), asked.gap / 1000, asked.seconds, disturb)
        if lag <= 1000 * CANARY_LIMITED:
            failed |= any(abs(by) > max(SHIFT, 3 * error) for by, error in (decode, prefill))
        cells = [f"{by:+.2%} ± {error:.2%}" for by, error in (decode, prefill)]
        print(f"{name:<32}{lag:15.1f}{cells[0]:>22}{cells[1]:>22}", flush=True)
    return int(failed)


def shift(
    place: Path, gap: float, seconds: float, disturb: Callable[[int], object]
) -> tuple[float, tuple[float, float], tuple[float, float]]:
    """The canary's lag at p99, ms; the relative shift of decode steps and of prefills, each with its standard error."""
    with standin(place, gap) as (process, url):
        cores = sorted(os.sched_getaffinity(0))
        process.cpu_affinity(
            cores[-1:]
        )  # the client's core is its own, and whoever disturbs it leaves the server alone
        scenario = Scenario(
            server=Flags(),
            name="client",
            workload=Workload(prompt_tokens=Lengths(uniform=(PROMPT // 2, 3 * PROMPT // 2)), output_tokens=OUTPUT),
            load=Load(users=USERS, spawn_rate=20, seconds=seconds),
        )
        over = threading.Event()
        watcher = threading.Thread(target=_watch, args=(disturb, cores[:1], over))
        watcher.start()
        try:
            with Path(os.devnull).open("w") as null:
                measure(scenario, url, place / "run", console=Console(file=null))
        finally:
            over.set()
            watcher.join()
    run = read_run(place / "run")
    run = replace(run, rungs=[replace(g, extra={}) for g in run.rungs])  # lags are not to decide what is used
    seen, true = (calibrate_runs([each]) for each in (run, as_sent(run, place)))
    lags = [rung["canary_p99_ms"] for rung in json.loads((place / "run" / "run.json").read_text())["rungs"]]
    both = [times(c, c.values) for c in (seen, true)]
    draws = [dict(zip(true.draws, row, strict=True)) for row in zip(*true.draws.values(), strict=True)]
    error = np.std([times(true, true.values | draw) for draw in draws], axis=0) / both[1]
    by = both[0] / both[1] - 1
    return float(np.max(lags)), (float(by[0]), float(error[0])), (float(by[1]), float(error[1]))


def times(calibration: Calibration, values: dict[str, float]) -> NDArray[np.float64]:
    """Seconds of a decode step, on average over the batches measured, and of a prefill."""
    steps = step_time(calibration.model, values)
    decode = [steps.decode(n, n * (PROMPT + OUTPUT // 2), PROMPT + OUTPUT)[0] for n in USERS]
    return np.array([np.mean(decode), steps.prefill(1, PROMPT, PROMPT**2, PROMPT)])


def as_sent(run: Run, place: Path) -> Run:
    """The run with the stand-in's own times in place of those that the client saw."""
    zero = json.loads((place / "run" / "run.json").read_text())["anchor"]["perf_counter_ns"] / 1e9
    sent = {str(row["id"]): np.array(row["sent"]) - zero for row in map(json.loads, (place / "tokens.jsonl").open())}
    found: list[NDArray[np.float64]] = []
    for number, seen in zip(run.requests["id"], run.token_times or [], strict=True):
        told = sent.get(str(number), seen)[: len(seen)]
        found.append(told if len(told) == len(seen) else seen)
    return replace(run, token_times=found)


@contextmanager
def standin(place: Path, gap: float) -> Iterator[tuple[psutil.Process, str]]:
    """A stand-in whose decode step takes `gap` s, with its log in `place`."""
    values = {
        "a0": 0.5 * gap,
        "a1": 1.3e-5 * gap / 0.021,
        "b0": gap,
        "b1": 0.005 * gap,
        "max_batch_total_tokens": 20000.0,
    }
    parameters = {name: Parameter(value=v, stderr=0.0, low=v, high=v) for name, v in values.items()}
    file = place / "calibration.json"
    file.write_bytes(
        msgspec.json.encode(Calibration(source=Source(kind="assumed"), model="affine", parameters=parameters))
    )
    words = [
        sys.executable,
        "-m",
        "measure.standin.server",
        "--port",
        "0",
        "--log",
        str(place),
        "--calibration",
        str(file),
    ]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield psutil.Process(process.pid), process.stdout.readline().strip()
        finally:
            process.terminate()


def _watch(disturb: Callable[[int], object], core: list[int], over: threading.Event) -> None:
    """Find the load generator, give it a core, and disturb it until the measurement is over."""
    while not over.wait(0.1):
        for child in psutil.Process().children():
            with suppress(psutil.Error):
                if "measure.loadgen.locustfile" in child.cmdline():
                    child.cpu_affinity(core)
                    _disturbed(disturb, child.pid, over)
                    return


def _disturbed(disturb: Callable[[int], object], pid: int, over: threading.Event) -> None:
    found = disturb(pid)
    if callable(found):  # again and again
        while not over.is_set():
            found()
        return
    over.wait()
    for process in found if isinstance(found, list) else []:
        process.kill()
        process.wait()


def busy(number: int) -> Callable[[int], object]:
    """`number` processes that never rest, on the core of the load generator."""

    def disturb(pid: int) -> object:
        found = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(number)]
        for process in found:
            psutil.Process(process.pid).cpu_affinity(psutil.Process(pid).cpu_affinity())
        return found

    return disturb


def stopping(seconds: float) -> Callable[[int], object]:
    """Stop the load generator for `seconds`, at random about twice a second."""
    rng = np.random.default_rng(1)

    def disturb(pid: int) -> object:
        def once() -> None:
            with suppress(ProcessLookupError):
                time.sleep(float(rng.uniform(0.25, 0.75)))
                os.kill(pid, signal.SIGSTOP)
                try:
                    time.sleep(seconds)
                finally:
                    os.kill(pid, signal.SIGCONT)

        return once

    return disturb


if __name__ == "__main__":
    sys.exit(main())

"""How well `measure` measures: its error against the stand-in's own log, and the tokens/s one process bears.

    python tools/bench_measure.py [SECONDS] [--first]

On a machine that others use, waiting for a core is most of every error; `--first` goes before them all (root only).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from time import perf_counter_ns

import numpy as np
from rich.console import Console

from measure.ladder.generator import Generator
from measure.ladder.session import measure
from measure.loadgen.messages import Command, Setup, boot_id
from measure.loadgen.prompts import WORDS, Recipe
from sim.engines.tgi_0_9_4 import Flags
from sim.model.scenario import Load, Scenario
from sim.model.workload import Workload

USERS = (8, 64)
STREAMS, EVENTS = 64, 1000
RATES = (10_000, 20_000, 30_000, 40_000)  # tokens/s
EVENT = b'data:{"token":{"id":1,"text":" w1","logprob":-0.5,"special":false},"generated_text":null,"details":null}\n\n'
LAST = EVENT.replace(b'"details":null', b'"details":{"finish_reason":"length","generated_tokens":1000,"seed":null}')
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def ms(values: np.ndarray) -> str:
    """Median and 99 % quantile, in ms."""
    return f"{1000 * np.quantile(values, 0.5):6.2f} {1000 * np.quantile(values, 0.99):6.2f}"


def errors(seconds: float, folder: Path) -> None:
    """Against the stand-in, whose log says when it sent each token."""
    log, out = folder / "log", folder / "run"
    standin = subprocess.Popen(
        [sys.executable, "-m", "measure.standin.server", "--port", "0", "--log", str(log)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert standin.stdout is not None
    url = standin.stdout.readline().strip()
    # prompts short enough for 64 users to fit into the token budget side by side
    work = Workload(prompt_tokens=300, output_tokens=100)
    scenario = Scenario(
        server=Flags(), name="bench", workload=work, load=Load(users=list(USERS), spawn_rate=20, seconds=seconds)
    )
    with Path(os.devnull).open("w") as null:
        measure(scenario, url, out, console=Console(file=null))
    standin.terminate()
    standin.wait()
    head = json.loads((out / "run.json").read_text())
    zero = head["anchor"]["perf_counter_ns"] / 1e9
    sent = {str(t["id"]): np.array(t["sent"]) - zero for t in map(json.loads, (log / "tokens.jsonl").open())}
    steps = list(map(json.loads, (log / "steps.jsonl").open()))
    print("ms (p50 p99)      TTFT error     ITL error   stand-in's pace   canary p99   tokens/s")
    for rung in head["rungs"]:
        low, high = rung["settled"], rung["end"]
        first, gaps, tokens = [], [], 0
        for record in map(json.loads, (out / "requests.jsonl").open()):
            tokens += sum(low <= t < high for t in record["token_times"])
            if record["status"] != "ok" or not low <= record["sent"] < high:
                continue
            seen, truth = np.array(record["token_times"]), sent[str(record["id"])]
            first.append(seen[0] - truth[0])
            gaps.append(np.abs(np.diff(seen) - np.diff(truth)))
        pace = np.array([s["sent"] - s["end"] for s in steps if low <= s["end"] - zero < high])
        print(
            f"{rung['users']:3d} users      {ms(np.array(first))}   {ms(np.concatenate(gaps))}     {ms(pace)}"
            f"       {rung['canary_p99_ms']:6.2f}     {tokens / (high - low):8.0f}"
        )


def blast(listener: socket.socket, rate: float) -> None:
    """Be a server that makes a token for every stream each step, `rate` tokens/s in all, each in a send of its own."""
    chunk = b"%x\r\n%s\r\n" % (len(EVENT), EVENT)
    last = b"%x\r\n%s\r\n0\r\n\r\n" % (len(LAST), LAST)
    streams = {listener.accept()[0]: 0 for _ in range(STREAMS)}
    due = time.perf_counter()
    while True:
        for stream, left in streams.items():
            if left == 0:
                stream.recv(1 << 16)
                stream.sendall(HEAD)
            stream.sendall(last if left == 1 else chunk)
            streams[stream] = (left or EVENTS) - 1
        due = max(due + STREAMS / rate, time.perf_counter() - 0.1)
        while (wait := due - time.perf_counter()) > 0:
            time.sleep(wait)


def capacity(rate: float, seconds: float, folder: Path) -> None:
    """What one process of the load generator reads of `rate` tokens/s, and at what price."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = os.fork()
    if server == 0:
        with suppress(OSError):
            blast(listener, rate)
        os._exit(0)
    setup = Setup(
        url=f"http://127.0.0.1:{listener.getsockname()[1]}",
        api="tgi",
        out=str(folder),
        zero=perf_counter_ns(),
        boot=boot_id(),
        seed=0,
        recipe=Recipe(words=WORDS),
        workload=Workload(prompt_tokens=50, output_tokens=EVENTS),
    )
    generator = Generator(setup)
    generator.ready()
    generator.send(Command(do="rung", start=(perf_counter_ns() - setup.zero) / 1e9, users=STREAMS, spawn_rate=100))
    end = time.monotonic() + 1.0 + seconds
    reports = []
    while time.monotonic() < end:
        reports += [r for r in generator.receive(0.2) if r.worker == 0 and time.monotonic() > end - seconds]
    generator.stop()
    generator.close()
    os.kill(server, 9)
    os.waitpid(server, 0)
    listener.close()
    got = sum(r.tokens for r in reports) / (reports[-1].t - reports[0].since)
    cpu = sum(r.cpu for r in reports) / len(reports)
    lags = np.array([lag for r in reports for lag in r.lags])
    print(f"{rate:7.0f} tokens/s sent: {got:7.0f} read at {cpu:4.0%} of a core, canary {ms(lags)} ms")


if __name__ == "__main__":
    options = [word for word in sys.argv[1:] if word != "--first"]
    length = float(options[0]) if options else 10.0
    if "--first" in sys.argv:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(20))
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as place:
        errors(length, Path(place))
        print(f"\none process of the load generator, {STREAMS} streams, a send per token:")
        for rate in RATES:
            capacity(rate, min(length, 3.0), Path(place))

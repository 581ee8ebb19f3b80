"""The ladder climbed on the stand-in over real HTTP."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from ladders import climb, head, lines, scenario, wait_for_requests
from rich.console import Console
from servers import Standin, standin
from warned import texts

from measure.deadline import Deadline
from measure.ladder.generator import free_port
from measure.ladder.session import measure
from measure.server.endpoint import Answer, Endpoint
from sim.engines.tgi_0_9_4 import Flags
from sim.model.scenario import Load, Scenario
from sim.model.workload import Columns, Lengths, RequestFile, Workload, arrival_gaps
from sim.run import read_run


def test_a_ladder_is_a_run_that_agrees_with_the_server(
    server: tuple[Standin, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVECAST_API_KEY", "s3cret-token")
    standin_process, log = server
    asked: list[tuple[float, str]] = []
    get = Endpoint.get

    def noted(endpoint: Endpoint, path: str, *deadline: Deadline) -> Answer:
        asked.append((time.perf_counter(), path))
        return get(endpoint, path, *deadline)

    monkeypatch.setattr(Endpoint, "get", noted)
    run, said = climb(scenario(), standin_process.url, tmp_path / "run")
    assert run.kind == "measured"
    assert [(r.users, r.status) for r in run.rungs] == [(1, "complete"), (3, "complete")]
    for rung in run.rungs:
        assert rung.start <= rung.ramped <= rung.settled < rung.end
        assert rung.seconds == pytest.approx(1.0)
        assert rung.extra["in_flight"] == pytest.approx(rung.users, rel=0.4)
        assert {"canary_p99_ms", "client_cpu", "client_limited", "errors"} <= set(rung.extra)
    requests = run.requests
    assert run.info is not None and run.info["max_batch_total_tokens"] == 20000
    assert run.stopped == "every rung was measured"
    assert {"ok"} <= set(requests["status"]) <= {"ok", "aborted"}
    assert set(requests["user"]) == {0, 1, 2}
    assert requests["id"].is_unique
    assert (requests["scheduled"] == requests["sent"]).all()
    assert set(requests["rung"]) == {0, 1}
    for row in requests.itertuples():  # a request belongs to the rung in which it began
        assert (row.sent >= run.rungs[1].start) == (row.rung == 1)
    # one request a user at a time, and users are added, not restarted
    for _, mine in requests.sort_values("sent").groupby("user"):
        assert (mine["sent"].to_numpy()[1:] >= mine["ended"].to_numpy()[:-1]).all()
    assert (requests[requests["user"] == 0]["rung"] == 1).any()
    # the server's own log: the same requests (and no warm-up), the same number of tokens, each sent before it was seen
    sent = {str(t["id"]): t["sent"] for t in lines(log / "tokens.jsonl")}
    zero = head(tmp_path / "run")["anchor"]["perf_counter_ns"] / 1e9
    assert run.token_times is not None
    for row, seen in zip(requests.itertuples(), run.token_times, strict=True):
        if row.status == "ok":
            server_says = np.array(sent[str(row.id)]) - zero
            assert len(seen) == len(server_says) == row.output_tokens == 20
            assert (seen >= server_says - 1e-5).all()
    # /health may run a prefill outside the queue: it is left alone while anything is measured
    during = {path for t, path in asked if run.rungs[0].start <= t - zero < run.rungs[-1].end}
    assert during == {"/metrics"}
    # the server's metrics were recorded, secrets are nowhere, and a person saw a line per rung
    assert len(lines(tmp_path / "run" / "server.jsonl")) >= 4
    assert lines(tmp_path / "run" / "client.jsonl")
    assert not any(b"s3cret" in path.read_bytes() for path in (tmp_path / "run").iterdir())
    assert "users 1, 3: at most" in said and "1 user: complete" in said and "3 users: complete" in said


def test_two_processes_share_the_users_and_write_one_run(server: tuple[Standin, Path], tmp_path: Path) -> None:
    run, _ = climb(scenario(users=[4]), server[0].url, tmp_path / "run", processes=2)
    assert [(r.users, r.status) for r in run.rungs] == [(4, "complete")]
    assert {p.name for p in (tmp_path / "run").glob("requests*")} == {"requests.jsonl", "requests-1.jsonl"}
    assert set(run.requests["user"]) == {0, 1, 2, 3}
    assert run.requests["id"].is_unique
    assert run.rungs[0].extra["in_flight"] == pytest.approx(4, rel=0.4)


REMOTE = """
import sys, time
from pathlib import Path
ours = time.perf_counter_ns
time.perf_counter_ns = lambda: ours() + 10**12  # a machine that was started at another time
import measure.loadgen.messages
measure.loadgen.messages.BOOT_ID = Path("/none")  # another machine, as far as it can tell
from measure.loadgen.locustfile import main
main(["worker", sys.argv[1]])
"""


def test_a_worker_of_another_machine_joins_and_ends_with_the_ladder(
    server: tuple[Standin, Path], tmp_path: Path
) -> None:
    address = f"127.0.0.1:{free_port()}"
    with subprocess.Popen([sys.executable, "-c", REMOTE, address], stderr=subprocess.DEVNULL) as remote:
        run, _ = climb(scenario(users=[4]), server[0].url, tmp_path / "run", bind=address, remote=1)
        remote.wait(10)
    names = {p.name for p in (tmp_path / "run").glob("requests*")}
    assert "requests-remote.jsonl" in names and len(names) == 2
    assert set(run.requests["user"]) == {0, 1, 2, 3}
    assert run.requests["id"].is_unique
    ok = run.requests[run.requests["status"] == "ok"]
    # the two clocks agree, to within the time that a rung of a second takes
    here, there = ok.groupby(ok["user"] % 2)["sent"].median()
    assert abs(here - there) < 10
    assert ok.groupby(ok["user"] % 2)["sent"].count().min() > 5


def test_a_client_that_was_kept_from_its_core_says_so(server: tuple[Standin, Path], tmp_path: Path) -> None:
    class Disturbing(Console):
        """Stops the load generator for a moment, a few times, once the users are warm."""

        def print(self, *objects: Any, **more: Any) -> None:
            if "warm-up" in str(objects[0]):
                threading.Thread(target=self.disturb, daemon=True).start()

        def disturb(self) -> None:
            wait_for_requests(tmp_path / "run", 3)
            mine = psutil.Process().children(recursive=True)
            (generator,) = (p for p in mine if "measure.loadgen.locustfile" in p.cmdline())
            for _ in range(8):
                generator.suspend()
                time.sleep(0.1)
                generator.resume()
                time.sleep(0.1)

    with Path(os.devnull).open("w") as null:
        measure(scenario(users=[1], seconds=2.5), server[0].url, tmp_path / "run", console=Disturbing(file=null))
    (rung,) = read_run(tmp_path / "run").rungs
    assert rung.extra["client_limited"] and rung.extra["canary_p99_ms"] > 20
    assert any("client-limited" in warning for warning in texts(rung.warnings))


def test_importing_measure_patches_nothing() -> None:
    program = (
        "import sys, socket, pkgutil, importlib, measure\n"
        "before = socket.socket\n"
        "for m in pkgutil.iter_modules(measure.__path__):\n"
        "    if m.name != 'locustfile': importlib.import_module('measure.' + m.name)\n"
        "assert 'locust' not in sys.modules and socket.socket is before\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_open_loop_sends_what_was_scheduled_whether_or_not_the_server_keeps_up(
    calibration: Path, tmp_path: Path
) -> None:
    load = {"users": None, "rate": [20.0, 40.0], "seconds": 1.0, "settle": 0.5}
    silent = ("--fault", "stall=1", "--fault", "after=3")  # after the probe and the warm-up nobody is answered
    with standin("--calibration", str(calibration), *silent) as process:
        run, _ = climb(scenario(**load), process.url, tmp_path / "run")
    assert [rung.rate for rung in run.rungs] == [20.0, 40.0]
    first = run.rungs[0]
    due = first.start + np.cumsum(list(islice(arrival_gaps("poisson", 20.0, (0, 1, 0)), 100)))
    due = due[due < first.end - 0.1]
    scheduled = np.sort(run.requests["scheduled"].to_numpy())[: len(due)]
    assert np.allclose(scheduled, due, atol=2e-6)  # every one of them, at its time, answered or not
    assert (run.requests["sent"] >= run.requests["scheduled"]).all()
    assert (run.requests["user"] == -1).all()
    assert set(run.requests["status"]) == {"aborted"}
    assert any("no request was completed" in warning for warning in texts(first.warnings))


def test_a_trace_is_sent_in_order_at_its_times(server: tuple[Standin, Path], tmp_path: Path) -> None:
    file = tmp_path / "trace.log"
    rows = [(0, 10, 3), (600, 20, 5), (600, 30, 2), (1800, 40, 4)]
    file.write_text("".join(json.dumps({"at": t, "in": p, "out": o}) + "\n" for t, p, o in rows))
    columns = Columns(time="at", prompt_tokens="in", output_tokens="out")
    trace = RequestFile(file=str(file), columns=columns, time_unit="ms", compress=2)
    s = Scenario(server=Flags(), name="trace", workload=Workload(trace=trace), load=Load(trace=True, settle=0.1))
    run, _ = climb(s, server[0].url, tmp_path / "run")
    got = run.requests.sort_values(["scheduled", "id"])
    assert got["prompt_tokens"].tolist() == [10, 20, 30, 40]
    assert got["output_tokens"].tolist() == [3, 5, 2, 4]
    assert np.allclose(got["scheduled"] - run.rungs[0].start, [0.0, 0.3, 0.3, 0.9], atol=1e-5)
    assert set(got["status"]) == {"ok"}  # the last answer was waited for


def test_a_ladder_that_is_not_listed_goes_as_far_as_the_servers_permits(calibration: Path, tmp_path: Path) -> None:
    load = Load(spawn_rate=20.0, max_seconds=1.5)  # no users, no seconds: both are found on the way
    s = Scenario(server=Flags(), name="found", workload=Workload(prompt_tokens=60, output_tokens=20), load=load)
    with standin("--calibration", str(calibration), "--max-concurrent-requests", "2") as process:
        run, _ = climb(s, process.url, tmp_path / "run")
    assert [r.users for r in run.rungs] == [1, 2]
    assert run.stopped == "2 users hold all of the server's 2 permits"
    for rung in run.rungs:  # known well enough within its limit, or as long as that and it says so
        if rung.status == "complete":
            assert rung.extra["half_width"] <= 0.02 and rung.extra["completions"] >= 30
            assert rung.seconds <= 1.5
        else:
            assert rung.status == "limited" and rung.seconds == pytest.approx(1.5)
            assert any("reached its limit of 1.5 s" in warning for warning in texts(rung.warnings))


def test_a_budget_bounds_the_ladder_in_the_middle_of_a_rung(server: tuple[Standin, Path], tmp_path: Path) -> None:
    run, said = climb(scenario(users=[1, 2], seconds=600.0), server[0].url, tmp_path / "run", budget=8.0)
    assert [(r.users, r.status) for r in run.rungs] == [(1, "limited")]
    assert run.stopped == "the budget of 8 s is spent"
    assert 0 < run.rungs[0].seconds < 600
    assert re.search(r"users 1, 2: at most [0-9.]+ s,", said)


def test_lengths_from_any_workload(server: tuple[Standin, Path], tmp_path: Path) -> None:
    work = Workload(prompt_tokens=Lengths(uniform=(10, 60)), output_tokens=5, max_new_tokens=Lengths(uniform=(5, 9)))
    s = Scenario(server=Flags(), name="mixed", workload=work, load=Load(users=[2], spawn_rate=20.0, seconds=1.0))
    run, _ = climb(s, server[0].url, tmp_path / "run")
    assert run.requests["prompt_tokens"].between(10, 60).all() and run.requests["prompt_tokens"].nunique() > 5
    ok = run.requests[run.requests["status"] == "ok"]
    assert (ok["output_tokens"] == ok["max_new_tokens"]).all()  # what came back, not what was hoped for

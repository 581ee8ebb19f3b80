"""Everything that can end a ladder: kills, signals, budgets, servers that die or refuse, a load generator that dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from ladders import climb, lines, scenario, wait_for_requests
from rich.console import Console
from servers import Standin, standin
from warned import texts

from measure.ladder.generator import GeneratorKilled
from measure.ladder.runner import ServerGone
from measure.ladder.session import measure
from measure.server.endpoint import Endpoint
from measure.server.exposition import parse
from scenarios.cli.main import FAILED, status
from sim.model.errors import BadInput, UserError
from sim.model.scenario import Scenario
from sim.run import read_run

CHILD = """
import json, sys
from pathlib import Path
import msgspec
from measure.ladder.session import measure
from sim.engines.catalog import convert
from sim.model.scenario import Scenario
text, url, out, processes = sys.argv[1:]
scenario = msgspec.json.decode(text, type=Scenario, dec_hook=convert)
measure(scenario, url, Path(out), processes=int(processes))
"""


def child(s: Scenario, url: str, out: Path, processes: int = 2) -> subprocess.Popen[bytes]:
    arguments = [msgspec.json.encode(s).decode(), url, str(out), str(processes)]
    return subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stderr=subprocess.DEVNULL)


def wait_for_three_running(url: str) -> None:
    deadline = time.monotonic() + 30
    while parse(Endpoint(url).get("/metrics")[1].decode()).get("tgi_batch_current_size") != 3:
        assert time.monotonic() < deadline, "three requests never ran together"
        time.sleep(0.05)


def test_kill_9_loses_only_what_was_in_flight_and_the_run_resumes(server: tuple[Standin, Path], tmp_path: Path) -> None:
    process, log = server
    out, long = tmp_path / "run", scenario(users=[1, 2], seconds=2.0)
    began = len(lines(log / "tokens.jsonl")) if (log / "tokens.jsonl").exists() else 0
    with child(long, process.url, out) as measuring:
        wait_for_requests(out, 10)
        generators = psutil.Process(measuring.pid).children(recursive=True)
        assert generators
        measuring.kill()
    _, alive = psutil.wait_procs(generators, timeout=5)
    assert not alive
    run = read_run(out)
    assert run.rungs[-1].status == "aborted"
    ended = [t for t in lines(log / "tokens.jsonl")[began:] if len(t["sent"]) == 20 and str(t["id"]).isdigit()]
    answered = {int(t["id"]) for t in ended}
    kept = set(run.requests["id"])
    assert len(answered - kept) <= 1 + 1  # one user: the request in flight when the kill came

    with (out / "requests.jsonl").open("ab") as file:
        file.write(b'{"id": 99, "torn')  # as a full disk would leave it
    resumed, said = climb(long, process.url, out, resume=True)
    assert [(r.users, r.status) for r in resumed.rungs] == [(1, "aborted"), (1, "complete"), (2, "complete")]
    assert not texts(resumed.warnings)
    assert [s["first_rung"] for s in resumed.segments] == [0, 1]
    assert resumed.requests["id"].is_unique
    assert kept < set(resumed.requests["id"])
    assert resumed.segments[1]["start"] > run.requests["ended"].max()
    assert "users 1, 2" in said

    again, said = climb(long, process.url, out, resume=True)
    assert "already finished" in said
    assert len(again.rungs) == 3
    with pytest.raises(BadInput, match="begun with another load"):
        climb(scenario(users=[1, 2, 4], seconds=2.0), process.url, out, resume=True)
    with pytest.raises(BadInput, match="never overwritten"):
        climb(long, process.url, out)


@pytest.mark.parametrize(
    ("number", "status", "stopped", "processes"),
    [(signal.SIGINT, -signal.SIGINT, "interrupted", 2), (signal.SIGTERM, 143, "terminated", 1)],
)
def test_ctrl_c_and_sigterm_close_the_run(
    server: tuple[Standin, Path], tmp_path: Path, number: signal.Signals, status: int, stopped: str, processes: int
) -> None:
    out = tmp_path / "run"
    with child(scenario(users=[3], output=400, seconds=60.0), server[0].url, out, processes) as measuring:
        wait_for_three_running(server[0].url)
        children = psutil.Process(measuring.pid).children(recursive=True)
        measuring.send_signal(number)
        assert measuring.wait(20) == status
    assert not psutil.wait_procs(children, timeout=5)[1]
    run = read_run(out)
    assert run.stopped == stopped
    assert run.rungs[-1].status == "aborted"
    assert (run.requests["status"] == "aborted").sum() == 3  # one a user, with the tokens so far
    assert not texts(run.warnings)


def test_a_server_that_dies_ends_the_ladder_and_the_run_says_so(calibration: Path, tmp_path: Path) -> None:
    def die(process: Standin) -> None:
        wait_for_requests(tmp_path / "run", 5)
        process.kill()

    with standin("--calibration", str(calibration)) as process:
        threading.Thread(target=die, args=(process,), daemon=True).start()
        with pytest.raises(ServerGone):
            climb(scenario(users=[2], seconds=60.0), process.url, tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert run.rungs[-1].status == "aborted"
    assert "stopped answering" in texts(run.rungs[-1].warnings)[-1]
    assert "stopped answering" in run.stopped
    assert "connect" in set(run.requests["status"])


def test_what_goes_wrong_is_classified_counted_and_shown(calibration: Path, tmp_path: Path) -> None:
    faults = ("reset=0.08", "stall=0.04", "overloaded=0.1", "error=0.08", "eos=0.1", "incomplete=0.08", "after=3")
    more = [word for fault in faults for word in ("--fault", fault)]
    with standin("--calibration", str(calibration), "--seed", "3", *more) as process:
        s = scenario(users=[8, 9], seconds=4.0, retry=0.01)
        run, said = climb(s, process.url, tmp_path / "run", patience=0.5)
    seen = set(run.requests["status"])
    assert {"ok", "reset", "timeout", "overloaded", "generation", "incomplete"} <= seen
    assert len(run.rungs) == 1
    assert "of the requests failed" in run.stopped  # unhealthy: the next rung would tell nothing
    rung = run.rungs[0]
    assert any("unhealthy" in warning for warning in texts(rung.warnings))
    assert any("of the tokens requested" in warning for warning in texts(rung.warnings))
    assert set(rung.extra["errors"]) <= seen
    ended_early = run.requests[run.requests["finish_reason"] == "eos_token"]
    assert len(ended_early) and (ended_early["output_tokens"] < 20).all()
    assert "unhealthy" in said


def test_a_profile_the_server_cannot_take_is_refused_with_the_flag_and_nothing_is_written(
    calibration: Path, tmp_path: Path
) -> None:
    with standin("--calibration", str(calibration)) as process:
        with pytest.raises(
            UserError, match=r"max_input_length is 1024, .* have 1500 tokens: start it with --max-input-length"
        ):
            climb(scenario(prompt=1500, output=20), process.url, tmp_path / "run")
        with pytest.raises(UserError, match="--max-total-tokens 2100"):
            climb(scenario(prompt=1000, output=1100), process.url, tmp_path / "run")
    with pytest.raises(UserError, match="no server answers"):
        climb(scenario(), process.url, tmp_path / "run")
    with pytest.raises(UserError, match="give --url"):
        measure(scenario(), None, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_dead_load_generator_is_told_apart_from_a_dead_server(server: tuple[Standin, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"

    class Killing(Console):
        def print(self, *objects: Any, **more: Any) -> None:
            if "1 user: complete" in str(objects[0]):
                for process in psutil.Process().children(recursive=True):
                    if "measure.loadgen.locustfile" in process.cmdline():
                        process.kill()

    with Path(os.devnull).open("w") as null, pytest.raises(GeneratorKilled):
        measure(scenario(users=[1, 2]), server[0].url, out, console=Killing(file=null))
    run = read_run(out)
    assert [r.status for r in run.rungs] == ["complete", "aborted"]
    assert run.stopped == (
        "the load generator was killed (SIGKILL), probably because memory ran out; try fewer users or fewer --processes"
    )


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_killed_load_generator_is_one_line_and_the_run_is_kept(
    server: tuple[Standin, Path], tmp_path: Path, processes: str
) -> None:
    """As the kernel does when memory is short: the driver where there is one process, else a worker."""
    out = tmp_path / "run"
    sets = ["--set", "workload={prompt_tokens: 20, output_tokens: 5}", "--set", "load={users: [2, 3], seconds: 30}"]
    asked = ["measure", "standin", "--url", server[0].url, "-o", str(out), "--processes", processes, *sets]
    command = [sys.executable, "-m", "scenarios", *asked]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as measuring:
        wait_for_requests(out, 10)
        for process in psutil.Process(measuring.pid).children(recursive=True):
            if ("worker" in process.cmdline()) == (processes == "2"):
                process.kill()
        _, said = measuring.communicate(timeout=60)
    assert measuring.returncode == 2 and "Traceback" not in said
    assert said.splitlines()[-1] == (
        "servecast: the load generator was killed (SIGKILL), probably because memory ran out; "
        "try fewer users or fewer --processes"
    )
    assert f"everything measured is in {out}; --resume continues the run" in said
    run = read_run(out)
    assert [r.status for r in run.rungs] == ["aborted"] and len(run.requests) >= 10


def test_a_load_generator_that_dies_before_its_first_record_is_what_is_told(
    server: tuple[Standin, Path], tmp_path: Path
) -> None:
    class Killing(Console):
        def print(self, *objects: Any, **more: Any) -> None:
            if "warm-up" in str(objects[0]):
                for path in (tmp_path / "run").glob("requests*"):
                    path.unlink()
                for process in psutil.Process().children(recursive=True):
                    if "measure.loadgen.locustfile" in process.cmdline():
                        process.kill()

    with Path(os.devnull).open("w") as null, pytest.raises(GeneratorKilled):
        measure(scenario(users=[1, 2]), server[0].url, tmp_path / "run", console=Killing(file=null))


def test_a_ladder_without_a_single_answer_fails(server: tuple[Standin, Path], tmp_path: Path) -> None:
    asked = ["measure", "standin", "--url", server[0].url, "--set", "workload.prompt_tokens=60", "-o"]
    assert status([*asked, str(tmp_path / "none"), "--set", "load={rate: [5], settle: 0, seconds: 0.01}"]) == FAILED
    assert status([*asked, str(tmp_path / "some"), "--set", "load={users: [1], seconds: 1}"]) == 0

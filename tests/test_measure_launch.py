"""A server started by the command of a scenario file: shown, given the scenario's flags, timed, and ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from servers import standin

from measure.ladder.session import measure
from measure.server.doctor import diagnose
from measure.server.launch import CannotStart, logged_flags
from measure.server.process import launched
from scenarios.cli.main import status
from sim.engines import vllm_v1
from sim.engines.tgi_0_9_4 import Flags
from sim.model.flags import LAUNCH, SERVER
from sim.model.scenario import Launch, Load, Scenario
from sim.model.workload import Workload
from sim.run import read_run

LOG = Path(__file__).parent / "samples" / "vllm-0.32.0" / "server.log"
STANDIN = [sys.executable, "-m", "measure.standin.server", "--engine", "vllm-v1"]
SCENARIO = Scenario(
    name="launched",
    server=vllm_v1.Flags(max_num_seqs=16, num_gpu_blocks=65, max_model_len=256),
    workload=Workload(prompt_tokens=40, output_tokens=8),
    load=Load(users=[2], spawn_rate=20.0, seconds=0.5),
    launch=Launch(command=[*STANDIN, "--max-num-batched-tokens=1024"]),
)


def gone(url: str) -> bool:
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.socket() as s:
        return s.connect_ex((host, int(port))) != 0


def test_a_server_is_started_by_a_command_measured_and_ended(tmp_path: Path) -> None:
    text = StringIO()
    measure(SCENARIO, None, tmp_path / "run", console=Console(file=text, width=200))
    run = read_run(tmp_path / "run")
    assert [rung.status for rung in run.rungs] == ["complete"]
    head = json.loads((tmp_path / "run" / "run.json").read_text())
    argv = head["process"]["argv"]
    assert (
        argv[:5] == STANDIN and "--max-num-batched-tokens" not in argv
    )  # what the command says itself is not given twice
    written = ["--max-model-len", "256", "--max-num-seqs", "16", "--num-gpu-blocks-override", "65"]
    assert argv[-6:] == written
    first, *_ = text.getvalue().splitlines()
    assert first.startswith(f"starting: {STANDIN[0]} -m measure.standin.server") and first.endswith(" ".join(written))
    flags = run.flags
    assert (flags["max_num_seqs"].value, flags["max_num_seqs"].source) == (16, LAUNCH)
    assert flags["num_gpu_blocks"].source == SERVER
    assert not run.untold
    cold = head["cold_start"]
    assert 0 < cold["healthy"] < cold["first_token"] < 30
    assert b"http://127.0.0.1:" in (tmp_path / "run" / "server.log").read_bytes()
    assert gone(f"http://127.0.0.1:{argv[argv.index('--port') + 1]}")


def test_a_server_that_will_not_start_shows_why(tmp_path: Path) -> None:
    console = Console(file=StringIO(), width=200)
    for launch, said in (
        (Launch(command=[*STANDIN, "--fault", "nonsense=1"]), r"exited before it was healthy.*expected one of reset"),
        (Launch(command=["no-such-program"]), "no program no-such-program"),
        (Launch(command=["true"], env=["NOT_SET_ANYWHERE"]), "NOT_SET_ANYWHERE is not set"),
    ):
        with pytest.raises(CannotStart, match=said), launched(launch, SCENARIO, tmp_path, console, 1):
            pass


def test_the_server_ends_with_a_measurement_that_is_killed(tmp_path: Path) -> None:
    marker = tmp_path / "pid"
    program = f"import os, time; open({str(marker)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    supervisor = subprocess.Popen(
        [sys.executable, "-m", "measure.server.process", sys.executable, "-c", program], stdin=subprocess.PIPE
    )
    until = time.monotonic() + 20
    while not (marker.exists() and marker.read_text()) and time.monotonic() < until:
        time.sleep(0.02)
    pid = int(marker.read_text())
    assert supervisor.stdin is not None
    supervisor.stdin.close()  # as the kernel does when the measurement dies
    assert supervisor.wait(20) == -signal.SIGTERM % 256
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_command_in_a_run_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "ran"
    with standin("--engine", "vllm-v1", "--max-model-len", "256") as process:
        measure(SCENARIO, process.url, tmp_path / "run", console=Console(file=StringIO()))
    file = tmp_path / "run" / "run.json"
    head = json.loads(file.read_text())
    assert head["scenario"]["launch"]["command"][0] == sys.executable  # it is on record
    head["scenario"]["launch"] = {"command": ["touch", str(marker)]}
    file.write_text(json.dumps(head))
    monkeypatch.chdir(tmp_path)
    assert read_run(Path("run")).scenario.launch is None
    for command in (
        ["measure", "run", "-o", "new"],
        ["measure", "run/run.json", "-o", "new"],
        ["run", "run", "-o", "new"],
        ["doctor", "run/run.json"],
        ["calibrate", "run", "--advise"],
        ["report", "run", "-o", "page.html"],
    ):
        status(command)
        capsys.readouterr()
        assert not marker.exists()


def test_what_a_log_of_vllm_tells() -> None:
    text = LOG.read_text()
    assert logged_flags(vllm_v1.Flags, text) == {
        "max_model_len": 256,
        "block_size": 32,
        "num_gpu_blocks": 65,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "async_scheduling": False,  # a CPU
    }
    without = "\n".join(line for line in text.splitlines() if "non-default" not in line)
    assert logged_flags(vllm_v1.Flags, without)["kv_cache_tokens"] == 2080
    assert logged_flags(vllm_v1.Flags, "non-default args: {'max_num_seqs': -4, 'x': [") == {}
    assert logged_flags(Flags, text) == {}


def test_the_doctor_looks_for_the_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    found = {
        f.what: f for f in diagnose(Scenario(name="x", server=Flags(), launch=Launch(command=["no-such-program"])))
    }
    assert (found["command"].ok, found["docker"].ok) == (False, None)
    assert {f.what: f for f in diagnose(SCENARIO)}["command"].ok is True


@pytest.mark.parametrize(
    ("launch", "said"),
    [
        ("{image: x}", "launch.model: missing; expected a model for docker, or a command"),
        ("{command: [vllm], image: x}", "launch.image: expected none beside a command"),
        ("{command: vllm serve}", "launch.command: expected a list"),
        (
            "{command: [vllm, --api-key=x]}",
            "launch.command[1]: expected no secret in a file; put it into the environment",
        ),
        ("{model: m, args: {hf_token: x}}", "launch.args.hf_token: expected no secret in a file"),
    ],
)
def test_a_launch_that_cannot_be_is_refused(
    launch: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(
        "name: s\nworkload: {prompt_tokens: 40, output_tokens: 8}\nload: {users: [1, 2]}\n" + f"launch: {launch}\n"
    )
    assert status(["measure", str(file), "-o", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err

"""`pytest --schedules FILE`: the recorded schedules to replay; `--balancers FILE`: the recorded choices of balancers.
`--hypothesis-profile hunt`: many more random worlds. And a stand-in for whoever climbs a ladder."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from recorded_balancers import BalancerRecording, read_balancer_recordings
from schedule import BadSchedules, RouterRun, read_router_runs
from schedule_vllm import Recording, is_of_vllm, read_recordings
from servers import Command, Standin, quick_calibration, standin

from sim.model.calibration import FitCheck

DATA = Path(__file__).parent.parent / "data"
SHIPPED = [DATA / "router-0.9.4-traces.jsonl", DATA / "vllm-v1-schedules.jsonl.gz"]
settings.register_profile("suite", deadline=None, max_examples=250, derandomize=True)
settings.register_profile("hunt", deadline=None, max_examples=20_000)
settings.register_profile("mutants", deadline=None, max_examples=150, derandomize=True, phases=[Phase.generate])
settings.load_profile("suite")
os.environ.setdefault("SERVECAST_JOBS", "1")  # starting processes takes longer than most simulations here
NO_CHECK = FitCheck(rows=[], missed=0, allowed=0, passed=True, replicates=0)
BALANCERS = DATA / "balancers.jsonl.gz"
LIVE = """\
format: 2
name: live
server:
  {max_input_length: 512, max_total_tokens: 1024, max_batch_prefill_tokens: 2048, max_batch_total_tokens: 16000}
workload: {prompt_tokens: 60, output_tokens: 40}
load: {users: [1], seconds: 0.5, max_seconds: 1, spawn_rate: 20}
"""
ROUTER_RUNS, RECORDINGS = pytest.StashKey[list[RouterRun]](), pytest.StashKey[list[Recording]]()
BALANCER_RECORDINGS = pytest.StashKey[list[BalancerRecording]]()


def pytest_configure(config: pytest.Config) -> None:
    # started in the background of a script, Ctrl-C is ignored, and by everything that the tests start, too
    signal.signal(signal.SIGINT, signal.default_int_handler)
    files = config.getoption("schedules", None) or SHIPPED  # the option: sim.pytest_schedules
    try:
        of_vllm = [file for file in files if is_of_vllm(file)]
        config.stash[ROUTER_RUNS] = [w for file in files if file not in of_vllm for w in read_router_runs(file)]
        config.stash[RECORDINGS] = [r for file in of_vllm for r in read_recordings(file)]
        if balancers := config.getoption("balancers", None):
            config.stash[BALANCER_RECORDINGS] = [r for file in balancers for r in read_balancer_recordings(file)]
    except BadSchedules as e:
        raise pytest.UsageError(str(e)) from e


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "router_run" in metafunc.fixturenames:
        router_runs = metafunc.config.stash[ROUTER_RUNS]
        metafunc.parametrize("router_run", router_runs, ids=[w.name for w in router_runs])
    if "recording" in metafunc.fixturenames:
        recordings = metafunc.config.stash[RECORDINGS]
        metafunc.parametrize("recording", recordings, ids=[r.name for r in recordings])
    if "balancer_recording" in metafunc.fixturenames:
        recorded = metafunc.config.stash.get(BALANCER_RECORDINGS, None) or read_balancer_recordings(BALANCERS)
        metafunc.parametrize("balancer_recording", recorded, ids=[r.name for r in recorded])


@pytest.fixture(scope="module")
def few_replays() -> Iterator[None]:
    """Fit checks of 19 replays, the fewest that have a 90 % band."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scenarios.compare.fit_check.FIRST", 19)
        patch.setattr("scenarios.compare.fit_check.ALL", 38)
        yield


@pytest.fixture
def no_fit_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits that nobody checks: half of what `calibrate` takes, where the test is about something else."""
    monkeypatch.setattr("scenarios.compare.fit.check_runs", lambda *_, **__: NO_CHECK)


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quick_calibration(tmp_path_factory.mktemp("standin"))


@pytest.fixture(scope="module")
def server(calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Standin, Path]]:
    """A stand-in without faults, and the folder of its log."""
    log = tmp_path_factory.mktemp("log")
    with standin("--calibration", str(calibration), log=log) as process:
        yield process, log


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The file of a small scenario to be measured, where no docker answers."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    path = tmp_path / "live.yaml"
    path.write_text(LIVE)
    return str(path)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command: its exit status, what it printed on stdout (unwrapped) and on stderr."""
    from scenarios.cli.main import status  # not above: `make mutants` copies `sim` alone

    def ran(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        found = status([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return found, " ".join(out.split()), err

    return ran

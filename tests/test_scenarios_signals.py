"""What the world does to a command: full disks, taken ports, closed pipes, signals; and that no process is left."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from scenarios.cli import main, signals

SERVECAST = [sys.executable, "-m", "scenarios"]
QUICK = ["--replicates", "19", "--jobs", "1", "--set", "load.seconds=5"]
INT, TERM = signal.SIGINT, signal.SIGTERM
LONG = ["simulate", "llama2-70b", "--replicates", "5000", "--jobs", "2"]


def test_a_full_disk_and_a_taken_port_are_nobodys_bug():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*SERVECAST, "scenarios"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "servecast: standard output: No space left on device\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run([*SERVECAST, "standin", "--port", port], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "address already in use" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_without_a_stdout_there_is_nobody_to_tell():
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m scenarios scenarios >&-"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_table_that_somebody_has_seen_enough_of_is_silent():
    command = subprocess.Popen(
        [*SERVECAST, "simulate", "standin", *QUICK], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert command.stdout is not None and command.stderr is not None
    command.stdout.close()
    assert b"Traceback" not in command.stderr.read()
    command.stderr.close()
    assert command.wait(timeout=60) == 0


@pytest.mark.parametrize("what", ["stdout", "stderr"])
def test_what_was_asked_for_is_written_though_nobody_reads_on(what: str, tmp_path: Path):
    """As with `servecast simulate ... -o out | head -1`."""
    others = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | {what: subprocess.PIPE}
    with subprocess.Popen([*SERVECAST, "simulate", "standin", *QUICK, "-o", tmp_path / "out"], **others) as simulating:
        pipe = getattr(simulating, what)
        pipe.close()
        assert simulating.wait(60) == 0
    assert (tmp_path / "out/standin/forecast.json").exists()
    assert (tmp_path / "out/standin/run/requests.jsonl").exists()


def test_a_closed_pipe_is_silent():
    command = (
        f"{sys.executable} -m scenarios simulate standin {' '.join(QUICK)} --csv | head -1; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr and "Broken" not in done.stderr


@pytest.mark.parametrize(
    "numbers",
    [[INT], [TERM], [INT, INT, INT, INT], [TERM, INT, TERM]],
    ids=["interrupted", "terminated", "again and again", "by two kinds"],
)
def test_a_signal_ends_it_in_silence_and_leaves_no_process_whatever_signals_follow(numbers: list[int]):
    process = subprocess.Popen(
        [*SERVECAST, *LONG], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("simulating")  # under way
    for number, pause in zip(numbers, (0.0, 0.001, 0.01, 0.0), strict=False):  # before and while it cleans up
        os.killpg(process.pid, number)
        time.sleep(pause)
    out, err = process.communicate(timeout=30)
    assert process.returncode in {128 + number for number in numbers}  # two at once come in any order
    assert out == "" and "Traceback" not in err and "Exception" not in err
    assert not workers_of(process.pid)


def test_a_signal_whose_exception_was_lost_still_decides_the_status(monkeypatch: pytest.MonkeyPatch):
    def lost(arguments: object) -> int:
        with contextlib.suppress(SystemExit):  # as in a destructor, where Python prints it and goes on
            signals._raise(signal.SIGTERM, None)
        return 0

    ended: list[object] = []
    monkeypatch.setattr(main, "status", lost)
    monkeypatch.setattr(signals, "_status", 0)
    monkeypatch.setattr(signals, "GRACE", 0.05)
    monkeypatch.setattr(signals.signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(signals.os, "_exit", ended.append)
    with pytest.raises(SystemExit) as exit:
        main.main([])
    assert exit.value.code == signals.TERMINATED
    deadline = time.monotonic() + 10
    while not ended and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ended == [signals.TERMINATED]  # and had the tidying up never ended, this would have


def test_killed_it_leaves_no_process():
    process = subprocess.Popen(
        [*SERVECAST, *LONG], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("simulating")
    process.kill()
    process.communicate(timeout=60)
    assert not workers_of(process.pid)


def workers_of(group: int) -> list[int]:
    """Processes of a group that are still there after a while."""
    for _ in range(200):
        left = [p.pid for p in psutil.process_iter() if alive(p) and os.getpgid(p.pid) == group]
        if not left:
            break
        time.sleep(0.1)
    return left


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE and bool(os.getpgid(process.pid))
    except (psutil.NoSuchProcess, ProcessLookupError):
        return False

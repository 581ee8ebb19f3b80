"""Whatever a file holds, or the machine lacks, a command ends in one line: no traceback, no wait without an end."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from scenarios.cli.main import status

GOOD = """\
name: tiny
workload: {prompt_tokens: 50, output_tokens: 5}
load: {users: [1], seconds: 2}
calibration: model.json
"""
QUICK = ["--replicates", "19", "--jobs", "1"]
BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True)
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy("measure/standin/calibration.json", tmp_path / "model.json")
    (tmp_path / "tiny.yaml").write_text(GOOD)
    return tmp_path


def complaint(arguments: list[object], capfd: pytest.CaptureFixture[str]) -> str:
    assert status([str(each) for each in arguments]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("servecast: ") and err.count("\n") == 1
    return err


BAD = {
    "tag": (GOOD + "replicas: !!int x\n", ":5: replicas: expected a value of the kind int, found 'x'"),
    "tagged list": (GOOD.replace("[1]", "!foo [1]"), ":3: load.users: expected a plain value, found the tag !foo"),
    "tagged map": ("name: !!omap [a: 1]\n", ":1: name: expected a plain value, found the tag"),
    "merged scalar": ("name: x\nload:\n  <<: 5\n", ":2: load: expected << to merge in a map, or a list of maps"),
    "merged in itself": ("load: &a\n  <<: *a\n", ":1: load: expected << to merge in a map"),
    "merged key": ("name: x\nload:\n  <<: {user: [1]}\n", ":3: load.user: unknown key; did you mean users?"),
    "alias in itself": ("name: &a [*a]\n", ":1: name"),
    "bomb": (BOMB + "name: *l\n", "expected at most 100000 values, those of aliases included"),
    "nested list": ("name: " + "[" * 3000 + "]" * 3000, ":1: expected at most 50 maps and lists inside one another"),
    "nested map": ("a: " + "{a: " * 3000 + "}" * 3000, ":1: expected at most 50 maps and lists inside one another"),
    "nested lines": ("".join(" " * n + "a:\n" for n in range(300)), "expected at most 50 maps and lists"),
    "400 digits": (
        GOOD + f"replicas: {'9' * 400}\n",
        ":5: replicas: expected a whole number below 2^63, found one of 400",
    ),
    "5000 digits": (GOOD + f"replicas: {'9' * 5000}\n", ":5: replicas: expected a whole number below 2^63"),
    "no such day": ("name: 2001-13-41T99:99:99Z\n", "bad.yaml"),
    "half a character": ('name: "a\\ud800"\n', ":1: name: expected a value of the kind str"),
    "a key that is a list": ("? [a]\n: 2\n", "expected text as the name of a key"),
    "UTF-16": ("name: é", "not UTF-8 text"),
    "empty": ("", ":1: expected a scenario"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_scenario(name: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text, message = BAD[name]
    (folder / "bad.yaml").write_text(text, encoding="utf-16" if name == "UTF-16" else "utf-8")
    assert message in complaint(["simulate", folder / "bad.yaml", *QUICK], capfd)


def test_merge_keys_are_followed(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = GOOD.replace("{users: [1], seconds: 2}", "\n  users: [1]\n  <<: {seconds: 2, users: [9]}")
    text = text.replace("{prompt_tokens: 50, output_tokens: 5}", "\n  <<: [{prompt_tokens: 50}, {output_tokens: 5}]")
    (folder / "merged.yaml").write_text(text)
    results = []
    for name in ("tiny", "merged"):
        assert status(["simulate", str(folder / f"{name}.yaml"), *QUICK, "--csv"]) == 0
        results.append(capfd.readouterr().out)
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "raw",
    [
        "",
        "[" * 100_000,
        '{"a":' * 3000 + "1" + "}" * 3000,
        f'{{"format": {"9" * 5000}}}',
        '{"format": "\\ud800"}',
        "\0",
    ],
    ids=["empty", "open", "deep", "digits", "half", "null"],
)
def test_json_of_every_kind(raw: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "model.json").write_text(raw)
    (folder / "run").mkdir()
    (folder / "run" / "run.json").write_text(raw)
    (folder / "run" / "requests.jsonl").write_text(raw)
    for arguments in (
        ["simulate", folder / "tiny.yaml", *QUICK],
        ["report", folder / "run", "-o", folder / "r.html"],
        ["report", folder / "model.json", "-o", folder / "r.html"],
        ["import", folder / "model.json", "-o", folder / "imported"],
    ):
        complaint(arguments, capfd)
    assert not (folder / "imported").exists() and not (folder / "r.html").exists()


def test_devices_pipes_and_bombs_come_to_an_end(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sim.model.files.atomic.PIPE_SECONDS", 0.05)
    monkeypatch.setattr("sim.model.files.atomic.MOST", 1 << 16)
    monkeypatch.setattr("sim.model.files.atomic.gunzip.__defaults__", (1 << 16,))
    os.mkfifo(folder / "pipe")
    (folder / "bomb.json.gz").write_bytes(gzip.compress(b"[" + b" " * (1 << 20)))
    for name, why in (("/dev/zero", "a device"), (folder / "pipe", "nothing came"), (folder / "bomb.json.gz", "MB")):
        assert why in complaint(["import", name, "-o", folder / "imported"], capfd)
        if why != "MB":
            assert why in complaint(["simulate", name, *QUICK], capfd)
            assert why in complaint(["report", name, "-o", folder / "r.html"], capfd)


def test_a_pipe_is_read_to_its_end(folder: Path) -> None:
    command = f"{sys.executable} -m scenarios doctor <(cat {folder}/tiny.yaml | sed s=model.json={folder}/model.json=)"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 1) and "cores" in done.stdout, done.stderr


def test_a_worker_that_the_system_kills_is_told_of(folder: Path) -> None:
    command = [sys.executable, "-m", "scenarios", "simulate", str(folder / "tiny.yaml"), "--replicates", "20000"]
    child = subprocess.Popen([*command, "--jobs", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        workers = [p for p in psutil.Process(child.pid).children() if "spawn_main" in " ".join(p.cmdline())]
        if len(workers) == 2:
            workers[0].kill()
            break
        time.sleep(0.05)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (2, "")
    assert "memory" in err.splitlines()[-1] and "--jobs" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_home_that_is_not_there_is_no_trouble(folder: Path) -> None:
    run = folder / "run"
    assert status(["import", "tests/samples/foreign/aiperf-few-bundled.jsonl", "-o", str(run)]) == 0
    environment = {
        k: v for k, v in os.environ.items() if k not in ("MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")
    }
    done = subprocess.run(
        [sys.executable, "-m", "scenarios", "report", str(run), "-o", str(folder / "r.html")],
        capture_output=True,
        text=True,
        env=environment | {"HOME": "/proc/nowhere"},
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_working_directory_that_is_gone(folder: Path) -> None:
    (folder / "gone").mkdir()
    command = f"cd {folder}/gone; rmdir ../gone; PYTHONPATH={Path.cwd()} {sys.executable} -m scenarios new x"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "working directory is gone" in done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_streams_may_be_closed(closed: str, folder: Path) -> None:
    (folder / "out").mkdir()
    command = f"{sys.executable} -m scenarios new {folder}/out/x {closed}"
    assert subprocess.run(["bash", "-c", command], capture_output=True, timeout=60).returncode == 0
    assert (folder / "out" / "x.yaml").read_text().startswith("#") or (folder / "out" / "x.yaml").stat().st_size > 100


def test_calibrations_with_nothing_in_them(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    calibration = json.loads((folder / "model.json").read_text())
    for key in ("warnings", "draws", "noise", "server"):
        (folder / "model.json").write_text(json.dumps(calibration | {key: None}))
        assert f"model.json: {key}: " in complaint(["simulate", folder / "tiny.yaml", *QUICK], capfd)


@pytest.mark.parametrize("value", ['"\\ud800"', "9" * 400, "9" * 5000, "1e400", "[" * 3000 + "]" * 3000])
def test_results_of_other_tools(value: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = Path("tests/samples/foreign/aiperf-few-bundled.jsonl").read_text()
    for key in ("request_start_ns", "input_sequence_length"):
        spoilt = re.sub(rf'("{key}": *)([0-9]+|{{[^}}]*}})', rf"\g<1>{value}".replace("\\u", "\\\\u"), lines, count=1)
        assert spoilt != lines
        (folder / "results.jsonl").write_text(spoilt)
        complaint(["import", folder / "results.jsonl", "-o", folder / "imported"], capfd)
        assert not (folder / "imported").exists()

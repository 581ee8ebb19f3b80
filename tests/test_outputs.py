"""What a command writes never destroys what was there: inputs, runs, and files that servecast did not write."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from servers import Standin

from scenarios.cli.main import status

RESULTS = Path("tests/samples/foreign/aiperf-few-bundled.jsonl")
TABLE = "phase,sequences,tokens_per_sequence,seconds\n" + "".join(
    f"{phase},{n},{length},{seconds * n**0.5}\n"
    for phase, seconds in (("prefill", 0.1), ("decode", 0.02))
    for n in (1, 2, 4, 8)
    for length in (100, 200, 400)
)
QUICK = ["--replicates", "19", "--jobs", "1", "--set", "load.users=[1]", "--set", "load.seconds=2"]
CALIBRATION = Path("measure/standin/calibration.json")
SCENARIO = """\
name: tiny
workload: {prompt_tokens: 50, output_tokens: 5}
load: {users: [1], seconds: 2}
calibration: model.json
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run."""
    path = tmp_path_factory.mktemp("imported") / "run"
    assert status(["import", str(RESULTS), "-o", str(path)]) == 0
    return path


@pytest.fixture
def run(imported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(imported, tmp_path / "run")


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    shutil.copy(CALIBRATION, tmp_path / "model.json")
    (tmp_path / "tiny.yaml").write_text(SCENARIO)
    return tmp_path / "tiny.yaml"


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(arguments: list[object], folder: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """The complaint of a command that must change nothing in a folder."""
    before = content(folder)
    assert status([str(each) for each in arguments]) == 2
    out, err = capfd.readouterr()
    assert out == ""  # before any work
    assert err.count("\n") == 1 and err.startswith("servecast: ")
    assert content(folder) == before
    return err


@pytest.mark.parametrize("command", ["calibrate", "report"])
def test_nothing_is_written_inside_a_run(
    command: str, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("requests.jsonl", "run.json", "new.json", "deep/er/new.json"):
        for force in ([], ["--force"]):
            assert "is inside the run" in refused([command, run, "-o", run / name, *force], tmp_path, capfd)


def test_nor_through_a_link_into_it(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").symlink_to(run / "requests.jsonl")
    (tmp_path / "folder").symlink_to(run)
    assert "is inside the run" in refused(["report", run, "-o", tmp_path / "file", "--force"], tmp_path, capfd)
    assert "is inside the run" in refused(["report", run, "-o", tmp_path / "folder" / "x"], tmp_path, capfd)


@pytest.mark.parametrize(
    "command",
    [
        ["compare", "RUN", "--held-out", "1", "-o", "RUN/compared"],
        ["simulate", "SCENARIO", "-o", "RUN"],
        ["import", "RESULTS", "-o", "RUN/imported"],
        ["measure", "SCENARIO", "--url", "http://127.0.0.1:9", "-o", "RUN/again"],
        ["run", "SCENARIO", "--set", "load.users=[1,2]", "--url", "http://127.0.0.1:9", "-o", "RUN/all"],
        ["new", "RUN/mine"],
        ["standin", "--port", "0", "--log", "RUN"],
    ],
    ids=lambda command: command[0],
)
def test_nor_by_any_other_command(
    command: list[str], run: Path, scenario: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    named = {"RUN": str(run), "SCENARIO": str(scenario), "RESULTS": str(scenario)}
    arguments: list[object] = []
    for each in command:
        for name, path in named.items():
            each = each.replace(name, path)
        arguments.append(each)
    assert "is inside the run" in refused(arguments, tmp_path, capfd)


def test_an_input_is_not_written_over_whatever_it_is_called(
    scenario: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model.json"
    forecast = {"format": 2, "curves": [], "knee": {}, "provenance": {}}
    folder = tmp_path / "tiny"
    folder.mkdir()
    os.link(scenario, folder / "forecast.json")  # a hard link
    (tmp_path / "link").symlink_to(scenario)
    simulate = ["simulate", scenario, *QUICK, "-o", tmp_path, "--force"]
    assert "is an input of this command" in refused(simulate, tmp_path, capfd)
    (folder / "forecast.json").unlink()
    (folder / "forecast.json").symlink_to(model)
    assert "is an input of this command" in refused(simulate, tmp_path, capfd)
    for output in (scenario, tmp_path / "link", tmp_path / "." / "tiny.yaml"):
        calibrate = ["calibrate", scenario, "-o", output, "--force"]
        assert "is an input of this command" in refused(calibrate, tmp_path, capfd)
    (tmp_path / "f.json").write_text(json.dumps(forecast))
    report = ["report", tmp_path / "f.json", "-o", tmp_path / "f.json", "--force"]
    assert "is an input of this command" in refused(report, tmp_path, capfd)
    report = ["report", folder, "-o", folder / "forecast.json", "--force"]
    assert "input of this command" in refused(report, tmp_path, capfd)


def test_only_its_own_outputs_are_replaced_without_force(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    for found in ("<html>mine</html>", '{"format": 2}', "[" * 5000, "\0\xff", '{"format": 1, "rows": []}'):
        mine.write_text(found)
        for command in (["report", run, "-o", mine], ["calibrate", run, "-o", mine]):
            err = refused(command, tmp_path, capfd)
            assert err.startswith(f"servecast: {mine}: exists and is no ") and "--force" in err
    assert status(["report", str(run), "-o", str(mine), "--force"]) == 0
    assert status(["report", str(run), "-o", str(mine)]) == 0  # now it is its own
    assert "is no calibration" in refused(["calibrate", run, "-o", mine], tmp_path, capfd_after(capfd))
    assert mine.read_text().startswith("<!doctype html>")


def capfd_after(capfd: pytest.CaptureFixture[str]) -> pytest.CaptureFixture[str]:
    capfd.readouterr()
    return capfd


def test_an_empty_file_holds_nothing_to_lose(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert status(["report", str(run), "-o", str(tmp_path / "empty")]) == 0


def test_a_link_stays_and_what_it_leads_to_is_written(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    there = tmp_path / "there" / "report.html"
    there.parent.mkdir()
    link = tmp_path / "link.html"
    link.symlink_to(there)  # to nothing yet
    for _ in range(2):
        assert status(["report", str(run), "-o", str(link)]) == 0
        assert link.is_symlink() and there.read_text().startswith("<!doctype html>")
        there.chmod(0o640)
    assert stat.S_IMODE(there.stat().st_mode) == 0o640
    assert [p.name for p in there.parent.iterdir()] == ["report.html"]
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert "symbolic links" in refused(["report", run, "-o", tmp_path / "a"], tmp_path, capfd_after(capfd))


def test_a_run_may_be_imported_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert status(["import", str(RESULTS), "-o", str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "run.json").is_file()


def test_what_is_no_regular_file_is_never_replaced(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    device, link = tmp_path / "null", tmp_path / "link"
    try:  # a device of our own: a program that is wrong here would replace the machine's
        os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        device = Path("/dev/null")  # then it may not, either
    link.symlink_to(device)
    assert status(["report", str(run), "-o", str(link)]) == 0
    assert status(["report", str(run), "-o", str(device)]) == 0
    assert stat.S_ISCHR(device.stat().st_mode) and link.is_symlink()
    capfd.readouterr()
    assert status(["report", str(run), "-o", str(pipe)]) == 2  # nobody reads it: not waited for
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    reader, writer = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), os.open(pipe, os.O_WRONLY)
    with read(reader) as said:  # which would be at its end at once without a writer
        try:
            assert status(["report", str(run), "-o", str(pipe)]) == 0
        finally:
            os.close(writer)
    assert said[0].startswith(b"<!doctype html>")
    assert "directory" in refused(["report", run, "-o", tmp_path], run, capfd_after(capfd))


@contextmanager
def read(reader: int) -> Iterator[list[bytes]]:
    """All that comes through a pipe, once it is closed at the other end."""
    said: list[bytes] = []

    def whole() -> None:
        with open(reader, "rb") as file:
            said.append(file.read())

    os.set_blocking(reader, True)
    thread = threading.Thread(target=whole)
    thread.start()
    yield said
    thread.join(10)


@contextmanager
def stdout_into(number: int) -> Iterator[None]:
    """Standard output leads into this file, which is closed at the end."""
    before = os.dup(1)
    os.dup2(number, 1)
    os.close(number)
    try:
        yield
    finally:
        os.dup2(before, 1)
        os.close(before)


def test_to_stdout_goes_the_file_alone(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    with read(reader) as piped, stdout_into(writer):
        # not /dev/stdout: a program that is wrong here would replace the machine's
        assert status(["report", str(run), "-o", "/proc/self/fd/1"]) == 0
    assert piped[0].startswith(b"<!doctype html>") and piped[0].rstrip().endswith(b"</html>")
    page = tmp_path / "page"
    with stdout_into(os.open(page, os.O_WRONLY | os.O_CREAT)):
        assert status(["report", str(run), "-o", str(page)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "standard output" in err and not page.read_bytes()


def full(number: int = errno.ENOSPC) -> Callable[..., int]:
    def write(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    return write


COMMANDS = {
    "simulate": (["simulate", "SCENARIO", *QUICK, "-o", "OUT"], "OUT/tiny/run", "E2E"),
    "calibrate": (["calibrate", "TABLE.csv", "-o", "OUT/c.json"], "OUT/c.json", "parameter"),
    "compare": (["compare", "RUN", "AGAIN", "-o", "OUT/d"], "OUT/d/comparison.json", "rps"),
    "report": (["report", "RUN", "-o", "OUT/r.html"], "OUT/r.html", ""),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_loses_no_answer_and_leaves_nothing(
    name: str,
    run: Path,
    scenario: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    command, file, shown = COMMANDS[name]
    again = shutil.copytree(run, tmp_path / "again")
    out = tmp_path / "out"
    (tmp_path / "table.csv").write_text(TABLE)
    names = {"SCENARIO": scenario, "RUN": run, "AGAIN": again, "OUT": out, "TABLE.csv": tmp_path / "table.csv"}

    def filled(text: str) -> str:
        for each, path in names.items():
            text = text.replace(each, str(path))
        return text

    monkeypatch.setattr("sim.model.files.atomic._write_all", full())
    monkeypatch.setattr(Path, "write_bytes", full())
    assert status([filled(each) for each in command]) == 2
    said, err = capfd.readouterr()
    assert err.splitlines()[-1] == f"servecast: {filled(file)}: No space left on device"
    assert shown.lower() in said.lower()
    assert not out.exists()


def test_a_file_that_is_there_survives_a_full_disk(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.html"
    assert status(["report", str(run), "-o", str(page)]) == 0
    before = page.read_bytes()
    monkeypatch.setattr("sim.model.files.atomic._write_all", full(errno.EDQUOT))
    assert status(["report", str(run), "-o", str(page)]) == 2
    assert page.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"page.html", "run"}


def test_a_limit_on_the_size_of_files_is_a_complaint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        assert status(["report", str(run), "-o", str(tmp_path / "new" / "page.html")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capsys.readouterr().err == f"servecast: {tmp_path}/new/page.html: File too large\n"
    assert {p.name for p in tmp_path.iterdir()} == {"run"}


def test_a_full_stdout_is_named(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as nowhere:
        done = subprocess.run(
            [sys.executable, "-m", "scenarios", "schema"], stdout=nowhere, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert (done.returncode, done.stderr) == (2, "servecast: standard output: No space left on device\n")


def test_new_follows_no_link_to_what_is_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("mine")
    (tmp_path / "link.yaml").symlink_to(tmp_path / "mine.yaml")
    assert "not overwritten" in refused(["new", tmp_path / "link"], tmp_path, capfd)
    assert "not overwritten" in refused(["new", tmp_path / "mine.yaml"], tmp_path, capfd)


def test_an_import_that_cannot_be_read_back_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from sim.run import directory as runs

    whole = runs.request_records

    def spoilt(*arguments: object) -> object:
        return ({**record, "ended": -5.0} for record in whole(*arguments))  # type: ignore[arg-type]

    monkeypatch.setattr(runs, "request_records", spoilt)
    arguments = ["import", str(RESULTS), "-o", str(tmp_path / "new" / "run")]
    assert status(arguments) == 2
    out, err = capfd.readouterr()
    assert out == "" and f"servecast: {tmp_path}/new/run/requests.jsonl:1: ended: not written: " in err
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_in_the_middle_of_a_measurement_keeps_what_was_measured(
    server: tuple[Standin, Path], tmp_path: Path
) -> None:
    options = (
        "--set load.users=[2] --set load.seconds=60 --set workload.prompt_tokens=20 --set workload.output_tokens=8"
    )
    measure = f"{sys.executable} -m scenarios measure standin --url {server[0].url} -o {tmp_path}/run {options}"
    done = subprocess.run(["bash", "-c", f"ulimit -f 8; {measure}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert re.fullmatch(rf"servecast: {tmp_path}/run/\w+\.jsonl: File too large", done.stderr.splitlines()[-1])
    assert "--resume continues the run" in done.stderr
    assert "Traceback" not in done.stderr
    lines = (tmp_path / "run" / "requests.jsonl").read_bytes()
    assert lines.endswith(b"}\n")
    assert len([json.loads(line) for line in lines.splitlines()]) >= 1
    assert json.loads((tmp_path / "run" / "run.json").read_bytes())["stopped"].endswith("File too large")

"""Runs of servers that are not known to be the scenario's engine: measured, imported and shown, and forecast only when
the user says `--as`, with a warning at every number."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from servers import Scripted, Standin, quick_calibration, say, standin
from warned import texts

from scenarios.cli.main import status

pytestmark = pytest.mark.usefixtures("few_replays")
DATA = Path(__file__).parent.parent / "data" / "tgi-0.9.4-router-http"
SAMPLES = Path(__file__).parent / "samples"
SHORT = ("--set", "load.users=[1,2]", "--set", "load.seconds=1", "--set", "load.spawn_rate=20")
QUICK = ("--replicates", "19", "--jobs", "1")
SMALL = """
name: small
server: {max_batch_total_tokens: 20000, max_waiting_tokens: 15}
workload: {prompt_tokens: 60, output_tokens: 10}
load: {users: [1, 3], spawn_rate: 20, seconds: 2}
"""


def run(*arguments: str | Path) -> int:
    return status([str(argument) for argument in arguments])


def recorded(folder: Path, **head: Any) -> Path:
    """A real run of TGI 0.9.4, whose `run.json` says something else; None takes a key away."""
    shutil.copytree(DATA / "short", folder)
    file = folder / "run.json"
    said = json.loads(file.read_text()) | head
    file.write_text(json.dumps({key: value for key, value in said.items() if value is not ...}))
    return folder


def head(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of vLLM, with what is fitted to it when it is taken for TGI."""
    folder = tmp_path_factory.mktemp("vllm")
    recorded(folder / "run", info=None, engine={"name": "vllm", "version": "0.6.3", "source": "server"})
    assert run("calibrate", folder / "run", "--as", "tgi-0.9.4", "-o", folder / "calibration.json") == 0
    (folder / "small.yaml").write_text(SMALL + "calibration: calibration.json\nslo: {e2e_p95: 9}\n")
    return folder


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"info": None, "software": {}}, "nothing says"),
        ({"engine": None}, "nothing says"),
        ({"engine": {"name": "vllm", "version": "0.6.3", "source": "server"}}, "vllm 0.6.3"),
        ({"engine": {"name": "tgi", "version": "0.9.3", "source": "server"}}, "tgi 0.9.3"),
        ({"info": {"model_id": "m", "version": "1.0.3"}}, "tgi 1.0.3"),
        (
            {
                "info": None,
                "software": {},
                "scenario": {"name": "x", "server": {"engine": "sglang-0.4", "version": "0.4.1"}},
            },
            "sglang-0.4 0.4.1",
        ),
    ],
)
def test_a_run_of_another_engine_or_of_none_that_is_known_is_not_forecast(
    changed: dict[str, Any], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = recorded(tmp_path / "run", **changed)
    before = (folder / "run.json").read_bytes()
    quick_calibration(tmp_path)
    for asked in (
        ("calibrate", folder, "-o", tmp_path / "made.json"),
        ("compare", folder),
        ("compare", folder, "--calibration", tmp_path / "calibration.json"),
    ):
        assert run(*asked) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert named in line
        assert "--as tgi-0.9.4" in line
        assert str(folder) in line
    assert not (tmp_path / "made.json").exists()
    assert (folder / "run.json").read_bytes() == before


def test_runs_of_tgi_0_9_4_from_before_it_was_recorded_are_known_by_their_info(
    tmp_path: Path, no_fit_check: None
) -> None:
    assert "engine" not in head(DATA / "short")
    assert run("calibrate", DATA / "short", "-o", tmp_path / "c.json") == 0
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["engine"] == {"name": "tgi", "version": "0.9.4", "source": "server"}
    assert not any("--as" in text for text in texts(found["warnings"]))


def test_a_warning_stands_at_every_number_of_what_is_forecast_all_the_same(
    vllm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = json.loads((vllm / "calibration.json").read_text())
    assert made["engine"]["name"] == "vllm"  # what it is, not what it is taken for
    assert "vllm 0.6.3 and is taken for tgi-0.9.4 (--as)" in texts(made["warnings"])[0]
    small = vllm / "small.yaml"
    for command in ("simulate", "plan"):
        assert run(command, small, *QUICK) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "vllm 0.6.3" in line
        assert "--as tgi-0.9.4" in line
    assert run("simulate", small, "--as", "tgi-0.9.4", "--csv", *QUICK) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert rows
    assert all("vllm 0.6.3" in row["warning"] for row in rows)
    out = tmp_path / "out"
    assert run("simulate", small, "--as", "tgi-0.9.4", "-o", out, *QUICK) == 0
    shown = capsys.readouterr()
    assert "Warning: small has the step times of vllm 0.6.3" in " ".join(shown.out.split())
    assert "(--as)" in shown.err
    found = json.loads((out / "small" / "forecast.json").read_text())
    assert found["taken_as"] == "tgi-0.9.4"
    assert "vllm 0.6.3" in texts(found["warnings"])[0]
    assert run("report", out / "small", "-o", tmp_path / "page.html") == 0
    assert "vllm 0.6.3" in (tmp_path / "page.html").read_text()


def test_a_comparison_carries_the_warning_too(vllm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calibrated = ("--calibration", vllm / "calibration.json", "--as", "tgi-0.9.4", *QUICK)
    assert run("compare", vllm / "run", *calibrated, "-o", tmp_path / "out") == 0
    assert "Warning:" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["taken_as"] == "tgi-0.9.4"
    assert "vllm 0.6.3" in texts(found["warnings"])[0]
    assert "vllm 0.6.3" in (tmp_path / "out" / "report.html").read_text()
    # a run of the real engine does not make a calibration of another one fit
    assert run("compare", DATA / "short", "--calibration", vllm / "calibration.json", *QUICK) == 2
    assert "vllm 0.6.3" in capsys.readouterr().err
    # and nothing is held against a forecast that was made beforehand
    users = ("--set", "load.users=[1,2]")
    assert run("simulate", "standin", *users, "-o", tmp_path / "g", *QUICK) == 0
    capsys.readouterr()
    assert run("compare", vllm / "run", tmp_path / "g" / "standin") == 2
    assert "--as tgi-0.9.4" in capsys.readouterr().err
    assert run("compare", vllm / "run", tmp_path / "g" / "standin", "--as", "tgi-0.9.4", "--csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert all("vllm 0.6.3" in row["warning"] for row in rows)


def test_flags_that_are_assumed_are_those_of_a_scenario_that_is_named(vllm: Path, tmp_path: Path) -> None:
    (tmp_path / "flags.yaml").write_text(SMALL.replace("15", "7"))
    taken = ("calibrate", vllm / "run", "-o", tmp_path / "c.json", "--as")
    assert run(*taken, tmp_path / "flags.yaml") == 1  # the run was scheduled by other flags: its check shows that
    (server,) = json.loads((tmp_path / "c.json").read_text())["server"]
    assert (server["max_waiting_tokens"], server["sources"]["max_waiting_tokens"]) == (7, "scenario")
    assert server["sources"]["max_batch_prefill_tokens"] == "default"
    assert run("calibrate", vllm / "run", "-o", tmp_path / "d.json", "--as", "tgi-0.9") == 2
    assert run("calibrate", "llama2-70b", "-o", tmp_path / "d.json", "--as", "tgi-0.9.4") == 2
    assert not (tmp_path / "d.json").exists()


def test_runs_of_several_engines_are_not_one_machine(vllm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("calibrate", vllm / "run", DATA / "short", "--as", "tgi-0.9.4") == 2
    assert "vllm 0.6.3" in capsys.readouterr().err


def test_lengths_may_come_from_a_run_of_any_engine(vllm: Path, tmp_path: Path) -> None:
    quick_calibration(tmp_path)
    text = SMALL.replace("prompt_tokens: 60, output_tokens: 10", f"empirical: {vllm}/run/requests.jsonl.gz")
    (tmp_path / "s.yaml").write_text(text + "calibration: calibration.json\n")
    assert (vllm / "run" / "requests.jsonl.gz").exists()
    assert run("simulate", tmp_path / "s.yaml", "--set", "server.max_input_length=1000", *QUICK) == 0


def test_an_imported_run_names_no_engine_and_no_flags_of_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_fit_check: None
) -> None:
    out = tmp_path / "run"
    assert run("import", SAMPLES / "vllm.json.gz", "-o", out) == 0
    said = head(out)
    assert (said["engine"], said["flags"]) == (None, {})
    assert "server" not in said["scenario"]
    assert "tgi" not in (capsys.readouterr().err + json.dumps(said)).lower()
    assert run("report", out, "-o", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert "an unknown engine" in page
    assert "max_batch_prefill_tokens" not in page
    assert run("compare", out, out, "--json") == 0
    assert run("calibrate", out, "-o", tmp_path / "c.json") == 2
    assert run("calibrate", out, "-o", tmp_path / "c.json", "--as", "tgi-0.9.4") in (0, 1)
    assert json.loads((tmp_path / "c.json").read_text())["engine"] is None


@pytest.fixture(scope="module")
def tgi(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with standin("--calibration", str(quick_calibration(tmp_path_factory.mktemp("tgi")))) as process:
        yield process


def test_a_measured_run_says_its_engine_and_where_each_flag_is_from(tgi: Standin, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(SMALL)
    asked = ("measure", tmp_path / "s.yaml", "--url", tgi.url, "-o", tmp_path / "run", *SHORT)
    assert run(*asked, "--set", "server.requires_padding=false") == 0
    said = head(tmp_path / "run")
    assert said["engine"] == {"name": "tgi", "version": "0.9.4", "source": "server"}
    assert said["flags"]["max_waiting_tokens"] == {"value": 20, "source": "server"}  # not the 15 of the scenario
    assert said["flags"]["max_batch_prefill_tokens"] == {"value": 4096, "source": "default"}
    assert said["flags"]["requires_padding"] == {"value": False, "source": "scenario"}
    assert "written" not in said["scenario"]


def test_a_run_is_not_resumed_on_another_engine(
    tgi: Standin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.yaml").write_text(SMALL)
    asked = ("measure", tmp_path / "s.yaml", "-o", tmp_path / "run", "--set", "load.users=[1]", *SHORT[2:], "--url")
    assert run(*asked, tgi.url) == 0
    before = (tmp_path / "run" / "run.json").read_bytes()
    server = openai(owner="vllm")
    try:
        assert run(*asked, server.url, "--resume") == 2
    finally:
        server.close()
    assert "begun on tgi 0.9.4, and vllm 0.6.3 answers now" in capsys.readouterr().err
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    assert run(*asked, tgi.url, "--resume") == 0


def test_runs_of_different_engines_are_compared_and_that_is_said(
    vllm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("compare", vllm / "run", DATA / "short", "--json") == 0
    warnings = texts(json.loads(capsys.readouterr().out)["warnings"])
    assert "the first is of vllm 0.6.3, the second of tgi 0.9.4" in warnings


def openai(*, owner: str) -> Scripted:
    """A server that speaks OpenAI's completions, two tokens an answer, and says who owns its model."""

    def answer(body: bytes, kind: bytes = b"application/json") -> bytes:
        return b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n%s" % (kind, len(body), body)

    missing = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"
    models = msgspec.json.encode({"data": [{"id": "m", "owned_by": owner}]})
    usage = b'"usage":{"prompt_tokens":60,"completion_tokens":10,"total_tokens":70}'
    events = b"".join(b'data: {"choices":[{"text":" w","finish_reason":null}]}\n\n' for _ in range(9))
    events += b'data: {"choices":[{"text":" w","finish_reason":"length"}],%s}\n\ndata: [DONE]\n\n' % usage
    whole = b'{"choices":[{"text":" w","finish_reason":"length"}],%s}' % usage

    class Server(Scripted):
        def _serve(self, connection: Any) -> None:
            self.scripts = [self.reply]
            super()._serve(connection)

        def reply(self, connection: Any) -> None:
            path, body = self.heads[-1].split()[1], self.bodies[-1]
            if path == b"/v1/models":
                sent = answer(models)
            elif path == b"/version":
                sent = answer(b'{"version":"0.6.3"}')
            elif path == b"/v1/completions":
                sent = answer(events, b"text/event-stream") if b'"stream":true' in body else answer(whole)
            else:
                sent = missing
            say(sent)(connection)

    return Server(say(b""))


@pytest.mark.parametrize(
    ("owner", "engine"), [("vllm", {"name": "vllm", "version": "0.6.3", "source": "server"}), ("somebody", None)]
)
def test_another_server_is_measured_and_kept_and_then_not_forecast(
    owner: str, engine: dict[str, str] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.yaml").write_text(SMALL)
    server = openai(owner=owner)
    try:
        assert run("doctor", tmp_path / "s.yaml", "--url", server.url) in (0, 1)
        assert "needs --as tgi-0.9.4" in " ".join(capsys.readouterr().out.split())
        asked = ("run", tmp_path / "s.yaml", "--url", server.url, "-o", tmp_path / "out", *SHORT)
        assert run(*asked, *QUICK) == 2
    finally:
        server.close()
    assert "--as tgi-0.9.4" in capsys.readouterr().err.splitlines()[-1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["run"]
    said = head(tmp_path / "out" / "run")
    assert (said["engine"], said["flags"]) == (engine, {})
    assert "server" not in said["scenario"]
    assert "tgi" not in json.dumps(said).lower()
    assert said["rungs"][-1]["status"] == "complete"

"""A calibration simulates what it was fitted to: it says how far off it is, and fails where it does not show it."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from warned import texts

from scenarios.cli.main import status
from scenarios.compare import fit_check
from scenarios.compare.fit_check import check_published
from scenarios.load.scenario import load
from sim.model.calibration import Calibration, Parameter, read_calibration

pytestmark = pytest.mark.usefixtures("few_replays")
RECORDED = Path("data/tgi-0.9.4-cpu/long-again")
SHIPPED = Path("scenarios/shipped/data/llama2-70b.calibration.json")
TIMES = ("scheduled", "sent", "ended", "first_token", "last_token")
MARKS = ("start", "ramped", "settled", "end")


def copied(
    folder: Path, head: Callable[[dict[str, Any]], None], request: Callable[[dict[str, Any]], None] = lambda r: None
) -> Path:
    """A copy of the recorded run with changes to its head and to every request."""
    shutil.copytree(RECORDED, folder)
    said = json.loads((folder / "run.json").read_bytes())
    head(said)
    (folder / "run.json").write_text(json.dumps(said))
    lines = gzip.decompress((folder / "requests.jsonl.gz").read_bytes()).splitlines()
    (folder / "requests.jsonl.gz").unlink()
    with (folder / "requests.jsonl").open("wb") as out:
        for line in lines:
            record = json.loads(line)
            request(record)
            out.write(json.dumps(record).encode() + b"\n")
    return folder


def test_a_right_calibration_passes_and_keeps_its_check_and_the_warnings_of_its_rungs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    def warn(head: dict[str, Any]) -> None:
        for rung in head["rungs"][:2]:
            rung["doubts"] = ["the window is shorter than 3 answers"]  # as the recorded file of format 1 has them

    run, file = copied(tmp_path / "run", warn), tmp_path / "c.json"
    assert status(["calibrate", str(run), "-o", str(file), "--jobs", "1"]) == 0
    out, err = capfd.readouterr()
    assert "Check of the fit: the loads it was fitted to, simulated again (tgi-cpu-long-again)" in " ".join(out.split())
    (row,) = [line.split() for line in out.splitlines() if line.startswith("16 users")]
    assert row[3][0] in "+-" and row[4] == "%", row
    assert "check failed" not in err
    written = json.loads(file.read_bytes())
    check = written["check"]
    assert check["passed"] and check["missed"] <= check["allowed"] < len(check["rows"])
    assert [(row["at"], row["metric"]) for row in check["rows"]][:3] == [
        ("1 user", "e2e_mean"),
        ("1 user", "ttft_p50"),
        ("1 user", "output_tokens_per_s"),
    ]
    assert read_calibration(file).check is not None
    assert "tgi-cpu-long-again, at 1, 4: the window is shorter than 3 answers" in texts(written["warnings"])


def drifted(folder: Path) -> Path:
    """A copy of the recorded run whose machine became 1.6 times as slow in the middle."""
    since = json.loads((RECORDED / "run.json").read_bytes())["rungs"][2]["start"]

    def late(values: dict[str, Any], names: tuple[str, ...]) -> None:
        for name in names:
            t = values.get(name)
            values[name] = t if t is None or t < since else since + 1.6 * (t - since)

    def of_request(record: dict[str, Any]) -> None:
        late(record, TIMES)
        record["token_times"] = [t if t < since else since + 1.6 * (t - since) for t in record["token_times"]]

    def of_head(head: dict[str, Any]) -> None:
        for rung in head["rungs"]:
            late(rung, MARKS)

    return copied(folder, of_head, of_request)


def test_a_machine_that_changed_on_the_way_fails_by_name_and_its_forecasts_say_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    run, file = drifted(tmp_path / "drifted"), tmp_path / "c.json"
    assert status(["calibrate", str(run), "-o", str(file), "--jobs", "1"]) == 1
    out, err = capfd.readouterr()
    assert out.splitlines()[-1] == str(file)
    failed = [line for line in err.splitlines() if line.startswith("check failed: ")]
    assert any("users: e2e_mean" in line and "outside the 90 % band" in line for line in failed), failed
    assert not read_calibration(file).check.passed  # type: ignore[union-attr]
    assert status(["compare", str(RECORDED), "--calibration", str(file), "--replicates", "19", "--jobs", "1"]) == 0
    assert "does not reproduce what it was fitted to" in capfd.readouterr().err


def test_run_fails_too_and_keeps_all_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    monkeypatch.setattr("measure.ladder.session.measure", lambda scenario, url, place, **_: drifted(place))
    scenario = tmp_path / "cpu.yaml"
    recorded = json.loads((RECORDED / "run.json").read_bytes())["scenario"]
    recorded = {key: recorded[key] for key in ("server", "workload")}
    scenario.write_text(json.dumps({"name": "cpu", **recorded, "load": {"users": [1, 4], "seconds": 20}}))
    quick = ["--replicates", "19", "--jobs", "1", "--no-advise"]
    assert status(["run", str(scenario), "--url", "http://127.0.0.1:1", "-o", str(out), *quick]) == 1
    shown, said = capfd.readouterr()
    assert "check failed: " in said and "outside the 90 % band" in said
    assert shown.splitlines()[-1] == str(out / "report.html")
    assert not read_calibration(out / "calibration.json").check.passed  # type: ignore[union-attr]
    assert all((out / name).exists() for name in ("comparison.json", "forecast.json", "report.html"))


def test_published_figures_are_simulated_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fit_check, "FIRST", 9)
    right, article = read_calibration(SHIPPED), load("llama2-70b")
    found = check_published(right, article)
    wrong = check_published(slower(right, 1.5), article)
    assert found.passed and len(found.rows) == len(article.published)
    assert not wrong.passed
    assert any(row.far and row.metric == "e2e_mean" for row in wrong.rows)


def slower(calibration: Calibration, factor: float) -> Calibration:
    """The calibration with another constant of a decode step, in every draw."""
    b0 = calibration.parameters["b0"]
    changed = Parameter(value=factor * b0.value, stderr=b0.stderr, low=factor * b0.low, high=factor * b0.high)
    return msgspec.structs.replace(
        calibration,
        parameters=calibration.parameters | {"b0": changed},
        draws=calibration.draws | {"b0": [factor * x for x in calibration.draws["b0"]]},
    )


def test_a_table_that_no_form_follows_fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    rows = ["phase,sequences,tokens_per_sequence,ms"]
    for i, n in enumerate((1, 2, 4, 8, 16, 32)):  # two machines in one table, one five times as slow
        rows += [f"prefill,{n},500,{n * (60, 300)[i % 2]}", f"decode,{n},500,{20 + n}"]
    table = tmp_path / "two.csv"
    table.write_text("\n".join(rows) + "\n")
    assert status(["calibrate", str(table), "-o", str(tmp_path / "c.json")]) == 1
    _, err = capfd.readouterr()
    assert "check failed: table, 95 % of 6 rows: prefill times is off by" in err
    assert (tmp_path / "c.json").exists()
    assert status(["calibrate", "data/argonne_llama2_70b_4xa100_40gb.csv"]) == 0
    assert "batch times" in capfd.readouterr().out

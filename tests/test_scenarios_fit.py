"""`servecast calibrate` as a user meets it: what it prints, refuses and advises."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path

import pytest

from scenarios.cli.main import status

pytestmark = pytest.mark.usefixtures("few_replays")
QUICK = ["--replicates", "19", "--jobs", "1", "--set", "load.seconds=5"]


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Advice from fewer simulations: what it says is worded the same."""
    for name, number in (("DRAWS", 20), ("TRUTHS", 4), ("EACH", 5)):
        monkeypatch.setattr(f"calibrate.next_measurement.{name}", number)


def test_calibrate_a_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    table = "data/splitwise_llama2_70b_a100_tp4_tp8_median.csv"
    assert status(["calibrate", table, "-o", str(tmp_path / "c.json")]) == 0
    out, err = capfd.readouterr()
    assert re.search(r"^a1 +prefill, per prompt token$", out, re.MULTILINE) and str(tmp_path / "c.json") in out
    assert max(map(len, out.splitlines()[:-1])) <= 80
    assert "warning: " in err
    sets = ["--set", f"calibration={tmp_path / 'c.json'}", "--set", "server.max_batch_total_tokens=36000"]
    assert status(["simulate", "llama2-70b", *sets, *QUICK]) == 0


def test_a_calibration_needs_the_name_of_a_file_and_every_run_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    run = "data/tgi-0.9.4-cpu/mixed"
    assert status(["calibrate", run, "-o", str(tmp_path)]) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"servecast: Invalid value for '-o' / '--output': File '{tmp_path}' is a directory.")
    assert status(["calibrate", run, f"{run}/../mixed"]) == 2
    assert capfd.readouterr().err == f"servecast: {run}/../mixed: named twice; expected every source once\n"


@pytest.mark.usefixtures("few_draws")
def test_a_calibration_says_what_is_wrong_with_its_runs_and_advises_on_recorded_requests(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    folder = tmp_path / "mixed"
    shutil.copytree("data/tgi-0.9.4-cpu/mixed", folder)
    zipped = folder / "requests.jsonl.gz"
    (folder / "requests.jsonl").write_bytes(gzip.decompress(zipped.read_bytes()) + b'{"id": 9')
    zipped.unlink()
    head = json.loads((folder / "run.json").read_bytes())
    head["scenario"]["workload"] = {"empirical": "gone.jsonl"}
    (folder / "run.json").write_text(json.dumps(head))
    assert status(["calibrate", str(folder), "--advise", "--jobs", "1"]) == 0
    out, err = capfd.readouterr()
    assert "warning: tgi-cpu-mixed: requests.jsonl: the last line was torn and is left out\n" in err
    assert re.search(r"Measure \d+ users of the same mix for (60|180) s", out)


@pytest.mark.usefixtures("few_draws")
def test_advice_on_a_table_needs_a_question_and_on_a_scenario_is_for_it_as_it_was_changed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    assert status(["calibrate", "data/lmdeploy_v010a1_a100_static.csv", "--advise"]) == 2
    said = "servecast: --advise: expected --question SCENARIO with it: a table does not say what it is for\n"
    assert capfd.readouterr().err == said
    table = Path("data/lmdeploy_v010a1_a100_static.csv").resolve()
    file = tmp_path / "asked.yaml"
    file.write_text(
        f"format: 2\nname: asked\ntable: {table}\nserver: {{max_batch_total_tokens: 36000}}\n"
        "workload: {prompt_tokens: 500, output_tokens: 100}\nload: {users: [2]}\n"
    )
    assert status(["calibrate", str(file), "--advise", "--set", "load.users=[3]", "--jobs", "1"]) == 0
    assert "at 3 users of 500/100 tokens" in capfd.readouterr().out


def test_an_open_loop_question_is_refused_before_anything_is_fitted_or_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    written = tmp_path / "calibration.json"
    asked = ["calibrate", "data/tgi-0.9.4-cpu/long-again", "--question", "llama2-70b-poisson", "-o", str(written)]
    assert status(asked) == 2
    out, err = capfd.readouterr()
    assert "llama2-70b-poisson: load.users: expected numbers of users" in err
    assert not out and not written.exists()


def test_levels_of_batches_that_were_not_seen_are_marked(capfd: pytest.CaptureFixture[str]):
    assert status(["calibrate", "data/tgi-0.9.4-cpu/short-again"]) == 0
    out = capfd.readouterr().out
    assert "* Extrapolated: no batch of more than 16 requests was measured." in out
    marks = dict(re.findall(r"^level_(\d+)(\*?) ", out, re.MULTILINE))
    assert {int(size) > 16 for size, mark in marks.items() if mark} == {True}
    assert {int(size) > 16 for size, mark in marks.items() if not mark} == {False}

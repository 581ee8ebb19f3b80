"""Files of format 1, which servecast wrote before its vocabulary changed, are read as those of today."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from scenarios.cli.main import status
from scenarios.compare.saved import read_saved
from scenarios.forecast.forecast import Forecast
from scenarios.load.scenario import load
from sim.cluster.ladder import climb
from sim.model.calibration import read_calibration
from sim.model.errors import BadInput
from sim.model.files.format import FORMAT
from sim.model.machine import draw_machine
from sim.model.steps import STEP_COLUMNS
from sim.results import metrics
from sim.run import read_run, write_run
from sim.steptime.linear import MEANING, Line, affine
from sim.steptime.work import NOTHING, StepWork

OLD = Path(__file__).parent / "samples" / "format-1"
CALIBRATION = OLD / "calibration.json"


def test_every_kind_of_file_is_read():
    scenario, calibration = load(OLD / "small.yaml"), read_calibration(OLD / "calibration.json")
    assert len(scenario.warnings) == len(calibration.warnings) == 1
    assert scenario.format == calibration.format == FORMAT and calibration.source.kind == "assumed"
    forecast, comparison, run = (read_saved(OLD / name) for name in ("forecast.json", "comparison.json", "run"))
    assert isinstance(forecast, Forecast) and forecast.scenario.format == FORMAT
    assert forecast.warnings == [*scenario.warnings, *calibration.warnings]
    assert forecast.latency_onset.rps.value and forecast.bottleneck[0].binds == "decode compute"
    assert comparison.format == FORMAT and comparison.warnings
    assert run.scenario.warnings == scenario.warnings


def test_what_is_written_again_is_of_today(tmp_path: Path):
    old = [str(OLD / "small.yaml"), "--replicates", "19", "--jobs", "1", "--set", "load.users=[1]"]
    assert status(["simulate", *old, "-o", str(tmp_path)]) == 0
    for name in ("forecast.json", "run/run.json"):
        written = json.loads((tmp_path / "small" / name).read_bytes())
        assert written["format"] == written["scenario"]["format"] == FORMAT
        assert not {"doubts", "binding", "takeoff"} & set(written) | {"doubts"} & set(written["scenario"])


def test_an_unknown_format_is_refused(tmp_path: Path):
    for name in ("calibration.json", "forecast.json", "comparison.json", "small.yaml"):
        text = (OLD / name).read_text(encoding="utf-8")
        future = tmp_path / name
        future.write_text(text.replace('"format": 1', '"format": 3', 1).replace("format: 1", "format: 3"))
        read = {"calibration.json": read_calibration, "small.yaml": load}.get(name, read_saved)
        with pytest.raises(BadInput, match="format: expected 1 or 2, found 3"):
            read(future)


class _Squares:
    """The affine step time as format 1 had it: a prefill takes a1 Σ n + a2 Σ n²."""

    def __init__(self, values: dict[str, float]):
        self.a1, self.a2 = values["a1"], values["a2"]
        self.others = affine(**{name: x for name, x in values.items() if name in MEANING and name not in ("a1", "a2")})

    def line(self, work: StepWork, growth: StepWork = NOTHING, steps: int = 1) -> Line:
        squares = 2 * work.prefill_attention - work.prefill_tokens
        line = self.others.line(work, growth, steps)
        return Line(line.first + self.a1 * work.prefill_tokens + self.a2 * squares, line.growth, line.steps)


def test_step_times_stay_where_attention_counts_pairs_and_not_squares():
    values = {name: said["value"] for name, said in json.loads(CALIBRATION.read_text())["parameters"].items()}
    calibration = read_calibration(CALIBRATION)
    assert calibration.values == pytest.approx(read_calibration("measure/standin/calibration.json").values, rel=1e-12)
    scenario = load(OLD / "small.yaml")
    model = draw_machine(calibration, scenario.server, None)
    before, after = (
        metrics.table(climb(scenario, replace(model, step_time=form), (1, 2)))
        for form in (_Squares(values), model.step_time)
    )
    pd.testing.assert_frame_equal(before, after, rtol=1e-9, atol=0)


def test_every_draw_keeps_its_prefill_even_if_its_linear_part_becomes_negative(tmp_path: Path):
    raw = json.loads(CALIBRATION.read_text())
    raw["draws"] = {name: [said["value"]] * 2 for name, said in raw["parameters"].items() if name != "a2"}
    raw["parameters"]["a2"] |= dict.fromkeys(("value", "low", "high"), 1e-4)
    (tmp_path / "c.json").write_text(json.dumps(raw))
    read = read_calibration(tmp_path / "c.json")
    assert read.row(1)["a1"] == pytest.approx(9e-5 - 1e-4)
    squares = _Squares({name: said["value"] for name, said in raw["parameters"].items()})
    for values in (read.values, read.row(0)):
        work = StepWork(1, 70, 2, 50 * 51 // 2 + 20 * 21 // 2, 50)
        assert affine(**values).line(work).first == pytest.approx(squares.line(work).first, rel=1e-12)


def test_steps_of_format_1_are_those_of_the_same_run_written_again(tmp_path: Path):
    run = read_run(OLD / "run")
    again = read_run(write_run(run, tmp_path / "run", steps=True))
    assert run.steps is not None and again.steps is not None and set(STEP_COLUMNS) <= set(again.steps)
    for name in STEP_COLUMNS:
        assert (run.steps[name] == again.steps[name]).all(), name
    line = json.loads((tmp_path / "run" / "steps.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert set(StepWork.__struct_fields__) | {"replica"} <= set(line)
    assert (line["prefill_tokens"], line["prefill_attention"], line["replica"]) == (400, 400 * 401 // 2, 0)

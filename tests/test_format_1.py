"""Files of format 1, which servecast wrote before its vocabulary changed, are read as those of today."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scenarios.cli.main import status
from scenarios.forecast.forecast import Forecast
from scenarios.load.scenario import load
from scenarios.report.page import read_item
from sim.model.calibration import read_calibration
from sim.model.errors import BadInput
from sim.model.files.format import FORMAT

OLD = Path(__file__).parent / "samples" / "format-1"


def test_every_kind_of_file_is_read():
    scenario, calibration = load(OLD / "small.yaml"), read_calibration(OLD / "calibration.json")
    assert len(scenario.warnings) == len(calibration.warnings) == 1
    assert scenario.format == calibration.format == FORMAT and calibration.source.kind == "assumed"
    forecast, comparison, run = (read_item(OLD / name) for name in ("forecast.json", "comparison.json", "run"))
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
        read = {"calibration.json": read_calibration, "small.yaml": load}.get(name, read_item)
        with pytest.raises(BadInput, match="format: expected 1 or 2, found 3"):
            read(future)

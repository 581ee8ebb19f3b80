"""When a client is too late to time a server: by the lag of its canary alone, however short the gaps between tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ladders import climb, scenario
from servers import Standin
from warned import texts

from scenarios.cli.main import status

pytestmark = pytest.mark.usefixtures("no_fit_check")
RECORDED = Path(__file__).parent.parent / "data" / "tgi-0.9.4-router-http" / "short"


def flagged(folder: Path, *rungs: dict[str, Any]) -> Path:
    """The recorded run, with these as what the client saw of itself at its first rungs."""
    shutil.copytree(RECORDED, folder)
    head = json.loads((folder / "run.json").read_text())
    for rung, said in zip(head["rungs"], rungs, strict=False):
        rung.update(said)
    (folder / "run.json").write_text(json.dumps(head))
    return folder


def calibrated(run: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    out = run.with_suffix(".json")
    capsys.readouterr()
    status(["calibrate", str(run), "-o", str(out)])
    return json.loads(out.read_text()), capsys.readouterr().err


def test_a_client_1_4_ms_late_beside_gaps_of_21_ms_keeps_its_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    healthy = {"canary_p99_ms": 1.4, "client_cpu": 0.03}
    plain, _ = calibrated(flagged(tmp_path / "plain"), capsys)
    # earlier versions wrote client_limited: true for a lag of more than 5 % of a gap
    kept, said = calibrated(flagged(tmp_path / "kept", *[healthy | {"client_limited": True}] * 2), capsys)
    late, complained = calibrated(flagged(tmp_path / "late", *[{"canary_p99_ms": 20.1}] * 2), capsys)
    assert kept["residuals"] == plain["residuals"] and kept["parameters"] == plain["parameters"]
    assert "too busy" not in said
    assert late["residuals"]["decode"]["rows"] < plain["residuals"]["decode"]["rows"]
    assert "too busy" in complained


def test_a_rung_is_client_limited_by_a_lag_of_20_ms_and_suspect_by_one_of_5(
    server: tuple[Standin, Path], tmp_path: Path
) -> None:
    run, said = climb(scenario(users=[1, 2, 4], seconds=0.5), server[0].url, tmp_path / "run")
    for rung in run.rungs:  # gaps between tokens are 3 ms, so that any healthy lag is more than 5 % of one
        lag = rung.extra["canary_p99_ms"]
        assert rung.extra["client_limited"] == (lag > 20)
        assert any("client-limited" in warning for warning in texts(rung.warnings)) == (lag > 20)
        assert any("suspect" in warning for warning in texts(rung.warnings)) == (5 < lag <= 20)
    assert ("client-limited" in said) == any(rung.extra["client_limited"] for rung in run.rungs)

"""A what-if across engines is refused by name, unless the user says how far the step times may be off."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from scenarios.cli.main import status
from scenarios.forecast.transfer import transferred
from sim.model.calibration import Calibration, Parameter, Source
from sim.model.identity import Identity, NotTheEngine
from sim.run import read_run, taken_as

DATA = Path(__file__).parent.parent / "data"
VALUES = {"a0": 0.004, "a1": 1e-5, "b0": 0.003, "b1": 1e-4, "max_batch_total_tokens": 20000.0}
SCENARIO = """
name: what-if
server: {engine: vllm-v1, max_num_batched_tokens: 2048, num_gpu_blocks: 1000}
workload: {prompt_tokens: 100, output_tokens: 20}
load: {users: [2], spawn_rate: 20, seconds: 4}
calibration: tgi.json
"""
QUICK = ("--replicates", "19", "--jobs", "1")


def of_tgi() -> Calibration:
    parameters = {name: Parameter(value=v, stderr=0.0, low=v, high=v) for name, v in VALUES.items()}
    engine = Identity(name="tgi", version="0.9.4")
    return Calibration(source=Source(kind="run"), model="affine", parameters=parameters, engine=engine)


def test_step_times_of_tgi_are_no_vllms_without_an_uncertainty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tgi.json").write_bytes(msgspec.json.encode(of_tgi()))
    (tmp_path / "s.yaml").write_text(SCENARIO)
    asked = ["simulate", str(tmp_path / "s.yaml"), *QUICK]
    for more in ((), ("--as", "vllm-v1")):
        assert status([*asked, *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "two constants do not define a mixed step" in line and "--as vllm-v1 --transfer 0.3" in line
    assert status([*asked, "--transfer", "0.3"]) == 2
    assert "expected only with --as" in capsys.readouterr().err
    bands = []
    for spread in ("0.01", "0.3"):
        assert status([*asked, "--as", "vllm-v1", "--transfer", spread, "--json"]) == 0
        out, err = capsys.readouterr()
        found = json.loads(out)
        (row,) = (row for row in found["curves"] if row["metric"] == "e2e_mean")
        bands.append((row["high"] - row["low"]) / row["value"])
        assert "taken for vllm-v1 (--as)" in err and found["taken_as"] == "vllm-v1"
    assert bands[0] < 0.1 < 0.5 < bands[1] < 2.0  # 90 %: ±1.645 · 0.3, of two factors of which decode's counts most


def test_nor_is_a_run_of_vllm_compared_with_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tgi.json").write_bytes(msgspec.json.encode(of_tgi()))
    run = str(DATA / "vllm-cpu" / "long-chunk")
    assert status(["compare", run, "--calibration", str(tmp_path / "tgi.json"), "--as", "vllm-v1", *QUICK]) == 2
    assert "two constants do not define a mixed step" in capsys.readouterr().err


def test_prefill_and_decode_have_factors_of_their_own() -> None:
    wide = transferred(of_tgi(), 0.3, 1)
    draws = {name: np.log(np.array(values) / VALUES[name]) for name, values in wide.draws.items()}
    assert np.std(draws["a1"]) == pytest.approx(0.3, rel=0.1) and np.std(draws["b0"]) == pytest.approx(0.3, rel=0.1)
    assert np.allclose(draws["a0"], draws["a1"]) and np.allclose(draws["b0"], draws["b1"])
    assert abs(np.corrcoef(draws["a0"], draws["b0"])[0, 1]) < 0.1
    assert not draws["max_batch_total_tokens"].any()
    assert transferred(of_tgi(), 0.3, 1) == wide


def test_a_run_of_one_engine_is_not_followed_as_one_of_another() -> None:
    run = read_run(DATA / "tgi-0.9.4-router-http" / "short")
    with pytest.raises(NotTheEngine, match=r"served by tgi 0\.9\.4, whose schedule is another than that of vllm-v1"):
        taken_as(run, "vllm-v1")
    assert taken_as(run, "tgi-0.9.4") is run

"""Residuals of single steps: those the fit had, and those that a wrong model shows."""

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from warned import texts

from calibrate.regression.residuals import residuals
from calibrate.schedule.schedule import schedule_of
from calibrate.sources.streamed import calibrate_runs
from sim.model.calibration import Calibration
from sim.model.errors import NotEnoughData
from sim.run import Run, read_run

DATA = Path(__file__).parent.parent / "data"


@pytest.mark.parametrize("name", ["tgi-0.9.4-cpu/mixed", "tgi-0.9.4-cpu/long", "tgi-0.9.4-router-http/long"])
def test_they_are_what_the_fit_left_over(name):
    run = read_run(DATA / name)
    calibration = calibrate_runs([run])
    table = residuals(run, calibration)
    assert table["time"].is_monotonic_increasing
    for kind, mine in table.groupby("kind"):
        known = calibration.residuals[str(kind)]
        assert len(mine) == known.rows
        assert np.sqrt(((mine["seconds"] - mine["predicted"]) ** 2).mean()) == pytest.approx(known.rms, rel=1e-3)
        assert mine["relative"].abs().quantile(0.95) == pytest.approx(known.p95_relative, rel=1e-3)


@pytest.fixture(scope="module")
def short() -> Run:
    return read_run(DATA / "tgi-0.9.4-router-http" / "short")


@pytest.fixture(scope="module")
def fitted(short: Run) -> Calibration:
    return calibrate_runs([short])


def test_a_slower_model_is_wrong_by_as_much(short, fitted):
    decode = {k: msgspec.structs.replace(p, value=2 * p.value) for k, p in fitted.parameters.items() if k[0] in "bcf"}
    wrong = msgspec.structs.replace(fitted, parameters=fitted.parameters | decode)
    one, two = residuals(short, fitted), residuals(short, wrong)
    plain = one["kind"] == "decode"
    assert (1 + two["relative"][plain]).to_numpy() == pytest.approx((1 + one["relative"][plain]).to_numpy() / 2)


def test_they_can_be_asked_of_some_rungs(short, fitted):
    some = residuals(short, fitted, rungs=[1, 3])
    assert set(some["rung"]) == {1, 3}
    every = residuals(short, fitted)
    assert len(some) == every["rung"].isin([1, 3]).sum()
    assert len(every) <= len(schedule_of(short).steps)


def test_a_run_without_tokens_has_none(short, fitted):
    with pytest.raises(NotEnoughData, match="no token times"):
        residuals(replace(short, token_times=None), fitted)


def test_rungs_of_a_busy_client_are_left_out_unless_no_other_was_asked_for(short):
    busy = [replace(rung, extra={"client_limited": i < 2}) for i, rung in enumerate(short.rungs)]
    run = replace(short, rungs=busy)
    calibration = calibrate_runs([run], rungs=[[0, 1]])
    assert any("too busy to time itself" in warning for warning in texts(calibration.warnings))
    assert set(residuals(run, calibration, rungs=[0, 1])["rung"]) == {0, 1}
    assert set(residuals(run, calibration, rungs=[1, 2, 3])["rung"]) == {2, 3}
    assert set(residuals(run, calibration, rungs=[1, 2])["rung"]) == {1, 2}  # one load shows no growth with the batch


def test_a_fragment_of_a_rung_does_not_stand_in_for_busy_ones(short, fitted):
    """Resumed after an interrupt, the aborted start of a rung is the only one that nobody called busy."""
    first, *rest = short.rungs
    fragment = replace(first, end=first.settled, extra={})
    rungs = [fragment, *(replace(rung, extra={"client_limited": True}) for rung in rest)]
    rungs[1] = replace(rungs[1], start=first.start + 8.0)
    calibration = calibrate_runs([replace(short, rungs=rungs)])
    assert calibration.residuals["decode"].rows > 0.9 * fitted.residuals["decode"].rows
    assert any("nearly every load used" in warning for warning in texts(calibration.warnings))

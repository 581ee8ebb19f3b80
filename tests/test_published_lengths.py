"""Figures of servers that return all they are asked, and other figures than an article's of TGI 0.9.4."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from warned import texts

from calibrate.sources.published import calibrate_published
from scenarios.cli.main import status
from scenarios.forecast.simulate import simulate
from scenarios.load.scenario import load
from sim.model.scenario import Figure

SAMPLE = "tests/samples/published-mistral.yaml"


def test_lengths_that_came_back_come_back_and_published_loads_are_reproduced() -> None:
    """2.09 requests/s of 100 tokens are 209 tokens/s, and 6.44 are 644: nothing was cut off."""
    scenario = load(SAMPLE, "load.users=[4, 16]", "load.seconds=20")
    calibration = calibrate_published(scenario, 1, simulations=150, draws=60)
    assert "output_attained" not in calibration.parameters
    assert any("taken to have come back in full" in text for text in texts(calibration.warnings))
    forecast = simulate(scenario, calibration, replicates=19)
    for row, tokens, printed in zip(
        forecast.rows("rps"), forecast.rows("output_tokens_per_s"), (2.09, 6.44), strict=True
    ):
        assert row.value == pytest.approx(printed, rel=0.04)
        assert row.low - 0.005 <= printed <= row.high + 0.005
        assert tokens.value == pytest.approx(100 * row.value, rel=1e-9)
    assert all(printed.inside for printed in forecast.published) and len(forecast.published) == 2


def test_an_early_end_is_inferred_only_where_lengths_are_limits() -> None:
    scenario = load(SAMPLE)
    limits = [msgspec.structs.replace(figure, lengths="limit") for figure in scenario.published]
    for published, inferred in (
        (scenario.published, False),
        (limits, True),
        ([limits[0], scenario.published[1]], True),
    ):
        asked = msgspec.structs.replace(scenario, published=published)
        fitted = calibrate_published(asked, 1, simulations=2, draws=5)
        assert ("output_attained" in fitted.parameters) is inferred
    article = load("llama2-70b")
    assert {figure.lengths for figure in article.published} == {"limit"}


def test_tokens_first_tokens_and_the_pace_of_tokens_are_figures_too() -> None:
    """All of one machine: a step of 18 ms, a prefill of 40."""
    scenario = load(SAMPLE)
    figures = [("ttft_mean", 0.045), ("tpot_mean", 0.018), ("tpot_p95", 0.018)]
    figures += [("output_tokens_per_s", 54.6), ("input_tokens_per_s", 139.8)]
    published = [
        Figure(metric=metric, users=1, value=value, rounding=0.01 * value, source="made up")
        for metric, value in figures
    ]
    asked = msgspec.structs.replace(scenario, published=published)
    fitted = calibrate_published(asked, 1, simulations=250, draws=60)
    for metric, value in figures:
        near = fitted.residuals[f"{metric} of 256/100 at 1 user"].rms
        assert near < (0.15 if metric == "ttft_mean" else 0.05) * value, metric


def test_a_meaning_of_lengths_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = Path(SAMPLE).read_text().replace("rounding: 0.005,", "rounding: 0.005, lengths: ful,", 1)
    (tmp_path / "odd.yaml").write_text(text)
    assert status(["simulate", str(tmp_path / "odd.yaml")]) == 2
    said = capsys.readouterr().err
    assert "odd.yaml:9: published[0].lengths: expected one of full, limit" in said

"""Pictures and pages: complete in one file, the same bytes every time, whatever names contain."""

from __future__ import annotations

import base64
import io
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
from rich.console import Console
from warned import texts

from scenarios.answer import tables
from scenarios.answer.numbers import parts
from scenarios.compare.comparison import SHARES, Diagnostics, Distribution, Error, write_comparison
from scenarios.compare.run_with_model import compare
from scenarios.compare.saved import read_saved
from scenarios.compare.two import compare_runs
from scenarios.forecast.forecast import Forecast, write_forecast
from scenarios.forecast.simulate import central_run, simulate
from scenarios.load.parameters import calibration_of
from scenarios.load.scenario import load
from scenarios.report import overlays, plots
from scenarios.report.figure import panels, row
from scenarios.report.page import page
from sim.model.errors import BadInput
from sim.model.warning import Notice
from sim.results import metrics
from sim.run import Run, write_run


@pytest.fixture(scope="module")
def forecast() -> Forecast:
    scenario = load("llama2-70b-1500-100", "load.seconds=30", "load.users=[1, 8, 32, 128]", "name=a<b>&c")
    return simulate(scenario, calibration_of("llama2-70b-1500-100", scenario), replicates=19)


@pytest.fixture(scope="module")
def run() -> Run:
    scenario = load("standin", "load.seconds=5")
    return central_run(scenario, calibration_of("standin", scenario))


class Outline(HTMLParser):
    """The tags of a page, what they link to, and whether each is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in ("meta", "img", "br", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page_is_one_well_formed_file(forecast: Forecast, run: Run):
    text = page([forecast, run, compare_runs(run, run)], {forecast.name: run}, "Title <&>")
    outline = Outline(text)
    assert outline.open == []
    assert {"script", "link", "iframe"}.isdisjoint(outline.tags)
    assert all(link.startswith(("data:image/svg+xml;base64,", "#")) for link in outline.links)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    assert "<title>Title &lt;&amp;&gt;</title>" in text
    assert "a&lt;b&gt;&amp;c" in text and "a<b>" not in text
    for link in outline.links:
        if link.startswith("data:"):
            ElementTree.fromstring(base64.b64decode(link.partition(",")[2]))


def test_the_same_page_twice(forecast: Forecast, run: Run):
    assert page([forecast, run], {}) == page([forecast, run], {})


def test_a_page_says_what_the_forecast_says(forecast: Forecast):
    text = re.sub(r"<[^>]*>", " ", page([forecast], {}))
    for warning in texts(forecast.warnings):
        assert warning in text.replace("&#39;", "'")
    assert parts(forecast.knee.load)[0] in text
    assert "GCP a2-highgpu-4g" in text and "output_attained" in text
    for rung in forecast.bottleneck:
        assert rung.words in text


def test_warnings_shared_by_all_forecasts_are_said_once(forecast: Forecast):
    other = msgspec.structs.replace(forecast, name="other", warnings=[*forecast.warnings, Notice(text="mine alone")])
    text = page([forecast, other], {}).replace("&#39;", "'")
    assert text.count(texts(forecast.warnings)[-1]) == 1
    assert text.count("mine alone") == 1


@pytest.mark.parametrize("picture", [plots.overview, plots.first_tokens])
def test_pictures_have_no_date_and_no_chance(picture, forecast: Forecast):
    svg = row(picture(forecast))
    assert svg == row(picture(forecast))
    assert b"<dc:date>" not in svg
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert panels(picture(forecast)) == panels(picture(forecast))


@pytest.mark.parametrize("loads", [1, 2, 4, 9])
def test_distributions_of_any_number_of_loads_can_be_drawn(loads: int):
    gaps = [0.02 + 0.001 * i for i in range(len(SHARES))]
    found = Diagnostics(itl=[Distribution(load=n, measured=gaps, simulated=gaps) for n in range(1, loads + 1)])
    text = row(overlays.distributions(found, "users")).decode()
    titles = re.findall(r"<!-- (\d) users? -->", text)
    assert len(titles) == min(loads, 6)
    assert (titles[0], titles[-1]) == ("1", str(loads))


def test_residuals_are_drawn_of_every_kind_of_step():
    errors = [Error(at=n, steps=10 * n, mean=0.01, low=-0.1, high=0.1) for n in (1, 2, 4)]
    for kinds in (["decode"], ["decode", "prefill"]):
        found = Diagnostics(by_batch=dict.fromkeys(kinds, errors), by_time=dict.fromkeys(kinds, errors))
        text = row(overlays.residuals(found)).decode()
        assert [kind for kind in ("decode", "prefill") if f"<!-- {kind.capitalize()} steps" in text] == kinds


def test_a_forecast_without_steady_states_can_be_drawn():
    scenario = load("llama2-70b-poisson", "load.seconds=30", "load.rate=[3, 6]")
    found = simulate(scenario, calibration_of("llama2-70b-poisson", scenario), replicates=19)
    assert all(row.unstable for row in found.curves)
    assert "no steady state" in page([found], {})


def test_folders_and_files_are_recognised(forecast: Forecast, run: Run, tmp_path: Path):
    write_forecast(tmp_path / "forecast.json", forecast)
    write_run(run, tmp_path / "run")
    comparison = compare_runs(run, run)
    (tmp_path / "comparison.json").write_bytes(msgspec.json.encode(comparison))
    assert read_saved(tmp_path) == forecast == read_saved(tmp_path / "forecast.json")
    found = read_saved(tmp_path / "run")
    assert isinstance(found, Run) and len(found.requests) == len(run.requests)
    assert read_saved(tmp_path / "comparison.json") == comparison
    (tmp_path / "other.json").write_text('{"format": 1}')
    with pytest.raises(BadInput, match=r"other\.json:1: expected a run directory, a forecast, a plan or a comparison"):
        read_saved(tmp_path / "other.json")


def test_a_comparison_without_a_forecast_is_read_back_and_shown(run: Run, tmp_path: Path):
    hollow = metrics.table(run).assign(ttft_p50=float("nan"))
    found = compare(run, [hollow] * 19, tolerances={"ttft_p50": 0.1})
    write_comparison(tmp_path / "comparison.json", found)
    assert read_saved(tmp_path / "comparison.json") == found
    text = page([found], {})
    assert "nan" not in text and "measured but not forecast" in text
    console = Console(width=80, record=True, file=io.StringIO())
    tables.show_comparison(found, console)
    assert "nan" not in console.export_text()


def test_80_columns_are_enough_for_every_number_of_a_comparison(run: Run):
    found = compare(run, [metrics.table(run)] * 19)
    wide = {"measured": 0.0123456, "simulated": 0.00123456, "low": 0.00101234, "high": 0.00198765}
    wide |= {"relative_error": -9.8765, "repeat_error": 123.4567}
    rows = [msgspec.structs.replace(row, load=0.125, **wide) for row in found.rows]
    console = Console(width=80, record=True, file=io.StringIO())
    tables.show_comparison(msgspec.structs.replace(found, rows=rows), console)
    text = console.export_text()
    assert "…" not in text and "0.00123 0.00101–0.00199  -987.6%" in text and "+12346%" in text
    assert "in band, all metrics: " in text and "effective" in text


def test_two_patterns_stand_on_the_page(run: Run):
    table = metrics.table(run)
    other = table.assign(ttft_p50=2 * table["ttft_p50"])
    text = page([compare(run, [*[table] * 20, *[other] * 10])], {})
    first = float(table["ttft_p50"].iloc[0])
    assert f", about {first:.3g} or {2 * first:.3g}</i>" in text
    assert "two patterns are stable" in text
    assert "Inside their bands, all metrics: " in text and "<th>effective</th>" in re.sub(r' class="\w*"', "", text)


def test_a_run_that_was_broken_off_and_resumed_can_be_drawn(run: Run):
    first, *others = run.rungs
    broken = replace(first, settled=math.nan, end=math.nan, status="aborted")
    assert plots.over_time(replace(run, rungs=[broken, *others])).startswith(b"<?xml")


def test_what_a_run_did_not_show_is_a_dash_on_its_page(run: Run):
    unstreamed = replace(run, requests=run.requests.assign(first_token=math.nan), steps=None, step_ends=None)
    text = page([unstreamed], {})
    assert "<td>–</td>" in text and "nan" not in text


def test_lines_are_dashed_beyond_what_was_calibrated_on_either_side(forecast: Forecast):
    def drawn(beyond: list[bool]) -> str:
        marks = dict(zip([row.load for row in forecast.rows("rps")], beyond, strict=True))
        rows = [msgspec.structs.replace(row, extrapolated=marks[row.load]) for row in forecast.curves]
        return row(plots.overview(msgspec.structs.replace(forecast, curves=rows))).decode()

    dashes = {
        name: drawn(list(of)).count("stroke-dasharray: 6.8,3.4")
        for name, of in {
            "none": [False] * 4,
            "below": [True, False, False, False],
            "above": [False, False, False, True],
        }.items()
    }
    assert dashes["none"] < dashes["below"] == dashes["above"]


def test_a_measured_run_says_what_was_asked_of_what(run: Run):
    text = page([replace(run, info={"model_id": "llama", "version": "0.9.4", "max_batch_total_tokens": 12345})], {})
    for words in (
        "model_id",
        "llama",
        "max_batch_total_tokens",
        "12345",
        "workload.prompt_tokens",
        "load.users",
    ):
        assert f">{words}<" in text
    uncounted = page([replace(run, requests=run.requests.assign(output_tokens=0), steps=None, step_ends=None)], {})
    assert "out, tok/s" in text and "out, tok/s" not in uncounted
    assert "the run has no requests" in page([replace(run, requests=run.requests.iloc[:0])], {})

"""A forecast: what many replicates say together, what binds, what it costs, warnings."""

from __future__ import annotations

import io
import re
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
import pytest
from backwards import Backwards
from rich.console import Console
from warned import texts

from scenarios.answer.tables import show_cost, show_forecast, show_operating_points
from scenarios.forecast.bottleneck import bottleneck
from scenarios.forecast.cost import costs
from scenarios.forecast.forecast import Estimate, read_forecast, write_forecast
from scenarios.forecast.replicate import circumstances, replicate
from scenarios.forecast.simulate import central_run, simulate
from scenarios.forecast.warnings import several_patterns
from scenarios.load.parameters import calibration_of
from scenarios.load.scenario import load, origin, shipped
from scenarios.report.page import page
from sim.model.calibration import Calibration, Parameter, Source, read_calibration
from sim.model.errors import BadInput, CannotFit
from sim.model.scenario import Hardware
from sim.replicate import tasks_for
from sim.results.curve import OperatingPoint
from sim.results.metrics import table

SMALL = """\
name: small
server: {max_batch_prefill_tokens: 2048, max_batch_total_tokens: 2500, max_input_length: 1000, max_total_tokens: 2000}
workload: {prompt_tokens: 100, output_tokens: 20}
load: {users: [1, 4, 32], spawn_rate: 20, seconds: 20}
price: {usd_per_hour: 36}
slo: {e2e_p95: 1.0}
"""


def machine(**values: float) -> Calibration:
    """A machine whose parameters are uncertain by 5 %, independently."""
    rng = np.random.default_rng(1)
    known = {"a0": 0.01, "a1": 1e-4, "b0": 0.02, "b1": 5e-4} | values
    return Calibration(
        source=Source(kind="assumed"),
        model="affine",
        machine=Hardware(gpu="A100-40GB"),
        parameters={n: Parameter(value=v, stderr=v / 20, low=0.9 * v, high=1.1 * v) for n, v in known.items()},
        draws={n: (v * rng.lognormal(0, 0.05, 50)).tolist() for n, v in known.items()},
    )


@pytest.fixture
def small(tmp_path: Path):
    def scenario(*sets: str):
        (tmp_path / "small.yaml").write_text(SMALL)
        return load(tmp_path / "small.yaml", *sets)

    return scenario


def test_the_curve_of_a_lone_user_is_arithmetic(small):
    """Without uncertainty one user's latency is a prefill and 19 decode steps: 0.02 + 19 × 0.0205."""
    exact = msgspec.structs.replace(machine(), draws={})
    forecast = simulate(small("load.users=[1]"), exact, replicates=19)
    (row,) = forecast.rows("e2e_mean")
    assert row.value == pytest.approx(0.01 + 100e-4 + 19 * 0.0205, abs=1e-9)
    assert row.low == pytest.approx(row.value) and row.high == pytest.approx(row.value)


def test_bands_are_the_spread_of_the_draws(small):
    """One user's latency is 0.02 + 19 · (b0 + b1): the band over replicates is that of the draws."""
    calibration = machine()
    forecast = simulate(small("load.users=[1]"), calibration, replicates=99)
    d = {name: np.array(column) for name, column in calibration.draws.items()}
    truth = np.quantile(d["a0"] + 100 * d["a1"] + 19 * (d["b0"] + d["b1"]), [0.05, 0.5, 0.95])
    (row,) = forecast.rows("e2e_mean")
    assert [row.low, row.value, row.high] == pytest.approx(truth, rel=0.02)


def test_the_same_whatever_the_executor(small):
    calibration, short = machine(), small("load.seconds=4")
    here = simulate(short, calibration, replicates=19)
    assert simulate(short, calibration, replicates=19, executor=Backwards()) == here
    assert simulate(short, calibration, replicates=19, seed=1) != here


def test_what_is_written_is_read_and_written_again(small, tmp_path: Path):
    forecast = simulate(small("load.rate=[1, 60]", "load.settle=2"), machine(), replicates=19)
    write_forecast(tmp_path / "a.json", forecast)
    assert read_forecast(tmp_path / "a.json") == forecast
    write_forecast(tmp_path / "b.json", read_forecast(tmp_path / "a.json"))
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    text = (tmp_path / "a.json").read_text()
    (tmp_path / "a.json").write_text(text.replace('"plateau"', '"plato"'))
    with pytest.raises(BadInput, match=r"a\.json:\d+: plato: unknown key; did you mean plateau\?"):
        read_forecast(tmp_path / "a.json")


def test_corners_are_found_in_each_replicate(small):
    forecast = simulate(small(), machine(), replicates=39)
    tables = [replicate(task) for task in tasks_for(small(), machine(), 0, range(1, 40))]
    plateaus = [t["rps"].max() for t in tables]
    assert forecast.plateau.rps.value == pytest.approx(np.median(plateaus))
    assert forecast.plateau.rps.low == pytest.approx(np.quantile(plateaus, 0.05, method="weibull"))
    for t in tables:  # the knee lies where p95 E2E, between two rungs, reaches the SLO
        over = int((t["e2e_p95"] > 1.0).to_numpy().argmax())
        assert over > 0
    assert 4 < forecast.knee.load.value < 32 and forecast.knee.reached == 1


def test_above_capacity_an_open_loop_has_no_latency(small):
    forecast = simulate(small("load.rate=[1, 100]", "load.settle=5"), machine(), replicates=19)
    calm, mad = forecast.rows("e2e_mean")
    assert not calm.unstable and calm.value is not None
    assert mad.unstable and mad.value is None and mad.low is None
    assert forecast.rows("rps")[1].value > 5  # what it does get done is still said
    assert any("no steady state from 100 requests/s on" in text for text in texts(forecast.warnings))
    assert [p.probability for p in forecast.slo][1] == 0
    priced = simulate(small("load.rate=[1, 100]", "load.settle=5", "price.usd_per_hour=3"), machine(), replicates=19)
    console = Console(width=100, record=True, file=io.StringIO())
    show_cost(priced, console)
    text = console.export_text()
    assert "100 requests/s !" in text and "1 requests/s !" not in text.replace("100 requests/s !", "")


def test_beyond_the_calibrated_range_it_says_so(small):
    calibration = msgspec.structs.replace(machine(), range={"sequences": (1, 8), "prompt_tokens": (10, 100)})
    forecast = simulate(small(), calibration, replicates=19)
    assert [row.extrapolated for row in forecast.rows("rps")] == [False, False, True]
    assert any(
        "from 32 users on: batches of" in text and "calibrated up to 8" in text for text in texts(forecast.warnings)
    )


def test_warnings_of_machine_window_and_refusals(small):
    some = ("server.max_input_length=99", "workload.prompt_tokens={uniform: [90, 120]}")
    asked = small("machine.gpu=A100-80GB", "load.seconds=0.5", *some, "warnings=[{text: mine}]")
    said = texts(simulate(asked, machine(), replicates=19).warnings)
    assert said[0] == "mine"
    assert "the step times are those of another GPU: A100-40GB, not A100-80GB" in said
    assert any("refuses requests longer than its limits (422)" in text for text in said)
    short = texts(simulate(small("load.seconds=0.5"), machine(), replicates=19).warnings)
    assert any("the window of 0.5 s is shorter than three answers" in text for text in short)


@pytest.mark.parametrize(
    ("sets", "at", "binds"),
    [
        ((), 32, "token budget"),
        (("server.max_concurrent_requests=8",), 32, "permits"),
        (("server.max_batch_total_tokens=100000",), 4, "decode compute"),
        (
            ("workload.output_tokens=2", "server.max_batch_total_tokens=100000", "workload.prompt_tokens=900"),
            4,
            "prefill",
        ),
        (("load.rate=[0.1]", "load.seconds=200"), 0.1, "users"),
    ],
)
def test_what_binds(small, sets: tuple[str, ...], at: float, binds: str):
    forecast = simulate(small(*sets), machine(), replicates=19)
    (rung,) = [rung for rung in forecast.bottleneck if rung.load == at]
    assert rung.binds.startswith(binds)


def test_the_order_of_bindings():
    base = {"load": 8, "queue": 4, "in_flight": 8, "prefill_share": 0.6, "decode_share": 0.4, "idle_share": 0.0}
    base |= {"mean_batch": 4, "overloaded_rate": 0.0, "budget_full": 0.5, "prefill_full": 0.5}
    scenario = load("llama2-70b")

    def binds(**values: float) -> str:
        return bottleneck(scenario, pd.Series(base | values)).binds

    assert binds(overloaded_rate=0.1) == "permits"
    assert binds() == "token budget"
    assert binds(budget_full=0) == "prefill budget"
    assert binds(budget_full=0, prefill_full=0) == "admission rule"
    assert binds(queue=0.1) == "prefill compute"
    assert binds(queue=0.1, decode_share=0.7, prefill_share=0.3) == "decode compute"
    assert binds(queue=0.1, decode_share=0.2, prefill_share=0.1, idle_share=0.7) == "users"


def test_two_stable_patterns_are_told_and_one_is_not():
    scenario = load("standin")
    rng = np.random.default_rng(0)

    def tables(*centres: float) -> list[pd.DataFrame]:
        ttft = [centres[i % len(centres)] * rng.normal(1, 0.01) for i in range(60)]
        return [pd.DataFrame({"rung": [0], "load": [4.0], "ttft_p50": [x], "e2e_p50": [1 + x]}) for x in ttft]

    assert texts(several_patterns(scenario, tables(0.1))) == []
    (said,) = texts(several_patterns(scenario, tables(0.1, 0.4)))
    assert said == "at 4 users two patterns are stable: TTFT p50 about 0.1 or 0.4 s"


def test_a_knee_beyond_the_ladder_is_not_quoted_as_one(small):
    forecast = simulate(small("load.users=[1, 2]", "slo.e2e_p95=100"), machine(), replicates=19)
    assert forecast.knee.reached == 0
    console = Console(width=100, record=True, file=io.StringIO())
    show_operating_points(forecast, console)
    text = console.export_text()
    assert re.search(r"^knee +> 2 ", text, re.MULTILINE) and "above this ladder" in text


def test_costs_by_hand():
    """36 $/h is a cent a second: 2 requests/s are 5 $ per 1,000; 10 in and 40 out a second are 1,000 and 250 $/M."""
    rungs = pd.DataFrame(
        {"rung": [0, 1], "load": [1.0, 3.0], "rps": [1.0, 2.0]}
        | {"input_tokens_per_s": [5.0, 10.0], "output_tokens_per_s": [20.0, 40.0]}
    )
    knee, one, three = costs(36.0, [rungs] * 99, [OperatingPoint(2.0, 1.5, True)] * 99, lambda load: f"{load:g}")
    assert (one.at, three.at) == ("1", "3")
    assert three.per_1000_requests.value == pytest.approx(5)
    assert three.per_million_input.value == pytest.approx(1000)
    assert three.per_million_output.value == pytest.approx(250)
    assert three.per_million_blended.value == pytest.approx(200)
    assert knee.per_1000_requests.value == pytest.approx(1000 * 0.01 / 1.5)


def test_circumstances_against_the_steps(small):
    """Budgets: a batch never exceeds the token budget, and at saturation the next request would."""
    scenario = small()
    (task,) = tasks_for(scenario, machine(), 0, [0])
    run = task.run()
    seen = [circumstances(run, rung, [task.model.server]) for rung in run.rungs]
    fits = 2500 // (112 + 32)  # ceil16(100) + ceil16(20) a request
    assert seen[0]["max_sequences"] == 1 and seen[0]["budget_full"] == 0 == seen[0]["prefill_full"]
    assert fits - 1 <= seen[2]["max_sequences"] <= 2500 // 112
    assert seen[2]["budget_full"] > 0.3
    assert seen[2]["max_prompt_tokens"] == 100
    assert seen[0]["max_context_tokens"] == 100 + 20


def test_a_request_that_can_never_fit_is_refused_before_the_clock_starts(small):
    asking = small("server.max_batch_total_tokens=", "workload.max_new_tokens=1000")  # the calibration knows the budget
    with pytest.raises(CannotFit, match="would wait for ever"):
        simulate(asking, machine(max_batch_total_tokens=1000), replicates=19)


@pytest.mark.parametrize("name", [name for name in shipped() if load(name).goal is None])  # those: test_plan_shipped
def test_every_shipped_scenario_runs(name: str):
    """Small: few replicates, the windows cut; the calibration is the one they ship with, one fit shared by all."""
    scenario = load(name)
    scenario = load(name, f"load.seconds={min(scenario.load.seconds, 40)}")
    forecast = simulate(scenario, calibration_of(name, scenario), replicates=19)
    rps = [row.value for row in forecast.rows("rps")]
    assert all(0 < value < 20 for value in rps)
    assert max(rps) == pytest.approx(rps[-1], rel=0.25)  # a closed loop levels off, it does not fall
    first, *more = [row for row in forecast.rows("e2e_mean") if row.value is not None]
    assert first.low <= min(row.value for row in more)  # of few answers of many lengths, a mean may be above the next
    assert first.value < more[-1].value
    assert len(forecast.bottleneck) == len(rps)


def test_the_shipped_fit_shows_the_article():
    for name in ("llama2-70b-1500-100", "llama2-70b-50-500"):
        scenario = load(name, "load.users=[1, 2, 4, 8, 12, 16, 24, 32, 48, 64]", "load.seconds=240")
        forecast = simulate(scenario, calibration_of(name, scenario), replicates=19)
        assert len(forecast.published) == 2
        for printed in forecast.published:
            assert printed.simulated.value == pytest.approx(printed.figure.value, rel=0.05)
            assert printed.inside


def test_what_ifs_are_fitted_on_the_server_that_was_measured(tmp_path: Path):
    """A what-if changes the server it asks about; the figures were measured on the one of the file they stand in."""
    (tmp_path / "what-if.yaml").write_text(
        "name: what-if\nextends: llama2-70b\nserver: {max_batch_prefill_tokens: 4096}\n"
    )
    measured = origin(tmp_path / "what-if.yaml", "published", "server.max_waiting_tokens=5")
    assert measured.server.max_batch_prefill_tokens == 14000 and measured.server.max_waiting_tokens == 20
    changed = origin(tmp_path / "what-if.yaml", "published", "published.0.value=8")
    assert changed.published[0].value == 8


def test_a_scenario_without_parameters_is_told_so(tmp_path: Path):
    (tmp_path / "small.yaml").write_text(SMALL)
    with pytest.raises(BadInput, match=r"small\.yaml: expected calibration, table or published"):
        calibration_of(tmp_path / "small.yaml", load(tmp_path / "small.yaml"))


def test_replicate_0_is_the_central_run(small):
    calibration = machine()
    run = central_run(small(), calibration)
    exact = msgspec.structs.replace(calibration, draws={})
    again = simulate(small(), exact, replicates=19)
    assert table(run)["e2e_mean"].tolist()[:1] == pytest.approx([again.rows("e2e_mean")[0].value])


def test_an_estimate_of_nothing_is_nothing(small):
    forecast = simulate(small("load.seconds=0.001"), machine(), replicates=19)
    assert forecast.rows("e2e_mean")[0].value is None
    assert forecast.cost[0].per_1000_requests == Estimate(value=None, low=None, high=None)


def test_the_shipped_calibration_is_readable_and_of_the_article():
    calibration = read_calibration(Path("scenarios/shipped/data/llama2-70b.calibration.json"))
    assert calibration.source.kind == "published" and calibration.n_draws >= 100


def test_below_the_calibrated_range_it_says_so_too(small):
    calibration = msgspec.structs.replace(machine(), range={"users": (4, 32), "prompt_tokens": (1000, 2000)})
    forecast = simulate(small(), calibration, replicates=19)
    assert all(row.extrapolated for row in forecast.rows("rps"))
    assert any(
        text.startswith("extrapolated: prompts of ") and "from 1,000 on" in text for text in texts(forecast.warnings)
    )
    assert "extrapolated: 1 user (calibrated from 4 on)" in texts(forecast.warnings)
    users_only = msgspec.structs.replace(calibration, range={"users": (4, 32)})
    assert [row.extrapolated for row in simulate(small(), users_only, replicates=19).rows("rps")] == [
        True,
        False,
        False,
    ]


def test_requests_per_second_are_no_users(small):
    calibration = msgspec.structs.replace(machine(), range={"users": (1, 2)})
    forecast = simulate(small("load.rate=[3, 4]", "load.settle=2"), calibration, replicates=19)
    assert not any(row.extrapolated for row in forecast.curves)


def test_a_server_that_pads_is_not_taken_for_one_of_a_table(small):
    padded = small("server.requires_padding=true")
    said = "this server pads its batches; whether the calibrated one did is unknown"
    assert said in texts(simulate(padded, machine(), replicates=19).warnings)
    assert said not in texts(simulate(small(), machine(), replicates=19).warnings)


def test_a_knee_below_the_ladder_is_not_taken_for_its_first_rung(small):
    asked = small("load.users=[16, 32]", "slo.e2e_p95=0.3", "price.usd_per_hour=3")
    forecast = simulate(asked, machine(), replicates=19)
    assert forecast.knee.passed == 1 and forecast.knee.below
    assert forecast.knee.load.value is None and forecast.knee.rps.value is None
    assert forecast.cost[0].at == "knee" and forecast.cost[0].per_1000_requests.value is None
    assert forecast.cost[1].per_1000_requests.value > 0
    console = Console(width=80, record=True, file=io.StringIO())
    show_forecast(forecast, console)
    text = console.export_text()
    assert re.search(r"^knee +< 16 +–$", text, re.MULTILINE)
    assert "knee: p95 E2E exceeds 0.3 s (at the first rung already)" in " ".join(text.split())
    text = page([forecast], {})
    assert "No load keeps E2E p95 ≤ 0.3 s" in " ".join(text.split())
    assert "()" not in text
    calm = simulate(small(), machine(), replicates=19)
    assert calm.knee.passed == 0 and calm.knee.load.value is not None


def test_a_trace_that_is_cut_and_windows_that_decide_by_luck_say_so(small, tmp_path: Path):
    rows = "".join(f"{t},{50 + 7 * (t % 13)},{5 + t % 30}\n" for t in range(60))
    (tmp_path / "trace.csv").write_text(f"time,prompt_tokens,output_tokens\n{rows}")
    none = ("workload.output_tokens=", "workload.max_new_tokens=")
    sets = (*none, f"workload.trace={tmp_path / 'trace.csv'}", "load={trace: true, settle: 10}")
    whole = simulate(small(*sets, "load.seconds="), machine(), replicates=19)
    assert not any("are replayed" in text for text in texts(whole.warnings))
    cut = simulate(small(*sets, "load.seconds=20"), machine(), replicates=19)
    assert "the trace lasts 59 s, of which 30 s are replayed (load.settle, load.seconds)" in texts(cut.warnings)
    limit = whole.rows("e2e_p95")[0].value
    luck = simulate(small(*sets, "load.seconds=20", f"slo={{e2e_p95: {limit}}}"), machine(), replicates=19)
    assert 0 < luck.slo[0].probability < 1
    assert any(
        text.startswith("P(e2e_p95) is the probability that one window keeps the SLO") for text in texts(luck.warnings)
    )

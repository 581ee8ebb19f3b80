"""From files and options to a scenario: what is laid over what, and where a complaint is placed."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from test_scenarios_checks import GOOD

from scenarios.load.scenario import load, origin, shipped
from sim.engines.tgi_0_9_4 import Flags
from sim.model.errors import BadInput
from sim.model.server import Bounds
from sim.model.workload import Exponential, Gamma, Lengths, Lognormal


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ":1: expected a scenario: keys and values"),
        (b"# only a comment\n", ":1: expected a scenario: keys and values"),
        (b"- 1\n- 2\n", ":1: expected a scenario: keys and values"),
        (b"just words\n", ":1: expected a scenario: keys and values"),
        (b"&a {name: *a}\n", ":1: name: an alias that contains itself"),
        (b"name: \xff\xfe\n", ": not UTF-8 text; expected a scenario file"),
    ],
)
def test_no_scenario_at_all(content: bytes, message: str, tmp_path: Path):
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(BadInput) as caught:
        load(file)
    assert str(caught.value).startswith(f"{file}{message}")


def test_a_missing_file_names_the_nearest_shipped_scenario():
    with pytest.raises(BadInput, match=r"^llama2-70b-1500-10: no such scenario .*did you mean llama2-70b-1500-100\?$"):
        load("llama2-70b-1500-10")


def test_extends_lays_keys_over_and_complains_where_they_were_written(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text(GOOD)
    child = tmp_path / "sub" / "child.yaml"
    child.write_text("name: child\nextends: ../base.yaml\nload: {rate: [0.5], spawn_rate: 2}\nslo: {ttft_p95: 2}\n")
    scenario = load(child)
    assert scenario.load.users is None and scenario.load.rate == [0.5]  # another load instead, not beside
    assert scenario.slo == {"e2e_p95": 15, "ttft_p95": 2}  # maps merge
    assert scenario.server.max_batch_total_tokens == 36000

    (tmp_path / "base.yaml").write_text(GOOD.replace("users: [1, 2, 4]", "users: [1]\n  think: -1"))
    with pytest.raises(BadInput, match=r"base\.yaml:11: load\.think: expected 0 or more"):
        load(child)


def test_extends_in_a_circle_names_the_files(tmp_path: Path):
    for name, other in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"name: {name}\nextends: {other}.yaml\n")
    with pytest.raises(
        BadInput, match=r"c\.yaml:2: extends: goes in a circle: a\.yaml -> b\.yaml -> c\.yaml -> a\.yaml"
    ):
        load(tmp_path / "a.yaml")


def test_file_names_belong_to_the_file_they_stand_in(tmp_path: Path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "lengths.csv").write_text("prompt_tokens,output_tokens\n1,2\n")
    text = GOOD.replace("{prompt_tokens: 1500, output_tokens: 100}", "{empirical: lengths.csv, max_new_tokens: 50}")
    (tmp_path / "base" / "base.yaml").write_text(text)
    (tmp_path / "child.yaml").write_text("name: child\nextends: base/base.yaml\n")
    assert load(tmp_path / "child.yaml").workload.empirical == str(tmp_path / "base" / "lengths.csv")


def test_set_changes_any_key():
    name = "llama2-70b-1500-100"
    assert load(name, "server.max_batch_prefill_tokens=4096").server.max_batch_prefill_tokens == 4096
    assert load(name, "server.max_batch_total_tokens=1e5").server.max_batch_total_tokens == 100_000
    assert load(name, "server.max_batch_total_tokens={low: 20000, high: 3e4}").server.max_batch_total_tokens == Bounds(
        low=20000, high=30000
    )
    assert load(name, "load.rate=[0.5, 1]").load.users is None
    assert load(name, "published.1.value=31").published[1].value == 31
    assert load(name, "published.1.value=31").published[1].output_tokens == 500
    assert load(name, "slo.ttft_p95=2").slo == {"e2e_p95": 15, "ttft_p95": 2}
    assert load(name, "price=").price is None
    law = load(name, "workload.prompt_tokens={lognormal: {mean: 800, cv: 1}}").workload.prompt_tokens
    assert law == Lengths(lognormal=Lognormal(mean=800, cv=1))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("server.max_batch=1", "--set server.max_batch=1: server.max_batch: unknown key; did you mean"),
        ("load.think=-1", "--set load.think=-1: load.think: expected 0 or more, found -1"),
        ("load.think", "--set load.think: expected KEY=VALUE"),
        ("=1", "--set =1: expected KEY=VALUE"),
        ("load..think=1", "--set load..think=1: expected KEY=VALUE"),
        ("load.users=[1", "--set load.users=[1: load.users: not YAML: expected ',' or ']'"),
        ("extends=x", "--set extends=x: extends: cannot be changed by --set"),
        ("published.9.value=1", "--set published.9.value=1: expected a place from 0 to 3 in a list, found 9"),
        ("load.users.first=1", "--set load.users.first=1: expected a place from 0 to 11 in a list, found first"),
    ],
)
def test_a_bad_set_names_itself(option: str, message: str):
    with pytest.raises(BadInput) as caught:
        load("llama2-70b", option)
    assert str(caught.value).startswith(message)


def test_yaml_reads_what_people_write(tmp_path: Path):
    text = """\
        name: on
        server: {max_batch_prefill_tokens: 1_4000, max_batch_total_tokens: 4e4}
        workload:
          prompt_tokens: {exponential: {mean: 1e2, high: 400}}
          output_tokens: 20
        load: {rate: [1], arrivals: {gamma: {cv: 2}}}
        """
    (tmp_path / "a.yaml").write_text(text)
    scenario = load(tmp_path / "a.yaml")
    assert scenario.name == "on"
    assert scenario.server.max_batch_prefill_tokens == 14_000
    assert scenario.workload.prompt_tokens == Lengths(exponential=Exponential(mean=100, high=400))
    assert isinstance(scenario.load.arrivals, Gamma) and scenario.load.arrivals.gamma.cv == 2


def _table(name: str) -> list[dict[str, str]]:
    lines = (Path("scenarios/shipped/data") / name).read_text().splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def test_shipped_prices_and_figures_are_those_of_the_sources():
    prices = {float(row["usd_per_hour"]): row for row in _table("gpu_prices.csv")}
    article = {
        (int(row["in_tok"]), int(row["out_tok"])): (float(row["best_latency_s"]), float(row["max_rps"]))
        for row in _table("truefoundry_articles.csv")
        if row["max_rps"]
    }
    priced = [scenario for scenario in map(load, shipped()) if scenario.price]
    assert len(priced) >= 9
    for scenario in priced:
        row = prices[scenario.price.usd_per_hour]
        for part in (row["cloud"], row["instance"], row["kind"].replace("-", " "), row["region"]):
            assert part in scenario.price.source
        assert row["gpus"] == f"{scenario.machine.gpus}x{scenario.machine.gpu}"
    for figure in load("llama2-70b").published:
        latency, rps = article[figure.prompt_tokens, figure.output_tokens]
        assert figure.value == (latency if figure.metric == "e2e_mean" else rps)


def test_figures_are_of_the_server_and_the_machine_they_stand_beside():
    assert len(load("llama2-70b-spot").published) == len(load("llama2-70b").published) > 0  # another price alone
    assert load("llama2-70b-80gb").published == []
    assert load("llama2-70b-1500-100", "server.max_batch_prefill_tokens=4096").published == []
    assert load("llama2-70b-1500-100", "machine.gpu=H100").published == []
    assert len(load("llama2-70b-1500-100", "load.users=[1]").published) > 0
    assert len(origin("llama2-70b-80gb", "published").published) > 0


def test_a_price_that_is_set_is_not_from_where_the_other_one_was():
    assert "GCP" in load("llama2-70b-spot").price.source
    assert load("llama2-70b-spot", "price.usd_per_hour=1").price.source == ""
    assert load("llama2-70b-spot", "price.usd_per_hour=1", "price.source=me").price.source == "me"


def test_what_stands_wrong_in_a_map_that_was_set_is_blamed_on_the_option():
    with pytest.raises(BadInput) as raised:
        load("standin", "slo={e2e_p95: 15000ms}")
    message = "--set slo={e2e_p95: 15000ms}: slo.e2e_p95: expected a number, found '15000ms'"
    assert str(raised.value) == message


def test_options_do_not_drop_flags_of_a_server_whose_engine_is_not_named(tmp_path: Path):
    path = tmp_path / "unnamed.yaml"
    path.write_text("name: a\nserver: {max_total_tokens: 3000}\nworkload: {prompt_tokens: 1, output_tokens: 1}\n")
    flags = load(path, "load.users=[1]", "server.max_input_length=2000").server
    assert isinstance(flags, Flags)
    assert flags.max_total_tokens == 3000

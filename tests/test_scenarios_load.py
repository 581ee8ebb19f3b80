"""What a user writes wrong is one line that names file, line, key and what was expected."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from scenarios.checks import RATES, TIMES
from scenarios.load import load, origin, shipped
from sim.errors import BadInput
from sim.metrics import COMPARED
from sim.server import Bounds
from sim.workload import Exponential, Gamma, Lengths, MeanCv

GOOD = """\
format: 1
name: good
server:
  max_batch_prefill_tokens: 14000
  max_batch_total_tokens: 36000
  max_input_length: 3000
  max_total_tokens: 3600
workload: {prompt_tokens: 1500, output_tokens: 100}
load:
  users: [1, 2, 4]
price: {usd_per_hour: 14.6939}
slo: {e2e_p95: 15}
"""

# The key whose line in GOOD is replaced, what stands there instead, and the complaint after the file's name.
BAD = {
    # keys
    "misspelt": ("name", "nmae: good", ":2: nmae: unknown key; did you mean name?"),
    "misspelt-flag": (
        "max_input_length",
        "  max_imput_length: 3000",
        ":6: server.max_imput_length: unknown key; did you mean max_input_length?",
    ),
    "nothing-near": ("slo", "zzz: 1", ":12: zzz: unknown key; expected one of format, name, description,"),
    "no-name": ("name", "", ": name: missing; expected text"),
    "duplicate": ("name", "name: good\nname: better", ':3: not YAML: found duplicate key "name"'),
    "duplicate-below": (
        "users",
        "  users: [1]\n  users: [2]",
        ':11: not YAML: found duplicate key "users"',
    ),
    "number-as-key": ("slo", "slo: {95: 15}", ":12: slo: expected text as the name of a key, found 95"),
    "format": ("format", "format: 2", ":1: format: expected 1, found 2"),
    # types
    "unit": (
        "max_input_length",
        "  max_input_length: 3k",
        ":6: server.max_input_length: expected a whole number, found '3k'",
    ),
    "seconds-unit": ("slo", "slo: {e2e_p95: 15s}", ":12: slo.e2e_p95: expected a number, found '15s'"),
    "quoted": (
        "max_total_tokens",
        '  max_total_tokens: "3600"',
        ":7: server.max_total_tokens: expected a whole number, found '3600'",
    ),
    "fraction": (
        "max_input_length",
        "  max_input_length: 30.5",
        ":6: server.max_input_length: expected a whole number, found 30.5",
    ),
    "truth": ("users", "  users: true", ":10: load.users: expected a list, each a whole number, found true"),
    "text-for-truth": (
        "max_input_length",
        "  requires_padding: on",
        ":6: server.requires_padding: expected true or false, found 'on'",
    ),
    "number-for-list": ("users", "  users: 4", ":10: load.users: expected a list, each a whole number, found 4"),
    "number-for-map": ("price", "price: 14.6939", ":11: price: expected a map of usd_per_hour, source"),
    "list-for-map": ("slo", "slo: [15]", ":12: slo: expected a map, found a list of 1"),
    "map-for-number": (
        "max_input_length",
        "  max_input_length: {low: 1, high: 2}",
        ":6: server.max_input_length: expected a whole number, found a map of 2",
    ),
    "text-in-list": (
        "users",
        "  users:\n  - 1\n  - two",
        ":12: load.users[1]: expected a whole number, found 'two'",
    ),
    "number-for-text": ("name", "name: 70", ":2: name: expected text, found 70"),
    "date-for-text": ("name", "name: 2023-08-01", ":2: name: expected text, found datetime.date(2023, 8, 1)"),
    "missing-part": ("price", "price: {source: me}", ":11: price.usd_per_hour: missing; expected a number"),
    "half-bounds": (
        "max_batch_total_tokens",
        "  max_batch_total_tokens: {low: 20000}",
        ":5: server.max_batch_total_tokens.high: missing; expected a whole number",
    ),
    # numbers
    "nan": ("slo", "slo: {e2e_p95: .nan}", ":12: slo.e2e_p95: expected a finite number, found nan"),
    "infinity": (
        "price",
        "price: {usd_per_hour: .inf}",
        ":11: price.usd_per_hour: expected a finite number, found inf",
    ),
    "too-large": (
        "price",
        "price: {usd_per_hour: 1e999}",
        ":11: price.usd_per_hour: expected a finite number, found inf",
    ),
    "zero-size": (
        "max_batch_prefill_tokens",
        "  max_batch_prefill_tokens: 0",
        ":4: server.max_batch_prefill_tokens: expected more than 0, found 0",
    ),
    "negative-size": (
        "max_input_length",
        "  max_input_length: -1",
        ":6: server.max_input_length: expected more than 0, found -1",
    ),
    "negative-ratio": (
        "max_input_length",
        "  waiting_served_ratio: -0.5",
        ":6: server.waiting_served_ratio: expected 0 or more, found -0.5",
    ),
    "negative-price": (
        "price",
        "price: {usd_per_hour: -3}",
        ":11: price.usd_per_hour: expected more than 0, found -3",
    ),
    "no-permits": (
        "max_input_length",
        "  max_concurrent_requests: 0",
        ":6: server.max_concurrent_requests: expected more than 0, found 0",
    ),
    # the server's own rules
    "engine": (
        "max_input_length",
        "  engine: tgi-0.9.3",
        ":6: server.engine: unknown engine; did you mean tgi-0.9.4?",
    ),
    "input-above-total": (
        "max_total_tokens",
        "  max_total_tokens: 3000",
        ":6: server.max_input_length: expected less than max_total_tokens (3000), found 3000",
    ),
    "input-above-prefill": (
        "max_batch_prefill_tokens",
        "  max_batch_prefill_tokens: 2000",
        ":4: server.max_batch_prefill_tokens: expected at least max_input_length (3000), found 2000",
    ),
    "budget-below-prefill": (
        "max_batch_total_tokens",
        "  max_batch_total_tokens: 9000",
        ":5: server.max_batch_total_tokens: expected at least max_batch_prefill_tokens (14000), found 9000",
    ),
    "budget-upside-down": (
        "max_batch_total_tokens",
        "  max_batch_total_tokens: {low: 50000, high: 25000}",
        ":5: server.max_batch_total_tokens: expected low up to high, found 50000 to 25000",
    ),
    "never-fits": (
        "max_batch_prefill_tokens",
        "  max_batch_prefill_tokens: 3000",
        ":8: workload: a request of 2999 + 100 tokens counts 3008 prompt tokens, more than "
        "server.max_batch_prefill_tokens 3000: TGI 0.9.4 would wait for ever",
    ),
    # workloads
    "no-output": ("workload", "workload: {prompt_tokens: 1500}", ":8: workload.output_tokens: missing"),
    "no-prompt": ("workload", "workload: {output_tokens: 9}", ":8: workload.prompt_tokens: missing"),
    "no-workload": (
        "workload",
        "",
        ": workload: expected prompt_tokens with output_tokens, or empirical, or trace; found none",
    ),
    "two-workloads": (
        "workload",
        "workload: {prompt_tokens: 1, output_tokens: 1, trace: t.csv}",
        ":8: workload.trace: expected prompt_tokens with output_tokens, or empirical, or trace; "
        "found prompt_tokens and trace",
    ),
    "zero-tokens": (
        "workload",
        "workload: {prompt_tokens: 1500, output_tokens: 0}",
        ":8: workload.output_tokens: expected more than 0, found 0",
    ),
    "more-than-asked": (
        "workload",
        "workload: {prompt_tokens: 1500, output_tokens: 100, max_new_tokens: 50}",
        ":8: workload.output_tokens: expected at most max_new_tokens (50), found 100",
    ),
    "uniform-of-three": (
        "workload",
        "workload: {prompt_tokens: {uniform: [1, 2, 3]}, output_tokens: 100}",
        ":8: workload.prompt_tokens.uniform: expected a list of 2, each a whole number, found a list of 3",
    ),
    "uniform-upside-down": (
        "workload",
        "workload: {prompt_tokens: {uniform: [9, 3]}, output_tokens: 100}",
        ":8: workload.prompt_tokens.uniform: expected [low, high] with 1 <= low <= high, found [9, 3]",
    ),
    "two-laws": (
        "workload",
        "workload: {prompt_tokens: {uniform: [1, 3], exponential: {mean: 4}}, output_tokens: 100}",
        ":8: workload.prompt_tokens: expected one of uniform, lognormal, exponential, found uniform and exponential",
    ),
    "no-law": (
        "workload",
        "workload: {prompt_tokens: {}, output_tokens: 100}",
        ":8: workload.prompt_tokens: expected one of uniform, lognormal, exponential, found none",
    ),
    "unknown-law": (
        "workload",
        "workload: {prompt_tokens: {lognorm: {mean: 4, cv: 1}}, output_tokens: 100}",
        ":8: workload.prompt_tokens.lognorm: unknown key; did you mean lognormal?",
    ),
    "no-cv": (
        "workload",
        "workload: {prompt_tokens: {lognormal: {mean: 4}}, output_tokens: 100}",
        ":8: workload.prompt_tokens.lognormal.cv: missing; expected a number",
    ),
    "negative-mean": (
        "workload",
        "workload: {prompt_tokens: 10, output_tokens: {exponential: {mean: -4}}}",
        ":8: workload.output_tokens.exponential.mean: expected more than 0, found -4",
    ),
    "exponential-upside-down": (
        "workload",
        "workload: {prompt_tokens: 10, output_tokens: {exponential: {mean: 4, low: 9, high: 3}}}",
        ":8: workload.output_tokens.exponential.high: expected at least low (9), found 3",
    ),
    "no-trace": (
        "workload",
        "workload: {trace: nowhere.csv}",
        ":8: workload.trace: no such file: ",
    ),
    # loads
    "empty-ladder": ("users", "  users: []", ":10: load.users: expected at least one rung, found an empty list"),
    "no-load": ("users", "  users:", ":9: load: expected one of users, rate, trace, found none"),
    "two-loads": (
        "users",
        "  users: [1]\n  rate: [2]",
        ":11: load.rate: expected one of users, rate, trace, found users and rate",
    ),
    "zero-users": ("users", "  users: [0, 1]", ":10: load.users[0]: expected more than 0, found 0"),
    "downward": (
        "users",
        "  users: [1, 4, 2]",
        ":10: load.users[2]: expected more users than the rung before (4), found 2",
    ),
    "falling-rate": (
        "users",
        "  rate: [1, 2.5, 2.5]",
        ":10: load.rate[2]: expected more requests/s than the rung before (2.5), found 2.5",
    ),
    "no-retry": ("users", "  users: [1]\n  retry: 0", ":11: load.retry: expected more than 0, found 0"),
    "zero-rate": ("users", "  rate: [0.0]", ":10: load.rate[0]: expected more than 0, found 0"),
    "nan-rate": ("users", "  rate: [.nan]", ":10: load.rate[0]: expected a finite number, found nan"),
    "arrivals": (
        "users",
        "  rate: [1]\n  arrivals: poison",
        ":11: load.arrivals: unknown arrivals; did you mean poisson?",
    ),
    "gamma-alone": (
        "users",
        "  rate: [1]\n  arrivals: gamma",
        ":11: load.arrivals: expected its burstiness with it: {gamma: {cv: 2}}",
    ),
    "gamma-zero": (
        "users",
        "  rate: [1]\n  arrivals: {gamma: {cv: 0}}",
        ":11: load.arrivals.gamma.cv: expected more than 0, found 0",
    ),
    "trace-of-nothing": ("users", "  trace: true", ":10: load.trace: expected a workload.trace"),
    "spawn-rate": ("users", "  users: [1]\n  spawn_rate: 0", ":11: load.spawn_rate: expected more than 0, found 0"),
    "window": ("users", "  users: [1]\n  seconds: -5", ":11: load.seconds: expected more than 0, found -5"),
    "think": ("users", "  users: [1]\n  think: -1", ":11: load.think: expected 0 or more, found -1"),
    # the rest
    "replicas": ("slo", "replicas: 0", ":12: replicas: expected more than 0, found 0"),
    "fleet": ("slo", "replicas: 3", ":12: replicas: expected 1, found 3: several replicas"),
    "slo-metric": ("slo", "slo: {ee2_p95: 15}", ":12: slo.ee2_p95: unknown metric; did you mean e2e_p95?"),
    "slo-zero": ("slo", "slo: {e2e_p95: 0}", ":12: slo.e2e_p95: expected more than 0, found 0"),
    "tolerance": ("slo", "tolerances: {rpss: 0.1}", ":12: tolerances.rpss: unknown metric; did you mean rps?"),
    "figure-metric": (
        "slo",
        "published:\n- {metric: e2e, value: 7, rounding: 0, source: x}",
        ":13: published[0].metric: unknown metric; did you mean e2e_",
    ),
    "figure-users": (
        "slo",
        "published:\n- {metric: e2e_mean, value: 7, rounding: 0, source: x}",
        ":13: published[0].users: missing; e2e_mean was measured at a number of users",
    ),
    "figure-value": (
        "slo",
        "published:\n- metric: rps_takeoff\n  value: -1\n  rounding: 0\n  source: x",
        ":14: published[0].value: expected more than 0, found -1",
    ),
    "secret": (
        "slo",
        "launch: {model: m, env: [HF_TOKEN=abc]}",
        ":12: launch.env[0]: expected only the name of a variable; its value stays in the environment",
    ),
    "no-calibration": ("slo", "calibration: c.json", ":12: calibration: no such file: "),
    "two-doors": (
        "slo",
        "calibration: c.json\ntable: t.csv",
        ":13: table: expected either calibration or table, found both",
    ),
    "folder-name": ("name", "name: a/b", ":2: name: expected a name that can be a folder's, found 'a/b'"),
    "extends-nothing": (
        "name",
        "name: good\nextends: llama2-7b",
        ":3: extends: llama2-7b: no such scenario file, nor a shipped scenario of that name; did you mean llama2-70b?",
    ),
    "extends-number": ("name", "name: good\nextends: 3", ":3: extends: expected the name of a scenario file, found 3"),
    "extends-itself": ("name", "name: good\nextends: bad.yaml", ":3: extends: goes in a circle: bad.yaml -> bad.yaml"),
    # YAML itself
    "truncated": ("slo", "slo: {e2e_p95: 15", ":12: not YAML: expected ',' or '}'"),
    "tab": ("users", "\tusers: [1]", ":10: not YAML: found character '\\t' that cannot start any token"),
    "colon": ("name", "name: good: better", ":2: not YAML: mapping values are not allowed here"),
    "two-documents": ("slo", "---\nname: b", ":12: not YAML: but found another document"),
    "tag": ("name", "name: !!python/name:os.system x", ":2: name: expected a plain value, found the tag tag:yaml.org"),
    "control": ("name", "name: a\x01b", ": not YAML: unacceptable character #x0001"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_scenario_is_one_line(case: str, tmp_path: Path):
    key, new, message = BAD[case]
    (old,) = [line for line in GOOD.splitlines() if line.strip().startswith(f"{key}:")]
    text = GOOD.replace(old, new)
    if case == "never-fits":
        text = text.replace("3000\n  max_total", "2999\n  max_total").replace(
            "prompt_tokens: 1500", "prompt_tokens: 2999"
        )
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(BadInput) as caught:
        load(file)
    assert str(caught.value).startswith(f"{file}{message}")
    assert "\n" not in str(caught.value)


def test_the_good_file_is_good(tmp_path: Path):
    file = tmp_path / "good.yaml"
    file.write_text(GOOD)
    assert load(file).name == "good"


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
    assert law == Lengths(lognormal=MeanCv(mean=800, cv=1))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("server.max_batch=1", "--set server.max_batch=1: server.max_batch: unknown key; did you mean"),
        ("load.think=-1", "--set load.think=-1: load.think: expected 0 or more, found -1"),
        ("load.think", "--set load.think: expected KEY=VALUE"),
        ("=1", "--set =1: expected KEY=VALUE"),
        ("load..think=1", "--set load..think=1: expected KEY=VALUE"),
        ("load.users=[1", "--set load.users=[1:1: not YAML: expected ',' or ']'"),
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


def test_the_metrics_of_a_scenario_are_those_of_a_comparison():
    assert (*TIMES, *RATES) == COMPARED


def _table(name: str) -> list[dict[str, str]]:
    lines = (Path("scenarios/data") / name).read_text().splitlines()
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

"""What a user writes wrong is one line that names file, line, key and what was expected."""

from __future__ import annotations

from pathlib import Path

import pytest

from scenarios.load.scenario import load
from sim.model.errors import BadInput

GOOD = """\
format: 2
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
    "format": ("format", "format: 3", ":1: format: expected 1 or 2, found 3"),
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
        ":4: server.max_batch_prefill_tokens: expected 1 or more, found 0",
    ),
    "negative-size": (
        "max_input_length",
        "  max_input_length: -1",
        ":6: server.max_input_length: expected 1 or more, found -1",
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
        ":6: server.max_concurrent_requests: expected 1 or more, found 0",
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
        ":8: workload.prompt_tokens: expected one of uniform, lognormal, exponential, geometric, found uniform and",
    ),
    "no-law": (
        "workload",
        "workload: {prompt_tokens: {}, output_tokens: 100}",
        ":8: workload.prompt_tokens: expected one of uniform, lognormal, exponential, geometric, found none",
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
    "empty-ladder": ("users", "  users: []", ":10: load.users: expected at least one value, found an empty list"),
    "no-load": ("users", "  users:", ":9: load: expected one of users, rate, trace, profile, found none"),
    "two-loads": (
        "users",
        "  users: [1]\n  rate: [2]",
        ":11: load.rate: expected one of users, rate, trace, profile, found users and rate",
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
    "fleet-twice": (
        "slo",
        "replicas: 3\nfleet: {replicas: 3}",
        ":12: replicas: expected fleet.replicas instead: there is a fleet",
    ),
    "autoscaler": (
        "slo",
        "fleet: {autoscaler: {min: 2}}",
        ":12: fleet.autoscaler: expected none: autoscaler is not simulated yet",
    ),
    "failures": (
        "slo",
        "fleet: {failures: {mtbf_hours: 200}}",
        ":12: fleet.failures: expected none: failures is not simulated yet",
    ),
    "transfer": (
        "slo",
        "transfer: {to: {gpu: H100-80GB}}",
        ":12: transfer: expected none: the transfer of a calibration",
    ),
    "no-such-replica": (
        "slo",
        "fleet: {replicas: 3, outages: [{replica: 3, at: 5, seconds: 1}]}",
        ":12: fleet.outages[0].replica: expected 0 to 2, found 3",
    ),
    "outages-overlap": (
        "slo",
        "fleet: {outages: [{replica: 0, at: 5, seconds: 2}, {replica: 0, at: 6, seconds: 1}]}",
        ":12: fleet.outages[1].at: expected a time after the outage before (7 s)",
    ),
    "groups-and-replicas": (
        "slo",
        "fleet: {replicas: 2, groups: [{name: a}]}",
        ":12: fleet.replicas: expected none beside groups",
    ),
    "groups-alike": (
        "slo",
        "fleet: {groups: [{name: a}, {name: a}]}",
        ":12: fleet.groups[1].name: expected another name: two groups are called 'a'",
    ),
    "group-flag": (
        "slo",
        "fleet: {groups: [{name: a, server: {max_waiting_token: 5}}]}",
        ":12: fleet.groups[0].server.max_waiting_token: unknown key; did you mean max_waiting_tokens?",
    ),
    "group-engine": (
        "slo",
        "fleet: {groups: [{name: a, server: {engine: vllm-v1}}]}",
        ":12: fleet.groups[0].server.engine: expected tgi-0.9.4, as the scenario has it: no mix so far",
    ),
    "group-calibration": (
        "slo",
        "fleet: {groups: [{name: a, calibration: none.json}]}",
        ":12: fleet.groups[0].calibration: no such file",
    ),
    "two-detections": (
        "slo",
        "fleet: {detection: {active: {interval: 2}, passive: {}}}",
        ":12: fleet.detection: expected either active or passive, found both",
    ),
    "no-policy": (
        "slo",
        "fleet: {balancer: {policy: best}}",
        ":12: fleet.balancer.policy: expected one of round_robin",
    ),
    "policy-of-another": (
        "slo",
        "fleet: {balancer: {policy: prefix_affinity, like: nginx}}",
        ":12: fleet.balancer.like: expected vllm-router or sglang-router, found prefix_affinity like nginx",
    ),
    "queue-without-limit": (
        "slo",
        "fleet: {balancer: {policy: bounded_queue}}",
        ":12: fleet.balancer.max_connections: expected a number: what is beyond it waits",
    ),
    "replicas-range": (
        "slo",
        "fleet: {replicas: {low: 4, high: 3}}",
        ":12: fleet.replicas: expected low <= high, found 4 and 3",
    ),
    "node": (
        "price",
        "price: {usd_per_hour: 3, replicas_per_node: 2}",
        ":11: price.replicas_per_node: expected it with per: node",
    ),
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

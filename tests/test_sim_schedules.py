"""The simulator makes the calls the real 0.9.4 router made: every one, with the same members, at the same ticks."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace
from schedule import BadSchedules, RouterRun, differences, read_router_runs

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "data" / "router-0.9.4-traces.jsonl"


def test_schedule_of_the_real_router(router_run: RouterRun) -> None:
    found = differences(router_run)
    assert not found, "\n".join(found[:10])


def test_the_shipped_file_has_48_schedules_of_both_kinds_of_server() -> None:
    router_runs = read_router_runs(SHIPPED)
    assert len(router_runs) == len({w.name for w in router_runs}) == 48
    assert {w.config.requires_padding for w in router_runs} == {False, True}
    assert {f.outcome for w in router_runs for f in w.requests.values()} == {"ok", "429", "client_dropped"}


def test_differences_sees_one_tick_one_member_and_one_token_that_are_not_as_recorded() -> None:
    router_run = read_router_runs(SHIPPED)[0]
    at, call = next((i, c) for i, c in enumerate(router_run.calls) if c.op == "decode" and c.next_max_tokens)
    assert call.next_max_tokens is not None
    for wrong in (
        replace(call, t1=call.t1 + 1),
        replace(call, uids=[*call.uids, 99]),
        replace(call, op="prefill"),
        replace(call, next_max_tokens=call.next_max_tokens + 16),
    ):
        doctored = replace(router_run, calls=[*router_run.calls[:at], wrong, *router_run.calls[at + 1 :]])
        assert [d.split(":")[0] for d in differences(doctored)] == [f"call {at}"]
    uid, fate = next((u, f) for u, f in router_run.requests.items() if len(f.token_times) > 1)
    for wrong_fate in (replace(fate, outcome="429"), replace(fate, token_times=fate.token_times[:-1])):
        doctored = replace(router_run, requests=router_run.requests | {uid: wrong_fate})
        assert [d.split(":")[0] for d in differences(doctored)] == [f"request {uid}"]
    assert differences(replace(router_run, calls=router_run.calls[:-1]))


def test_bad_files_are_one_line_that_names_the_place(tmp_path: Path) -> None:
    line = SHIPPED.read_bytes().splitlines()[0]
    bad = {
        "empty.jsonl": (b"\n", "no recorded schedules"),
        "torn.jsonl": (line + b"\n" + line[:-200], "torn.jsonl:2: not a recorded schedule"),
        "other.jsonl": (b'{"a": 1}', "other.jsonl:1: not a recorded schedule (Object missing required field `config`"),
        "block.jsonl": (line.replace(b'"block_size": 16', b'"block_size": 32'), "config.block_size: expected 16"),
        "torn.jsonl.gz": (gzip.compress(line)[:-9], "cannot be read"),
        "notjson.jsonl": (b"\xff\xfe\x00", "notjson.jsonl:1: not a recorded schedule"),
    }
    for name, (content, message) in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadSchedules) as raised:
            read_router_runs(tmp_path / name)
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)
    with pytest.raises(BadSchedules, match=r"missing\.jsonl: cannot be read"):
        read_router_runs(tmp_path / "missing.jsonl")


def test_pytest_schedules_judges_another_file_plain_or_gz(tmp_path: Path) -> None:
    lines = SHIPPED.read_bytes().splitlines()
    (tmp_path / "good.jsonl.gz").write_bytes(gzip.compress(lines[0] + b"\n" + lines[1]))
    (tmp_path / "wrong.jsonl").write_bytes(lines[2].replace(b'"t0": ', b'"t0": 1', 1))

    def judge(*files: str) -> subprocess.CompletedProcess[str]:
        options = [word for f in files for word in ("--schedules", str(tmp_path / f))]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, "-k", "schedule_of"]
        test = ROOT / "tests" / "test_sim_schedules.py"
        return subprocess.run([*command, str(test)], cwd=ROOT, capture_output=True, text=True, timeout=120)

    both = judge("good.jsonl.gz", "wrong.jsonl")
    assert both.returncode == 1
    assert "1 failed, 2 passed" in both.stdout
    bad = judge("none.jsonl")
    assert bad.returncode == 4
    assert "none.jsonl: cannot be read" in bad.stderr

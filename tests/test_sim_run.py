"""A run directory is read as it was written, whole or torn, by one worker or several; it is never overwritten."""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from warned import texts

from sim.cluster.ladder import climb
from sim.cluster.replay import replay
from sim.engines import vllm_v1
from sim.engines.tgi_0_9_4 import Flags
from sim.model.calibration import Clocks, Delay
from sim.model.errors import BadInput
from sim.model.files.atomic import write_file
from sim.model.machine import Machine
from sim.model.scenario import Load, Scenario
from sim.model.workload import Lengths, Workload
from sim.results import metrics
from sim.run import Run, read_run, write_run
from sim.steptime.linear import affine, step_time
from sim.steptime.noise_parameters import Noise

SCENARIO = Scenario(
    server=Flags(),
    name="small",
    workload=Workload(prompt_tokens=Lengths(uniform=(10, 200)), output_tokens=Lengths(uniform=(1, 40))),
    load=Load(users=[1, 3], seconds=20.0),
)
STEP_TIME = affine(a0=0.01, a1=1e-4, b0=0.02, b1=1e-3, b2=1e-6)
CLOCKS = Clocks(downlink=Delay(quantiles=[0.001, 0.003]), turnaround=Delay(quantiles=[0.002, 0.01]))
NOISE = Noise(decode=[0.9, 1.0, 1.1])


def simulated(noise: Noise | None = None) -> Run:
    server = Flags(max_batch_total_tokens=2000)
    return climb(SCENARIO, Machine(STEP_TIME, server, noise or Noise(), CLOCKS), (1, 0))


def lines(path: Path) -> list[dict[str, Any]]:
    return [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]


def write(path: Path, records: list[dict[str, Any]], tail: bytes = b"") -> None:
    data = b"".join(msgspec.json.encode(r) + b"\n" for r in records) + tail
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("noise", [None, NOISE])
def test_a_run_written_is_read_back_with_the_same_statistics(tmp_path: Path, noise: Noise | None) -> None:
    run = simulated(noise)
    again = read_run(write_run(run, tmp_path / "run", steps=True))
    asked = msgspec.structs.replace(again.scenario, written=run.scenario.written)
    assert (again.kind, again.name, asked, texts(again.warnings)) == ("simulated", "small", run.scenario, [])
    assert [(r.users, r.status) for r in again.rungs] == [(1, "complete"), (3, "complete")]
    for name in ("sent", "ended", "first_token", "last_token"):
        assert again.requests[name].to_numpy() == pytest.approx(run.requests[name].to_numpy(), abs=1e-6, nan_ok=True)
    for name in ("id", "user", "rung", "prompt_tokens", "output_tokens", "status", "finish_reason"):
        assert (again.requests[name].isna() == run.requests[name].isna()).all()
        assert (again.requests[name].dropna() == run.requests[name].dropna()).all()
    ours, theirs = metrics.table(run), metrics.table(again)
    for name in ours.columns:
        assert theirs[name].to_numpy() == pytest.approx(ours[name].to_numpy(), rel=1e-3, nan_ok=True), name


def test_steps_say_whose_they_are(tmp_path: Path) -> None:
    """A request is in one prefill and in a decode step for each of its further tokens."""
    model = Machine(STEP_TIME, Flags(max_batch_total_tokens=2000), NOISE, CLOCKS)
    write_run(climb(SCENARIO, model, (1, 0), members=True), tmp_path / "run", steps=True)
    steps = lines(tmp_path / "run" / "steps.jsonl")
    assert all(len(step["members"]) == step["decode_sequences"] + step["prefill_sequences"] for step in steps)
    tokens: Counter[int] = Counter()
    prefills: Counter[int] = Counter()
    for step in steps:
        for member in step["members"]:
            tokens[member] += step["count"]
            prefills[member] += step["decode_sequences"] == 0
    asked = {r["id"]: r["output_tokens"] for r in lines(tmp_path / "run" / "requests.jsonl") if r["output_tokens"]}
    assert tokens == asked
    assert set(prefills.values()) == {1}
    again = read_run(tmp_path / "run")
    assert lines(write_run(again, tmp_path / "copy", steps=True) / "steps.jsonl")[5]["members"] == steps[5]["members"]


@pytest.mark.parametrize("ahead", [False, True])
def test_steps_of_chunks_say_whose_they_are(ahead: bool) -> None:
    """Asynchronously, too, where a step is scheduled while the one before it runs."""
    flags = vllm_v1.Flags(num_gpu_blocks=400, max_num_batched_tokens=64, max_num_seqs=4, async_scheduling=ahead)
    model = Machine(step_time("mixed", {"s0": 0.02, "s1": 1e-4}), flags, NOISE, CLOCKS)
    steps = climb(SCENARIO, model, (1, 0), members=True).steps
    assert steps is not None and (steps["decode_sequences"] > 1).any() and (steps["prefill_sequences"] > 0).any()
    assert (steps["decode_sequences"] + steps["prefill_sequences"] == steps["members"].map(len)).all()


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    for name, noise in (("a", NOISE), ("b", NOISE), ("c", Noise(decode=[0.9, 1.0, 1.2]))):
        write_run(simulated(noise), tmp_path / name, steps=True)
    for file in ("run.json", "requests.jsonl", "steps.jsonl"):
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b
        assert a != c


def test_a_torn_last_line_is_left_out_with_a_warning_and_another_is_refused(tmp_path: Path) -> None:
    path = write_run(simulated(), tmp_path / "run")
    records = lines(path / "requests.jsonl")
    write(path / "requests.jsonl", records[:-1], tail=msgspec.json.encode(records[-1])[:40])
    run = read_run(path)
    assert len(run.requests) == len(records) - 1
    assert texts(run.warnings) == ["requests.jsonl: the last line was torn and is left out"]
    text = (path / "requests.jsonl").read_bytes().splitlines()
    text[2] = text[2][:30]
    (path / "requests.jsonl").write_bytes(b"\n".join(text))
    with pytest.raises(BadInput, match=r"requests\.jsonl:3: not a JSON object"):
        read_run(path)


def test_files_of_several_workers_plain_and_gz_are_merged_in_order(tmp_path: Path) -> None:
    path = write_run(simulated(), tmp_path / "run")
    records = lines(path / "requests.jsonl")
    whole = read_run(path).requests
    (path / "requests.jsonl").unlink()
    write(path / "requests-1.jsonl", records[1::2])
    write(path / "requests-2.jsonl.gz", records[0::2][::-1])
    merged = read_run(path).requests
    assert merged.equals(whole)
    assert merged["sent"].is_monotonic_increasing


def test_what_a_server_cannot_have_said_of_itself_is_not_believed() -> None:
    run = simulated()
    usual = run.server
    said = {"max_batch_total_tokens": 36000.0, "max_waiting_tokens": True, "max_input_length": 0, "model_id": "m"}
    told = replace(run, info=said | {"waiting_served_ratio": 2}).server
    assert told == msgspec.structs.replace(usual, max_batch_total_tokens=36000, waiting_served_ratio=2.0)
    assert isinstance(told.max_batch_total_tokens, int)


def test_a_run_that_does_not_say_its_prefill_budget_is_warned_about(tmp_path: Path) -> None:
    path = write_run(replace(simulated(), kind="measured"), tmp_path / "run")
    assert texts(read_run(path).warnings) == []
    head = msgspec.json.decode((path / "run.json").read_bytes())
    del head["scenario"]["server"]["max_batch_prefill_tokens"]
    (path / "run.json").write_bytes(msgspec.json.encode(head))
    (said,) = (text for text in texts(read_run(path).untold) if text.startswith("max_batch_prefill_tokens"))
    assert "4096 is only the default: the server does not tell it, and it decides which requests wait" in said


def test_times_of_the_day_are_refused(tmp_path: Path) -> None:
    path = write_run(simulated(), tmp_path / "run")
    head = msgspec.json.decode((path / "run.json").read_bytes())
    head["rungs"][0]["start"] += 1.7e9
    (path / "run.json").write_bytes(msgspec.json.encode(head))
    with pytest.raises(BadInput, match=r"rungs\[0\].start: expected s since the run began, found 1700000000"):
        read_run(path)


def test_requests_that_two_files_tell_of_count_once_with_a_warning(tmp_path: Path) -> None:
    path = write_run(simulated(), tmp_path / "run")
    whole = read_run(path).requests
    records = lines(path / "requests.jsonl")
    write(path / "requests.jsonl.gz", records)
    run = read_run(path)
    assert run.requests.equals(whole)
    n = len(records)
    assert texts(run.warnings) == [
        f"{n} of {2 * n} requests occur twice (the same id, user and time sent) and are counted once"
    ]
    write(path / "requests.jsonl.gz", [r | {"user": r["user"] + 10} for r in records])  # another worker's
    assert len(read_run(path).requests) == 2 * n
    assert texts(read_run(path).warnings) == []


def test_token_times_give_first_and_last_and_unknown_keys_are_ignored(tmp_path: Path) -> None:
    path = write_run(simulated(), tmp_path / "run")
    base = {"prompt_tokens": 5, "max_new_tokens": 9, "status": "ok", "rung": None, "user": None, "colour": "blue"}
    write(
        path / "requests.jsonl",
        [
            base | {"id": 1, "sent": 2.0, "ended": 4.5, "token_times": [2.5, 3.0, 4.0]},
            base | {"id": 0, "sent": 1.0, "ended": 1.5, "token_times": [], "status": "timeout"},
        ],
    )
    run = read_run(path)
    assert run.requests["id"].tolist() == [0, 1]
    assert run.requests["first_token"].tolist()[1:] == [2.5]
    assert run.requests["last_token"].tolist()[1:] == [4.0]
    assert np.isnan(run.requests["first_token"][0])
    assert run.requests["output_tokens"].tolist() == [0, 3]
    assert run.requests["scheduled"].tolist() == [1.0, 2.0]
    assert run.requests["rung"].tolist() == [0, 0]  # null is as good as absent
    assert run.token_times is not None
    assert [len(t) for t in run.token_times] == [0, 3]


def test_an_answer_that_was_not_streamed_has_its_last_token_with_its_end(tmp_path: Path) -> None:
    path = write_run(simulated(), tmp_path / "run")
    whole = metrics.table(read_run(path))
    records = lines(path / "requests.jsonl")
    for record in records:
        del record["first_token"], record["last_token"]
    write(path / "requests.jsonl", records)
    run = read_run(path)
    assert run.token_times is None
    assert run.requests["first_token"].isna().all()
    ok = run.requests["status"] == "ok"
    assert (run.requests["last_token"] == run.requests["ended"])[ok].all()
    assert run.requests["last_token"][~ok].isna().all()
    blind = metrics.table(run)
    for name in ("e2e_mean", "e2e_p95", "rps", "goodput"):
        assert blind[name].to_numpy() == pytest.approx(whole[name].to_numpy(), rel=0.02), name
    assert blind["ttft_mean"].isna().all()


def test_a_segment_written_a_hair_after_its_rung_keeps_its_users(tmp_path: Path) -> None:
    run = simulated()
    start = float(run.requests["sent"][run.requests["rung"] == 1].min())
    rungs = [run.rungs[0], replace(run.rungs[1], start=start)]
    exact = [{"start": 0.0, "first_rung": 0}, {"start": start, "first_rung": 1}]
    path = write_run(replace(run, rungs=rungs, segments=exact), tmp_path / "run")
    later = [exact[0], {"start": read_run(path).rungs[1].start + 4e-7, "first_rung": 1}]
    head(segments=later)(path)
    again = replay(read_run(path), Machine(STEP_TIME, Flags(max_batch_total_tokens=2000)), (1,))
    second = again.requests[again.requests["sent"] >= start - 1e-6]
    assert second["user"].nunique() == run.requests[run.requests["sent"] >= start]["user"].nunique()
    assert second["sent"].min() == pytest.approx(start, abs=2e-6)


def test_a_run_is_never_overwritten_and_leaves_nothing_behind(tmp_path: Path) -> None:
    run = simulated()
    write_run(run, tmp_path / "run")
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(BadInput, match="never overwritten"):
        write_run(run, tmp_path / "run")
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    write_file(tmp_path / "file", b"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "run"]


def head(**changes: Any) -> Any:
    """Lay some keys over those of `run.json`."""

    def spoil(path: Path) -> None:
        values = msgspec.json.decode((path / "run.json").read_bytes())
        (path / "run.json").write_bytes(msgspec.json.format(msgspec.json.encode(values | changes), indent=1))

    return spoil


def line(**changes: object) -> Callable[[Path], None]:
    """A single request, some of whose values are these."""
    good = {"id": 1, "sent": 1.0, "ended": 2.0, "prompt_tokens": 1, "status": "ok"}
    return lambda path: write(path / "requests.jsonl", [good | changes])


RUNG = {"users": 1, "start": 0.0, "ramped": 0.1, "settled": 1.0, "end": 9.0, "status": "complete", "canary": 3}

BAD = {
    "no rungs": (head(rungs=None), ": rungs: expected a list, found nothing"),
    "map of rungs": (head(rungs={"users": 1}), ": rungs: expected a list, found a map of 1"),
    "rung": (head(rungs=[RUNG, 4]), ": rungs[1]: expected a map, found 4"),
    "rung begins": (head(rungs=[{"users": 1}]), ": rungs[0].start: missing; expected a number"),
    "users": (head(rungs=[RUNG | {"users": "one"}]), ": rungs[0].users: expected a whole number, found 'one'"),
    "end": (head(rungs=[RUNG, RUNG | {"end": "x"}]), ": rungs[1].end: expected a number, found 'x'"),
    "rate": (head(rungs=[RUNG | {"rate": []}]), ": rungs[0].rate: expected a number, found an empty list"),
    "rung's warnings": (head(rungs=[RUNG | {"warnings": "many"}]), ": rungs[0].warnings: expected a list"),
    "segment begins": (head(segments=[{"first_rung": 0}]), ": segments[0].start: missing; expected a number"),
    "segment": (head(segments=["a"]), ": segments[0]: expected a map, found 'a'"),
    "segments": (head(segments="a"), ": segments: expected a list, found 'a'"),
    "scenario": (head(scenario="x"), ": scenario: expected a map, found 'x'"),
    "info": (head(info=[1]), ": info: expected a map, found a list of 1"),
    "warnings": (head(warnings=5), ": warnings: expected a list, each a map of text, code, severity, advice, found 5"),
    "large": (
        lambda path: (path / "requests.jsonl").write_bytes(
            b'{"id": 99999999999999999999, "sent": 0, "prompt_tokens": 1, "status": "ok"}\n'
        ),
        "too large for 64 bits",
    ),
    "nothing": (
        lambda path: (path / "requests.jsonl").unlink(),
        "requests.jsonl: missing; expected the run's requests",
    ),
    "no head": (lambda path: (path / "run.json").unlink(), "run.json"),
    "list": (lambda path: (path / "requests.jsonl").write_bytes(b"[1]\n"), ":1: expected a JSON object a line"),
    "no sent": (lambda path: (path / "requests.jsonl").write_bytes(b'{"id": 1}\n'), ":1: sent: missing"),
    "text": (
        lambda path: write(path / "requests.jsonl", [{"id": 1, "sent": "now", "prompt_tokens": 1, "status": "ok"}]),
        ":1: sent: expected a number",
    ),
    "before": (line(sent=-5.0), ":1: sent: expected 0 or more, found -5.0"),
    "negative": (line(output_tokens=-3), ":1: output_tokens: expected 0 or more, found -3"),
    "status": (line(status="okay"), ":1: status: expected one of ok, overloaded, "),
    "backwards": (line(sent=9.0, ended=2.0), ":1: ended: expected no time before it was sent (9.0), found 2.0"),
    "latin": (lambda path: (path / "requests.jsonl").write_bytes(b'{"id": "\xff"}\n\n'), ":1: not a JSON object"),
    "cut": (
        lambda path: (path / "requests.jsonl.gz").write_bytes(gzip.compress(b"{}" * 999)[:-12]),
        "requests.jsonl.gz: cannot be read",
    ),
    "bent": (
        lambda path: (path / "requests.jsonl.gz").write_bytes(gzip.compress(b"{}")[:10] + b"\xff" * 9),
        "requests.jsonl.gz: cannot be read",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_one_line_that_names_the_place(tmp_path: Path, name: str) -> None:
    path = write_run(simulated(), tmp_path / "run")
    spoil, message = BAD[name]
    spoil(path)
    with pytest.raises(BadInput) as raised:
        read_run(path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError) as error:
        write_file(tmp_path / "taken", b"x")
    assert error.value.filename == str(tmp_path / "taken")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_steps_that_were_never_written_are_none(tmp_path: Path) -> None:
    path = write_run(simulated(), tmp_path / "run")
    (path / "steps.jsonl").touch()
    assert read_run(path).steps is None


def test_file_names_in_a_run_are_relative_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = simulated()
    asked = msgspec.structs.replace(run.scenario, calibration="machines/a.json", table="/tables/b.csv")
    path = write_run(replace(run, scenario=asked), Path("out") / "run")
    written = msgspec.json.decode((path / "run.json").read_bytes())["scenario"]
    assert (written["calibration"], written["table"]) == ("../../machines/a.json", "/tables/b.csv")
    assert msgspec.structs.replace(read_run(path).scenario, written=asked.written) == asked
    monkeypatch.chdir(tmp_path / "out")
    assert read_run(Path("run")).scenario.calibration == "../machines/a.json"

"""What other tools wrote becomes runs whose metrics are the ones those tools printed."""

from __future__ import annotations

import gzip
import json
import re
import tarfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from warned import texts

from calibrate.schedule.schedule import schedule_of
from scenarios.cli.main import status
from scenarios.importers.detect import import_results
from sim.cluster.replay import lanes
from sim.model.errors import BadInput
from sim.results.metrics import table
from sim.run import read_run, taken_as, write_run

SAMPLES = Path(__file__).parent / "samples"
NUMBER = r"([\d.,]+)"


@pytest.fixture(scope="session")
def aiperf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    with tarfile.open(SAMPLES / "aiperf.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "aiperf"


def printed(pattern: str, text: str) -> list[str]:
    found = re.findall(pattern, text)
    assert found, pattern
    return [number.replace(",", "") for number in found]


def agrees(found: float, number: str) -> bool:
    """Whether a figure is what was printed, to the last digit that was."""
    half = 0.5 * 10.0 ** -len(number.partition(".")[2])
    return abs(found - float(number)) <= half * 1.001


def documents(name: str) -> list[Any]:
    with gzip.open(SAMPLES / name, "rt") as f:
        return [json.loads(line) for line in f if line.strip()]


def test_guidellm_prints_what_its_run_says() -> None:
    run = import_results(SAMPLES / "guidellm.json.gz")
    text = (SAMPLES / "guidellm.txt").read_text().rpartition("Request Latency Statistics")[2]
    found = table(run)
    assert found["load"].tolist() == [1, 2, 4]
    for row in found.to_dict("records"):
        lines = [line.split("|")[2:] for line in text.splitlines() if f"concurrent@{row['load']:g}" in line]
        latency, throughput = lines[0], next(line for line in lines if len(line) == 7)
        assert agrees(row["e2e_mean"], latency[0].split("±")[0].strip())
        assert agrees(row["ttft_mean"] * 1e3, latency[3].split("±")[0].strip())
        assert agrees(row["in_flight"], throughput[1].strip())
        assert agrees(row["rps"], throughput[2].strip())
        assert agrees(row["output_tokens_per_s"], throughput[4].strip())
    assert np.isnan(found["itl_mean"]).all()  # it keeps two tokens of each answer
    assert any("no ITL" in warning for warning in texts(run.warnings))
    assert set(run.requests["max_new_tokens"]) == set(run.requests["output_tokens"])  # ignore_eos was on
    assert run.created == "2026-11-23T05:58:09.116+00:00"
    assert [segment["start"] for segment in run.segments] == [rung.start for rung in run.rungs]  # users begin anew


def test_other_loads_of_guidellm(tmp_path: Path) -> None:
    (document,) = documents("guidellm.json.gz")
    alone, many, replayed = (benchmark["config"]["strategy"] for benchmark in document["benchmarks"])
    alone |= {"type_": "synchronous", "streams": None}
    many |= {"type_": "throughput", "streams": None, "max_concurrency": 2}
    first = document["benchmarks"][0]["requests"]
    first["successful"][0]["info"]["timings"]["request_start"] = None
    del first["successful"][-2:]
    run = import_results(saved(tmp_path, document))
    assert run.scenario.load.users == [1, 2, 4]
    assert any("as fast as the server would take them" in warning for warning in texts(run.rungs[1].warnings))
    assert any("1 requests that were never sent" in warning for warning in texts(run.rungs[0].warnings))
    assert any("2 requests are not in the file" in warning for warning in texts(run.rungs[0].warnings))
    replayed |= {"type_": "replay", "streams": None}  # of which the requests alone tell the load
    rung = import_results(saved(tmp_path, document)).rungs[-1]
    sent = [r["info"]["timings"]["request_start"] for r in document["benchmarks"][2]["requests"]["successful"]]
    assert rung.rate == pytest.approx((len(sent) - 1) / (max(sent) - min(sent)), rel=0.05)


def test_guidellm_that_lost_its_schedule_is_found_out() -> None:
    run = import_results(SAMPLES / "guidellm-rate.json.gz")
    on_time, lost = run.rungs
    assert not any("due time" in warning for warning in texts(on_time.warnings))
    assert any(
        "the file says 3 requests/s" in warning for warning in texts(on_time.warnings)
    )  # it sent 29 requests in 1.9 s
    assert any("the rate changed" in warning for warning in texts(on_time.warnings))
    assert on_time.rate == pytest.approx(36 / 4.28, rel=0.02)
    assert lost.rate is not None
    assert lost.rate > 100
    assert any("200 of 200" in warning and "due time" in warning for warning in texts(lost.warnings))
    first = run.requests[run.requests["rung"] == 0]
    waited = first["sent"] - first["scheduled"]
    assert (waited > 0).all()
    assert waited.max() < 0.1
    later = run.requests[run.requests["rung"] == 1]
    assert (later["scheduled"] == later["sent"]).all()
    assert np.ptp(later["sent"]) < 1.0
    # what the end cut off is kept, and is in no percentile; the warm-up is before the window
    cut = run.requests[run.requests["status"] == "aborted"]
    assert len(cut) == 21 + 188
    assert (cut["max_new_tokens"] > cut["output_tokens"]).all()
    assert table(run)["completions"].tolist()[0] < (first["status"] == "ok").sum()
    assert on_time.settled > on_time.start


def test_vllm_prints_what_its_run_says() -> None:
    run = import_results(SAMPLES / "vllm.json.gz")
    text = (SAMPLES / "vllm.txt").read_text()
    found = table(run)
    assert found["load"].tolist() == [int(n) for n in printed(rf"\nMaximum request concurrency: +{NUMBER} +\n", text)]
    rps = printed(rf"Request throughput \(req/s\): +{NUMBER}", text)
    ttft = printed(rf"Mean TTFT \(ms\): +{NUMBER}", text)
    e2e = printed(rf"Mean E2EL \(ms\): +{NUMBER}", text)
    tokens = printed(rf"Output token throughput \(tok/s\): +{NUMBER}", text)
    for i, row in enumerate(found.to_dict("records")):
        mine = run.requests[run.requests["rung"] == i]
        assert agrees(row["rps"], rps[i])
        assert agrees(row["ttft_mean"] * 1e3, ttft[i])
        document = documents("vllm.json.gz")[i]
        assert mine["sent"].min() - run.rungs[i].settled == pytest.approx(document["queue_times"][0])
        assert agrees(row["output_tokens_per_s"], tokens[i])
        assert agrees((mine["ended"] - mine["sent"]).mean() * 1e3, e2e[i])
        # vLLM times the chunk that ends an answer, a run its last token
        closing = np.mean([gaps[-1] for gaps in document["itls"]])
        assert row["e2e_mean"] * 1e3 == pytest.approx(float(e2e[i]) - closing * 1e3, abs=0.006)
    assert any("72 of 72" in warning and "last token" in warning for warning in texts(run.warnings))


def test_every_token_of_vllm_has_its_time_and_its_step() -> None:
    run = import_results(SAMPLES / "vllm.json.gz")
    assert run.token_times is not None
    assert [len(t) for t in run.token_times] == run.requests["output_tokens"].tolist()
    assert all((np.diff(t) >= 0).all() for t in run.token_times)
    schedule = schedule_of(taken_as(run, "tgi-0.9.4"))
    assert len(schedule.request) == run.requests["output_tokens"].sum()
    assert schedule.steps["sequences"].max() <= 4


def test_the_server_is_as_wide_as_what_it_was_seen_to_accept(tmp_path: Path) -> None:
    (document, *_) = documents("vllm.json.gz")
    document["input_lens"][0] = 5000
    server = taken_as(import_results(saved(tmp_path, document)), "tgi-0.9.4").server
    assert not server.refuses(5000, document["output_lens"][0])


def test_failed_requests_of_vllm_are_kept_without_anybodys_paths() -> None:
    run = import_results(SAMPLES / "vllm-failures.json.gz")
    failed = run.requests[run.requests["status"] != "ok"]
    stated = sum(document["failed"] for document in documents("vllm-failures.json.gz"))
    assert len(failed) == stated > 0
    assert set(failed["status"]) == {"reset"}
    assert failed["error"].str.fullmatch("aiohttp.*ServerDisconnectedError: Server disconnected").all()
    assert failed["last_token"].isna().all()
    assert any("when they were sent stands in" in warning for warning in texts(run.rungs[0].warnings))
    rates = [document["request_throughput"] for document in documents("vllm-failures.json.gz")]
    assert table(run)["rps"].tolist() == pytest.approx(rates)


def test_chunks_of_several_tokens_are_events(tmp_path: Path) -> None:
    (document, *_) = documents("vllm.json.gz")
    document["itls"] = [[a + b for a, b in zip(g[::2], g[1::2], strict=False)] for g in document["itls"]]
    run = import_results(saved(tmp_path, document))
    assert any("came in a chunk with others" in warning for warning in texts(run.warnings))
    (row,) = table(run).to_dict("records")
    assert row["output_tokens_per_s"] == pytest.approx(document["output_throughput"])
    gaps = np.concatenate(document["itls"])
    assert row["itl_mean"] == pytest.approx(gaps.mean(), rel=0.02)  # between chunks
    assert row["tpot_mean"] < 0.6 * row["itl_mean"]


def test_an_open_loop_of_vllm_counts_from_when_requests_were_due(tmp_path: Path) -> None:
    (document, *_) = documents("vllm.json.gz")  # one at a time: at a rate of 50/s, most of the time is waiting
    first = document["start_times"][0]
    document["queue_times"] = [at - first - i / 50 for i, at in enumerate(document["start_times"])]
    run = import_results(saved(tmp_path, document | {"request_rate": 50.0}))
    assert run.rungs[0].rate == 50.0
    assert (run.requests["sent"] - run.requests["scheduled"]).tolist() == pytest.approx(document["queue_times"])
    assert any("let in at once" in warning for warning in texts(run.rungs[0].warnings))


def test_aiperf_prints_what_its_run_says(aiperf: Path) -> None:
    run = import_results(aiperf / "sweep")
    assert run.token_times is not None
    assert [len(t) for t in run.token_times] == run.requests["output_tokens"].tolist()
    found = table(run).set_index("load")
    assert found.index.tolist() == [1, 2, 4]
    for users, row in found.iterrows():
        folder = aiperf / "sweep" / f"concurrency_{users:g}"
        text = (folder / "profile_export_console.txt").read_text()
        assert agrees(row["e2e_mean"] * 1e3, printed(rf" Request Latency \(ms\) │ +{NUMBER}", text)[0])
        assert agrees(row["ttft_mean"] * 1e3, printed(rf" Time to First Token \(ms\) │ +{NUMBER}", text)[0])
        # aiperf's ITL is the mean of TPOTs, its throughput is over a phase that is a little longer than its duration
        assert agrees(row["tpot_mean"] * 1e3, printed(rf" Inter Token Latency \(ms\) │ +{NUMBER}", text)[0])
        assert row["rps"] == pytest.approx(
            float(printed(rf" Request Throughput .* │ +{NUMBER} │ +N/A", text)[0]), rel=0.01
        )
        summary = json.loads((folder / "profile_export_aiperf.json").read_text())
        assert row["rps"] == pytest.approx(summary["request_count"]["avg"] / summary["benchmark_duration"]["avg"])


def test_aiperf_at_a_rate_begins_with_what_it_measured(aiperf: Path) -> None:
    records = import_results(aiperf / "rate" / "profile_export.jsonl")
    summary = import_results(aiperf / "rate" / "profile_export_aiperf.json")
    assert records.requests.equals(summary.requests)
    (rung,) = records.rungs
    sent = np.sort(records.requests["scheduled"][records.requests["sent"] >= rung.settled])
    assert rung.rate == pytest.approx(19 / (sent[-1] - sent[0]), rel=0.03)
    assert any("the file says 4 requests/s" in warning for warning in texts(rung.warnings))
    assert any("3 requests of a warm-up are left out" in warning for warning in texts(rung.warnings))
    assert table(records)["completions"].tolist() == [20]
    lag = records.requests["sent"] - records.requests["scheduled"]
    assert (lag > 0).all()
    assert lag.max() < 0.1


def test_aiperf_without_its_summary_counts_the_users(aiperf: Path, tmp_path: Path) -> None:
    alone = tmp_path / "profile_export.jsonl"
    alone.write_bytes((aiperf / "sweep" / "concurrency_4" / "profile_export.jsonl").read_bytes())
    (rung,) = import_results(alone).rungs
    assert rung.users == 4
    assert any("the load is not stated; 4 requests were in flight" in warning for warning in texts(rung.warnings))


def test_a_benchmark_that_sent_nothing_overlaps_with_none(tmp_path: Path) -> None:
    (guidellm,) = documents("guidellm.json.gz")
    empty = json.loads(json.dumps(guidellm["benchmarks"][0]))
    empty["requests"] = {kind: [] for kind in empty["requests"]}
    run = import_results(saved(tmp_path, guidellm | {"benchmarks": [empty, *guidellm["benchmarks"][1:]]}))
    assert table(run)["completions"].tolist()[0] == 0
    assert (table(run)["completions"].iloc[1:] > 0).all()


EVERY = ["guidellm.json.gz", "guidellm-rate.json.gz", "vllm.json.gz", "vllm-failures.json.gz", "locust-rows.csv"]


@pytest.mark.parametrize("name", [*EVERY, "locust_stats_history.csv"])
def test_an_imported_run_survives_being_written(name: str, tmp_path: Path) -> None:
    run = import_results(SAMPLES / name)
    again = read_run(write_run(run, tmp_path / "run"))
    assert again.kind == "measured"
    assert (texts(again.warnings), again.segments, again.software) == (texts(run.warnings), run.segments, run.software)
    assert [texts(rung.warnings) for rung in again.rungs] == [texts(rung.warnings) for rung in run.rungs]
    assert again.scenario == run.scenario
    was, now = table(run), table(again)
    assert list(was.columns) == list(now.columns)
    np.testing.assert_allclose(now.to_numpy(float), was.to_numpy(float), rtol=1e-3)
    assert "/" not in run.name


@pytest.mark.parametrize("name", EVERY)
def test_an_imported_run_keeps_the_laws_of_a_run(name: str) -> None:
    run = import_results(SAMPLES / name)
    requests, ok = run.requests, run.requests[run.requests["status"] == "ok"]
    assert (requests["scheduled"] >= 0).all()
    assert (requests["scheduled"] <= requests["sent"]).all()
    assert (requests["sent"] <= requests["ended"]).all()
    assert (ok["last_token"] <= ok["ended"] + 1e-6).all()
    assert not (ok["first_token"] < ok["sent"]).any()
    assert requests["id"].is_unique
    for rung, of in requests.groupby("rung"):
        assert run.rungs[int(str(rung))].start <= of["scheduled"].min() + 1e-9
        if (users := run.rungs[int(str(rung))].users) is not None:
            assert of["user"].between(0, users - 1).all()
            for _, mine in of.groupby("user"):  # one request at a time
                ended = mine.sort_values("sent")["ended"].to_numpy()[:-1]
                assert (mine.sort_values("sent")["sent"].to_numpy()[1:] >= ended - 0.001).all()


@given(st.integers(1, 5), st.lists(st.tuples(st.floats(0.01, 2), st.floats(0, 1)), min_size=1, max_size=60))
def test_users_are_told_apart_as_far_as_a_closed_loop_can(users: int, draws: list[tuple[float, float]]) -> None:
    free = [0.0] * users
    sent, ended = [], []
    for seconds, pause in draws:
        next_user = min(range(users), key=free.__getitem__)
        sent.append(free[next_user] + pause)
        free[next_user] = sent[-1] + seconds
        ended.append(free[next_user])
    lane = lanes(sent, ended, users)
    assert set(lane) <= set(range(users))
    for user in set(lane):
        mine = sorted((a, b) for a, b, at in zip(sent, ended, lane, strict=True) if at == user)
        assert all(later >= end - 0.001 for (_, end), (later, _) in pairwise(mine))


def test_a_request_is_that_of_the_user_who_became_free_last() -> None:
    assert lanes([0.0, 0.1, 2.01], [2.0, 1.0, 3.0], 2) == [0, 1, 0]
    assert lanes([0.0, 0.1, 2.01], [1.0, 2.0, 3.0], 2) == [0, 1, 1]
    assert lanes([0.0, 0.1, 2.01], [float("nan"), 2.0, 3.0], 2) == [0, 1, 1]  # an end that is not known never came


def saved(folder: Path, document: object, name: str = "result.json") -> Path:
    path = folder / name
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def without(document: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key not in keys}


def test_what_is_not_a_result_is_refused_in_one_line(tmp_path: Path) -> None:
    (vllm, *_) = documents("vllm.json.gz")
    (guidellm,) = documents("guidellm.json.gz")
    history = (SAMPLES / "locust_stats_history.csv").read_text()
    rows = (SAMPLES / "locust-rows.csv").read_text()
    bad_timings = json.loads(json.dumps(guidellm))
    bad_timings["benchmarks"][1]["requests"]["successful"][3]["info"]["timings"]["request_start"] = "soon"
    cases: list[tuple[object, str]] = [
        ("", "empty"),
        ("hello", "not JSON"),
        ("17", "not a known tool"),
        ("[1, 2]", "not a known tool"),
        ({"metadata": "mine"}, "not a known tool"),
        ("[" * 100_000, "not JSON"),
        (
            without(vllm, "ttfts", "itls", "start_times"),
            "ttfts: missing; expected what every request did, which vllm bench serve writes with --save-",
        ),
        (without(vllm, "start_times") | {"request_rate": 2.0}, "start_times: missing: vllm bench serve did not write"),
        (without(vllm, "start_times") | {"duration": 60}, "start_times: missing, and cannot be rebuilt"),
        (without(vllm, "duration"), "1: duration: missing"),
        (vllm | {"itls": vllm["itls"][:-1]}, "itls: expected 24 values"),
        (vllm | {"ttfts": ["soon"] * 24}, "ttfts[0]: Expected `float`, got `str`"),
        (vllm | {"errors": ["Bad Request"] * 24}, "no request of it succeeded"),
        (json.dumps(vllm) + "\n" + json.dumps(vllm), "overlap in time"),
        (guidellm | {"benchmarks": []}, "benchmarks: empty"),
        (without(guidellm, "benchmarks"), "benchmarks: missing"),
        (bad_timings, "benchmarks[1].requests.successful[3].info.timings.request_start: Expected `float | null`"),
        (history.splitlines()[0], "User Count: no row Aggregated"),
        (history.replace("1795414893,1,,", "later,1,,"), "Timestamp: expected a number, found 'later'"),
        (rows.splitlines()[0], "allThreads: expected a row for every request"),
        (rows.replace(",332,", ",nan,"), ":2: elapsed: expected a number, found 'nan'"),
        (rows.replace("2026-11-23 06:21:3", "1795414893"), "timeStamp: expected a time such as"),
        ((SAMPLES / "locust_stats.csv").read_text(), "holds sums over the whole test; expected ..._stats_history.csv"),
    ]
    for document, message in cases:
        path = saved(tmp_path, document)
        with pytest.raises(BadInput) as refused:
            import_results(path)
        assert str(refused.value).startswith(f"{path}:")
        assert message in str(refused.value)
        assert "\n" not in str(refused.value)


def test_files_that_are_not_there_are_named(tmp_path: Path, aiperf: Path) -> None:
    summary = tmp_path / "profile_export_aiperf.json"
    summary.write_bytes((aiperf / "rate" / "profile_export_aiperf.json").read_bytes())
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "torn.gz").write_bytes((SAMPLES / "vllm.json.gz").read_bytes()[:100])
    (tmp_path / "bent.gz").write_bytes((SAMPLES / "vllm.json.gz").read_bytes()[:20] + b"\xff" * 99)
    (tmp_path / "empty").mkdir()
    for name, message in {
        "nowhere.json": "missing; expected guidellm's",
        "picture.png": "not UTF-8 text",
        "torn.gz": "cannot be read",
        "bent.gz": "cannot be read",
        "empty": "no profile_export.jsonl in it",
        summary.name: "profile_export.jsonl: missing; expected the requests, which aiperf --export-level records",
    }.items():
        with pytest.raises(BadInput, match=re.escape(message)):
            import_results(tmp_path / name)


def test_the_command_leaves_a_run_and_says_its_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert status(["import", str(SAMPLES / "vllm.json.gz"), "-o", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{out}\n"
    assert "warning: 72 of 72 answers" in said.err
    assert "warning: at 4 users: on average" in said.err
    assert table(read_run(out))["completions"].tolist() == [24, 24, 24]
    assert status(["import", str(SAMPLES / "vllm.json.gz"), "-o", str(out)]) == 2
    assert "never overwritten" in capsys.readouterr().err


def test_the_command_refuses_in_one_line_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(["import", str(SAMPLES / "locust_stats.csv"), "-o", str(tmp_path / "run")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())

"""Files of other tools in the shapes that people have them: read with the right numbers, or named and refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from warned import texts

from scenarios.cli.main import status
from sim.results.metrics import table
from sim.run import Run, read_run

SAMPLES = Path(__file__).parent / "samples" / "foreign"


def imported(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Run, pd.DataFrame, str]:
    """The run that `servecast import` wrote, its metrics, and every warning that stands in it."""
    out = tmp_path / "run"
    assert status(["import", str(path), "-o", str(out)]) == 0, capsys.readouterr().err
    assert status(["report", str(out), "-o", str(tmp_path / "report.html")]) == 0, capsys.readouterr().err
    assert "NaN" not in (out / "run.json").read_text()
    run = read_run(out)
    return (
        run,
        table(run),
        "\n".join([*texts(run.warnings), *(text for rung in run.rungs for text in texts(rung.warnings))]),
    )


def saved(folder: Path, document: object, name: str = "result.json") -> Path:
    path = folder / name
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def test_a_cancelled_request_of_aiperf_ends_at_its_start_for_want_of_an_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, found, said = imported(SAMPLES / "aiperf-cancelled-monotonic-end.jsonl", tmp_path, capsys)
    cancelled = run.requests[run.requests["status"] != "ok"]
    assert cancelled["status"].tolist() == ["aborted"]
    assert cancelled["ended"].tolist() == cancelled["sent"].tolist()
    assert "when 1 requests ended is not recorded; when they were sent stands in for it" in said
    assert found["load"].tolist() == [2]
    assert found["ttft_mean"].tolist() == pytest.approx([0.2])
    assert status(["compare", str(tmp_path / "run"), str(tmp_path / "run")]) == 0


def test_old_names_of_aiperf_are_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, found, _ = imported(SAMPLES / "aiperf-old-names.jsonl", tmp_path, capsys)
    assert found["ttft_mean"].tolist() == pytest.approx([0.2])
    assert found["itl_mean"].tolist() == pytest.approx([0.025])
    assert found["tpot_mean"].tolist() == pytest.approx([0.025])


def test_names_of_aiperf_that_nobody_knows_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (SAMPLES / "aiperf-old-names.jsonl").read_text().replace('"ttft"', '"first"')
    _, found, said = imported(saved(tmp_path, text), tmp_path, capsys)
    assert np.isnan(found["ttft_mean"]).all()
    assert "no record says when the first token came: no TTFT and no TPOT" in said
    assert "no ITL" in said


def test_few_bundled_chunks_cost_no_itl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, found, said = imported(SAMPLES / "aiperf-few-bundled.jsonl", tmp_path, capsys)
    assert 0.012 <= found["itl_mean"].item() <= 0.0121
    assert "5 of 1000 tokens (0.005) came in a chunk with others" in said
    assert run.token_times is not None
    assert [len(times) for times in run.token_times] == run.requests["output_tokens"].tolist()


@pytest.mark.parametrize("users", [2, 9])
def test_an_older_summary_of_aiperf_is_heard_and_the_requests_more(
    users: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "profile_export.jsonl").write_bytes((SAMPLES / "aiperf-old-names.jsonl").read_bytes())
    asked = {
        "loadgen": {"concurrency": users, "request_rate_mode": "concurrency_burst"},
        "cli_command": "aiperf profile",
    }
    summary = {"request_throughput": {"avg": 1.0}, "request_latency": {"avg": 1.0}, "input_config": asked}
    path = saved(tmp_path, summary, "profile_export_aiperf.json")
    run, found, said = imported(path, tmp_path, capsys)
    assert found["load"].tolist() == [2]
    assert ("the file says 9 users, but 2 requests were in flight at most" in said) == (users == 9)
    assert run.software["client"] == "aiperf"


def test_a_ramp_of_vllm_is_an_open_loop_of_changing_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, found, said = imported(SAMPLES / "vllm-ramp-up.json", tmp_path, capsys)
    assert run.rungs[0].users is None
    assert run.rungs[0].rate == pytest.approx(39 / 7.485, rel=1e-3)
    assert found["completions"].tolist() == [40]
    assert "the rate went up (linear, from 1 to 10 requests/s): a trace" in said
    assert "at once" not in said


def vllm(rate: Any, starts: list[float] | None, **more: Any) -> dict[str, Any]:
    n = 12 if starts is None else len(starts)
    lists = {"input_lens": [32] * n, "output_lens": [4] * n, "ttfts": [0.1] * n, "itls": [[0.1] * 3] * n}
    head = {
        "num_prompts": n,
        "request_rate": rate,
        "request_throughput": 1.0,
        "burstiness": 1.0,
        "max_concurrency": None,
    }
    starts_known = {} if starts is None else {"start_times": starts, "duration": max(starts) - min(starts) + 0.4}
    return head | lists | {"errors": [""] * n, "generated_texts": [""] * n} | starts_known | more


def test_burstiness_and_the_rate_that_came_are_in_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    starts = np.cumsum(np.random.default_rng(2).gamma(0.25, 1.0, 50)).tolist()
    run, _, said = imported(saved(tmp_path, vllm(9.0, starts, burstiness=0.25)), tmp_path, capsys)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["rungs"][0]["arrivals"] == {"gamma": {"cv": 2.0}}
    assert run.rungs[0].rate == pytest.approx(49 / (starts[-1] - starts[0]), rel=1e-4)
    assert "the file says 9 requests/s" in said


def test_several_results_in_one_file_are_several_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = vllm("inf", [i * 0.4 for i in range(12)], max_concurrency=1)
    two = vllm("inf", [100 + (i // 2) * 0.4 for i in range(12)], max_concurrency=2)
    for text in (json.dumps(one) + "\n" + json.dumps(two), json.dumps(one, indent=2) + json.dumps(two, indent=2)):
        _, found, _ = imported(saved(tmp_path, text), tmp_path, capsys)
        assert found["load"].tolist() == [1, 2]
        for file in sorted((tmp_path / "run").iterdir()):
            file.unlink()
        (tmp_path / "run").rmdir()


@pytest.mark.parametrize("tool", ["vllm", "sglang"])
def test_a_closed_loop_without_start_times_is_rebuilt(
    tool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = vllm("inf", None, max_concurrency=3, duration=1.6, completed=12)
    if tool == "sglang":  # Python writes an infinite rate as no JSON reader but its own knows it
        document |= {"total_output_tokens_retokenized": 48, "request_rate": float("inf"), "backend": "sglang"}
        del document["num_prompts"]
    run, found, said = imported(saved(tmp_path, document), tmp_path, capsys)
    assert run.requests["sent"].tolist() == pytest.approx([i // 3 * 0.4 for i in range(12)])
    assert found["load"].tolist() == [3]
    assert found["ttft_mean"].tolist() == pytest.approx([0.1])
    assert found["itl_mean"].tolist() == pytest.approx([0.1])
    assert "when each request was sent is not in the file: rebuilt" in said
    assert run.software["client"].startswith("vllm bench serve" if tool == "vllm" else "sglang")


def test_a_sweep_of_guidellm_has_the_loads_of_its_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, found, said = imported(SAMPLES / "guidellm-sweep.json.gz", tmp_path, capsys)
    assert [(rung.users, rung.rate) for rung in run.rungs] == [(1, None), (8, None), (None, 4.0)]
    assert run.scenario.load.arrivals == "constant"
    assert "2 of 3 loads are users, the others requests/s" in said
    assert found["ttft_mean"].tolist() == pytest.approx([0.05, 0.2, 0.06])
    forecast = ["--calibration", "measure/standin/calibration.json", "--as", "tgi-0.9.4", "--replicates", "19"]
    capsys.readouterr()
    assert status(["compare", str(tmp_path / "run"), *forecast, "--jobs", "1"]) == 0
    lines = [line.partition("  E2E mean, s") for line in capsys.readouterr().out.splitlines()]
    loads = {load.strip() for load, found_it, _ in lines if found_it}
    assert loads == {"1 user", "8 users", "4 requests/s"}


def test_guidellm_before_its_versions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, found, _ = imported(SAMPLES / "guidellm-0.4-no-metadata.json", tmp_path, capsys)
    assert found["load"].tolist() == [2]
    assert found["ttft_mean"].tolist() == pytest.approx([0.05])
    assert run.software["client"] == "guidellm before 0.5"
    assert run.name == "guidellm-0.4-no-metadata"  # only what says the kind of file is left out


def test_guidellm_of_the_first_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests = [
        {
            "type_": "generative_text_response",
            "scheduler_info": {"targeted_start_time": 1.7e9 + i},
            "prompt_tokens": 64,
            "output_tokens": 21,
            "start_time": 1.7e9 + i,
            "first_token_time": 1.7e9 + i + 0.1,
            "last_token_time": 1.7e9 + i + 0.9,
            "end_time": 1.7e9 + i + 0.99,
        }
        for i in range(6)
    ]
    benchmark = {
        "type_": "generative_benchmark",
        "args": {"strategy": {"type_": "concurrent", "streams": 1}},
        "run_stats": {"start_time": 1.7e9, "end_time": 1.7e9 + 6},
        "requests": {"successful": requests, "incomplete": [], "errored": []},
    }
    _, found, _ = imported(saved(tmp_path, {"benchmarks": [benchmark]}), tmp_path, capsys)
    assert found["load"].tolist() == [1]
    assert found["ttft_mean"].tolist() == pytest.approx([0.1])
    assert found["tpot_mean"].tolist() == pytest.approx([0.04])


def test_cached_tokens_and_first_tokens_of_guidellm_are_heard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads((SAMPLES / "guidellm-0.4-no-metadata.json").read_text())
    for request in document["benchmarks"][0]["requests"]["successful"]:
        request["cached_tokens"] = 48
        request["info"]["timings"] |= {"first_token_iteration": None, "last_token_iteration": None}
    run, found, said = imported(saved(tmp_path, document), tmp_path, capsys)
    assert "480 of 640 prompt tokens (75%) were in the server's cache" in said
    assert found["ttft_mean"].tolist() == pytest.approx([0.05])
    assert (run.requests["last_token"] > run.requests["first_token"]).all()


def chunk(text: str | None, **more: Any) -> dict[str, str]:
    return {"response": "data: " + json.dumps({"choices": [{"delta": {"content": text}}]} | more) + "\n\n"}


@pytest.mark.parametrize("usage", [True, False])
def test_genai_perf_is_read_request_by_request(usage: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ms = 10**6
    counts = {"usage": {"prompt_tokens": 30, "completion_tokens": 3}} if usage else {}
    requests = [
        {
            "timestamp": 10**18 + i * 500 * ms,
            "request_inputs": {"payload": json.dumps({"max_tokens": 9})},
            "response_timestamps": [10**18 + (i * 500 + at) * ms for at in (90, 100, 140, 180, 190, 195)],
            "response_outputs": [
                chunk(""),
                chunk("a"),
                chunk("b"),
                chunk("c"),
                chunk(None, **counts),
                {"response": "data: [DONE]"},
            ],
        }
        for i in range(8)
    ]
    measured = {"experiment": {"mode": "concurrency", "value": 1}, "requests": requests, "window_boundaries": []}
    document = {
        "service_kind": "openai",
        "endpoint": "v1/chat/completions",
        "experiments": [measured],
        "version": "2.5",
    }
    run, found, said = imported(saved(tmp_path, document), tmp_path, capsys)
    assert found["load"].tolist() == [1]
    assert found["ttft_mean"].tolist() == pytest.approx([0.1])
    assert found["itl_mean"].tolist() == pytest.approx([0.04])
    assert set(run.requests["output_tokens"]) == {3}
    assert set(run.requests["max_new_tokens"]) == {9}
    assert ("every response with output stands in for one" in said) == (not usage)
    assert ("prompt lengths are not recorded" in said) == (not usage)


@pytest.mark.parametrize("old", [True, False])
def test_inference_perf_is_read_request_by_request(
    old: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = []
    for i in range(12):
        sent = 5000.0 + i * 0.25
        tokens = [sent + 0.1 + 0.05 * k for k in range(4)]
        if old:  # a time for every line of the stream: data, blank, …, [DONE], blank
            lines = [t for token in [*tokens, tokens[-1] + 0.01] for t in (token, token + 1e-5)]
            info: dict[str, Any] = {"input_tokens": 40, "output_tokens": 4, "output_token_times": lines}
        else:
            response = {"output_tokens": 4, "chunk_times": tokens, "server_usage": {"completion_tokens": 4}}
            info = {"request_metrics": {"text": {"input_tokens": 40}}, "response_metrics": response}
        asked = json.dumps({"prompt": "p", "max_tokens": 4})
        requests.append(
            {"start_time": sent, "end_time": sent + 0.3, "request": asked, "response": "", "info": info, "error": None}
        )
    failed = {"error_type": "TimeoutError", "error_msg": ""}
    requests.append(
        {"start_time": 5003.0, "end_time": 5003.9, "request": "", "response": "", "info": None, "error": failed}
    )
    run, found, said = imported(saved(tmp_path, requests), tmp_path, capsys)
    assert found["load"].tolist() == pytest.approx([4.0])
    assert found["ttft_mean"].tolist() == pytest.approx([0.1])
    assert found["itl_mean"].tolist() == pytest.approx([0.05])
    assert run.requests["status"].tolist()[-1] == "timeout"
    assert set(run.requests["prompt_tokens"]) == {0, 40}
    assert "the load is not stated; requests came at 4/s" in said
    assert ("every line of the stream has its time" in said) == old


SUMMARY = {"request_throughput": {"avg": 1}, "request_latency": {"avg": 1}, "input_config": {"model": ["m"]}}
LLMPERF = {"error_code": None, "ttft_s": 0.1, "end_to_end_latency_s": 1.0, "number_output_tokens": 9}
TRACE = "a trace, not a measurement; name it in a scenario, as workload.trace"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"results_ttft_s_mean": 1, "num_concurrent_requests": 4, "version": "2023-08-31"}, "llmperf's summary"),
        ([LLMPERF, LLMPERF], "llmperf's responses: they do not say when each request was sent"),
        (
            {"load_summary": {}, "successes": {}, "failures": {}},
            "inference-perf's sums of a stage; expected per_",
        ),
        (SUMMARY, "genai-perf's sums; expected profile_export.json"),
        ("Metric,avg,min,max,p99\nRequest Latency (ms),1,1,1,1\n", "aiperf's or genai-perf's sums"),
        ('"Metric","avg","min"\n', "aiperf's or genai-perf's sums"),
        (
            {"benchmarks": [{"benchmarks": [], "id": "x"}], "args": {}},
            "written by guidellm before 0.2",
        ),
        (
            vllm(4.0, None, duration=3),
            "start_times: missing: vllm bench serve did not write when each",
        ),
        (
            vllm(4.0, None, total_output_tokens_retokenized=3, completed=3, duration=3),
            "start_times: missing: sglang's bench_serving did not write when each request was sent",
        ),
        (
            {"duration": 1, "completed": 3, "total_output_tokens_retokenized": 3},
            "ttfts: missing; expected what every request did, which sglang's bench_serving writes with",
        ),
        ({"metadata": {"guidellm_version": "0.8.1"}, "benchmarks": 5.0}, "benchmarks: Expected `array`"),
        (vllm("inf", [0.0, 1.0], output_lens=[4, 10**12]), "expected 0 to 1,000,000,000 output_tokens of request 2"),
        (
            vllm("inf", [0.0, 1.0], input_lens=[4, -1]),
            "expected 0 to 1,000,000,000 prompt_tokens of request 2, found -1",
        ),
        (vllm("inf", [0.0, 1.0], ttfts=[1e308, 1e308], itls=[[1e308], [1e308]]), "expected finite times of request 1"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9,48,10\n", TRACE),
        ('{"timestamp": 0, "input_length": 15, "output_length": 10}\n{"timestamp": 1, "input_length": 1}', TRACE),
    ],
)
def test_what_is_not_read_is_named(
    document: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(["import", str(saved(tmp_path, document)), "-o", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def quoted(text: str, delimiter: str = ",") -> str:
    return "\n".join(delimiter.join(f'"{cell}"' for cell in line.split(",")) for line in text.splitlines())


@pytest.mark.parametrize("change", ["quoted", "bom", "semicolons", "gz"])
@pytest.mark.parametrize("name", ["locust_stats_history.csv", "locust-rows.csv"])
def test_locust_files_that_a_spreadsheet_had(
    change: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (SAMPLES.parent / name).read_text()
    _, expected, _ = imported(SAMPLES.parent / name, tmp_path, capsys)
    changed = {"quoted": quoted(text), "semicolons": quoted(text, ";"), "bom": "\ufeff" + text, "gz": text}[change]
    path = tmp_path / "changed.csv"
    path.write_bytes(gzip.compress(changed.encode()) if change == "gz" else changed.encode())
    (tmp_path / "again").mkdir()
    run, found, _ = imported(path, tmp_path / "again", capsys)
    assert len(run.rungs) == 3
    pd.testing.assert_frame_equal(found, expected)


def test_gaps_that_sglang_divided_by_the_tokens_of_a_chunk_are_put_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own server's streams: a gap of 60 ms before a chunk of 3 tokens is written as three of 20 ms."""
    rng = np.random.default_rng(5)
    gaps = rng.uniform(0.058, 0.062, (12, 10))
    duration = float((0.1 + gaps.sum(axis=1)).reshape(3, 4).sum(axis=0).max())
    document = {
        "backend": "sglang",
        "request_rate": float("inf"),
        "max_concurrency": 4,
        "duration": duration,
        "completed": 12,
        "total_output_tokens_retokenized": 372,
        "errors": [""] * 12,
        "input_lens": [100] * 12,
        "output_lens": [32] * 12,
        "ttfts": [0.1] * 12,
        "itls": [[gap / 3 for gap in row for _ in range(3)] for row in gaps.tolist()],
    }
    run, found, said = imported(saved(tmp_path, json.dumps(document), "result.jsonl"), tmp_path, capsys)
    assert found["itl_mean"].tolist() == pytest.approx([gaps.mean()], rel=1e-3)
    assert found["tpot_mean"].tolist() == pytest.approx([gaps.sum(axis=1).mean() / 31], rel=1e-3)
    assert run.event_tokens is not None
    assert {tuple(each.tolist()) for each in run.event_tokens if each is not None} == {(2, *[3] * 10)}
    assert "came in a chunk with others: ITL is between chunks" in said


@pytest.mark.parametrize("digits", [2, 3])
def test_gaps_that_were_rounded_are_not_put_together(
    digits: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gaps = np.random.default_rng(5).uniform(0.018, 0.022, (12, 30)).round(digits)
    duration = float((0.1 + gaps.sum(axis=1)).reshape(3, 4).sum(axis=0).max())
    document = {
        "backend": "sglang",
        "request_rate": float("inf"),
        "max_concurrency": 4,
        "duration": duration,
        "completed": 12,
        "total_output_tokens_retokenized": 372,
        "errors": [""] * 12,
        "input_lens": [100] * 12,
        "output_lens": [31] * 12,
        "ttfts": [0.1] * 12,
        "itls": gaps.tolist(),
    }
    run, found, _ = imported(saved(tmp_path, json.dumps(document), "result.jsonl"), tmp_path, capsys)
    assert found["itl_mean"].tolist() == pytest.approx([gaps.mean()], rel=1e-3)
    assert run.event_tokens is None


def test_a_warm_up_says_nothing_about_the_load_that_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two users, twenty requests each, half a minute after a warm-up of one user."""
    unix = 1_760_000_000_000_000_000

    def record(start: float, seconds: float, phase: str) -> str:
        begun = unix + round(start * 1e9)
        times = {"request_start_ns": begun, "request_end_ns": begun + round(seconds * 1e9)}
        counts = {"output_sequence_length": {"value": 11}, "input_sequence_length": {"value": 50}}
        latency = {"request_latency": {"value": seconds * 1e3, "unit": "ms"}}
        return json.dumps({"metadata": times | {"benchmark_phase": phase}, "metrics": counts | latency})

    records = [record(i, 1.0, "warmup") for i in range(5)]
    records += [record(35 + i + 0.3 * user, 1.0, "profiling") for user in range(2) for i in range(20)]
    run, found, said = imported(saved(tmp_path, "\n".join(records), "profile_export.jsonl"), tmp_path, capsys)
    assert found["load"].tolist() == [2]
    assert "2 requests were in flight all the time" in said
    assert "5 requests of a warm-up are left out" in said
    assert run.rungs[0].start == 0.0 and len(run.requests) == 40


def test_a_window_of_guidellm_holds_the_answer_that_ended_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unix = 1.76e9

    def request(start: float) -> dict[str, Any]:
        timings = {"request_start": unix + start, "first_token_iteration": unix + start + 0.2}
        timings |= {"last_token_iteration": unix + start + 1.0, "request_end": unix + start + 1.0}
        return {"info": {"timings": timings}, "prompt_tokens": 50, "output_tokens": 11}

    benchmark = {
        "type_": "generative_benchmark",
        "start_time": unix,
        "end_time": unix + 4.0,
        "config": {"strategy": {"type_": "synchronous"}},
        "requests": {"successful": [request(float(i)) for i in range(4)]},
    }
    document = {"metadata": {"guidellm_version": "0.5.0"}, "benchmarks": [benchmark]}
    _, found, _ = imported(saved(tmp_path, document), tmp_path, capsys)
    assert found["rps"].tolist() == pytest.approx([1.0], rel=1e-4)
    assert found["output_tokens_per_s"].tolist() == pytest.approx([11.0], rel=1e-4)

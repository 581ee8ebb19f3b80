"""The stand-in answers as vLLM does, over real HTTP: streams, usage, limits, errors, metrics."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec
import openai
import pytest
from rich.console import Console
from servers import Standin, standin
from warned import texts

from measure.ladder.session import measure
from measure.server.detection import detect
from measure.server.doctor import diagnose
from measure.server.endpoint import Endpoint
from measure.server.exposition import parse
from measure.server.limits import check_limits
from measure.server.provenance import flags_of
from scenarios.cli.main import status
from sim.engines import vllm_v1
from sim.engines.tgi_0_9_4 import Flags
from sim.model.files.records import read_scrapes
from sim.model.flags import DEFAULT, SERVER, Flag
from sim.model.scenario import Load, Scenario
from sim.model.workload import Workload
from sim.run import read_run

LABELS = '{engine="0",model_name="servecast/stand-in"}'
MODEL_LEN = 256
DETAILS = {"prompt_tokens_details": None, "completion_tokens_details": None}
FLAGS = ("--engine", "vllm-v1", "--max-model-len", str(MODEL_LEN), "--block-size", "16")


@pytest.fixture(scope="module")
def server() -> Iterator[Standin]:
    with standin(*FLAGS, "--num-gpu-blocks-override", "65") as process:
        yield process


def call(url: str, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
    """The status and the JSON of an answer."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    try:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        if body is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, raw, {"content-type": "application/json"})
        answer = connection.getresponse()
        data = answer.read()
        return answer.status, json.loads(data) if data else {}
    finally:
        connection.close()


def stream(url: str, path: str, body: dict[str, Any]) -> list[Any]:
    """The events of a stream, decoded, `[DONE]` as it is; read by a client of another library than the stand-in's."""

    async def read() -> list[Any]:
        timeout = aiohttp.ClientTimeout(total=20)
        async with aiohttp.ClientSession(timeout=timeout) as session, session.post(url + path, json=body) as answer:
            assert answer.status == 200
            assert answer.content_type == "text/event-stream"
            lines = (await answer.read()).decode().split("\n\n")
        assert lines.pop() == ""
        events = [line.removeprefix("data: ") for line in lines]
        return [event if event == "[DONE]" else json.loads(event) for event in events]

    return asyncio.run(read())


def metrics(url: str) -> dict[str, float]:
    """Samples by name, without the labels that all have."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return {name.replace(LABELS, ""): value for name, value in parse(text).items()}


def grown(url: str, before: dict[str, float], *names: str) -> list[float]:
    after = metrics(url)
    return [after[f"vllm:{name}"] - before.get(f"vllm:{name}", 0.0) for name in names]


def test_a_completion_is_streamed_token_by_token_with_usage_on_request(server: Standin) -> None:
    body = {"prompt": "a b c", "max_tokens": 4, "stream": True}
    *chunks, done = stream(server.url, "/v1/completions", body)
    assert done == "[DONE]" and len(chunks) == 4
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert len({chunk["id"] for chunk in chunks}) == 1 and chunks[0]["id"].startswith("cmpl-")
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "length"]
    assert all(chunk["choices"][0]["text"].startswith(" w") and "usage" not in chunk for chunk in chunks)
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last, done = stream(server.url, "/v1/completions", body | {"stream_options": options})
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4]
    assert last["choices"] == [] and done == "[DONE]"
    assert last["usage"] == {"prompt_tokens": 4, "total_tokens": 8, "completion_tokens": 4}


def test_a_chat_begins_with_a_role_and_ends_with_its_reason(server: Standin) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "x"}]}]
    body = {"messages": messages, "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last, done = stream(server.url, "/v1/chat/completions", body)
    assert done == "[DONE]" and {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and len(deltas) == 4
    assert all(list(delta) == ["content"] and delta["content"] for delta in deltas[1:])
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "length"]
    assert not any("usage" in chunk for chunk in chunks)
    assert last["usage"]["completion_tokens"] == 3
    _, whole = call(server.url, "/v1/chat/completions", {"messages": messages, "max_tokens": 3})
    assert whole["choices"][0]["message"]["content"] == "".join(delta["content"] for delta in deltas)
    assert whole["usage"] == last["usage"] | DETAILS and whole["object"] == "chat.completion"


def test_max_tokens_is_16_for_a_completion_and_what_is_left_for_a_chat(server: Standin) -> None:
    _, whole = call(server.url, "/v1/completions", {"prompt": [5] * 10})
    assert whole["usage"] == {"prompt_tokens": 10, "total_tokens": 26, "completion_tokens": 16} | DETAILS
    _, whole = call(server.url, "/v1/chat/completions", {"messages": [{"role": "user", "content": "x " * 200}]})
    assert whole["usage"]["total_tokens"] == MODEL_LEN


def test_an_answer_is_cut_silently_at_the_context_length(server: Standin) -> None:
    _, whole = call(server.url, "/v1/completions", {"prompt": [5] * (MODEL_LEN - 6), "max_tokens": 100})
    assert whole["usage"]["completion_tokens"] == 6
    assert whole["choices"][0]["finish_reason"] == "length"


def test_several_prompts_are_a_choice_each(server: Standin) -> None:
    _, whole = call(server.url, "/v1/completions", {"prompt": [[7, 8], [9] * 5], "max_tokens": 3})
    assert [choice["index"] for choice in whole["choices"]] == [0, 1]
    assert whole["usage"] == {"prompt_tokens": 7, "total_tokens": 13, "completion_tokens": 6} | DETAILS
    *chunks, _ = stream(server.url, "/v1/completions", {"prompt": ["a", "b"], "max_tokens": 3, "stream": True})
    assert sorted(chunk["choices"][0]["index"] for chunk in chunks) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("body", "status", "kind", "message"),
    [
        ({"prompt": [5] * (MODEL_LEN + 1)}, 400, "BadRequestError", "maximum context length is 256 tokens"),
        ({"prompt": [5] * MODEL_LEN}, 400, "BadRequestError", "max_tokens must be at least 1, got 0"),
        ({"prompt": "x", "max_tokens": MODEL_LEN + 1}, 400, "BadRequestError", "max_tokens"),
        ({"prompt": "x", "max_tokens": 0}, 400, "BadRequestError", "max_tokens must be at least 1, got 0"),
        ({"prompt": "x", "max_tokens": 4, "min_tokens": 5}, 400, "BadRequestError", "min_tokens"),
        ({"prompt": ""}, 400, "BadRequestError", "prompt"),
        ({"prompt": [1, 2, 10**6]}, 400, "BadRequestError", "out of vocabulary"),
        ({"prompt": {"a": 1}}, 400, "Bad Request", "body.prompt"),
        ({"prompt": "x", "temperature": -1}, 400, "BadRequestError", "temperature must be non-negative"),
        ({"prompt": "x", "n": 2, "temperature": 0}, 400, "BadRequestError", "n must be 1"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, 400, "BadRequestError", "stream=True"),
        ({"prompt": "x", "model": "other"}, 404, "NotFoundError", "`other` does not exist"),
        (b"{", 400, "Bad Request", ""),
        ({"prompt": "x", "max_tokens": "many"}, 400, "Bad Request", "max_tokens"),
    ],
)
def test_what_is_refused_is_json_with_its_status_streamed_or_not(
    server: Standin, body: Any, status: int, kind: str, message: str
) -> None:
    bodies = [body] if isinstance(body, bytes) or "stream_options" in body else [body, body | {"stream": True}]
    for asked in bodies:
        found, answer = call(server.url, "/v1/completions", asked)
        assert (found, answer["error"]["type"], answer["error"]["code"]) == (status, kind, status)
        assert message in answer["error"]["message"] and set(answer["error"]) == {"message", "type", "param", "code"}


def test_what_it_is(server: Standin) -> None:
    _, models = call(server.url, "/v1/models")
    (model,) = models["data"]
    assert (model["id"], model["owned_by"], model["max_model_len"]) == ("servecast/stand-in", "vllm", MODEL_LEN)
    assert call(server.url, "/version") == (200, {"version": "0.32.0"})
    assert call(server.url, "/health") == (200, {})
    assert call(server.url, "/tokenize", {"prompt": "a b"})[1]["count"] == 3
    found = metrics(server.url)
    (info,) = (name for name in found if name.startswith("vllm:cache_config_info"))
    assert 'num_gpu_blocks="65"' in info and 'block_size="16"' in info and 'kv_cache_size_tokens="1040"' in info


def test_metrics_count_what_was_asked(server: Standin) -> None:
    before = metrics(server.url)
    for tokens in (1, 5):
        call(server.url, "/v1/completions", {"prompt": [11] * 20, "max_tokens": tokens, "ignore_eos": True})
    names = ("prompt_tokens_total", "generation_tokens_total", "time_to_first_token_seconds_count")
    assert grown(server.url, before, *names) == [40, 6, 2]
    assert grown(server.url, before, "e2e_request_latency_seconds_count", "inter_token_latency_seconds_count") == [2, 4]
    # one observation for a step that delivered a token, with what was computed of the prompt in that of the first
    assert grown(server.url, before, "iteration_tokens_total_count", "iteration_tokens_total_sum") == [6, 46 - 16]
    after = metrics(server.url)
    success = 'vllm:request_success_total{engine="0",finished_reason="length",model_name="servecast/stand-in"}'
    assert after[success] - before[success] == 2
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0
    assert after["vllm:kv_cache_usage_perc"] == 0


def test_a_prompt_hits_what_an_earlier_one_left_in_the_prefix_cache_and_so_does_an_answer(server: Standin) -> None:
    ids = list(range(100, 140))  # two whole blocks of 16
    call(server.url, "/v1/completions", {"prompt": ids, "max_tokens": 1})
    before = metrics(server.url)
    call(server.url, "/v1/completions", {"prompt": [*ids[:35], 999], "max_tokens": 1})
    names = ("prefix_cache_queries_total", "prefix_cache_hits_total", "prompt_tokens_cached_total")
    assert grown(server.url, before, *names) == [36, 32, 32]
    # the second turn of a chat repeats the first with its answer: everything but what is new is hit
    first = [{"role": "user", "content": "tell me " * 10}]
    _, answer = call(server.url, "/v1/chat/completions", {"messages": first, "max_tokens": 40})
    said = answer["choices"][0]["message"]
    before = metrics(server.url)
    again = [*first, said, {"role": "user", "content": "more"}]
    call(server.url, "/v1/chat/completions", {"messages": again, "max_tokens": 1})
    whole = answer["usage"]["total_tokens"] - 1  # the last token of an answer is never computed
    assert grown(server.url, before, "prefix_cache_hits_total") == [whole // 16 * 16]


def test_a_client_that_leaves_is_aborted_and_its_blocks_are_free(server: Standin) -> None:
    before = metrics(server.url)
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=20)
    body = json.dumps({"prompt": [3] * 100, "max_tokens": 150, "stream": True})
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    answer = connection.getresponse()
    answer.read(200)
    assert metrics(server.url)["vllm:num_requests_running"] == 1
    assert metrics(server.url)["vllm:kv_cache_usage_perc"] >= 7 / 64
    answer.close()
    connection.close()
    deadline = time.monotonic() + 10
    while metrics(server.url)["vllm:num_requests_running"]:
        assert time.monotonic() < deadline, "the request was not aborted"
        time.sleep(0.02)
    assert metrics(server.url)["vllm:kv_cache_usage_perc"] == 0
    (tokens,) = grown(server.url, before, "generation_tokens_total")
    assert 0 < tokens < 150  # what was computed stays counted


def test_preemptions_are_counted_and_every_answer_is_whole() -> None:
    flags = ("--max-num-seqs", "4", "--num-gpu-blocks-override", "21")  # room for 320 tokens; four answers need 480

    async def ask(url: str) -> list[Any]:
        async def one(session: aiohttp.ClientSession, number: int) -> Any:
            body = {"prompt": [50 + number] * 20, "max_tokens": 100}
            async with session.post(f"{url}/v1/completions", json=body) as answer:
                return await answer.json()

        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
            return list(await asyncio.gather(*(one(session, number) for number in range(4))))

    with standin(*FLAGS, *flags) as process:
        answers = asyncio.run(ask(process.url))
        assert [answer["usage"]["completion_tokens"] for answer in answers] == [100] * 4
        found = metrics(process.url)
    assert found["vllm:num_preemptions_total"] >= 1
    assert found["vllm:prompt_tokens_total"] == 80 and found["vllm:generation_tokens_total"] == 400
    assert found["vllm:prefix_cache_queries_total"] == 80  # not again when a preempted one is resumed


def test_a_full_queue_refuses_with_503_and_an_event_may_carry_several_tokens() -> None:
    with standin(*FLAGS, "--max-num-queued-reqs", "1", "--stream-interval", "4") as process:
        body = {"prompt": "x", "max_tokens": 20, "stream": True}
        body |= {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        *chunks, _, _ = stream(process.url, "/v1/completions", body)
        assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 5, 9, 13, 17, 20]
        _, answer = call(process.url, "/v1/completions", {"prompt": ["x", "y"], "max_tokens": 1})
        assert "choices" in answer  # the queue is looked at once for a request
        connection = http.client.HTTPConnection(urlsplit(process.url).netloc, timeout=20)
        connection.request(
            "POST", "/v1/completions", json.dumps(body | {"max_tokens": 200}), {"content-type": "application/json"}
        )
        connection.getresponse().read(100)
        status, refused = call(process.url, "/v1/completions", {"prompt": "x"})
        connection.close()
        assert (status, refused["error"]["type"]) == (503, "Service Unavailable")
        rejected = [value for name, value in metrics(process.url).items() if "admission_rejections_total" in name]
        assert rejected == [1, 0]


def test_measure_says_that_it_is_vllm_and_counts_its_tokens(server: Standin, tmp_path: Path) -> None:
    scenario = Scenario(
        name="chat",
        server=Flags(),
        workload=Workload(prompt_tokens=40, output_tokens=8),
        load=Load(users=[1, 2], spawn_rate=20.0, seconds=1.0),
    )
    with Path(os.devnull).open("w") as null:
        measure(scenario, server.url, tmp_path / "run", console=Console(file=null))
    run = read_run(tmp_path / "run")
    assert str(run.engine) == "vllm 0.32.0"
    cache = {"num_gpu_blocks": 65, "block_size": 16, "enable_prefix_caching": True, "gpu_memory_utilization": 0.92}
    assert run.info == {"version": "0.32.0", "max_model_len": MODEL_LEN} | cache
    (before, *_, after) = read_scrapes(tmp_path / "run" / "server.jsonl")
    prompts = after[1][f"vllm:prompt_tokens_total{LABELS}"] - before[1][f"vllm:prompt_tokens_total{LABELS}"]
    assert prompts > 0 and f"vllm:kv_cache_usage_perc{LABELS}" in after[1]
    assert (
        max(scrape[f"vllm:num_requests_running{LABELS}"] for _, scrape in read_scrapes(run.path / "server.jsonl")) > 0
    )
    ok = run.requests[run.requests["status"] == "ok"]
    assert len(ok) and (ok["output_tokens"] == 8).all() and (ok["prompt_tokens"] == 40).all()
    assert not any("server's own count" in warning for rung in run.rungs for warning in texts(rung.warnings))
    served = msgspec.structs.replace(scenario, server=vllm_v1.Flags(max_model_len=300))
    found = detect(Endpoint(server.url))
    flags = flags_of(found, served)
    told = {"version": "0.32.0", "max_model_len": 256} | cache
    assert {name: flag.value for name, flag in flags.items() if flag.source == SERVER} == told
    assert any(
        "the server's max_model_len is 256, the scenario's 300" in text for text in texts(check_limits(found, served))
    )


def test_of_two_sizes_of_the_kv_cache_the_server_s_own_is_used_and_unset_flags_are_called_so(
    server: Standin, tmp_path: Path
) -> None:
    scenario = Scenario(
        name="chat",
        server=vllm_v1.Flags(max_model_len=MODEL_LEN, kv_cache_tokens=4000),
        workload=Workload(prompt_tokens=40, output_tokens=8),
        load=Load(users=[1], spawn_rate=20.0, seconds=0.5),
        written=["kv_cache_tokens"],
    )
    found = detect(Endpoint(server.url))
    said = texts(check_limits(found, scenario))
    assert any("kv_cache_tokens 4000 is not used: the server tells its" in text for text in said)
    with Path(os.devnull).open("w") as null:
        measure(scenario, server.url, tmp_path / "run", console=Console(file=null))
    run = read_run(tmp_path / "run")
    used = run.server
    assert isinstance(used, vllm_v1.Flags)
    assert (used.num_gpu_blocks, used.kv_cache_tokens, used.kv_tokens) == (65, None, 1024)
    assert run.flags["kv_cache_tokens"] == Flag(value=None, source=DEFAULT)
    lines = {line.found.partition(" ")[0]: line.found for line in diagnose(scenario, server.url) if line.what == "flag"}
    assert lines["max_num_queued_reqs"] == "max_num_queued_reqs unset: default"
    assert lines["num_gpu_blocks"] == "num_gpu_blocks 65: told by the server"


UNSEEN = """
name: unseen
workload: {prompt_tokens: {uniform: [10, 60]}, output_tokens: 8, ignore_eos: true}
load: {users: [1, 2], spawn_rate: 20, seconds: 1}
"""


def test_run_asks_an_unseen_vllm_what_it_cannot_know_and_then_forecasts_ten_times_the_load(
    server: Standin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.yaml").write_text(UNSEEN)
    asked = ["run", str(tmp_path / "s.yaml"), "--url", server.url, "-o", str(tmp_path / "out")]
    quick = ["--replicates", "19", "--jobs", "1", "--no-advise"]
    assert status([*asked, *quick]) == 2
    (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("servecast:"))
    assert "does not tell its max_num_batched_tokens and max_num_seqs" in line
    assert "--set server.max_num_seqs=..." in line and "--set machine.gpu=H100" in line
    assert status([*asked, *quick, "--set", "server.max_waiting_tokens=15"]) == 2
    assert "flags are those of tgi-0.9.4; expected --set server.engine=vllm-v1" in capsys.readouterr().err
    assert status(["doctor", str(tmp_path / "s.yaml"), "--url", server.url]) in (0, 1)
    shown = " ".join(capsys.readouterr().out.split())
    assert "vllm 0.32.0, as the scenario says" in shown and "the server does not tell its max_num_batched" in shown
    assert status([*asked, *quick, "--set", "server.engine=tgi-0.9.4", "--as", "tgi-0.9.4"]) == 2  # nor by --as
    assert "flags are those of tgi-0.9.4" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # nothing was measured yet
    assert status([*asked, *quick, "--set", "machine.gpu=A100-80GB"]) in (0, 1)  # a window of a second proves little
    found = json.loads((tmp_path / "out" / "forecast.json").read_text())
    assert found["scenario"]["server"]["engine"] == "vllm-v1"
    assert {row["users"] for row in found["curves"]} == {1, 2, 20}
    assert found["flags"]["num_gpu_blocks"] == {"value": 65, "source": "server"}
    assert json.loads((tmp_path / "out" / "calibration.json").read_text())["model"] == "mixed"


def test_the_openai_package_reads_streams_usage_and_errors(server: Standin) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=20.0, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["servecast/stand-in"]
        chat = client.chat.completions.create(
            model="servecast/stand-in",
            messages=[{"role": "user", "content": "hello there"}],
            max_completion_tokens=3,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        chunks = list(chat)
        assert len("".join(c.choices[0].delta.content or "" for c in chunks if c.choices).split()) == 3
        assert chunks[-2].choices[0].finish_reason == "length"
        assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 3
        whole = client.completions.create(model="servecast/stand-in", prompt=[1, 2, 3], max_tokens=2)
        assert whole.usage is not None and whole.usage.prompt_tokens == 3 and len(whole.choices[0].text.split()) == 2
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.completions.create(model="other", prompt="x")
        with pytest.raises(openai.BadRequestError, match="maximum context length"):
            client.completions.create(model="servecast/stand-in", prompt=[1] * 300)


def test_answers_end_early_where_told_to_but_not_before_min_tokens_nor_with_ignore_eos() -> None:
    with standin(*FLAGS, "--fault", "eos=1") as process:
        found = []
        for more in ({}, {}, {}, {"min_tokens": 18}, {"ignore_eos": True}):
            _, answer = call(process.url, "/v1/completions", {"prompt": "x", "max_tokens": 20, **more})
            found.append((answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]))
        assert any(tokens < 20 and reason == "stop" for tokens, reason in found[:3])
        assert all((tokens < 20) == (reason == "stop") for tokens, reason in found)
        assert found[3][0] >= 18 and found[4] == (20, "length")


def test_an_error_in_a_stream_is_an_event_and_the_end() -> None:
    with standin(*FLAGS, "--fault", "error=1") as process:
        *_, error, done = stream(process.url, "/v1/completions", {"prompt": "x", "max_tokens": 9, "stream": True})
        assert (error["error"]["type"], error["error"]["code"], done) == ("InternalServerError", 500, "[DONE]")
        status, answer = call(process.url, "/v1/completions", {"prompt": "x", "max_tokens": 9})
        assert (status, answer["error"]["type"]) == (500, "InternalServerError")


def test_a_flag_that_vllm_would_not_start_with_is_one_line() -> None:
    for flag, value, said in (("--max-num-seqs", "9999", "max_num_seqs (9999)"), ("--block-size", "x", "--block-size")):
        command = [sys.executable, "-m", "measure.standin.server", "--engine", "vllm-v1", "--port", "0", flag, value]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr

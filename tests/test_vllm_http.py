"""The stand-in answers as the real vLLM 0.32.0 did (`samples/vllm-0.32.0`): every key, and all but texts and names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import Standin, standin
from vllm_http import CASES, COMPLETIONS, MODEL_LEN, WITHOUT_TYPE, ask, completion

SAMPLES = Path(__file__).parent / "samples" / "vllm-0.32.0"
RECORDED: dict[str, Any] = json.loads((SAMPLES / "http.json").read_text())
FLAGS = ("--engine", "vllm-v1", "--max-model-len", str(MODEL_LEN), "--block-size", "32", "--model-id", "tiny")
OURS = ("id", "created", "text", "content", "system_fingerprint")  # keys whose values are any server's own
MODEL = 'engine="0",model_name="tiny"'
NOT_HERE = re.compile("vllm:(external_prefix_cache|mm_cache|estimated|prompt_tokens_cached_by_source)|.*_created$")


@pytest.fixture(scope="module")
def server() -> Iterator[Standin]:
    with standin(*FLAGS, "--num-gpu-blocks-override", "65") as process:
        yield process


def plain(found: Any, chat: bool) -> Any:
    """An answer without what is any server's own; of a chat, whose template is another, without the prompt's tokens."""
    if isinstance(found, list):
        return [plain(each, chat) for each in found]
    if not isinstance(found, dict):
        return found
    kept = {name: plain(value, chat) for name, value in found.items()}
    kept |= {name: bool(kept[name]) for name in OURS if name in kept}
    if chat:
        kept |= {name: 0 for name in ("prompt_tokens", "total_tokens") if name in kept}
    return kept


def by_choice(events: list[Any]) -> list[Any]:
    """The events of each choice in order, then the others: how choices interleave depends on when steps end."""
    of = [event["choices"][0]["index"] if event != "[DONE]" and event["choices"] else 1 << 20 for event in events]
    return [event for _, event in sorted(zip(of, events, strict=True), key=lambda one: one[0])]


@pytest.mark.parametrize("name", CASES)
def test_an_answer_is_that_of_the_real_server(server: Standin, name: str) -> None:
    method, path, body = CASES[name]
    check(name, ask(server.url, method, path, body), "chat" in path or "chat" in name)


def test_so_is_that_to_a_body_of_another_type(server: Standin) -> None:
    check(WITHOUT_TYPE, ask(server.url, "POST", COMPLETIONS, completion(), "text/plain"), chat=False)


def check(name: str, found: dict[str, Any], chat: bool) -> None:
    """Compare with what was recorded."""
    recorded = RECORDED[name]
    if name == "chat, beam search streamed":  # the stand-in knows no beam search
        assert found["status"] == 400 and "Beam search is not simulated" in found["json"]["error"]["message"]
        return
    if name in ("text too long", "chat too long", "tokenize", "tokenize a chat", "chat to the end"):
        # another tokenizer: only the kind is the same
        assert found["status"] == recorded["status"] and keys(found["json"]) == keys(recorded["json"])
        return
    if recorded["type"] is None or name == "ping":
        assert found["status"] == recorded["status"] and found["json"] is None
        return
    if "error" in (recorded.get("json") or {}) and recorded["json"]["error"]["type"] == "Bad Request":
        # pydantic's own words are not repeated, nor its place in what is no JSON
        for answer in (recorded, found):
            error = answer["json"]["error"]
            assert re.match(r"\d+ validation errors?:\n", error.pop("message"))
            error["param"] = (error["param"] or "").partition(".1")[0]
    if "events" in recorded:
        recorded, found = ({**each, "events": by_choice(each["events"])} for each in (recorded, found))
        found["type"] = found["type"].replace("; charset=utf-8", "")
        recorded["type"] = recorded["type"].replace("; charset=utf-8", "")
    else:
        found["type"] = found["type"].replace("; charset=utf-8", "")
    assert plain(found, chat) == plain(recorded, chat)


def keys(found: Any) -> Any:
    """The keys of JSON, of objects in it too."""
    return {name: keys(value) for name, value in found.items()} if isinstance(found, dict) else None


def series(text: str) -> dict[str, set[str]]:
    """The labels of each series, with a histogram's upper bounds, and its type; without those of the process."""
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        if line.startswith("# TYPE"):
            _, _, name, kind = line.split()
            found.setdefault(name, set()).add(kind)
        elif not line.startswith("#"):
            name, _, labels = line.rpartition(" ")[0].partition("{")
            found.setdefault(name, set()).add(",".join(sorted(re.findall(r'\w+="[^"]*"', labels))))
    return {name: labels for name, labels in found.items() if name.startswith("vllm:") and not NOT_HERE.match(name)}


def test_metrics_have_the_names_labels_types_and_buckets_of_the_real_server(server: Standin) -> None:
    ask(server.url, "POST", COMPLETIONS, completion())
    found = series(ask(server.url, "GET", "/metrics", None)["text"])
    recorded = series((SAMPLES / "metrics.txt").read_text())
    (ours,), (theirs,) = (
        [label for label in each.pop("vllm:cache_config_info") if "=" in label] for each in (found, recorded)
    )
    assert set(re.findall(r'\w+="[^"]*"', ours)) <= set(re.findall(r'\w+="[^"]*"', theirs))
    assert found == recorded


def test_a_request_counts_as_its_answers_where_the_queue_is_limited() -> None:
    with standin(*FLAGS, "--max-num-queued-reqs", "2") as process:
        assert ask(process.url, "POST", COMPLETIONS, completion(n=2, temperature=1))["status"] == 200
        found = ask(process.url, "POST", COMPLETIONS, completion(n=3, temperature=1))
        error = found["json"]["error"]
        assert (found["status"], error["type"], error["code"]) == (503, "Service Unavailable", 503)
        assert error["message"].startswith("The engine is currently busy and cannot accept new requests.")


def test_each_answer_is_a_request_of_the_engine_and_n_is_told_once_for_each_prompt(server: Standin) -> None:
    def counts() -> list[float]:
        text = ask(server.url, "GET", "/metrics", None)["text"]
        names = ("request_params_n_count", "request_params_n_sum", "prompt_tokens_total", "generation_tokens_total")
        return [float(re.search(rf"^vllm:{name}{{.*}} (.*)$", text, re.M)[1]) for name in names]  # type: ignore[index]

    before = counts()
    ask(server.url, "POST", COMPLETIONS, completion(n=3, temperature=1))
    assert [after - one for after, one in zip(counts(), before, strict=True)] == [1, 3, 9, 9]


def test_versions_before_0_32_refuse_a_prompt_that_leaves_no_room_for_the_answer() -> None:
    with standin(*FLAGS, "--version", "0.25.1") as process:
        found = ask(process.url, "POST", COMPLETIONS, completion(prompt=[300] * 250, max_tokens=10))
        error = found["json"]["error"]
        assert (found["status"], error["type"], error["param"]) == (400, "BadRequestError", "input_tokens")
        assert "you requested 10 output tokens and your prompt contains 250 input tokens" in error["message"]
        assert ask(process.url, "POST", COMPLETIONS, completion(prompt=[300] * 250, max_tokens=6))["status"] == 200

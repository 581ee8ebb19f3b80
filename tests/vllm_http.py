"""Requests whose answers by the real vLLM are recorded in `samples/vllm-0.32.0/http.json`, and how to compare answers.

python tests/vllm_http.py URL FILE      asks a server (max_model_len 256, served as `tiny`) and writes its answers
"""

from __future__ import annotations

import http.client
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

MODEL_LEN = 256
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
IDS = [300, 301, 302]
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
COUNTED = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
SAID = [{"role": "user", "content": "w10 w11"}]


def completion(**body: Any) -> dict[str, Any]:
    """A completion of 3 tokens that does not end early."""
    return {"prompt": IDS, "max_tokens": 3, "ignore_eos": True, "temperature": 0, **body}


def chat(**body: Any) -> dict[str, Any]:
    """A chat of 3 tokens that does not end early."""
    return {"messages": SAID, "max_tokens": 3, "ignore_eos": True, "temperature": 0, **body}


CASES: dict[str, tuple[str, str, Any]] = {
    "models": ("GET", "/v1/models", None),
    "version": ("GET", "/version", None),
    "health": ("GET", "/health", None),
    "ping": ("GET", "/ping", None),
    "load": ("GET", "/load", None),
    "no route": ("GET", "/info", None),
    "wrong method": ("GET", COMPLETIONS, None),
    "tokenize": ("POST", "/tokenize", {"prompt": "w10 w11"}),
    "tokenize a chat": ("POST", "/tokenize", {"messages": SAID}),
    "completion": ("POST", COMPLETIONS, completion()),
    "completion of 16": ("POST", COMPLETIONS, {"prompt": IDS, "ignore_eos": True}),
    "completion cut": ("POST", COMPLETIONS, completion(prompt=[300] * 250, max_tokens=100)),
    "completion streamed": ("POST", COMPLETIONS, completion(stream=True)),
    "completion streamed, usage": ("POST", COMPLETIONS, completion(**USAGE)),
    "completion streamed, counted": ("POST", COMPLETIONS, completion(**COUNTED)),
    "completion counted, no last usage": (
        "POST",
        COMPLETIONS,
        completion(stream=True, stream_options={"continuous_usage_stats": True}),
    ),
    "completion, interval": ("POST", COMPLETIONS, completion(max_tokens=6, stream_interval=4, **COUNTED)),
    "completion as guidellm asks": ("POST", COMPLETIONS, completion(model="tiny", stop=None, **COUNTED)),
    "completion as vllm bench asks": (
        "POST",
        COMPLETIONS,
        completion(model="tiny", repetition_penalty=1.0, logprobs=None, **USAGE),
    ),
    "two prompts": ("POST", COMPLETIONS, completion(prompt=[IDS, [303, 304]])),
    "two prompts streamed": ("POST", COMPLETIONS, completion(prompt=[IDS, [303, 304]], **COUNTED)),
    "n": ("POST", COMPLETIONS, completion(n=2, temperature=1)),
    "n streamed": ("POST", COMPLETIONS, completion(n=2, temperature=1, **COUNTED)),
    "n of two prompts": ("POST", COMPLETIONS, completion(n=2, temperature=1, prompt=[IDS, [303, 304]])),
    "n of two prompts streamed": (
        "POST",
        COMPLETIONS,
        completion(n=2, temperature=1, prompt=[IDS, [303, 304]], **COUNTED),
    ),
    "best_of": ("POST", COMPLETIONS, completion(best_of=3)),
    "no n": ("POST", COMPLETIONS, completion(n=0)),
    "negative n": ("POST", COMPLETIONS, completion(n=-1)),
    "n of greedy": ("POST", COMPLETIONS, completion(n=2)),
    "too many n": ("POST", COMPLETIONS, completion(n=1_000_000, temperature=1)),
    "beam search streamed": ("POST", COMPLETIONS, completion(use_beam_search=True, n=2, stream=True)),
    "max_tokens null": ("POST", COMPLETIONS, {"prompt": IDS, "max_tokens": None, "ignore_eos": True}),
    "prompt too long": ("POST", COMPLETIONS, completion(prompt=[300] * 257)),
    "prompt far too long": ("POST", COMPLETIONS, completion(prompt=[300] * 300)),
    "text too long": ("POST", COMPLETIONS, completion(prompt="w10 " * 300)),
    "prompt as long as the model": ("POST", COMPLETIONS, completion(prompt=[300] * 256)),
    "max_tokens too large": ("POST", COMPLETIONS, completion(max_tokens=257)),
    "max_tokens 0": ("POST", COMPLETIONS, completion(max_tokens=0)),
    "max_tokens negative": ("POST", COMPLETIONS, completion(max_tokens=-1)),
    "min_tokens too large": ("POST", COMPLETIONS, completion(min_tokens=4)),
    "min_tokens negative": ("POST", COMPLETIONS, completion(min_tokens=-1)),
    "stream_interval 0": ("POST", COMPLETIONS, completion(stream_interval=0)),
    "no prompt": ("POST", COMPLETIONS, {"max_tokens": 3}),
    "prompt of no text": ("POST", COMPLETIONS, completion(prompt="")),
    "prompt of no ids": ("POST", COMPLETIONS, completion(prompt=[])),
    "prompts, one of no ids": ("POST", COMPLETIONS, completion(prompt=[[], IDS])),
    "prompts, one of no text": ("POST", COMPLETIONS, completion(prompt=["", "w10"])),
    "no such token": ("POST", COMPLETIONS, completion(prompt=[1, 2, 1_000_000])),
    "negative token": ("POST", COMPLETIONS, completion(prompt=[1, -2])),
    "prompt of another type": ("POST", COMPLETIONS, completion(prompt={"a": 1})),
    "temperature negative": ("POST", COMPLETIONS, completion(temperature=-1)),
    "temperature too high": ("POST", COMPLETIONS, completion(temperature=3)),
    "top_p 0": ("POST", COMPLETIONS, completion(top_p=0)),
    "stream options alone": ("POST", COMPLETIONS, completion(stream_options={"include_usage": True})),
    "another model": ("POST", COMPLETIONS, completion(model="other")),
    "another model streamed": ("POST", COMPLETIONS, completion(model="other", stream=True)),
    "refused, streamed": ("POST", COMPLETIONS, completion(prompt=[300] * 257, stream=True)),
    "refused for its sampling, streamed": ("POST", COMPLETIONS, completion(temperature=-1, stream=True)),
    "max_tokens of another type": ("POST", COMPLETIONS, completion(max_tokens="many")),
    "max_tokens as text": ("POST", COMPLETIONS, completion(max_tokens="3")),
    "not JSON": ("POST", COMPLETIONS, b"{"),
    "not an object": ("POST", COMPLETIONS, b"[1]"),
    "empty body": ("POST", COMPLETIONS, b""),
    "priority": ("POST", COMPLETIONS, completion(priority=5)),
    "chat": ("POST", CHAT, chat()),
    "chat of max_completion_tokens": ("POST", CHAT, chat(max_tokens=None, max_completion_tokens=3)),
    "chat to the end": ("POST", CHAT, {"messages": SAID, "ignore_eos": True}),
    "chat streamed": ("POST", CHAT, chat(stream=True)),
    "chat streamed, usage": ("POST", CHAT, chat(**USAGE)),
    "chat streamed, counted": ("POST", CHAT, chat(**COUNTED)),
    "chat of parts": ("POST", CHAT, chat(messages=[{"role": "user", "content": [{"type": "text", "text": "w10"}]}])),
    "chat n": ("POST", CHAT, chat(n=2, temperature=1)),
    "chat n streamed": ("POST", CHAT, chat(n=2, temperature=1, **COUNTED)),
    "chat without messages": ("POST", CHAT, {"max_tokens": 3}),
    "chat of no messages": ("POST", CHAT, chat(messages=[])),
    "chat too long": ("POST", CHAT, chat(messages=[{"role": "user", "content": "w10 " * 400}])),
    "chat, max_tokens too large": ("POST", CHAT, chat(max_tokens=257)),
    "chat, max_completion_tokens too large": ("POST", CHAT, chat(max_completion_tokens=257)),
    "chat, max_tokens 0": ("POST", CHAT, chat(max_tokens=0)),
    "chat, beam search streamed": ("POST", CHAT, chat(use_beam_search=True, n=2, stream=True)),
    "chat, another model": ("POST", CHAT, chat(model="other")),
}
WITHOUT_TYPE = "completion without a content type"


def ask(url: str, method: str, path: str, body: Any, kind: str | None = "application/json") -> dict[str, Any]:
    """The answer: its status, content type, and events, JSON or text."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    try:
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, raw, {} if kind is None or raw is None else {"content-type": kind})
        answer = connection.getresponse()
        text = answer.read().decode()
    finally:
        connection.close()
    found: dict[str, Any] = {"status": answer.status, "type": answer.getheader("content-type")}
    if (found["type"] or "").startswith("text/event-stream"):
        *events, end = text.split("\n\n")
        found["events"] = [_event(event) for event in events]
        if end:
            found["rest"] = end
    else:
        try:
            found["json"] = json.loads(text) if text else None
        except ValueError:
            found["text"] = text
    return found


def _event(event: str) -> Any:
    data = event.removeprefix("data: ")
    return data if data == "[DONE]" else json.loads(data)


def answers(url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The answers to all cases, by their names."""
    for name, (method, path, body) in CASES.items():
        yield name, ask(url, method, path, body)
    yield WITHOUT_TYPE, ask(url, "POST", COMPLETIONS, completion(), "text/plain")


def main(url: str, file: str) -> None:
    """Write the answers, a case a line."""
    lines = (f"{json.dumps(name)}: {json.dumps(answer)}" for name, answer in answers(url))
    Path(file).write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

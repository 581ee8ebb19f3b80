"""A scenario's profile against the limits that a server tells."""

from __future__ import annotations

from pathlib import Path

import pytest
from servers import (
    INFO,
    Command,
    answer,
    openai,
    serving,
)


@pytest.mark.parametrize("name", ["max_model_len", "context_length"])
def test_a_profile_that_would_be_cut_silently_is_refused_before_the_first_request(
    name: str, command: Command, live: str, tmp_path: Path
) -> None:
    with serving(openai(**{name: 99})) as server:
        found, out, said = command("measure", live, "--url", server.url, "-o", tmp_path / "run")
        told, findings, _ = command("doctor", live, "--url", server.url)
        assert not any(b'"stream"' in body for body in server.bodies)
    expected = f"the server's {name} is 99, the scenario's prompts plus answers have up to 100 tokens"
    assert (found, told, out) == (2, 1, "")
    assert expected in said and "--max-model-len 100" in said and expected in findings
    assert not (tmp_path / "run").exists()
    with serving(openai(**{name: 100})) as server:
        _, findings, _ = command("doctor", live, "--url", server.url)
        assert "the server can serve it" in findings
        lengths = "workload.prompt_tokens={lognormal: {mean: 60, cv: 1}}"
        _, findings, _ = command("doctor", live, "--url", server.url, "--set", lengths)
        assert f"may exceed the server's {name} 100; such answers are cut short" in findings
        uniform = "workload.prompt_tokens={uniform: [10, 70]}"
        told, findings, _ = command("doctor", live, "--url", server.url, "--set", uniform)
        assert told == 1 and "have up to 110 tokens" in findings


def test_llama_cpp_says_its_context_elsewhere(command: Command, live: str) -> None:
    props = {b"/props": answer({"default_generation_settings": {"n_ctx": 64}})}
    with serving(openai(owned_by="llamacpp") | props) as server:
        assert "the server's n_ctx is 64" in command("doctor", live, "--url", server.url)[1]


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"max_input_length": 59}, "max_input_length is 59, the scenario's prompts have 60 tokens"),
        ({"max_input_tokens": 59, "max_input_length": None}, "max_input_length is 59"),
        ({"max_total_tokens": 99}, "max_total_tokens is 99"),
        ({"max_batch_total_tokens": 99, "version": "2.0.1"}, "max_batch_total_tokens is 99"),
        ({"max_batch_prefill_tokens": 59, "version": "2.0.1"}, "max_batch_prefill_tokens is 59"),
        ({"max_concurrent_requests": 0.5}, "the server can serve it"),
    ],
)
def test_a_profile_is_held_against_every_limit_that_tgi_tells(
    told: dict[str, object], said: str, command: Command, live: str
) -> None:
    with serving({b"/info": answer(INFO | told), b"/health": answer()}) as server:
        assert said in command("doctor", live, "--url", server.url)[1]


def test_users_beyond_the_servers_permits_are_said(command: Command, live: str) -> None:
    with serving({b"/info": answer(INFO | {"max_concurrent_requests": 3}), b"/health": answer()}) as server:
        _, out, _ = command("doctor", live, "--url", server.url, "--set", "load.users=[1, 4]")
        assert "the ladder goes to 4 users, but the server accepts 3 at a time" in out

"""One measurement of a server whose answers come in every shape: tokens are what the server counts in each."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from odd_server import BUNDLES, FAILED, FIRST, HANG, SHAPES, SHORT, TOKENS, WHOLE
from warned import texts

SCENARIO = f"""\
format: 2
name: odd
server: {{max_batch_prefill_tokens: 2048, max_batch_total_tokens: 16000}}
workload: {{prompt_tokens: 30, output_tokens: {TOKENS}}}
load: {{users: [6], seconds: 4, spawn_rate: 50, retry: 0.01}}
"""


class Measured(NamedTuple):
    """What a run has: its head, and its answers by their shape."""

    head: dict[str, Any]
    answers: dict[str, list[dict[str, Any]]]

    def ended(self, shape: str) -> list[dict[str, Any]]:
        """The answers of a shape that the end of the run did not cut off."""
        return [a for a in self.answers[shape] if a["status"] != "aborted"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("odd")
    (folder / "odd.yaml").write_text(SCENARIO)
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("odd_server.py"))], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    try:
        url = server.stdout.readline().strip()
        command = ["measure", str(folder / "odd.yaml"), "--url", url, "-o", str(folder / "run")]
        subprocess.run([sys.executable, "-m", "scenarios", *command], check=True, timeout=60, capture_output=True)
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
    answers = defaultdict(list)
    for line in (folder / "run" / "requests.jsonl").read_text().splitlines():
        record = json.loads(line)
        answers[SHAPES[record["id"] % len(SHAPES)]].append(record)
    return Measured(json.loads((folder / "run" / "run.json").read_text()), answers)


@pytest.mark.parametrize("shape", WHOLE)
def test_an_answer_has_the_tokens_that_the_server_counts(measured: Measured, shape: str) -> None:
    found = measured.ended(shape)
    assert found
    assert {(a["status"], a["output_tokens"], a["finish_reason"]) for a in found} == {("ok", TOKENS, "length")}


@pytest.mark.parametrize("shape", [shape for shape in WHOLE if shape != "json"])
def test_the_first_token_is_the_first_output_of_any_kind(measured: Measured, shape: str) -> None:
    for a in measured.ended(shape):
        assert len(a["token_times"]) == TOKENS
        assert a["token_times"][0] - a["sent"] >= FIRST  # the role came at once
        # nothing follows the last token but its usage: half an answer would be left of TOKENS * GAP otherwise
        events = {"bundled": TOKENS // 4, "counted": len(BUNDLES)}.get(shape, TOKENS)
        assert len(set(a["token_times"])) >= events // 2


def test_the_server_says_which_event_carried_how_many_tokens_or_they_are_spread(measured: Measured) -> None:
    for shape, carried, spread in (("counted", list(BUNDLES), False), ("bundled", [4] * 5, True)):
        for a in measured.ended(shape):
            assert (a["event_tokens"], a.get("spread", False)) == (carried, spread)
    assert not any("event_tokens" in a for shape in ("plain", "empty", "held", "roles") for a in measured.ended(shape))


def test_an_answer_that_was_not_streamed_is_measured_without_token_times(measured: Measured) -> None:
    for a in measured.ended("json"):
        assert (a["token_times"], a["generated_tokens"]) == ([], TOKENS)


@pytest.mark.parametrize("shape", ["hang", "silent_end"])
def test_the_next_request_does_not_wait_for_a_connection_that_is_kept_open(measured: Measured, shape: str) -> None:
    everything = sorted((a for those in measured.answers.values() for a in those), key=lambda a: a["sent"])
    for a in measured.ended(shape):
        assert a["ended"] - a["token_times"][-1] < HANG / 2
        later = [b for b in everything if b["user"] == a["user"] and b["sent"] >= a["ended"]]
        assert not later or later[0]["sent"] - a["ended"] < HANG / 2


@pytest.mark.parametrize("shape", FAILED)
def test_a_failure_of_any_shape_is_one_and_keeps_the_servers_words(measured: Measured, shape: str) -> None:
    found = measured.ended(shape)
    assert found
    for a in found:
        assert a["status"] in ("generation", "overloaded", "incomplete")
        assert ("an HTML page" if shape == "page" else "engine died") in a["error"]
        assert a["output_tokens"] == len(a["token_times"]) == (0 if shape in ("page", "json_error") else 11)


def test_who_ended_short_answers_is_said_by_their_finish_reason(measured: Measured) -> None:
    (said,) = (d for d in texts(measured.head["rungs"][0]["warnings"]) if "of the tokens requested" in d)
    assert "the model itself ended" in said
    assert "at a limit of its own (finish_reason: length)" in said
    assert re.search(r"the model itself ended \d, \d ended with finish_reason: content_filter", said), said
    assert {a["output_tokens"] for shape in SHORT for a in measured.ended(shape)} == {TOKENS // 2}


def test_answers_longer_than_asked_are_said(measured: Measured) -> None:
    assert {a["output_tokens"] for a in measured.ended("over")} == {2 * TOKENS}
    assert any(
        "answers are longer than requested: the server does not apply" in d
        for d in texts(measured.head["rungs"][0]["warnings"])
    )


def test_a_server_that_refuses_our_extra_keys_is_asked_without_them_and_the_run_says_so(measured: Measured) -> None:
    (said,) = (d for d in texts(measured.head["warnings"]) if "requests are sent without" in d)
    assert "refuses continuous_usage_stats, ignore_eos, cache_prompt" in said
    assert not any("HTTP 400" in (a["error"] or "") for those in measured.answers.values() for a in those)

"""The same ladder on a server nobody here wrote: llama.cpp's own, over OpenAI's two styles."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from warned import texts

from measure.apis.openai import Chat
from measure.ladder.probe import find_recipe
from measure.ladder.session import measure
from measure.loadgen.client import Client, Record, RunClock
from measure.loadgen.prompts import generator
from measure.server.detection import Server, detect
from measure.server.endpoint import Endpoint
from sim.engines.tgi_0_9_4 import Flags
from sim.model.scenario import Load, Scenario
from sim.model.workload import Workload
from sim.run import read_run

SCENARIO = Scenario(
    server=Flags(),
    name="tiny",
    workload=Workload(prompt_tokens=200, output_tokens=40),
    load=Load(users=[1, 2, 4], spawn_rate=20.0, seconds=1.5),
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a llama.cpp server with a tiny model of random weights."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "tiny_llama.py"), str(tmp_path_factory.mktemp("llama"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http"), "llama.cpp did not start"
        yield url
        process.kill()


def test_the_ladder_climbs_a_real_engine(llama: str, tmp_path: Path) -> None:
    with Path(os.devnull).open("w") as null:
        measure(SCENARIO, llama, tmp_path / "run", console=Console(file=null))
    run = read_run(tmp_path / "run")
    assert [(r.users, r.status) for r in run.rungs] == [(1, "complete"), (2, "complete"), (4, "complete")]
    ok = run.requests[run.requests["status"] == "ok"]
    assert set(run.requests["status"]) <= {"ok", "aborted"}
    assert (ok["prompt_tokens"] == 200).all()
    assert (ok["output_tokens"] == 40).all() and set(ok["finish_reason"]) == {"length"}
    said = " ".join(texts(run.warnings) + [text for rung in run.rungs for text in texts(rung.warnings)])
    assert "server's own count" not in said  # neither of prompts nor of answers: both lengths are exact
    assert run.token_times is not None
    for row, times in zip(run.requests.itertuples(), run.token_times, strict=True):
        assert len(times) == row.output_tokens
        assert (np.diff([row.sent, *times, row.ended]) >= 0).all()


def test_chat_prompts_are_fitted_to_what_the_server_counts(llama: str) -> None:
    endpoint = Endpoint(llama)
    found = detect(endpoint)
    assert found.api == "completions"
    chat = Server(api="chat", model=found.model)
    recipe, warnings = find_recipe(endpoint, chat, SCENARIO, None, None, 0)
    assert recipe.tokens_per_word > 1  # this vocabulary spells English words letter by letter
    assert not recipe.exact
    record = Record(0, 0, 0, 0.0, 0.0, 200, 12)
    client = Client(llama, Chat(found.model), RunClock(time.perf_counter_ns()).now, patience=20.0)
    client.send(record, recipe.prompt(200, generator(0, 0)))
    client.close()
    assert (record.status, record.output_tokens, record.generated_tokens) == ("ok", 12, 12)
    assert record.counted_prompt == pytest.approx(200, rel=0.15)
    assert all("prompt of 200 tokens" in warning.text for warning in warnings)

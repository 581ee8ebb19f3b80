"""A replayed ladder is synchronised with its recording by the server's round, not by the clock."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pandas as pd
import pytest

from sim.cluster.ladder import climb
from sim.cluster.replay import replay
from sim.engines.tgi_0_9_4 import Flags
from sim.model.machine import Machine
from sim.model.scenario import Load, Scenario
from sim.model.workload import Lengths, Workload
from sim.run import Run, read_run, write_run
from sim.steptime.linear import affine

SERVER = Flags(max_batch_prefill_tokens=1024, max_batch_total_tokens=8000)
TIMES = {"a0": 0.02, "a1": 1e-4, "b0": 0.03, "b1": 5e-4}
SCENARIO = Scenario(
    server=Flags(),
    name="paced",
    workload=Workload(prompt_tokens=100, output_tokens=50),
    load=Load(users=[3, 8, 12], seconds=25.0),
)


def server(slower: float = 1.0) -> Machine:
    return Machine(affine(**{name: slower * value for name, value in TIMES.items()}), SERVER)


@pytest.fixture(scope="module")
def recorded() -> Run:
    return climb(SCENARIO, server(), (1, 0))


def latest(requests: pd.DataFrame, time: float) -> tuple[int, float]:
    """Whose answer was the last to end before `time`, and how long before."""
    ended = requests[requests["last_token"] < time - 1e-8].sort_values("last_token").iloc[-1]
    return int(ended["user"]), time - float(ended["last_token"])


@pytest.mark.parametrize("slower", [0.93, 0.99, 1.004, 1.05])
def test_users_come_and_windows_begin_as_long_after_the_same_users_answer(recorded: Run, slower: float) -> None:
    again = replay(recorded, server(slower), (5, 0))
    moments = [(rung.start, there.start) for rung, there in zip(recorded.rungs[1:], again.rungs[1:], strict=True)]
    moments += [(rung.settled, there.settled) for rung, there in zip(recorded.rungs, again.rungs, strict=True)]
    for then, now in moments:
        user, since = latest(recorded.requests, then)
        mine = again.requests[again.requests["user"] == user]
        assert latest(mine, now)[1] == pytest.approx(since, abs=2e-6)
    begun = [run.requests.groupby("user")["sent"].min().to_numpy() for run in (recorded, again)]
    for number, rung in enumerate(recorded.rungs):
        came = slice(recorded.rungs[number - 1].users if number else 0, rung.users)
        assert begun[1][came] - again.rungs[number].start == pytest.approx(begun[0][came] - rung.start, abs=1e-9)
    assert [rung.seconds for rung in again.rungs] == pytest.approx([rung.seconds for rung in recorded.rungs])
    ramps = [[rung.ramped - rung.start for rung in run.rungs] for run in (recorded, again)]
    assert ramps[0] == pytest.approx(ramps[1])


def test_a_round_begins_no_further_off_than_half_of_one(recorded: Run) -> None:
    """Two points of every rung are looked for; a round that has just begun is waited for to begin again."""
    again = replay(recorded, server(0.9999), (5, 0))
    took = (recorded.requests["last_token"] - recorded.requests["sent"]).max()
    for number, (rung, there) in enumerate(zip(recorded.rungs[1:], again.rungs[1:], strict=True)):
        assert 0 < there.start - rung.start < took * (number + 1)


def test_a_model_that_hardly_answers_is_not_waited_for_for_ever(recorded: Run) -> None:
    again = replay(recorded, server(60.0), (5, 0))
    assert [rung.users for rung in again.rungs] == [3, 8, 12]
    assert [rung.seconds for rung in again.rungs] == pytest.approx([25.0] * 3)
    assert again.rungs[-1].end < 2 * recorded.rungs[-1].end


@pytest.mark.parametrize("output", [50, Lengths(uniform=(5, 90))])
def test_a_run_that_was_written_and_read_is_replayed_as_it_was(tmp_path: Path, output: int | Lengths) -> None:
    """Files round times to a microsecond; the next answer of the same user may be seconds away."""
    scenario = msgspec.structs.replace(SCENARIO, workload=Workload(prompt_tokens=100, output_tokens=output))
    run = climb(scenario, server(), (1, 0))
    write_run(run, tmp_path)
    again = replay(read_run(tmp_path), server(), (5, 0))
    ended = run.requests[run.requests["status"] == "ok"]
    assert [rung.start for rung in again.rungs] == pytest.approx([rung.start for rung in run.rungs], abs=1e-4)
    assert again.requests["sent"].iloc[: len(ended) - 20].to_numpy() == pytest.approx(
        run.requests["sent"].iloc[: len(ended) - 20].to_numpy(), abs=1e-4
    )


def test_a_rung_without_a_window_adds_its_users_all_the_same(recorded: Run) -> None:
    first, second, third = recorded.rungs
    broken = replace(recorded, rungs=[first, replace(second, settled=second.end), third])
    again = replay(broken, server(1.05), (5, 0))
    assert [rung.users for rung in again.rungs] == [3, 12]
    assert again.requests["user"].nunique() == 12

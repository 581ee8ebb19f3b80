"""A replayed ladder keeps pace with its recording by the server's round, not by the clock."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from sim.forms import Affine
from sim.ladder import climb
from sim.model import Model
from sim.replay import replay
from sim.run import Run
from sim.scenario import Load, Scenario
from sim.server import ServerConfig
from sim.workload import Workload

SERVER = ServerConfig(max_batch_prefill_tokens=1024, max_batch_total_tokens=8000)
TIMES = {"a0": 0.02, "a1": 1e-4, "b0": 0.03, "b1": 5e-4}
SCENARIO = Scenario(
    name="paced", workload=Workload(prompt_tokens=100, output_tokens=50), load=Load(users=[3, 8, 12], seconds=25.0)
)


def server(slower: float = 1.0) -> Model:
    return Model(Affine(**{name: slower * value for name, value in TIMES.items()}), SERVER)


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


def test_a_round_begins_no_further_off_than_half_of_one(recorded: Run) -> None:
    again = replay(recorded, server(1.004), (5, 0))
    took = (recorded.requests["last_token"] - recorded.requests["sent"]).max()
    for number, (rung, there) in enumerate(zip(recorded.rungs, again.rungs, strict=True)):
        assert abs(there.start - rung.start) < took * (1 + number)


def test_a_model_that_hardly_answers_is_not_waited_for_for_ever(recorded: Run) -> None:
    again = replay(recorded, server(60.0), (5, 0))
    assert [rung.users for rung in again.rungs] == [3, 8, 12]
    assert again.rungs[-1].end < 2 * recorded.rungs[-1].end


def test_a_rung_without_a_window_adds_its_users_all_the_same(recorded: Run) -> None:
    first, second, third = recorded.rungs
    broken = replace(recorded, rungs=[first, replace(second, settled=second.end), third])
    again = replay(broken, server(1.05), (5, 0))
    assert [rung.users for rung in again.rungs] == [3, 12]
    assert again.requests["user"].nunique() == 12

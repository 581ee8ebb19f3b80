"""What is random belongs to a seed and an owner: other users, flags, rungs and orders of events do not move it."""

from __future__ import annotations

import msgspec
import numpy as np
import pandas as pd
import pytest

from sim.cluster.ladder import climb
from sim.engines.tgi_0_9_4 import Flags
from sim.model.calibration import Clocks, Delay
from sim.model.machine import Machine
from sim.model.scenario import Load, Scenario
from sim.model.workload import Lengths, Lognormal, Workload
from sim.randomness import Kind, Randomness, arrivals_at
from sim.results import metrics
from sim.steptime.linear import affine
from sim.steptime.noise_parameters import Noise

SERVER = Flags(max_batch_total_tokens=8000)
STEP_TIME = affine(a0=0.02, a1=1e-4, b0=0.03, b1=5e-4)
CLOCKS = Clocks(
    uplink=Delay(quantiles=[0.0, 0.002]),
    downlink=Delay(quantiles=[0.0, 0.002]),
    turnaround=Delay(quantiles=[0.0, 0.01]),
)
NOISE = Noise(prefill=[0.9, 1.0, 1.1], decode=[0.8, 1.0, 1.2], drift=0.1, drift_seconds=5.0, between=0.02)
WORKLOAD = Workload(
    prompt_tokens=Lengths(uniform=(10, 500)), output_tokens=Lengths(lognormal=Lognormal(mean=30, cv=1.0, high=200))
)


def requests(server: Flags = SERVER, seed: int = 1, **load: object) -> pd.DataFrame:
    scenario = Scenario(name="x", server=server, workload=WORKLOAD, load=msgspec.convert(load, Load))
    return climb(scenario, Machine(STEP_TIME, server, NOISE, CLOCKS), (seed, 0)).requests


def lengths(table: pd.DataFrame, user: int, n: int) -> list[tuple[int, int]]:
    mine = table[table["user"] == user].sort_values("sent").head(n)
    return list(zip(mine["prompt_tokens"], mine["max_new_tokens"], strict=True))


def test_a_users_requests_are_the_same_with_more_users_and_with_other_flags() -> None:
    few = requests(users=[5], seconds=60.0)
    more = requests(users=[6], seconds=60.0)
    slow = requests(
        msgspec.structs.replace(SERVER, max_batch_prefill_tokens=600, waiting_served_ratio=3.0), users=[5], seconds=60.0
    )
    for user in range(5):
        assert len(set(lengths(few, user, 8))) > 4
        assert lengths(few, user, 8) == lengths(more, user, 8) == lengths(slow, user, 8)
    assert lengths(few, 3, 8) != lengths(few, 4, 8)
    assert lengths(few, 3, 8) != lengths(requests(seed=2, users=[5], seconds=60.0), 3, 8)


def test_arrivals_of_a_rung_are_the_same_whatever_other_rungs_and_flags_there_are() -> None:
    load = {"seconds": 30.0, "settle": 5.0}

    def asked(rates: list[float], place: int, server: Flags = SERVER) -> pd.DataFrame:
        table = requests(server, rate=rates, **load)
        mine = table[table["rung"] == place].sort_values("scheduled")
        return pd.DataFrame(
            {
                "due": mine["scheduled"].to_numpy() - 35.0 * place,
                "prompt": mine["prompt_tokens"].to_numpy(),
                "uplink": (mine["sent"] - mine["scheduled"]).to_numpy(),
            }
        )

    one = asked([1.0], 0)
    slow = msgspec.structs.replace(SERVER, max_batch_total_tokens=2000)
    for other in (asked([0.5, 1.0], 1), asked([0.5, 2.0, 1.0, 1.0], 2), asked([1.0], 0, slow)):
        assert len(one) > 20 and (one["prompt"] == other["prompt"]).all()
        assert np.allclose(one["due"], other["due"])
    again = asked([1.0, 1.0], 1)
    assert len(again) != len(one) or (again["prompt"] != one["prompt"]).any()


def test_blocks_are_the_same_in_any_order_and_unlike_one_another() -> None:
    places = [(kind, owner, number) for kind in Kind for owner in (0, 1, -1, arrivals_at(2.0)) for number in (0, 1)]
    forth, back = Randomness((3, 1)), Randomness((3, 1))
    drawn = {place: tuple(forth.block(*place).random(4)) for place in places}
    for place in reversed(places):
        back.block(*place).standard_normal(7)  # whatever was drawn of it before
        assert tuple(back.block(*place).random(4)) == drawn[place]
    assert len(set(drawn.values())) == len(places)
    assert tuple(Randomness((3, 2)).block(*places[0]).random(4)) != drawn[places[0]]


@pytest.mark.parametrize("users", [2, 6])
def test_two_variants_are_asked_the_same_so_that_their_difference_is_known_better(users: int) -> None:
    other = msgspec.structs.replace(SERVER, max_batch_prefill_tokens=600)

    def mean(server: Flags, seed: int) -> float:
        scenario = Scenario(name="x", server=server, workload=WORKLOAD, load=Load(users=[users], seconds=60.0))
        run = climb(scenario, Machine(STEP_TIME, server, NOISE, CLOCKS), (seed, 0))
        return float(metrics.table(run)["e2e_mean"].iloc[0])

    one = np.array([mean(SERVER, seed) for seed in range(12)])
    two = np.array([mean(other, seed) for seed in range(12)])
    common, apart = (one - two).std(), (one - np.roll(two, 1)).std()
    assert common < 0.6 * apart

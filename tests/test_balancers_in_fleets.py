"""Every policy that a scenario can name, in front of simulated replicas of which two die and come back."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from sim.cluster.balancers.policies import GATEWAY, POLICIES
from sim.cluster.ladder import climb
from sim.engines import vllm_v1
from sim.model.fleet import ActiveChecks, Balancer, Detection, Fleet, Outage
from sim.model.machine import Machine
from sim.model.scenario import Load, Scenario
from sim.model.workload import Lengths, Sessions, Workload
from sim.run import Run
from sim.steptime.linear import affine

STEP_TIME = affine(a0=0.02, a1=1e-4, b0=0.03, b1=5e-4, b2=1e-6)
FLAGS = vllm_v1.Flags(num_gpu_blocks=600, max_num_seqs=16, max_num_batched_tokens=512, max_model_len=2048)
WORK = Workload(prompt_tokens=Lengths(uniform=(10, 900)), output_tokens=Lengths(uniform=(1, 99)))
TALK = Workload(
    prompt_tokens=Lengths(uniform=(10, 90)),
    output_tokens=Lengths(uniform=(1, 50)),
    sessions=Sessions(turns=Lengths(uniform=(2, 5)), system_prompt_tokens=50),
)
LIKES = [(policy, like) for policy, ways in POLICIES.items() for like in ways]
CHECKS = Detection(active=ActiveChecks(interval=1.0, fall=2, rise=1))
OUTAGES = [Outage(replica=0, at=6.3, seconds=6.0), Outage(replica=2, at=9.0, seconds=0.5)]


def simulated(policy: str, like: str, work: Workload = WORK, outages: list[Outage] = OUTAGES, limit: int = 0) -> Run:
    balancer = Balancer(policy=policy, like=None if like == GATEWAY else like, max_connections=limit)
    fleet = Fleet(replicas=3, balancer=balancer, detection=CHECKS, outages=outages, scrape_seconds=0.5)
    load = Load(users=[24], seconds=16.0, spawn_rate=20.0)
    scenario = Scenario(server=FLAGS, name="fleet", workload=work, load=load, fleet=fleet)
    return climb(scenario, Machine(STEP_TIME, FLAGS), (1, 0))


@pytest.mark.parametrize(("policy", "like"), LIKES)
def test_nobody_is_lost_and_the_dead_get_nothing(policy: str, like: str) -> None:
    run = simulated(policy, like, limit=6 if policy == "bounded_queue" else 0)
    requests, steps = run.requests, run.steps
    assert steps is not None
    assert requests["id"].is_unique
    assert set(requests["replica"]) >= {0, 1, 2}
    for outage in OUTAGES:
        start, end = outage.at, outage.at + outage.seconds
        mine = steps[steps["replica"] == outage.replica]
        assert not ((mine["start"] < end) & (mine["end"] > start)).any()
    # checks fail at 7 and 8 s, and succeed at 13 s
    sent = requests.loc[requests["replica"] == 0, "sent"]
    assert not sent.between(8.01, 12.3).any() or policy == "bounded_queue"
    assert (requests.loc[requests["replica"] == 0, "ended"] > 13.0).any() or policy.endswith("affinity")
    for _, mine in requests.sort_values("sent").groupby("user"):
        assert (mine["sent"].to_numpy()[1:] >= mine["ended"].to_numpy()[:-1]).all()


def test_a_bounded_queue_holds_back_what_is_beyond_its_limit() -> None:
    run = simulated("bounded_queue", "haproxy", limit=3, outages=[])
    assert run.steps is not None
    assert run.steps["decode_sequences"].max() == 3
    free = simulated("least_outstanding", "haproxy", outages=[])
    assert free.steps is not None and free.steps["decode_sequences"].max() > 6


def kept(requests: pd.DataFrame) -> float:
    """The share of a user's requests that went where the one before went, or was the first of a session."""
    ordered = requests.sort_values(["user", "sent"])
    same = ordered.groupby("user")["replica"].diff().eq(0)
    return float(same.mean())


@pytest.mark.parametrize(("policy", "like"), [way for way in LIKES if way[0].endswith("affinity")])
def test_affinity_finds_what_a_replica_has_cached(policy: str, like: str) -> None:
    with_it, without = (simulated(p, w, TALK, []) for p, w in ((policy, like), ("random", "nginx")))
    assert kept(with_it.requests) > kept(without.requests) + 0.15
    assert with_it.steps is not None and without.steps is not None
    computed = [run.steps["prefill_tokens"].sum() / np.sum(run.requests["prompt_tokens"]) for run in (with_it, without)]
    assert computed[0] < 0.85 * computed[1]

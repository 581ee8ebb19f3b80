"""Queueing theory where the model reduces to it: means within 99.9 % intervals, and a wrong theory outside them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from sim.cluster.ladder import climb
from sim.engines.tgi_0_9_4 import Flags
from sim.model.machine import Machine
from sim.model.scenario import Load, Scenario
from sim.model.workload import Exponential, Lengths, Workload, draw_lengths
from sim.results import metrics
from sim.steptime.linear import Linear, affine

ONE_AT_A_TIME = Flags(  # twice the new tokens never fit
    max_batch_prefill_tokens=20_000,
    max_batch_total_tokens=50_000,
    max_input_length=20_000,
    max_total_tokens=60_000,
    max_concurrent_requests=10_000,
)
ALONE = 26_000
EXPONENTIAL = Lengths(exponential=Exponential(mean=1000.0, high=20_000))


def interval(values: list[float]) -> tuple[float, float]:
    """The 99.9 % interval of the mean of independent replicates (Student's t)."""
    low, high = stats.t.interval(0.999, len(values) - 1, np.mean(values), stats.sem(values))
    return float(low), float(high)


def replicates(scenario: Scenario, step_time: Linear, server: Flags, n: int = 12) -> list[pd.DataFrame]:
    return [metrics.table(climb(scenario, Machine(step_time, server), (7, seed))) for seed in range(n)]


def sojourn(service: float, service_sq: float, rate: float) -> float:
    """Mean time in an M/G/1 queue (Pollaczek and Khinchine)."""
    return service + rate * service_sq / (2 * (1 - rate * service))


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_poisson_arrivals_of_equal_requests_wait_as_in_m_d_1(load: float) -> None:
    step_time = affine(a0=0.5, b0=0.125)  # a prefill and four decodes: a second
    scenario = Scenario(
        server=Flags(),
        name="M/D/1",
        workload=Workload(prompt_tokens=16, output_tokens=5, max_new_tokens=ALONE),
        load=Load(rate=[load], seconds=6000.0, settle=500.0),
    )
    low, high = interval([t["e2e_mean"].iloc[0] for t in replicates(scenario, step_time, ONE_AT_A_TIME)])
    assert low < sojourn(1.0, 1.0, load) < high
    assert high < sojourn(1.0, 2.0, load)  # M/M/1 waits twice as long: the interval can tell


def test_poisson_arrivals_of_exponential_prefills_wait_as_in_m_m_1() -> None:
    step_time = affine(a1=1e-3)
    rate = 0.6
    scenario = Scenario(
        server=Flags(),
        name="M/M/1",
        workload=Workload(prompt_tokens=EXPONENTIAL, output_tokens=1, max_new_tokens=ALONE),
        load=Load(rate=[rate], seconds=12_000.0, settle=500.0),
    )
    tables = replicates(scenario, step_time, ONE_AT_A_TIME)
    low, high = interval([t["e2e_mean"].iloc[0] for t in tables])
    assert low < sojourn(1.0005, 2 * 1.0005**2, rate) < high  # rounding up to a token adds half a millisecond
    assert sojourn(1.0005, 1.0005**2, rate) < low  # M/D/1
    low, high = interval([t["prefill_share"].iloc[0] for t in tables])
    assert low < rate * 1.0005 < high


def mva(users: int, service: float, think: float) -> tuple[float, float]:
    """Throughput and response time of a closed network of one exponential station and a delay, by exact MVA."""
    queue = throughput = response = 0.0
    for n in range(1, users + 1):
        response = service * (1 + queue)
        throughput = n / (response + think)
        queue = throughput * response
    return throughput, response


@pytest.mark.parametrize("users", [2, 8])
def test_a_closed_network_of_one_station_is_as_exact_mva_has_it(users: int) -> None:
    think = 4.0
    scenario = Scenario(
        server=Flags(),
        name="closed",
        workload=Workload(prompt_tokens=EXPONENTIAL, output_tokens=1, max_new_tokens=ALONE),
        load=Load(users=[users], think=think, seconds=8000.0),
    )
    tables = replicates(scenario, affine(a1=1e-3), ONE_AT_A_TIME)
    throughput, response = mva(users, 1.0005, think)
    low, high = interval([t["rps"].iloc[0] for t in tables])
    assert low < throughput < high
    low, high = interval([t["e2e_mean"].iloc[0] for t in tables])
    assert low < response < high
    assert mva(users - 1, 1.0005, think)[1] < low  # the arrival theorem with one user too few, or one too many
    assert high < mva(users + 1, 1.0005, think)[1]
    for t in tables:  # Little: those on the server, and those thinking, are all the users
        assert t["in_flight"].iloc[0] + t["rps"].iloc[0] * think == pytest.approx(users, rel=0.01)


def test_the_lengths_that_make_services_exponential_have_an_exponentials_moments() -> None:
    drawn = draw_lengths(EXPONENTIAL, np.random.default_rng(1), 400_000) / 1000.0
    assert drawn.mean() == pytest.approx(1.0005, rel=0.01)
    assert (drawn**2).mean() == pytest.approx(2 * 1.0005**2, rel=0.02)

"""Delays have the law they name; what users see lies between what they sent and what the server made."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from sim.cluster.clients import BURST_UPLINK, FIRST, LAST, SPACING, TURNAROUND, UPLINK, Delays
from sim.cluster.ladder import climb
from sim.engines.tgi_0_9_4 import Flags
from sim.model.calibration import Clocks, Delay
from sim.model.machine import Machine
from sim.model.scenario import Load, Scenario
from sim.model.workload import Lengths, Workload
from sim.steptime.linear import affine
from sim.steptime.noise_parameters import Noise


def test_delays_have_the_quantiles_named_and_belong_to_a_request() -> None:
    law = Delay(quantiles=[0.0, 0.1, 0.5])
    clocks = Clocks(uplink=law, downlink=law, turnaround=law, spacing=Delay(quantiles=[0.2]))
    drawn = np.array(list(islice(Delays(clocks, 1).requests(3), 50_000)))
    assert (drawn[:, SPACING] == 0.2).all()
    for column in (TURNAROUND, UPLINK, BURST_UPLINK, FIRST, LAST):
        found = np.quantile(drawn[:, column], [0, 0.25, 0.5, 0.75, 1])
        assert found == pytest.approx([0, 0.05, 0.1, 0.3, 0.5], abs=0.008)
    assert np.abs(np.corrcoef(drawn[:, 1:].T) - np.eye(5)).max() < 0.02
    both = Delays(clocks, 1)
    one, other = both.requests(3), both.requests(4)
    assert [(next(other), next(one))[1] for _ in range(300)] == [tuple(row) for row in drawn[:300].tolist()]
    assert set(islice(Delays(Clocks(), 1).requests(0), 9)) == {(0.0,) * 6}


def test_every_request_is_sent_then_seen_to_begin_then_seen_to_end() -> None:
    clocks = Clocks(
        uplink=Delay(quantiles=[0.0, 0.2]), downlink=Delay(quantiles=[0.0, 0.3]), turnaround=Delay(quantiles=[0.0, 0.1])
    )
    workload = Workload(prompt_tokens=Lengths(uniform=(1, 300)), output_tokens=Lengths(uniform=(1, 5)))
    server = Flags(max_batch_total_tokens=2000)
    step_time = affine(a0=0.01, a1=1e-4, b0=0.02)
    scenario = Scenario(server=Flags(), name="seen", workload=workload, load=Load(users=[6], seconds=200.0))
    requests = climb(scenario, Machine(step_time, server, Noise(), clocks), (1, 0)).requests
    ok = requests[requests["status"] == "ok"]
    assert len(ok) > 500
    assert (ok["first_token"] > ok["sent"]).all()
    assert (ok["first_token"] <= ok["last_token"]).all()
    assert (ok["last_token"] == ok["ended"]).all()
    assert (ok.loc[ok["output_tokens"] == 1, "first_token"] == ok.loc[ok["output_tokens"] == 1, "last_token"]).all()
    for _, mine in requests.groupby("user"):
        assert (mine["sent"].to_numpy()[1:] >= mine["ended"].to_numpy()[:-1]).all()  # one at a time

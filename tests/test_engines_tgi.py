"""Cases worked out by hand, or traced on the real router."""

from __future__ import annotations

import numpy as np
import pytest
from reference import Arrival, Reference, World
from worlds import jump

from sim.engines.tgi_0_9_4 import Engine, Flags
from sim.model.request import Request
from sim.steptime.linear import affine

PRINTED = affine(a0=20.0, a1=0.01, b0=40.0)  # the traces of §3.3, in ms: a prefill takes 20 and 1 per 100 tokens
SERVER = Flags(
    max_batch_prefill_tokens=14000, max_batch_total_tokens=500000, max_input_length=10000, max_total_tokens=20000
)


def calls(arrivals: list[Arrival], config: Flags = SERVER) -> list[tuple[str, float, float, int]]:
    return [(op, start, end, len(uids)) for op, start, end, uids, _ in jump(World(config, PRINTED, arrivals)).calls]


def test_a_burst_on_an_idle_server_is_prefilled_one_then_all_then_decoded() -> None:
    history = jump(World(SERVER, PRINTED, [Arrival(float(t), 100, 6, 6) for t in range(1, 11)]))
    assert [(op, start, end, len(uids)) for op, start, end, uids, _ in history.calls] == [
        ("prefill", 1.0, 22.0, 1),
        ("prefill", 22.0, 51.0, 9),
        *(("decode", end - 40.0, end, 10) for end in (91.0, 131.0, 171.0, 211.0, 251.0)),
    ]
    assert history.backpressure == 1
    assert history.tokens[0][:3] == [22.0, 91.0, 131.0]


def test_one_arrival_beside_eight_waits_for_19_decodes_and_a_later_one_for_none() -> None:
    eight = [Arrival(0.0, 100, 200, 200)] * 8
    late = [Arrival(30.0, 100, 200, 200), Arrival(2000.0, 100, 200, 200)]
    ops = [op for op, *_ in calls([*eight, *late])]
    assert ops[:2] == ["prefill", "decode"]  # all eight came at one instant
    assert ops[1:22] == ["decode"] * 19 + ["prefill", "decode"]
    second = [start for op, start, _, _ in calls([*eight, *late]) if op == "prefill"][2]
    assert 2000.0 <= second < 2040.0  # more than 19 steps later: admitted at the next boundary


def test_who_does_not_fit_keeps_the_smaller_ones_behind_waiting() -> None:
    config = Flags(max_batch_prefill_tokens=160, max_batch_total_tokens=320, max_waiting_tokens=1)
    big = Arrival(1.0, 160, 100, 100)
    history = jump(World(config, PRINTED, [Arrival(0.0, 100, 20, 20), big, Arrival(2.0, 16, 1, 1)]))
    prefills = [(start, uids) for op, start, _, uids, _ in history.calls if op == "prefill"]
    assert [uids for _, uids in prefills] == [(0,), (1,), (2,)]
    assert prefills[1][0] == history.ended[0]


def test_a_head_too_big_to_fit_that_leaves_lets_the_next_be_seen_at_the_next_boundary() -> None:
    config = Flags(max_batch_prefill_tokens=160, max_batch_total_tokens=320, max_waiting_tokens=1)
    arrivals = [Arrival(0.0, 100, 100, 100), Arrival(1.0, 160, 100, 100, leaves=500.0), Arrival(2.0, 16, 1, 1)]
    history = jump(World(config, PRINTED, arrivals))
    first_boundary = min(end for op, _, end, _, _ in history.calls if op == "decode" and end >= 500.0)
    assert history.tokens[2] == [first_boundary + 20.16]
    assert history.tokens == Reference(World(config, PRINTED, arrivals)).history.tokens


def test_reserved_and_live_use_differ_by_a_block_that_is_handed_back() -> None:
    # 17 + 17: reserved 32 + 32, live 16·ceil(33/16) = 48. Beside one of them, 64 more fit into 112 but not into 111.
    arrivals = [Arrival(0.0, 17, 17, 17), Arrival(1.0, 17, 17, 17)]
    for budget, running in ((112, 2), (111, 1)):
        config = Flags(max_batch_prefill_tokens=64, max_batch_total_tokens=budget, max_waiting_tokens=0)
        history = jump(World(config, PRINTED, arrivals))
        assert max(len(uids) for _, _, _, uids, _ in history.calls) == running


@pytest.mark.parametrize(("ratio", "size"), [(0.7, 90), (0.7, 170), (1.3, 90), (1.3, 170)])
def test_the_ratio_is_taken_in_float32(ratio: float, size: int) -> None:
    wanted = int(np.floor(np.float32(size) * np.float32(ratio)))
    config = Flags(
        max_batch_prefill_tokens=100_000,
        max_batch_total_tokens=100_000,
        waiting_served_ratio=ratio,
        max_concurrent_requests=1000,
    )
    for queued in (wanted - 1, wanted, wanted + 1):
        engine = Engine(config)
        for i in range(size):
            engine.submit(Request(i, 1, 2, 2))
        engine.commit(engine.plan(), 1)
        for i in range(queued):
            engine.submit(Request(size + i, 1, 2, 2))
        assert len(engine.plan().admitted) == (queued if queued >= wanted else 0)


def test_float32_matters_at_these_sizes() -> None:
    for ratio, size in ((0.7, 90), (1.3, 170)):
        assert np.floor(np.float32(size) * np.float32(ratio)) != np.floor(size * ratio)


def test_429_comes_before_422_and_a_422_holds_no_permit() -> None:
    config = Flags(max_batch_total_tokens=500, max_concurrent_requests=1, max_input_length=10)
    too_long = Arrival(5.0, 11, 1, 1)
    history = jump(
        World(config, PRINTED, [Arrival(0.0, 10, 1, 1), too_long, Arrival(100.0, 11, 1, 1), Arrival(100.0, 10, 1, 1)])
    )
    assert history.outcome == {0: "ok", 1: "overloaded", 2: "validation", 3: "ok"}

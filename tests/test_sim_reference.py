"""Jumping over runs of steps changes nothing: the same calls, members and token times as one step at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from reference import Arrival, History, Reference, World
from worlds import crowd, jump, worlds


def assert_same(world: World) -> History:
    ours, theirs = jump(world), Reference(world).history
    for mine, reference in zip(ours.calls, theirs.calls, strict=False):
        assert (mine[0], mine[3], mine[4]) == (reference[0], reference[3], reference[4])
        assert math.isclose(mine[1], reference[1], rel_tol=0, abs_tol=1e-9)
        assert math.isclose(mine[2], reference[2], rel_tol=0, abs_tol=1e-9)
    assert len(ours.calls) == len(theirs.calls)
    assert ours.outcome == theirs.outcome
    assert ours.ended.keys() == theirs.ended.keys()
    for uid, times in theirs.tokens.items():
        assert len(ours.tokens[uid]) == len(times)
        assert all(abs(a - b) <= 1e-9 for a, b in zip(ours.tokens[uid], times, strict=True))
    assert all(abs(ours.ended[uid] - at) <= 1e-9 for uid, at in theirs.ended.items())
    assert (ours.backpressure, ours.wait_exceeded) == (theirs.backpressure, theirs.wait_exceeded)
    return theirs


@given(worlds())
def test_jump_and_reference_agree(world: World) -> None:
    history = assert_same(world)
    event("concatenates" if history.backpressure + history.wait_exceeded else "one batch at a time")


@given(worlds(), st.data())
def test_they_agree_on_arrivals_at_the_very_instant_a_step_ends_and_one_ulp_off(
    world: World, data: st.DataObject
) -> None:
    history = Reference(world).history
    ends = st.sampled_from([call[2] for call in history.calls] or [0.0])
    model = world.arrivals[0]
    for _ in range(data.draw(st.integers(1, 4))):
        end = data.draw(ends)
        at = data.draw(st.sampled_from([end, end, math.nextafter(end, 0.0), math.nextafter(end, math.inf)]))
        leaves = data.draw(st.sampled_from([None, None, *(call[2] for call in history.calls)]))
        new = Arrival(at, model.prompt, model.new, model.output, leaves if leaves and leaves > at else None)
        world = replace(world, arrivals=sorted([*world.arrivals, new], key=lambda a: a.time))
    assert_same(world)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("ratio", [0.7, 1.2, 1.3])
def test_they_agree_on_crowds(padded: bool, ratio: float) -> None:
    for seed in range(8):
        history = assert_same(crowd(seed, padded, ratio))
        assert history.wait_exceeded
        assert max(len(call[3]) for call in history.calls) > 90  # where 0.7 and 1.3 have other floors in float64

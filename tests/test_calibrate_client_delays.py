"""What lies between the client's clock and the server's comes out of streams as it was put in."""

import msgspec
import numpy as np
import pytest
from streams import CLOCKS, lengths, observe

from calibrate.schedule.client_delays import fit_clocks
from calibrate.schedule.schedule import schedule_of
from sim.model.calibration import Clocks, Delay
from sim.model.workload import Workload

TOGETHER = lengths(200, 40)  # alike, so that users end in groups
MIXED = lengths((100, 1500), (20, 80))


def found(workload: Workload, clocks: Clocks, users: tuple[int, ...] = (1, 2, 4, 8, 16)) -> Clocks:
    """What is fitted to two runs seen through `clocks`."""
    runs = [observe(users, workload, clocks=clocks, seconds=8.0, seed=seed).run for seed in (0, 1)]
    return fit_clocks(runs, [schedule_of(run) for run in runs], round_trip=2e-3, per_token=0.0)


@pytest.mark.parametrize("spacing", [0.0, 2e-4, 5e-4, 2e-3])
def test_users_whose_answers_end_together_come_back_so_far_apart(spacing: float) -> None:
    clocks = msgspec.structs.replace(CLOCKS, spacing=Delay(quantiles=[spacing]))
    assert found(TOGETHER, clocks).spacing.quantiles[0] == pytest.approx(spacing, rel=0.2, abs=5e-5)


def test_that_the_last_of_many_takes_longer_is_chance_and_no_spacing() -> None:
    clocks = msgspec.structs.replace(CLOCKS, spacing=Delay(), turnaround=Delay(quantiles=[1e-4, 3e-3]))
    assert found(TOGETHER, clocks).spacing.quantiles[0] < 1e-4


def test_users_who_come_back_sooner_than_chance_are_no_negative_time_apart() -> None:
    """Downlinks spread the ends of a step, and who was seen to end last comes back last: less is left of the chance."""
    late = Delay(quantiles=[0.0, 3e-3])
    clocks = msgspec.structs.replace(CLOCKS, spacing=Delay(), downlink=late)
    spacing = found(TOGETHER, clocks).spacing
    assert 0.0 <= spacing.quantiles[0] < 1e-3
    assert spacing.per_token == 0.0


def test_a_spacing_grows_with_the_prompt_that_has_to_be_written() -> None:
    clocks = msgspec.structs.replace(CLOCKS, spacing=Delay(quantiles=[2e-4], per_token=1e-6))
    spacing = found(lengths((100, 1500), 40), clocks).spacing
    assert spacing.per_token == pytest.approx(1e-6, rel=0.35)
    assert np.mean(spacing.quantiles) + 800 * spacing.per_token == pytest.approx(1e-3, rel=0.2)


def test_a_turnaround_is_told_apart_from_the_prompt_and_the_streams_it_grows_with() -> None:
    slow = Delay(quantiles=[3e-4, 4e-4], per_token=1e-6)
    clocks = found(MIXED, msgspec.structs.replace(CLOCKS, turnaround=slow, reading=4e-5), (1, 2, 4, 8, 16, 32))
    assert clocks.turnaround.per_token == pytest.approx(1e-6, rel=0.2)
    assert clocks.reading == pytest.approx(4e-5, rel=0.2)
    assert np.median(clocks.turnaround.quantiles) == pytest.approx(3.5e-4, abs=1.5e-4)

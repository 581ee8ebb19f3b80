"""The vLLM engine schedules what the real engine core scheduled: every step, with the same rows, at the same ticks."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace
from schedule_vllm import Recording, differences, read_recordings

SHIPPED = Path(__file__).parent.parent / "data" / "vllm-v1-schedules.jsonl.gz"


def test_schedule_of_the_real_engine_core(recording: Recording) -> None:
    found = differences(recording)
    assert not found, "\n".join(found[:10])


def test_the_shipped_file_has_60_schedules_that_bind() -> None:
    recordings = read_recordings(SHIPPED)
    assert len(recordings) == len({r.name for r in recordings}) == 60
    assert {r.config["async_scheduling"] for r in recordings} == {False, True}
    assert {f.finish for r in recordings for f in r.requests.values()} == {"length", "stop", "abort"}
    assert sum(f.preemptions for r in recordings for f in r.requests.values()) == 460


def test_differences_sees_one_tick_one_row_and_one_block_that_are_not_as_recorded() -> None:
    recording = read_recordings(SHIPPED)[0]
    step = recording.steps[5]
    for wrong in (
        replace(step, t0=(step.t0 or 0) + 1),
        replace(step, batch=[*step.batch, [99, 1, 0, 5]]),
        replace(step, free=step.free + 1),
        replace(step, preempted=[1]),
    ):
        doctored = replace(recording, steps=[*recording.steps[:5], wrong, *recording.steps[6:]])
        assert [d.split(":")[0] for d in differences(doctored)] == ["step 5"]
    uid, fate = next(iter(recording.requests.items()))
    shorter = replace(fate, token_times=fate.token_times[:-1])
    assert differences(replace(recording, requests=recording.requests | {uid: shorter}))

"""The reference for the vLLM engine schedules by itself what the real engine core scheduled."""

from __future__ import annotations

from schedule_vllm import Recording, by_reference


def test_schedule_of_the_real_engine_core(recording: Recording) -> None:
    mine = by_reference(recording)
    for ours, real in zip(mine.steps, recording.steps, strict=False):
        assert ours == real
    assert len(mine.steps) == len(recording.steps)
    assert mine.requests == recording.requests

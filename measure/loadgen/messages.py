"""Messages between the ladder and the load generator: JSON lines through a pipe, and locust's own messages.

The ladder sends `Setup`, then `Command`s; each worker sends a `Report` a few times a second. Times are seconds since
the run began on the ladder's clock; workers on other machines measure their offset first.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from measure.apis.openai import EXTRAS
from measure.loadgen.prompts import Recipe
from sim.model.status import Status
from sim.model.workload import Gamma, Workload

REPORT_SECONDS = 0.25
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """Identifies a boot of a machine: processes with the same one share a clock and a disk. Empty where unknown."""
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker needs before the first request; `zero` is `perf_counter_ns` when the run began."""

    url: str
    api: str
    out: str
    zero: int
    boot: str
    seed: int
    recipe: Recipe
    workload: Workload
    model: str | None = None
    extras: tuple[str, ...] = EXTRAS  # optional keys that the server accepts
    lengths: list[list[int]] | None = None  # prompt, output and max_new_tokens columns of the workload's file
    open_loop: bool = False
    patience: float = 300.0
    think: float = 0.0
    retry: float = 0.2
    first_id: int = 0
    segment: int = 0
    workers: int = 1
    port: int = 0  # of locust's master; 0 without workers
    bind: str = "127.0.0.1"


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """`warm` (send unrecorded requests), `rung` (apply this load from `start` on) or `stop`."""

    do: str
    requests: int = 0
    rung: int = 0
    start: float = 0.0
    users: int = 0
    spawn_rate: float = 1.0
    rate: float | None = None
    arrivals: str | Gamma = "poisson"
    times: list[float] | None = None  # of a trace, from `start`


class FinishedRequest(msgspec.Struct, frozen=True, array_like=True):
    """Summary of a request that has ended."""

    user: int
    rung: int
    scheduled: float
    sent: float
    ended: float
    first: float | None
    last: float | None
    tokens: int
    status: Status
    error: str | None
    max_new_tokens: int
    prompt_tokens: int
    counted_prompt: int | None  # by the server
    events: int = 0  # events with tokens
    spread: bool = False  # tokens were spread evenly over the events
    finish_reason: str | None = None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker did from its last report, `since`, to `t`; `event` is set when it reached a state."""

    worker: int
    t: float
    event: str = ""  # ready, warmed, ramped, stopped; error, unwritable
    text: str = ""
    since: float = 0.0
    tokens: int = 0
    finished: list[FinishedRequest] = []
    in_flight: list[tuple[int, float]] = []  # user, sent
    lags: list[float] = []  # of the canary, s
    cpu: float = 0.0  # share of one core

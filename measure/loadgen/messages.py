"""What the ladder and the load generator say to each other: JSON lines through a pipe, and locust's own messages.

The ladder sends `Setup`, then `Order`s; each worker of the generator answers with `Report`s a few times a second. Times
are seconds since the run began, on one clock: workers of another machine measure their offset first.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from measure.apis.dialect import EXTRAS
from measure.loadgen.prompts import Recipe
from sim.model.workload import Gamma, Workload

REPORT_SECONDS = 0.25
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """What tells whether two processes share a clock and a disk: the same boot of the same machine."""
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a worker needs to know before the first request; `zero` is `perf_counter_ns` when the run began."""

    url: str
    api: str
    out: str
    zero: int
    boot: str
    seed: int
    recipe: Recipe
    workload: Workload
    model: str | None = None
    extras: tuple[str, ...] = EXTRAS  # keys that the server takes (`dialect`)
    lengths: list[list[int]] | None = None  # prompt, output, max_new of a workload's file
    open_loop: bool = False
    patience: float = 300.0
    think: float = 0.0
    retry: float = 0.2
    first_id: int = 0
    segment: int = 0
    workers: int = 1
    port: int = 0  # where locust's master listens, when there are workers
    bind: str = "127.0.0.1"


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """`warm` (a few unrecorded requests), `rung` (from `start` on, this load), `stop`."""

    do: str
    requests: int = 0
    rung: int = 0
    start: float = 0.0
    users: int = 0
    spawn_rate: float = 1.0
    rate: float | None = None
    arrivals: str | Gamma = "poisson"
    times: list[float] | None = None  # of a trace, from `start`


class Ended(msgspec.Struct, frozen=True, array_like=True):
    """A request that has ended, in short."""

    user: int
    rung: int
    scheduled: float
    sent: float
    ended: float
    first: float | None
    last: float | None
    tokens: int
    status: str
    error: str | None
    asked: int  # max_new_tokens
    prompt: int
    counted_prompt: int | None  # by the server
    events: int = 0  # that carried tokens
    spread: bool = False  # it is not known which event carried how many
    finish_reason: str | None = None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker has seen since its last report, until `t`; or that it has done as told (`said`)."""

    worker: int
    t: float
    said: str = ""  # ready, warmed, ramped, bye
    text: str = ""
    since: float = 0.0
    tokens: int = 0
    ended: list[Ended] = []
    alive: list[tuple[int, float]] = []  # user, sent
    lags: list[float] = []  # of the canary, s
    cpu: float = 0.0  # of one core

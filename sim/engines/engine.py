"""The interface of a scheduler to its caller: the simulator in virtual time, the stand-in in real time, a fit.

An engine knows no clock and no durations. `plan` says what the next steps compute, as many as have the same shape;
the caller lets some or all of them pass and says so with `commit`. In between, requests come (`submit`) and clients
leave (`cancel`), each with `done`, the number of steps of the plan under way that ended strictly before now: what
happens at the very tick at which a step ends counts as come before that end. `valid_steps` then says at which boundary
the engine could decide otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec

from sim.model.request import Request
from sim.model.status import Status
from sim.steptime.work import NOTHING, StepWork

Refusal = tuple[Request, Status]  # how it ends


class Plan(msgspec.Struct, frozen=True):
    """Steps of one shape: the first computes `once` and `work`, every further one `growth` more than the one before.

    In force when its first step begins. `admitted` and `preempted` are those of the first step, in order; `refused` are
    refused at this boundary.
    """

    work: StepWork
    growth: StepWork = NOTHING
    steps: int = 1
    once: StepWork | None = None
    admitted: Sequence[Request] = ()
    preempted: Sequence[Request] = ()
    refused: Sequence[Refusal] = ()


class Outcome(msgspec.Struct, frozen=True):
    """The results of steps: the `tokens` of each live request that got any, for each of the steps.

    `first`, `resumed` (first token after a preemption) and `finished` are those of the last step. `after` takes time,
    gives no token, and ends before the next plan.
    """

    tokens: int = 1
    first: Sequence[Request] = ()
    resumed: Sequence[Request] = ()
    finished: Sequence[Request] = ()
    after: StepWork | None = None


class Decision(NamedTuple):
    """The requests that are admitted and preempted at a scheduling decision, in order."""

    admitted: Sequence[Request] = ()
    preempted: Sequence[Request] = ()


class Row(NamedTuple):
    """A request's part in a step."""

    request: Request
    tokens: int
    is_prefill: bool
    computed: int  # tokens computed before the step


class Scheduled(NamedTuple):
    """What an observer sees of a step when it is scheduled; `op` in the engine's own words."""

    op: str
    rows: Sequence[Row]
    preempted: Sequence[Request]
    state: ServerState


class ServerState(msgspec.Struct, frozen=True, gc=False):
    """The gauges of a server: all that a balancer may see. Requests, and tokens of the KV cache."""

    waiting: int
    queued_tokens: int  # prompt tokens of those waiting
    running: int
    kv_used: int
    kv_free: int


class Engine(Protocol):
    """A scheduler: no clock, no durations, no I/O."""

    decide: Callable[[Decision], Decision] | None
    """Set only by who follows a recorded schedule: hears what the rules say, before anything changes, and returns what
    is done instead."""
    observer: Callable[[Scheduled], None] | None
    """Hears of every step as it is scheduled."""

    def submit(self, request: Request, done: int = 0) -> Status | None:
        """Take a request in, or say how it ends at once."""

    def cancel(self, request: Request, done: int = 0) -> None:
        """The client of a request that has not ended has left."""

    def plan(self) -> Plan | None:
        """Schedule: what is computed from now on. None where nothing is held and nothing scheduled."""

    def valid_steps(self, plan: Plan, done: int) -> int:
        """After a submit or cancel: the first boundary, from done + 1 to plan.steps, at which `plan` could differ from
        going on."""

    def commit(self, plan: Plan, steps: int) -> Outcome:
        """The first `steps` steps of the plan have been computed."""

    def received(self, request: Request, done: int) -> int:
        """The tokens of a live request after `done` steps of the plan under way; 0 for an unknown request."""

    def state(self, done: int = 0) -> ServerState:
        """The gauges, after `done` steps of the plan under way."""

    def counters(self, done: int = 0) -> Mapping[str, float]:
        """What the engine counts, by the names of its own metrics."""

"""A fleet as a scenario describes it: how many replicas, and how requests are shared among them."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from sim.model.errors import BadInput
from sim.model.price import Price
from sim.model.quantity import Count, NotNegative, NotNegativeInt, Positive
from sim.model.server import Bounds, EngineFlags


class Balancer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which replica gets a request: the `policy`, in the way of a software (`like`; None: the usual one of the policy).

    A replica answers at most `max_connections` requests at a time (0: any number); others are refused, or wait at the
    balancer for `queue_timeout` s (None: for ever).
    """

    policy: Literal[
        "round_robin",
        "random",
        "power_of_two",
        "least_outstanding",
        "least_tokens",
        "least_kv",
        "session_affinity",
        "prefix_affinity",
        "bounded_queue",
    ] = "least_outstanding"
    like: Literal["nginx", "haproxy", "vllm-router", "sglang-router"] | None = None
    max_connections: NotNegativeInt = 0
    queue_timeout: Positive | None = None


class ActiveChecks(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A check of every replica each `interval` s: it is taken out after `fall` failures in a row, and back after `rise`
    successes in a row (2, as in HAProxy)."""

    interval: Positive
    fall: Count = 3
    rise: Count = 2


class PassiveChecks(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Failed requests count: after `max_fails` of them a replica is left out for `fail_timeout` s. The defaults are
    nginx's."""

    max_fails: NotNegativeInt = 1
    fail_timeout: Positive = 10.0


class Detection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the balancer learns that a replica is dead; with neither, nginx counts failed requests."""

    active: ActiveChecks | None = None
    passive: PassiveChecks | None = None


class Outage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A replica dies `at` s, with all that it holds, and starts again after some `seconds`."""

    replica: NotNegativeInt
    at: NotNegative
    seconds: Positive


class Group(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Equal replicas of a fleet: their server, calibration and price, where those are not the scenario's, and the
    weight of each, for policies that know weights."""

    name: str
    replicas: Count = 1
    weight: Count = 1
    server: EngineFlags | None = None
    calibration: str | None = None
    price: Price | None = None


class Fleet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Replicas behind a balancer.

    `replicas` is a number, or a range in which `servecast plan` finds it; or they are those of `groups`, in order. The
    balancer chooses for every request, or for every connection, and sees gauges of the replicas that are up to
    `scrape_seconds` old.
    """

    replicas: Count | Bounds = 1
    groups: list[Group] = []
    balancer: Balancer = Balancer()
    per: Literal["request", "connection"] = "request"
    scrape_seconds: NotNegative = 0.0
    detection: Detection = Detection()
    outages: list[Outage] = []
    failures: dict[str, Any] | None = None  # refused (`scenarios.load.checks`), as is the next
    autoscaler: dict[str, Any] | None = None

    @property
    def count(self) -> int:
        """How many replicas there are; `BadInput` for a range."""
        if self.groups:
            return sum(group.replicas for group in self.groups)
        if isinstance(self.replicas, Bounds):
            raise BadInput(
                f"expected a number, found {self.replicas.low} to {self.replicas.high}: `servecast plan` finds it",
                key="fleet.replicas",
            )
        return self.replicas

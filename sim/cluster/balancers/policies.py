"""The balancer that a scenario asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sim.cluster.balancers.balancer import Backend, Balancer
from sim.cluster.balancers.nginx import LeastConnections, Nginx
from sim.model.errors import BadInput
from sim.model.fleet import Detection, Fleet, PassiveChecks

POLICIES: dict[tuple[str, str], Callable[[Sequence[Backend]], Any]] = {
    ("least_outstanding", "nginx"): LeastConnections,
    ("round_robin", "nginx"): Nginx,
}
READ_STATE = frozenset({"least_tokens", "least_kv"})  # of the replicas, not their own counts alone


def balancer_of(fleet: Fleet) -> Balancer:
    """The balancer of a fleet; `BadInput` for one that is not simulated. nginx counts failed requests, if nobody says
    otherwise."""
    spec, passive = fleet.balancer, fleet.detection.passive
    if spec.like == "nginx" and fleet.detection == Detection():
        passive = PassiveChecks()
    if (make := POLICIES.get((spec.policy, spec.like))) is None:
        raise BadInput(f"{spec.policy} like {spec.like} is not simulated yet", key="fleet.balancer.policy")
    fails, timeout = (0, 10.0) if passive is None else (passive.max_fails, passive.fail_timeout)
    made: Balancer = make([Backend(max_fails=fails, fail_timeout=timeout) for _ in range(fleet.count)])
    return made

"""What machines cost by the hour."""

from __future__ import annotations

from typing import Literal

import msgspec

from sim.model.quantity import Count, Positive


class Price(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a replica costs, or a node with so many replicas, USD per hour, and who says so."""

    usd_per_hour: Positive
    source: str = ""
    per: Literal["replica", "node"] = "replica"
    replicas_per_node: Count = 1

    def of(self, replicas: int) -> float:
        """What so many replicas cost, USD per hour: whole nodes."""
        return self.usd_per_hour * -(-replicas // self.replicas_per_node)

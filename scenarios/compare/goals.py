"""Goals for the relative error of forecasts, which `make validate` checks.

They are set, not fitted: what decides a purchase is known well enough within them. A server that pads, and vLLM, run
here on a shared CPU, whose neighbours move them by several percent from run to run, so their goals are wider.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sim.model.server import EngineFlags


@dataclass(frozen=True)
class Goal:
    """The largest relative error of a metric, the error in seconds that is small enough whatever its share, and whether
    the bands must hold what was measured (as often as such bands should) besides."""

    error: float
    seconds: float = 0.0
    inside: bool = False


FLASH = {
    "e2e_mean": Goal(0.02),
    "e2e_p50": Goal(0.02),
    "output_tokens_per_s": Goal(0.02),
    "rps": Goal(0.03),
    "e2e_p95": Goal(0.04, 0.003),
    "ttft_p50": Goal(0.04, 0.003),
    "ttft_p95": Goal(0.08, 0.005),
}
PADDED = {
    "e2e_mean": Goal(0.05),
    "e2e_p50": Goal(0.05),
    "output_tokens_per_s": Goal(0.05),
    "rps": Goal(0.08, inside=True),
    "e2e_p95": Goal(0.08, 0.010),
    "ttft_p50": Goal(0.08, 0.010),
    "ttft_p95": Goal(0.15, 0.020),
}

MIXED = PADDED | {"rps": Goal(0.06)}


def goals(server: EngineFlags) -> Mapping[str, Goal]:
    """The goals for forecasts of a server, by metric."""
    if server.declared.forms[0] == "mixed":
        return MIXED
    return PADDED if server.pads else FLASH

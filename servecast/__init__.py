"""What a notebook or a program of yours imports: load a scenario, simulate it, read runs and calibrations.

>>> import servecast
>>> scenario = servecast.load("llama2-70b-1500-100")
>>> scenario.server.max_batch_prefill_tokens
14000
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scenarios.load.scenario import load, shipped

if TYPE_CHECKING:
    from scenarios.forecast.simulate import simulate

__all__ = ["load", "shipped", "simulate"]


def __getattr__(name: str) -> Any:
    """`simulate` is fetched when asked for: reading a scenario need not wait for pandas."""
    if name == "simulate":
        from scenarios.forecast.simulate import simulate

        return simulate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The engine for which evidence beside the steps is read from a schedule: admission timings, the token budget."""

from __future__ import annotations

from sim.engines.tgi_0_9_4 import Flags
from sim.model.server import EngineFlags, expect
from sim.run import Run


def has_prefills(run: Run) -> bool:
    """Whether the server computes prompts in passes of their own, whose admission streams show; others are followed."""
    return isinstance(run.server, Flags)


def server_of(run: Run) -> Flags:
    """The flags of a run's server; `BadInput` where it is of an engine that calibration cannot follow."""
    return rules(run.server)


def rules(server: EngineFlags) -> Flags:
    """The flags, if calibration can follow their engine; else `BadInput`."""
    return expect(server, Flags, "runs without streams and published figures are fitted")

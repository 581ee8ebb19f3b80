"""The engine whose schedules can be rebuilt from what clients saw; so far there is one."""

from __future__ import annotations

from sim.engines.tgi_0_9_4 import Flags
from sim.model.server import EngineFlags, expect
from sim.run import Run


def server_of(run: Run) -> Flags:
    """The flags of a run's server; `BadInput` where it is of an engine that calibration cannot follow."""
    return rules(run.server)


def rules(server: EngineFlags) -> Flags:
    """The flags, if calibration can follow their engine; else `BadInput`."""
    return expect(server, Flags, "calibrations are fitted to runs and figures")

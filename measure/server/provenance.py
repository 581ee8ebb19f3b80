"""The server's engine and the source of each of its flags: the server itself, its launch command, or the scenario."""

from __future__ import annotations

from typing import Any

from measure.server.detection import Server
from sim.engines.catalog import of_image
from sim.model.flags import SCENARIO, Flag, flags, launched_by, told_by
from sim.model.identity import Identity
from sim.model.scenario import Scenario


def engine_of(server: Server, started: dict[str, Any] | None = None) -> Identity | None:
    """The server's engine: as told by the server, else from the image of the container that was started."""
    if server.engine is not None or started is None:
        return server.engine
    return of_image(str(started.get("image", "")))


def flags_of(server: Server, scenario: Scenario, started: dict[str, Any] | None = None) -> dict[str, Flag]:
    """The flags of a server of the scenario's engine; `started` describes it if it was launched: what its log says of
    itself stands before its command line."""
    kind = type(scenario.server)
    description = started or {}
    launched = launched_by(kind, description.get("argv") or []) | (description.get("logged") or {})
    written = [name for name, flag in scenario.flags.items() if flag.source == SCENARIO]
    return flags(scenario.server, written, told_by(kind, server.info), launched)

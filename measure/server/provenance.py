"""Which engine answers, and where each of its flags is from: its own word, its launch command, or the scenario."""

from __future__ import annotations

from typing import Any

from measure.server.health import Server
from sim.engines.catalog import of_image
from sim.model.flags import LAUNCH, SERVER, Flag, launched_by, told_by
from sim.model.identity import Identity
from sim.model.scenario import Scenario


def engine_of(server: Server, container: dict[str, Any] | None = None) -> Identity | None:
    """The engine that answers: by its own word, else by the image of the container that it was started in."""
    if server.engine is not None or container is None:
        return server.engine
    return of_image(str(container.get("image", "")))


def flags_of(server: Server, scenario: Scenario, container: dict[str, Any] | None = None) -> dict[str, Flag]:
    """The flags of a server that is of the scenario's engine; `container` says how it was launched, if we did it."""
    kind = type(scenario.server)
    launched = launched_by(kind, (container or {}).get("argv") or [])
    found = scenario.flags | {name: Flag(value=value, source=LAUNCH) for name, value in launched.items()}
    return found | {name: Flag(value=value, source=SERVER) for name, value in told_by(kind, server.info).items()}

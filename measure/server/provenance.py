"""The server's engine and the source of each of its flags: the server itself, its launch command, or the scenario; and
what is not told."""

from __future__ import annotations

from typing import Any

import msgspec

from measure.server.detection import Server
from sim.engines.catalog import kind_of, of_image
from sim.model.errors import BadInput
from sim.model.flags import DEFAULT, SCENARIO, Flag, flags, launched_by, told_by
from sim.model.identity import Identity, is_engine, named
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


def recognised(scenario: Scenario, server: Server) -> Scenario:
    """The scenario with the engine of the server, where the scenario says nothing of its own about the server."""
    kind = kind_of(server.engine)
    if kind is None or scenario.written is msgspec.UNSET or scenario.written or isinstance(scenario.server, kind):
        return scenario
    return msgspec.structs.replace(scenario, server=kind().on(scenario.machine, ()))


def check_forecastable(server: Server, scenario: Scenario, taken_as: str | None = None) -> None:
    """Raise `BadInput` for what a forecast needs and the server does not tell: the engine whose flags the scenario has,
    and, unless it is `taken_as` an engine, flags whose defaults depend on a device that is not named."""
    declared, other = scenario.server.declared, kind_of(server.engine)
    if other is not None and not isinstance(scenario.server, other):
        raise BadInput(
            f"the server is {named(server.engine)}, and the scenario's flags are those of {declared.name}; expected "
            f"--set server.engine={other.declared.name}, with the flags it was started with"
        )
    if taken_as is not None or not is_engine(server.engine, declared) or scenario.machine.gpu is not None:
        return
    found = flags_of(server, scenario)
    unknown = [name for name in declared.by_device if found[name].source == DEFAULT]
    if unknown:
        given = " ".join(f"--set server.{name}=..." for name in unknown)
        raise BadInput(
            f"the server does not tell its {' and '.join(unknown)}, which decide who waits; expected {given}, as on "
            "its command line, or where it has the defaults, the device they depend on, such as --set machine.gpu=H100"
        )

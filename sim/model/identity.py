"""Which engine a server is: its name and version, and who says so.

Only an engine whose scheduler `sim` has can be forecast; a run of any other server, or of an unnamed one, is
forecast only where the user says for which engine it is to be taken.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from sim.model.errors import BadInput
from sim.model.server import Declaration

SOURCES = ("server", "launch", "file", "user", "scenario")


class NotTheEngine(BadInput):
    """A run or a calibration of another engine than the one that would be simulated, or of one that is not known."""


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """An engine. `source` says who told: the server, the command that launched it, the file of another tool, the user,
    or the scenario (of a simulated run, and where a run's own scenario names an engine that is not simulated)."""

    name: str
    version: str | None = None
    source: str = "server"

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name} {self.version}"


def named(identity: Identity | None) -> str:
    """It in words."""
    return "an unknown engine" if identity is None else str(identity)


def is_engine(identity: Identity | None, declared: Declaration) -> bool:
    """Whether it is known to be that engine: by the name that scenarios use, or by its software and a version of it."""
    if identity is None:
        return False
    name = identity.name.lower()
    if name == declared.name:
        return True
    return name == declared.family and re.fullmatch(declared.versions, identity.version or "") is not None


def check_engine(
    found: Identity | None, declared: Declaration, taken_as: str | None, what: str, path: str | Path | None
) -> None:
    """Raise `NotTheEngine` where `what` is not known to be of the engine that would be simulated, unless the user takes
    it for that engine."""
    engine = declared.name
    if is_engine(found, declared) or taken_as == engine:
        return
    if found is None:
        reason = f"nothing says that {what} is of {engine}, whose scheduler would be simulated"
    else:
        reason = f"{what} is of {found}, and the simulated scheduler is that of {engine}"
    raise NotTheEngine(f"{reason}; expected --as {engine} to forecast it all the same, with a warning", path=path)

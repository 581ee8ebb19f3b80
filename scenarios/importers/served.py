"""Which engine served the requests that another tool recorded: as its file says, or as the user does (`--engine`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from scenarios.load.scenario import load, shipped
from sim.engines.catalog import FLAGS, NAMES, identity, kind_of
from sim.model.errors import BadInput
from sim.model.flags import SCENARIO
from sim.model.identity import Identity
from sim.model.scenario import Scenario
from sim.model.server import EngineFlags
from sim.model.warning import notice
from sim.run import Run
from sim.run import taken_as as assume

USER = "user"
EXPECTED = "expected an engine with its version, such as vllm-0.32.0, or a scenario with the server's flags"


class Served(NamedTuple):
    """The engine that a user names, and the scenario that has the flags of its server, if one was named."""

    engine: Identity
    like: Scenario | None = None

    @property
    def server(self) -> EngineFlags | None:
        """Its flags: those of the scenario, else defaults; None for an engine that is not simulated."""
        return flags_of(self.engine) if self.like is None else self.like.server

    @property
    def written(self) -> dict[str, Any]:
        """Its flags that somebody wrote, as a scenario has them."""
        server = self.server
        assert server is not None
        plain = msgspec.to_builtins(server)
        known = ["version"] if self.like is None else [n for n, f in self.like.flags.items() if f.source == SCENARIO]
        return {"engine": server.engine} | {name: plain[name] for name in known if plain.get(name) is not None}


def served_by(text: str) -> Served:
    """What `--engine ENGINE|SCENARIO` says; raises `BadInput` for neither."""
    if text in shipped() or Path(text).suffix in (".yaml", ".yml"):
        like = load(text)
        return Served(Identity(name=like.server.engine, source=USER), like)
    found = identity(text, USER)
    if found is None or (found.version is None and found.name not in NAMES):
        raise BadInput(EXPECTED, path=f"--engine {text}")
    return Served(found)


def flags_of(engine: Identity) -> EngineFlags | None:
    """An engine's flags with their defaults, of its version; None if it is not simulated."""
    kind = kind_of(engine)
    if kind is None:
        return None
    versioned = engine.version is not None and "version" in kind.__struct_fields__  # type: ignore[attr-defined]
    return kind(**{"version": engine.version} if versioned else {})


def with_engine(run: Run, served: Served | None) -> Run:
    """The run as one of the engine that its file names, or that the user does; `BadInput` if they contradict.

    Flags that were not given are the engine's defaults, its limits widened to what the server was seen to accept. If
    nothing names the engine, a warning says so: no forecast takes the run for one of an engine without `--as`.
    """
    told, said = run.engine, None if served is None else served.engine
    if told is not None and said is not None and not _agree(told, said):
        raise BadInput(f"is of {told} by the file itself", path=f"--engine {said}")
    engine = said or told
    if engine is None:
        text = "the file does not say which engine served the requests"
        return replace(run, warnings=[*run.warnings, notice("engine-unknown", text)])
    server = served.server if served is not None else flags_of(engine)
    if server is None:
        return replace(run, engine=engine)  # another engine, or no version that says whether it is one of ours
    like = None if served is None else served.like
    if like is None:
        like = msgspec.structs.replace(run.scenario, server=server, written=[])
    assumed = assume(replace(run, engine=None), server.engine, like)
    scenario = msgspec.structs.replace(assumed.scenario, machine=like.machine)
    return replace(assumed, scenario=scenario, engine=engine, taken_as=None)


def _agree(told: Identity, said: Identity) -> bool:
    """Whether two identities can be of one server."""
    versions = {told.version, said.version} - {None}
    kinds = FLAGS.values()
    same = told.name == said.name or any(
        {told.name, said.name} <= {kind.declared.family, kind.declared.name} for kind in kinds
    )
    return same and len(versions) <= 1

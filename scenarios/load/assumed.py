"""`--as`: the engine that a run's server is treated as, whatever the run records."""

from __future__ import annotations

from typing import NamedTuple

from scenarios.load.scenario import load
from sim.engines.catalog import NAMES
from sim.model.errors import BadInput
from sim.model.scenario import Scenario
from sim.run import Run, taken_as


class AssumedServer(NamedTuple):
    """An engine, with the scenario that has its flags if one was named; without an engine runs stay as they are."""

    engine: str | None = None
    like: Scenario | None = None

    def of(self, run: Run) -> Run:
        """The run with this server."""
        return run if self.engine is None else taken_as(run, self.engine, self.like)


def assumed_server(text: str | None) -> AssumedServer:
    """What `--as ENGINE|SCENARIO` says; raises `BadInput` for neither."""
    if text is None or text in NAMES:
        return AssumedServer(text)
    try:
        like = load(text)
    except BadInput as e:
        if e.path is not None and str(e.path) != text:
            raise
        raise BadInput(f"expected {' or '.join(NAMES)}, or a scenario ({e.message})", path=f"--as {text}") from e
    return AssumedServer(like.server.engine, like)

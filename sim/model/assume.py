"""A run taken for one of an engine that it is not known to be of: with the flags which are then assumed."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from sim.model.flags import SCENARIO, told_by
from sim.model.scenario import Scenario
from sim.model.server import ServerConfig, ceil_block
from sim.run import Run


def taken_as(run: Run, engine: str, like: Scenario | None = None) -> Run:
    """The run with its server taken for `engine`; unchanged where it is known to be of it.

    Flags are those of the scenario `like`, else what the run's own scenario says of its server, else defaults. Limits
    that nobody gave are widened to what the server was seen to accept.
    """
    if run.known and run.scenario.server.engine == engine:
        return run
    asked = like or run.scenario
    if asked.server.engine != engine:
        asked = msgspec.structs.replace(asked, server=ServerConfig(engine=engine), written=[])
    written = [name for name, flag in asked.flags.items() if flag.source == SCENARIO]
    server = _widened(asked.server, run, {*written, *told_by(run.info), *run.launched})
    scenario = msgspec.structs.replace(run.scenario, server=server, written=written)
    return replace(run, scenario=scenario, taken_as=engine)


def _widened(server: ServerConfig, run: Run, given: set[str]) -> ServerConfig:
    requests = run.requests[run.requests["status"] != "validation"]
    longest = int(requests["prompt_tokens"].max()) if len(requests) else 0
    total = int((requests["prompt_tokens"] + requests["max_new_tokens"]).max()) if len(requests) else 0
    users = max((rung.users or 0 for rung in run.rungs), default=0)
    least = {
        "max_input_length": longest,
        "max_total_tokens": total,
        "max_batch_prefill_tokens": ceil_block(longest),
        "max_concurrent_requests": users,
    }
    wider = {name: max(getattr(server, name), value) for name, value in least.items() if name not in given}
    return msgspec.structs.replace(server, **wider)

"""What a launched server has in common, in docker or not: its command line, the wait for its health, and its log."""

from __future__ import annotations

import ast
import os
import re
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any, NamedTuple

import msgspec

from measure.deadline import Deadline, OutOfTime
from measure.server.endpoint import Endpoint, Unreachable
from sim.model.errors import UserError
from sim.model.flags import SCENARIO, arguments, launched_by
from sim.model.scenario import Launch, Scenario
from sim.model.server import EngineFlags

START_SECONDS = 3600.0  # a 70B model may take this long to download and load
LOG_LINES = 15  # shown when the server does not start
LOG_BYTES = 1 << 22  # of its beginning, where a server logs its configuration
POLL_SECONDS = 0.25
NOT_DEFAULT = re.compile(r"non-default args: (\{.*\})")
CACHE_SIZE = re.compile(r"KV cache size: ([\d,]+) tokens")
CONFIG = re.compile(r"Initializing a V1 LLM engine \(v[^)]*\) with config: (.*)")
SWITCHES = re.compile(r"\b(enable_prefix_caching|enable_chunked_prefill)=(True|False)\b")


class CannotStart(UserError):
    """Docker, the image, the command or the server itself did not start."""


class Running(NamedTuple):
    """A started server: its URL, when it was started (`time.perf_counter`, s), and its description for `run.json` (of
    variables only the names)."""

    url: str
    began: float
    described: dict[str, Any]


def check_environment(launch: Launch) -> None:
    """Raise `CannotStart` for a variable that the server is to be given and that is not set."""
    missing = [name for name in launch.env if name not in os.environ]
    if missing:
        raise CannotStart(f"launch.env: {missing[0]} is not set in the environment")


def command_line(launch: Launch, scenario: Scenario, port: int) -> list[str]:
    """The launcher's arguments: model, address, the scenario's flags and `launch.args`.

    Flags that somebody wrote and those that decide who waits are always given, so that what is simulated is what ran;
    all others stay the server's own defaults. What the user's command or `args` name is not given a second time, unless
    the scenario wrote it.
    """
    server = scenario.server
    declared, argv = server.declared, list(launch.command)
    if launch.model:
        argv += [declared.model_argument, launch.model]
    argv += [declared.host_argument, "127.0.0.1", "--port", str(port)]
    if launch.num_shard is not None:
        argv += [declared.shards_argument, str(launch.num_shard)]
    return argv + _flags(server, _written(scenario), [*launch.command, *_more(launch)]) + _more(launch)


def _written(scenario: Scenario) -> set[str]:
    return {name for name, flag in scenario.flags.items() if flag.source == SCENARIO}


def _flags(server: EngineFlags, written: Collection[str], given: list[str]) -> list[str]:
    declared = server.declared
    usual = set(declared.launched) - set(launched_by(type(server), given))
    return arguments(server, (set(written) | usual) - set(declared.not_arguments))


def _more(launch: Launch) -> list[str]:
    found: list[str] = []
    for name, value in launch.args.items():
        flag = f"--{name.replace('_', '-')}"
        found += [flag] if value is True else [] if value is False else [flag, str(value)]
    return found


def wait_until_healthy(
    endpoint: Endpoint, deadline: Deadline, ended: Callable[[], bool], last_line: Callable[[], str]
) -> None:
    """Wait for the server's `/health`; `CannotStart` with the `last_line` of its log if it `ended`, or if the deadline
    passes."""
    why = ""
    while deadline.left():
        if ended():
            raise CannotStart(f"the server exited before it was healthy: {last_line()}")
        try:
            answer = endpoint.get("/health", deadline)
            if answer.status == 200:
                return
            why = endpoint.explain("/health", answer)
        except (Unreachable, OutOfTime) as e:
            why = str(e)
        time.sleep(min(POLL_SECONDS, deadline.left()))
    raise CannotStart(f"the server was not healthy within {deadline.seconds:.3g} s ({why}): {last_line()}")


def logged_flags(kind: type[EngineFlags], log: str) -> dict[str, Any]:
    """The flags that a server's log tells; vLLM's (0.32.0) has its arguments, some resolved ones and the KV cache.

    The CPU platform never schedules asynchronously, whatever the flag says (vllm/platforms/cpu.py).
    """
    if kind.declared.family != "vllm":
        return {}
    found: dict[str, Any] = {}
    if size := CACHE_SIZE.search(log):
        found["kv_cache_tokens"] = int(size[1].replace(",", ""))
    if config := CONFIG.search(log):
        found |= {name: value == "True" for name, value in SWITCHES.findall(config[1])}
        if "device_config=cpu" in config[1]:
            found["async_scheduling"] = False
    if given := NOT_DEFAULT.search(log):
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            said = ast.literal_eval(given[1])
            argv = [f"--{name}={value}" for name, value in said.items() if isinstance(value, bool | int | float | str)]
            found = launched_by(kind, argv) | found
    if found.get("num_gpu_blocks") is not None:
        found.pop("kv_cache_tokens", None)  # the same, less exactly
    return {name: value for name, value in found.items() if _possible(kind, name, value)}


def _possible(kind: type[EngineFlags], name: str, value: Any) -> bool:
    try:
        msgspec.convert({"engine": kind.declared.name, name: value}, kind)
    except msgspec.ValidationError:
        return False
    return True

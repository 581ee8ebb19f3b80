"""Stand-ins for servers: a server's HTTP, its scheduling in real time, and step times from a calibration.

They need no GPU, and they know when each token was sent, which `measure` is checked against. As a program,
`python -m measure.standin.server [--engine NAME]` takes the flags of the server's own launcher, so that it can replace
its docker image in tests.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from aiohttp import web

from measure.standin.faults import Faults, parse_faults
from measure.standin.surface import Surface
from measure.standin.tgi.routes import Routes as TgiRoutes
from measure.standin.vllm.routes import Routes as VllmRoutes
from sim.engines.catalog import DEFAULT, FLAGS, NAMES, flags_of
from sim.model.calibration import Calibration, SystemParameters, read_calibration
from sim.model.errors import BadInput, UserError
from sim.model.files.atomic import refuse_in_run
from sim.model.server import EngineFlags

ROOM = 16_000.0  # tokens of the KV cache, where neither flags nor calibration say it


class Standin(NamedTuple):
    """How a server is stood in for: its HTTP, and the step times without another calibration."""

    routes: Callable[..., Surface]
    calibration: Path


HERE = Path(__file__).parent
STANDINS = {
    "tgi-0.9.4": Standin(TgiRoutes, HERE / "calibration.json"),
    "vllm-v1": Standin(VllmRoutes, HERE / "calibration_vllm_v1.json"),
}
# flags of `vllm serve` for its front end, and other names of flags
FRONT_END_FLAGS = ("max_num_queued_tokens", "stream_interval")
ALIASES = {"num_gpu_blocks": ("--num-gpu-blocks-override",)}


async def run(routes: Surface, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT. `port` 0 takes a free one; `ready` is told the URL."""
    runner = web.AppRunner(routes.application(), handler_cancellation=True, access_log=None, shutdown_timeout=0.2)
    await runner.setup()
    site = web.TCPSite(runner, host, port)
    await site.start()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if routes.faults.die is not None:
        loop.call_later(routes.faults.die, os._exit, 1)
    engine = asyncio.create_task(routes.serving.run())
    engine.add_done_callback(lambda task: stop.set())
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 50)  # a full collection takes longer than a token may be late
    address = runner.addresses[0]
    ready(f"http://{address[0]}:{address[1]}")
    await stop.wait()
    await runner.cleanup()
    if engine.done():
        engine.result()


def serve(
    host: str = "127.0.0.1",
    port: int = 8080,
    calibration: Calibration | None = None,
    *,
    server: EngineFlags | None = None,
    engine: str = DEFAULT,
    faults: Faults = Faults(),  # noqa: B008 - a frozen value
    log: Path | None = None,
    seed: int = 0,
    model: str = "servecast/stand-in",
    ready: Callable[[str], None] = lambda url: None,
    **options: Any,
) -> None:
    """Stand in for a server of `engine` until interrupted or terminated.

    Without a calibration, the engine's shipped one is used; without `server`, the flags of the server that the
    calibration names. A KV cache whose size the flags leave open has the calibration's. `log` is a folder for
    `steps.jsonl` (what the engine did) and `tokens.jsonl` (when each token was sent), in `perf_counter` seconds.
    `ready` is told the URL. `options` are passed to the server's routes.
    """
    standin = STANDINS[engine if server is None else server.engine]
    calibration = calibration or read_calibration(standin.calibration)
    server = server or convert(engine, flags_in(calibration, engine))
    room = SystemParameters.of(calibration.values).capacity(server.declared) or ROOM
    server = server.settled(room, lambda low, high: (low + high) // 2, calibration.machine)
    server.check(lambda key, message: BadInput(message, key=".".join(map(str, key))))
    if log is not None:
        _check_log(log)
        log.mkdir(parents=True, exist_ok=True)
    try:
        routes = standin.routes(calibration, server, faults=faults, log=log, seed=seed, model=model, **options)
        asyncio.run(run(routes, host, port, ready))
    except (UnicodeError, OverflowError) as e:
        raise BadInput(f"expected a host and a port, found {host!r} and {port}", path="--host") from e


def _check_log(log: Path) -> None:
    """Raise `BadInput` for a folder with other files of these names; those of an earlier stand-in are appended to."""
    refuse_in_run(log)
    for name, key in (("steps.jsonl", "members"), ("tokens.jsonl", "sent")):
        file = log / name
        if not file.exists():
            continue
        with file.open("rb") as f:
            first = f.readline(1 << 20)
        try:
            ours = not first or key in msgspec.json.decode(first)
        except (msgspec.DecodeError, RecursionError, TypeError):
            ours = False
        if not ours:
            raise BadInput("not the log of a stand-in; expected another folder", path=file)


def flags_in(calibration: Calibration, engine: str) -> dict[str, Any]:
    """The flags of the first server of that engine that a calibration was fitted to, without anything else it says."""
    servers = (s for s in calibration.server if s.get("engine", DEFAULT) == engine)
    return {name: value for name, value in next(servers, {}).items() if name in names_of(engine)}


def names_of(engine: str) -> tuple[str, ...]:
    """The names of an engine's flags."""
    kind: Any = FLAGS[engine]  # a struct, which the type of all engines' flags does not say
    return tuple(kind.__struct_fields__)


def convert(engine: str, flags: dict[str, Any]) -> EngineFlags:
    """The flags of an engine from values, which may be texts; `BadInput` for a value of a wrong type."""
    try:
        return msgspec.convert({**flags, "engine": engine}, flags_of(engine), strict=False)
    except msgspec.ValidationError as e:
        message, _, key = str(e).partition(" - at `$.")
        raise BadInput(message[:1].lower() + message[1:], path=f"--{key.rstrip('`').replace('_', '-')}") from e


def announce(url: str) -> None:
    """Print the URL on stdout."""
    sys.stdout.write(url + "\n")
    sys.stdout.flush()


def main(arguments: list[str]) -> None:
    """Run with the flags of the server's own launcher; those that decide nothing here are accepted and ignored."""
    chosen = ArgumentParser(add_help=False, allow_abbrev=False)
    chosen.add_argument("--engine", choices=NAMES, default=DEFAULT)
    engine = chosen.parse_known_args(arguments)[0].engine
    fields = names_of(engine)
    parser = ArgumentParser(prog="measure.standin.server", allow_abbrev=False, parents=[chosen])
    parser.add_argument("--hostname", "--host", default="127.0.0.1")
    parser.add_argument("--port", "-p", type=int, default=8080)
    parser.add_argument("--model-id", "--served-model-name", "--model", default="servecast/stand-in")
    parser.add_argument("--calibration", type=Path, default=STANDINS[engine].calibration)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fault", action="append", default=[], metavar="KIND=SHARE")
    for name in fields:
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, *ALIASES.get(name, ()), dest=name, nargs="?", const="true")
        parser.add_argument(f"--no-{flag[2:]}", dest=name, action="store_const", const="false")
    front_end = FRONT_END_FLAGS if STANDINS[engine].routes is VllmRoutes else ()
    for name in front_end:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    known, ignored = parser.parse_known_args(arguments)
    if ignored:
        sys.stderr.write(f"ignored: {' '.join(ignored)}\n")
    given = vars(known)
    try:
        calibration = read_calibration(known.calibration)
        values = flags_in(calibration, engine) | {name: given[name] for name in fields if given[name] is not None}
        server = convert(engine, values).on(calibration.machine, set(values))
        serve(
            known.hostname,
            known.port,
            calibration,
            server=server,
            faults=parse_faults(known.fault),
            log=known.log,
            seed=known.seed,
            model=known.model_id,
            ready=announce,
            **{name: given[name] for name in front_end if given[name] is not None},
        )
    except (UserError, ValueError) as e:
        parser.error(str(e))


if __name__ == "__main__":
    main(sys.argv[1:])

"""A stand-in for text-generation-inference 0.9.4: its HTTP, its batching, and step times from a calibration.

Anybody can try the whole loop on it without a GPU, and it is the witness for `measure`: it knows when it sent each
token. `python -m measure.standin.server` takes the flags of TGI's own launcher, so that it can stand in for its image
too.
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
from typing import Any

import msgspec
from aiohttp import web

from measure.standin.faults import Faults, parse_faults
from measure.standin.tgi_routes import Routes
from sim.engines.tgi_0_9_4 import Flags
from sim.model.calibration import Calibration, read_calibration
from sim.model.errors import BadInput
from sim.model.files.atomic import refuse_in_run

CALIBRATION = Path(__file__).parent / "calibration.json"


async def run(routes: Routes, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT. `port` 0 takes a free one; `ready` hears the URL."""
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
    server: Flags | None = None,
    faults: Faults = Faults(),  # noqa: B008 - a frozen value
    log: Path | None = None,
    seed: int = 0,
    model: str = "servecast/stand-in",
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Stand in for TGI 0.9.4 until interrupted or terminated.

    Without a calibration the shipped one is used; without `server`, a server that takes both profiles of the article.
    A token budget the flags leave open is the calibration's. `log` is a folder for `steps.jsonl` (what the engine did)
    and `tokens.jsonl` (when each token was sent), in `perf_counter` seconds; `ready` is told the URL.
    """
    calibration = calibration or read_calibration(CALIBRATION)
    server = server or msgspec.convert(_flags(calibration), Flags)
    if not isinstance(server.max_batch_total_tokens, int):
        budget = calibration.values.get("max_batch_total_tokens", 16000.0)
        server = msgspec.structs.replace(server, max_batch_total_tokens=int(budget))
    if log is not None:
        _check_log(log)
        log.mkdir(parents=True, exist_ok=True)
    try:
        asyncio.run(run(Routes(calibration, server, faults=faults, log=log, seed=seed, model=model), host, port, ready))
    except (UnicodeError, OverflowError) as e:
        raise BadInput(f"expected a host and a port, found {host!r} and {port}", path="--host") from e


def _check_log(log: Path) -> None:
    """Raise `BadInput` for a folder whose files are not those of an earlier stand-in, which are gone on with."""
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
            raise BadInput("is no log of a stand-in; expected another folder", path=file)


def _flags(calibration: Calibration) -> dict[str, Any]:
    """The flags of the first server that a calibration was fitted to; what else it says of that is left out."""
    first = calibration.server[0] if calibration.server else {}
    return {name: value for name, value in first.items() if name in Flags.__struct_fields__}


def announce(url: str) -> None:
    """Print the URL, for whoever started the stand-in."""
    sys.stdout.write(url + "\n")
    sys.stdout.flush()


def main(arguments: list[str]) -> None:
    """Run with the flags of TGI's launcher; those that decide nothing here are accepted and ignored."""
    parser = ArgumentParser(prog="measure.standin.server", allow_abbrev=False)
    parser.add_argument("--hostname", default="127.0.0.1")
    parser.add_argument("--port", "-p", type=int, default=8080)
    parser.add_argument("--model-id", default="servecast/stand-in")
    parser.add_argument("--calibration", type=Path, default=CALIBRATION)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fault", action="append", default=[], metavar="KIND=SHARE")
    calibration_flags = {f"--{name.replace('_', '-')}": name for name in Flags.__struct_fields__}
    for flag, name in calibration_flags.items():
        parser.add_argument(flag, dest=name)
    known, ignored = parser.parse_known_args(arguments)
    if ignored:
        sys.stderr.write(f"ignored: {' '.join(ignored)}\n")
    try:
        faults = parse_faults(known.fault)
    except ValueError as e:
        parser.error(str(e))
    calibration = read_calibration(known.calibration)
    flags = _flags(calibration)
    flags |= {name: value for name in calibration_flags.values() if (value := getattr(known, name)) is not None}
    serve(
        known.hostname,
        known.port,
        calibration,
        server=msgspec.convert(flags, Flags, strict=False),
        faults=faults,
        log=known.log,
        seed=known.seed,
        model=known.model_id,
        ready=announce,
    )


if __name__ == "__main__":
    main(sys.argv[1:])

"""`servecast standin`."""

from __future__ import annotations

from pathlib import Path

import click

from scenarios.cli.commands import command
from scenarios.cli.options import here, seed_option
from sim.engines.catalog import DEFAULT, NAMES
from sim.model.errors import BadInput


@command("servecast standin --engine vllm-v1 --port 8080 --fault overloaded=0.05")
@click.option(
    "--engine",
    type=click.Choice(NAMES),
    default=DEFAULT,
    show_default=True,
    help="Engine and HTTP API to stand in for.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes any free one.")
@click.option("--calibration", type=here, help="Step times. Default: its own, those of a fast server.")
@click.option("--fault", "faults", metavar="KIND=SHARE", multiple=True, help="What should go wrong; repeatable.")
@click.option("--log", type=here, help="Folder for a log of what the engine did and when it sent each token.")
@seed_option
def standin(
    engine: str, host: str, port: int, calibration: Path | None, faults: tuple[str, ...], log: Path | None, seed: int
) -> None:
    """Serve as a stand-in for an LLM server, in real time.

    Speaks the HTTP of the engine's server. The simulator's own engine schedules, with the step times of a
    calibration. Prints the URL; ends at Ctrl-C.
    Faults: reset, stall, overloaded, error, eos, incomplete (shares of requests), after=N, die=SECONDS, crlf.
    """
    from measure.standin.faults import parse_faults
    from measure.standin.server import announce, serve
    from sim.model.calibration import read_calibration

    try:
        parsed = parse_faults(list(faults))
    except ValueError as e:
        raise BadInput(str(e), path="--fault") from e
    step_times = None if calibration is None else read_calibration(calibration)
    serve(host, port, step_times, engine=engine, faults=parsed, log=log, seed=seed, ready=announce)

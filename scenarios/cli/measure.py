"""`servecast measure`."""

from __future__ import annotations

from pathlib import Path

import click

from scenarios.cli.commands import command
from scenarios.cli.main import FAILED
from scenarios.cli.options import Measurement, measurement_options, run_output_option, seed_option, set_option
from scenarios.cli.output_files import check_measured
from scenarios.cli.terminal import print_result
from sim.model.errors import BadInput


@command("servecast measure standin --url http://127.0.0.1:8080 -o run")
@click.argument("source", metavar="SCENARIO")
@run_output_option
@measurement_options
@click.option("--bind", metavar="HOST:PORT", help="Where load workers on other machines may join.")
@click.option(
    "--remote", type=click.IntRange(min=0), default=0, show_default=True, help="How many of them to wait for."
)
@set_option
@seed_option
def measure(
    source: str,
    output: Path,
    client: Measurement,
    bind: str | None,
    remote: int,
    sets: tuple[str, ...],
    seed: int,
) -> int:
    """Run the load ladder on a live server.

    Writes a run directory, which can be calibrated from, compared and reported. An access token for the server comes
    from SERVECAST_API_KEY. Ctrl-C keeps what was measured; --resume continues it. Exit status 1 when no load was
    measured with a single answer.
    """
    from measure.ladder.session import measure as run_ladder
    from scenarios.forecast.size import check_measurable
    from scenarios.load.scenario import files_of, load
    from scenarios.progress import read_run_with_progress
    from sim.results import metrics

    check_measured(output, client.resume, inputs=files_of(source, *sets))
    scenario = load(source, *sets)
    check_measurable(scenario)
    if remote and not bind:
        raise BadInput("expected HOST:PORT for the workers of --remote to join", path="--bind")
    options = client._asdict()
    found = run_ladder(scenario, options.pop("url"), output, **options, seed=seed, bind=bind, remote=remote)
    print_result(str(found))
    return 0 if metrics.table(read_run_with_progress(found))["completions"].any() else FAILED

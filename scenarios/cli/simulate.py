"""`servecast simulate`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from scenarios.cli.commands import command
from scenarios.cli.options import (
    Simulation,
    force_option,
    format_option,
    here,
    simulation_options,
    transfer_option,
    warnings_option,
)
from scenarios.cli.output_files import check_forecasts
from scenarios.cli.terminal import print_json, print_result, print_warnings, workers
from sim.model.errors import BadInput


@command("servecast simulate llama2-70b-1500-100 --users 1,8,32 --slo e2e_p95=15")
@click.argument("sources", metavar="SCENARIO...", nargs=-1, required=True)
@click.option("-o", "--output", type=here, help="Write DIR/NAME/forecast.json and DIR/NAME/run/.")
@click.option("--steps", is_flag=True, help="With -o: also write the steps of the run (steps.jsonl).")
@click.option(
    "--vary", "varied", metavar="KEY=A,B,...", multiple=True, help="Compare these values side by side; repeatable."
)
@force_option
@simulation_options
@transfer_option
@format_option
@warnings_option
def simulate(
    sources: tuple[str, ...],
    output: Path | None,
    steps: bool,
    varied: tuple[str, ...],
    force: bool,
    how: Simulation,
    transfer: float | None,
    output_format: str | None,
) -> None:
    """Forecast a scenario at every load, with bands.

    --vary server.max_batch_prefill_tokens=4096,8192 forecasts the scenario with each value and shows them side by
    side; several --vary give every combination. All use the same random numbers, so that differences are not noise.
    """
    from scenarios.answer.csv import curves_as_csv
    from scenarios.answer.tables import show_forecasts
    from scenarios.forecast.forecast import shared_warnings
    from scenarios.forecast.simulate import simulate_all, write_with_run
    from scenarios.load.variants import load_variants, variations
    from sim.terminal.console import console

    if steps and output is None:
        raise BadInput("expected -o DIR with it, where the run is written", path="--steps")
    asked = load_variants(sources, how.sets, variations(varied, how.sets))
    if output is not None:
        check_forecasts(asked, output, force)
    with workers(how.jobs) as (executor, display):
        made = simulate_all(
            asked,
            seed=how.seed,
            replicates=how.replicates,
            executor=executor,
            progress=display,
            taken_as=how.taken_as,
            transfer=transfer,
        )
    found = [forecast for forecast, _ in made]
    if output_format == "json":
        print_json(found[0] if len(found) == 1 else found)
    elif output_format == "csv":
        print_result(curves_as_csv(found))
    else:
        show_forecasts(found, asked, console())
    print_warnings(shared_warnings(found))
    if output is not None:  # last: a full disk does not lose what was computed
        sys.stdout.flush()
        for forecast, calibration in made:
            write_with_run(output / forecast.name, forecast, calibration, how.seed, steps=steps)

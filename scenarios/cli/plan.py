"""`servecast plan`."""

from __future__ import annotations

import click

from scenarios.cli.commands import command
from scenarios.cli.main import FAILED
from scenarios.cli.options import Simulation, format_option, simulation_options, transfer_option, warnings_option
from scenarios.cli.terminal import print_json, print_result, print_warnings, workers


@command("servecast plan llama2-70b-1500-100 --slo ttft_p95=3")
@click.argument("sources", metavar="SCENARIO...", nargs=-1, required=True)
@simulation_options
@transfer_option
@format_option
@warnings_option
def plan(sources: tuple[str, ...], how: Simulation, transfer: float | None, output_format: str | None) -> int:
    """Say what each load costs and which SLOs it meets.

    Prints, for every load, the cost and the probability that each SLO is met, over all that is uncertain.
    Exit status 1 when no load of the ladder meets every SLO with a probability of 90 %.
    """
    from scenarios.answer.csv import plan_as_csv
    from scenarios.answer.tables import show_plan
    from scenarios.forecast.forecast import shared_warnings
    from scenarios.forecast.plan import check_slo, meets, plan_row
    from scenarios.forecast.simulate import simulate_all
    from scenarios.load.variants import load_variants
    from sim.terminal.console import console

    asked = load_variants(sources, how.sets)
    check_slo(asked)
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
        print_json([plan_row(forecast) for forecast in found])
    elif output_format == "csv":
        print_result(plan_as_csv(found))
    else:
        show_plan(found, console())
    print_warnings(shared_warnings(found))
    return 0 if all(map(meets, found)) else FAILED

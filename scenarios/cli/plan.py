"""`servecast plan`."""

from __future__ import annotations

from pathlib import Path

import click

from scenarios.cli.commands import command
from scenarios.cli.main import FAILED
from scenarios.cli.options import (
    Simulation,
    force_option,
    format_option,
    here,
    simulation_options,
    transfer_option,
    warnings_option,
)
from scenarios.cli.output_files import check_plans
from scenarios.cli.terminal import print_json, print_result, print_warnings, workers


@command("servecast plan llama2-70b-1500-100 --users 80 --slo e2e_p95=40")
@click.argument("sources", metavar="SCENARIO...", nargs=-1, required=True)
@click.option("--max-load", is_flag=True, help="Find the largest load that the scenario's fleet bears instead.")
@click.option("-o", "--output", type=here, help="Write DIR/NAME.plan.json, for a report.")
@simulation_options
@transfer_option
@force_option
@format_option
@warnings_option
def plan(
    sources: tuple[str, ...],
    max_load: bool,
    output: Path | None,
    how: Simulation,
    transfer: float | None,
    force: bool,
    output_format: str | None,
) -> int:
    """Find the cheapest fleet that keeps the SLOs.

    Tries the scenario's options (hardware, flags, replicas; without any, 1 to 32 replicas of its server) at its load,
    and says which is the cheapest that keeps every SLO with the goal's probability (90 %), what it costs, and what
    would change that. At several loads (--users 40,80) it answers for each. Exit status 1 when no option
    reaches the goal.
    """
    from scenarios.answer.plan import plans_as_csv, show_plans
    from scenarios.plan.answer import write_plan
    from scenarios.plan.ask import plans_of
    from sim.terminal.console import console

    def check(names: list[str]) -> None:
        if output is not None:
            check_plans([output / f"{name}.plan.json" for name in names], force)

    with workers(how.jobs) as (executor, display):
        found = plans_of(
            sources,
            how.sets,
            seed=how.seed,
            draws=how.replicates,
            executor=executor,
            progress=display,
            taken_as=how.taken_as,
            transfer=transfer,
            max_load=max_load,
            check=check,
        )
    if output_format == "json":
        print_json(found)
    elif output_format == "csv":
        print_result(plans_as_csv(found))
    else:
        show_plans(found, console())
    print_warnings(warning for each in found for warning in each.warnings)
    if output is not None:
        for each in found:
            write_plan(output / f"{each.name}.plan.json", each)
    return 0 if all(each.met for each in found) else FAILED

"""`servecast report`."""

from __future__ import annotations

from pathlib import Path

import click

from scenarios.cli.commands import command
from scenarios.cli.options import file_here, force_option, here
from scenarios.cli.output_files import REPORT, check_output, write
from scenarios.cli.terminal import print_result
from sim.model.files.atomic import is_stdout


@command("servecast report out/llama2-70b-1500-100 run -o report.html")
@click.argument("sources", metavar="(RUN | FORECAST | PLAN | COMPARISON)...", nargs=-1, required=True, type=here)
@click.option(
    "-o", "--output", type=file_here, default=Path("report.html"), show_default=True, help="The page to write."
)
@force_option
@click.option(
    "--title", default="What this LLM server will do under load", show_default=True, help="The page's heading."
)
def report(sources: tuple[Path, ...], output: Path, force: bool, title: str) -> None:
    """Put results on one self-contained page.

    Takes run directories, what `simulate -o` and `plan -o` wrote, and forecasts, plans and comparisons as JSON.
    """
    from scenarios.compare.saved import read_saved, simulated_runs
    from scenarios.report.page import page

    check_output(output, REPORT, inputs=sources, force=force)
    items = [read_saved(path) for path in sources]
    write(output, page(items, simulated_runs(sources, items), title).encode())
    if not is_stdout(output):
        print_result(str(output))

"""`servecast import`."""

from __future__ import annotations

from pathlib import Path

import click

from scenarios.cli.commands import command
from scenarios.cli.options import here, run_output_option, warnings_option
from scenarios.cli.output_files import check_new, check_run, write
from scenarios.cli.terminal import print_result, print_warnings


@command("servecast import guidellm.json -o run", name="import")
@click.argument("file", type=here)
@run_output_option
@click.option(
    "--engine",
    "named",
    metavar="ENGINE|SCENARIO",
    help="The engine that served the requests, such as vllm-0.32.0, or a scenario with the server's flags.",
)
@warnings_option
def import_(file: Path, output: Path, named: str | None) -> None:
    """Convert another tool's results to a run directory.

    Reads guidellm (JSON), `vllm bench serve --save-result --save-detailed`, sglang's bench_serving --output-details,
    aiperf (profile_export.jsonl, or the folder of a sweep), genai-perf (profile_export.json), inference-perf
    (per_request_lifecycle_metrics.json), and locust (the history that --csv writes, or rows of locust-plugins'
    JmeterListener). Warnings, here and in the run, say what the file does not record. The load is what the requests
    show. With -o NAME.yaml the sums of `vllm bench serve`, aiperf or guidellm become published figures of a scenario.
    """
    from scenarios.importers.detect import import_results, import_sums
    from scenarios.importers.served import served_by
    from sim.run import write_run

    served = None if named is None else served_by(named)
    if output.suffix in (".yaml", ".yml"):
        check_new(output)
        text = import_sums(file, served)
        write(output, text.encode())
        print_result(str(output))
        return
    check_run(output, inputs=[file])
    run = import_results(file, served)
    print_result(str(write_run(run, output, read_back=True)))
    print_warnings([*run.warnings, *(said.of(f"at {rung.named}") for rung in run.rungs for said in rung.warnings)])

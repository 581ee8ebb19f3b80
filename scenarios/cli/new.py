"""`servecast new`."""

from __future__ import annotations

from pathlib import Path

import click

from scenarios.cli.commands import command
from scenarios.cli.output_files import check_new, write
from scenarios.cli.terminal import print_result
from scenarios.load.scenario import template


@command("servecast new chat && servecast simulate chat.yaml")
@click.argument("name")
@click.option("--engine", default="tgi-0.9.4", show_default=True, help="The server's engine (tgi-0.9.4, vllm-v1).")
def new(name: str, engine: str) -> None:
    """Write a commented scenario to start from."""
    path = Path(name if name.endswith(".yaml") else f"{name}.yaml")
    text = template(Path(name).stem, engine)
    check_new(path)
    write(path, text.encode())
    print_result(str(path))

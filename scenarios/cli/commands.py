"""The command group, and how a command joins it. Each command is the module of its name beside this one."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import click

# In the order in which people need them. The modules are imported all at once, for the list in `servecast --help`: what
# a command needs beyond its options it imports when it runs.
NAMES = (
    *("scenarios", "new", "schema", "simulate", "plan", "measure", "import", "calibrate", "compare", "report", "run"),
    *("standin", "doctor"),
)
GUIDE = """\
Forecast what an LLM server will do under load (latency, requests per second,
cost) from measurements of the real one.

\b
Most people need three commands:
  servecast simulate llama2-70b-1500-100       forecast a server, with bands
  servecast measure my.yaml --url URL -o run   run the load ladder on a server
  servecast calibrate run -o calibration.json  fit the model to that run

A SCENARIO is a file or the name of a shipped one (`servecast scenarios`). `servecast COMMAND --help` has an example.
"""


class Commands(click.Group):
    """The commands, in the order of `NAMES`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """See `click.Group`."""
        return list(self.commands)


@click.group(
    cls=Commands,
    help=GUIDE,
    invoke_without_command=True,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="servecast")
@click.pass_context
def servecast(ctx: click.Context) -> None:
    """See `GUIDE`."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def command(example: str, name: str | None = None) -> Callable[[Callable[..., Any]], click.Command]:
    """A command whose help ends with an example; `name` where it is not the function's."""

    def add(function: Callable[..., Any]) -> click.Command:
        made = servecast.command(name, epilog=f"\b\nExample:\n  {example}")(function)
        assert isinstance(made, click.Command)
        return made

    return add


def import_commands() -> None:
    """Import the modules of `NAMES`, each of which adds its command to the group."""
    for name in NAMES:
        import_module(f"scenarios.cli.{'import_' if name == 'import' else name}")

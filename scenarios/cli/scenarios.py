"""`servecast scenarios`."""

from __future__ import annotations

from scenarios.cli.commands import command
from scenarios.cli.options import json_option
from scenarios.cli.terminal import print_json
from scenarios.load.scenario import load, shipped


@command("servecast scenarios")
@json_option
def scenarios(as_json: bool) -> None:
    """List the scenarios that come with servecast."""
    found = [(name, load(name).description) for name in shipped()]
    if as_json:
        return print_json([{"name": name, "description": text} for name, text in found])
    from sim.terminal.columns import show_listed
    from sim.terminal.console import console

    return show_listed(found, console())

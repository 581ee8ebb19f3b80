"""`servecast schema`."""

from __future__ import annotations

from scenarios.cli.commands import command
from scenarios.cli.terminal import print_result


@command("servecast schema > servecast.schema.json")
def schema() -> None:
    """Print the JSON schema of scenarios, for editors."""
    from scenarios.load.scenario import json_schema

    print_result(json_schema())

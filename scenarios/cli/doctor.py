"""`servecast doctor`."""

from __future__ import annotations

import click

from scenarios.cli.commands import command
from scenarios.cli.main import FAILED
from scenarios.cli.options import Seconds, set_option
from scenarios.cli.terminal import print_note


@command("servecast doctor llama2-70b --url http://127.0.0.1:8080")
@click.argument("source", metavar="[SCENARIO]", required=False)
@click.option("--url", help="A server to check, and to compare with the scenario.")
@click.option("--timeout", type=Seconds(), help="Longest wait, s, for the server to describe itself.")
@set_option
def doctor(source: str | None, url: str | None, timeout: float | None, sets: tuple[str, ...]) -> int:
    """Check what is installed here, and say what to fix.

    Exit status 1 when something is missing that the scenario (or the URL) needs.
    """
    from measure.server.detection import PROBE_SECONDS
    from measure.server.doctor import diagnose
    from scenarios.answer.tables import show_findings
    from scenarios.load.scenario import load
    from sim.terminal.console import console

    scenario = None if source is None else load(source, *sets)
    findings = diagnose(scenario, url, print_note, PROBE_SECONDS if timeout is None else timeout)
    show_findings(findings, console())
    return FAILED if any(finding.ok is False for finding in findings) else 0

"""`--help` of every command: an example, 80 columns, and nothing heavy imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from scenarios.cli.commands import servecast
from scenarios.cli.main import status

status(["--version"])  # which adds the commands
COMMANDS = sorted(servecast.commands)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("width", [80, 200])
def test_help_fits_80_columns_and_shows_an_example(
    command: str, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", str(width))
    assert status([command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    example = lines[lines.index("  Example:") + 1]
    assert example.startswith(f"    servecast {command}")


def test_help_of_every_command_imports_nothing_heavy():
    heavy = "('pandas', 'scipy', 'matplotlib', 'locust', 'simpy', 'aiohttp', 'rich')"
    code = (
        "import sys; from scenarios.cli.main import status;"
        f"[status([name, '--help']) for name in {COMMANDS!r}];"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout.splitlines()[-1]

"""What the README says to type works as it stands, in its order; quick ones for the slow parts."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from scenarios.cli.main import servecast, status
from servecast import load

README = Path("README.md").read_text()
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
COMMANDS = [text for language, text in BLOCKS if language == "sh" and "make" not in text]
EXAMPLE = re.findall(r"\*\*A value and a range\*\*, as in `(.*?)`", README)[0]


def test_there_is_something_to_run():
    assert len(COMMANDS) >= 3
    assert [language for language, _ in BLOCKS].count("python") == 1


@pytest.mark.parametrize("text", COMMANDS, ids=lambda text: text.split("\n")[0][:40])
def test_commands_of_the_readme(text: str, tmp_path: Path):
    whole = text == COMMANDS[0]  # the one whose answer is explained
    # else fewer replicates than a user would take: the bands are wider, the way is the same
    fewer = re.sub(r"^(servecast (?:simulate|plan|compare)\b)", r"\1 --replicates 19", text, flags=re.MULTILINE)
    quick = text if whole else fewer
    with socket.create_server(("127.0.0.1", 0)) as free:
        quick = quick.replace("8089", str(free.getsockname()[1]))
    quick = re.sub(r"(--port \d+) &", r"\1 & server=$!; trap 'kill $server' EXIT; sleep 4", quick)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "servecast").write_text(f'#!/bin/sh\nexec {sys.executable} -m scenarios "$@"\n')
    (tmp_path / "bin" / "servecast").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", quick],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert EXAMPLE in re.sub(" +", " ", done.stdout) or not whole


def test_python_of_the_readme(capsys: pytest.CaptureFixture[str]):
    (code,) = [text for language, text in BLOCKS if language == "python"]
    exec(compile(code, "README.md", "exec"), {})
    title, *rows = capsys.readouterr().out.splitlines()
    assert title.split() == ["users", "value", "low", "high", "extrapolated", "unstable"]
    table = [[float(cell) for cell in row.split()[1:5]] for row in rows]
    assert [users for users, *_ in table] == load("llama2-70b-1500-100").load.users
    assert all(low < value < high for _, value, low, high in table)


def test_everything_the_readme_links_to_is_there():
    for folder in (Path(), *(path.parent for path in Path().glob("[a-z]*/README.md"))):
        text = (folder / "README.md").read_text()
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (folder / target).exists(), f"{folder / 'README.md'}: {target}"


def test_make_names_only_what_exists():
    targets = set(re.findall(r"^([a-z-]+):", Path("Makefile").read_text(), flags=re.MULTILINE))
    assert {"demo", "test", "bench", "mutants", "validate", "lint"} <= targets
    for program in re.findall(r"tools/(\w+\.py)", Path("Makefile").read_text()):
        assert (Path("tools") / program).exists()


def test_the_readme_of_scenarios_names_every_module():
    text = Path("scenarios/README.md").read_text()
    for module in Path("scenarios").glob("[a-z]*.py"):
        assert f"`{module.stem}`" in text, module.stem


def test_every_command_is_one_of_the_documented_ones():
    status(["--version"])
    documented = "scenarios new schema simulate plan measure import standin run doctor calibrate compare report"
    assert " ".join(sorted(servecast.commands)) == " ".join(sorted(documented.split()))

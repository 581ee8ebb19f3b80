"""What the README says to type works as it stands, in its order; quick ones for the slow parts."""

from __future__ import annotations

import doctest
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import msgspec
import pytest

import servecast
from scenarios.cli.commands import servecast as commands
from scenarios.cli.main import status
from scenarios.compare.comparison import Comparison, Row, Summary
from sim.model.metric import METRICS
from sim.model.steps import STEP_COLUMNS
from sim.steptime.linear import FORMS

README = Path("README.md").read_text()
PAGES = ["README.md", *sorted(str(path) for path in Path("docs").glob("*.md"))]
BLOCKS = {
    page: re.findall(r"^```(sh|python)\n(.*?)^```", Path(page).read_text(), flags=re.DOTALL | re.MULTILINE)
    for page in PAGES
}
EXAMPLE = re.findall(r"\*\*A value and a range\*\*, as in `(.*?)`", README)[0]
# a page's commands read what those above them wrote
SCRIPTS = {
    page: [text for language, text in blocks if language == "sh" and "make" not in text]
    for page, blocks in BLOCKS.items()
}


def test_there_is_something_to_run():
    assert len(SCRIPTS["README.md"]) >= 2
    assert SCRIPTS["docs/index.md"]
    assert [language for language, _ in BLOCKS["README.md"]].count("python") == 1


@pytest.mark.parametrize("page", [page for page, blocks in SCRIPTS.items() if blocks])
def test_commands_of_the_documentation(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    lines = [line for block in SCRIPTS[page] for line in block.replace("\\\n", "").replace("8089", port).splitlines()]
    commands = [words for line in lines if (words := shlex.split(line, comments=True))]
    assert {words[0] for words in commands} == {"servecast"}
    monkeypatch.chdir(tmp_path)
    with ExitStack() as servers:
        for number, (_, command, *arguments) in enumerate(commands):
            if arguments[-1] == "&":
                servers.enter_context(serving(port, command, *arguments[:-1]))
                continue
            if page == "README.md" and number == 0:
                arguments += ["--users", "1,2,4,8,12,16,24"]  # past the knee, which the page quotes
            elif command in ("simulate", "plan", "compare"):  # fewer than a user would take
                arguments += ["--replicates", "19"] + (["--set", "load.seconds=20"] if command == "simulate" else [])
            assert status([command, *arguments]) == 0, command
    shown = capfd.readouterr()
    assert EXAMPLE in re.sub(" +", " ", shown.out) or page != "README.md"


@contextmanager
def serving(port: str, *arguments: str) -> Iterator[None]:
    """A server that a page starts in the background."""
    process = subprocess.Popen([sys.executable, "-m", "servecast", *arguments])
    try:
        deadline = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < deadline:
            with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", int(port))):
                break
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(10)


def test_examples_of_the_facade():
    assert doctest.testmod(servecast).failed == 0


def test_the_facade_has_what_it_says():
    assert all(getattr(servecast, name) is not None for name in servecast.__all__)
    assert set(servecast.__all__) == set(servecast._PLACES)


def test_python_of_the_readme(capsys: pytest.CaptureFixture[str]):
    (code,) = [text for language, text in BLOCKS["README.md"] if language == "python"]
    quick = code.replace("scenario.calibration)", "scenario.calibration), replicates=19")
    assert quick != code
    exec(compile(quick, "README.md", "exec"), {})
    title, *rows = capsys.readouterr().out.splitlines()
    assert title.split() == ["users", "value", "low", "high", "extrapolated", "unstable"]
    table = [[float(cell) for cell in row.split()[1:5]] for row in rows]
    assert [users for users, *_ in table] == servecast.load("llama2-70b-1500-100").load.users
    assert all(low < value < high for _, value, low, high in table)


def test_everything_the_readme_links_to_is_there():
    for page in (Path("README.md"), *Path().glob("[a-z]*/README.md"), *Path("docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_make_names_only_what_exists():
    targets = set(re.findall(r"^([a-z-]+):", Path("Makefile").read_text(), flags=re.MULTILINE))
    assert {"demo", "test", "bench", "mutants", "validate", "lint"} <= targets
    for program in re.findall(r"tools/(\w+\.py)", Path("Makefile").read_text()):
        assert (Path("tools") / program).exists()


def test_the_readme_of_scenarios_names_every_folder():
    text = Path("scenarios/README.md").read_text()
    for folder in {module.parent.name for module in Path("scenarios").glob("*/*.py")}:
        assert f"`{folder}/`" in text, folder


def test_every_command_is_one_of_the_documented_ones():
    status(["--version"])
    documented = "scenarios new schema simulate plan measure import standin run doctor calibrate compare report"
    assert " ".join(sorted(commands.commands)) == " ".join(sorted(documented.split()))


def _section(title: str) -> set[str]:
    """What is in code marks in a section of docs/files.md."""
    _, _, rest = Path("docs/files.md").read_text().partition(f"\n## {title}")
    return set(re.findall(r"`([a-z0-9_]+)`", rest.partition("\n## ")[0]))


def test_every_metric_column_and_key_of_a_comparison_is_listed():
    assert set(METRICS) <= _section("Metrics")
    assert set(STEP_COLUMNS) <= _section("Run directory")
    keys = {field.encode_name for of in (Comparison, Row, Summary) for field in msgspec.structs.fields(of)}
    assert keys - {"format"} <= _section("Comparison")


def test_every_step_time_form_is_a_term():
    terms = Path("docs/index.md").read_text().partition("## Terms")[2].partition("\n## ")[0]
    assert set(FORMS) <= set(re.findall(r"`(\w+)`", terms))

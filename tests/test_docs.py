"""What the README says to type works as it stands, in its order; quick ones for the slow parts."""

from __future__ import annotations

import doctest
import os
import re
import socket
import subprocess
import sys
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
# what a page's commands write is read by the ones below it: one script a page
SCRIPTS = {
    page: [text for language, text in blocks if language == "sh" and "make" not in text]
    for page, blocks in BLOCKS.items()
}


def test_there_is_something_to_run():
    assert len(SCRIPTS["README.md"]) >= 2
    assert SCRIPTS["docs/index.md"]
    assert [language for language, _ in BLOCKS["README.md"]].count("python") == 1


@pytest.mark.parametrize("page", [page for page, blocks in SCRIPTS.items() if blocks])
def test_commands_of_the_documentation(page: str, tmp_path: Path):
    whole, text = page == "README.md", "".join(SCRIPTS[page])
    # fewer replicates and shorter windows than a user would take, except where the page quotes the result
    first, rest = (SCRIPTS[page][0], "".join(SCRIPTS[page][1:])) if whole else ("", text)
    first = first.replace("\n", " --users 1,2,4,8,12,16,24\n")  # past the knee, which the page quotes
    quick = re.sub(r"^(servecast (?:simulate|plan|compare)\b)", r"\1 --replicates 19", rest, flags=re.MULTILINE)
    quick = first + re.sub(r"^(servecast simulate\b)", r"\1 --set load.seconds=20", quick, flags=re.MULTILINE)
    with socket.create_server(("127.0.0.1", 0)) as free:
        quick = quick.replace("8089", str(free.getsockname()[1]))
    up = r"\1 & server=$!; trap 'kill $server' EXIT; until (: < /dev/tcp/127.0.0.1/\2) 2> /dev/null; do sleep 0.1; done"
    quick = re.sub(r"(--port (\d+)) &", up, quick)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "servecast").write_text(f'#!/bin/sh\nexec {sys.executable} -m servecast "$@"\n')
    (tmp_path / "bin" / "servecast").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", quick],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert EXAMPLE in re.sub(" +", " ", done.stdout) or not whole


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

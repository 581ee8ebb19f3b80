"""What is missing on a machine is one line with the command that mends it; the lock names no hosts."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

TOOLS = ("sh", "dirname", "sed", "cut", "rm", "touch", "mkdir")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with what `tools/setup` needs, and a `bin` with next to nothing on it."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "bin").mkdir()
    for file in ("tools/setup", "requirements.lock", "pyproject.toml"):
        shutil.copy(file, tmp_path / file)
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool) or tool)
    return tmp_path


def setup(checkout: Path, **environment: str) -> tuple[int, list[str]]:
    done = subprocess.run(
        [checkout / "tools" / "setup"],
        env={"PATH": str(checkout / "bin")} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stderr.splitlines()


def python(checkout: Path, script: str) -> str:
    path = checkout / "bin" / "some-python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_no_python(checkout: Path):
    status, (line,) = setup(checkout)
    assert status == 1
    assert line.startswith("servecast: no Python 3.11 or newer on PATH; install one (Debian: apt-get install python3")


def test_a_python_too_old(checkout: Path):
    status, (line,) = setup(checkout, PYTHON=python(checkout, "exit 1"))
    assert status == 1
    assert "some-python is not a Python 3.11 or newer; name one that is: make PYTHON=python3.11" in line


def test_a_python_without_venv(checkout: Path):
    broken = python(checkout, f'case "$*" in *venv*) mkdir .venv; exit 1;; esac\nexec {sys.executable} "$@"')
    status, lines = setup(checkout, PYTHON=broken)
    assert status == 1
    assert lines[-1].endswith("cannot make environments; fix it with: apt-get install python3-venv (or put uv on PATH)")
    assert not (checkout / ".venv").exists()  # half an environment would mislead the next try


def test_the_lock_has_hashes_no_hosts_and_everything_the_project_names():
    lock = Path("requirements.lock").read_text()
    assert "://" not in lock and "index-url" not in lock and "find-links" not in lock
    pins = re.findall(r"^([a-z0-9-]+)==\S+", lock, flags=re.MULTILINE)
    entries = re.split(r"^(?=[a-z0-9-]+==)", lock, flags=re.MULTILINE)[1:]
    assert len(pins) == len(entries) > 80
    assert all("--hash=sha256:" in entry for entry in entries)
    project = tomllib.loads(Path("pyproject.toml").read_text())
    wanted = project["project"]["dependencies"] + project["dependency-groups"]["dev"]
    names = {re.split(r"[>=<!\[ ]", text)[0].lower().replace("_", "-").replace(".", "-") for text in wanted}
    assert names <= set(pins)


def test_the_built_package_holds_what_it_needs_at_run_time(tmp_path: Path):
    """A wheel, as pip would install it: the scenarios with their data, the template, the page, the stand-in's file."""
    import zipfile

    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    for file in (
        "scenarios/shipped/llama2-70b.yaml",
        "scenarios/shipped/data/llama2-70b.calibration.json",
        "scenarios/shipped/data/sharegpt_lengths_tgi_loadtest.csv",
        "scenarios/shipped/template-tgi-0.9.4.txt",
        "scenarios/shipped/template-vllm-v1.txt",
        "scenarios/report/page.html",
        "measure/standin/calibration.json",
        "measure/standin/calibration_vllm_v1.json",
        "measure/loadgen/words.txt",
    ):
        assert file in names
    assert not any(name.startswith(("tests/", "data/", "tools/")) for name in names)

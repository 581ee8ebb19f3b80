"""A run that was fitted is known again, whatever has become of its files; another of the same name is not."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
from warned import texts

from calibrate.sources.streamed import calibrate_runs
from scenarios.compare.training_rungs import training_rungs
from sim.run import Run, read_run

DATA = Path(__file__).parent.parent / "data"


@pytest.fixture(scope="module")
def flash() -> Run:
    return read_run(DATA / "tgi-0.9.4-router-http" / "long")


@pytest.fixture
def copy(flash, tmp_path) -> Path:
    """A copy of the run, whose requests are compressed."""
    return Path(shutil.copytree(flash.path, tmp_path / "long"))


def unzip(folder: Path) -> Run:
    file = folder / "requests.jsonl.gz"
    (folder / "requests.jsonl").write_bytes(gzip.decompress(file.read_bytes()))
    file.unlink()
    return read_run(folder)


def test_a_run_that_was_zipped_since_is_still_the_one_that_was_fitted(copy, flash):
    assert training_rungs(flash, calibrate_runs([unzip(copy)])) == (set(range(6)), [])


def test_rungs_that_came_after_the_fit_are_held_out(copy):
    """A run that was resumed: its requests were appended to, or are in a file of their own."""
    run = unzip(copy)
    lines = (copy / "requests.jsonl").read_bytes().splitlines(keepends=True)
    lines.sort(key=lambda line: json.loads(line)["rung"])
    first = [line for line in lines if json.loads(line)["rung"] < 4]
    (copy / "requests.jsonl").write_bytes(b"".join(first))
    then = calibrate_runs([read_run(copy)], rungs=[range(4)])
    said = [f"{run.name} has grown since it was fitted: requests of the rungs that were fitted are not held out"]
    (copy / "requests-2.jsonl").write_bytes(b"".join(lines[len(first) :]))
    rungs, warnings = training_rungs(read_run(copy), then)
    assert (rungs, texts(warnings)) == (set(range(4)), said)
    (copy / "requests-2.jsonl").unlink()
    (copy / "requests.jsonl").write_bytes(b"".join(lines))
    rungs, warnings = training_rungs(read_run(copy), then)
    assert (rungs, texts(warnings)) == (set(range(4)), said)


def test_a_run_that_was_unzipped_since_is_known_by_its_name(copy, flash):
    whole = calibrate_runs([flash])
    rungs, warnings = training_rungs(unzip(copy), whole)
    assert rungs == set(range(6))
    assert texts(warnings) == [
        "router-http-long counts as a run that was fitted: its run.json is the same, its requests were compressed then"
    ]
    other = copy.with_name("other")
    assert training_rungs(read_run(shutil.copytree(copy, other)), whole) == (set(), [])
    head = (copy / "run.json").read_text()
    (copy / "run.json").write_text(
        head.replace('"router-http-long"', '"another"', 1)
    )  # one whose folder is named alike
    assert training_rungs(read_run(copy), whole) == (set(), [])

"""Which rungs of a run a calibration was fitted to: those are not held out."""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import msgspec

from sim.model.calibration import Calibration, SourceFile
from sim.model.warning import Notice, notice
from sim.run import Run


def training_rungs(run: Run, calibration: Calibration) -> tuple[set[int], list[Notice]]:
    """The rungs of `run` that the calibration was fitted to, and a warning where that is a guess.

    Those of the requests that its source names, compressed or appended to since or not; what was compressed when it was
    fitted and is not now is known by its name and its `run.json`.
    """
    if run.path is None:
        return set(), []
    every = set(range(len(run.rungs)))
    files = [file for file in Path(run.path).glob("requests*.jsonl*") if file.suffix in (".jsonl", ".gz")]
    read = [_read_of(file, calibration.source.files) for file in files]
    if read and all(whole for _, whole in read):
        return every, []
    if any(content for content, _ in read):
        rungs = {line.rung for content, _ in read for line in _lines(content)}
        return rungs, [
            notice(
                "fitted-run-grown",
                f"{run.name} has grown since it was fitted: requests of the rungs that were fitted are not held out",
            )
        ]
    folder = Path(run.path).resolve().name
    names = {file.path for file in calibration.source.files}
    known = {file.sha256 for file in calibration.source.files}
    same_head = _digest((Path(run.path) / "run.json").read_bytes()) in known  # other runs have such names too
    if same_head and {f"{folder}/{file.name}.gz" for file in files} & names:
        said = notice(
            "fitted-run-guessed",
            f"{run.name} counts as a run that was fitted: its run.json is the same, its requests were compressed then",
        )
        return every, [said]
    return set(), []


class _RungOf(msgspec.Struct):
    rung: int = 0


def _read_of(file: Path, sources: Sequence[SourceFile]) -> tuple[bytes, bool]:
    """What a fit that names these sources has read of the file, and whether that is all of it."""
    raw = file.read_bytes()
    content = gzip.decompress(raw) if file.suffix == ".gz" else raw
    if {_digest(raw), _digest(content)} & {source.sha256 for source in sources}:
        return content, True
    for source in sources:
        if source.bytes and source.bytes < len(content) and _digest(content[: source.bytes]) == source.sha256:
            return content[: source.bytes], False
    return b"", False


def _digest(data: bytes) -> str:
    return sha256(data).hexdigest()


def _lines(content: bytes) -> Iterator[_RungOf]:
    for line in content.splitlines():
        with contextlib.suppress(msgspec.DecodeError):  # a line that was torn then
            yield msgspec.json.decode(line, type=_RungOf)

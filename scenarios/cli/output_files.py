"""What the commands write, and what they refuse to write over.

A command asks before it does any work whether its outputs may be written (`check_output`, `check_run`), and writes them
after it has shown its results. Never written over: an input of the same command, anything inside a run directory, and
a file that is not servecast's own output of the same kind; only that last is allowed by `--force`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from scenarios.load.scenario import files_of
from scenarios.load.variants import Variant
from sim.model.errors import BadInput
from sim.model.files.atomic import is_stdout, is_stream, refuse_in_run, target_of, write_file

MOST = 1 << 28  # bytes: no output of ours is so large, and no larger file is read to see whether it is one
HEAD = 4096  # bytes of a page in which its generator is named
GENERATOR = '<meta name="generator" content="servecast'


class Kind(NamedTuple):
    """A kind of file that servecast writes: what it is called, and how it is told from others."""

    name: str
    keys: frozenset[str] = frozenset()  # of the JSON object that it is; none: a page, which names its generator

    def is_of(self, path: Path) -> bool:
        """Whether a file is of this kind, or empty: then there is nothing to lose."""
        with path.open("rb") as f:
            raw = f.read(MOST if self.keys else HEAD)
        if not raw:
            return True
        if not self.keys:
            return GENERATOR.encode() in raw
        try:
            said = msgspec.json.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return False
        return isinstance(said, dict) and {"format", *self.keys} <= said.keys()


CALIBRATION = Kind("calibration", frozenset({"source", "model", "parameters"}))
FORECAST = Kind("forecast", frozenset({"curves", "knee", "provenance"}))
COMPARISON = Kind("comparison", frozenset({"rows", "summary", "tolerances"}))
PLAN = Kind("plan", frozenset({"question", "options", "frontier"}))
REPORT = Kind("report")


def check_output(path: Path, kind: Kind, *, inputs: Iterable[Path] = (), force: bool = False) -> None:
    """Raise `BadInput` for a file that may not, or could not, be written; makes nothing.

    `inputs` are the files and folders that the command reads. A device or a pipe is written to as a stream.
    """
    try:
        if path.is_dir():
            raise BadInput("expected a file, found a folder", path=path)
        if is_stream(path):
            return
        there = os.path.lexists(path) and _exists(path)
        if there and is_stdout(path):
            if path.is_relative_to("/dev") or path.is_relative_to("/proc"):
                return
            raise BadInput("is where the standard output goes; expected another file", path=path)
        _refuse_inputs(path, inputs)
        refuse_in_run(path)
        check_writable(path)
        if there and not kind.is_of(path):
            if any(_inside(path, folder) for folder in inputs):
                raise BadInput("is part of an input of this command; expected another name", path=path)
            if not force:
                raise BadInput(
                    f"exists and is no {kind.name} that servecast wrote; name another, or replace it by --force",
                    path=path,
                )
    except ValueError as e:  # a null character
        raise BadInput("expected a file name", path=path) from e


def check_run(path: Path, *, inputs: Iterable[Path] = ()) -> None:
    """Raise `BadInput` for a place where no new run directory can be made; makes nothing."""
    try:
        if os.path.lexists(path) and _exists(path) and (not path.is_dir() or any(path.iterdir())):
            raise BadInput("exists already, and a run is never overwritten", path=path)
        _refuse_inputs(path, inputs)
        refuse_in_run(path)
        check_writable(path)
    except ValueError as e:
        raise BadInput("expected the name of a folder", path=path) from e


def check_measured(path: Path, resume: bool, *, inputs: Iterable[Path] = ()) -> None:
    """Raise `BadInput` for a place where no run can be measured: a new one, or with `resume` the one that is there."""
    from measure.journal import refuse_existing  # which loads pandas

    if not resume:
        refuse_existing(path)
        check_run(path, inputs=inputs)


def check_forecasts(asked: Sequence[Variant], folder: Path, force: bool) -> None:
    """Raise `BadInput` where the forecasts of these scenarios, and their runs, cannot be written into a folder."""
    folders = [folder / variant.scenario.name for variant in asked]
    if len(set(folders)) < len(folders):
        raise BadInput("expected scenarios of different names, which are the folders' in -o")
    inputs = [file for variant in asked for file in files_of(variant.source, *variant.sets)]
    inputs += [Path(v.scenario.calibration) for v in asked if v.scenario.calibration is not None]
    for each in folders:
        check_run(each / "run", inputs=inputs)
        check_output(each / "forecast.json", FORECAST, inputs=inputs, force=force)


def check_plans(files: Sequence[Path], force: bool) -> None:
    """Raise `BadInput` where plans cannot be written to these files, one a plan."""
    if len(set(files)) < len(files):
        raise BadInput("expected scenarios of different names, which are the files' in -o")
    for each in files:
        check_output(each, PLAN, force=force)


def check_new(path: Path) -> None:
    """Raise `BadInput` for a file that is there, or could not be made."""
    try:
        if os.path.lexists(path) and (_exists(path) or not target_of(path).parent.is_dir()):
            raise BadInput("exists already, and is not overwritten", path=path)
        refuse_in_run(path)
        check_writable(path)
    except ValueError as e:
        raise BadInput("expected a file name", path=path) from e


def check_writable(path: Path) -> None:
    """Raise `BadInput` for a place where nothing could be written later; makes nothing."""
    target = target_of(path)
    folder = target.parent
    try:
        long = len(os.fsencode(target.name)) > os.pathconf(_nearest(folder), "PC_NAME_MAX")
    except OSError:
        long = False
    if long:
        raise BadInput("expected a shorter name: no file can have it", path=path)
    folder = _nearest(folder)
    if not folder.is_dir():
        raise BadInput("expected a folder to write into", path=folder)
    if not os.access(folder, os.W_OK) or os.statvfs(folder).f_flag & os.ST_RDONLY:
        raise BadInput("cannot be written", path=folder)


def write(path: Path, data: bytes) -> None:
    """Write a file that `check_output` has let pass, folders included; a file is replaced in one piece."""
    write_file(path, data)


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one around it that is there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _exists(path: Path) -> bool:
    """Whether what a path leads to is there; raises `BadInput` for links in a circle and the like."""
    try:
        path.stat()
    except FileNotFoundError:  # a link to nothing yet
        return False
    except OSError as e:
        raise BadInput(f"cannot be written ({e.strerror})", path=path) from e
    return True


def _refuse_inputs(path: Path, inputs: Iterable[Path]) -> None:
    for each in inputs:
        same = target_of(each) == target_of(path)
        with suppress(OSError, ValueError):
            same = same or os.path.samestat(each.stat(), path.stat())  # another name of the same file, too
        if same:
            raise BadInput("is an input of this command; expected another name", path=path)


def _inside(path: Path, folder: Path) -> bool:
    """Whether a file is in a folder, by its name or by what it leads to."""
    if not folder.is_dir():
        return False
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)) or target_of(path).is_relative_to(
        target_of(folder)
    )

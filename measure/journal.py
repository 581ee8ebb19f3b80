"""The run directory while it is being written: `run.json` is replaced at every rung's edge."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import msgspec

from measure.loadgen.messages import Report, boot_id
from sim.model.errors import BadInput
from sim.model.files.atomic import read_file, write_file
from sim.model.files.format import EXPECTED, FORMAT, READ, upgraded
from sim.model.files.json_lines import Lines
from sim.model.scenario import Scenario, relocated

LIBRARIES = ("servecast", "locust", "gevent", "geventhttpclient", "aiohttp")


class Journal:
    """`head` is what `run.json` says; times are seconds since `zero`, a value of `perf_counter_ns`."""

    def __init__(self, path: Path, head: dict[str, Any], zero: int, first_id: int = 0):
        self.path, self.head, self.zero, self.first_id = path, head, zero, first_id
        self._client = Lines(path / "client.jsonl")

    @classmethod
    def begin(cls, path: Path, scenario: Scenario, **more: Any) -> Journal:
        """A new run; refuses a directory with anything in it."""
        refuse_existing(path)
        path.mkdir(parents=True, exist_ok=True)
        zero = perf_counter_ns()
        now = time.time()
        head: dict[str, Any] = {
            "format": FORMAT,
            "kind": "measured",
            "name": scenario.name,
            "created": datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds"),
            "scenario": _plain(scenario, path),
            "software": {name: _version(name) for name in LIBRARIES},
            "host": {"platform": platform.platform(), "python": platform.python_version()},
            "units": {"times": "s", "lengths": "tokens", "canary_p99_ms": "ms", "client_cpu": "cores"},
            "info": None,
            "engine": None,
            "flags": {},
            "anchor": {"unix": now, "perf_counter_ns": zero, "boot": boot_id()},
            "rungs": [],
            "segments": [{"start": 0.0, "first_rung": 0}],
            "stopped": "",
            "warnings": [],
            **more,
        }
        journal = cls(path, head, zero)
        journal.save()
        return journal

    @classmethod
    def resume(
        cls, path: Path, scenario: Scenario, check: Callable[[dict[str, Any]], None] = lambda head: None
    ) -> Journal:
        """An interrupted run, to be continued in a new segment; refuses a changed scenario and a run that is none, and
        what `check` complains about, before anything is written."""
        file = path / "run.json"
        try:
            head: dict[str, Any] = msgspec.json.decode(read_file(file))
        except OSError as e:
            raise BadInput(f"cannot be read ({e.strerror}); expected a measured run to resume", path=file) from e
        except msgspec.DecodeError as e:
            raise BadInput(f"not JSON ({e}); expected a measured run to resume", path=file) from e
        if not isinstance(head, dict) or head.get("format") not in READ or head.get("kind") != "measured":
            raise BadInput(f"expected a measured run of format {EXPECTED} to resume", path=file)
        head = upgraded(head)
        before, now = head.get("scenario"), _plain(scenario, path)
        if isinstance(before, dict) and "server" not in before:  # of another engine, whose flags are not the scenario's
            now.pop("server")
        if before != now:
            keys = [key for key in now if not isinstance(before, dict) or before.get(key) != now[key]]
            raise BadInput(
                f"the run was begun with another {' and '.join(keys) or 'scenario'}; resume it with the one it has",
                path=file,
                key="scenario",
            )
        check(head)
        last, first_id = 0.0, 0
        for requests in path.glob("requests*.jsonl"):
            for record in requests.read_bytes().split(b"\n"):
                try:
                    said = msgspec.json.decode(record)
                except msgspec.DecodeError:  # torn, or the end of the file
                    continue
                last, first_id = max(last, said["ended"]), max(first_id, said["id"] + 1)
        for rung in head["rungs"]:
            last = max(last, rung["start"], rung.get("end") or 0.0)
        # wall clocks step: time goes on after the last thing that is on record, whatever they say
        start = max(last + 1.0, time.time() - head["anchor"]["unix"])
        zero = perf_counter_ns() - int(start * 1e9)
        head["segments"].append({"start": round(start, 6), "first_rung": len(head["rungs"])})
        head["stopped"] = ""
        journal = cls(path, head, zero, first_id)
        journal.save()
        return journal

    @property
    def segment(self) -> int:
        """How often the run has been resumed."""
        return len(self.head["segments"]) - 1

    @property
    def rungs(self) -> list[dict[str, Any]]:
        """The rungs so far."""
        rungs: list[dict[str, Any]] = self.head["rungs"]
        return rungs

    def save(self) -> None:
        """Replace `run.json`."""
        write_file(self.path / "run.json", msgspec.json.format(msgspec.json.encode(self.head), indent=1) + b"\n")

    def warn(self, sentence: str) -> None:
        """A warning about the whole run, written once."""
        if sentence not in self.head["warnings"]:
            self.head["warnings"].append(sentence)

    def note(self, report: Report) -> None:
        """What the client saw of itself, to `client.jsonl`."""
        if report.worker >= 0 and report.lags:
            line = {"t": report.t, "worker": report.worker, "cpu": report.cpu, "lags": report.lags}
            self._client.write(msgspec.json.encode(line))

    def close(self) -> None:
        """Close the files."""
        self._client.close()


def refuse_existing(path: Path) -> None:
    """Raise `BadInput` if there is anything at the path, but for what a kill left of a file not yet in place."""
    if path.exists() and (not path.is_dir() or any(not p.name.startswith(".") for p in path.iterdir())):
        raise BadInput(
            "exists already, and a run is never overwritten; name another, or go on with it by --resume", path=path
        )


def _plain(scenario: Scenario, path: Path) -> dict[str, Any]:
    """The scenario as `run.json` in the folder `path` has it."""
    here = msgspec.structs.replace(relocated(scenario, Path(), path), written=msgspec.UNSET)
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(here))
    return plain


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

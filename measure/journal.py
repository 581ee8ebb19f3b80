"""The run directory while it is written: `run.json` is replaced at the beginning and end of every rung."""

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
from sim.model.warning import Notice

LIBRARIES = ("servecast", "locust", "gevent", "geventhttpclient", "aiohttp")


class Journal:
    """`head` is the content of `run.json`; times are seconds since `zero`, a value of `perf_counter_ns`."""

    def __init__(self, path: Path, head: dict[str, Any], zero: int, first_id: int = 0):
        self.path, self.head, self.zero, self.first_id = path, head, zero, first_id
        self._client = Lines(path / "client.jsonl")

    @classmethod
    def begin(cls, path: Path, scenario: Scenario, **more: Any) -> Journal:
        """Create a run directory; `BadInput` if the directory is not empty."""
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
        """Open an interrupted run to continue it in a new segment.

        `BadInput` if it is no measured run or its scenario differs; `check` may raise more, before anything is written.
        """
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
        if isinstance(before, dict) and "server" not in before:  # the run is of another engine than the scenario's
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
                    fields = msgspec.json.decode(record)
                except msgspec.DecodeError:  # torn, or the end of the file
                    continue
                last, first_id = max(last, fields["ended"]), max(first_id, fields["id"] + 1)
        for rung in head["rungs"]:
            last = max(last, rung["start"], rung.get("end") or 0.0)
        # the wall clock may have been set back: the run's time continues after the last recorded event in any case
        start = max(last + 1.0, time.time() - head["anchor"]["unix"])
        zero = perf_counter_ns() - int(start * 1e9)
        head["segments"].append({"start": round(start, 6), "first_rung": len(head["rungs"])})
        head["stopped"] = ""
        journal = cls(path, head, zero, first_id)
        journal.save()
        return journal

    @property
    def segment(self) -> int:
        """The number of the current segment: how often the run has been resumed."""
        return len(self.head["segments"]) - 1

    @property
    def rungs(self) -> list[dict[str, Any]]:
        """The rungs so far."""
        rungs: list[dict[str, Any]] = self.head["rungs"]
        return rungs

    def save(self) -> None:
        """Replace `run.json`."""
        write_file(self.path / "run.json", msgspec.json.format(msgspec.json.encode(self.head), indent=1) + b"\n")

    def warn(self, warning: Notice) -> None:
        """Add a warning about the whole run, once."""
        said = msgspec.to_builtins(warning)
        if said not in self.head["warnings"]:
            self.head["warnings"].append(said)

    def add(self, report: Report) -> None:
        """Write the canary's lags and the CPU use of a report to `client.jsonl`."""
        if report.worker >= 0 and report.lags:
            line = {"t": report.t, "worker": report.worker, "cpu": report.cpu, "lags": report.lags}
            self._client.write(msgspec.json.encode(line))

    def close(self) -> None:
        """Close the files."""
        self._client.close()


def refuse_existing(path: Path) -> None:
    """Raise `BadInput` if the path exists and is not an empty directory; hidden files do not count."""
    if path.exists() and (not path.is_dir() or any(not p.name.startswith(".") for p in path.iterdir())):
        raise BadInput(
            "exists already, and a run is never overwritten; choose another directory, or add --resume",
            path=path,
        )


def _plain(scenario: Scenario, path: Path) -> dict[str, Any]:
    """The scenario as written to `run.json` in the folder `path`."""
    here = msgspec.structs.replace(relocated(scenario, Path(), path), written=msgspec.UNSET)
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(here))
    return plain


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

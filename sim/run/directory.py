"""A run's directory: how it is read, checked and written."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from sim.engines.catalog import DEFAULT, FLAGS, NAMES, convert, flags_of, identity, of_family, of_info, shape_of
from sim.model.errors import BadInput
from sim.model.files.atomic import TEMPORARY, folder_of, in_the_name_of, target_of
from sim.model.files.document import Document
from sim.model.files.format import FORMAT
from sim.model.files.records import (
    CLOCKS,
    LATEST,
    HeadLine,
    RungLine,
    SegmentLine,
    check_known,
    kept_time,
    read_requests,
)
from sim.model.files.shape import Key, check_shape, found
from sim.model.flags import LAUNCH, SCENARIO, check_bounds, launched_by, names, told_by
from sim.model.fleet import Fleet
from sim.model.identity import SOURCES, Identity, is_engine
from sim.model.requests import Requests, request_records
from sim.model.scenario import Hardware, Load, Scenario, relocated
from sim.model.server import EngineFlags
from sim.model.steps import read_steps, step_records
from sim.model.text import shortened_name
from sim.model.warning import Notice, notice
from sim.model.workload import Workload
from sim.run.run import Run, Rung

_LONGEST = 1e8  # s that a rung may take: three years
_MOST_USERS, _MOST_RATE = 10**8, 1e8  # more than any load generator makes
_LATE = 1e6  # s: no ladder waits for days; a clock of the wall was taken for the run's


def read_run(path: str | Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Run:
    """Read a run directory; unknown keys are ignored.

    A torn last line is dropped with a warning; files of several workers (`requests*.jsonl`, plain or `.gz`) are merged
    and sorted by `sent`, and a request that two of them tell of counts once, with a warning. Single requests that
    cannot be are left out and named in a warning. `BadInput` names file, line and key. `progress` hears how many of
    how many bytes have been read.
    """
    path = Path(path)
    document = Document(path / "run.json", "the head of a run")
    head = document.values
    rungs = [_rung(document, i, raw) for i, raw in enumerate(_listed(document, "rungs"))]
    if rungs and not abs(rungs[0].start) < _LATE:
        raise document.fail(("rungs", 0, "start"), f"expected s since the run began, found {rungs[0].start:.15g}")
    _check_order(document, rungs)
    segments = _listed(document, "segments") if head.get("segments") is not None else []
    for i, raw in enumerate(segments):
        _check_map(document, ("segments", i), raw, SegmentLine)
    _check_map(document, (), head, HeadLine)
    warnings: list[Notice] = []
    files = sorted(p for p in path.glob("requests*.jsonl*") if p.name.endswith((".jsonl", ".jsonl.gz")))
    if not files:
        raise BadInput("missing; expected the run's requests, one JSON object a line", path=path / "requests.jsonl")
    read = Requests(_latest(rungs), len(rungs))
    total, before = sum(file.stat().st_size for file in files), 0

    def tell(done: int) -> None:
        progress(before + done, total)

    for file in files:
        for request in read_requests(file, warnings, tell):
            read.add(request, file)
        before += file.stat().st_size
    requests, times, carried = read.table(warnings)
    steps, ends = read_steps(path, warnings)
    engine = _engine(document)
    try:
        scenario = relocated(_scenario(document, _its_server(head, path)), path, Path())
    except msgspec.ValidationError as e:
        message, _, key = str(e).partition(" - at `$.")
        raise BadInput(message, path=path / "run.json", key="scenario." + key.rstrip("`")) from e
    check_bounds(scenario.server, lambda key, message: document.fail(("scenario", "server", *key), message))
    warnings += _not_told(scenario.server, head.get("info"))
    return Run(
        kind=head.get("kind", "measured"),
        name=shortened_name(head.get("name", path.name)),
        scenario=scenario,
        rungs=rungs,
        requests=requests,
        token_times=times,
        event_tokens=carried,
        steps=steps,
        step_ends=ends,
        created=head.get("created"),
        software=head.get("software") or {},
        info=head.get("info"),
        segments=segments,
        stopped=head.get("stopped") or "",
        warnings=warnings + msgspec.convert(head.get("warnings") or [], list[Notice]),
        path=path,
        engine=engine,
        launched=_launched(document, type(scenario.server)),
    )


def _engine(document: Document) -> Identity | None:
    """The engine of a run's server. Runs of before it was recorded: what `/info` told, else the name and version under
    `software`; of simulated ones the scenario's; else the one that the scenario names, if that is none of ours, whose
    name was written unasked."""
    head = document.values
    if "engine" in head:
        said = head["engine"]
        if said is None:
            return None
        if not isinstance(said, dict):
            raise document.fail(
                ("engine",), f"expected a map of name, version and source, or null, found {found(said)}"
            )
        for name in ("name", "version", "source"):
            value = said.get(name)
            if not isinstance(value, str) and (name != "version" or value is not None):
                raise document.fail(("engine", name), f"expected text, found {found(value)}")
        if said["source"] not in SOURCES:
            raise document.fail(("engine", "source"), f"expected one of {', '.join(SOURCES)}, found {said['source']!r}")
        return identity(said["name"], said["source"], said.get("version"))
    server = (head.get("scenario") or {}).get("server")
    asked = server.get("engine", DEFAULT) if isinstance(server, dict) else DEFAULT
    if not isinstance(asked, str):
        return None  # the scenario is complained about elsewhere
    if head.get("kind") == "simulated":
        return identity(asked, "scenario")
    told = of_info(head.get("info"))
    software = head.get("software")
    if told is None and isinstance(software, dict) and isinstance(software.get("server"), str):
        told = identity(software["server"], "server")
    if told is not None or asked in NAMES:
        return told
    return identity(asked, "scenario", server.get("version") if isinstance(server, dict) else None)


def _launched(document: Document, kind: type[EngineFlags]) -> dict[str, Any]:
    """The flags that a run's server was launched with, as far as they are recorded."""
    head = document.values
    container, recorded = head.get("process") or head.get("container"), head.get("flags")
    if isinstance(recorded, dict):
        said = {k: v for k, v in recorded.items() if isinstance(v, dict) and v.get("source") == LAUNCH}
        return launched_by(kind, [f"--{name}={flag.get('value')}" for name, flag in said.items()])
    argv = container.get("argv") if isinstance(container, dict) else None
    return launched_by(kind, [str(word) for word in argv]) if isinstance(argv, list) else {}


def _scenario(document: Document, raw: dict[str, Any]) -> Scenario:
    """The scenario embedded in a run, keys of later versions left out (they are kept in the file, not refused)."""
    nested = {"workload": Workload, "load": Load, "machine": Hardware, "fleet": Fleet}
    known = {key: _known(value, nested.get(key)) for key, value in _known(raw, Scenario).items()}
    known.pop("launch", None)  # a command is run only from a scenario file that the user named
    server = known.get("server", {})
    if isinstance(server, dict):
        engine = server.get("engine", DEFAULT)
        known["server"] = {"engine": engine} | _known(server, flags_of(engine))
    check_shape(known, Scenario, lambda key, message: document.fail(("scenario", *key), message), (), shape_of)
    return msgspec.convert(known, Scenario, dec_hook=convert)


def _known(raw: Any, kind: type | None) -> Any:
    fields = getattr(kind, "__struct_fields__", ())
    return {k: v for k, v in raw.items() if k in fields} if fields and isinstance(raw, dict) else raw


def _its_server(head: dict[str, Any], path: Path) -> dict[str, Any]:
    """A run's scenario with the flags that are of an engine of ours, and which of them a person wrote.

    In runs of before that was recorded it is not told from a default: what is there counts as written.
    """
    scenario = dict(head.get("scenario") or {"name": head.get("name", path.name)})
    server, recorded = scenario.get("server"), head.get("flags")
    if isinstance(server, dict) and server.get("engine", DEFAULT) not in NAMES:
        del scenario["server"]
        server = None
    if not isinstance(server, dict):
        said = head.get("engine")
        name = of_family(said.get("name")) if isinstance(said, dict) else None
        return scenario if name is None else scenario | {"server": {"engine": name}}
    if recorded == {}:  # the server had not answered yet
        return scenario
    written = list(server)
    if isinstance(recorded, dict):
        written = [name for name, flag in recorded.items() if isinstance(flag, dict) and flag.get("source") == SCENARIO]
    return scenario | {"written": [name for name in names(FLAGS[server.get("engine", DEFAULT)]) if name in written]}


def _latest(rungs: Sequence[Rung]) -> float:
    """No time of a run with these rungs is later, s."""
    marks = [t for rung in rungs for t in (rung.start, rung.end) if not math.isnan(t)]
    return max(marks) + _LATE if marks else LATEST


def _check_order(document: Document, rungs: Sequence[Rung]) -> None:
    """Check that rungs and their times are in order, and that their loads are possible."""
    for i, rung in enumerate(rungs):
        if i and rung.start < rungs[i - 1].start - CLOCKS:
            raise document.fail(
                ("rungs", i, "start"),
                f"expected no time before the rung before ({rungs[i - 1].start}), found {rung.start}",
            )
        before, name = rung.start, "start"
        for mark in ("settled", "end"):
            t = getattr(rung, mark)
            if math.isnan(t):
                continue
            if t < before - CLOCKS:
                raise document.fail(("rungs", i, mark), f"expected no time before its {name} ({before}), found {t}")
            if t > rung.start + _LONGEST:
                raise document.fail(("rungs", i, mark), f"expected s since the run began, found {t:.15g}")
            before, name = t, mark
        if rung.users is not None and not 1 <= rung.users <= _MOST_USERS:
            raise document.fail(("rungs", i, "users"), f"expected 1 to {_MOST_USERS}, found {rung.users}")
        if rung.rate is not None and not 0 <= rung.rate <= _MOST_RATE:
            raise document.fail(("rungs", i, "rate"), f"expected 0 to {_MOST_RATE:.0f} requests/s, found {rung.rate}")


def _not_told(server: EngineFlags, info: dict[str, Any] | None) -> list[Notice]:
    """A warning for every impossible value of a flag that the server is recorded to have reported."""
    found, told = [], told_by(type(server), info)
    for name in server.declared.told:
        value = (info or {}).get(name)
        if value is None or name in told or (value == 0 and not isinstance(value, bool)):
            continue
        found.append(
            notice(
                "impossible-info",
                f"the server told {name} {value!r}, which is impossible: the scenario's value is used",
            )
        )
    return found


def _check_map(document: Document, key: Key, raw: Any, shape: type[msgspec.Struct]) -> None:
    if not isinstance(raw, dict):
        raise document.fail(key, f"expected a map, found {found(raw)}")
    check_known(raw, shape, document.fail, key)


def _listed(document: Document, name: str) -> list[Any]:
    """The list under a key of the head; empty where the key is absent."""
    raw = document.values.get(name, [])
    if not isinstance(raw, list):
        raise document.fail((name,), f"expected a list, found {found(raw)}")
    return raw


def _rung(document: Document, number: int, raw: Any) -> Rung:
    _check_map(document, ("rungs", number), raw, RungLine)
    known = msgspec.convert({k: v for k, v in raw.items() if v is not None}, RungLine)

    def time(t: float | None) -> float:
        return float("nan") if t is None else t

    return Rung(
        start=known.start,
        ramped=time(known.ramped),
        settled=time(known.settled),
        end=time(known.end),
        users=known.users,
        rate=known.rate,
        status=known.status,
        warnings=known.warnings,
        extra={k: v for k, v in raw.items() if k not in RungLine.__struct_fields__},
    )


def write_run(run: Run, path: Path, *, steps: bool = False, read_back: bool = False) -> Path:
    """Write a run into a new directory, `steps.jsonl` too if asked; what is there already is never overwritten.

    The directory appears complete or not at all; with `read_back` only if it can be read again. Times are kept to the
    microsecond.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise BadInput("exists already; expected a new directory (a run is never overwritten)", path=path)
    target = target_of(path)
    with (
        in_the_name_of(path),
        folder_of(target),
        tempfile.TemporaryDirectory(dir=target.parent, prefix=TEMPORARY) as temporary,
    ):
        inside = Path(temporary) / "run"
        inside.mkdir()
        here = replace(run, scenario=relocated(run.scenario, Path(), target))
        (inside / "run.json").write_bytes(msgspec.json.format(_encode(_head(here)), indent=1) + b"\n")
        (inside / "requests.jsonl").write_bytes(
            _lines(request_records(run.requests, run.token_times, run.event_tokens))
        )
        if steps and run.steps is not None:
            (inside / "steps.jsonl").write_bytes(_lines(step_records(run.steps, run.step_ends)))
        if read_back:
            try:
                read_run(inside)
            except BadInput as e:
                name = None if e.path is None else path / Path(e.path).name
                raise BadInput(f"not written: {e.message}", path=name, line=e.line, key=e.key) from e
        inside.replace(target)
    return path


def _encode(value: object) -> bytes:
    return msgspec.json.encode(value)


def _lines(records: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(_encode(record) + b"\n" for record in records)


def plain_scenario(scenario: Scenario, engine: Identity | None) -> dict[str, Any]:
    """A scenario as `run.json` has it: with a server only if the run's is known to be of its engine. Which flags were
    written is told by `flags`."""
    plain: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(scenario, written=msgspec.UNSET))
    if not is_engine(engine, scenario.server.declared):
        del plain["server"]
    return plain


def _head(run: Run) -> dict[str, Any]:
    head: dict[str, Any] = {"format": FORMAT, "kind": run.kind, "name": run.name}
    if run.created is not None:
        head["created"] = run.created
    rungs = []
    for rung in run.rungs:
        load = {"users": rung.users} if rung.users is not None else {"rate": rung.rate}
        times = {name: kept_time(getattr(rung, name)) for name in ("start", "ramped", "settled", "end")}
        rungs.append({**load, **times, "status": rung.status, "warnings": rung.warnings, **rung.extra})
    return head | {
        "scenario": plain_scenario(run.scenario, run.engine),
        "software": run.software,
        "info": run.info,
        "engine": None if run.engine is None else msgspec.to_builtins(run.engine),
        "flags": msgspec.to_builtins(run.flags) if run.known else {},
        "rungs": rungs,
        "segments": run.segments,
        "stopped": run.stopped,
        "warnings": run.warnings,
    }

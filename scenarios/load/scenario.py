"""From YAML to a checked `Scenario`: read, merge with what it extends, apply `--set`, check; every error has a line.

A scenario file is read into a `Tree`: plain values, and where each key stands. Trees are merged, so that an error in
a value inherited from another file names the place where that was written.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from scenarios.load.changes import Change
from scenarios.load.checks import check
from scenarios.load.yaml import Values, parse_yaml
from sim.engines import catalog
from sim.engines.catalog import convert, shape_of
from sim.model.errors import BadInput
from sim.model.files.atomic import read_file
from sim.model.files.format import EXPECTED, FORMAT, NOW, READ, upgraded
from sim.model.files.shape import Key, check_shape, dotted, nearest
from sim.model.scenario import Scenario
from sim.model.text import shortened_name

MOST = 1 << 20  # bytes of a scenario: YAML is read slowly
SHIPPED = Path(__file__).parent.parent / "shipped"

# A figure that replaces another one does not inherit its source.
SOURCED: dict[Key, str] = {("price",): "usd_per_hour"}

# Alternatives: a key of one group replaces those of the others that the base file had.
INSTEAD = {
    (): ({"calibration"}, {"table"}),
    ("workload",): ({"prompt_tokens", "output_tokens"}, {"empirical"}, {"trace"}, {"classes"}),
    ("load",): ({"users"}, {"rate"}, {"trace"}, {"profile"}),
}
LAWS = ({"uniform"}, {"lognormal"}, {"exponential"}, {"geometric"})
FILES = ((None, "calibration"), (None, "table"), ("workload", "empirical"), ("workload", "trace"))


@dataclass
class Tree:
    """A file's values and where each key was written: (file or option, line or None)."""

    values: dict[str, Any]
    places: dict[Key, tuple[str, int | None]] = field(default_factory=dict)

    def fail(self, key: Key, message: str) -> BadInput:
        """An error about `key`, at its place or that of the nearest map around it that was written."""
        around = key
        while around and around not in self.places:
            around = around[:-1]
        path, line = self.places[around]
        return BadInput(message, path=path, line=line, key=dotted(key) or None)


def load(source: str | Path, *sets: str) -> Scenario:
    """The scenario in a file, or shipped under a name; each of `sets` is `a.b=value`, as given to `--set`.

    Published figures are of the server and the machine of the file they stand in: a what-if that changes those has
    none. Raises `BadInput` for whatever the user can fix. File names in the result are relative to the working
    directory.
    """
    tree = resolved(source, sets)
    scenario = checked(tree)
    home = _written_in(tree, "published")
    if home is None or (not sets and Path(home) == find(str(source))):
        return scenario
    measured = checked(read_tree(Path(home)))
    same = measured.alone == scenario.alone and (measured.server, measured.machine) == (
        scenario.server,
        scenario.machine,
    )
    return scenario if same else msgspec.structs.replace(scenario, published=[])


def origin(source: str | Path, key: str, *sets: str) -> Scenario:
    """The scenario of the file in which `key` is written; for `published` it has the server that was measured."""
    home = _written_in(resolved(source, sets), key)
    return load(source, *sets) if home is None else load(home)


def files_of(source: str | Path, *sets: str) -> list[Path]:
    """The files that a scenario is read from, with the tables and traces that it names; not its calibration."""
    tree = resolved(source, sets)
    files = {find(str(source)), *(Path(path) for path, line in tree.places.values() if line is not None)}
    for group, name in FILES:
        named = _value(tree.values, (group, name) if group else (name,))
        if isinstance(named, str) and name != "calibration":
            files.add(Path(named))
    return sorted(files)


def _written_in(tree: Tree, key: str) -> str | None:
    """The file in which a key was written; None for one that is absent, or given by `--set`."""
    path, line = tree.places.get((key,), ("", None))
    return None if line is None else path


def checked(tree: Tree) -> Scenario:
    """The scenario that a tree holds; raises `BadInput` for the first value that is not valid. `options` are left out:
    `scenarios.load.options` reads them."""
    tree = Tree({key: value for key, value in tree.values.items() if key != "options"}, tree.places)
    if "written" in tree.values:  # which only we write, below
        raise tree.fail(("written",), "unknown key")
    if "transfer" in tree.values:
        raise tree.fail(
            ("transfer",), "expected none: the transfer of a calibration to other hardware is not built yet"
        )
    values = _with_servers({"server": {}} | without_nulls(tree.values))
    check_shape(_with_servers({"server": {}} | tree.values), Scenario, tree.fail, (), shape_of)
    scenario = msgspec.convert(values | {"written": list(values["server"])}, Scenario, dec_hook=convert)
    server = scenario.server.on(scenario.machine, values["server"])
    scenario = msgspec.structs.replace(scenario, server=server)
    if scenario.fleet is not None and scenario.fleet.groups:
        groups = [
            msgspec.structs.replace(group, server=group.server.on(scenario.machine, raw["server"]))
            if group.server is not None
            else group
            for group, raw in zip(scenario.fleet.groups, values["fleet"]["groups"], strict=True)
        ]
        scenario = msgspec.structs.replace(scenario, fleet=msgspec.structs.replace(scenario.fleet, groups=groups))
    if scenario.launch is not None and not scenario.launch.image and not scenario.launch.command:
        launch = msgspec.structs.replace(scenario.launch, image=scenario.server.declared.image)
        scenario = msgspec.structs.replace(scenario, launch=launch)
    check(scenario, tree.fail)
    return scenario


def _with_servers(values: dict[str, Any]) -> dict[str, Any]:
    """The values with the flags of each group of a fleet laid over those of the scenario's server."""
    fleet, server = values.get("fleet"), values["server"]
    if not isinstance(fleet, dict) or not isinstance(fleet.get("groups"), list) or not isinstance(server, dict):
        return values
    laid = [
        group | {"server": merge(server, group["server"], ("server",))}
        if isinstance(group, dict) and isinstance(group.get("server"), dict)
        else group
        for group in fleet["groups"]
    ]
    return values | {"fleet": fleet | {"groups": laid}}


def resolved(source: str | Path, sets: Sequence[str]) -> Tree:
    """The tree of a file with everything it extends and the changes `sets` of the command line."""
    tree = read_tree(find(str(source)))
    for text in sets:
        tree = overlay(tree, option(text, tree))
    return tree


def shipped() -> list[str]:
    """The names of the scenarios that come with servecast."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def template(name: str, engine: str = catalog.DEFAULT) -> str:
    """A commented scenario of this name to start from, for a server of that engine; `BadInput` for a name that no file
    can have, and for an engine that is not simulated."""
    if not name.strip() or shortened_name(name) != name:
        raise BadInput("expected a name, such as chat", path=f"new {name!r}")
    return (SHIPPED / f"template-{catalog.declared(engine).name}.txt").read_text(encoding="utf-8").replace("NAME", name)


def json_schema() -> str:
    """The JSON schema of scenario files."""
    schema = msgspec.json.schema(Scenario, schema_hook=catalog.json_schema)
    properties = schema["$defs"]["Scenario"]["properties"]
    del properties["written"]  # only servecast writes it
    properties["options"] = {
        "type": "array",
        "items": {"type": "object", "required": ["name"]},
        "description": "what `servecast plan` chooses from: each laid over the scenario like `extends`",
    }
    properties["extends"] = {"type": "string", "description": "the file whose keys this one overrides"}
    return msgspec.json.format(msgspec.json.encode(schema)).decode()


def find(source: str, beside: Path = Path()) -> Path:
    """The file that `source` names: a path, relative to the folder `beside`, or the name of a shipped scenario."""
    path = beside / source
    if path.exists() and not path.is_dir():
        return path
    if (SHIPPED / f"{source}.yaml").is_file():
        return Path(os.path.relpath(SHIPPED / f"{source}.yaml"))  # no place of this machine goes into what is written
    hint = nearest(Path(source).stem, shipped())
    expected = f"did you mean {hint}?" if hint else "`servecast scenarios` lists the shipped ones"
    raise BadInput(f"no such scenario file, nor a shipped scenario of that name; {expected}", path=source)


def read_tree(path: Path, below: tuple[Path, ...] = ()) -> Tree:
    """One file with everything it extends; `below` are the files that extend it."""
    tree = parse(path)
    if "extends" not in tree.values:
        return tree
    target = tree.values.pop("extends")
    if not isinstance(target, str):
        raise tree.fail(("extends",), f"expected the name of a scenario file, found {target!r}")
    try:
        base = find(target, path.parent)
    except BadInput as e:
        raise tree.fail(("extends",), f"{target}: {e.message}") from e
    chain = (*below, path)
    if base.resolve() in {p.resolve() for p in chain}:
        raise tree.fail(("extends",), "goes in a circle: " + " -> ".join(p.name for p in (*chain, base)))
    return overlay(read_tree(base, chain), tree)


def parse(path: Path) -> Tree:
    """One file as it stands, its file names resolved against its folder."""
    try:
        text = read_file(path, MOST).decode()
    except OSError as e:
        raise BadInput(f"cannot be read ({e.strerror}); expected a scenario file", path=path) from e
    except UnicodeDecodeError as e:
        raise BadInput("not UTF-8 text; expected a scenario file", path=path) from e
    tree = Tree({}, {(): (str(path), None)})
    tree.values = plain(text, (), tree, path)
    if not isinstance(tree.values, dict):
        raise BadInput("expected a scenario: keys and values, as `servecast new` writes them", path=path, line=1)
    if tree.values.get("format", FORMAT) not in READ:
        raise tree.fail(("format",), f"expected {EXPECTED}, found {tree.values['format']!r}")
    tree.values = upgraded(tree.values)
    tree.places = {(NOW.get(key[0], key[0]), *key[1:]) if key else key: at for key, at in tree.places.items()}
    options = tree.values.get("options")
    for values in (tree.values, *(options if isinstance(options, list) else [])):
        if isinstance(values, dict):
            _resolve_files(values, path.parent)
    return tree


def _resolve_files(values: dict[str, Any], folder: Path) -> None:
    """Make the file names of a scenario, or of an option of a plan, relative to the working directory."""
    for group, name in FILES:
        holder = values.get(group) if group else values
        if isinstance(holder, dict) and isinstance(holder.get(name), dict):
            holder, name = holder[name], "file"
        if isinstance(holder, dict) and isinstance(holder.get(name), str):
            holder[name] = str(folder / holder[name])
    fleet = values.get("fleet")
    for each in fleet.get("groups") or [] if isinstance(fleet, dict) else []:
        if isinstance(each, dict) and isinstance(each.get("calibration"), str):
            each["calibration"] = str(folder / each["calibration"])
    work = values.get("workload")
    for each in work.get("classes") or [] if isinstance(work, dict) else []:
        if isinstance(each, dict):
            _resolve_files({"workload": each}, folder)


def plain(text: str, key: Key, tree: Tree, path: str | Path) -> Any:
    """A YAML text as Python's own types, the value of `key`; the lines of its keys go to `tree.places`."""

    def place(at: Key, line: int) -> None:
        tree.places[at] = (str(path), line)

    return Values(place, tree.fail).of(parse_yaml(text, path), key)


def overlay(base: Tree, top: Tree) -> Tree:
    """`base` overridden by the keys of `top`: maps merge, lists and scalars replace."""
    replaced = {key for key in top.places if key and not isinstance(_value(top.values, key), dict)}
    kept = {key: at for key, at in base.places.items() if not any(key[:i] in replaced for i in range(1, len(key)))}
    tree = Tree({}, kept | {key: place for key, place in top.places.items() if key})
    tree.places[()] = top.places[()] if top.places[()][1] is None else base.places[()]
    tree.values = merge(base.values, top.values, ())
    return tree


def _value(values: Any, key: Key) -> Any:
    for part in key:
        values = values.get(part) if isinstance(values, dict) else None
    return values


def merge(base: dict[str, Any], top: dict[str, Any], key: Key) -> dict[str, Any]:
    """See `overlay`; of keys that exclude each other, those of `top` stay."""
    merged = dict(base)
    if key == ("server",) and "engine" in top and top["engine"] != merged.get("engine", catalog.DEFAULT):
        merged = {}  # flags of another engine mean nothing to this one
    if key == () and "fleet" in top:
        merged.pop("replicas", None)
    groups = INSTEAD.get(tuple(map(str, key)), LAWS if set(top) <= set().union(*LAWS) else ())
    chosen = [group for group in groups if group & set(top)]
    if chosen:
        for name in set().union(*groups) - set().union(*chosen):
            merged.pop(name, None)
    if (figure := SOURCED.get(key)) is not None and figure in top:
        merged.pop("source", None)
    for name, value in top.items():
        if key == ("workload",) and isinstance(value, dict) and isinstance(merged.get(name), str):
            merged[name] = {"file": merged[name]}  # `trace: FILE` is short for `trace: {file: FILE}`
        if isinstance(value, dict) and isinstance(merged.get(name), dict):
            merged[name] = merge(merged[name], value, (*key, name))
        else:
            merged[name] = value
    return merged


def option(text: str, onto: Tree) -> Tree:
    """`a.b=value` as a tree of one key; the value is YAML, and a number among the names is a place in a list."""
    where = text.option if isinstance(text, Change) else f"--set {text}"
    name, equals, value = text.partition("=")
    parts = name.split(".")
    if not equals or not all(parts):
        raise BadInput("expected KEY=VALUE, such as server.max_batch_prefill_tokens=4096", path=where)
    if name in ("extends", "format"):
        raise BadInput("cannot be changed by --set", path=where, key=name)
    tree = Tree({}, {(): (where, None)})
    try:
        value_set = plain(value, tuple(parts), tree, where)
    except BadInput as e:  # an option has no lines
        raise BadInput(e.message, path=where, key=e.key or name) from e
    tree.values = nest(onto.values, parts, value_set, tree)
    inside = [key for key in tree.places if len(key) > len(parts)]
    tree.places = dict.fromkeys((*(tuple(parts[:i]) for i in range(len(parts) + 1)), *inside), (where, None))
    return tree


def nest(existing: Any, parts: list[str], value: Any, tree: Tree) -> Any:
    """`value` under the names `parts`; the other entries of a list in `existing` are kept."""
    if not parts:
        return value
    name, rest = parts[0], parts[1:]
    if not isinstance(existing, list):
        below = existing.get(name) if isinstance(existing, dict) else None
        return {name: nest(below, rest, value, tree)}
    if not name.isdigit() or int(name) >= len(existing):
        raise tree.fail((), f"expected a place from 0 to {len(existing) - 1} in a list, found {name}")
    old = existing[int(name)]
    new = nest(old, rest, value, tree)
    changed = merge(old, new, ()) if isinstance(old, dict) and isinstance(new, dict) else new
    return [*existing[: int(name)], changed, *existing[int(name) + 1 :]]


def without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """The values without keys that are null: those count as absent."""
    return {
        key: without_nulls(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None
    }

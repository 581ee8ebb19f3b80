"""The options of a plan: each laid over the scenario like `extends`, with its replicas and all values of its flags."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from scenarios.load.scenario import Tree, checked, overlay, resolved
from sim.model.errors import BadInput
from sim.model.files.shape import Key
from sim.model.scenario import Scenario
from sim.model.server import Bounds

REPLICAS = (1, 32)  # what a plan tries where nothing is said


class Option(NamedTuple):
    """A scenario to choose, with `low` to `high` replicas; `flags` are those of the server in which it differs."""

    name: str
    scenario: Scenario
    low: int
    high: int
    flags: dict[str, Any] = {}  # noqa: RUF012 - a default of a named tuple, which is never changed


def load_options(source: str | Path, *sets: str) -> list[Option]:
    """The options of a scenario, in the order written; without any, the scenario itself is the only one.

    A flag of `server` that is a list stands for one option for each of its values. Raises `BadInput` with file and
    line.
    """
    base = resolved(source, sets)
    written = base.values.pop("options", None)
    if written is None:
        return list(_each(base, None))
    if not isinstance(written, list) or not written or not all(isinstance(each, dict) for each in written):
        raise base.fail(("options",), "expected a list of options, each a map with a name")
    found: list[Option] = []
    for i, values in enumerate(written):
        name = values.get("name")
        if not isinstance(name, str) or not name.strip():
            raise base.fail(("options", i, "name"), "missing; expected a name for the option")
        for key in ("transfer", "options", "goal", "extends"):
            if key in values:
                why = "a calibration is not transferred to other hardware yet" if key == "transfer" else "unknown key"
                raise base.fail(("options", i, key), why)
        at = len(("options", i))
        places: dict[Key, tuple[str, int | None]] = {
            key[at:]: place for key, place in base.places.items() if key[:at] == ("options", i)
        }
        top = Tree({key: value for key, value in values.items() if key != "name"}, {(): base.places[()]} | places)
        found += _each(overlay(base, top), name, values.get("server"))
    if len({option.name for option in found}) < len(found):
        raise base.fail(("options",), "expected options of different names")
    return found


def _each(tree: Tree, name: str | None, own_flags: Any = None) -> Iterator[Option]:
    """The options that a tree stands for: one for every combination of the flags that are lists."""
    server = tree.values.get("server") or {}
    lists = {flag: value for flag, value in server.items() if isinstance(value, list)}
    for flag, tried in lists.items():
        if not tried:
            raise tree.fail(("server", flag), "expected at least one value, found an empty list")
    for values in product(*lists.values()):
        chosen: dict[str, Any] = dict(zip(lists, values, strict=True))
        one = Tree(tree.values | {"server": server | chosen}, tree.places)
        scenario = checked(one)
        if scenario.served_by.groups:
            raise tree.fail(("fleet", "groups"), "expected none: a plan is made for replicas that are alike")
        said = ", ".join(f"{flag} {_plain(value)}" for flag, value in chosen.items())
        own = scenario.name if name is None else name
        flags = (own_flags if isinstance(own_flags, dict) else {}) | chosen
        yield Option(f"{own}, {said}" if said else own, scenario, *_replicas(one, scenario), flags)


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _replicas(tree: Tree, scenario: Scenario) -> tuple[int, int]:
    """The range of replicas to try."""
    fleet = tree.values.get("fleet")
    if "replicas" not in (tree.values if fleet is None else fleet):
        return REPLICAS
    asked = scenario.served_by.replicas
    return (asked.low, asked.high) if isinstance(asked, Bounds) else (asked, asked)


def single_loads(option: Option) -> list[Option]:
    """The option at each load of its ladder: a plan is made for one load."""
    load = option.scenario.load
    if load.users is not None and len(load.users) > 1:
        each = [msgspec.structs.replace(load, users=[users]) for users in load.users]
    elif load.rate is not None and len(load.rate) > 1:
        each = [msgspec.structs.replace(load, rate=[rate]) for rate in load.rate]
    else:
        return [option]
    return [option._replace(scenario=msgspec.structs.replace(option.scenario, load=one)) for one in each]


def limits(scenario: Scenario) -> dict[str, float]:
    """The SLOs that a plan has to keep, by metric: the goal's, else the scenario's; and those of a mix's classes."""
    slo = dict(scenario.goal.slo if scenario.goal is not None and scenario.goal.slo else scenario.slo)
    for each in scenario.workload.classes:
        slo |= {f"{each.name}.{name}": limit for name, limit in each.slo.items()}
    return slo


def check_limits(options: Sequence[Option], source: str | Path) -> None:
    """Raise `BadInput` for options without an SLO."""
    if not limits(options[0].scenario):
        raise BadInput("missing; a plan needs an SLO to meet, such as --slo e2e_p95=15", path=source, key="slo")

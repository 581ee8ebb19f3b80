"""The flags of a server with where each is from: told by the server, its launch command, a scenario, or a default."""

from __future__ import annotations

import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec

from sim.model.files.shape import Fail
from sim.model.quantity import MOST
from sim.model.server import Bounds, Declaration, EngineFlags
from sim.model.warning import Notice, notice

SERVER, LAUNCH, SCENARIO, DEFAULT = SOURCES = ("server", "launch", "scenario", "default")
WORDS = {
    SERVER: "told by the server",
    LAUNCH: "on its launch command",
    SCENARIO: "from the scenario",
    DEFAULT: "defaults",
}


class Flag(msgspec.Struct, frozen=True, kw_only=True):
    """The value of a flag, and its source: one of `SOURCES`. A capacity may be bounds, or nobody's: a calibration's
    then."""

    value: int | float | bool | str | dict[str, int] | None
    source: str


def names(kind: type[EngineFlags]) -> tuple[str, ...]:
    """The flags of an engine."""
    return tuple(_types(kind))


def _types(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in msgspec.structs.fields(kind)}


def _is_float(kind: type[EngineFlags], name: str) -> bool:
    return _types(kind)[name] is float


def flags(
    config: EngineFlags,
    written: Collection[str],
    told: Mapping[str, Any] | None = None,
    launched: Mapping[str, Any] | None = None,
) -> dict[str, Flag]:
    """Every flag of a server. The server's own word (`told`) wins, then its launch command, then the scenario, whose
    values `config` holds (`written` are those that a person wrote; the others are defaults)."""
    known = names(type(config))
    plain = msgspec.to_builtins(config.as_told({**(launched or {}), **(told or {})}))
    of_scenario = {name for name in written if plain.get(name) is not None}
    found = {n: Flag(value=plain[n], source=SCENARIO if n in of_scenario else DEFAULT) for n in known}
    found |= {name: Flag(value=value, source=LAUNCH) for name, value in (launched or {}).items() if name in known}
    return found | {name: Flag(value=value, source=SERVER) for name, value in (told or {}).items()}


def told_by(kind: type[EngineFlags], info: Mapping[str, Any] | None) -> dict[str, Any]:
    """The flags that a server's own word (`GET /info`) tells, where they can be meant."""
    said = {name: (info or {}).get(name) for name in kind.declared.told}
    numbers = {k: v for k, v in said.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    told = {k: v for k, v in numbers.items() if 0 < v < MOST}
    whole = {k: int(v) for k, v in told.items() if v == int(v) and not _is_float(kind, k)}
    return whole | {k: float(v) for k, v in told.items() if _is_float(kind, k)}


def launched_by(kind: type[EngineFlags], arguments: Sequence[str]) -> dict[str, Any]:
    """The flags on a launcher's command line (`--max-waiting-tokens 20`, or with `=`)."""
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--") else [word])]
    found: dict[str, Any] = {}
    known = names(kind)
    for i, word in enumerate(words[:-1]):
        name = word.removeprefix("--").replace("-", "_")
        if word.startswith("--") and name in known:
            try:
                found[name] = float(words[i + 1]) if _is_float(kind, name) else int(words[i + 1])
            except ValueError:
                continue
    return found


def check_bounds(config: EngineFlags, fail: Fail) -> None:
    """Complain about bounds of a flag that are reversed."""
    for name in names(type(config)):
        value = getattr(config, name)
        if isinstance(value, Bounds) and value.high < value.low:
            raise fail((name,), f"expected low up to high, found {value.low} to {value.high}")


def in_words(found: Mapping[str, Flag]) -> str:
    """The flags in one line, those of one source together, without those that are unset."""
    said = {name: flag for name, flag in found.items() if flag.value is not None}
    groups = {source: [f"{n} {plain_flag(f)}" for n, f in said.items() if f.source == source] for source in SOURCES}
    return "; ".join(f"{WORDS[source]}: {', '.join(group)}" for source, group in groups.items() if group)


def plain_flag(flag: Flag) -> str:
    """Its value as people write it."""
    value = flag.value
    if value is None:
        return "unset"
    if isinstance(value, dict):
        return f"{value.get('low')} to {value.get('high')}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def unwritten(found: Mapping[str, Flag], declared: Declaration) -> list[Notice]:
    """A warning where nobody wrote the flag of a scenario that decides most."""
    for name in declared.decisive[:1]:
        if name in found and found[name].source == DEFAULT:
            return [
                notice(
                    "flag-default",
                    f"server.{name} {found[name].value} is only the default: it decides who waits (a wrong one can "
                    "move p95 by half)",
                )
            ]
    return []


def untold(found: Mapping[str, Flag], declared: Declaration) -> list[Notice]:
    """A warning for the decisive flags that neither a server nor its launch command told."""
    said = {SCENARIO: "is the scenario's", DEFAULT: "is only the default"}
    return [
        notice(
            "flag-unconfirmed",
            f"{name} {found[name].value} {said[found[name].source]}: the server does not tell it, and it decides who "
            "waits (a wrong one can move p95 by half)",
        )
        for name in declared.decisive
        if name in found and found[name].source in said
    ]

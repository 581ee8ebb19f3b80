"""The flags of a server with where each is from: told by the server, its launch command, a scenario, or a default."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from itertools import zip_longest
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
    """The value of a flag, and its source: one of `SOURCES`. A capacity may be bounds, or None: a calibration has it
    then."""

    value: int | float | bool | str | dict[str, int] | None
    source: str


def names(kind: type[EngineFlags]) -> tuple[str, ...]:
    """The flags of an engine."""
    return tuple(_types(kind))


def _types(kind: Any) -> dict[str, Any]:
    return {field.name: field.type for field in msgspec.structs.fields(kind)}


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
    found |= {n: Flag(value=plain[n], source=LAUNCH) for n in launched or {} if plain.get(n) is not None}
    return found | {name: Flag(value=value, source=SERVER) for name, value in (told or {}).items()}


def told_by(kind: type[EngineFlags], info: Mapping[str, Any] | None) -> dict[str, Any]:
    """The flags that a server's own word (`GET /info`) tells, where they can be meant."""
    told = {}
    for name in kind.declared.told:
        value = (info or {}).get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # 1e3 of a JSON writer; a float flag takes it as well
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and not 0 < value < MOST):
            continue
        with suppress(msgspec.ValidationError):
            told[name] = msgspec.convert(value, _types(kind)[name])
    return told


def launched_by(kind: type[EngineFlags], arguments: Sequence[str]) -> dict[str, Any]:
    """The flags on a launcher's command line: `--max-waiting-tokens 20`, or with `=`; `--enable-prefix-caching`,
    `--no-enable-prefix-caching`; of flags given twice the last. Values that a flag cannot have are left out."""
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--") else [word])]
    types = _types(kind)
    known = {kind.declared.arguments.get(name, name): name for name in types} | {name: name for name in types}
    found: dict[str, Any] = {}
    for word, value in zip_longest(words, words[1:], fillvalue="--"):
        if not word.startswith("--"):
            continue
        argument = word.removeprefix("--").replace("-", "_")
        name, denied = known.get(argument), known.get(argument.removeprefix("no_"))
        if name is None and denied is not None and types[denied] is bool:
            found[denied] = False
        elif name is not None:
            switch = types[name] is bool and value.lower() not in ("true", "false")
            with suppress(msgspec.ValidationError):
                found[name] = switch or msgspec.convert(_whole(value), types[name], strict=False)
    return found


def arguments(config: EngineFlags, chosen: Collection[str]) -> list[str]:
    """The command-line arguments that give a server the `chosen` ones of these flags; unset ones are left out."""
    found: list[str] = []
    for name in names(type(config)):
        value = getattr(config, name)
        if name not in chosen or not isinstance(value, int | float | str):
            continue
        argument = config.declared.arguments.get(name, name).replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{argument}" if value else f"--no-{argument}")
        else:
            found += [f"--{argument}", str(value)]
    return found


def _whole(text: str) -> str:
    """A number of tokens as vLLM also takes it: `8k` is 8000, `8K` 8192 (utils/argparse_utils.py)."""
    human = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgG])", text)
    if human is None:
        return text
    base, power = (1000 if human[2].islower() else 1024), " kmg".index(human[2].lower())
    return str(int(float(human[1]) * base**power))


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
    """A warning if the most decisive flag of a scenario is only a default."""
    for name in declared.decisive[:1]:
        if name in found and found[name].source == DEFAULT:
            return [
                notice(
                    "flag-default",
                    f"server.{name} {found[name].value} is only the default: it decides which requests wait "
                    "(a wrong value can move p95 by half)",
                )
            ]
    return []


def untold(found: Mapping[str, Flag], declared: Declaration) -> list[Notice]:
    """A warning for the decisive flags that neither a server nor its launch command told."""
    said = {SCENARIO: "is the scenario's", DEFAULT: "is only the default"}
    return [
        notice(
            "flag-unconfirmed",
            f"{name} {found[name].value} {said[found[name].source]}: the server does not tell it, and it decides "
            "which requests wait (a wrong value can move p95 by half)",
        )
        for name in declared.decisive
        if name in found and found[name].source in said
    ]

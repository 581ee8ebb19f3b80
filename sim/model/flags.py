"""The flags of a server with where each is from: told by the server, its launch command, a scenario, or a default."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec

from sim.model.server import ServerConfig

SERVER, LAUNCH, SCENARIO, DEFAULT = SOURCES = ("server", "launch", "scenario", "default")
WORDS = {
    SERVER: "told by the server",
    LAUNCH: "on its launch command",
    SCENARIO: "from the scenario",
    DEFAULT: "defaults",
}
_MOST = 2**53  # that a float counts exactly

# what `GET /info` tells of a ServerConfig (router/src/lib.rs:24-62); not max_batch_prefill_tokens, not requires_padding
TOLD = (
    "max_batch_total_tokens",
    "max_input_length",
    "max_total_tokens",
    "waiting_served_ratio",
    "max_waiting_tokens",
    "max_concurrent_requests",
)
FLAGS = tuple(name for name in ServerConfig.__struct_fields__ if name != "engine")
# who waits, and for how long, follows from these; a wrong prefill budget moved p95 by half
DECISIVE = ("max_batch_prefill_tokens", "waiting_served_ratio", "max_waiting_tokens")


class Flag(msgspec.Struct, frozen=True, kw_only=True):
    """The value of a flag, and its source: one of `SOURCES`. A token budget may be bounds, or nobody's: a calibration's
    then."""

    value: int | float | bool | dict[str, int] | None
    source: str


def flags(
    config: ServerConfig,
    written: Collection[str],
    told: Mapping[str, Any] | None = None,
    launched: Mapping[str, Any] | None = None,
) -> dict[str, Flag]:
    """Every flag of a server. The server's own word (`told`) wins, then its launch command, then the scenario, whose
    values `config` holds (`written` are those that a person wrote; the others are defaults)."""
    plain = msgspec.to_builtins(config)
    found = {n: Flag(value=plain[n], source=SCENARIO if n in written else DEFAULT) for n in FLAGS}
    found |= {name: Flag(value=value, source=LAUNCH) for name, value in (launched or {}).items() if name in FLAGS}
    return found | {name: Flag(value=value, source=SERVER) for name, value in (told or {}).items()}


def told_by(info: Mapping[str, Any] | None) -> dict[str, Any]:
    """The flags that an answer of `GET /info` tells, where they can be meant."""
    said = {name: (info or {}).get(name) for name in TOLD}
    numbers = {k: v for k, v in said.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    told = {k: v for k, v in numbers.items() if 0 < v < _MOST}
    whole = {k: int(v) for k, v in told.items() if v == int(v) and k != "waiting_served_ratio"}
    return whole | {k: float(v) for k, v in told.items() if k == "waiting_served_ratio"}


def launched_by(arguments: Sequence[str]) -> dict[str, Any]:
    """The flags on a launcher's command line (`--max-waiting-tokens 20`, or with `=`)."""
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--") else [word])]
    found: dict[str, Any] = {}
    for i, word in enumerate(words[:-1]):
        name = word.removeprefix("--").replace("-", "_")
        if word.startswith("--") and name in FLAGS:
            try:
                found[name] = float(words[i + 1]) if name == "waiting_served_ratio" else int(words[i + 1])
            except ValueError:
                continue
    return found


def in_words(found: Mapping[str, Flag]) -> str:
    """The flags in one line, those of one source together; a token budget that nobody gave is the calibration's."""
    said = {name: flag for name, flag in found.items() if flag.value is not None}
    groups = {source: [f"{n} {plain_flag(f)}" for n, f in said.items() if f.source == source] for source in SOURCES}
    return "; ".join(f"{WORDS[source]}: {', '.join(group)}" for source, group in groups.items() if group)


def plain_flag(flag: Flag) -> str:
    """Its value as people write it."""
    value = flag.value
    if value is None:
        return "the calibration's"
    if isinstance(value, dict):
        return f"{value.get('low')} to {value.get('high')}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def unwritten(found: Mapping[str, Flag]) -> list[str]:
    """A warning where nobody wrote the flag of a scenario that decides most."""
    name = DECISIVE[0]
    if name not in found or found[name].source != DEFAULT:
        return []
    return [
        f"server.{name} {found[name].value} is only the default: it decides who waits (a wrong one can move p95 by "
        "half); look it up in the server's launch command and write it into the scenario"
    ]


def untold(found: Mapping[str, Flag]) -> list[str]:
    """A warning for the decisive flags that neither a server nor its launch command told."""
    said = {SCENARIO: "is the scenario's", DEFAULT: "is only the default"}
    return [
        f"{name} {found[name].value} {said[found[name].source]}: the server does not tell it, and it decides who waits "
        "(a wrong one can move p95 by half); check it against the command that launched the server"
        for name in DECISIVE
        if name in found and found[name].source in said
    ]

"""The scenarios that a command asks about: those named, with every combination of what `--vary` varies."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import msgspec

from scenarios.load.changes import Change, same_key
from scenarios.load.scenario import load
from sim.model.errors import BadInput
from sim.model.scenario import Scenario

LONGEST = 80  # characters of a name that says how a variant differs; longer ones are numbered


class Variation(NamedTuple):
    """A key and the values it takes, as written."""

    key: str
    values: tuple[str, ...]
    option: str


class Variant(NamedTuple):
    """A scenario: the file or name it was loaded from, its changes, and the values of the keys that vary."""

    source: str
    sets: tuple[str, ...]
    scenario: Scenario
    varied: Sequence[Variation] = ()
    values: tuple[str, ...] = ()


def variations(texts: Sequence[str], sets: Sequence[str]) -> list[Variation]:
    """What `--vary` options say: `key=a,b,c`, where commas inside brackets and quotes belong to a value."""
    found: list[Variation] = []
    for text in texts:
        where = f"--vary {text}"
        key, equals, rest = text.partition("=")
        values = tuple(part.strip() for part in _split(rest))
        if not (key and equals and all(values)):
            raise BadInput("expected KEY=A,B,..., such as server.max_batch_prefill_tokens=4096,8192", path=where)
        if len(set(values)) < len(values):
            raise BadInput("names a value twice", path=where)
        for other in (*(f"{v.key}=" for v in found), *sets):
            if same_key(text, other):
                raise BadInput(f"{key} is changed by another option too; expected one of them", path=where)
        found.append(Variation(key, values, where))
    return found


def load_variants(names: Sequence[str], sets: tuple[str, ...], varied: Sequence[Variation] = ()) -> list[Variant]:
    """Load every scenario with `sets`, and with every combination of what is varied, in the order written."""
    if not varied:
        return [Variant(name, sets, load(name, *sets)) for name in names]
    found = []
    for name in names:
        for number, values in enumerate(product(*(v.values for v in varied)), 1):
            each = (*sets, *(Change(f"{v.key}={x}", v.option) for v, x in zip(varied, values, strict=True)))
            scenario = load(name, *each)
            scenario = msgspec.structs.replace(scenario, name=_name(scenario.name, varied, values, number))
            found.append(Variant(name, each, scenario, varied, values))
    return found


def _name(name: str, varied: Sequence[Variation], values: Sequence[str], number: int) -> str:
    """A variant's name, which is its folder's: with its values, or with its number where they make no folder's name."""
    text = ",".join(f"{v.key.rpartition('.')[2]}={value}" for v, value in zip(varied, values, strict=True))
    plain = re.fullmatch(r"[\w.,=+-]+", text) and len(text) <= LONGEST and len({v.key for v in varied}) == len(varied)
    return f"{name},{text}" if plain else f"{name},{number}"


def _split(text: str) -> Iterator[str]:
    """A text split at commas outside brackets and quotes."""
    depth, quote, start = 0, "", 0
    for i, c in enumerate(text):
        if quote:
            quote = "" if c == quote else quote
        elif c in "\"'":
            quote = c
        elif c in "[{":
            depth += 1
        elif c in "]}":
            depth -= 1
        elif c == "," and depth == 0:
            yield text[start:i]
            start = i + 1
    yield text[start:]

"""Changes of a scenario on the command line: `--set`, its short forms, and what `--vary` makes of a scenario."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from sim.model.errors import BadInput

LONGEST = 80  # characters that say how a variant differs: folders are named so
OPTIONS = {
    "users": "load.users",
    "rate": "load.rate",
    "prompt_tokens": "workload.prompt_tokens",
    "output_tokens": "workload.output_tokens",
}
LISTS = ("users", "rate")
EXCLUSIVE = (  # a change of a key in one of a row's sets drops the keys in the others
    ({"load.users"}, {"load.rate"}, {"load.trace"}),
    ({"workload.prompt_tokens", "workload.output_tokens"}, {"workload.empirical"}, {"workload.trace"}),
)


class Change(str):
    """`key=value`, as `--set` takes it; complaints about it name the `option` in which it was written."""

    option: str
    __slots__ = ("option",)

    def __new__(cls, text: str, option: str) -> Change:
        """A change that was written in this option."""
        made = super().__new__(cls, text)
        made.option = option
        return made

    def __reduce__(self) -> tuple[type[Change], tuple[str, str]]:
        """It is sent to other processes."""
        return Change, (str(self), self.option)


def changes(sets: Sequence[str], given: Mapping[str, Any]) -> tuple[str, ...]:
    """`--set` options and short forms (by parameter: texts as written) together.

    Raises `BadInput` where a short form and another option change the same key.
    """
    made: list[Change] = []
    for name, key in OPTIONS.items():
        for text in given.get(name) or ():
            value = f"[{text}]" if name in LISTS and not text.strip().startswith("[") else text
            made.append(Change(f"{key}={value}", f"--{name.replace('_', '-')} {text}"))
    for text in given.get("slo") or ():
        metric, equals, limit = text.partition("=")
        if not (metric.strip() and equals and limit.strip()) or "." in metric:
            raise BadInput("expected METRIC=LIMIT, such as e2e_p95=20", path=f"--slo {text}")
        made.append(Change(f"slo.{metric.strip()}={limit}", f"--slo {text}"))
    for i, change in enumerate(made):
        for other in (*made[:i], *sets):
            if _same(change, other):
                where = other.option if isinstance(other, Change) else f"--set {other}"
                raise BadInput(f"changes the same as {where}; expected one of them", path=change.option)
    return (*sets, *made)


def _same(one: str, other: str) -> bool:
    """Whether two changes are of one key, of one inside the other, or of two that exclude each other."""
    mine, its = (text.partition("=")[0].split(".") for text in (one, other))
    shorter = min(len(mine), len(its))
    if mine[:shorter] == its[:shorter]:
        return True
    first, second = (".".join(parts[:2]) for parts in (mine, its))
    for row in EXCLUSIVE:
        groups = [next((i for i, keys in enumerate(row) if key in keys), None) for key in (first, second)]
        if None not in groups and groups[0] != groups[1]:
            return True
    return False


class Variation(NamedTuple):
    """A key and the values it takes, as written."""

    key: str
    values: tuple[str, ...]
    option: str


def variations(texts: Sequence[str], sets: Sequence[str]) -> list[Variation]:
    """What `--vary` options say: `key=a,b,c`, where commas inside brackets and quotes belong to a value."""
    found: list[Variation] = []
    for text in texts:
        where = f"--vary {text}"
        key, equals, rest = text.partition("=")
        values = tuple(part.strip() for part in _parts(rest))
        if not (key and equals and all(values)):
            raise BadInput("expected KEY=A,B,..., such as server.max_batch_prefill_tokens=4096,8192", path=where)
        if len(set(values)) < len(values):
            raise BadInput("names a value twice", path=where)
        for other in (*(f"{v.key}=" for v in found), *sets):
            if _same(text, other):
                raise BadInput(f"{key} is changed by another option too; expected one of them", path=where)
        found.append(Variation(key, values, where))
    return found


class Variant(NamedTuple):
    """One of the scenarios that `--vary` asks for: the values of the keys varied, and all its changes."""

    values: tuple[str, ...]
    sets: tuple[str, ...]


def variants(found: Sequence[Variation], sets: Sequence[str]) -> list[Variant]:
    """Every combination of the values, in the order written."""
    made = []
    for values in product(*(v.values for v in found)):
        each = (Change(f"{v.key}={value}", v.option) for v, value in zip(found, values, strict=True))
        made.append(Variant(values, (*sets, *each)))
    return made


def called(name: str, found: Sequence[Variation], variant: Variant, number: int) -> str:
    """What a variant of the scenario of this name is called, and its folder: by its values, or by its number."""
    said = ",".join(f"{v.key.rpartition('.')[2]}={value}" for v, value in zip(found, variant.values, strict=True))
    plain = re.fullmatch(r"[\w.,=+-]+", said) and len(said) <= LONGEST and len({v.key for v in found}) == len(found)
    return f"{name},{said}" if plain else f"{name},{number}"


def _parts(text: str) -> Iterator[str]:
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

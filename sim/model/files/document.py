"""JSON files that say where they go wrong: a complaint about one has a file, a line and a key."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from sim.model.errors import BadInput
from sim.model.files.atomic import read_file
from sim.model.files.format import EXPECTED, READ, upgraded
from sim.model.files.shape import Key, StandsFor, check_shape, dotted, same

T = TypeVar("T")

_DECODER = json.JSONDecoder()
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


class Document:
    """A JSON file as it was read: `values` in the present format, the `format` it had, and where each value stands."""

    def __init__(self, path: Path, what: str):
        """Read `path`, which should be `what`; raises `BadInput`."""
        self.path = path
        try:
            self._text = read_file(path).decode()
        except FileNotFoundError as e:
            raise BadInput(f"missing; expected {what}", path=path) from e
        except OSError as e:
            raise BadInput(f"cannot be read ({e.strerror}); expected {what}", path=path) from e
        except UnicodeDecodeError as e:
            raise BadInput(f"not UTF-8 text; expected {what}", path=path) from e
        try:
            self.values: dict[str, Any] = json.loads(
                self._text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_once
            )
        except RecursionError as e:
            raise BadInput(f"nested too deeply; expected {what}", path=path) from e
        except json.JSONDecodeError as e:
            truncated = e.pos >= len(self._text.rstrip()) or e.msg.startswith("Unterminated")
            line = min(e.lineno, max(1, len(self._text.splitlines())))
            problem = "it ends too early" if truncated else e.msg
            raise BadInput(f"not JSON: {problem}; expected {what}", path=path, line=line) from e
        except ValueError as e:
            raise BadInput(f"not JSON: {e}; expected {what}", path=path) from e
        if _HALF.search(self._text) and not _whole(self.values):
            raise BadInput(f"not text: half a character (\\ud800 to \\udfff); expected {what}", path=path)
        if not isinstance(self.values, dict):
            raise BadInput(f"expected {what}", path=path, line=1)
        found = self.values.get("format")
        if found not in READ or isinstance(found, bool):
            raise self.fail(("format",), f"expected {EXPECTED}, found {msgspec.json.encode(found).decode()}")
        self.format: int = found
        self.values = upgraded(self.values)

    def read_as(
        self, kind: type[T], stands_for: StandsFor = same, convert: Callable[[type, Any], Any] | None = None
    ) -> T:
        """The values as a frozen type; raises `BadInput` with line and key for what does not fit.

        `stands_for` and `convert` (msgspec's `dec_hook`) are for types whose struct a value chooses itself.
        """
        check_shape(self.values, kind, self.fail, (), stands_for)
        try:
            return msgspec.convert(self.values, kind, dec_hook=convert)
        except (msgspec.ValidationError, OverflowError) as e:  # nothing where there may not be nothing
            message, _, key = str(e).partition(" - at `$")
            raise BadInput(message, path=self.path, key=key.strip(".`") or None) from e

    def fail(self, key: Key, message: str) -> BadInput:
        """The complaint about `key`."""
        return BadInput(message, path=self.path, line=self._line_of(key), key=dotted(key) or None)

    def _line_of(self, key: Key) -> int:
        """The line of the value of `key`, or of the last part of it that is there."""
        at = _blank(self._text, 0)
        for part in key:
            inside = _enter(self._text, at, part)
            if inside is None:
                break
            at = inside
        return self._text.count("\n", 0, at) + 1


def _enter(text: str, at: int, part: str | int) -> int | None:
    """Where the value of `part` begins in the map or list that begins at `at`."""
    if text[at] not in "{[":
        return None
    number: str | int = 0
    in_map = text[at] == "{"
    at = _blank(text, at + 1)
    while text[at] not in "]}":
        name = number
        if in_map:
            name, at = _DECODER.raw_decode(text, at)
            at = _blank(text, _blank(text, at) + 1)
        if name == part:
            return at
        at = _blank(text, _DECODER.raw_decode(text, at)[1])
        at = _blank(text, at + 1) if text[at] == "," else at
        number = int(number) + 1
    return None


def _blank(text: str, at: int) -> int:
    while text[at].isspace():
        at += 1
    return at


def _whole(values: Any) -> bool:
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return values


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is too large a number")
    return value

"""The rows of a file that somebody else wrote: a CSV in any of its usual forms, JSON lines, or a JSON array; plain or
`.gz`.

A byte order mark is skipped. Of a CSV the delimiter is the one that its header has most of (comma, semicolon, tab,
bar), and `#` begins a comment. Values are as they stand, text or JSON's own; what they mean is the reader's business.
"""

from __future__ import annotations

import codecs
import csv
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from sim.model.errors import BadInput
from sim.model.files.atomic import gunzip, read_file
from sim.model.warning import Notice, notice

DELIMITERS = ",;\t|"
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class Rows:
    """A file's column names, in order, and its rows: (line, values by name).

    `delimiter` is empty for JSON. `repeated` are names that stand more than once in a header: what is under them is
    not one value. Iterating raises `BadInput` at the first row that is none; a torn last line of JSON lines is left
    out, and said in `warnings`.
    """

    path: Path
    names: list[str]
    rows: Iterator[tuple[int, dict[str, Any]]]
    line: int = 1
    delimiter: str = ""
    repeated: set[str] = field(default_factory=set)
    warnings: list[Notice] = field(default_factory=list)


def read_text(path: Path, expected: str) -> str:
    """The text of a file, plain or gzipped, without its byte order mark; `BadInput` says what was `expected`."""
    try:
        raw = read_file(path)
        raw = gunzip(raw, path) if raw.startswith(_GZIP) else raw
    except FileNotFoundError as e:
        raise BadInput(f"missing; expected {expected}", path=path) from e
    except (OSError, EOFError, zlib.error) as e:
        raise BadInput(f"cannot be read ({getattr(e, 'strerror', None) or e}); expected {expected}", path=path) from e
    utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return raw.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as e:
        raise BadInput(f"not UTF-8 text; expected {expected}", path=path) from e


def read_rows(path: Path, expected: str) -> Rows:
    """The rows of a CSV, of JSON lines or of a JSON array."""
    text = read_text(path, expected)
    begins = text.lstrip()[:1]
    return _json(text, path, expected) if begins in ("{", "[") else _csv(text, path, expected)


def delimiter_of(header: str) -> str:
    """The delimiter of a CSV with this header."""
    return max(DELIMITERS, key=header.count)


def _csv(text: str, path: Path, expected: str) -> Rows:
    lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip() and not line.startswith("#")]
    if not lines:
        raise BadInput(f"empty; expected {expected}", path=path, line=1)
    delimiter = delimiter_of(lines[0][1])
    reader = csv.reader((line for _, line in lines), delimiter=delimiter, skipinitialspace=True)
    names = [name.strip() for name in next(reader)]
    repeated = {name for name, count in Counter(names).items() if count > 1}

    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        try:
            for at, values in enumerate(reader, 1):
                line = lines[at][0] if at < len(lines) else lines[-1][0]
                if reader.line_num != at + 1:
                    raise BadInput("expected a row that ends on its own line", path=path, line=line)
                yield line, dict(zip(names, values, strict=False))
        except csv.Error as e:
            raise BadInput(f"not a CSV ({e})", path=path, line=lines[min(reader.line_num, len(lines)) - 1][0]) from e

    return Rows(path, names, rows(), lines[0][0], delimiter, repeated)


def _json(text: str, path: Path, expected: str) -> Rows:
    warnings: list[Notice] = []
    records = _array(text, path) if text.lstrip().startswith("[") else _lines(text, path, warnings)
    first = next(records, None)
    if first is None:
        raise BadInput(f"empty; expected {expected}", path=path)

    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        yield first
        yield from records

    return Rows(path, list(first[1]), rows(), first[0], warnings=warnings)


def _lines(text: str, path: Path, warnings: list[Notice]) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = text.split("\n")
    for line, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        try:
            record = msgspec.json.decode(raw)
        except (msgspec.DecodeError, RecursionError) as e:
            if line == len(lines) and line > 1:
                warnings.append(notice("torn-line", f"{path.name}: the last line was torn and is left out"))
                return
            raise BadInput(f"not JSON ({e})", path=path, line=line) from e
        yield line, _record(record, path, line)


def _array(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        records = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as e:
        raise BadInput(f"not JSON ({e})", path=path) from e
    for number, record in enumerate(records, 1):
        yield number, _record(record, path, number)


def _record(record: Any, path: Path, line: int) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise BadInput("expected JSON objects, each a request", path=path, line=line)
    return record


def under(record: dict[str, Any], name: str) -> Any:
    """The value under a name, which may be dotted where a record holds another; None where there is none."""
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value

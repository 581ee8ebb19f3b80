"""Results of other tools as runs: which tool wrote a file, told from what is in it.

`guidellm`, `vllm bench serve`, `aiperf` and locust are known; each has its module, whose table says what becomes what.
A run keeps what the tool's data allow, and its doubts say what they do not.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import msgspec

from scenarios import aiperf, guidellm, locust_csv, vllm_bench
from sim.errors import BadInput
from sim.run import Run

KNOWN = (
    "expected guidellm's JSON report, what `vllm bench serve --save-result --save-detailed` writes, aiperf's "
    f"{aiperf.RECORDS} or its folder, locust's _stats_history.csv, or the rows of locust-plugins' JmeterListener"
)


def import_results(path: Path) -> Run:
    """The run of another tool's results: a file, plain or `.gz`, or the folder of an aiperf sweep.

    Raises `BadInput` for what none of them wrote, or wrote without saying when each request was sent.
    """
    if path.is_dir():
        return _aiperf(aiperf.records_in(path), path)
    text = _text(path)
    if locust_csv.speaks(text):
        return locust_csv.read(text, path)
    documents = _documents(text, path)
    first = documents[0]
    if aiperf.summarises(first) and not guidellm.speaks(first):
        return _aiperf([aiperf.records_of(path)], path)
    if aiperf.speaks(first):
        return aiperf.read({path: documents}, path)
    if guidellm.speaks(first):
        return guidellm.read(first, path)
    if vllm_bench.speaks(first):
        return vllm_bench.read(documents, path)
    raise BadInput(f"not a known tool's results; {KNOWN}", path=path)


def _aiperf(files: list[Path], path: Path) -> Run:
    if not files:
        raise BadInput(f"no {aiperf.RECORDS} in it; {KNOWN}", path=path)
    for file in files:
        if not file.is_file():
            raise BadInput("missing; expected the requests, which aiperf --export-level records writes", path=file)
    return aiperf.read({file: _documents(_text(file), file) for file in files}, path)


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode()
    except FileNotFoundError as e:
        raise BadInput(f"missing; {KNOWN}", path=path) from e
    except UnicodeDecodeError as e:
        raise BadInput(f"not UTF-8 text; {KNOWN}", path=path) from e
    except (OSError, EOFError, zlib.error) as e:
        raise BadInput(f"cannot be read ({e}); {KNOWN}", path=path) from e


def _documents(text: str, path: Path) -> list[Any]:
    """A JSON document, or one a line."""
    try:
        return [msgspec.json.decode(text)]
    except (msgspec.DecodeError, RecursionError):
        found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found.append(msgspec.json.decode(line))
        except (msgspec.DecodeError, RecursionError) as e:
            raise BadInput(f"not JSON ({e}); {KNOWN}", path=path, line=number) from e
    if not found:
        raise BadInput(f"empty; {KNOWN}", path=path)
    return found

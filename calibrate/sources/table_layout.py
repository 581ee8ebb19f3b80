"""What the columns of a step-time table are called, and reading one.

The plain table is a CSV with a header of

    phase, sequences, tokens_per_sequence, seconds (or ms)

where `phase` is `prefill` (tokens_per_sequence: the prompt), `decode` (the mean context while the step was timed) or
`batch` (prompt; one more column `output_tokens`; the time of a whole static batch from prefill to last token). Without
`phase`, a column `context_tokens` marks a decode table and `prompt_tokens` or `prefill_tokens` a prefill table;
`sequences` may be left out (1), and may be called `batch` or `batch_size`. Lines that begin with `#` are comments. The
tables of Splitwise, LMDeploy and Argonne are read under their own names.
"""

from __future__ import annotations

import csv
import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sim.model.errors import BadInput
from sim.model.files.atomic import read_file

PHASES = ("prefill", "decode", "batch")
SEQUENCES = ("sequences", "batch", "batch_size")
PER_SEQUENCE = ("tokens_per_sequence", "context_or_prompt_tokens")
# columns that identify a machine or an engine: rows that differ in one are never fitted together
IDENTITY = ("model", "hardware", "gpu", "n_gpu", "tensor_parallel", "tp", "framework", "engine", "source")


@dataclass(frozen=True)
class Row:
    """One timing of a table.

    `tokens` are per sequence (prefill, batch: the prompt; decode: the mean context); `output` is that of a whole batch;
    `machine` has the identity columns.
    """

    phase: str
    sequences: int
    tokens: float
    seconds: float
    output: int
    machine: tuple[tuple[str, str], ...]
    path: Path
    line: int


class Cells:
    """One line of the file; its errors name file, line and column."""

    def __init__(self, values: Mapping[str, str], path: Path, line: int):
        self._values, self.path, self.line = values, path, line

    def text(self, column: str) -> str:
        """The cell as written."""
        return self._values[column]

    def number(self, column: str, *, zero: bool = False) -> float:
        """A finite number, positive unless `zero` is allowed."""
        text = self._values[column]
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            raise self.bad(column, f"expected a {'' if zero else 'positive '}number, found {text!r}")
        return value

    def count(self, column: str) -> int:
        """A whole positive number."""
        value = self.number(column)
        if value != int(value):
            raise self.bad(column, f"expected a whole number, found {self._values[column]!r}")
        return int(value)

    def first(self, *columns: str) -> str | None:
        """The first of these columns that the table has."""
        return next((c for c in columns if c in self._values), None)

    def bad(self, column: str, message: str) -> BadInput:
        """What is wrong with a cell."""
        return BadInput(message, path=self.path, line=self.line, key=column)

    @property
    def machine(self) -> tuple[tuple[str, str], ...]:
        """The identity columns."""
        return tuple((c, self._values[c]) for c in IDENTITY if c in self._values)


class Timing(NamedTuple):
    """One timing as a layout reads it from a line."""

    phase: str
    sequences: int
    tokens: float
    seconds: float
    output: int = 0


def _plain(cells: Cells) -> Iterator[Timing]:
    """The plain table, with or without `phase`."""
    per_sequence = cells.first(*PER_SEQUENCE)
    if cells.first("phase"):
        phase = cells.text("phase")
        if phase not in PHASES:
            raise cells.bad("phase", f"expected one of {', '.join(PHASES)}, found {phase!r}")
    else:
        phase = "decode" if cells.first("context_tokens") else "prefill"
        per_sequence = cells.first("context_tokens", "prompt_tokens", "prefill_tokens")
    assert per_sequence is not None  # the layout's required columns
    time = cells.first(*TIMES)
    assert time is not None
    sequences = cells.first(*SEQUENCES)
    output = 0
    if phase == "batch":
        if cells.first("output_tokens") is None:
            raise cells.bad("phase", "a row of phase batch needs the column output_tokens")
        output = cells.count("output_tokens")
    yield Timing(
        phase,
        cells.count(sequences) if sequences else 1,
        cells.number(per_sequence, zero=phase == "decode"),
        cells.number(time) * (1.0 if time == "seconds" else 1e-3),
        output,
    )


def _splitwise(prompt: str, token: str, total: str) -> Callable[[Cells], Iterator[Timing]]:
    """Splitwise's perf_model.csv or its medians, in milliseconds.

    Many rows with long outputs stopped early, so the number of decode steps, and the mean context, follow from the
    recorded times, not from `token_size`.
    """

    def read(cells: Cells) -> Iterator[Timing]:
        sequences, size = cells.count("batch_size"), cells.number("prompt_size")
        prefill, step, whole = (cells.number(c) for c in (prompt, token, total))
        yield Timing("prefill", sequences, size, prefill * 1e-3)
        yield Timing("decode", sequences, size + max(whole - prefill, 0.0) / step / 2, step * 1e-3)

    return read


def _lmdeploy(cells: Cells) -> Iterator[Timing]:
    """LMDeploy's static batches.

    The mean first-token latency is over requests of which all but the first share a prefill; its maximum contains
    stalls. The median step is in the middle of the answer.
    """
    sequences, prompt, out = cells.count("batch"), cells.number("prompt"), cells.count("out")
    yield Timing("prefill", sequences, prompt, cells.number("ftl_avg_s"))
    yield Timing("decode", sequences, prompt + out / 2, cells.number("tok_p50_s"))


def _argonne(cells: Cells) -> Iterator[Timing]:
    """Argonne's whole-batch latencies, as many tokens out as in."""
    length = cells.count("in_len_eq_out_len")
    yield Timing("batch", cells.count("batch"), length, cells.number("latency_s"), length)


TIMES = ("seconds", "ms")
PLAIN = [{"phase", column} for column in PER_SEQUENCE] + [{"context_tokens"}, {"prompt_tokens"}, {"prefill_tokens"}]
# the columns a layout needs, and how it reads a line; the first whose columns are all there is taken
LAYOUTS: list[tuple[set[str], Callable[[Cells], Iterator[Timing]]]] = [
    (
        {"prompt_size", "batch_size", "prompt_time", "token_time", "e2e_time"},
        _splitwise("prompt_time", "token_time", "e2e_time"),
    ),
    (
        {"prompt_size", "batch_size", "prompt_ms_med", "token_ms_med", "e2e_ms_med"},
        _splitwise("prompt_ms_med", "token_ms_med", "e2e_ms_med"),
    ),
    ({"batch", "prompt", "out", "ftl_avg_s", "tok_p50_s"}, _lmdeploy),
    ({"in_len_eq_out_len", "batch", "latency_s"}, _argonne),
    *((columns | {time}, _plain) for columns in PLAIN for time in TIMES),
]


def read_table(path: Path) -> list[Row]:
    """Every timing of a CSV of any known layout; `BadInput` names file, line and column."""
    try:
        text = read_file(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "not text"
        raise BadInput(f"cannot be read ({why}); expected a CSV of step times", path=path) from e
    lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip() and not line.startswith("#")]
    if not lines:
        raise BadInput("empty; expected a header phase,sequences,tokens_per_sequence,seconds and rows", path=path)
    # one physical line is one record: a newline inside quotes has no place among timings
    parsed = [(n, [cell.strip() for cell in next(csv.reader([line]))]) for n, line in lines]
    header_line, header = parsed[0]
    read = _layout(path, header_line, header)
    rows = []
    for number, values in parsed[1:]:
        if len(values) != len(header):
            raise BadInput(f"expected {len(header)} cells, found {len(values)}", path=path, line=number)
        cells = Cells(dict(zip(header, values, strict=True)), path, number)
        rows += [Row(*timing, machine=cells.machine, path=path, line=number) for timing in read(cells)]
    if not rows:
        raise BadInput("expected rows below the header, found none", path=path, line=header_line)
    return rows


def _layout(path: Path, line: int, header: list[str]) -> Callable[[Cells], Iterator[Timing]]:
    for column in header:
        if header.count(column) > 1:
            raise BadInput("the column is there twice", path=path, line=line, key=column)
    for needed, read in LAYOUTS:
        if needed <= set(header):
            return read
    plain = ["phase", "sequences", "tokens_per_sequence", "seconds", "ms", "context_tokens", "prompt_tokens"]
    near = [(c, m[0]) for c in header if c not in plain and (m := difflib.get_close_matches(c, plain, 1))]
    hint = f" ({near[0][0]}: did you mean {near[0][1]}?)" if near else ""
    raise BadInput(
        "expected the columns phase, sequences, tokens_per_sequence and seconds or ms, "
        f"found {', '.join(header)}{hint}",
        path=path,
        line=line,
    )

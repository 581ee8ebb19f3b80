"""The machine that rows of a table belong to: rows of different models, boards or engines are never fitted together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from calibrate.sources.table_layout import Row
from sim.engines.catalog import identity
from sim.model.errors import BadInput
from sim.model.identity import Identity
from sim.model.scenario import Hardware
from sim.model.warning import Notice, notice

# engines as files of step times name them
ENGINES = (
    *("text-generation-inference", "tgi", "vllm", "sglang", "lmdeploy", "turbomind"),
    *("tensorrt-llm", "trtllm", "deepspeed", "llama.cpp", "llamacpp", "ollama"),
)
Who = tuple[tuple[str, str], ...]  # what the identity columns of a row say


def choose_machine(rows: list[Row], where: Mapping[str, str], machine: Hardware, warnings: list[Notice]) -> list[Row]:
    """The rows of one machine, chosen by `where` ({column: value}) or `machine`.

    Of several that remain the one with most rows, of equals the slowest, is taken, which is added to the warnings.
    Raises `BadInput` where nothing remains.
    """
    path = rows[0].path
    for column, value in where.items():
        found = sorted({dict(row.machine)[column] for row in rows if column in dict(row.machine)})
        if not found:
            named = sorted({c for row in rows for c, _ in row.machine})
            raise BadInput(
                f"expected one of the columns that tell machines apart ({', '.join(named) or 'none here'})",
                path=path,
                key=column,
            )
        rows = [row for row in rows if dict(row.machine).get(column) == value]
        if not rows:
            raise BadInput(f"expected one of {', '.join(found)}, found {value!r}", path=path, key=column)
    groups: dict[Who, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.machine, []).append(row)
    if len(groups) == 1:
        return rows
    alike = (
        {who: own for who, own in groups.items() if _same(machine_of(who, Hardware()), machine)}
        if machine != Hardware()
        else {}
    )
    among = alike or groups
    who = max(among, key=lambda who: (len(among[who]), sum(math.log(row.seconds) for row in among[who])))
    if len(among) > 1:
        shown = [_name(other, groups) for other in among if other != who]
        more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
        warnings.append(
            notice(
                "table-machine-chosen",
                f"{path.name} holds {len(among)} machines; {_name(who, groups)} was taken, which has most rows, of "
                f"equals the slowest; the others: {'; '.join(shown[:5])}{more}",
            )
        )
    return among[who]


def _name(who: Who, groups: Mapping[Who, object]) -> str:
    """The columns in which this machine differs from the others, as the option `where` takes them."""
    differing = {c for c, _ in who if len({dict(other).get(c) for other in groups}) > 1}
    return " ".join(f"{column}={value}" for column, value in who if column in differing)


def machine_of(who: Who, known: Hardware) -> Hardware:
    """The machine by the identity columns, completed by what is known of it."""
    said = dict(who)
    gpus = said.get("n_gpu") or said.get("tensor_parallel") or said.get("tp")
    parallel = said.get("tensor_parallel") or said.get("tp")
    return Hardware(
        model=said.get("model", known.model),
        gpu=said.get("gpu") or said.get("hardware") or known.gpu,
        gpus=int(gpus) if gpus and gpus.isdigit() else known.gpus,
        tensor_parallel=int(parallel) if parallel and parallel.isdigit() else known.tensor_parallel,
    )


def engine_of(rows: Sequence[Row]) -> Identity | None:
    """The engine that was timed: from a column, else from the file's name."""
    said = dict(rows[0].machine)
    if text := said.get("engine") or said.get("framework"):
        return identity(text, "file")
    name = rows[0].path.stem.lower()
    return next((identity(engine, "file") for engine in ENGINES if engine in name), None)


def _same(one: Hardware, other: Hardware) -> bool:
    """Whether model and size do not differ where both are known; spellings of a model's name are one."""

    def plain(name: str) -> str:
        return "".join(c for c in name.lower().rsplit("/", 1)[-1].removesuffix("-hf") if c.isalnum())

    if one.model and other.model and plain(one.model) != plain(other.model):
        return False
    wide = other.tensor_parallel or other.gpus
    return not (one.gpus and wide and one.gpus != wide)

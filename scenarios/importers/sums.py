"""Sums that another tool wrote without its requests, as the `published` figures of a scenario.

Means of TTFT, TPOT and E2E at a number of users: of `vllm bench serve` without --save-detailed, of aiperf's summary,
and of guidellm's report. How far a figure may be off is twice the standard error of the mean, from the spread over the
requests that the tool wrote with it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from scenarios.importers.results import has, named
from scenarios.importers.served import Served
from sim.model.errors import BadInput

AIPERF = {"ttft_mean": "time_to_first_token", "tpot_mean": "inter_token_latency", "e2e_mean": "request_latency"}
GUIDELLM = {"ttft_mean": "time_to_first_token_ms", "tpot_mean": "inter_token_latency_ms", "e2e_mean": "request_latency"}
VLLM = {"ttft_mean": "ttft", "tpot_mean": "tpot", "e2e_mean": "e2el"}
PER_SECOND = {"ms": 1e3, "s": 1.0, "sec": 1.0, "us": 1e6, "ns": 1e9}


class Mean(NamedTuple):
    """A mean over `size` values of standard deviation `spread`."""

    value: float
    spread: float
    size: float

    @property
    def half_width(self) -> float:
        """Of the 95 % interval of the mean."""
        return 1.96 * self.spread / math.sqrt(self.size)


class Sums(NamedTuple):
    """One load: its users, the mean lengths, and the means by metric, s."""

    users: int
    prompt_tokens: int
    output_tokens: int
    means: Mapping[str, Mean]


def as_scenario(documents: list[Any], path: Path, served: Served | None) -> str:
    """A scenario with the sums of a file as its published figures; `served` names the engine that they are of."""
    tool, found = _read(documents)
    if not found:
        message = (
            "expected the sums of `vllm bench serve`, aiperf or guidellm at a number of concurrent users, with the "
            "standard deviations that they write"
        )
        raise BadInput(message, path=path)
    if served is None or served.server is None:
        raise BadInput("expected --engine with it: figures are of a server, and the file does not say which", path=path)
    lines = [
        f"# Sums that {tool} wrote into {path.name}. A scenario is fitted to them by `servecast calibrate`.",
        "format: 2",
        f"name: {json.dumps(named(path))}",
        f"server: {msgspec.json.encode(served.written).decode()}",
    ]
    if served.like is not None:
        lines.append(f"machine: {msgspec.json.encode(served.like.machine).decode()}")
    first = found[0]
    lines += [
        f"workload: {{prompt_tokens: {first.prompt_tokens}, output_tokens: {first.output_tokens}}}",
        f"load: {{users: {sorted({each.users for each in found})}}}",
        "published:",
    ]
    for each in found:
        profile = f"prompt_tokens: {each.prompt_tokens}, output_tokens: {each.output_tokens}, users: {each.users}"
        for metric, mean in each.means.items():
            figure = f"metric: {metric}, value: {mean.value:.6g}, rounding: {mean.half_width:.3g}"
            lines.append(f"  - {{{profile}, {figure}, source: {json.dumps(f'{tool}, {path.name}')}}}")
    return "\n".join(lines) + "\n"


def _read(documents: list[Any]) -> tuple[str, list[Sums]]:
    first = documents[0]
    if isinstance(first, dict) and isinstance(first.get("benchmarks"), list):
        return "guidellm", [each for b in first["benchmarks"] for each in _guidellm(b)]
    if has(first, "request_latency", "input_config"):
        return "aiperf", [each for document in documents for each in _aiperf(document)]
    if has(first, "mean_ttft_ms", "completed"):
        return "vllm bench serve", [each for document in documents for each in _vllm(document)]
    return "", []


def _vllm(document: dict[str, Any]) -> Iterator[Sums]:
    count, users = _number(document.get("completed")), _number(document.get("max_concurrency"))
    totals = [_number(document.get(f"total_{side}_tokens")) for side in ("input", "output")]
    if _number(document.get("request_rate")) or not count:
        return  # a rate has no users
    means = {
        metric: Mean(
            _number(document.get(f"mean_{name}_ms")) / 1e3, _number(document.get(f"std_{name}_ms")) / 1e3, count
        )
        for metric, name in VLLM.items()
        if _number(document.get(f"mean_{name}_ms"))
    }
    yield from _sums(users, totals[0] / count, totals[1] / count, means)


def _aiperf(document: dict[str, Any]) -> Iterator[Sums]:
    asked = document.get("input_config")
    phases = asked.get("phases") if isinstance(asked, dict) else None
    phase = next((p for p in phases or [] if isinstance(p, dict) and p.get("name") == "profiling"), {})
    if _number(phase.get("rate")):
        return

    def mean(name: str) -> Mean | None:
        said = document.get(name)
        if not isinstance(said, dict) or said.get("unit", "ms") not in (*PER_SECOND, "tokens"):
            return None
        unit = PER_SECOND.get(said.get("unit", "ms"), 1.0)
        return Mean(_number(said.get("avg")) / unit, _number(said.get("std")) / unit, _number(said.get("count")))

    lengths = [mean("input_sequence_length"), mean("output_sequence_length")]
    found = {metric: each for metric, name in AIPERF.items() if (each := mean(name)) is not None}
    prompt, output = (0.0 if each is None else each.value for each in lengths)
    yield from _sums(_number(phase.get("concurrency")), prompt, output, found)


def _guidellm(benchmark: Any) -> Iterator[Sums]:
    if not has(benchmark, "config", "metrics") or not has(benchmark["config"], "strategy"):
        return
    strategy, metrics = benchmark["config"]["strategy"], benchmark["metrics"]
    users = 1 if strategy.get("type_") == "synchronous" else _number(strategy.get("streams"))

    def mean(name: str, unit: float = 1.0) -> Mean | None:
        said = metrics.get(name)
        ok = said.get("successful") if isinstance(said, dict) else None
        if not isinstance(ok, dict):
            return None
        return Mean(_number(ok.get("mean")) / unit, _number(ok.get("std_dev")) / unit, _number(ok.get("count")))

    lengths = [mean("prompt_token_count"), mean("output_token_count")]
    scaled = {metric: mean(name, 1e3 if name.endswith("_ms") else 1.0) for metric, name in GUIDELLM.items()}
    prompt, output = (0.0 if each is None else each.value for each in lengths)
    yield from _sums(users, prompt, output, {metric: each for metric, each in scaled.items() if each is not None})


def _sums(users: float, prompt: float, output: float, means: Mapping[str, Mean]) -> Iterator[Sums]:
    kept = {metric: mean for metric, mean in means.items() if mean.value > 0 and mean.size > 0 and mean.spread > 0}
    if users >= 1 and round(prompt) >= 1 and round(output) >= 1 and kept:
        yield Sums(round(users), round(prompt), round(output), kept)


def _number(value: Any) -> float:
    """A finite number of a file; 0 for anything else, as for one that is missing."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return 0.0

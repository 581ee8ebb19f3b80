"""A small ladder on a server, climbed, and what it left."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from measure.ladder.session import measure
from sim.engines.tgi_0_9_4 import Flags
from sim.model.scenario import Load, Scenario
from sim.model.workload import Workload
from sim.run import Run, read_run


def scenario(name: str = "small", prompt: int = 60, output: int = 20, **load: Any) -> Scenario:
    return Scenario(
        server=Flags(),
        name=name,
        workload=Workload(prompt_tokens=prompt, output_tokens=output),
        load=Load(**{"users": [1, 3], "spawn_rate": 20.0, "seconds": 1.0} | load),
    )


def climb(s: Scenario, url: str, out: Path, **more: Any) -> tuple[Run, str]:
    """Measure; returns the run and what was said."""
    with Path(os.devnull).open("w") as null:
        console = Console(file=null, record=True, width=300)
        measure(s, url, out, console=console, **{"patience": 5.0} | more)
    return read_run(out), console.export_text()


def head(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "run.json").read_text())
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def wait_for_requests(out: Path, number: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if sum(file.read_bytes().count(b"\n") for file in out.glob("requests*.jsonl")) >= number:
            return
        time.sleep(0.02)
    raise AssertionError(f"fewer than {number} requests within 30 s")
